"""Evaluates a checkpoint, or a server: in closed loop, on held-out episodes, and quantised; and reports on a run.

python -m openvla_jax.evaluate rollout --checkpoint WORKDIR --episodes 100 --controls --out DIR
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from openvla_jax import cli
from openvla_jax.checkpoint.contract import check_statistics
from openvla_jax.errors import InputError
from openvla_jax.evaluation.rollouts import FIRST_SEED
from openvla_jax.sim.tabletop import WORLDS
from openvla_jax.types import ActionSpec, ObservationSpec

DEFAULT_FRAMES = 256


@cli.command
def main(arguments: Sequence[str]) -> None:
    options = parser()
    args = options.parse_args(arguments)
    if args.command in ("rollout", "offline") and (args.checkpoint is None) == (args.url is None):
        options.error("give --checkpoint or --url")
    args.run(args)


def parser() -> cli.Parser:
    parser = cli.Parser(prog="openvla evaluate", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    rollout = commands.add_parser(
        "rollout", help="success in the embedded tabletop world, on scenes that no training saw"
    )
    _policy_arguments(rollout)
    rollout.add_argument("--episodes", type=int, default=200, help="scenes, all run in parallel")
    rollout.add_argument(
        "--first_seed", type=int, default=FIRST_SEED, help="scenes have this seed and the following ones"
    )
    rollout.add_argument(
        "--controls", action="store_true", help="also with another object named, without image, at random"
    )
    rollout.add_argument(
        "--world", choices=WORLDS, default="tabletop", help="changed: for fine-tuning; wrist: for chunks"
    )
    rollout.add_argument("--out", type=Path, required=True, help="folder for report.md and figures")
    rollout.set_defaults(run=run_rollout)

    compare = commands.add_parser("compare", help="success of several checkpoints on the same scenes")
    compare.add_argument("checkpoints", nargs="+", metavar="NAME=CHECKPOINT")
    compare.add_argument("--episodes", type=int, default=200, help="scenes, the same for all")
    compare.add_argument("--first_seed", type=int, default=FIRST_SEED, help="as for rollout")
    compare.add_argument("--world", choices=WORLDS, default="tabletop", help="in which world")
    compare.add_argument("--controls", action="store_true", help="as for rollout, of each checkpoint")
    compare.add_argument("--pace", action="store_true", help="also the time of an action, one scene at a time")
    compare.add_argument("--out", type=Path, required=True, help="folder for report.md and success.json")
    compare.set_defaults(run=run_compare)

    offline = commands.add_parser("offline", help="actions on held-out episodes, through the serving path")
    _policy_arguments(offline)
    _data_arguments(offline)
    offline.add_argument("--out", type=Path, required=True, help="folder for report.md, offline.json and figures")
    offline.set_defaults(run=run_offline)

    quantization = commands.add_parser("quantization", help="memory, agreement and latency of int8 and int4 weights")
    quantization.add_argument("--checkpoint", type=Path, required=True)
    quantization.add_argument("--kinds", nargs="+", default=["int8", "int4"])
    quantization.add_argument("--exclude", nargs="*", help="paths that keep full precision; default: towers, tables")
    quantization.add_argument("--dtype", choices=("bfloat16", "float32"), help="to compare with, and of activations")
    quantization.add_argument("--episodes", type=int, default=0, help="tabletop scenes to run with each")
    quantization.add_argument("--save", type=Path, help="folder for the quantised checkpoints, SAVE/int8 and so on")
    _data_arguments(quantization)
    quantization.set_defaults(run=run_quantization)

    report = commands.add_parser("report", help="one page about a training run, also while it runs")
    report.add_argument("workdir", type=Path, help="the run's workdir; the page is WORKDIR/report.html")
    report.add_argument("--frames", type=int, default=4, help="held-out frames of each dataset to predict; 0: none")
    report.set_defaults(run=run_report)

    return parser


def _policy_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, help="a training run's workdir, or one checkpoint")
    parser.add_argument("--url", help="a running server instead, as http://127.0.0.1:8000 ($OPENVLA_TOKEN: its token)")
    parser.add_argument("--quantize", choices=("int8", "int4"), help="with --checkpoint")
    parser.add_argument("--base", type=Path, help="of an adapter's checkpoint, if it has moved")


def _data_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data_dir", help="folder of the datasets; default: where the checkpoint was trained")
    parser.add_argument("--datasets", nargs="+", help="default: all that the checkpoint has statistics of")
    parser.add_argument("--split", default="val")
    parser.add_argument("--frames", type=int, default=DEFAULT_FRAMES, help="of each dataset, spread over its episodes")


def open_policy(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Returns (policy or client, what it says of itself: action, statistics, training)."""
    if args.url is not None:
        from openvla_jax.inference.client import Client

        client = Client(args.url)
        info = client.info()
        try:
            check_statistics(info["statistics"], ActionSpec.from_dict(info["action"]), ObservationSpec())
        except InputError as error:
            raise InputError.of(args.url, str(error)) from None
        return client, info
    from openvla_jax.inference.policy import Policy

    policy = Policy.from_checkpoint(args.checkpoint, quantize=args.quantize, check_images=False, base=args.base)
    contract = policy.contract
    return policy, {
        "action": dataclasses.asdict(contract.action),
        "observation": dataclasses.asdict(contract.observation),
        "statistics": contract.statistics,
        "training": contract.training,
    }


