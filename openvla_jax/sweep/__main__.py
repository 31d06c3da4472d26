"""Runs a sweep, or reports on one.

python -m openvla_jax.sweep --sweep configs/sweeps/lr.py --workdir runs/sweeps/lr --parallel 2
python -m openvla_jax.sweep report runs/sweeps/lr

Run the first again to resume: finished points are skipped, interrupted ones go on, failed ones are tried again.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from openvla_jax import cli, config_files
from openvla_jax.sim.tabletop import WORLDS
from openvla_jax.sweep import jobset, rollouts, runner
from openvla_jax.sweep.points import SweepError, load_sweep

SOME_FAILED = 1


@cli.command
def main(arguments: Sequence[str]) -> int:
    if arguments[:1] == ["report"]:
        return _report(report_parser().parse_args(arguments[1:]))
    return _sweep(sweep_parser().parse_args(arguments))


def report_parser() -> cli.Parser:
    parser = cli.Parser(prog="openvla sweep report", description="Tables and figures.")
    parser.add_argument("workdir", type=Path, help="a sweep's workdir; it may still be running")
    parser.add_argument("--metric", help="what to compare points by; default: val/action_accuracy, or the success")
    parser.add_argument("--rollouts", type=int, metavar="N", help="first measure success on N tabletop scenes")
    parser.add_argument("--lower", action="store_true", help="less is better (default: for names with loss or l1)")
    parser.add_argument("--world", choices=tuple(WORLDS), default="tabletop", help="where those scenes are")
    return parser


def _report(options: argparse.Namespace) -> int:
    from openvla_jax.sweep.report import write_report

    if options.rollouts is not None:
        rollouts.measure(options.workdir, options.rollouts, options.world)
    metric = options.metric or ("val/action_accuracy" if options.rollouts is None else rollouts.SUCCESS)
    lower = options.lower or any(word in metric for word in ("loss", "l1"))
    for path in write_report(options.workdir, metric, lower):
        print(path)
    return 0


def sweep_parser() -> cli.Parser:
    parser = cli.Parser(prog="openvla sweep", description=__doc__)
    parser.add_argument("--sweep", required=True, help="FILE with get_sweep(), or the NAME of one: sweeps/lr")
    parser.add_argument("--workdir", required=True, help="folder of the sweep, one directory per point in it")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for every point")
    parser.add_argument("--launcher", choices=("local", "print", "jobset"), default="local")
    parser.add_argument("--parallel", type=int, default=1, help="runs at once")
    parser.add_argument("--devices", default="", help="CUDA_VISIBLE_DEVICES of each parallel run: 0,1,2")
    jobset.add_arguments(parser)
    return parser


def _sweep(options: argparse.Namespace) -> int:
    if options.parallel < 1:
        raise SweepError(f"--parallel {options.parallel}: one run at least")
    points = load_sweep(
        config_files.find(options.sweep), options.set, group=options.workdir.rstrip("/").rpartition("/")[2]
    )

    if options.launcher == "print":
        for point in points:
            print(shlex.join(["python", *point.arguments(f"{options.workdir.rstrip('/')}/{point.name}")]))
        return 0
    if options.launcher == "jobset":
        for path in jobset.write(points, options):
            print(path)
        return 0

    workdir = Path(options.workdir)
    runs = runner.prepare(workdir, points)
    devices = [device for device in options.devices.split(",") if device]
    with runner.only_one(workdir), runner.Table() as table:
        done = runner.run_all(runs, options.parallel, devices, table)
    if not sys.stdout.isatty():
        print("\n".join(runner.table(runs)))
    for run in runs:
        if run.state == "failed":
            print(f"\n{run.point.name} failed, {run.directory / runner.LOG_FILE} ends with:", file=sys.stderr)
            print("\n".join(f"  {line}" for line in runner.log_tail(run)), file=sys.stderr)
    print(f"figures: python -m openvla_jax.sweep report {json.dumps(options.workdir)[1:-1]}")
    return 0 if done else SOME_FAILED


if __name__ == "__main__":
    sys.exit(main())
