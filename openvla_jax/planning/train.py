"""Plans a run on TPUs before any is rented: compiles the same train step for a topology, ahead of time, on any machine.

`plan` needs libtpu (the TPU compiler) and no TPU. Everything it reports is an estimate of the compiler or follows from
published rates: compute time from the compiler's cycle estimates, communication from bytes over link rates.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from openvla_jax.checkpoint.reading import load_contract
from openvla_jax.config import VLAConfig, model_config
from openvla_jax.models.quantize import count_bytes
from openvla_jax.models.sequence import SequenceLayout
from openvla_jax.models.stack import remat_policy
from openvla_jax.models.tuning import FULL, Tuning, abstract_prepared
from openvla_jax.parallel.sharding import BATCH, check_batch, make_mesh
from openvla_jax.parallel.tpu import Slice, compiler_options, parse_slice
from openvla_jax.planning.compile import Compiled, PlanError, compile_for, topology_devices
from openvla_jax.settings import Settings
from openvla_jax.storage import atomic_write
from openvla_jax.training.contract import choose_specs, shaped
from openvla_jax.training.progress import duration
from openvla_jax.training.state import TrainState
from openvla_jax.training.step import Job, make_job
from openvla_jax.types import ActionSpec, Batch

ACTION_DIM = 7
ASSUMPTIONS = (
    "Estimates, not measurements: compute from the TPU compiler's cycle counts at the chip's clock, of kernels from "
    "the schedules that it made of them; communication from bytes over published link rates, overlapped as scheduled; "
    "no data loading, checkpoints or restarts. MFU counts model FLOPs (no recomputation, causal attention halved) "
    "against the published bf16 peak."
)


def plan(config: Settings, topology: str, dump: Path) -> dict[str, Any]:
    """Compiles the config's train step and eval step for `v5p:4x4x4` and the like, and returns the report's entry.

    `dump` is the folder into which the compiler writes (`planning_environment`). The entry has the keys of `plan_step`
    and of `plan_evaluation`; it `fits` if both programs do. InputError for a topology that does not exist or a batch
    that it does not divide.
    """
    return with_evaluation(plan_step(config, topology, dump), plan_evaluation(config, topology, dump))


def with_evaluation(step: Mapping[str, Any], evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Joins what `plan_step` and `plan_evaluation` returned. Does not fit if one of the two does not."""
    return {**step, **evaluation, "fits": step["fits"] and evaluation["eval_fits"] is not False}


def plan_evaluation(config: Settings, topology: str, dump: Path) -> dict[str, Any]:
    """Compiles the config's eval step; it depends on neither `train.remat` nor `train.accumulation`.

    Keys: eval_fits, eval_hbm_peak_bytes, eval_temp_bytes (None if the program does not fit), eval_compile_seconds. The
    peak counts the optimiser state and the weights beside an average, which stay on the chip. All are None if the
    config never evaluates.
    """
    if not (config.train.eval_every and config.train.eval_batches):
        return dict.fromkeys(("eval_fits", "eval_hbm_peak_bytes", "eval_temp_bytes", "eval_compile_seconds"))
    tpu = parse_slice(topology)
    job, state, batch, options, _ = _programs(config, tpu)
    lowered = job.evaluate.lower(state.acting, state.frozen, batch)
    compiled = compile_for(lowered, "eval_step", tpu, dump, options)
    moments = [jax.ShapeDtypeStruct(leaf.sharding.shard_shape(leaf.shape), leaf.dtype)
               for leaf in jax.tree.leaves((state.opt_state, state.ema))]  # fmt: skip
    peak, memory = compiled.peak_bytes + count_bytes(moments), compiled.memory
    return {
        "eval_fits": bool(memory is not None and peak <= tpu.facts.hbm_bytes),
        "eval_hbm_peak_bytes": peak,
        "eval_temp_bytes": memory and int(memory.peak_memory_in_bytes - memory.argument_size_in_bytes),
        "eval_compile_seconds": compiled.seconds,
    }


