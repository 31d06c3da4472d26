"""Time of one attention layer on TPUs, forward and backward, as a kernel and as XLA compiles it, by their compiler.

  python benchmarks/attention.py --slices v5e:1x1 v6e:1x1         # needs libtpu, and no TPU

The default shape is OpenVLA-OFT's on openvla-7b: two cameras, state, prompt and 56 action slots. Attention is
bidirectional and pads are masked. `--causal` measures causal attention with masked keys, as pretraining with two
cameras needs if a row misses one.
Estimates: compute from the compiler's cycle counts, as `--plan` has them.
"""

import argparse
import os
import tempfile
from pathlib import Path

from openvla_jax.parallel.tpu import compiler_options, parse_slice
from openvla_jax.planning.environment import planning_environment

HEADS, DIM, THETA = 32, 128, 1e4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", nargs="+", default=["v5e:1x1"])
    parser.add_argument("--rows", type=int, default=8, help="of a chip")
    parser.add_argument("--length", type=int, default=633)
    parser.add_argument("--causal", action="store_true")
    args = parser.parse_args()
    print("| slice | XLA ms | kernel ms | ratio |\n| --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as dump:
        os.environ.update(planning_environment(os.environ, Path(dump)))  # before jax is imported
        for name in args.slices:
            seconds = [estimate(name, Path(dump), kernels, args) for kernels in (False, True)]
            cells = [f"{1e3 * each:.2f}" for each in seconds]
            print(f"| {name} | {' | '.join(cells)} | {seconds[0] / seconds[1]:.1f} |", flush=True)


def estimate(name: str, dump: Path, kernels: bool, args: argparse.Namespace) -> float:
    """Returns the seconds of attention and its gradients on one chip."""
    import jax
    import jax.numpy as jnp

    from openvla_jax.models.attention import attention, attention_kernel, rope
    from openvla_jax.parallel.execution import Execution
    from openvla_jax.parallel.sharding import make_mesh
    from openvla_jax.planning.compile import compile_for, topology_devices

    tpu = parse_slice(name)
    mesh = make_mesh({"fsdp": 1}, topology_devices(tpu)[:1])
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    rows, length, width = args.rows, args.length, HEADS * DIM
    x = jax.ShapeDtypeStruct((rows, length, width), jnp.bfloat16, sharding=place)
    keys = jax.ShapeDtypeStruct((rows, length), jnp.bool_, sharding=place)

    def mixed(q, k, v, keys):
        if kernels:
            execution = Execution(mesh, kernels=True)
            kernel = attention_kernel(q, HEADS, execution, causal=args.causal, theta=THETA, keys=keys)
            assert kernel is not None, "the kernel does not take this shape"
            return kernel(q, k, v)
        q, k, v = (x.reshape(rows, length, HEADS, DIM) for x in (q, k, v))
        q, k = (rope(x, jnp.arange(length)[None], THETA) for x in (q, k))
        mask = jnp.ones((1, length, length), bool)
        mask = (jnp.tril(mask) if args.causal else mask) & keys[:, None]
        return attention(q, k, v, mask).reshape(rows, length, width)

    def both(q, k, v, keys, gradient):
        result, back = jax.vjp(lambda *qkv: mixed(*qkv, keys), q, k, v)
        return result, *back(gradient)

    both.__name__ = program = f"attention_{tpu.generation}_{'kernel' if kernels else 'xla'}"
    compiled = compile_for(jax.jit(both).lower(x, x, x, keys, x), program, tpu, dump, compiler_options(tpu.generation))
    assert compiled.cost is not None, f"{name}: it does not fit"
    return compiled.cost.compute_seconds


if __name__ == "__main__":
    main()
