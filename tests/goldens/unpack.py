"""Unpacks the goldens that the repository carries."""

import lzma
from pathlib import Path

import numpy as np

GOLDENS = Path(__file__).resolve().parent


def unpack(folder: Path) -> None:
    """Fills `folder` with the goldens: split files are joined, the others are links."""
    for path in sorted(GOLDENS.rglob("*")):
        target = folder / path.relative_to(GOLDENS)
        if path.is_dir():
            target.mkdir()
        elif path.name.endswith(".xz.part0"):
            parts = sorted(path.parent.glob(path.stem + ".part*"), key=lambda part: int(part.suffix[5:]))
            whole = target.with_name(path.name.removesuffix(".xz.part0"))
            whole.write_bytes(lzma.decompress(b"".join(part.read_bytes() for part in parts)))
        elif ".xz.part" not in path.name:
            target.symlink_to(path)
    draw_pixels(folder / "openvla_tiny")


def draw_pixels(folder: Path) -> None:
    """Writes pixel_values.npy, drawn from its seed."""
    with np.load(folder / "expected.npz", allow_pickle=False) as arrays:
        random = np.random.default_rng(int(arrays["pixel_seed"]))
    np.save(folder / "pixel_values.npy", random.standard_normal((3, 6, 224, 224), dtype=np.float32))
