"""Episodes of the scripted expert as RLDS, in the form of the reference's `libero_*_no_noops`.

OUT/episodes/<suite>/task_3_state_12.npz    one file per initial state, written when its episode ends
OUT/<suite>_no_noops/1.0.0                  the dataset, made of those that succeeded when all are there
"""

import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from openvla_jax.data.ingest import writer
from openvla_jax.errors import InputError, reading
from openvla_jax.sim.libero import expert
from openvla_jax.sim.libero.conventions import ACTION_DIM, IMAGE_SIZE, MAX_STEPS, STATE
from openvla_jax.sim.libero.process import Simulator, SimulatorError
from openvla_jax.storage import atomic_write

VERSION = "1.0.0"
JOINTS = 7
ATTEMPTS = 3  # draws of the noise, until the expert succeeds
RESTARTS = 3  # of a simulator that fails, in one episode
VAL_EVERY = 20  # every 20th episode is held out; of fewer the last one
# The dataset's names of the cameras.
IMAGES = {"image": "primary", "wrist_image": "wrist"}


class Start(NamedTuple):
    """Where an episode begins."""

    task: int
    state: int


def features() -> dict[str, Any]:
    """The features of an example, for TFDS."""
    image = writer.kinds.Image(shape=(IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8, encoding_format="jpeg")
    numbers = lambda count: writer.kinds.Tensor(shape=(count,), dtype=np.float32)
    observation = {"state": numbers(len(STATE)), "joint_state": numbers(JOINTS)}
    step = {
        "observation": observation | dict.fromkeys(IMAGES, image),
        "action": numbers(ACTION_DIM),
        "language_instruction": writer.kinds.Text(),
        **writer.FLAGS,
    }
    return {"steps": writer.kinds.Dataset(step), "episode_metadata": {"file_path": writer.kinds.Text()}}


def collect(
    simulator: Simulator, suite: str, starts: Sequence[Start], noise: float, out: Path
) -> Iterator[tuple[Start, bool, int]]:
    """Has the expert act from every start that has no file yet; yields (start, success, steps) of each.

    Raises InputError if the folder holds episodes of another expert or noise, or a task is not for this expert.
    """
    folder = out / "episodes" / suite
    settings = {"noise": noise, "expert": digest()}
    path = folder / "settings.json"
    if path.exists():
        with reading(path, "remove the folder"):
            found = json.loads(path.read_text())
        if found != settings:
            raise InputError.of(folder, f"holds episodes of {found}, not {settings}", "choose another --out")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(path, json.dumps(settings) + "\n")
    for start in starts:
        path = episode_path(folder, start)
        if not path.exists():
            atomic_write(path, _packed(_retried(simulator, suite, start, noise)))
        with reading(path, "remove the file: its episode is then done again"), np.load(path) as stored:
            yield start, bool(stored["success"]), len(stored["action"]) if stored["success"] else 0


def _retried(simulator: Simulator, suite: str, start: Start, noise: float) -> dict[str, Any]:
    """As `_demonstrated`, begun again in a new process if the simulator fails."""
    for left in reversed(range(RESTARTS)):
        try:
            return _demonstrated(simulator, suite, start, noise)
        except SimulatorError as error:
            if not left:
                raise InputError(f"{error}: {RESTARTS} times at {start}; run the command again to go on") from error
            print(f"{error}: begun again", flush=True)
    raise AssertionError


def _demonstrated(simulator: Simulator, suite: str, start: Start, noise: float) -> dict[str, Any]:
    """The first success of several draws of the noise; without one only `success`, False."""
    simulator.ask("load", suite=suite, task=start.task, hard_reset=True)
    for attempt in range(ATTEMPTS if noise else 1):
        seed = (start.task * 10_000 + start.state) * ATTEMPTS + attempt
        found = simulator.ask("demonstrate", state=start.state, noise=noise, seed=seed, max_steps=MAX_STEPS[suite])
        if found["success"]:
            return found
    return {"success": False}


def write(
    suite: str, starts: Sequence[Start], instructions: Mapping[int, str], out: Path, metadata: Mapping[str, Any]
) -> Path:
    """Writes the RLDS dataset from the files of `collect`; returns its folder.

    A complete dataset of the same episodes and metadata is kept. metadata.json lists the start of each episode by
    split, in order. Raises InputError for fewer than two successes, FileExistsError if another dataset is there.
    """
    folder = out / "episodes" / suite
    good = [start for start in starts if _succeeded(episode_path(folder, start))]
    if len(good) < 2:
        raise InputError(f"{len(good)} of {len(starts)} episodes succeeded: a dataset needs 2; add --states or --tasks")
    held = good[VAL_EVERY - 1 :: VAL_EVERY] or good[-1:]
    splits = {"train": [start for start in good if start not in held], "val": held}
    described = {**metadata, "suite": suite, "starts": {name: list(map(list, part)) for name, part in splits.items()}}
    directory = out / f"{suite}_no_noops" / VERSION
    if directory.exists():
        with reading(directory / "metadata.json", "remove the folder"):
            found = json.loads((directory / "metadata.json").read_text())
        if found == described:
            return directory
        raise FileExistsError(f"{directory} holds a dataset of other episodes: remove it or choose another --out")
    examples = lambda part: (_example(suite, start, instructions[start.task], folder) for start in part)
    return writer.write_dataset(
        directory,
        features(),
        {name: examples(part) for name, part in splits.items()},
        description="Episodes of a scripted expert in LIBERO (openvla_jax.sim.libero).",
        episodes_per_file=50,
        metadata=described,
    )


def episode_path(folder: Path, start: Start) -> Path:
    """Returns where the episode of a start is kept."""
    return folder / f"task_{start.task}_state_{start.state}.npz"


def digest() -> str:
    """Sixteen hexadecimal digits of the expert's code: episodes of two experts do not mix."""
    return hashlib.sha256(Path(expert.__file__).read_bytes()).hexdigest()[:16]


def _succeeded(path: Path) -> bool:
    with reading(path, "remove the file: its episode is then done again"), np.load(path) as stored:
        return bool(stored["success"])


def _packed(episode: Mapping[str, Any]) -> bytes:
    """An episode as npz: images as JPEG, one after the other, with where each ends."""
    arrays = {name: np.asarray(value) for name, value in episode.items()}
    for camera in IMAGES.values():
        if camera in arrays:
            encoded = [writer.encode(frame, "JPEG").getvalue() for frame in arrays[camera]]
            arrays[camera] = np.frombuffer(b"".join(encoded), np.uint8)
            arrays[f"{camera}_ends"] = np.cumsum([len(each) for each in encoded])
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **arrays)
    return file.getvalue()


def _example(suite: str, start: Start, instruction: str, folder: Path) -> dict[str, Any]:
    path = episode_path(folder, start)
    with reading(path, "remove the file: its episode is then done again"), np.load(path) as file:
        stored = {name: file[name] for name in file.files}  # each access reads a whole array
    images = {name: np.split(stored[camera], stored[f"{camera}_ends"][:-1]) for name, camera in IMAGES.items()}
    count = len(stored["action"])
    steps = [
        {
            "observation": {
                **{name: io.BytesIO(frames[t].tobytes()) for name, frames in images.items()},
                "state": stored["state"][t],
                "joint_state": stored["joint_state"][t],
            },
            "action": stored["action"][t],
            "language_instruction": instruction,
            **writer.flags(t, count),
        }
        for t in range(count)
    ]
    return {"steps": steps, "episode_metadata": {"file_path": f"{suite}/{path.name}"}}
