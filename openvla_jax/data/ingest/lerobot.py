"""LeRobot datasets, formats v2 and v3 (parquet and video), -> RLDS.

A row is identified by its episode_index, frame_index and timestamp, never by its position: rows are sorted by
frame_index, and a row's video frame is the one at its timestamp, as in LeRobot's own reader.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow

from openvla_jax.data import DataError
from openvla_jax.data.ingest.demonstrations import Episode, write
from openvla_jax.data.ingest.lerobot_frames import TOLERANCE, stored_frames, video_frames
from openvla_jax.data.ingest.lerobot_meta import (
    FIX,
    Feature,
    Metadata,
    Place,
    read_episodes,
    read_metadata,
    read_rows,
    read_tasks,
)
from openvla_jax.errors import reading

_INDICES = ("timestamp", "frame_index", "episode_index", "index", "task_index")  # columns of every dataset


@dataclass(frozen=True)
class _Camera:
    """key: of the feature. view: what it is called from here on. stored: in the parquet file, not in a video."""

    key: str
    view: str
    stored: bool
    depth: bool


@dataclass(frozen=True)
class _Choice:
    """What is converted: features and, for the columns of action and state, their order."""

    cameras: Sequence[_Camera]
    action: Sequence[str]
    state: Sequence[str]
    tolerance: float


def convert(
    source: Path,
    folder: Path,
    name: str | None = None,
    instruction: str | None = None,
    val_share: float = 0.0,
    *,
    primary: str | None = None,
    leave_out: Sequence[str] = (),
    action: Sequence[str] = (),
    state: Sequence[str] = (),
    tolerance: float = TOLERANCE,
) -> str:
    """Converts a downloaded LeRobot dataset (its folder, with meta/info.json); returns what was done and what to do.

    Colour cameras are re-encoded as JPEG, depth in whole numbers is kept as 16-bit PNG.

    Args:
        source: the dataset's folder.
        folder: where NAME/1.0.0 and NAME.py are written.
        name: of the new dataset; by default that of the source's folder.
        instruction: the text of rows and episodes that have no task.
        val_share: share of the episodes for the split "val".
        primary: the camera that policies see; needed if `demonstrations.primary_view` finds no obvious one.
        leave_out: cameras that are not converted, by feature or by its last part.
        action, state: columns, joined in this order. Default: "action"; "observation.state" or, without it, all
            "observation.states.*" in the order of info.json.
        tolerance: seconds that the nearest video frame may be away from a row's timestamp.

    Raises:
        DataError: another format, missing files or metadata, rows that are repeated or missing, frames that do not
            match their rows, depth that cannot be kept. The message names the file, the episode and the row.
    """
    metadata = read_metadata(source)
    features = metadata.features
    choice = _Choice(
        _cameras(metadata, leave_out),
        _columns(metadata, "action", action, [key for key in ("action",) if key in features]),
        _columns(metadata, "state", state, _default_state(features)),
        tolerance,
    )
    if not choice.action:
        raise DataError.of(
            metadata.path, f"has no feature 'action', only {', '.join(_numeric(features))}", "name one with --action"
        )
    by_key = {camera.key: camera.view for camera in choice.cameras}
    places = read_episodes(metadata, [camera.key for camera in choice.cameras if not camera.stored])
    tasks = read_tasks(metadata)

    def episodes() -> Iterator[Episode]:
        for place in places:
            yield _episode(place, metadata, choice, tasks, instruction)

    _, description = write(
        folder,
        name or source.resolve().name.lower().replace("-", "_"),
        episodes(),
        len(places),
        val_share,
        str(source),
        primary=by_key.get(primary or "", primary),
    )
    unused = [key for key in _numeric(features) if key not in (*choice.action, *choice.state)]
    return (
        f"{len(places)} episodes; look over {description}, then train with data.module={description}\n"
        f"action: {', '.join(choice.action)}; state: {', '.join(choice.state) or 'none'}; "
        f"not used: {', '.join(unused) or 'none'} (--action, --state)"
    )


# ---------------------------------------------------------------------------------------------------------------------
# What is converted
# ---------------------------------------------------------------------------------------------------------------------


def _numeric(features: Mapping[str, Feature]) -> list[str]:
    return [
        key for key, feature in features.items() if re.match("float|u?int|bool", feature.dtype) and key not in _INDICES
    ]


def _default_state(features: Mapping[str, Feature]) -> list[str]:
    if "observation.state" in features:
        return ["observation.state"]
    return [key for key in _numeric(features) if key.startswith("observation.states.")]


def _columns(metadata: Metadata, flag: str, asked: Sequence[str], default: Sequence[str]) -> Sequence[str]:
    for key in asked:
        if key not in metadata.features:
            known = ", ".join(_numeric(metadata.features))
            raise DataError.of(metadata.path, f"has no feature {key!r}", f"--{flag} may be {known}")
    return asked or default


def _cameras(metadata: Metadata, leave_out: Sequence[str]) -> list[_Camera]:
    cameras = []
    for key, feature in metadata.features.items():
        if feature.dtype in ("video", "image"):
            view = re.sub(r"\W", "_", re.sub(r"^observation\.(images\.)?", "", key), flags=re.ASCII)
            depth = feature.depth or feature.channels == 1
            cameras.append(_Camera(key, view, feature.dtype == "image", depth))
    names = {name for camera in cameras for name in (camera.key, camera.view)}
    if unknown := [name for name in leave_out if name not in names]:
        known = ", ".join(camera.view for camera in cameras)
        raise DataError.of(metadata.path, f"has no camera {unknown[0]!r} to leave out", f"it has {known}")
    cameras = [camera for camera in cameras if not {camera.key, camera.view} & {*leave_out}]
    if not any(not camera.depth for camera in cameras):
        raise DataError.of(metadata.path, f"has no camera among its features {', '.join(metadata.features)}")
    taken = {"state": "the state"}
    for camera in cameras:
        if camera.view in taken:
            what = f"{camera.key} and {taken[camera.view]} would both be called {camera.view!r}"
            raise DataError.of(metadata.path, what, f"give --leave_out {camera.key}, or rename one")
        taken[camera.view] = camera.key
        if camera.depth and not camera.stored:
            what = f"{camera.key} is a video of depth or of one channel, which is not read here"
            raise DataError.of(metadata.path, what, f"give --leave_out {camera.key}")
    return cameras


# ---------------------------------------------------------------------------------------------------------------------
# An episode
# ---------------------------------------------------------------------------------------------------------------------


def _episode(
    place: Place, metadata: Metadata, choice: _Choice, tasks: Mapping[int, str], instruction: str | None
) -> Episode:
    where = f"{place.parquet}, episode {place.number}"
    stored = [camera.key for camera in choice.cameras if camera.stored]
    columns = [*choice.action, *choice.state, *stored, "frame_index", "timestamp"]
    table, times, rows = _in_order(read_rows(place, columns, ["task_index"]), metadata.fps, where)
    frames: dict[bool, dict[str, Iterator[np.ndarray]]] = {True: {}, False: {}}
    for camera in choice.cameras:
        named = [f"{row}, camera {camera.view}" for row in rows]
        frames[camera.depth][camera.view] = (
            stored_frames(table.column(camera.key), camera.depth, named)
            if camera.stored
            else video_frames(place.videos[camera.key], times, choice.tolerance, named)
        )
    action, state = _matrix(table, choice.action, where), _matrix(table, choice.state, where)
    return Episode(frames[False], action, state, _texts(table, place, tasks, instruction, rows), frames[True])


def _in_order(table: pyarrow.Table, fps: float, where: str) -> tuple[pyarrow.Table, np.ndarray, list[str]]:
    """Returns the rows by frame_index, their timestamps float64 [T] in seconds, and what errors call each row.

    An episode may begin late or be down-sampled evenly. Rows that are repeated or missing in between are refused, as
    LeRobot 0.3 does: an action would not lead to the next observation.
    """
    numbers, times = _vector(table, "frame_index", where), _vector(table, "timestamp", where)
    order = np.argsort(numbers, kind="stable")
    if (order != np.arange(len(order))).any():
        numbers, times, table = numbers[order], times[order], table.take(order)
    rows = [f"{where}, frame_index {number:.0f}" for number in numbers]
    steps, seconds = np.diff(numbers), np.diff(times)
    if numbers[0] < 0 or times[0] < 0 or (numbers % 1).any():
        raise DataError.of(rows[0], f"frame_index {numbers[0]}, timestamp {times[0]}: must count from 0", FIX)
    usual = min(steps[steps > 0], default=1)
    uneven = (steps != usual) | (np.abs(seconds - 1 / fps) > 0.5 / fps)
    if uneven.any():
        t = int(np.argmax(uneven))
        raise DataError.of(
            rows[t + 1],
            f"comes {steps[t]:.0f} frames and {seconds[t]:.4f} s after the row before it, elsewhere {usual:.0f} frames "
            f"at {fps:g} fps: rows are repeated, missing or mistimed",
            "leave the episode out, or correct fps in meta/info.json",
        )
    return table, times, rows


def _vector(table: pyarrow.Table, key: str, where: str) -> np.ndarray:
    values = _matrix(table, [key], where, np.float64)
    if values.shape[1] != 1 or not np.isfinite(values).all():
        raise DataError.of(where, f"column {key!r} is not one finite number in each row", FIX)
    return values[:, 0]


def _matrix(table: pyarrow.Table, keys: Sequence[str], where: str, dtype: type = np.float32) -> np.ndarray:
    """Returns the columns, joined, [T, D]; [T, 0] without any."""
    joined = [np.zeros((table.num_rows, 0), dtype)]
    for key in keys:
        cells = table.column(key).to_pylist()
        if len({len(cell) if isinstance(cell, list) else type(cell) for cell in cells}) > 1:
            raise DataError.of(where, f"column {key!r} has empty cells or cells of several lengths", FIX)
        with reading(f"{where}, column {key!r}", FIX, DataError), np.errstate(over="ignore"):
            values = np.asarray(cells)
            if values.dtype.kind not in "biuf" or values.ndim > 2:
                raise DataError.of(where, f"column {key!r} is no table of numbers, one row for each step", FIX)
            joined.append(values.reshape(len(values), -1).astype(dtype))
    return np.concatenate(joined, axis=1)


def _texts(
    table: pyarrow.Table, place: Place, tasks: Mapping[int, str], instruction: str | None, rows: Sequence[str]
) -> list[str]:
    """Returns the instruction of each row: its task, else the only task of the episode, else the one given."""
    given = place.tasks[0] if len(place.tasks) == 1 else instruction
    numbers = [-1] * table.num_rows
    if "task_index" in table.column_names:
        numbers = _vector(table, "task_index", rows[0]).tolist()
    texts = [tasks.get(number) or given or "" for number in numbers]
    for t, text in enumerate(texts):
        if not text.strip():
            several = f"; the episode has {len(place.tasks)} tasks" if place.tasks else ""
            raise DataError.of(rows[t], f"has no task{several}", "give --instruction")
    return texts
