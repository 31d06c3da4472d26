"""A folder of npz files, one per episode, -> RLDS.

Each file holds action float [T, D], and images uint8 [T, H, W, 3] under "image" or "image_<view>"; it may hold state
float [T, S] and language_instruction, a string.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from openvla_jax.data import DataError
from openvla_jax.data.ingest.demonstrations import Episode, write


def convert(
    source: Path,
    folder: Path,
    name: str | None = None,
    instruction: str | None = None,
    val_share: float = 0.0,
    primary: str | None = None,
) -> str:
    """Converts a folder of npz episodes, in the order of their names; returns what to do next.

    instruction: for episodes that have none. primary: the camera that policies see, if it is not obvious. Raises
    DataError naming the file and what is wrong with it. Files with Python objects in them are refused: reading those
    would run what they contain.
    """
    paths = sorted(source.glob("*.npz"))
    if not paths:
        raise DataError(f"{source} has no .npz files: give the folder that holds one per episode")

    def episodes() -> Iterator[Episode]:
        for path in paths:
            yield _read(path, instruction)

    _, description = write(folder, name or source.name.lower(), episodes(), len(paths), val_share, str(source), primary)
    return f"{len(paths)} episodes; look over {description}, then train with data.module={description}"


def _read(path: Path, instruction: str | None) -> Episode:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{path} cannot be read ({str(error).splitlines()[0]})") from error
    cameras = {}
    for key, value in arrays.items():
        if key == "image" or key.startswith("image_"):
            if value.ndim != 4:
                raise DataError(f"{path}: {key} has shape {list(value.shape)}, not [steps, height, width, 3]")
            cameras[key.removeprefix("image_") if key != "image" else "primary"] = value
    if not cameras or "action" not in arrays:
        raise DataError(f"{path} holds {', '.join(sorted(arrays))}: 'action' and 'image' or 'image_<view>' are needed")
    action = np.asarray(arrays["action"], np.float32)
    state = np.asarray(arrays.get("state", np.zeros((len(action), 0))), np.float32)
    for key, value in (("action", action), ("state", state)):
        if value.ndim != 2:
            raise DataError(f"{path}: {key} has shape {list(value.shape)}, not [steps, columns]")
    text = str(arrays["language_instruction"]) if "language_instruction" in arrays else instruction
    if not text or not text.strip():
        raise DataError(f"{path} has no language_instruction: give one with --instruction")
    return Episode(cameras, action, state, [text] * len(action))
