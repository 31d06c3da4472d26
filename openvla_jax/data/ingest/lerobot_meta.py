"""What a LeRobot dataset says of itself, formats v2 and v3: its features, episodes and tasks.

meta/info.json names fps, features and the path templates. v2 has a parquet file and a video per episode,
meta/episodes.jsonl and meta/tasks.jsonl. v3 has many episodes per file; meta/episodes/**.parquet says which files hold
an episode and between which seconds of the videos; meta/tasks.parquet numbers the tasks.
"""

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow
from pyarrow import parquet

from openvla_jax.data import DataError
from openvla_jax.errors import reading

FIX = "download it again or correct it"
_SLOT = re.compile(r"\{(\w+)(?::0?(\d{1,2})d)?\}")  # {episode_index:06d}; str.format would allow any width


@dataclass(frozen=True)
class Feature:
    """A column. dtype: as info.json names it; "image" and "video" are frames. channels: of its frames, if known.
    depth: its frames are marked as depth maps."""

    dtype: str
    channels: int | None
    depth: bool


@dataclass(frozen=True)
class Video:
    """The part of a video that shows an episode: from second `start` to before second `end`."""

    path: Path
    start: float = 0.0
    end: float = math.inf


@dataclass(frozen=True)
class Place:
    """Where an episode lies. videos: by feature. tasks: of the episode, as the table of episodes has them."""

    number: int
    length: int
    parquet: Path
    videos: Mapping[str, Video]
    tasks: Sequence[str]


@dataclass(frozen=True)
class Metadata:
    """What meta/info.json says."""

    source: Path
    packed: bool  # format v3
    fps: float
    features: Mapping[str, Feature]
    info: Mapping[str, Any]

    @property
    def path(self) -> Path:
        return self.source / "meta" / "info.json"

    def file(self, template: str, values: Mapping[str, Any]) -> Path:
        """Returns the path that a template of info.json, "data_path" or "video_path", gives for these values."""
        text = _typed(self.info, template, str, self.path)
        if unknown := [name for name, _ in _SLOT.findall(text) if name not in values]:
            raise DataError.of(
                self.path, f"{template} {text!r} asks for {unknown[0]!r}", f"known are {', '.join(values)}"
            )
        filled = PurePosixPath(_SLOT.sub(lambda slot: str(values[slot[1]]).zfill(int(slot[2] or 0)), text))
        if re.search("[{}]", _SLOT.sub("", text)) or filled.is_absolute() or ".." in filled.parts:
            raise DataError.of(self.path, f"{template} {text!r} is no path template of LeRobot", FIX)
        return self.source / filled


def read_metadata(source: Path) -> Metadata:
    """Reads meta/info.json of a dataset's folder. Raises DataError naming the file and what it lacks."""
    path = source / "meta" / "info.json"
    fix = "give the folder of a LeRobot dataset"
    if not path.is_file():
        raise DataError.of(path, "there is no such file", fix)
    with reading(path, fix, DataError):
        info = json.loads(path.read_bytes())
    if not isinstance(info, dict):
        raise DataError.of(path, f"holds a {type(info).__name__}, not an object", fix)
    version = str(info.get("codebase_version"))
    if not version.startswith(("v2.", "v3.")):
        raise DataError.of(path, f"format {version[:20]!r} is not read here, only v2 and v3", "convert it with LeRobot")
    fps = _typed(info, "fps", int | float, path)
    if not 0 < fps <= 1e6:
        raise DataError.of(path, f"fps is {fps}", "give the rate of its rows")
    features = {
        key: _feature(value, f"{path}, feature {key!r}") for key, value in _typed(info, "features", dict, path).items()
    }
    return Metadata(source, version.startswith("v3."), float(fps), features, info)


