"""LeRobot datasets, format v2.1 and v3.0 (parquet and video), -> RLDS.

Layout, as published by LeRobot: meta/info.json names fps, features and the path templates. v2.1 has a parquet file and
a video per episode, meta/episodes.jsonl and meta/tasks.jsonl. v3.0 has many episodes per file; meta/episodes/**.parquet
says where each lies (its files, and where in the videos it starts), meta/tasks.parquet maps tasks to numbers. v2.0 is
v2.1 but for statistics, which are not read here.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from openvla_jax.data import DataError
from openvla_jax.data.ingest.demonstrations import Episode, write

_CAMERA = "observation.images."


@dataclass(frozen=True)
class _Place:
    """Where an episode lies: its parquet file, and for each camera the video and the second at which it starts."""

    number: int
    length: int
    parquet: Path
    videos: dict[str, tuple[Path, float]]


def convert(
    source: Path, folder: Path, name: str | None = None, instruction: str | None = None, val_share: float = 0.0
) -> str:
    """Converts a downloaded LeRobot dataset (its folder, with meta/info.json); returns what to do next.

    Every camera is kept, re-encoded as JPEG. Instructions are the tasks of the rows, or the one given. Raises
    DataError for another format, missing files, and frames that do not match the rows; ImportError names the packages
    that are needed.
    """
    _packages()
    info = _info(source)
    packed = info["codebase_version"].startswith("v3")
    places = list(_places_v3(source, info) if packed else _places_v2(source, info))
    tasks = _tasks(source, packed)
    if not places:
        raise DataError(f"{source} has no episodes")
    features = info["features"]
    if "action" not in features:
        raise DataError(f"{source} has no feature 'action', only {', '.join(sorted(features))}")
    cameras = [key for key, feature in features.items() if feature["dtype"] in ("video", "image")]
    if not cameras:
        raise DataError(f"{source} has no camera among its features {', '.join(sorted(features))}")

    def episodes() -> Iterator[Episode]:
        for place in places:
            yield _episode(place, features, cameras, info["fps"], tasks, instruction)

    _, description = write(
        folder, name or source.name.lower().replace("-", "_"), episodes(), len(places), val_share, str(source)
    )
    return f"{len(places)} episodes; look over {description}, then train with data.module={description}"


def _packages() -> None:
    try:
        import av  # noqa: F401
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"reading LeRobot data needs pyarrow and av ({error}): pip install 'openvla_jax[lerobot]'"
        ) from error


def _info(source: Path) -> dict[str, Any]:
    path = source / "meta" / "info.json"
    try:
        info = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}): give the folder of a LeRobot dataset") from error
    version = str(info.get("codebase_version"))
    if not version.startswith(("v2.", "v3.")):
        raise DataError(f"{path}: format {version} is not read here, only v2 and v3: convert it with LeRobot first")
    missing = [key for key in ("fps", "features", "data_path") if key not in info]
    if missing:
        raise DataError(f"{path} lacks {', '.join(missing)}")
    return info


def _video_keys(info: dict[str, Any]) -> list[str]:
    return [key for key, feature in info["features"].items() if feature["dtype"] == "video"]


def _places_v2(source: Path, info: dict[str, Any]) -> Iterator[_Place]:
    for line in _lines(source / "meta" / "episodes.jsonl"):
        number = line["episode_index"]
        at = {"episode_chunk": number // info.get("chunks_size", 1000), "episode_index": number}
        videos = {key: (source / info["video_path"].format(video_key=key, **at), 0.0) for key in _video_keys(info)}
        yield _Place(number, line["length"], source / info["data_path"].format(**at), videos)


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}): is the download complete?") from error


def _places_v3(source: Path, info: dict[str, Any]) -> Iterator[_Place]:
    paths = sorted((source / "meta" / "episodes").rglob("*.parquet"))
    if not paths:
        raise DataError(f"{source / 'meta' / 'episodes'} has no parquet files: is the download complete?")
    for row in (row for path in paths for row in _table(path).to_pylist()):
        at = {"chunk_index": row["data/chunk_index"], "file_index": row["data/file_index"]}
        videos = {}
        for key in _video_keys(info):
            prefix = f"videos/{key}"
            where = {"chunk_index": row[f"{prefix}/chunk_index"], "file_index": row[f"{prefix}/file_index"]}
            path = source / info["video_path"].format(video_key=key, **where)
            videos[key] = (path, float(row[f"{prefix}/from_timestamp"]))
        yield _Place(row["episode_index"], row["length"], source / info["data_path"].format(**at), videos)


def _tasks(source: Path, packed: bool) -> dict[int, str]:
    """The text of each task by its number; none where there is no such file."""
    path = source / "meta" / ("tasks.parquet" if packed else "tasks.jsonl")
    if not path.exists():
        return {}
    if not packed:
        return {line["task_index"]: line["task"] for line in _lines(path)}
    table = _table(path)
    (texts,) = (name for name in table.column_names if name != "task_index")  # a pandas index, of whatever name
    return dict(zip(table["task_index"].to_pylist(), table[texts].to_pylist(), strict=True))


def _table(path: Path, number: int | None = None) -> Any:
    """A parquet file, or its rows of one episode."""
    import pyarrow.parquet as parquet

    try:
        return parquet.read_table(path, filters=None if number is None else [("episode_index", "=", number)])
    except Exception as error:  # Arrow has errors of its own for files that are missing, cut off or something else
        reason = str(error).splitlines()[0]
        raise DataError(f"{path} cannot be read ({reason}): is the download complete?") from error


def _episode(
    place: _Place,
    features: dict[str, Any],
    cameras: list[str],
    fps: float,
    tasks: dict[int, str],
    instruction: str | None,
) -> Episode:
    table = _table(place.parquet, place.number)
    where = f"{place.parquet}, episode {place.number}"
    if table.num_rows != place.length:
        raise DataError(f"{where} has {table.num_rows} rows, meta says {place.length}: is the download complete?")
    numbers = table["task_index"].to_pylist() if "task_index" in table.column_names else [-1] * place.length
    texts = [tasks.get(number) or instruction or "" for number in numbers]
    if not all(texts):
        raise DataError(f"{where}: row {texts.index('')} has no task: give --instruction")
    views = {}
    for key in cameras:
        view = key.removeprefix(_CAMERA).replace(".", "_")
        if key in place.videos:
            views[view] = _video(*place.videos[key], place.length, fps)
        else:
            views[view] = _stored(table.column(key).to_pylist(), where)
    columns = {key: _matrix(table, key, where) for key in ("action", "observation.state") if key in features}
    state = columns.get("observation.state", np.zeros((place.length, 0), np.float32))
    return Episode(views, columns["action"], state, texts)


def _matrix(table: Any, key: str, where: str) -> np.ndarray:
    try:
        values = np.asarray(table.column(key).to_pylist(), np.float32)
    except (KeyError, ValueError) as error:
        raise DataError(f"{where}: {key} is no table of numbers ({str(error).splitlines()[0]})") from error
    return values if values.ndim == 2 else values[:, None]


def _stored(cells: list[dict], where: str) -> Iterator[np.ndarray]:
    """Images that are stored in the parquet file itself."""
    import io

    from PIL import Image, UnidentifiedImageError

    for cell in cells:
        try:
            yield np.asarray(Image.open(io.BytesIO(cell["bytes"])).convert("RGB"))
        except (UnidentifiedImageError, OSError, TypeError, KeyError) as error:
            raise DataError(f"{where}: an image cannot be decoded ({error})") from error


def _video(path: Path, start: float, length: int, fps: float) -> Iterator[np.ndarray]:
    """uint8 [H, W, 3] frames of a video from a second on, `length` of them.

    The frame of row t is the one whose time is nearest to start + t / fps, within half a frame, as LeRobot asks for.
    """
    import av

    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            if start > 0 and stream.time_base:  # to the key frame before it
                container.seek(int(start / stream.time_base), stream=stream, backward=True)
            given = 0
            for frame in container.decode(stream):
                if frame.time is None or frame.time < start + (given - 0.5) / fps:
                    continue
                if frame.time > start + (given + 0.5) / fps:
                    break
                yield frame.to_ndarray(format="rgb24")
                given += 1
                if given == length:
                    return
    except (av.FFmpegError, OSError, IndexError) as error:
        raise DataError(f"video {path} cannot be read ({error}): is the download complete?") from error
    raise DataError(f"video {path} has only {given} of {length} frames from {start:.3f} s on, at {fps} per second")