def plan_step(config: Settings, topology: str, dump: Path) -> dict[str, Any]:
    """Compiles the config's train step.

    Keys: topology, chips, hosts, global_batch, per_chip_batch, accumulation, remat, params, trained_params, fits,
    hbm_capacity_bytes, hbm_peak_bytes, args_bytes, temp_bytes, model_flops_per_step, compute_seconds, kernel_seconds
    (a part of it), comm_seconds, exposed_comm_seconds, step_seconds, mfu, examples_per_second, days,
    collectives {kind: {count, bytes}}, compiler_options, compile_seconds. Times, MFU and collectives are None if the
    program does not fit.
    """
    tpu, train = parse_slice(topology), config.train
    job, arguments, batch, options, model = _programs(config, tpu)
    targets = batch.target_positions.shape[1]
    entry: dict[str, Any] = {
        "topology": str(tpu),
        "chips": tpu.chips * tpu.slices,
        "hosts": tpu.hosts * tpu.slices,
        "global_batch": train.batch_size,
        "per_chip_batch": train.batch_size / (tpu.chips * tpu.slices),
        "accumulation": train.accumulation,
        "remat": train.remat,
        "params": sum(leaf.size for leaf in jax.tree.leaves((job.abstract.params, job.abstract.frozen))),
        "trained_params": sum(leaf.size for leaf in jax.tree.leaves(job.abstract.params)),
        "hbm_capacity_bytes": int(tpu.facts.hbm_bytes),
        "model_flops_per_step": model_flops(model, config.data.text_length, job.tuning, targets) * train.batch_size,
        "compiler_options": options,
    }
    compiled = compile_for(job.step.lower(arguments, batch), "train_step", tpu, dump, options)
    entry |= {"hbm_peak_bytes": compiled.peak_bytes, "compile_seconds": compiled.seconds}
    return entry | _estimate(entry, config, tpu, compiled)


def _programs(config: Settings, tpu: Slice) -> tuple[Job, TrainState, Batch, dict[str, str], VLAConfig]:
    """Returns the job, the shapes of its state and of a batch, the compiler options, and the model."""
    train = config.train
    remat_policy(train.remat)
    model, action = planned_model(config)
    mesh = make_mesh(dataclasses.asdict(config.mesh), topology_devices(tpu))
    check_batch(train.batch_size, train.accumulation, mesh)
    job = make_job(config, model, mesh, datasets=1, action=action)
    place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    batch = abstract_batch(model, action, train.batch_size, config.data.text_length, NamedSharding(mesh, BATCH))
    options = compiler_options(tpu.generation) if train.compiler_options == "tuned" else {}
    return job, jax.tree.map(place, job.abstract, job.placed), batch, options, model


# What a search tries, least memory first: the policies by name, without "none", with which no 7B compiles in reasonable
# time, and what fitted slices better (docs/performance.md).
SEARCHED = (
    "full", "attention", "q,k,v,attention", "save_qkvo", "attention,gate,up", "q,k,v,attention,o,gate,up,activation",
    "save_dots",
)  # fmt: skip


def search(config: Settings, topology: str, dump: Path) -> list[dict[str, Any]]:
    """Plans with each of SEARCHED, and with more accumulation if none fits; returns the fastest that fits first."""
    entries: list[dict[str, Any]] = []
    evaluation = plan_evaluation(config, topology, dump)  # once: no candidate changes it
    for accumulation in (1, 2, 4, 8):
        for remat in SEARCHED:
            parts = config.train.accumulation * accumulation
            train = dataclasses.replace(config.train, remat=remat, accumulation=parts)
            try:
                entry = with_evaluation(plan_step(dataclasses.replace(config, train=train), topology, dump), evaluation)
            except ValueError:
                if accumulation == 1:
                    raise
                break  # the batch divides no further
            entries.append(entry)
            print(row(entry), flush=True)
            if not entry["fits"] and remat == SEARCHED[0]:
                break  # nor does what keeps more
        if evaluation["eval_fits"] is False or any(entry["fits"] for entry in entries):
            break
    return sorted(entries, key=lambda e: (not e["fits"], e["step_seconds"] or e["hbm_peak_bytes"]))


def run_plans(
    config: Any,
    topologies: Sequence[str],
    dump: Path,
    out: str | None = None,
    tries: bool = False,
) -> bool:
    """Plans for each topology, prints the table and writes JSON to `out`; whether every topology has one that fits."""
    config = Settings.from_dict(config.to_dict())
    for topology in topologies:
        parse_slice(topology)  # before the first minutes are spent
    print(f"planning {config.train.batch_size} examples a step on {', '.join(topologies)}; minutes each for a 7B")
    print(HEADER)
    entries: list[dict[str, Any]] = []
    fits = True
    for topology in topologies:
        if tries:
            found = search(config, topology, dump)
            print(f"fastest that fits: remat {found[0]['remat']}, accumulation {found[0]['accumulation']}")
        else:
            found = [plan(config, topology, dump)]
            print(row(found[0]), flush=True)
        entries += found
        fits &= found[0]["fits"]
        if not found[0]["fits"]:
            print(_misfit(found[0], config, tries))
    print(ASSUMPTIONS)
    if out:
        atomic_write(out, json.dumps({"assumptions": ASSUMPTIONS, "entries": entries}, indent=2) + "\n")
    return fits


