"""Files that appear whole, on a disk and in a bucket."""

import pytest
from etils import epath

from openvla_jax.storage import atomic_write


@pytest.mark.parametrize("content", ["naïve\n", b"\x00\xff"])
def test_atomic_write_replaces_the_whole_file(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_text("what was there before, and longer")
    atomic_write(path, content)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_write_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text("before")

    def write_half(self, data):
        self.open("wb").write(data[:2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(epath.Path(path)), "write_bytes", write_half)
    with pytest.raises(OSError, match="No space left"):
        atomic_write(path, "after")
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_write_renames_over_the_file_only_when_all_is_written(tmp_path, monkeypatch):
    path, seen = tmp_path / "a.json", []
    path.write_text("before")
    real = type(epath.Path(path)).replace

    def watch(self, target):
        seen.append((path.read_text(), self.read_text()))
        return real(self, target)

    monkeypatch.setattr(type(epath.Path(path)), "replace", watch)
    atomic_write(str(path), "after")
    assert seen == [("before", "after")] and path.read_text() == "after"


def test_atomic_write_reaches_a_bucket(bucket):
    (bucket / "b").mkdir()
    atomic_write("gs://b/a.json", "text")
    assert (bucket / "b" / "a.json").read_text() == "text"
    assert len(list((bucket / "b").iterdir())) == 1