def _feature(value: Any, where: str) -> Feature:
    if not isinstance(value, dict):
        raise DataError.of(where, f"is a {type(value).__name__}, not an object", FIX)
    dtype = _typed(value, "dtype", str, where)
    shape, names = value.get("shape"), value.get("names")
    channels = None
    if dtype in ("image", "video") and isinstance(shape, list):
        named = (
            [i for i, name in enumerate(names) if name in ("channel", "channels")] if isinstance(names, list) else []
        )
        if len(shape) == 2 or 1 in shape:
            channels = 1
        elif len(shape) == 3:
            channels = shape[named[0] if named and named[0] < 3 else -1]
    notes = [value.get(key) for key in ("info", "video_info")]
    flags = [
        note.get(key) for note in notes if isinstance(note, dict) for key in ("is_depth_map", "video.is_depth_map")
    ]
    return Feature(dtype, channels if isinstance(channels, int) else None, any(flag is True for flag in flags))


def read_episodes(metadata: Metadata, videos: Sequence[str]) -> list[Place]:
    """Returns the episodes by number, with the places of these video features.

    Raises DataError for files and columns that are missing, an episode that is listed twice, and a number of episodes
    other than info.json has.
    """
    folder = metadata.source / "meta"
    records = _rows_of(folder / "episodes") if metadata.packed else _lines(folder / "episodes.jsonl")
    places: dict[int, Place] = {}
    for where, record in records:
        place = (_place_v3 if metadata.packed else _place_v2)(metadata, videos, record, where)
        if place.number in places:
            raise DataError.of(where, f"episode {place.number} is listed twice", FIX)
        places[place.number] = place
    if not places:
        raise DataError.of(folder, "lists no episodes", FIX)
    total = _whole({"total_episodes": len(places), **metadata.info}, "total_episodes", metadata.path)
    if total != len(places):
        raise DataError.of(folder, f"lists {len(places)} episodes, info.json has total_episodes {total}", FIX)
    return [places[number] for number in sorted(places)]


