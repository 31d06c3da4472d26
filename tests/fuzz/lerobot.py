"""The JSON metadata of LeRobot datasets, format v2."""

import functools
import shutil
import tempfile
from pathlib import Path

from openvla_jax.data.ingest.lerobot_meta import read_episodes, read_metadata, read_tasks
from tests.fuzz.harness import Target

_META = Path(__file__).parents[1] / "data" / "lerobot_v2.1" / "meta"


@functools.cache
def _folder(name: str) -> tempfile.TemporaryDirectory:
    folder = tempfile.TemporaryDirectory()
    shutil.copytree(_META, Path(folder.name) / "meta")
    return folder


def _parse(name: str, data: bytes) -> None:
    """Reads all metadata of a dataset; `data` is the content of one file."""
    source = Path(_folder(name).name)
    (source / "meta" / name).write_bytes(data)
    metadata = read_metadata(source)
    read_tasks(metadata)
    read_episodes(metadata, [key for key, feature in metadata.features.items() if feature.dtype == "video"])


def _target(name: str, tokens: tuple[bytes, ...]) -> Target:
    values = (b"null", b"NaN", b"1e999", b"-1", b"true", b"[", b"{", b'"', b",", b"\xe2\x80\xa8", b"9" * 30)
    return Target(
        name=f"lerobot_{Path(name).stem}",
        seeds=lambda: [(_META / name).read_bytes()],
        parse=functools.partial(_parse, name),
        tokens=(*values, *tokens),
    )


TARGETS = {
    target.name: target
    for target in (
        _target(
            "info.json", (b'"dtype"', b'"video"', b'"shape"', b"{video_key:99d}", b"{a}", b"..", b'"chunks_size": 0,')
        ),
        _target("episodes.jsonl", (b'"length"', b'"episode_index"', b'"tasks"', b"\n{}\n")),
        _target("tasks.jsonl", (b'"task_index"', b'"task"', b"\n{}\n")),
    )
}
