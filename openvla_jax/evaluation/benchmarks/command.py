"""The commands `evaluate libero`, `evaluate merge` and `evaluate replay`."""

import argparse
import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from openvla_jax.errors import InputError
from openvla_jax.evaluation.benchmarks import report
from openvla_jax.evaluation.benchmarks.arms import ARMS
from openvla_jax.evaluation.benchmarks.episodes import CpuSeconds, Lane, run_episodes
from openvla_jax.evaluation.benchmarks.libero import Plan, Suites, identity, protocol_of, shard_of
from openvla_jax.evaluation.benchmarks.replay import replay
from openvla_jax.evaluation.benchmarks.results import Episode, Outcome, Results, merge
from openvla_jax.evaluation.figures import rollout_animation
from openvla_jax.evaluation.rollouts import PredictsChunks, Rollouts
from openvla_jax.sim.libero import fingerprint
from openvla_jax.sim.libero.conventions import MAX_STEPS, numbers
from openvla_jax.sim.libero.process import TIMEOUT, Simulator, starting


def add_libero_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what `evaluate libero` takes beside the policy."""
    parser.add_argument("--suite", required=True, help="as libero_object, or of LIBERO-PRO, as libero_object_swap")
    parser.add_argument("--tasks", help="as 0-9 or 0,3; default: all")
    parser.add_argument("--states", default="0-49", help="initial states; default: the reference's, 0-49")
    parser.add_argument("--arms", nargs="+", default=["policy"], choices=ARMS, help="conditions, on the same states")
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="one of N parts of the episodes: 0/4, 1/4, ...")
    parser.add_argument("--processes", type=int, default=1, help="simulators that run at once")
    parser.add_argument("--videos", nargs="+", default=[], metavar="TASK:STATE", help="episodes to film, in each arm")
    parser.add_argument("--unnorm_key", help="dataset of the policy's statistics; default: the suite's")
    parser.add_argument("--soft_reset", action="store_true", help="saves 3 s an episode; not for reported numbers")
    parser.add_argument("--allow_other_simulator", action="store_true", help="go on if the fingerprint differs")
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help="seconds until a silent simulator is restarted")
    parser.add_argument("--out", type=Path, required=True, help="folder for episodes.jsonl, run.json and report.html")


def add_merge_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what `evaluate merge` takes."""
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="--out of each shard")
    parser.add_argument("--out", type=Path, required=True, help="folder for all of them together")


def add_replay_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what `evaluate replay` takes."""
    parser.add_argument("--suite", required=True, choices=tuple(MAX_STEPS))
    parser.add_argument("--data_dir", type=Path, required=True, help="--out of python -m openvla_jax.sim.libero")


def run_libero(
    args: argparse.Namespace, info: Mapping[str, Any], name: str, open_policy: Callable[[], PredictsChunks]
) -> None:
    """Evaluates a policy, or goes on with it; prints and writes the report.

    info: what the policy says of itself. name: how results call it. open_policy: loads it, once everything else has
    been checked. Raises InputError for what does not fit together.
    """
    if args.processes < 1:
        raise InputError(f"processes {args.processes}: at least 1")
    tasks = None if args.tasks is None else numbers(args.tasks)
    states, shard, films = numbers(args.states), shard_of(args.shard), [film_of(text) for text in args.videos]
    protocol = protocol_of(info, args.suite, args.unnorm_key, hard_reset=not args.soft_reset)
    with contextlib.ExitStack() as stack:
        simulators = [stack.enter_context(contextlib.closing(Simulator(args.timeout))) for _ in range(args.processes)]
        with starting():
            plan = Plan.make(Suites(simulators[0]), args.suite, args.arms, tasks, states, shard)
            found = fingerprint.measure(simulators[0], args.suite)
        record = fingerprint.check(found, args.allow_other_simulator)
        fingerprint.check_training(info["training"].get("simulators", {}), record, args.allow_other_simulator)
        run = {
            "suite": args.suite,
            "policy": identity(info, name),
            "protocol": protocol.to_dict(),
            "simulator": record,
            "plan": plan.to_dict(),
            "shard": list(shard),
        }
        results = stack.enter_context(Results(args.out, run, plan.episodes))
        pending = [episode for episode in plan.episodes if episode not in results.done]
        if pending:
            filmed = frozenset(Episode(arm, *film) for arm in plan.conditions for film in films)
            lanes = [Lane(each, lambda s, e: plan.environment(protocol, s, e), filmed) for each in simulators]
            print(f"{len(results.done)} of {len(plan.episodes)} episodes are done already", flush=True)
            spent = run_episodes(open_policy(), lanes, pending, protocol.action.executed, progress(results, args.out))
            print(spoken(spent))
        print_report(args.out, results.run, results.outcomes)


def run_merge(args: argparse.Namespace) -> None:
    """Joins the shards of an evaluation; prints and writes the report."""
    run, outcomes = merge(args.folders, args.out)
    print_report(args.out, run, outcomes)


def run_replay(args: argparse.Namespace) -> None:
    """Replays an expert's dataset; prints each episode and the rate."""
    outcomes = []
    with contextlib.closing(Simulator()) as simulator, starting():
        for outcome in replay(args.data_dir, args.suite, simulator):
            outcomes.append(outcome)
            ended = "solved" if outcome.success else "failed"
            print(f"task {outcome.task}, state {outcome.state}: {ended} in {outcome.steps} steps", flush=True)
    print(report.text_table(report.arms_table(outcomes)))


def print_report(folder: Path, run: Mapping[str, Any], outcomes: Sequence[Outcome]) -> None:
    """Prints the rates by arm, and the path of the page that it writes."""
    path = report.write_report(folder, run, outcomes)
    print(report.text_table(report.arms_table(outcomes)))
    print(path)


def progress(results: Results, folder: Path) -> Callable[[Outcome, list[np.ndarray]], None]:
    """Returns what is done with a finished episode: it is recorded, filmed if it is to be, and said."""

    def finished(outcome: Outcome, frames: list[np.ndarray]) -> None:
        results.add(outcome)
        if frames:
            (folder / report.VIDEOS).mkdir(exist_ok=True)
            shown = Rollouts(np.array([outcome.success]), np.array([outcome.steps]), [outcome.instruction], [])
            shown.frames.append(np.stack(frames))
            name = f"{outcome.arm}_task{outcome.task}_state{outcome.state}.gif"
            rollout_animation(shown, folder / report.VIDEOS / name, columns=1, scale=1)
        ended = f"solved in {outcome.steps} steps" if outcome.success else f"failed, {outcome.steps} steps"
        again = f", begun {outcome.redone + 1} times" if outcome.redone else ""
        arm = [each for each in results.outcomes if each.arm == outcome.arm]
        print(
            f"{outcome.arm}, task {outcome.task}, state {outcome.state}: {ended}{again}, {outcome.seconds:.0f} s; "
            f"so far {sum(each.success for each in arm)} of {len(arm)}",
            flush=True,
        )

    return finished


def film_of(text: str) -> tuple[int, int]:
    """Returns (task, state) of "3:0". Raises InputError for another form."""
    task, colon, state = text.partition(":")
    if not (colon and task.isdecimal() and state.isdecimal()):
        raise InputError(f"video {text!r}: give TASK:STATE, as 3:0")
    return int(task), int(state)


def spoken(spent: CpuSeconds) -> str:
    """Returns one line about where the processor time went."""
    return (
        f"CPU: simulator {spent.simulator:.0f} s, policy {spent.policy:.0f} s, evaluator {spent.evaluator:.1f} s "
        f"({spent.overhead:.1%})"
    )
