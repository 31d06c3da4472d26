"""Plans serving on TPUs before any is rented: one prediction, tensor-parallel over a slice, compiled ahead of time.

The programs are those of `models/heads`. What is reported are estimates, made as `planning/train.py` makes them. Beside
them stand the time in which the chips read their weights once, and that of one pass's products at the published peak.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from openvla_jax.checkpoint.load import abstract_quantized, placed, tensor_mesh
from openvla_jax.config import VLAConfig
from openvla_jax.models.heads import Inputs, make_head
from openvla_jax.models.heads.chunks import chunk_text
from openvla_jax.models.llama import Cache
from openvla_jax.models.openvla import OpenVLA, abstract_model
from openvla_jax.models.quantize import EXCLUDE, choose_paths, count_bytes
from openvla_jax.models.sequence import SequenceLayout
from openvla_jax.parallel.execution import Execution
from openvla_jax.parallel.tpu import Slice, parse_slice
from openvla_jax.planning.compile import PlanError, compile_for, topology_devices
from openvla_jax.planning.train import model_flops
from openvla_jax.storage import atomic_write
from openvla_jax.types import ActionSpec

TEXT_LENGTH = 32  # the policy's bucket of a usual instruction
ASSUMPTIONS = (
    "Estimates, not measurements: compute from the TPU compiler's cycle counts at the chip's clock; communication from "
    "bytes over published link rates; without the host's share (image decoding, resize, transfer, HTTP)."
)


class Stage(NamedTuple):
    name: str
    times: int  # in one prediction
    run: Callable[..., Any]
    arguments: tuple[Any, ...]
    donated: tuple[int, ...] = ()


def plan(
    model: VLAConfig, action: ActionSpec, topology: str, dump: Path, batch: int = 1, quantize: str | None = None,
    exclude: Sequence[str] = EXCLUDE,
) -> dict[str, Any]:  # fmt: skip
    """Compiles one prediction of `batch` requests for `v5e:2x2` and the like, all chips sharing every layer.

    A prediction is a chunk of `action.horizon` actions. `dump` is the folder into which the compiler writes
    (`planning_environment`).

    Returns:
        The report's entry: topology, chips, batch, horizon, weights, weight_bytes (a chip's), hbm_capacity_bytes, fits,
        hbm_peak_bytes (of the whole prediction on a chip), read_seconds (to read the weights once), products_seconds
        (of one forward pass at the published peak), stages {name: {times, seconds, waiting_seconds, peak_bytes}} and
        seconds. The last two are None if the program does not fit.

    Raises:
        InputError: There is no such slice, or it does not divide the model's heads.
    """
    tpu = parse_slice(topology)
    if tpu.slices > 1:
        raise PlanError(f"{topology}: one action is decoded within one slice")
    try:
        mesh = tensor_mesh(model, topology_devices(tpu))
    except ValueError as error:
        raise PlanError(f"{topology}: {error}") from None
    network = abstract_model(model, jnp.bfloat16)
    if quantize is not None:
        network = abstract_quantized(model, quantize, choose_paths(network, exclude), jnp.bfloat16)
    graph, params = nnx.split(network, nnx.Param)
    params = placed(params, mesh, jnp.bfloat16)
    weights = sum(count_bytes(jax.ShapeDtypeStruct(leaf.sharding.shard_shape(leaf.shape), leaf.dtype))
                  for leaf in jax.tree.leaves(params))  # fmt: skip
    numbers = action.horizon * action.dim
    text = TEXT_LENGTH + (numbers + 1 if model.is_parallel else 0)
    flops = batch * model_flops(model, text, None, targets=numbers + 1)
    entry: dict[str, Any] = {
        "topology": str(tpu),
        "chips": tpu.chips,
        "batch": batch,
        "horizon": action.horizon,
        "weights": quantize or "bfloat16",
        "weight_bytes": weights,
        "hbm_capacity_bytes": int(tpu.facts.hbm_bytes),
        "read_seconds": weights / tpu.facts.hbm_bytes_per_second,
        "products_seconds": flops / (tpu.chips * tpu.facts.flops),
        "stages": {},
    }
    for stage in stages(model, action, graph, params, mesh, batch):
        found = _compile(stage, tpu, dump)
        if not found["fits"]:
            return entry | {
                "fits": False,
                "hbm_peak_bytes": found["peak_bytes"],
                "stages": None,
                "seconds": None,
            }
        entry["stages"][stage.name] = found | {"times": stage.times}
    whole = entry["stages"].pop("prediction")
    return entry | {"fits": True, "hbm_peak_bytes": whole["peak_bytes"], "seconds": whole["seconds"]}


def stages(model: VLAConfig, action: ActionSpec, graph: Any, params: nnx.State, mesh: Mesh, batch: int) -> list[Stage]:
    """Returns the whole prediction, and its parts as programs of their own."""
    replicated = NamedSharding(mesh, P())
    by_heads = NamedSharding(mesh, P(None, None, None, "tensor", None))
    made = lambda shape, dtype, sharding=replicated: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    llama, size, layout = model.llama, model.image_size, SequenceLayout.of(model)
    head, numbers = make_head(model, action), action.horizon * action.dim
    images = made((batch, model.cameras, size, size, 3), jnp.uint8)
    ids, row = made((batch, TEXT_LENGTH), jnp.int32), made((batch,), jnp.int32)
    patches = made((batch, model.cameras * model.patches, llama.width), jnp.bfloat16)
    language = made((batch, llama.width), jnp.bfloat16) if model.film else None
    state = made((batch, model.state_dim), jnp.float32) if model.state_dim else None
    execution = Execution(mesh)
    merged: Callable[[Any], OpenVLA] = lambda params: nnx.merge(graph, params)

    def predict(params, images, ids, lengths, state):
        prediction = head.predict(merged(params), Inputs(images, ids, lengths, state), action.dim, execution=execution)
        return prediction.tokens if prediction.actions is None else prediction.actions

    def vision(params, images, language):
        network = merged(params)
        return network.project(network.normalize(images), execution, language)

    shared = [
        Stage("prediction", 1, predict, (params, images, ids, row, state)),
        Stage("vision", 1, vision, (params, images, language)),
    ]
    if not head.sequential:
        diffusion = model.head == "diffusion"
        noisy, timestep = made((batch, numbers), jnp.float32), row

        def language_model(params, patches, ids, lengths, state, noisy, timestep):
            network = merged(params)
            text, slots = chunk_text(network, Inputs(None, ids, lengths), numbers)
            if diffusion:
                slots = slots._replace(noisy=noisy, timestep=timestep)
            return network.chunk_hidden(patches, text, slots, execution, state)

        arguments = (params, patches, ids, row, state, noisy, timestep)
        return [*shared, Stage("language model", action.denoising_steps if diffusion else 1, language_model, arguments)]

    slots = (llama.depth, batch, layout.length(TEXT_LENGTH) + numbers, llama.kv_heads, llama.head_dim)
    cache = Cache(*[made(slots, jnp.bfloat16, by_heads)] * 2)

    def prefill(params, patches, ids, lengths, state):
        logits, cache = merged(params).prefill_patches(patches, ids, lengths, numbers, execution, state)
        return logits.argmax(axis=-1), jax.lax.with_sharding_constraint(cache, by_heads)

    def decode_step(params, token, lengths, cache):
        logits, cache = merged(params).decode_step(token, lengths, cache, execution)
        return logits.argmax(axis=-1), cache

    return [
        *shared,
        Stage("prefill", 1, prefill, (params, patches, ids, row, state)),
        Stage("decode step", numbers - 1, decode_step, (params, row, row, cache), (3,)),
    ]


def run_plans(
    model: VLAConfig, action: ActionSpec, topologies: Sequence[str], dump: Path, out: str | None = None, **settings: Any
) -> bool:
    """Plans for each slice, prints a table, writes JSON to `out`; whether every one fits."""
    for topology in topologies:
        parse_slice(topology)  # before the first minutes are spent
    what = "one action" if action.horizon == 1 else f"one chunk of {action.horizon} actions (head {action.head})"
    print(f"planning {what} of {model.name} on {', '.join(topologies)}; minutes each for a 7B")
    entries = []
    for topology in topologies:
        entries.append(plan(model, action, topology, dump, **settings))
        print("\n".join(lines(entries[-1])), flush=True)
    print(ASSUMPTIONS)
    if out:
        atomic_write(out, json.dumps({"assumptions": ASSUMPTIONS, "entries": entries}, indent=2) + "\n")
    return all(entry["fits"] for entry in entries)


def lines(entry: Mapping[str, Any]) -> list[str]:
    """A plan for people."""
    gib = lambda size: f"{size / 2**30:.2f} GiB"
    head = (
        f"{entry['topology']}: {entry['chips']} chips, batch {entry['batch']}, {entry['weights']} weights, "
        f"{gib(entry['weight_bytes'])} of them a chip; peak {gib(entry['hbm_peak_bytes'])} of "
        f"{gib(entry['hbm_capacity_bytes'])}"
    )
    if not entry["fits"]:
        over = entry["hbm_peak_bytes"] - entry["hbm_capacity_bytes"]
        return [f"{head}: does not fit, by {gib(over)} a chip; take more chips, or --quantize int8"]
    rows = [head, f"  {'stage':<14}{'ms each':>9}{'times':>7}{'ms':>9}{'waiting':>9}"]
    for name, stage in entry["stages"].items():
        each, times = 1e3 * stage["seconds"], stage["times"]
        waiting = stage["waiting_seconds"] / stage["seconds"]
        rows.append(f"  {name:<14}{each:>9.2f}{times:>7}{each * times:>9.2f}{waiting:>9.1%}")
    seconds, read, products = entry["seconds"], entry["read_seconds"], entry["products_seconds"]
    rate = entry["batch"] * entry["horizon"] / seconds
    rows.append(f"  {'all':<14}{'':>16}{1e3 * seconds:>9.2f}         {rate:.1f} actions/s")
    rows.append(
        f"  {seconds / (read + products):.1f} times what one pass needs at published rates: {1e3 * read:.2f} ms to "
        f"read the weights once, {1e3 * products:.2f} ms for the matrix products"
    )
    return rows


def _compile(stage: Stage, tpu: Slice, dump: Path) -> dict[str, Any]:
    stage.run.__name__ = f"serve_{stage.name.replace(' ', '_')}"
    lowered = jax.jit(stage.run, donate_argnums=stage.donated).lower(*stage.arguments)
    compiled = compile_for(lowered, stage.run.__name__, tpu, dump)
    if compiled.cost is None:
        return {"fits": False, "peak_bytes": compiled.peak_bytes}
    cost = compiled.cost
    return {
        "fits": compiled.peak_bytes <= tpu.facts.hbm_bytes,
        "seconds": cost.compute_seconds + cost.exposed_seconds,
        "waiting_seconds": cost.exposed_seconds,
        "peak_bytes": compiled.peak_bytes,
    }
