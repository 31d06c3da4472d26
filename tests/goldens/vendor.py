"""Makes the files beside it out of the full set of goldens: python tests/goldens/vendor.py ../shared/goldens

Of `openvla_tiny` the weights are kept as far as its recorded outputs read them: see `reduced`.
"""

import json
import lzma
import shutil
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
PART = 1_900_000  # bytes of a file
COPIED = (
    "tokens.json", "images/[0-4]_*.png", "images/expected.npz", "oxe/*", "oxe_restructured/*", "pipeline/*.json",
    "pipeline/normalization.npz", "pipeline/action_tokenizer.npz", "pipeline/run_dir*/*", "openvla_tiny/*.json",
    "openvla_tiny/*expected.npz",
)  # fmt: skip
# Interleaved float32: positions within four bytes tell more than the bytes before.
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 0, "lp": 2, "pb": 2}]


def main() -> None:
    source = Path(sys.argv[1])
    for pattern in COPIED:
        for path in sorted(source.glob(pattern)):
            target = HERE / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    packed = lzma.compress(reduced(source / "openvla_tiny"), filters=FILTERS)
    for number, start in enumerate(range(0, len(packed), PART)):
        part = HERE / "openvla_tiny" / f"model.safetensors.xz.part{number}"
        part.write_bytes(packed[start : start + PART])


def reduced(folder: Path) -> bytes:
    """The safetensors file with less information in the two tensors that make up four fifths of it.

    Rows of the embedding that no recorded input reads are zero. Rows of lm_head whose logits are not recorded (they
    only count in the softmax of the losses) keep 7 of 23 bits of mantissa, rounded. All other values are exact.
    """
    data = bytearray((folder / "model.safetensors").read_bytes())
    size = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + size])
    with np.load(folder / "expected.npz") as recorded, np.load(folder / "train_expected.npz") as trained:
        inputs = np.concatenate([recorded["input_ids"].ravel(), trained["input_ids"].ravel()])
        outputs = np.concatenate(
            [recorded["argmax"].ravel(), recorded["action_tokens"].ravel(), trained["labels"].ravel()]
        )
    outputs = outputs[outputs >= 0]  # -100 is no label
    actions = np.arange(31744, 32064)  # with the padding token, and the rows that no token has

    def rows(name: str) -> np.ndarray:
        entry = entries[name]
        assert entry["dtype"] == "F32"
        start, end = (8 + size + offset for offset in entry["data_offsets"])
        return np.frombuffer(memoryview(data)[start:end], np.uint32).reshape(entry["shape"])

    def others(matrix: np.ndarray, kept: list[np.ndarray]) -> np.ndarray:
        return np.setdiff1d(np.arange(len(matrix)), np.concatenate(kept))

    embedding, head = rows("language_model.model.embed_tokens.weight"), rows("language_model.lm_head.weight")
    embedding[others(embedding, [inputs, outputs, actions, [29871]])] = 0
    coarse = others(head, [outputs, actions, np.arange(0, len(head), 29)])
    head[coarse] = (head[coarse] + (1 << 15)) & ~np.uint32((1 << 16) - 1)
    return bytes(data)


if __name__ == "__main__":
    main()
