"""Serves a checkpoint's policy over HTTP.

python -m openvla_jax.serve --checkpoint CHECKPOINT
python -m openvla_jax.serve --plan v5e:2x2,v5e:2x4       # what serving a 7B there would take, estimated
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from openvla_jax import cli
from openvla_jax.errors import InputError, reading
from openvla_jax.storage import use_compilation_cache

SWITCH = {"auto": None, "on": True, "off": False}


@cli.command
def main(arguments: Sequence[str]) -> int:
    options = parser()
    args = options.parse_args(arguments)
    if args.exclude is not None and not args.quantize:
        options.error("--exclude lists what stays in full precision: give --quantize int8 or int4 with it")
    if args.plan:
        return run_plan(args)
    if not args.checkpoint:
        options.error("give --checkpoint DIR, or --plan SLICES to plan instead of serving")
    serve(args)
    return 0


def parser() -> cli.Parser:
    parser = cli.Parser(prog="openvla serve", description=__doc__)
    parser.add_argument("--checkpoint", help="a run's workdir, one of its checkpoints, or an import")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 to be reached from other machines")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: bfloat16, float32 on a CPU")
    parser.add_argument("--base", help="of an adapter's checkpoint, where that lies elsewhere now")
    parser.add_argument(
        "--verify", action="store_true", help="compare the checkpoint's files with their checksums first"
    )
    parser.add_argument("--quantize", choices=("int8", "int4"), help="weights as integers, made while loading")
    parser.add_argument("--exclude", nargs="*", help="paths that keep full precision; default: towers, tables")
    parser.add_argument("--tensor", type=int, default=1, help="chips of this host that share every layer")
    parser.add_argument(
        "--unconstrained", action="store_true", help="tokens from the whole vocabulary, as the reference"
    )
    parser.add_argument("--resize_kernel", choices=("auto", "lanczos3", "bicubic"), default="auto")
    parser.add_argument("--crop_area", default="auto", help="share of the area, or none; auto: as it was trained")
    parser.add_argument("--jpeg", choices=SWITCH, default="auto", help="encode and decode images first, as LIBERO's do")
    parser.add_argument("--max_batch", type=int, default=16, help="requests decoded together")
    parser.add_argument("--wait_ms", type=float, default=4.0, help="how long a request waits for others")
    parser.add_argument("--max_queue", type=int, default=64, help="waiting requests beyond which clients get 503")
    parser.add_argument("--max_body_mb", type=float, default=16.0)
    parser.add_argument("--token_file", type=Path, help="file with a bearer token ($OPENVLA_TOKEN works too)")
    parser.add_argument("--reference_errors", action="store_true", help='"error" with status 200, as the reference')
    parser.add_argument(
        "--compilation_cache",
        default="~/.cache/openvla_jax/xla",
        help="folder of compiled programs, which makes the next start fast; empty: none",
    )
    planning = parser.add_argument_group("planning (the serving program compiled for TPU slices, without one)")
    planning.add_argument("--plan", metavar="SLICES", help="plan instead of serving: v5e:2x2,v5e:2x4")
    planning.add_argument("--plan_model", default="openvla-7b", help="preset, where there is no --checkpoint")
    planning.add_argument("--plan_config", help="plan the policy that a training config makes: configs/debug.py:ARG")
    planning.add_argument("--plan_batch", type=int, default=1)
    planning.add_argument("--plan_out", help="JSON file for the report")
    return parser


def serve(args: argparse.Namespace) -> None:
    """Takes the port, loads the policy, compiles its programs, and answers requests until a signal ends the process."""
    began = time.perf_counter()
    from openvla_jax.inference.process import Process, bind, ended_by_signals, url_of

    with ended_by_signals():
        changes: dict[str, Any] = {"jpeg": SWITCH[args.jpeg]}
        changes["resize_kernel"] = None if args.resize_kernel == "auto" else args.resize_kernel
        changes = {name: value for name, value in changes.items() if value is not None}
        changes |= read_crop_area(args.crop_area)
        token = read_token(args.token_file)
        listener = bind(args.host, args.port)  # before minutes are spent on loading

        def load() -> tuple[Any, str]:
            app, loaded, warmed = load_app(args, changes, token, began)
            line = f"loaded in {loaded:.1f} s, warm after {warmed:.1f} s more; {url_of(listener)}"
            if args.host not in ("127.0.0.1", "localhost", "::1") and token is None:
                line += "\nwarning: open to the network without a token (--token_file)"
            return app, line

        Process(load).serve_at(listener)


def load_app(
    args: argparse.Namespace, changes: dict[str, Any], token: str | None, began: float
) -> tuple[Any, float, float]:
    """Returns the application, the seconds from `began` until it was loaded, and those of its compilation.

    Raises InputError if the checkpoint cannot be served, NonFiniteError if its weights are damaged.
    """
    from openvla_jax.inference.policy import Policy  # and jax, which takes seconds
    from openvla_jax.inference.server import Settings, make_app, warm_up
    from openvla_jax.models.quantize import EXCLUDE

    use_compilation_cache(args.compilation_cache, every_program=True)
    settings = Settings(
        max_batch=args.max_batch,
        wait_ms=args.wait_ms,
        max_queue=args.max_queue,
        max_body_mb=args.max_body_mb,
        token=token,
        reference_errors=args.reference_errors,
    )
    policy = Policy.from_checkpoint(
        args.checkpoint,
        args.dtype,
        args.quantize,
        constrained=not args.unconstrained,
        preprocessing=changes,
        base=args.base,
        exclude=EXCLUDE if args.exclude is None else args.exclude,
        tensor=args.tensor,
        verify=args.verify,
    )
    app = make_app(policy, settings)
    return app, time.perf_counter() - began, warm_up(policy, settings.max_batch, partial(print, flush=True))


def run_plan(args: argparse.Namespace) -> int:
    """Prints the plans; the exit code: 0 if every one fits, else 1."""
    from openvla_jax.planning.environment import planning_environment

    if args.plan_batch < 1:
        raise InputError(f"--plan_batch {args.plan_batch}: 1 at least")
    with tempfile.TemporaryDirectory() as dump:
        os.environ.update(planning_environment(os.environ, Path(dump)))
        from openvla_jax.models.quantize import EXCLUDE
        from openvla_jax.planning.serve import run_plans

        fits = run_plans(
            *planned(args),
            args.plan.split(","),
            Path(dump),
            args.plan_out,
            batch=args.plan_batch,
            quantize=args.quantize,
            exclude=EXCLUDE if args.exclude is None else args.exclude,
        )
    return 0 if fits else 1


def planned(args: argparse.Namespace) -> tuple[Any, Any]:
    """Returns the model and the `ActionSpec` to plan: of a checkpoint, a training config or a preset."""
    from openvla_jax.checkpoint.reading import load_contract
    from openvla_jax.config import preset
    from openvla_jax.types import ActionSpec

    if args.checkpoint:
        contract = load_contract(args.checkpoint)
        return contract.model, contract.action
    if not args.plan_config:
        return preset(args.plan_model), ActionSpec()
    from openvla_jax import config_files
    from openvla_jax.planning.train import planned_model
    from openvla_jax.settings import Settings

    file, _, argument = config_files.find(args.plan_config).partition(":")
    config = config_files.call(file, "get_config", *([argument] if argument else [])).to_dict()
    if not config.get("init_from") and not config.setdefault("model", {}).get("preset"):
        config["model"]["preset"] = args.plan_model
    return planned_model(Settings.from_dict(config))


def read_token(path: Path | None) -> str | None:
    """Returns the token of a file, else of the environment. Raises InputError for a file without one."""
    if path is None:
        return os.environ.get("OPENVLA_TOKEN") or None
    with reading(path, "write the token into it as text"):
        token = path.read_text().strip()
    if not token:
        raise InputError(f"token file {path} is empty: put the token into it, or leave --token_file out")
    return token


def read_crop_area(text: str) -> dict[str, float | None]:
    """Returns the change of `Preprocessing` that `--crop_area` asks for."""
    if text == "auto":
        return {}
    with reading(f"--crop_area {text}", "give a share of the area as 0.9, none, or auto"):
        return {"crop_area": None if text == "none" else float(text)}


if __name__ == "__main__":
    sys.exit(main())
