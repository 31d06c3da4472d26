"""Opens a training run: mesh, model, data, state and compiled programs, before anything is written."""

import dataclasses
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from openvla_jax.checkpoint.base import check_fingerprint, read_base
from openvla_jax.checkpoint.contract import CheckpointError, Contract
from openvla_jax.checkpoint.reading import load_contract, load_unused, open_checkpoint, steps_in
from openvla_jax.config import VLAConfig, model_config
from openvla_jax.errors import InputError
from openvla_jax.models.openvla import count_parameters
from openvla_jax.models.stack import remat_policy
from openvla_jax.models.tuning import Tuning, count_adapters, count_trainable
from openvla_jax.parallel.sharding import check_batch, global_batch, make_mesh
from openvla_jax.parallel.tpu import compiler_options, generation_of
from openvla_jax.settings import Settings
from openvla_jax.storage import absolute, use_compilation_cache
from openvla_jax.training import hosts
from openvla_jax.training.checkpoint import restore_iterator, restore_state
from openvla_jax.training.contract import build_contract, choose_specs, shaped
from openvla_jax.training.identity import check_same_run, run_fingerprint
from openvla_jax.training.kernel_check import check_kernels
from openvla_jax.training.state import TrainState, fresh_state, init_state
from openvla_jax.training.step import Job, make_job
from openvla_jax.types import ActionSpec, ObservationSpec
from openvla_jax.vision.preprocess import center_crop

# An exact data position is saved while the shuffle buffer that it contains stays below this, in bytes per process.
EXACT_RESUME_LIMIT = 256 * 2**20


@dataclasses.dataclass
class Run:
    """A training run that is ready for its first step."""

    config: Settings
    workdir: epath.Path
    began: float  # seconds since the epoch: when the start began
    mesh: Mesh
    start: int  # the step that it resumes from; 0 for a new run
    iterator: Any  # the training stream, see `data.stream.TrainIterator`
    exact: bool  # whether checkpoints hold the stream's position
    eval_batches: list[Any]  # global batches of held-out frames
    job: Job
    state: TrainState
    contract: Contract
    unused: Any | None  # the reference's never-run tensors, copied along

    def log(self, text: str) -> None:
        """Prints on the first process."""
        log(text)


def log(text: str) -> None:
    if jax.process_index() == 0:
        print(text)
    else:
        logging.debug(text)


def open_run(config: Settings, directory: os.PathLike | str) -> Run:
    """Opens the run in `directory`, new or resumed from its latest complete checkpoint. Nothing is written.

    Raises InputError, FileNotFoundError or CheckpointError with one line for bad input.
    """
    began, train, workdir = time.time(), config.train, absolute(directory)
    use_compilation_cache(train.compilation_cache)

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
    observation, action = choose_specs(config, base)
    model, tokenizer = resolve_model(config, base)
    model = shaped(model, observation, action, config.film)

    # -- Data -------------------------------------------------------------------------------------------------------
    start = max(steps_in(workdir / "checkpoints"), default=0)
    if start:
        check_same_run(workdir, config)
    iterator, eval_batches, exact = open_data(config, workdir, start, model, tokenizer, base, observation, action)

    # -- State: restored, from a checkpoint's weights, or fresh; always created where it lives ------------------------
    job = make_job(config, model, mesh, len(iterator.dataset_names), action=action)
    if train.stop_at_action_accuracy is not None and "action_accuracy" not in [one.name for one in job.head.metrics]:
        raise InputError(f"train.stop_at_action_accuracy: the head {action.head!r} has no tokens; leave it out")
    log(f"model: {model.name}; {describe_training(model, job.tuning)}")
    state, adapter = make_state(config, workdir, start, model, mesh, job)
    unused = load_unused(config.init_from) if config.init_from and job.tuning.full else None
    contract = build_contract(config, model, tokenizer, base, iterator, adapter)
    if job.execution.kernels:
        check_kernels(model, config.data.text_length, jax.local_devices()[0])
    eval_batches = [global_batch(batch, mesh) for batch in eval_batches]
    return Run(config, workdir, began, mesh, start, iterator, exact, eval_batches, job, state, contract, unused)


