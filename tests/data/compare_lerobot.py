"""Converts a dataset of make_lerobot.py and compares each row with what LeRobot's own reader returned for it.

PYTHONPATH=. python tests/data/compare_lerobot.py FOLDER    # with FOLDER/expected.npz
"""

import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from openvla_jax.data.ingest import lerobot

JPEG = 3.0  # levels, mean of a frame; frames of neighbouring rows differ by 16 and more


def differences(step: dict, expected: dict) -> list[str]:
    """Returns what of a step is not as LeRobot returned it."""
    seen = step["observation"]
    wrong = [key for key in ("front", "wrist") if np.abs(seen[key] - expected[key].astype(float)).mean() > JPEG]
    exact = {"action": step["action"], "state": seen["state"], "depth": seen.get("depth")}
    wrong += [key for key, value in exact.items() if key in expected and (value != expected[key]).any()]
    return wrong + ["task"] * (step["language_instruction"].decode() != str(expected["task"]))


def main(folder: Path) -> None:
    expected = dict(np.load(folder / "expected.npz"))
    order = iter(np.lexsort((expected["frame"], expected["episode"])))
    wrong: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as made:
        lerobot.convert(folder, Path(made), "made")
        builder = tfds.builder_from_directory(f"{made}/made/1.0.0")
        for episode in builder.as_dataset(split="train"):
            for step in episode["steps"].as_numpy_iterator():
                row = next(order)
                wrong.update(differences(step, {key: values[row] for key, values in expected.items()}))
    assert next(order, None) is None, "rows are missing"
    print(f"{len(expected['frame'])} rows; not as LeRobot reads them: {dict(wrong) or 'none'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
