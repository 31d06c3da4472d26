"""The training run, top to bottom: mesh, model, data, state, step, loop. `train.py` and `finetune.py` call `run`."""

import collections
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath

from openvla_jax.checkpoint.base import check_fingerprint, read_base
from openvla_jax.checkpoint.contract import CheckpointError, Contract
from openvla_jax.checkpoint.reading import load_contract, load_unused, open_checkpoint, steps_in
from openvla_jax.config import VLAConfig, model_config
from openvla_jax.models.heads import summarize
from openvla_jax.models.openvla import count_parameters
from openvla_jax.models.stack import remat_policy
from openvla_jax.models.tuning import Tuning, count_adapters, count_trainable
from openvla_jax.parallel.sharding import check_batch, global_batch, make_mesh
from openvla_jax.parallel.tpu import compiler_options, generation_of
from openvla_jax.settings import Settings
from openvla_jax.storage import absolute, atomic_write, retry, use_compilation_cache
from openvla_jax.training import hosts
from openvla_jax.training import metrics as metrics_lib
from openvla_jax.training.checkpoint import Checkpoints, restore_iterator, restore_state
from openvla_jax.training.contract import build_contract, choose_specs, shown
from openvla_jax.training.kernel_check import check_kernels
from openvla_jax.training.progress import Progress, describe
from openvla_jax.training.runtime import Profile, Skipped, StopSignal
from openvla_jax.training.state import TrainState, init_state
from openvla_jax.training.step import make_job
from openvla_jax.types import ObservationSpec
from openvla_jax.vision.preprocess import center_crop

CONFIG_FILE = "config.json"
# An exact data position is saved while the shuffle buffer that it contains stays below this, in bytes per process.
EXACT_RESUME_LIMIT = 256 * 2**20
# Changing these between starts of one run would make another run of it.
FIXED = (
    "model", "tokenizer", "seed", "data.dataset", "data.text_length", "train.batch_size", "trainable", "lora",
    "quantize", "frozen_dtype", "action.bins",
)  # fmt: skip

LATER = ("trainable", "lora", "quantize", "frozen_dtype", "action.bins")  # settings that old checkpoints do not know


def run(config: Any, directory: os.PathLike | str) -> TrainState:
    """Trains as `config` says, resuming from the latest complete checkpoint in `directory`.

    `config` is a `ConfigDict` made by `configs/common.py: base()`, or `Settings`.

    Returns the final state. Raises ValueError, FileNotFoundError or CheckpointError with one line for bad input, before
    anything is written; NonFiniteError if too many losses are no number; StorageError if saving goes on failing.
    With several processes (`hosts.initialize`) all of them call it alike; where one is lost the others end themselves.
    """
    config = Settings.from_dict(config.to_dict())
    store = hosts.client()
    hosts.leave_obituary(store)
    timeout = config.train.hang_timeout
    with hosts.Watch(store, jax.process_index(), jax.process_count(), hang_timeout=timeout) as watch:
        return train(config, directory, watch)


