"""The training run, top to bottom: open, compile, loop. `train.py` and `finetune.py` call `run`."""

import contextlib
import os
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from openvla_jax.parallel.sharding import global_batch
from openvla_jax.settings import Settings
from openvla_jax.training import hosts
from openvla_jax.training.checkpoint import Checkpoints
from openvla_jax.training.progress import Progress
from openvla_jax.training.report import Report
from openvla_jax.training.runtime import Profile, StopSignal
from openvla_jax.training.setup import Run, compile_programs, open_run
from openvla_jax.training.state import TrainState


def run(config: Any, directory: os.PathLike | str) -> TrainState:
    """Trains as `config` says, resuming from the latest complete checkpoint in `directory`.

    Args:
        config: A `ConfigDict` made by `configs/common.py: base()`, or `Settings`.
        directory: The run's workdir. With several processes (`hosts.initialize`) all of them pass the same.

    Returns:
        The final state.

    Raises:
        InputError, FileNotFoundError, CheckpointError: Bad input, in one line, before anything is written.
        NonFiniteError: Too many steps had NaN or infinite losses or gradients.
        StorageError: Saving keeps failing.
    """
    settings = Settings.from_dict(config.to_dict())
    store = hosts.client()
    hosts.leave_obituary(store)
    timeout = settings.train.hang_timeout
    with hosts.Watch(store, jax.process_index(), jax.process_count(), hang_timeout=timeout) as watch:
        return train(open_run(settings, directory), watch)


def train(run: Run, watch: hosts.Watch) -> TrainState:
    """Runs the steps; `watch` reports lost or hung hosts. Returns the final state."""
    train, state = run.config.train, run.state
    if run.start >= train.steps:
        run.log(f"nothing to do: {run.workdir} is at step {run.start} of {train.steps}")
        return state
    began = time.perf_counter()
    batch = global_batch(next(run.iterator), run.mesh)
    run.log(f"first batch after {time.perf_counter() - began:.1f} s")
    step_fn, eval_fn = compile_programs(run, batch)
    hosts.gather(hosts.client(), "compiled")

    # -- Loop: only from here on is anything written ------------------------------------------------------------------
    checkpoints = Checkpoints(run.workdir, train.keep_last, train.keep_every)
    with jax.transfer_guard("disallow"), contextlib.ExitStack() as closing:
        closing.callback(checkpoints.close)
        report, stop = Report(run, checkpoints), StopSignal()
        closing.callback(report.close)
        closing.enter_context(stop)
        profile = Profile(run.workdir, train.profile_at, train.profile_steps)

        def save() -> None:
            report.flush()
            checkpoints.save(step, state, run.contract, run.iterator if run.exact else None, run.unused)
            run.log(f"step {step}/{train.steps}  saving; {report.progress.goodput_line()}")

        pending: list[tuple[int, Any]] = []  # metrics of steps that may still be running
        for step in range(run.start + 1, train.steps + 1):
            watch.at(step, "step")
            profile.before(step)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, metrics = step_fn(state, batch)
            pending.append((step, metrics))
            reached = report.accurate()
            last = stop.at(step) or step == train.steps or reached
            evaluates = bool(run.eval_batches) and (step % train.eval_every == 0 or step == train.steps or reached)
            saves = checkpoints.failed() or last or step % train.checkpoint_every == 0
            # One step is left in flight while the host continues, but none if its outcome is needed: what is saved is
            # never ahead of its metrics.
            while len(pending) > (0 if evaluates or saves or profile.ends(step) else 1):
                report.step(*pending.pop(0))
            with jax.transfer_guard("allow"):
                if profile.ends(step):
                    profile.stop()
                if evaluates:
                    with report.progress.pausing("evaluation"):
                        watch.at(step, "evaluation")
                        report.validation(step, sum_batches(eval_fn, state, run.eval_batches))
                if saves:
                    with report.progress.pausing("checkpoint"):
                        watch.at(step, "checkpoint")
                        save()
                        while last and checkpoints.failed(wait=True):
                            save()
            if last:
                break
            watch.at(step, "data")
            batch = next_batch(run.iterator, run.mesh, report.progress, metrics)
        profile.stop()
    if reached:
        run.log(f"step {step}: action accuracy {report.accuracy:.1%}, stopped as stop_at_action_accuracy says")
    elif stop.requested and step < train.steps:
        run.log(f"stopped by a signal at step {step}, saved; the same command continues from there")
        raise SystemExit(stop.EXIT_CODE)
    run.log(f"done: step {step} saved in {checkpoints.directory / str(step)}; {report.progress.goodput_line()}")
    return state


def sum_batches(eval_fn: Any, state: TrainState, batches: list[Any]) -> Any:
    """Returns the head's sums over all evaluation batches."""
    sums: Any = None
    for batch in batches:
        part = eval_fn(state.acting, state.frozen, batch)
        sums = part if sums is None else jax.tree.map(jnp.add, sums, part)
    return sums


def next_batch(iterator: Any, mesh: Mesh, progress: Progress, running: Mapping[str, Any]) -> Any:
    """Returns the next global batch.

    The time counts as waiting if the running step has ended by then: at most that much was lost.
    """
    began = time.perf_counter()
    rows = next(iterator)
    with jax.transfer_guard("allow"):  # intended here, but with several processes jax takes it for an accident
        batch = global_batch(rows, mesh)
    if running["loss"].is_ready():
        progress.paused("data", time.perf_counter() - began)
    return batch
