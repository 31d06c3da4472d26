"""A step of LoRA fine-tuning: examples/s, MFU and peak memory, beside full fine-tuning and PyTorch with PEFT.

  python benchmarks/finetune.py               # scaled down on a CPU; openvla-7b in bfloat16 on a GPU
  python benchmarks/finetune.py --size 7b --batches 1 16 --bases bfloat16 int4

Random weights and batches; adapters on every linear layer. The baseline is `measure/pytorch.py` with PEFT's adapters
(`pip install peft`; left out if that is missing) and torch's AdamW. The sides take turns. Fails if on a CPU,
at batch 1, a step of LoRA takes more than 0.75 of a step that trains everything. The first row comes after about a
minute of compilation.
"""

import argparse
import gc
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

import jax
from measure import training
from measure.models import PEAK, SIZES, card_limit, sized
from measure.timing import PeakMemory, time_in_turns

from openvla_jax.models.tuning import Tuning

MAX_RATIO = 0.75  # of the full step's time, on a CPU


def peft_step(config, batch, dtype: str, rank: int) -> training.Step | None:
    """PEFT's step after a first run, or None if it is missing."""
    try:
        from measure import pytorch

        run = pytorch.peft_step(config, batch, dtype, rank)
    except ImportError as error:
        print(f"no PyTorch baseline: {error}")
        return None
    run()
    return training.Step(run, int(1e9 * (pytorch.peak_gb() or 0)), 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cpu = jax.default_backend() == "cpu"
    parser.add_argument("--size", choices=SIZES, default="tiny" if cpu else "7b")
    parser.add_argument("--batches", nargs="+", type=int, default=[1] if cpu else [1, 16])
    parser.add_argument("--bases", nargs="+", default=["float32", "int4"] if cpu else ["bfloat16", "int4"])
    parser.add_argument("--rank", type=int, help="default: 32, and 4 for the tiny model, whose width is 64")
    parser.add_argument("--remat", default="none" if cpu else "full")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--no_pytorch", action="store_true")
    args = parser.parse_args()
    args.rank = args.rank or (4 if args.size == "tiny" else 32)
    config, failed = sized(args.size), []
    dtype = "float32" if cpu else "bfloat16"
    kind = jax.local_devices()[0].device_kind
    print(f"{config.name}, {kind}, computed in {dtype}, remat {args.remat}, rank {args.rank}, text {training.TEXT}")
    print("| side | trained | base | batch | step ms | examples/s | MFU | memory |\n" + "| --- " * 8 + "|")
    peak = card_limit(PEAK)
    for batch_size in args.batches:
        batch = training.rows(config, batch_size)
        cases: dict[tuple[str, str, str], Tuning | None] = {}
        for name in args.bases:
            cases["openvla_jax", "lora", name] = training.lora(args.rank, name, dtype)
        if cpu:
            cases["openvla_jax", "everything", "float32"] = training.FULL
        if not args.no_pytorch:
            cases["PyTorch + PEFT", "lora", dtype] = None
        # On a GPU one model at a time; on a CPU in turns, so that a busy machine troubles all.
        groups = [list(cases)] if cpu else [[case] for case in cases]
        for group in groups:
            with PeakMemory() as resident:
                made = {}
                for case in group:
                    tuning = cases[case]
                    side = (
                        peft_step(config, batch, dtype, args.rank)
                        if tuning is None
                        else training.make_step(config, tuning, batch, dtype, args.remat)
                    )
                    made |= {} if side is None else {case: side}
                times = time_in_turns({case: step.run for case, step in made.items()}, args.runs)
            times = {case: float(np.median(seconds)) for case, seconds in times.items()}
            for case, seconds in times.items():
                tuning = cases[case] or training.lora(args.rank, dtype, dtype)
                flops = training.model_flops(config, training.TEXT, tuning) * batch_size
                mfu = f"{flops / seconds / peak:.1%}" if peak else "-"
                memory = f"{made[case].bytes / 1e9:.2f} GB" if made[case].bytes else "-"
                cells = [*case, str(batch_size), f"{1e3 * seconds:.1f}", f"{batch_size / seconds:.2f}", mfu, memory]
                print("| " + " | ".join(cells) + " |", flush=True)
            print(f"  peak memory of the process {resident.bytes / 1e9:.1f} GB")
            if cpu:
                first = times["openvla_jax", "lora", args.bases[0]]
                ratio = first / times["openvla_jax", "everything", "float32"]
                print(f"  a step of LoRA takes {ratio:.2f} of one that trains everything")
                failed += [ratio] if batch_size == 1 and ratio > MAX_RATIO else []
            del made
            gc.collect()
    if failed:
        sys.exit(f"failed: LoRA takes {max(failed):.2f} of the full step's time")


if __name__ == "__main__":
    main()