def open_data(
    config: Settings,
    workdir: epath.Path,
    start: int,
    model: VLAConfig,
    tokenizer: Any,
    base: Contract | None,
    observation: ObservationSpec,
    action: ActionSpec,
) -> tuple[Any, list[Any], bool]:
    """Opens the training stream at step `start` and reads the evaluation's batches.

    Returns (stream, batches of this host, whether the stream's position is saved exactly). Raises InputError for data
    that cannot be trained on, and if hosts disagree.
    """
    from openvla_jax.data.batches import make_eval_batches, make_train_iterator  # imports TensorFlow

    train, settings = config.train, dataclasses.asdict(config.data)
    if settings["statistics"] == "base":
        if base is None:
            raise InputError("data.statistics is 'base': that needs init_from, or name a file")
        settings["statistics"] = base.statistics
    common: Any = dict(
        batch_size=train.batch_size // jax.process_count(), image_size=model.image_size,
        prompt_family=model.prompt_family, observation=observation, action=action,
        process_index=jax.process_index(), process_count=jax.process_count(),
    )  # fmt: skip
    iterator = make_train_iterator(settings, tokenizer, seed=config.seed, **common)
    log(iterator.summary)
    exact = resume_mode(config.data.resume, iterator.state_bytes) == "exact"
    log(
        f"data: {', '.join(iterator.dataset_names)}; about {iterator.num_examples} frames per epoch; resume "
        f"{'exact' if exact else 'reseeded'} (its state is about {iterator.state_bytes / 2**20:.1f} MiB per process)"
    )
    if start:
        try:
            if not exact:
                raise InputError("data.resume is not exact")
            restore_iterator(workdir, start, iterator)
        except ValueError as error:  # another number of processes, say
            if config.data.resume == "exact":
                raise
            iterator = make_train_iterator(settings, tokenizer, seed=config.seed + start, step=start, **common)
            log(f"data: the stream continues with another seed, {config.seed + start} ({error})")
    fingerprint = run_fingerprint(config, workdir, start, iterator)
    hosts.preflight(fingerprint, hosts.client(), jax.process_index(), jax.process_count())
    batches: list[Any] = []
    if train.eval_every and train.eval_batches:
        batches = make_eval_batches(
            settings, tokenizer, num_batches=train.eval_batches, statistics=iterator.statistics, **common
        )
    area = config.augment.policy_crop_area
    if area is not None:  # validation sees what a policy trained with random crops is served
        batches = [batch._replace(images=crop(batch.images, area)) for batch in batches]
    return iterator, batches, exact


def crop(images: np.ndarray, area: float) -> np.ndarray:
    """Crops the centre of uint8 [B, C, H, W, 3]."""
    flat = images.reshape(-1, *images.shape[2:])
    return np.stack([center_crop(image, area) for image in flat]).reshape(images.shape)


def make_state(
    config: Settings, workdir: epath.Path, start: int, model: VLAConfig, mesh: Mesh, job: Job
) -> tuple[TrainState, dict[str, Any] | None]:
    """Returns the state at step `start`, and the contract's `adapter` entry of a run that saves only what it trains.

    Raises CheckpointError for a checkpoint that does not fit, InputError for frozen parameters without a checkpoint.
    """
    optimizer, abstract, placed, tuning = job.optimizer, job.abstract, job.placed, job.tuning
    averaged = config.optimizer.ema is not None
    if not config.init_from and not tuning.full:
        raise InputError(f"trainable is {config.trainable!r}: to freeze the rest, name a checkpoint with init_from")
    adapter: dict[str, Any] | None = None
    params: nnx.State | None = None
    frozen: nnx.State | None = None
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
        log(f"resumed from step {start}")
        return (state if frozen is None else state.replace(frozen=frozen)), adapter
    if config.init_from:
        fresh = lambda params, frozen: fresh_state(params, frozen, optimizer, averaged)
        state = jax.jit(fresh, out_shardings=placed, donate_argnums=(0, 1))(params, frozen)
        log(f"started from the weights of {config.init_from}")
        return state, adapter
    dtype = jnp.dtype(config.train.dtype)
    return init_state(model, dtype, optimizer, mesh, config.seed, averaged=averaged), None


