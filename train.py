"""Trains a policy: python train.py --config configs/bridge_tiny.py --workdir runs/bridge_tiny
[--config.train.steps=100]

Run the same command again to resume. With `--plan v5p:4x4x4` instead of `--workdir`, the same step is compiled for a
TPU slice, without one: memory and speed, estimated. On several hosts the same command runs on each of them: TPU VMs,
GKE and Slurm are recognised, elsewhere --coordinator, --num_processes and --process_id say who is who.

Exit codes: 0 done; 2 bad input, in one line (OPENVLA_TRACEBACK=1 shows where it came from); 143 stopped by SIGTERM, and
saved; 75 another host was lost, or storage failed: start the same command again; 1 a plan that does not fit.
"""

import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

BAD_INPUT, DOES_NOT_FIT = 2, 1


def main(needs_init_from: bool = False) -> None:
    config = config_flags.DEFINE_config_file("config", None, "Config file, as FILE or FILE:ARG.", lock_config=True)
    workdir = flags.DEFINE_string("workdir", None, "Directory of the run: checkpoints, metrics, config.")
    logging.set_verbosity(logging.WARNING)  # Orbax tells of every thread at the level below
    plan = flags.DEFINE_list("plan", None, "Plan on these TPU slices instead of training: v5p:4x4x4,v5e:16x16")
    plan_out = flags.DEFINE_string("plan_out", None, "JSON file for the plan's report.")
    plan_search = flags.DEFINE_bool("plan_search", False, "Try remat policies and accumulation; propose the fastest.")
    coordinator = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where no environment tells it.")
    processes = flags.DEFINE_integer("num_processes", None, "Processes of the run, with --coordinator.")
    index = flags.DEFINE_integer("process_id", None, "Number of this one, from 0, with --coordinator.")
    flags.mark_flags_as_required(["config"])

    def run(_) -> None:
        if plan.value:
            _plan(config.value, plan.value, plan_out.value, plan_search.value)
        elif not workdir.value:
            fail("give --workdir DIR, or --plan TOPOLOGY to plan instead of training")
        else:
            _run(config.value, workdir.value, needs_init_from, (coordinator.value, processes.value, index.value))

    app.run(run, flags_parser=_parse)


def _parse(argv):
    try:
        return flags.FLAGS(argv)
    except (AttributeError, KeyError, TypeError, ValueError, OSError, flags.Error) as error:
        # An error in a config file comes with its whole traceback, of which the last line says it.
        fail(str(error).strip().splitlines()[-1] if "Traceback" in str(error) else error)


def _run(config, workdir: str, needs_init_from: bool, place: tuple) -> None:
    if needs_init_from and not config.init_from:
        fail("fine-tuning starts from a checkpoint: give --config.init_from=DIR")
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
    except (ValueError, OSError, KeyError, NonFiniteError, hosts.HostError) as error:
        if os.environ.get("OPENVLA_TRACEBACK"):
            traceback.print_exc()
        say(error)
        hosts.leave(hosts.LOST if isinstance(error, StorageError | hosts.HostError) else BAD_INPUT)
    except Exception:
        traceback.print_exc()
        hosts.leave(1)


def _plan(config, topologies: list[str], out: str | None, search: bool) -> None:
    from openvla_jax.planning.environment import planning_environment

    with tempfile.TemporaryDirectory() as dump:
        os.environ.update(planning_environment(os.environ, Path(dump)))
        from openvla_jax.planning.train import run_plans

        try:
            fits = run_plans(config, topologies, Path(dump), out, search)
        except (ValueError, OSError) as error:
            if os.environ.get("OPENVLA_TRACEBACK"):
                raise
            fail(error)
    sys.exit(0 if fits else DOES_NOT_FIT)


def fail(error: object) -> NoReturn:
    """One line on stderr, exit code 2."""
    say(error)
    sys.exit(BAD_INPUT)


def say(error: object) -> None:
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    print(f"error: {' '.join(str(text).split())}", file=sys.stderr)


if __name__ == "__main__":
    main()
