"""Time of a chunk of actions that is predicted at once, beside one forward pass and beside decoding token by token.

  python benchmarks/chunks.py                     # 0.8 B parameters, two cameras, a state: two minutes on two cores
  python benchmarks/chunks.py --head diffusion --denoising_steps 10

All sides have the same cameras, state and prompt, float32 on a CPU and bfloat16 elsewhere, and take turns. The forward
pass is of that prompt alone, without slots and head. Fails, for the head l1 on a CPU, if a chunk takes more than 1.3
times the forward pass, or if an action that is decoded on its own, as OpenVLA does, takes less than 5 times as long.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

import jax
import jax.numpy as jnp
from measure.models import SIZES, count_billions, random_model, requests, sized
from measure.timing import time_in_turns

from openvla_jax.models.heads import Inputs, make_head
from openvla_jax.types import ActionSpec

MAX_PASSES, MIN_SAVING = 1.3, 5.0
DIM, STATE = 7, 8


def prediction(model, action: ActionSpec, inputs: Inputs):
    """Returns a function that predicts one chunk by a compiled program."""
    leaves, structure = jax.tree.flatten(model)
    head = make_head(model.config, action)

    @jax.jit
    def run(leaves, inputs):
        predicted = head.predict(jax.tree.unflatten(structure, leaves), inputs, action.dim)
        return predicted.tokens if predicted.actions is None else predicted.actions

    return lambda: jax.block_until_ready(run(leaves, inputs))


def forward_pass(model, inputs: Inputs):
    """Returns a function that computes the hidden states of the prompt."""
    leaves, structure = jax.tree.flatten(model)

    @jax.jit
    def run(leaves, inputs):
        model = jax.tree.unflatten(structure, leaves)
        return model.hidden(model.normalize(inputs.images), inputs.input_ids, state=inputs.state)

    return lambda: jax.block_until_ready(run(leaves, inputs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cpu = jax.default_backend() == "cpu"
    parser.add_argument("--size", choices=("smallest", *SIZES), default="0.8b" if cpu else "7b")
    parser.add_argument("--head", choices=("l1", "parallel_tokens", "diffusion"), default="l1")
    parser.add_argument("--horizon", type=int, default=8)
    parser.add_argument("--cameras", type=int, default=2)
    parser.add_argument("--denoising_steps", type=int, default=50)
    parser.add_argument("--length", type=int, default=25, help="tokens of the prompt")
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()

    action = ActionSpec(DIM, args.horizon, args.horizon, head=args.head, denoising_steps=args.denoising_steps, bins=256)
    tokens = dataclasses.replace(sized(args.size), cameras=args.cameras, state_dim=STATE)
    chunks = dataclasses.replace(tokens, head=action.head, action_dim=DIM if action.is_continuous else 0)
    images, ids, lengths = requests(tokens, args.cameras, args.length)
    state = np.linspace(-1, 1, STATE, dtype=np.float32)[None]
    inputs = Inputs(images[None], ids[:1], lengths[:1], state)

    dtype = jnp.float32 if cpu else jnp.bfloat16
    models = {name: random_model(config, dtype) for name, config in (("tokens", tokens), ("chunks", chunks))}
    if cpu:  # as a policy does
        for model in models.values():
            model.unstack()
    print(f"{chunks.name}: {count_billions(chunks):.2f} B parameters, {jax.local_devices()[0].device_kind}, "
          f"{args.cameras} cameras, head {args.head}")  # fmt: skip
    times = time_in_turns(
        {
            f"chunk of {args.horizon}": prediction(models["chunks"], action, inputs),
            "forward pass": forward_pass(models["tokens"], inputs),
            "decoding of 1": prediction(models["tokens"], ActionSpec(DIM), inputs),
            f"decoding of {args.horizon}": prediction(
                models["tokens"], ActionSpec(DIM, args.horizon, args.horizon), inputs
            ),
        },
        args.runs,
    )
    print("| side | ms p50 | lowest | actions/s |\n| --- | --- | --- | --- |")
    actions = dict(zip(times, (args.horizon, None, 1, args.horizon), strict=True))
    p50 = {side: float(np.median(taken)) for side, taken in times.items()}
    for side, taken in times.items():
        rate = f"{actions[side] / p50[side]:.2f}" if actions[side] else "-"
        print(f"| {side} | {1e3 * p50[side]:,.0f} | {1e3 * taken.min():,.0f} | {rate} |")
    chunk, forward, *decoding = p50.values()
    passes = chunk / forward
    savings = [took / count * args.horizon / chunk for took, count in zip(decoding, (1, args.horizon), strict=True)]
    print(f"a chunk takes {passes:.2f} forward passes; an action takes {savings[0]:.1f} times less than decoded one by "
          f"one, {savings[1]:.1f} times less than {args.horizon} decoded in a row")  # fmt: skip
    if cpu and args.head == "l1" and (passes > MAX_PASSES or savings[0] < MIN_SAVING):
        sys.exit(
            f"failed: more than {MAX_PASSES} forward passes, or less than {MIN_SAVING} times the speed of decoding"
        )


if __name__ == "__main__":
    main()
