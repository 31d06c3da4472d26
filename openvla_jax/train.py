"""Trains a policy, or plans its training for a TPU slice.

python train.py --config configs/tabletop.py --workdir runs/demo [--config.train.steps=100]
python train.py --config configs/openvla_7b.py:v5p-128 --plan v5p:4x4x4

Run the same command again to resume. With --plan instead of --workdir the same step is compiled for a TPU slice,
without one; memory and speed are estimated. On several hosts run the same command on each of them: TPU VMs, GKE and
Slurm are recognised; elsewhere give --coordinator, --num_processes and --process_id.

Exit codes: 0 done; 2 bad input, in one line (OPENVLA_TRACEBACK=1 shows where it came from); 143 stopped by SIGTERM, and
saved; 75 another host was lost, or storage failed: start the same command again; 1 a plan that does not fit.
"""

import argparse
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags, logging
from ml_collections import config_flags

from openvla_jax import cli, config_files
from openvla_jax.errors import InputError

DOES_NOT_FIT = 1


@cli.command
def main(arguments: Sequence[str]) -> int:
    return _execute(*parse(arguments, "train"))


@cli.command
def finetune(arguments: Sequence[str]) -> int:
    options, config = parse(arguments, "finetune")
    if not config.init_from and not options.plan:
        raise InputError("fine-tuning starts from a checkpoint: give --config.init_from=DIR")
    return _execute(options, config)


@cli.command
def plan(arguments: Sequence[str]) -> int:
    """`plan TOPOLOGIES --config FILE` is `train --plan TOPOLOGIES --config FILE`."""
    if arguments[:1] in (["-h"], ["--help"]):
        print("usage: openvla plan TOPOLOGIES --config CONFIG: the same as openvla train --plan TOPOLOGIES", end="\n\n")
        return main(arguments)
    if not arguments or arguments[0].startswith("-"):
        raise InputError("no TPU slice to plan for: openvla plan v5p:4x4x4 --config CONFIG")
    return main(["--plan", *arguments])


def parse(arguments: Sequence[str], command: str) -> tuple[argparse.Namespace, Any]:
    """Returns (options, config), the config with its overrides. Reports bad arguments and exits with code 2."""
    parser = cli.Parser(prog=f"openvla {command}", description=__doc__)
    parser.add_argument("--config", required=True, help="FILE or NAME of a config, as FILE:ARG or NAME:ARG with an "
                        "argument; --config.KEY=VALUE overrides a setting")  # fmt: skip
    parser.add_argument("--workdir", help="folder of the run: checkpoints, metrics, config")
    parser.add_argument("--plan", help="plan on these TPU slices instead of training: v5p:4x4x4,v5e:16x16")
    parser.add_argument("--plan_out", help="JSON file for the plan's report")
    parser.add_argument("--plan_search", action="store_true", help="try remat policies and accumulation")
    parser.add_argument("--coordinator", help="HOST:PORT of process 0, if the environment does not say")
    parser.add_argument("--num_processes", type=int, help="processes of the run, with --coordinator")
    parser.add_argument("--process_id", type=int, help="number of this process, from 0, with --coordinator")
    options, overrides = parser.parse_known_args(arguments)
    if unknown := [text for text in overrides if re.match(r"--?[a-z]", text) and "config." not in text]:
        parser.error(f"unknown flag {unknown[0]}: settings are written --config.KEY=VALUE")
    config = load_config(options.config, overrides)
    if not options.plan and not options.workdir:
        parser.error("give --workdir DIR, or --plan TOPOLOGY to plan instead of training")
    return options, config


def load_config(name: str, overrides: Sequence[str]) -> Any:
    """Returns the locked ConfigDict of FILE[:ARG] or NAME[:ARG] with `--config.KEY=VALUE` overrides applied.

    Raises InputError for a config, a key or a value that does not exist or fit.
    """
    file = config_files.find(name)
    argv = ["openvla", f"--config={file}", *overrides]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, lock_config=True, sys_argv=argv)
    try:
        with config_files.importable(file.partition(":")[0]):
            rest = values(argv)[1:]
    except (AttributeError, KeyError) as error:
        name, *others = re.findall(r"['\"]+(\w+)", str(error.args[0]))  # the key, and one that it may stand for
        meant = f"; did you mean {others[0]!r}?" if others else ""
        raise InputError(f"{file} has no setting {name!r}{meant}") from error
    except (TypeError, ValueError, flags.Error) as error:
        text = str(error).strip()
        if "Traceback" in text:  # of the config file; its last line says what is wrong
            text = re.sub(r"^\w+Error: ", "", text.splitlines()[-1])
        raise InputError(text) from error
    if rest:
        raise InputError(f"unknown argument {rest[0]}: settings are written --config.KEY=VALUE")
    return values.config


def _execute(options: argparse.Namespace, config: Any) -> int:
    flags.FLAGS(["openvla"])  # absl's logging waits for its own flags
    logging.use_absl_handler()
    logging.set_verbosity(logging.WARNING)  # Orbax reports every thread at the level below
    if options.plan:
        return _plan(config, options.plan.split(","), options.plan_out, options.plan_search)
    train(config, options.workdir, (options.coordinator, options.num_processes, options.process_id))
    return 0


def train(config: Any, workdir: str, place: tuple[str | None, int | None, int | None] = (None, None, None)) -> None:
    """Joins the other hosts and trains; ends the process, with an exit code that tells the cause, if that fails.

    `place` is (coordinator, number of processes, process id), None for what the environment says.
    """
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        # Each fake device waits in a thread for the others, at several collectives at once: with a pool of one thread
        # per device they wait for ever.
        os.environ.setdefault("PJRT_NPROC", "64")
    from openvla_jax.storage import StorageError
    from openvla_jax.training import hosts
    from openvla_jax.training.runtime import NonFiniteError

    try:
        hosts.initialize(*place)
        from openvla_jax.training.loop import run

        run(config, workdir)
    except Exception as error:
        if not (cli.is_users(error) or isinstance(error, NonFiniteError | hosts.HostError)):
            cli.report_bug(error)
            hosts.leave(cli.BUG)
        cli.report(error)
        hosts.leave(hosts.LOST if isinstance(error, StorageError | hosts.HostError) else cli.BAD_INPUT)


def _plan(config: Any, topologies: list[str], out: str | None, search: bool) -> int:
    from openvla_jax.planning.environment import planning_environment

    with tempfile.TemporaryDirectory() as dump:
        os.environ.update(planning_environment(os.environ, Path(dump)))
        from openvla_jax.planning.train import run_plans

        return 0 if run_plans(config, topologies, Path(dump), out, search) else DOES_NOT_FIT


if __name__ == "__main__":
    sys.exit(main())
