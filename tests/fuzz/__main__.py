"""python -m tests.fuzz [--targets NAME ...] [--inputs 100000] [--seed 0]: fuzzes the parsers of foreign bytes."""

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]  # as pytest has them

from tests.fuzz.harness import fuzz
from tests.fuzz.targets import TARGETS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", nargs="+", choices=sorted(TARGETS), default=sorted(TARGETS))
    parser.add_argument("--inputs", type=int, default=100_000, help="for each parser (100,000)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for name in args.targets:
        began = time.perf_counter()
        tried, accepted = fuzz(TARGETS[name], args.inputs, args.seed)
        print(f"{name}: {tried:,} inputs, {accepted:,} accepted, {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
