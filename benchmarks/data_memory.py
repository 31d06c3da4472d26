"""python benchmarks/data_memory.py: resident memory of the data pipeline beside the estimate that it prints first.

Stand-ins for the 25 datasets of oxe_magic_soup_plus_minus are written, mixed and shuffled in a buffer of 50,000 frames.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from openvla_jax.data.batches import make_train_iterator, resident_memory_gb
from openvla_jax.data.ingest.stand_ins import write_stand_in
from openvla_jax.data.oxe import MIXTURES
from openvla_jax.tokens.tokenizer import load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=50_000, help="of the shuffle buffer")
    parser.add_argument("--batches", type=int, default=200, help="drawn once the buffer is full")
    parser.add_argument("--folder", type=Path, help="where stand-ins are kept; by default they are removed again")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        names = [name for name, _ in MIXTURES["oxe_magic_soup_plus_minus"]]
        began = time.perf_counter()
        for number, name in enumerate(names):
            if not (folder / name).exists():
                steps = -(-args.frames // (len(names) * 32)) + 4
                write_stand_in(name, folder, episodes=32, steps=steps, image_size=128)
            print(
                f"\rwriting {number + 1} of {len(names)}, {time.perf_counter() - began:.0f} s", end="", file=sys.stderr
            )
        print(file=sys.stderr)
        data = {
            "dataset": "oxe_magic_soup_plus_minus", "data_dir": str(folder), "shuffle_buffer": args.frames,
            "text_length": 64, "num_parallel_reads": 8, "max_host_ram_gb": 64.0,
        }  # fmt: skip
        iterator = make_train_iterator(data, load_tokenizer("tiny"), batch_size=64, image_size=224, seed=0)
        before = resident_memory_gb()
        print(iterator.summary.splitlines()[-1])
        next(iterator)
        seen = [resident_memory_gb()]
        for _ in range(args.batches):
            next(iterator)
            seen.append(resident_memory_gb())
        estimate = before + iterator.state_bytes / 1e9
        difference = max(seen) / estimate - 1
        print(
            f"resident memory: {before:.2f} GB before, {seen[0]:.2f} GB with the buffer full, {max(seen):.2f} GB "
            f"at most in {args.batches} batches; estimated {estimate:.2f} GB: measured is {difference:+.1%}"
        )


if __name__ == "__main__":
    main()
