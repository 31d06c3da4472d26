"""Trains a policy: python train.py --config configs/bridge_tiny.py --workdir runs/bridge_tiny
[--config.train.steps=100]

Run the same command again to resume. Bad input prints one line and exits with 2 (OPENVLA_TRACEBACK=1 shows where it
came from); SIGTERM saves, and exits with 143.
"""

import os
import sys

from absl import app, flags, logging
from ml_collections import config_flags

BAD_INPUT = 2


def main(needs_init_from: bool = False) -> None:
    config = config_flags.DEFINE_config_file("config", None, "Config file, as FILE or FILE:ARG.", lock_config=True)
    workdir = flags.DEFINE_string("workdir", None, "Directory of the run: checkpoints, metrics, config.")
    logging.set_verbosity(logging.WARNING)  # Orbax tells of every thread at the level below
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(lambda _: _run(config.value, str(workdir.value), needs_init_from), flags_parser=_parse)


def _parse(argv):
    try:
        return flags.FLAGS(argv)
    except (AttributeError, KeyError, TypeError, ValueError, OSError, flags.Error) as error:
        fail(error)


def _run(config, workdir: str, needs_init_from: bool) -> None:
    if needs_init_from and not config.init_from:
        fail("fine-tuning starts from a checkpoint: give --config.init_from=DIR")
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        # Each fake device waits in a thread for the others, at several collectives at once: with a pool of one thread
        # per device they wait for ever.
        os.environ.setdefault("PJRT_NPROC", "64")
    from openvla_jax.training.loop import NonFiniteError, run

    try:
        run(config, workdir)
    except (ValueError, OSError, KeyError, NonFiniteError) as error:
        if os.environ.get("OPENVLA_TRACEBACK"):
            raise
        fail(error)


def fail(error: object) -> None:
    """One line on stderr, exit code 2."""
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    print(f"error: {' '.join(str(text).split())}", file=sys.stderr)
    sys.exit(BAD_INPUT)


if __name__ == "__main__":
    main()
