"""Weights between PyTorch and this project's checkpoints: import, export, verify, inspect.

python convert_weights.py import openvla/openvla-7b checkpoints/openvla-7b
python convert_weights.py verify openvla/openvla-7b checkpoints/openvla-7b
python convert_weights.py export checkpoints/openvla-7b exported/openvla-7b
"""

import argparse
import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # no accelerator is taken from a run that needs it

from openvla_jax.convert import ConversionError, export_weights, import_weights, inspect_weights, verify_weights


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser(
        "import", help="HuggingFace folder or hub id, Prismatic run or .pt, or a preset with --part"
    )
    add.add_argument("src")
    add.add_argument("dst")
    add.add_argument("--tokenizer", help="folder with tokenizer files, where SRC has none")
    add.add_argument(
        "--part", action="append", default=[], metavar="NAME=PATH", help="base weights: a tower, llm or projector"
    )
    add.add_argument("--center_crop", action="store_true", help="the policy was trained with random crops")
    export = commands.add_parser("export", help="to the reference's HuggingFace or Prismatic layout")
    export.add_argument("src")
    export.add_argument("dst")
    export.add_argument("--format", choices=("hf", "prismatic"), default="hf")
    export.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: as stored")
    verify = commands.add_parser("verify", help="are two checkpoints the same policy?")
    verify.add_argument("a")
    verify.add_argument("b")
    verify.add_argument("--threshold", type=float, default=2e-4, help="largest difference of logits")
    verify.add_argument("--seed", type=int, default=0)
    verify.add_argument("--tensors_only", action="store_true", help="compare without running the models")
    inspect = commands.add_parser("inspect", help="what a checkpoint is and what it lacks")
    inspect.add_argument("src")
    for command in (add, export):
        command.add_argument("--overwrite", action="store_true", help="replace DST when the new one is complete")
    for command in (add, verify, inspect):
        command.add_argument("--model_config", help="preset, JSON or .json file: what SRC does not say of its model")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = vars(parse(arguments))
    command = options.pop("command")
    try:
        if command == "import":
            options["parts"] = dict(part.split("=", 1) for part in options.pop("part"))
            print("\n".join(f"note: {note}" for note in import_weights(**options).notes))
        elif command == "export":
            print("\n".join(f"note: {note}" for note in export_weights(**options)))
        elif command == "inspect":
            print(inspect_weights(**options))
        else:
            report = verify_weights(**options)
            print(report)
            return 0 if report.passed else 1
    except (ConversionError, ValueError, OSError) as error:
        print(f"convert_weights.py {command}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