# ---------------------------------------------------------------------------------------------------------------------
# The parts
# ---------------------------------------------------------------------------------------------------------------------


def planned_model(config: Settings) -> tuple[VLAConfig, ActionSpec]:
    """Returns the model that the run would train, and what it would predict; no tokenizer is read."""
    base = load_contract(config.init_from) if config.init_from else None
    if base is None and not config.model.get("preset"):
        raise PlanError("nothing names the model: give --config.init_from=CKPT or --config.model.preset=openvla-7b")
    settings = {key: value for key, value in config.model.items() if value is not None}
    observation, action = choose_specs(config, base)
    return shaped(base.model if base else model_config(settings), observation, action, config.film), action


def abstract_batch(model: VLAConfig, action: ActionSpec, rows: int, text_length: int, sharding: NamedSharding) -> Batch:
    """Returns the shapes of one global batch."""

    def make(shape: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    size, cameras = model.image_size, model.cameras
    chunk = (rows, action.horizon, action.dim)
    targets = action.horizon * action.dim + 1
    return Batch(
        images=make((rows, cameras, size, size, 3), jnp.uint8),
        image_mask=make((rows, cameras), jnp.bool_),
        state=make((rows, model.state_dim), jnp.float32) if model.state_dim else None,
        tokens=make((rows, text_length), jnp.int32),
        target_positions=make((rows, targets), jnp.int32),
        target_mask=make((rows, targets), jnp.bool_),
        actions=make(chunk, jnp.float32),
        action_mask=make(chunk, jnp.bool_),
        dataset=make((rows,), jnp.int32),
    )


def model_flops(
    model: VLAConfig, text_length: int, tuning: Tuning | None = FULL, targets: int = ACTION_DIM + 1
) -> float:
    """Returns the FLOPs of the model's work on one example, at every position of the static shape.

    A product takes 2 per parameter and position forward, 2 back through it if anything before or in it is trained, and
    2 for its own gradient if it is trained itself. Attention likewise, half of it if causal. Logits are counted at the
    `targets` predicted positions only (the numbers of a chunk and the end token). Recomputation does not count, nor do
    the products of adapters (1-2%), of the state's token and of FiLM (below 0.1%).

    Args:
        model: The model.
        text_length: Positions of text.
        tuning: What is trained; None counts the forward pass alone.
        targets: Predicted positions.
    """
    trained: list[str] = []
    if tuning is not None:
        state = nnx.to_flat_state(nnx.state(abstract_prepared(model, tuning), nnx.Param))
        trained = ["/".join(map(str, path)) for path, _ in state if tuning.is_trainable(path)]
    splits_last = tuning is not None and tuning.splits_last
    begins = lambda *prefixes: any(path.startswith(prefixes) for path in trained)

    def work(products: float, attention: float, through: bool, name: str) -> float:
        weights = any(path.startswith(name) and "/lora/" not in path and path.endswith("/kernel") for path in trained)
        return products * (2 + 2 * through + 2 * weights) + attention * (4 + 8 * through)

    total = 0.0
    for tower in model.towers:
        name = f"vision/{tower.name}/"
        tokens = tower.patches + tower.prefix_tokens
        block = 4 * tower.width**2 + 2 * tower.width * tower.mlp_dim
        layers_tokens = (tower.depth - 1) * tokens * model.cameras
        total += work(layers_tokens * block, layers_tokens * tokens * tower.width, begins(name), f"{name}blocks")
        stem = 3 * tower.patch_size**2 * tower.width * tower.patches * model.cameras
        total += work(stem, 0, False, f"{name}patch_embed")  # no gradient of pixels is taken,
        total += 2 * stem * begins(f"{name}patch_embed/kernel")  # counted as if there were, as is usual
    vision, llama = model.vision_width, model.llama
    layers = {
        "linear": (vision, llama.width),
        "gelu-mlp": (vision, llama.width, llama.width),
        "fused-gelu-mlp": (vision, 4 * vision, llama.width, llama.width),
    }[model.projector.kind]
    products = sum(a * b for a, b in pairwise(layers)) * model.patches * model.cameras
    total += work(products, 0, begins("vision/", "projector/"), "projector/")
    positions = SequenceLayout.of(model).length(text_length)
    kv = llama.kv_heads * llama.head_dim
    block = 2 * llama.width**2 + 2 * llama.width * kv + 3 * llama.width * llama.mlp_dim
    scores = positions * llama.width / (1 if model.is_parallel else 2)
    before = ("vision/", "projector/", "llama/embed", "llama/blocks")
    last = int(splits_last)
    first = (llama.depth - last) * positions
    total += work(first * block, first * scores, begins(*before), "llama/blocks/")
    last *= positions
    total += work(last * block, last * scores, begins(*before, "llama/last"), "llama/last/")
    if not model.action_dim:
        return float(total + work(llama.width * llama.vocab_size * targets, 0, bool(trained), "llama/head/"))
    rows, width = (targets - 1) // model.action_dim, llama.width
    products = model.action_dim * width**2 + 2 * width**2 + width * model.action_dim
    return float(total + work(rows * products, 0, bool(trained), "action_head/"))


def _estimate(entry: Mapping[str, Any], config: Settings, tpu: Slice, compiled: Compiled) -> dict[str, Any]:
    if compiled.cost is None:
        unknown = ("compute_seconds", "kernel_seconds", "comm_seconds", "exposed_comm_seconds", "step_seconds", "mfu",
                   "examples_per_second", "days", "collectives", "args_bytes", "temp_bytes")  # fmt: skip
        return {key: None for key in unknown} | {"fits": False}
    memory, cost = compiled.memory, compiled.cost
    step = cost.compute_seconds + cost.exposed_seconds
    return {
        "fits": bool(compiled.peak_bytes <= tpu.facts.hbm_bytes),
        "args_bytes": int(memory.argument_size_in_bytes),
        "temp_bytes": int(memory.peak_memory_in_bytes - memory.argument_size_in_bytes),
        "compute_seconds": cost.compute_seconds,
        "kernel_seconds": cost.kernel_seconds,
        "comm_seconds": cost.comm_seconds,
        "exposed_comm_seconds": cost.exposed_seconds,
        "step_seconds": step,
        "mfu": entry["model_flops_per_step"] / (step * entry["chips"] * tpu.facts.flops),
        "examples_per_second": config.train.batch_size / step,
        "days": step * config.train.steps / 86400,
        "collectives": {
            kind: {"count": cost.counts[kind], "bytes": cost.collectives[kind]} for kind in sorted(cost.collectives)
        },
    }


def _misfit(entry: Mapping[str, Any], config: Settings, tried: bool) -> str:
    """Says by how much a plan does not fit, and what to change."""
    capacity = entry["hbm_capacity_bytes"]
    over = lambda peak: f"by {(peak - capacity) / 2**30:.1f} GiB a chip"
    if entry["eval_fits"] is False:
        return (
            f"{entry['topology']}: the evaluation does not fit, {over(entry['eval_hbm_peak_bytes'])}: "
            "take more chips or a smaller batch, or turn it off with --config.train.eval_every=0"
        )
    return f"{entry['topology']} does not fit, {over(entry['hbm_peak_bytes'])}: {_suggestion(config, tried)}"


def _suggestion(config: Settings, tried: bool) -> str:
    if tried:
        return "no remat policy and accumulation does; take more chips or a smaller batch"
    if config.train.remat != "full":
        return "--config.train.remat=full needs least memory; or let --plan_search look"
    return f"--config.train.accumulation={2 * config.train.accumulation} halves the activations; or take more chips"


HEADER = (
    f"{'topology':<16}{'chips':>6}{'per chip':>9}{'HBM peak':>10}{'eval peak':>10}{'of':>7}  {'step':>8}{'waiting':>9}"
    f"{'MFU':>7}{'examples/s':>12}{'run':>12}{'compiled':>10}  remat"
)


def row(entry: Mapping[str, Any]) -> str:
    """One line of the table."""
    gib = lambda size: "-" if size is None else f"{size / 2**30:.1f}"
    head = (
        f"{entry['topology']:<16}{entry['chips']:>6}{entry['per_chip_batch'] / entry['accumulation']:>9.4g}"
        f"{gib(entry['hbm_peak_bytes']):>6} GiB{gib(entry['eval_hbm_peak_bytes']):>10}"
        f"{gib(entry['hbm_capacity_bytes']):>7}  "
    )
    if entry["step_seconds"] is None:
        return f"{head}does not fit with remat {entry['remat']}"
    return head + (
        f"{entry['step_seconds']:>6.3f} s{entry['exposed_comm_seconds'] / entry['step_seconds']:>9.1%}"
        f"{entry['mfu']:>7.1%}{entry['examples_per_second']:>12.0f}{entry['days']:>7.1f} days"
        f"{duration(entry['compile_seconds']):>10}  {entry['remat']}"
    )


def collectives_table(entry: Mapping[str, Any]) -> Iterable[str]:
    """Lines: each kind of collective, how often a step runs it, and GB that a chip receives."""
    for kind, value in (entry["collectives"] or {}).items():
        yield f"  {kind:<20}{value['count']:>8.0f} x {value['bytes'] / 1e9:>8.2f} GB a chip and step"
