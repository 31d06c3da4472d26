"""Weights between PyTorch and this project's checkpoints: import, verify, export, inspect, merge.

python convert_weights.py import openvla/openvla-7b checkpoints/openvla-7b
python convert_weights.py verify openvla/openvla-7b checkpoints/openvla-7b
python convert_weights.py verify checkpoints/openvla-7b         # its files against the checksums stored with them
python convert_weights.py export checkpoints/openvla-7b exported/openvla-7b
python convert_weights.py merge checkpoints/openvla-7b runs/lora checkpoints/mine        # adapters into their base
python convert_weights.py import PEFT_FOLDER adapters/mine --base checkpoints/openvla-7b # and export: PEFT's files
python convert_weights.py import OFT_FOLDER checkpoints/oft --oft libero                 # and export: OpenVLA-OFT's

An Orbax checkpoint may be in a bucket (gs://BUCKET/run); what is written goes to a local disk.
"""

import os
import sys
from collections.abc import Sequence
from typing import Any

from openvla_jax import cli
from openvla_jax.errors import InputError

DIFFERENT = 1


def parser() -> cli.Parser:
    parser = cli.Parser(prog="openvla convert", description=__doc__)
    positional = {"import": ("src", "dst"), "export": ("src", "dst"), "verify": ("a", "b"), "inspect": ("src",)}
    positional["merge"] = ("base", "adapter", "dst")
    commands = parser.add_subparsers(dest="command", required=True)
    add = {name: commands.add_parser(name) for name in positional}
    for name, command in add.items():
        for argument in positional[name]:
            command.add_argument(argument, nargs="?" if argument == "b" else None)
        if "dst" in positional[name]:
            command.add_argument("--overwrite", action="store_true", help="replace DST when the new one is complete")
        if name not in ("export", "merge"):
            command.add_argument("--model_config", help="preset, JSON or .json file: what SRC does not say of itself")
    add["import"].add_argument("--tokenizer", help="folder with tokenizer files, if SRC has none")
    add["import"].add_argument("--part", nargs=2, action="append", help="NAME PATH: a tower, llm or projector")
    add["import"].add_argument("--center_crop", action="store_true", help="the policy was trained with random crops")
    add["import"].add_argument(
        "--base",
        help="SRC is an adapter of PEFT's: the imported checkpoint that it belongs to; with --oft SRC was not merged: "
        "the Hugging Face model that it adapted",
    )
    for name in ("import", "verify", "inspect"):
        add[name].add_argument("--oft", metavar="PLATFORM", help="SRC is OpenVLA-OFT's, of libero, aloha or bridge")
        add[name].add_argument("--cameras", help="with --oft: names, as primary,wrist, if not the platform's")
        add[name].add_argument("--horizon", type=int, help="with --oft: actions of a chunk, if not the platform's")
        add[name].add_argument("--state", help="with --oft: names of the state's columns, if not the platform's")
        add[name].add_argument("--head", help="with --oft: parallel_tokens, if there are projectors and no action head")
    add["export"].add_argument("--format", choices=("hf", "prismatic"), default="hf", help="of a whole model")
    for name in ("export", "merge"):
        add[name].add_argument("--dtype", choices=("float32", "bfloat16"), help="default: as stored")
        add[name].add_argument("--verify", action="store_true", help="compare files with their checksums first")
    add["merge"].add_argument("--threshold", type=float, help="largest difference of logits by merging")
    add["verify"].add_argument("--threshold", type=float, default=2e-4, help="largest difference of logits")
    add["verify"].add_argument("--seed", type=int, default=0)
    add["verify"].add_argument("--tensors_only", action="store_true", help="compare without running the models")
    return parser


def _oft_options(options: dict[str, Any]) -> Any:
    """Takes what describes an OpenVLA-OFT checkpoint out of a command's options; returns None if nothing does."""
    from openvla_jax.convert.oft import OftOptions

    platform = options.pop("oft")
    given = {name: options.pop(name) for name in ("cameras", "horizon", "state", "head")}
    if platform is None and any(value is not None for value in given.values()):
        listed = ", ".join(f"--{name}" for name, value in given.items() if value is not None)
        raise InputError(f"{listed} describes an OpenVLA-OFT checkpoint: give --oft PLATFORM too")
    names = {name: tuple(given.pop(name).split(",")) for name in ("cameras", "state") if given[name] is not None}
    return None if platform is None else OftOptions(platform, **(given | names))


@cli.command
def main(arguments: Sequence[str]) -> int:
    options = vars(parser().parse_args(arguments))
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # no accelerator is taken from a run that needs it
    from openvla_jax import convert

    command = options.pop("command")
    if command in ("import", "verify", "inspect"):
        options["oft"] = _oft_options(options)
    if options.pop("verify", False):
        for name in ("src", "base", "adapter"):
            if name in options:
                print(convert.verify_checksums(options[name]))
    if command == "import" and options["base"] is not None and options["oft"] is None:
        convert.import_adapter(options["src"], options["dst"], options["base"], options["overwrite"])
    elif command == "import":
        options["parts"] = dict(options.pop("part") or ())
        print(*(f"note: {note}" for note in convert.import_weights(**options).notes), sep="\n")
    elif command == "merge":
        print(convert.merge_weights(**options))
    elif command == "export" and convert.is_adapter(options["src"]):
        convert.export_adapter(options["src"], options["dst"], options["overwrite"])
    elif command == "export":
        print(*(f"note: {note}" for note in convert.export_weights(**options)), sep="\n")
    elif command == "inspect":
        print(convert.inspect_weights(**options))
    elif options["b"] is None:
        print(convert.verify_checksums(options["a"]))
    else:
        print(report := convert.verify_weights(**options))
        return 0 if report.passed else DIFFERENT
    return 0


if __name__ == "__main__":
    sys.exit(main())