def train(config: Settings, directory: os.PathLike | str, watch: hosts.Watch) -> TrainState:
    """`run`, while `watch` looks after the hosts."""
    # TensorFlow comes with it
    from openvla_jax.data.batches import make_eval_batches, make_train_iterator, resident_memory_gb

    began_at, train, workdir = time.time(), config.train, absolute(directory)
    use_compilation_cache(train.compilation_cache)
    log = print if jax.process_index() == 0 else logging.debug
    dtype = jnp.dtype(train.dtype)

    # -- Mesh -----------------------------------------------------------------------------------------------------
    mesh = make_mesh(dataclasses.asdict(config.mesh))
    remat_policy(train.remat)
    check_batch(train.batch_size, train.accumulation, mesh)
    log(
        f"devices: {jax.device_count()} x {jax.devices()[0].device_kind}, {jax.process_count()} processes, "
        f"mesh {dict(mesh.shape)}"
    )

    # -- Model and tokenizer: from the checkpoint to start from, or from the config --------------------------------
    base = load_contract(config.init_from) if config.init_from else None
    model, tokenizer = resolve_model(config, base)
    observation, action = choose_specs(config, base)
    model = shown(model, observation)
    crop_area = config.augment.policy_crop_area

    # -- Data -------------------------------------------------------------------------------------------------------
    start = max(steps_in(workdir / "checkpoints"), default=0)
    if start:
        check_same_run(workdir, config)
    data = dataclasses.asdict(config.data)
    if data["statistics"] == "base":
        if base is None:
            raise ValueError("data.statistics is 'base': that needs init_from, or name a file")
        data["statistics"] = base.statistics
    common: Any = dict(
        image_size=model.image_size, prompt_family=model.prompt_family, observation=observation, action=action
    )
    local_batch_size = train.batch_size // jax.process_count()

    def open_data(seed: int, step: int = 0):
        return make_train_iterator(
            data, tokenizer, batch_size=local_batch_size, seed=seed, step=step,
            process_index=jax.process_index(), process_count=jax.process_count(), **common,
        )  # fmt: skip

    iterator = open_data(config.seed)
    log(iterator.summary)
    exact = resume_mode(config.data.resume, iterator.state_bytes) == "exact"
    log(
        f"data: {', '.join(iterator.dataset_names)}; about {iterator.num_examples} frames per epoch; resume "
        f"{'exact' if exact else 'reseeded'} (its state is about {iterator.state_bytes / 2**20:.1f} MiB per process)"
    )
    if start:
        try:
            if not exact:
                raise ValueError("data.resume is not exact")
            restore_iterator(workdir, start, iterator)
        except ValueError as error:  # another number of processes, say
            if config.data.resume == "exact":
                raise
            iterator = open_data(config.seed + start, start)
            log(f"data: the stream goes on with another seed, {config.seed + start} ({error})")
    hosts.preflight(facts(config, workdir, start, iterator), hosts.client(), jax.process_index(), jax.process_count())
    eval_batches = []
    if train.eval_every and train.eval_batches:
        eval_batches = make_eval_batches(
            data, tokenizer, batch_size=local_batch_size, num_batches=train.eval_batches,
            statistics=iterator.statistics, process_index=jax.process_index(), process_count=jax.process_count(),
            **common, )  # fmt: skip
    if crop_area is not None:  # validation sees what a policy trained with random crops is served
        flat = lambda images: images.reshape(-1, *images.shape[2:])
        crop = lambda images: np.stack([center_crop(image, crop_area) for image in flat(images)])
        eval_batches = [b._replace(images=crop(b.images).reshape(b.images.shape)) for b in eval_batches]

    # -- State: restored, from a checkpoint's weights, or fresh; always created where it lives ------------------------
    datasets = len(iterator.dataset_names)
    job = make_job(config, model, mesh, datasets, action=action)
    optimizer, abstract, placed, tuning = job.optimizer, job.abstract, job.placed, job.tuning
    log(f"model: {model.name}; {describe_training(model, tuning)}")
    adapter = frozen = None
    if not config.init_from and not tuning.full:
        raise ValueError(f"trainable is {config.trainable!r}: to freeze the rest, name a checkpoint with init_from")
    if config.init_from and not (start and tuning.full):
        seed = None if start else config.seed
        params, frozen, found = read_base(config.init_from, model, tuning, abstract, placed, mesh, seed)
        if not tuning.full:
            source = os.fspath(open_checkpoint(config.init_from))
            adapter = {"base": source, "fingerprint": found, "tuning": tuning.to_dict()}
    if start:
        if adapter is not None:
            saved = open_checkpoint(workdir)
            check_fingerprint(adapter["fingerprint"], load_contract(saved).adapter or {}, config.init_from, saved)
        state = restore_state(workdir, start, abstract, placed)
        state = state if frozen is None else state.replace(frozen=frozen)
        log(f"resumed from step {start}")
    elif config.init_from:
        fresh = lambda params, frozen: TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), frozen)
        state = jax.jit(fresh, out_shardings=placed, donate_argnums=(0, 1))(params, frozen)
        del params, frozen
        log(f"started from the weights of {config.init_from}")
    else:
        state = init_state(model, dtype, optimizer, mesh, config.seed)
    unused = load_unused(config.init_from) if config.init_from and tuning.full else None
    contract = build_contract(config, model, tokenizer, base, iterator, adapter)

    # -- Step ---------------------------------------------------------------------------------------------------------
    if job.execution.kernels:
        check_kernels(model, config.data.text_length, jax.local_devices()[0])
    eval_batches = [global_batch(batch, mesh) for batch in eval_batches]
    if start >= train.steps:
        log(f"nothing to do: {workdir} is at step {start} of {train.steps}")
        return state
    began = time.perf_counter()
    batch = global_batch(next(iterator), mesh)
    log(f"first batch after {time.perf_counter() - began:.1f} s; resident memory {resident_memory_gb():.2f} GB")
    # Both programs are compiled before the first step: the watch would take a later compilation for a hang.
    began = time.perf_counter()
    options = compiler_options(generation_of(jax.devices()[0].device_kind)) if train.compiler_options == "tuned" else {}
    if tuning.quantize == "int4":
        # A program compiled ahead of time refuses int4 arguments: jax reports their layout as if they were not packed.
        job = make_job(config, model, mesh, datasets, options, action)
        step_fn, eval_fn = job.step, job.evaluate
        if eval_batches:  # run once, which compiles it
            jax.block_until_ready(eval_fn(state.params, state.frozen, eval_batches[0]))
    else:
        step_fn, eval_fn = job.step.lower(state, batch).compile(compiler_options=options), job.evaluate
        log(f"compiled the step in {time.perf_counter() - began:.1f} s")
        if eval_batches:
            began = time.perf_counter()
            lowered = eval_fn.lower(state.params, state.frozen, eval_batches[0])
            eval_fn = lowered.compile(compiler_options=options)
            log(f"compiled the evaluation in {time.perf_counter() - began:.1f} s")
    hosts.gather(hosts.client(), "compiled")

    # -- Loop: only from here on is anything written ------------------------------------------------------------------
    checkpoints = Checkpoints(workdir, train.keep_last, train.keep_every)
    writer = None
    if jax.process_index() == 0:
        text = json.dumps(contract.training, indent=2)
        retry(f"writing {workdir / CONFIG_FILE}", lambda: atomic_write(workdir / CONFIG_FILE, text))
        writer = metrics_lib.MetricLog(workdir, start, config.wandb, contract.training)
    earlier = writer.earlier if writer is not None else {}
    progress = Progress(start, train.steps, train.batch_size, began_at, earlier, job.head.metrics)
    profile, skipped, stop = (
        Profile(workdir, train.profile_at, train.profile_steps),
        Skipped(train.max_skipped),
        StopSignal(),
    )

    accuracies: collections.deque[float] = collections.deque(maxlen=train.log_every)

    def record(step: int, metrics: Mapping[str, Any]) -> None:
        """Checks and logs a step's metrics; waits for that step to end."""
        metrics = dict(jax.device_get(metrics))
        if metrics.pop("skipped"):
            what = f"loss {metrics['loss']}, gradient norm {metrics['grad_norm']}"
            log(f"step {step}: skipped, {what}")
            if writer is not None:
                writer.write(step, {"train/skipped": 1.0})
            skipped.add(step, lambda: f"{what}; {checkpoints.describe_latest()}")
            return
        accuracies.append(float(metrics.get("action_accuracy", np.nan)))
        if step % train.log_every == 0 or step == train.steps:
            flat = metrics_lib.flatten(metrics, iterator.dataset_names, "train")
            flat |= {f"train/{name}": value for name, value in progress.rates(step).items()}
            flat["train/resident_memory_gb"] = resident_memory_gb()
            flat |= {f"train/{name}": value for name, value in metrics_lib.device_memory().items()}
            flat |= {f"goodput/{name}": value for name, value in progress.goodput().items()}
            if writer is not None:
                writer.write(step, flat)
            log(progress.line(step, flat))

    def accurate() -> bool:
        """Whether the action accuracy, on average over `log_every` steps, has reached where the config stops."""
        limit = train.stop_at_action_accuracy
        return limit is not None and len(accuracies) == train.log_every and float(np.mean(accuracies)) >= limit

    def evaluate(step: int) -> None:
        sums: Any = None
        for batch in eval_batches:
            part = eval_fn(state.params, state.frozen, batch)
            sums = part if sums is None else jax.tree.map(jnp.add, sums, part)
        flat = metrics_lib.flatten(jax.device_get(summarize(job.head, sums)), iterator.dataset_names, "val")
        if writer is not None:
            writer.write(step, flat)
        log(
            f"step {step}/{train.steps}  validation: loss {flat['val/loss']:.4f}  "
            f"{describe(flat, 'val', job.head.metrics)}"
        )

    def save(step: int) -> None:
        if writer is not None:
            writer.flush()
        checkpoints.save(step, state, contract, iterator if exact else None, unused)
        log(f"step {step}/{train.steps}  saving; {progress.goodput_line()}")

    with jax.transfer_guard("disallow"), contextlib.ExitStack() as closing:
        closing.callback(checkpoints.close)
        if writer is not None:
            closing.callback(writer.close)
        closing.enter_context(stop)
        pending: list[tuple[int, Any]] = []  # metrics of steps that may still be running
        for step in range(start + 1, train.steps + 1):
            watch.at(step, "step")
            profile.before(step)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, metrics = step_fn(state, batch)
            pending.append((step, metrics))
            reached = accurate()
            last = stop.at(step) or step == train.steps or reached
            evaluates = bool(eval_batches) and (step % train.eval_every == 0 or step == train.steps or reached)
            saves = checkpoints.failed() or last or step % train.checkpoint_every == 0
            # One step is left in flight while the host goes on, but none where its outcome is needed: what is saved is
            # never ahead of its metrics.
            while len(pending) > (0 if evaluates or saves or profile.ends(step) else 1):
                record(*pending.pop(0))
            with jax.transfer_guard("allow"):
                if profile.ends(step):
                    profile.stop()
                if evaluates:
                    with progress.pausing("evaluation"):
                        watch.at(step, "evaluation")
                        evaluate(step)
                if saves:
                    with progress.pausing("checkpoint"):
                        watch.at(step, "checkpoint")
                        save(step)
                        while last and checkpoints.failed(wait=True):
                            save(step)
            if last:
                break
            watch.at(step, "data")
            batch = next_batch(iterator, mesh, progress, metrics)
        profile.stop()
    if reached:
        log(f"step {step}: action accuracy {np.mean(accuracies):.1%}, stopped as stop_at_action_accuracy says")
    elif stop.requested and step < train.steps:
        log(f"stopped by a signal at step {step}, saved; the same command goes on from there")
        raise SystemExit(stop.EXIT_CODE)
    log(f"done: step {step} saved in {checkpoints.directory / str(step)}; {progress.goodput_line()}")
    return state


