"""python -m openvla_jax.data COMMAND: look at datasets, check them, time them, make them.

inspect bridge_orig DIR [--out FIGURES]    stats MIXTURE DIR [--output FILE]
validate MIXTURE DIR                       mixture MIXTURE DIR
bench [MIXTURE DIR]                        stand-ins MIXTURE DIR
from-lerobot SRC DIR                       from-npz SRC DIR
"""

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from etils import epath

from openvla_jax import cli
from openvla_jax.data import DataError, statistics
from openvla_jax.data.custom import catalogue
from openvla_jax.data.mixture import nominal_length, open_phases, open_sources, table
from openvla_jax.data.oxe.mixtures import resolve_mixture
from openvla_jax.data.rlds import dataset_statistics
from openvla_jax.data.source import Source


@cli.command
def main(arguments: Sequence[str]) -> int:
    args = parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("absl").setLevel(logging.WARNING)  # TFDS reports what it opens
    return args.run(args)


def parser() -> cli.Parser:
    parser = cli.Parser(prog="openvla data", description="RLDS datasets: look, check, make.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run, text: str, dataset: str = "a dataset or a mixture") -> cli.Parser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        if dataset:
            sub.add_argument("dataset", help=dataset, nargs="?" if name == "bench" else None)
            folder = sub.add_mutually_exclusive_group(required=name != "bench")
            folder.add_argument(  # without a default: an absent one must not replace what --data_dir says
                "data_dir", metavar="DIR", nargs="?", default=argparse.SUPPRESS, help="the folder with the datasets"
            )
            folder.add_argument("--data_dir", help="the same as DIR, by the name that configs give it")
            sub.add_argument("--module", help="a Python file with datasets of your own")
            sub.add_argument("--statistics_dir", help="keep computed statistics here, not beside the data")
        return sub

    for name, run, text in (
        ("inspect", _inspect, "where a dataset is, its schema, episodes, statistics, and figures of both"),
        ("stats", _stats, "the action statistics alone"),
    ):
        sub = command(name, run, text)
        sub.add_argument("--proprio", action="store_true", help="statistics of the state too")
        sub.add_argument("--output", help="write the statistics to this JSON file, as data.statistics reads them")
        if name == "inspect":
            sub.add_argument("--out", type=Path, help="write sample frames and action histograms into this folder")
            sub.add_argument("--episodes", type=int, default=20, help="episodes that the figures show (20)")
    sub = command("validate", _validate, "checks for what makes data hard or impossible to train on; exit code 1 then")
    sub.add_argument("--episodes", type=int, default=200, help="episodes read of each dataset (200)")
    sub.add_argument("--strict", action="store_true", help="warnings fail too")
    command("mixture", _mixture, "how often each dataset of a mixture is drawn, and the frames of an epoch")
    sub = command("bench", _bench, "frames/s by stage; without a dataset, on episodes that are made up")
    sub.add_argument("--image_size", type=int, default=224)
    sub.add_argument("--batch_size", type=int, default=16)
    sub.add_argument("--readers", type=int, default=8)
    sub.add_argument("--seconds", type=float, default=8.0, help="for each stage (8)")
    sub.add_argument("--host_cores", type=int, default=112, help="cores of the pod host to project to (112)")
    sub.add_argument("--no_reference", action="store_true", help="leave out the reference's order")
    sub = command("stand-ins", _stand_ins, "random episodes with the schemas of a mixture's datasets", "")
    sub.add_argument("dataset", help="a mixture or a dataset of Open X-Embodiment")
    sub.add_argument("folder", type=Path, help="where DATASET/0.1.0 are written; those that exist are kept")
    sub.add_argument("--episodes", type=int, default=8)
    sub.add_argument("--steps", type=int, default=12)
    for name, run, text in (
        ("from-lerobot", _from_lerobot, "a LeRobot dataset (v2.1 or v3) as RLDS"),
        ("from-npz", _from_npz, "a folder of npz episodes as RLDS"),
    ):
        sub = command(name, run, text, "")
        sub.add_argument("source", type=Path)
        sub.add_argument("folder", type=Path, help="where NAME/1.0.0 is written, with NAME.py, its description")
        sub.add_argument("--name", help="of the new dataset; by default that of the source's folder")
        sub.add_argument("--instruction", help="for episodes without one")
        sub.add_argument("--val_share", type=float, default=0.0, help="share of the episodes for a split of their own")
        sub.add_argument("--primary", metavar="CAMERA", help="the camera that policies see, if it is not obvious")
    sub = commands.choices["from-lerobot"]
    sub.add_argument(
        "--leave_out", metavar="CAMERA", action="append", default=[], help="not converted; may be repeated"
    )
    sub.add_argument(
        "--action", metavar="COLUMN", action="append", default=[], help="'action'; repeated ones are joined"
    )
    sub.add_argument(
        "--state",
        metavar="COLUMN",
        action="append",
        default=[],
        help="'observation.state', else all 'observation.states.*'; repeated ones are joined",
    )
    sub.add_argument(
        "--tolerance",
        type=float,
        default=1e-4,
        metavar="SECONDS",
        help="between a row's timestamp and its video frame, as LeRobot's tolerance_s (1e-4)",
    )
    return parser


def _open(args: argparse.Namespace) -> list[Source]:
    configs, mixtures = catalogue(args.module)
    names = [name for name, _ in resolve_mixture(args.dataset, configs, mixtures)]
    return open_sources(names, args.data_dir, configs)


def _statistics(args: argparse.Namespace, sources: list[Source]) -> dict[str, dict]:
    options = {"cache_dir": args.statistics_dir, "load_proprio": args.proprio}
    stats = {source.name: dataset_statistics(source, **options) for source in sources}
    if args.output:
        epath.Path(args.output).write_text(json.dumps(stats, indent=2) + "\n")
    return stats


def _inspect(args: argparse.Namespace) -> int:
    from openvla_jax.data import inspection

    sources = _open(args)
    stats = _statistics(args, sources)
    for source in sources:
        print(inspection.describe(source, stats[source.name]))
        if args.out:
            print("\n".join(map(str, inspection.figures(source, args.out, args.episodes))))
    return 0


def _stats(args: argparse.Namespace) -> int:
    print(statistics.table(_statistics(args, _open(args))))
    return 0


def _validate(args: argparse.Namespace) -> int:
    from openvla_jax.data import inspection

    levels = []
    for source in _open(args):
        findings = inspection.validate(source, args.episodes)
        print(inspection.report(source.name, findings))
        levels += [finding.level for finding in findings]
    errors, warnings = levels.count("error"), levels.count("warning")
    print(f"{errors} errors, {warnings} warnings")
    return 1 if errors or (args.strict and warnings) else 0


def _data(args: argparse.Namespace) -> dict:
    keys = ("dataset", "data_dir", "module", "statistics_dir")
    return {key: getattr(args, key) for key in keys}


def _mixture(args: argparse.Namespace) -> int:
    phases = open_phases(_data(args))
    mixture = phases[-1].mixture
    print(table(phases))
    length = nominal_length(mixture.weights, mixture.sizes)
    print(f"{mixture.sizes.sum():,} frames in all; an epoch is {length:,}: every dataset of weight 1 once, on average")
    for source, weight, share, size in zip(
        mixture.sources, mixture.weights, mixture.probabilities, mixture.sizes, strict=True
    ):
        print(f"  {source.name}: weight {weight:g}, drawn {share * length / size:.2f} times over in an epoch")
    return 0


def _bench(args: argparse.Namespace) -> int:
    from openvla_jax.data import bench
    from openvla_jax.tokens.tokenizer import load_tokenizer

    if bool(args.dataset) != bool(args.data_dir):
        raise DataError("give a dataset and its DIR, or neither")
    with tempfile.TemporaryDirectory() as made:
        data = _data(args) | {"num_parallel_reads": args.readers, "shuffle_buffer": 512, "text_length": 64}
        if not args.dataset:
            data |= {"dataset": bench.NAME, "data_dir": made, "module": bench.write_episodes(Path(made))}
        tokenizer = load_tokenizer("tiny")
        options = {"image_size": args.image_size, "batch_size": args.batch_size}
        ours = bench.stages(data, tokenizer, **options)
        theirs = None if args.no_reference else bench.reference(data, tokenizer, **options)
        bench.measure([*ours, *([theirs] if theirs else [])], args.batch_size, args.seconds)
        print(bench.report(ours, theirs, bench.frame_bytes(data), args.host_cores))
    return 0


def _stand_ins(args: argparse.Namespace) -> int:
    from openvla_jax.data.ingest.stand_ins import VERSION, write_stand_in
    from openvla_jax.data.oxe.schemas import SCHEMAS

    for name, _ in resolve_mixture(args.dataset):
        if (args.folder / name / VERSION).exists():
            print(f"{args.folder / name / VERSION} is kept")
        elif name in SCHEMAS:
            print(write_stand_in(name, args.folder, episodes=args.episodes, steps=args.steps))
        else:
            raise DataError(f"dataset {name!r} has no schema to make a stand-in of")
    return 0


def _from_lerobot(args: argparse.Namespace) -> int:
    from openvla_jax.data.ingest import lerobot

    told = lerobot.convert(
        args.source,
        args.folder,
        args.name,
        args.instruction,
        args.val_share,
        primary=args.primary,
        leave_out=args.leave_out,
        action=args.action,
        state=args.state,
        tolerance=args.tolerance,
    )
    print(told)
    return 0


def _from_npz(args: argparse.Namespace) -> int:
    from openvla_jax.data.ingest import npz

    print(npz.convert(args.source, args.folder, args.name, args.instruction, args.val_share, args.primary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
