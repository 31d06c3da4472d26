"""Memory of openvla-7b (15.1 GB of random bfloat16) as it is and as integers, measured while it is loaded.

  python benchmarks/quantized_load.py                     # needs 31 GB of free disk, 17 GB of memory
  python benchmarks/quantized_load.py --layers 1          # the same steps on 2.5 GB

Makes a HuggingFace folder of random values, imports it, and loads the checkpoint in one process for each row.
Fails, at full size, if the weights with only the towers excluded take more than 0.55 (int8) or 0.33 (int4) of those in
bfloat16, or if a quantising process held more than its result and two of the largest kernels.
"""

import argparse
import dataclasses
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from convert import ROOT, make_checkpoint, settle

from openvla_jax.config import preset
from openvla_jax.models.quantize import EXCLUDE, count_bytes

VISION = ("vision",)
ROWS = ((None, EXCLUDE), ("int8", EXCLUDE), ("int8", VISION), ("int4", EXCLUDE), ("int4", VISION))
BOUNDS = {("int8", VISION): 0.55, ("int4", VISION): 0.33}


def load(path: str, kind: str | None, exclude: tuple[str, ...]) -> None:
    """Prints what loading took, as JSON; runs in a separate process."""
    import jax

    from openvla_jax.checkpoint.load import load_model

    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    before, began = peak(), time.perf_counter()
    model, _ = load_model(path, "bfloat16", kind, exclude)
    if jax.default_backend() == "cpu":  # as a policy does
        model.unstack()
    arrays = jax.block_until_ready(jax.tree.leaves(model))
    held = sum(array.on_device_size_in_bytes() for array in arrays)
    took = time.perf_counter() - began
    print(json.dumps({"counted": count_bytes(model), "held": held, "peak": peak() - before, "seconds": took}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, help="Llama layers, if not all 32")
    parser.add_argument("--dir", help="where to work (default: .cache of the repository)")
    parser.add_argument("--load", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        path, kind, *exclude = json.loads(options.load)
        load(path, kind, tuple(exclude))
        return
    model = preset("openvla-7b")
    if options.layers:
        model = dataclasses.replace(model, llama=dataclasses.replace(model.llama, depth=options.layers))
    place = Path(options.dir or ROOT / ".cache")
    place.mkdir(exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="bench-quantized-", dir=place))
    found = {}
    try:
        make_checkpoint(work / "hf", model)
        subprocess.run(
            [sys.executable, "convert_weights.py", "import", str(work / "hf"), str(work / "orbax")],
            cwd=ROOT,
            check=True,
        )
        shutil.rmtree(work / "hf")
        for kind, exclude in ROWS:
            settle(work / "orbax")
            command = [sys.executable, __file__, "--load", json.dumps([str(work / "orbax"), kind, *exclude])]
            found[kind, exclude] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
            print(f"{kind or 'bfloat16'} {found[kind, exclude]}", file=sys.stderr)
    finally:
        shutil.rmtree(work)
    whole = found[None, EXCLUDE]["held"]
    print("| weights | kept in bfloat16 | counted GB | held GB | of bfloat16 | peak of the process, GB | seconds |")
    print("| --- " * 7 + "|")
    for (kind, exclude), row in found.items():
        kept = ", ".join(exclude) if kind else "all"
        sizes = " | ".join(f"{row[name] / 1e9:.2f}" for name in ("counted", "held"))
        print(
            f"| {kind or 'bfloat16'} | {kept} | {sizes} | {row['held'] / whole:.3f}x "
            f"| {row['peak'] / 1e9:.2f} | {row['seconds']:.0f} |"
        )
    largest = 2 * model.llama.depth * model.llama.width * model.llama.mlp_dim  # a stack as it is stored
    wrong = [f"{kind}: {found[kind, kept]['held'] / whole:.3f} of bfloat16" for (kind, kept), bound in BOUNDS.items()
             if found[kind, kept]["held"] > bound * whole]  # fmt: skip
    wrong += [f"{kind}: {row['peak'] / 1e9:.2f} GB at the peak" for (kind, _), row in found.items()
              if kind and row["peak"] > row["held"] + 2 * largest]  # fmt: skip
    if wrong and not options.layers:
        sys.exit(f"FAILED: {'; '.join(wrong)}")


if __name__ == "__main__":
    main()