# ---------------------------------------------------------------------------------------------------------------------
# The parts
# ---------------------------------------------------------------------------------------------------------------------


def next_batch(iterator: Any, mesh: jax.sharding.Mesh, progress: Progress, running: Mapping[str, Any]) -> Any:
    """The next global batch. The time counts as waiting where the running step has ended before it: at most that."""
    began = time.perf_counter()
    rows = next(iterator)
    with jax.transfer_guard("allow"):  # what is meant here, though with several processes jax takes it for an accident
        batch = global_batch(rows, mesh)
    if running["loss"].is_ready():
        progress.paused("data", time.perf_counter() - began)
    return batch


def facts(config: Settings, workdir: epath.Path, start: int, iterator: Any) -> dict[str, Any]:
    """What must be the same on all hosts, by name: where they differ, the names and values are the message."""
    sources = hashlib.sha256()
    for path in sorted(Path(__file__).resolve().parents[1].rglob("*.py")):
        sources.update(path.read_bytes())
    statistics = {
        f"statistics of {name}": hashlib.sha256(json.dumps(one, sort_keys=True).encode()).hexdigest()[:12]
        for name, one in iterator.statistics.items()
    }
    versions = {
        f"{name} version": importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")
    }
    stream = {key: value for key, value in getattr(iterator, "identity", {}).items() if key != "process_index"}
    settings = {f"config.{name}": str(value) for name, value in flat_items(config.to_dict())}
    return (
        settings
        | versions
        | statistics
        | {
            "code (sha256 of openvla_jax)": sources.hexdigest()[:12],
            "workdir": os.fspath(workdir),
            "step to resume from": start,
            "datasets": list(iterator.dataset_names),
            "stream": stream,
            "devices": [jax.device_count(), jax.devices()[0].device_kind],
        }
    )