def _place_v2(metadata: Metadata, videos: Sequence[str], record: dict, where: str) -> Place:
    number = _whole(record, "episode_index", where)
    size = _whole({"chunks_size": 1000, **metadata.info}, "chunks_size", metadata.path)
    if size == 0:
        raise DataError.of(metadata.path, "chunks_size is 0", FIX)
    at = {"episode_chunk": number // size, "episode_index": number}
    found = {key: Video(metadata.file("video_path", {"video_key": key, **at})) for key in videos}
    length = _whole(record, "length", where)
    return Place(number, length, metadata.file("data_path", at), found, _tasks_of(record, where))


def _place_v3(metadata: Metadata, videos: Sequence[str], record: dict, where: str) -> Place:
    found = {}
    for key in videos:
        prefix = f"videos/{key}"
        start, end = (_seconds(record, f"{prefix}/{edge}_timestamp", where) for edge in ("from", "to"))
        if end <= start:
            raise DataError.of(where, f"{prefix} runs from {start} s to {end} s", FIX)
        found[key] = Video(
            metadata.file("video_path", {"video_key": key, **_file_at(record, prefix, where)}), start, end
        )
    data = metadata.file("data_path", _file_at(record, "data", where))
    number, length = _whole(record, "episode_index", where), _whole(record, "length", where)
    return Place(number, length, data, found, _tasks_of(record, where))


def _file_at(record: dict, prefix: str, where: str) -> dict[str, int]:
    return {key: _whole(record, f"{prefix}/{key}", where) for key in ("chunk_index", "file_index")}


def _tasks_of(record: dict, where: str) -> list[str]:
    tasks = record.get("tasks")
    tasks = [] if tasks is None else [tasks] if isinstance(tasks, str) else tasks
    if not isinstance(tasks, list) or not all(isinstance(task, str) for task in tasks):
        raise DataError.of(where, f"tasks are {str(tasks)[:60]}, not a list of texts", FIX)
    return tasks


def read_tasks(metadata: Metadata) -> dict[int, str]:
    """Returns the text of each task by its number; none if there is no such file."""
    path = metadata.source / "meta" / ("tasks.parquet" if metadata.packed else "tasks.jsonl")
    if not path.exists():
        return {}
    tasks: dict[int, str] = {}
    for where, record in _numbered_tasks(path) if metadata.packed else _lines(path):
        number, text = _whole(record, "task_index", where), _typed(record, "task", str, where)
        if tasks.setdefault(number, text) != text:
            raise DataError.of(where, f"task {number} is both {tasks[number]!r} and {text!r}", FIX)
    return tasks


def _numbered_tasks(path: Path) -> Iterator[tuple[str, dict]]:
    """LeRobot writes the texts as the index of a pandas table, which has had several names."""
    table = read_table(path)
    if not table.num_rows:
        return
    with reading(path, FIX, DataError):
        index = (table.schema.pandas_metadata or {}).get("index_columns", [])
    texts = [
        field.name
        for field in table.schema
        if pyarrow.types.is_string(field.type) or pyarrow.types.is_large_string(field.type)
    ]
    known = [name for name in (*index, "__index_level_0__", "task") if name in texts]
    if not known and len(texts) != 1:
        raise DataError.of(path, f"has columns {', '.join(table.column_names)}, none of them 'task'", FIX)
    text = (known or texts)[0]
    for number, row in enumerate(table.to_pylist()):
        yield f"{path}, row {number}", {**row, "task": row[text]}


def _rows_of(folder: Path) -> Iterator[tuple[str, dict]]:
    paths = sorted(folder.rglob("*.parquet"))
    if not paths:
        raise DataError.of(folder, "has no parquet files", FIX)
    for path in paths:
        with reading(path, FIX, DataError):
            columns = [name for name in parquet.read_schema(path).names if not name.startswith("stats/")]
        for number, row in enumerate(read_table(path, columns).to_pylist()):
            yield f"{path}, row {number}", row


def _lines(path: Path) -> Iterator[tuple[str, dict]]:
    with reading(path, FIX, DataError):
        content = path.read_bytes()
    for number, line in enumerate(content.split(b"\n"), start=1):  # JSON may hold other line separators, as U+2028
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        with reading(where, FIX, DataError):
            record = json.loads(line)
        if not isinstance(record, dict):
            raise DataError.of(where, f"holds a {type(record).__name__}, not an object", FIX)
        yield where, record


def read_table(path: Path, columns: Sequence[str] = (), optional: Sequence[str] = (), **options: Any) -> pyarrow.Table:
    """Reads a parquet file: all columns, or those named, of which `optional` may be missing.

    options: of pyarrow, as `filters`.
    """
    if not path.is_file():
        raise DataError.of(path, "there is no such file", FIX)
    with reading(path, FIX, DataError):
        present = parquet.read_schema(path).names
        missing = [name for name in columns if name not in present]
        if missing:
            raise DataError.of(path, f"has no column {missing[0]!r}", f"it has {', '.join(present)}")
        wanted = [*columns, *(name for name in optional if name in present)] or None
        return parquet.read_table(path, columns=wanted, partitioning=None, **options)


def read_rows(place: Place, columns: Sequence[str], optional: Sequence[str] = ()) -> pyarrow.Table:
    """Returns the rows of an episode in the order of the file. Raises DataError if there are not `length` of them."""
    only = [("episode_index", "=", place.number)]
    table = read_table(place.parquet, [*dict.fromkeys([*columns, "episode_index"])], optional, filters=only)
    if table.num_rows != place.length or not place.length:
        where = f"{place.parquet}, episode {place.number}"
        raise DataError.of(where, f"has {table.num_rows} rows, meta says {place.length}", FIX)
    return table


def _typed(record: Mapping[str, Any], key: str, kind: Any, where: os.PathLike | str) -> Any:
    if key not in record:
        raise DataError.of(where, f"has no {key!r}", FIX)
    value = record[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise DataError.of(where, f"{key!r} is {str(value)[:60]!r}, of type {type(value).__name__}", FIX)
    return value


def _whole(record: Mapping[str, Any], key: str, where: os.PathLike | str) -> int:
    value = _typed(record, key, int | float, where)
    if not 0 <= value < 2**31 or value != int(value):
        raise DataError.of(where, f"{key!r} is {value}, not a whole number from 0 to 2147483647", FIX)
    return int(value)


def _seconds(record: Mapping[str, Any], key: str, where: str) -> float:
    value = _typed(record, key, int | float, where)
    if not 0 <= value < math.inf:
        raise DataError.of(where, f"{key!r} is {value}, not a time in seconds", FIX)
    return float(value)