def read_frames(args: argparse.Namespace, info: Mapping[str, Any]) -> dict[str, Any]:
    """Held-out frames by dataset."""
    from openvla_jax.config import nearest
    from openvla_jax.evaluation.offline import held_out_frames

    data = info["training"].get("data", {})
    data_dir, module = args.data_dir or data.get("data_dir"), data.get("module", "")
    if not data_dir:
        raise InputError("the checkpoint does not say where its data are: --data_dir names their folder")
    for name in args.datasets or ():
        if name not in info["statistics"]:
            raise InputError(f"the checkpoint has no statistics of {name!r}; {nearest(name, info['statistics'])}")
    names = args.datasets or list(info["statistics"])
    observation, action = ObservationSpec.from_dict(info["observation"]), ActionSpec.from_dict(info["action"])
    shown = {"module": module, "observation": observation, "normalization": action.normalization}
    return {
        name: held_out_frames(name, data_dir, info["statistics"][name], args.frames, args.split, **shown)
        for name in names
    }


def run_rollout(args: argparse.Namespace) -> None:
    """Evaluates, prints the table, and writes out/report.md with its figures (the training curves where the
    checkpoint is a workdir with metrics)."""
    from openvla_jax.evaluation import figures
    from openvla_jax.evaluation.rollouts import evaluate
    from openvla_jax.training.metrics import METRICS_FILE, read_metrics

    policy, info = open_policy(args)
    statistics = next(iter(info["statistics"].values()))["action"]
    began = time.perf_counter()
    results = evaluate(
        policy, args.episodes, controls=args.controls, first_seed=args.first_seed, action_statistics=statistics,
        executed=ActionSpec.from_dict(info["action"]).executed, world=args.world,
    )  # fmt: skip
    print(f"{args.episodes} scenes, {time.perf_counter() - began:.0f} s\n{figures.success_table(results)}")
    args.out.mkdir(parents=True, exist_ok=True)
    made = []
    if args.checkpoint is not None and (args.checkpoint / METRICS_FILE).is_file():
        made.append(figures.training_curves(read_metrics(args.checkpoint), args.out / "training_curves.png"))
    made.append(figures.rollout_strip(results["policy"], args.out / "rollouts.png"))
    made.append(figures.rollout_animation(results["policy"], args.out / "rollouts.gif"))
    title = f"Tabletop: {args.checkpoint or args.url} on {args.episodes} unseen scenes"
    for path in (figures.write_report(results, args.out / "report.md", title, made), *made):
        print(path)


