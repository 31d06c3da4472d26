"""Time and memory of converting openvla-7b (15.1 GB of random bfloat16), against copying its files on the same disk.

  python benchmarks/convert.py                            # needs 31 GB of free disk and about fifteen minutes
  python benchmarks/convert.py --layers 1                 # the same steps on 2.5 GB
  python benchmarks/convert.py --model tiny --layers 2    # on megabytes, without the native format

Makes a HuggingFace folder of random values, copies it (the yardstick), imports it, exports it again, and compares every
tensor of the export with the values that were made; then exports a native run directory, imports and exports that, and
compares every tensor of the two. Each step runs in its own process, with the files out of the page cache before it.
Fails if a byte differs and, at full size, if a bound is broken: 6 GiB of memory, 3x the time of copying.
"""

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from openvla_jax.config import VLAConfig, preset  # noqa: E402
from openvla_jax.convert.names import source_shapes, table  # noqa: E402
from openvla_jax.convert.sources import flatten  # noqa: E402
from openvla_jax.convert.torch_io import BFLOAT16, Tensor, read_pt, read_torch_folder  # noqa: E402
from openvla_jax.convert.torch_write import fill, lay_out_safetensors  # noqa: E402

MAX_MEMORY, MAX_RATIO = 6 * 2**30, 3.0
STATISTICS = {
    "q01": [-1.0] * 7,
    "q99": [1.0] * 7,
    "min": [-1.0] * 7,
    "max": [1.0] * 7,
    "mean": [0.0] * 7,
    "std": [1.0] * 7,
}


def random_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """bfloat16 of random bits, but for one of the exponent: finite, and incompressible."""
    size = int(np.prod(shape))
    words = np.random.default_rng(zlib.crc32(name.encode())).integers(0, 2**64, -(-size // 4), np.uint64)
    words &= np.uint64(0xBFFF_BFFF_BFFF_BFFF)
    return words.view(np.uint16)[:size].reshape(shape).view(BFLOAT16)


def make_checkpoint(folder: Path, model: VLAConfig) -> dict[str, tuple[int, ...]]:
    folder.mkdir(parents=True)
    shapes = source_shapes(table(model, "hf"))
    for name, tensor in lay_out_safetensors(
        folder, {name: (BFLOAT16, shape) for name, shape in shapes.items()}
    ).items():
        fill(tensor, 0, random_tensor(name, shapes[name]))
    llama = model.llama
    text_config = {"model_type": "llama", "num_attention_heads": llama.heads, "vocab_size": llama.vocab_size}
    config = {
        "model_type": "openvla",
        "vision_backbone_id": "dinosiglip-vit-so-224px",
        "llm_backbone_id": "llama2-7b-pure",
        "image_sizes": [model.image_size] * 2,
        "image_resize_strategy": "resize-naive",
        "pad_token_id": model.pad_token,
        "text_config": text_config,
        "norm_stats": {"random": {"action": STATISTICS}},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return shapes


def read_native(folder: Path) -> dict[str, Tensor]:
    (file,) = (folder / "checkpoints").glob("*.pt")
    return flatten(read_pt(file)["model"])


def settle(folder: Path) -> None:
    """Everything on disk, and none of it in the page cache."""
    os.sync()
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(command: list[str]) -> tuple[float, int]:
    """(seconds until the result is on disk, peak resident bytes) of a command; stops if it fails."""
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    os.sync()
    if status:
        sys.exit(f"{' '.join(command)} failed")
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="openvla-7b", help="a preset with DINOv2 and SigLIP towers")
    parser.add_argument("--layers", type=int, help="Llama layers, if not the model's own")
    parser.add_argument("--dir", help="where to work (default: .cache of the repository)")
    options = parser.parse_args()
    model = preset(options.model)
    if options.layers:
        model = dataclasses.replace(model, llama=dataclasses.replace(model.llama, depth=options.layers))
    place = Path(options.dir or ROOT / ".cache")
    place.mkdir(exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="bench-convert-", dir=place))
    results: dict[str, tuple[float, int]] = {}

    def convert(label: str, command: str, src: str, dst: str, *options: str, keep: bool = False) -> Path:
        """Runs one conversion in `work` and deletes what it read."""
        settle(work / src)
        arguments = [sys.executable, "convert_weights.py", command, str(work / src), str(work / dst), *options]
        results[label] = measure(arguments)
        if not keep:
            shutil.rmtree(work / src)
        return work / dst

    try:
        shapes = make_checkpoint(work / "hf", model)
        total = sum(int(np.prod(shape)) for shape in shapes.values()) * 2
        settle(work / "hf")
        copy, _ = measure(["cp", "-r", str(work / "hf"), str(work / "copy")])
        shutil.rmtree(work / "copy")
        convert("import hf", "import", "hf", "orbax")
        back = read_torch_folder(convert("export hf", "export", "orbax", "back", keep=True))
        equal = sum(
            back[name].dtype == BFLOAT16 and back[name].read().tobytes() == random_tensor(name, shape).tobytes()
            for name, shape in shapes.items()
            if name in back
        )
        hf = f"{equal} of {len(shapes)} tensors, {len(back)} in the export"
        whole = equal == len(shapes) == len(back)
        del back
        shutil.rmtree(work / "back")

        native = "not tried: native files name their model, and this is none of the named ones"
        if options.model == "openvla-7b":
            convert("export prismatic", "export", "orbax", "native", "--format", "prismatic")
            convert("import prismatic", "import", "native", "orbax", keep=True)
            first = read_native(work / "native")
            second = read_native(convert("export prismatic again", "export", "orbax", "again", "--format", "prismatic"))
            equal = sum(
                second[name].dtype == BFLOAT16 and second[name].read().tobytes() == tensor.read().tobytes()
                for name, tensor in first.items()
                if name in second
            )
            native = f"{equal} of {len(first)} tensors, {len(second)} in the export"
            whole &= equal == len(first) == len(second) == len(source_shapes(table(model, "native")))
    finally:
        shutil.rmtree(work)
    print(f"\n{model.name}: {len(shapes)} tensors, {total / 1e9:.3f} GB; copying the files: {copy:.1f} s")
    for name, (seconds, memory) in results.items():
        speed = f"{seconds:.1f} s ({total / seconds / 1e6:.0f} MB/s), {seconds / copy:.2f}x copying"
        print(f"{name}: {speed}; peak resident memory {memory / 2**30:.2f} GiB")
    print(f"byte-equal after HF -> Orbax -> HF: {hf}")
    print(f"byte-equal after native -> Orbax -> native: {native}")
    full_size = total > 15e9
    broken = [n for n, (s, m) in results.items() if full_size and (m > MAX_MEMORY or s > MAX_RATIO * copy)]
    if broken or not whole:
        sys.exit(f"FAILED: {', '.join(broken) or 'a round trip'}")


if __name__ == "__main__":
    main()
