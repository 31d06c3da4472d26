"""Weights between PyTorch and this project's checkpoints: import, verify, export, inspect, merge.

python convert_weights.py import openvla/openvla-7b checkpoints/openvla-7b
python convert_weights.py verify openvla/openvla-7b checkpoints/openvla-7b
python convert_weights.py export checkpoints/openvla-7b exported/openvla-7b
python convert_weights.py merge checkpoints/openvla-7b runs/lora checkpoints/mine        # adapters into their base
python convert_weights.py import PEFT_FOLDER adapters/mine --base checkpoints/openvla-7b # and export: PEFT's files
"""

import argparse
import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # no accelerator is taken from a run that needs it

from openvla_jax.convert import (
    export_adapter,
    export_weights,
    import_adapter,
    import_weights,
    inspect_weights,
    is_adapter,
    merge_weights,
    verify_weights,
)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    positional = {"import": ("src", "dst"), "export": ("src", "dst"), "verify": ("a", "b"), "inspect": ("src",)}
    positional["merge"] = ("base", "adapter", "dst")
    commands = parser.add_subparsers(dest="command", required=True)
    add = {name: commands.add_parser(name) for name in positional}
    for name, command in add.items():
        for argument in positional[name]:
            command.add_argument(argument)
        if "dst" in positional[name]:
            command.add_argument("--overwrite", action="store_true", help="replace DST when the new one is complete")
        if name not in ("export", "merge"):
            command.add_argument("--model_config", help="preset, JSON or .json file: what SRC does not say of itself")
    add["import"].add_argument("--tokenizer", help="folder with tokenizer files, where SRC has none")
    add["import"].add_argument("--part", nargs=2, action="append", help="NAME PATH: a tower, llm or projector")
    add["import"].add_argument("--center_crop", action="store_true", help="the policy was trained with random crops")
    add["import"].add_argument("--base", help="SRC is an adapter of PEFT's: the imported checkpoint that it belongs to")
    add["export"].add_argument("--format", choices=("hf", "prismatic"), default="hf", help="of a whole model")
    for name in ("export", "merge"):
        add[name].add_argument("--dtype", choices=("float32", "bfloat16"), help="default: as stored")
    add["merge"].add_argument("--threshold", type=float, help="largest difference of logits by merging")
    add["verify"].add_argument("--threshold", type=float, default=2e-4, help="largest difference of logits")
    add["verify"].add_argument("--seed", type=int, default=0)
    add["verify"].add_argument("--tensors_only", action="store_true", help="compare without running the models")
    return parser.parse_args(arguments)


def main() -> None:
    options = vars(parse(sys.argv[1:]))
    command = options.pop("command")
    try:
        if command == "import" and (base := options.pop("base")) is not None:
            import_adapter(options["src"], options["dst"], base, options["overwrite"])
        elif command == "import":
            options["parts"] = dict(options.pop("part") or ())
            print(*(f"note: {note}" for note in import_weights(**options).notes), sep="\n")
        elif command == "merge":
            print(merge_weights(**options))
        elif command == "export" and is_adapter(options["src"]):
            export_adapter(options["src"], options["dst"], options["overwrite"])
        elif command == "export":
            print(*(f"note: {note}" for note in export_weights(**options)), sep="\n")
        elif command == "inspect":
            print(inspect_weights(**options))
        else:
            print(report := verify_weights(**options))
            sys.exit(not report.passed)
    except (ValueError, OSError) as error:
        argparse.ArgumentParser().exit(2, f"convert_weights.py {command}: {error}\n")


if __name__ == "__main__":
    main()