def compile_programs(run: Run, batch: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Compiles the step and the evaluation, before the first step: the watch would take a later one for a hang."""
    config, job, state = run.config, run.job, run.state
    began = time.perf_counter()
    tuned = config.train.compiler_options == "tuned"
    options = compiler_options(generation_of(jax.devices()[0].device_kind)) if tuned else {}
    if job.tuning.quantize == "int4":
        # A program compiled ahead of time refuses int4 arguments: jax reports their layout as if they were not packed.
        datasets, action = len(run.iterator.dataset_names), run.contract.action
        job = make_job(config, run.contract.model, run.mesh, datasets, options, action)
        if run.eval_batches:  # run once, which compiles it
            jax.block_until_ready(job.evaluate(state.acting, state.frozen, run.eval_batches[0]))
        return job.step, job.evaluate
    step = job.step.lower(state, batch).compile(compiler_options=options)
    log(f"compiled the step in {time.perf_counter() - began:.1f} s")
    if not run.eval_batches:
        return step, job.evaluate
    began = time.perf_counter()
    evaluate = job.evaluate.lower(state.acting, state.frozen, run.eval_batches[0]).compile(compiler_options=options)
    log(f"compiled the evaluation in {time.perf_counter() - began:.1f} s")
    return step, evaluate


def resolve_model(config: Settings, base: Contract | None) -> tuple[VLAConfig, Any]:
    """Returns the model to train and its tokenizer: the checkpoint's if there is one, else the config's.

    The config may name the checkpoint's model again but not change it. A fresh model is sized by its tokenizer. Raises
    CheckpointError if the config names another model, InputError if model and tokenizer differ in size.
    """
    from openvla_jax.tokens.tokenizer import load_tokenizer

    settings = {key: value for key, value in config.model.items() if value is not None}
    tokenizer = base.tokenizer if base else load_tokenizer(config.tokenizer)
    if base is None:
        model = model_config({"base_vocab_size": tokenizer.vocab_size} | settings)
        if tokenizer.vocab_size != model.base_vocab_size:
            raise InputError(
                f"config.model.base_vocab_size is {model.base_vocab_size}, tokenizer {config.tokenizer!r} has "
                f"{tokenizer.vocab_size} entries: leave the former out"
            )
        return model, tokenizer
    named = settings.get("preset") and model_config({"base_vocab_size": tokenizer.vocab_size} | settings)
    if named and named != shaped(base.model, ObservationSpec(), ActionSpec(), film=False):
        raise CheckpointError(
            f"config.model ({settings['preset']}) differs from the model of {config.init_from} ({base.model.name}); "
            "leave config.model.preset empty to take the checkpoint's"
        )
    return base.model, tokenizer


def resume_mode(mode: str, state_bytes: int) -> str:
    """Returns "exact" or "reseed", from `data.resume` and the size of the data stream's state."""
    if mode == "auto":
        return "exact" if state_bytes <= EXACT_RESUME_LIMIT else "reseed"
    return mode


def describe_training(model: VLAConfig, tuning: Tuning) -> str:
    """Says what is trained, by component, counted as the reference does: with what it holds and never runs."""
    counts = count_trainable(model, tuning)
    total = count_parameters(model, include_unused=True)
    total += count_adapters(model, tuning.lora) if tuning.lora else 0
    trained = sum(counts.values())
    parts = ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items()))
    kept = "" if tuning.full else f"; the rest is frozen in {tuning.quantize or tuning.frozen_dtype}"
    return f"training {trained:,} of {total:,} parameters, {trained / total:.2%} ({parts}){kept}"