def run_compare(args: argparse.Namespace) -> None:
    """Prints the tables, and writes out/report.md, success.json and a strip of the last checkpoint's rollouts."""
    from openvla_jax.evaluation import figures, pace
    from openvla_jax.evaluation.environments.tabletop import TabletopEnvironment
    from openvla_jax.evaluation.rollouts import evaluate
    from openvla_jax.inference.policy import Policy

    named = [item.partition("=")[::2] for item in args.checkpoints]
    for name, path in named:
        if not name or not path:
            raise InputError(f"checkpoint {name or path!r}: give NAME=CHECKPOINT, as lora=runs/lora")
    results, paces = {}, {}
    for name, path in named:
        policy = Policy.from_checkpoint(path, check_images=False)
        found = evaluate(policy, args.episodes, controls=args.controls, first_seed=args.first_seed, world=args.world)
        results |= {name if condition == "policy" else f"{name}, {condition}": one for condition, one in found.items()}
        if args.pace:
            paces[name] = pace.measure(policy, TabletopEnvironment(args.world).reset(args.first_seed))
    print(figures.success_table(results))
    if paces:
        print(f"\n{pace.table(paces)}")
    args.out.mkdir(parents=True, exist_ok=True)
    strip = figures.rollout_strip(results[named[-1][0]], args.out / f"{named[-1][0]}.png")
    title = f"World {args.world!r}: {args.episodes} unseen scenes"
    report = figures.write_report(results, args.out / "report.md", title, [strip])
    summary: dict[str, Any] = {
        name: {"rate": found.rate, "interval": found.interval} for name, found in results.items()
    }
    for name, measured in paces.items():
        summary[name] |= dataclasses.asdict(measured)
    (args.out / "success.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(report)


def run_offline(args: argparse.Namespace) -> None:
    """Prints the table, and writes out/report.md, offline.json and a figure per dataset."""
    from openvla_jax.evaluation import figures, offline

    policy, info = open_policy(args)
    frames = read_frames(args, info)
    spec = ActionSpec.from_dict(info["action"])
    results = {
        name: offline.compare(offline.predict(policy, rows, name), rows, info["statistics"][name]["action"], spec)
        for name, rows in frames.items()
    }
    text = offline.table(results)
    print(text)
    args.out.mkdir(parents=True, exist_ok=True)
    made = [
        figures.action_scatter(result.predicted, result.true, args.out / f"{name}.png", name)
        for name, result in results.items()
    ]
    summary = {
        name: {
            "frames": len(result.true),
            "accuracy": result.accuracy,
            "accuracy_by_dimension": result.accuracy_by_dimension.tolist(),
            "l1_by_dimension": result.l1_by_dimension.tolist(),
        }
        for name, result in results.items()
    }
    (args.out / "offline.json").write_text(json.dumps(summary, indent=2) + "\n")
    pictures = [f"![{path.stem}]({path.name})\n" for path in made]
    lines = [f"# Held-out frames: {args.checkpoint or args.url}, split {args.split}", "", text, "", *pictures]
    (args.out / "report.md").write_text("\n".join(lines))
    for path in (args.out / "report.md", *made):
        print(path)


def run_report(args: argparse.Namespace) -> None:
    """Writes the page and prints its path."""
    from openvla_jax.evaluation.run_report import write_report

    print(write_report(args.workdir, args.frames))


def run_quantization(args: argparse.Namespace) -> None:
    """Prints the table; with --save writes the quantised checkpoints."""
    from openvla_jax.checkpoint.load import load_model, save_model
    from openvla_jax.checkpoint.reading import load_contract
    from openvla_jax.evaluation import quantization
    from openvla_jax.models.quantize import EXCLUDE, check_kind

    for kind in args.kinds:
        check_kind(kind)
    exclude = EXCLUDE if args.exclude is None else tuple(args.exclude)
    contract = load_contract(args.checkpoint)
    contract.check_is_policy()
    specs = {name: dataclasses.asdict(getattr(contract, name)) for name in ("observation", "action")}
    frames = read_frames(args, {"statistics": contract.statistics, "training": contract.training, **specs})
    rows = quantization.measure(
        args.checkpoint, frames, args.kinds, dtype=args.dtype, exclude=exclude, episodes=args.episodes
    )
    print(quantization.table(rows))
    for kind in args.kinds if args.save else ():
        model, _ = load_model(args.checkpoint, args.dtype or rows[0].name, kind, exclude)
        args.save.mkdir(parents=True, exist_ok=True)
        save_model(model, contract, args.save / kind)
        print(args.save / kind)


if __name__ == "__main__":
    sys.exit(main())
