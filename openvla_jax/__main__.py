"""python -m openvla_jax COMMAND ...: all commands of the package; an installed package has them as `openvla COMMAND`.

  train      train a policy: --config tabletop --workdir runs/demo
  finetune   fine-tune a checkpoint: --config finetune/lora --config.init_from=CKPT --workdir runs/mine
  plan       memory and speed of a training step on a TPU slice, without one: v5p:4x4x4 --config openvla_7b
  convert    weights between PyTorch and this project's checkpoints: import, export, verify, inspect, merge
  data       look at datasets, check, time and convert them
  serve      serve a policy over HTTP
  evaluate   evaluate a checkpoint or a server: rollout, libero, compare, offline, quantization, report
  sweep      run many trainings, or report on them

COMMAND --help lists the flags of a command.
"""

import importlib
import sys
from collections.abc import Sequence

from openvla_jax import cli
from openvla_jax.config import nearest
from openvla_jax.errors import InputError

# Each command's module and function, imported when it runs: a data job needs no model.
COMMANDS = {
    "train": ("openvla_jax.train", "main"),
    "finetune": ("openvla_jax.train", "finetune"),
    "plan": ("openvla_jax.train", "plan"),
    "convert": ("openvla_jax.convert_weights", "main"),
    "data": ("openvla_jax.data.__main__", "main"),
    "serve": ("openvla_jax.serve", "main"),
    "evaluate": ("openvla_jax.evaluate", "main"),
    "sweep": ("openvla_jax.sweep.__main__", "main"),
}
# Names of commands to come, with what does their job today.
RESERVED = {
    "demo": "clone the repository and run `make demo`",
    "doctor": "`python -c 'import jax; print(jax.devices())'` shows the devices that jax finds",
}


@cli.command
def main(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__.strip())
        return 0 if arguments else cli.BAD_INPUT
    name, *rest = arguments
    if name in RESERVED:
        raise InputError(f"`openvla {name}` is not in this version yet; {RESERVED[name]}")
    if name not in COMMANDS:
        raise InputError(f"unknown command {name!r}; {nearest(name, COMMANDS)}")
    module, function = COMMANDS[name]
    return getattr(importlib.import_module(module), function)(rest)


if __name__ == "__main__":
    sys.exit(main())