def flat_items(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """("a.b", value) for every leaf of nested dicts."""
    found: list[tuple[str, Any]] = []
    for key, value in tree.items():
        found += flat_items(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
    return found


def resolve_model(config: Settings, base: Contract | None) -> tuple[VLAConfig, Any]:
    """The model to train and its tokenizer: the checkpoint's where there is one, else the config's.

    The config may name the checkpoint's model again but not change it. A fresh model is sized by its tokenizer.
    """
    from openvla_jax.tokens.tokenizer import load_tokenizer

    settings = {key: value for key, value in config.model.items() if value is not None}
    tokenizer = base.tokenizer if base else load_tokenizer(config.tokenizer)
    if base is None:
        model = model_config({"base_vocab_size": tokenizer.vocab_size} | settings)
        if tokenizer.vocab_size != model.base_vocab_size:
            raise ValueError(
                f"config.model.base_vocab_size is {model.base_vocab_size}, tokenizer {config.tokenizer!r} has "
                f"{tokenizer.vocab_size} entries: leave the former out"
            )
        return model, tokenizer
    named = settings.get("preset") and model_config({"base_vocab_size": tokenizer.vocab_size} | settings)
    if named and named != shown(base.model, ObservationSpec()):
        raise CheckpointError(
            f"config.model ({settings['preset']}) differs from the model of {config.init_from} ({base.model.name}); "
            "leave config.model.preset empty to take the checkpoint's"
        )
    return base.model, tokenizer


def resume_mode(mode: str, state_bytes: int) -> str:
    """`exact` or `reseed`, from `data.resume` and the size of the data stream's state."""
    if mode == "auto":
        return "exact" if state_bytes <= EXACT_RESUME_LIMIT else "reseed"
    return mode


def check_same_run(workdir: epath.Path, config: Settings) -> None:
    """A workdir is resumed only by a config that agrees with the saved one in what makes the run."""
    saved = json.loads((open_checkpoint(workdir) / "contract" / CONFIG_FILE).read_text())["training"]
    now = config.to_dict()
    differences = []
    for name in FIXED:
        before: Any = saved
        after: Any = now
        for part in name.split("."):
            before, after = (before or {}).get(part), after.get(part)
        if before != after and (before is not None or name not in LATER):
            differences.append(f"{name} was {before!r}, is {after!r}")
    if differences:
        raise CheckpointError(
            f"{workdir} holds checkpoints of another config: {'; '.join(differences)}; "
            "use another --workdir or that config"
        )


def describe_training(model: VLAConfig, tuning: Tuning) -> str:
    """What is trained, by component, counted as the reference does: with what it holds and never runs."""
    counts = count_trainable(model, tuning)
    total = count_parameters(model, include_unused=True)
    total += count_adapters(model, tuning.lora) if tuning.lora else 0
    trained = sum(counts.values())
    parts = ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items()))
    kept = "" if tuning.full else f"; the rest is frozen in {tuning.quantize or tuning.frozen_dtype}"
    return f"training {trained:,} of {total:,} parameters, {trained / total:.2%} ({parts}){kept}"
