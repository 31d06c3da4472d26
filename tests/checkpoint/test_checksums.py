"""Checksums: every file of a checkpoint has one, damage is found and named, old checkpoints say that they have none."""

import asyncio
import hashlib
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from etils import epath
from orbax.checkpoint import v1 as ocp

from openvla_jax import convert_weights
from openvla_jax.checkpoint import checksums
from openvla_jax.checkpoint.contract import CheckpointError
from openvla_jax.checkpoint.load import load_model
from openvla_jax.checkpoint.reading import Files, check_files, open_checkpoint, reading_item, stored_params
from openvla_jax.convert import verify_checksums
from openvla_jax.convert.orbax_io import OrbaxReader, OrbaxWriter
from openvla_jax.errors import InputError

MARKERS = {"_CHECKPOINT_METADATA", "orbax.checkpoint", "commit_success.txt", "checksums.json"}
V1 = ROOT / "tests" / "data" / "checkpoint_v1" / "run" / "checkpoints" / "4"
TREE = {"a": np.arange(3000, dtype=np.float32).reshape(30, 100), "b": {"c": np.ones(5, np.float32)}}


def by_orbax(path):
    """As runs are saved."""
    items = {"params": {"a": jnp.asarray(TREE["a"]), "b": {"c": jnp.ones(5)}}, "contract": Files(contract)}
    with checksums.noting_context():
        ocp.save_checkpointables(path, checksums.noted(items))


def by_import(path):
    """As conversions are."""
    path.mkdir()
    writer = OrbaxWriter(path)
    for leaf, x in (("params/a", TREE["a"]), ("params/b/c", TREE["b"]["c"])):
        writer.create(leaf, x.shape, x.dtype)
        writer.write(leaf, None, x)
    (path / "contract").mkdir()
    contract(epath.Path(path / "contract"))
    writer.finish()


def contract(directory):
    for name in ("config.json", "dataset_statistics.json"):
        (directory / name).write_text('{"format": 2}')


@pytest.fixture(scope="module", params=[by_orbax, by_import])
def saved(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("checksums") / "checkpoint"
    request.param(path)
    return path


def files_of(path):
    return sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())


def test_checksums_cover_every_file_but_the_markers(saved):
    noted = json.loads((saved / "checksums.json").read_text())
    assert noted["processes"] == 1
    assert sorted(noted["files"]) == [name for name in files_of(saved) if name not in MARKERS]
    for name, entry in noted["files"].items():
        content = (saved / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert checksums.verify(saved) == (len(noted["files"]), sum(e["bytes"] for e in noted["files"].values()))


def test_checkpoint_with_checksums_is_one_that_orbax_reads_alone(saved):
    loaded = ocp.load_checkpointables(saved, {"params": None})["params"]
    np.testing.assert_array_equal(loaded["a"], TREE["a"])
    handlers = json.loads((saved / "_CHECKPOINT_METADATA").read_text())["item_handlers"]
    assert handlers["params"].endswith("pytree_handler.PyTreeHandler")


def test_verify_names_the_file_with_a_flipped_bit(saved, tmp_path):
    for index, name in enumerate(name for name in files_of(saved) if name not in MARKERS):
        copy = tmp_path / str(index)
        shutil.copytree(saved, copy)
        content = bytearray((copy / name).read_bytes())
        content[len(content) // 2] ^= 1
        (copy / name).write_bytes(content)
        with pytest.raises(CheckpointError, match="its bytes are not those that were written") as caught:
            checksums.verify(copy)
        assert str(copy / name) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["missing", "cut", "empty", "longer"])
def test_damaged_file_is_named_before_arrays_are_read(saved, tmp_path, damage):
    for index, name in enumerate(name for name in files_of(saved) if name.startswith("params/")):
        copy = tmp_path / str(index)
        shutil.copytree(saved, copy)
        content = (copy / name).read_bytes()
        if damage == "missing":
            (copy / name).unlink()
        else:
            kept = {"cut": content[: len(content) // 2], "empty": b"", "longer": content + b"x"}
            (copy / name).write_bytes(kept[damage])
        wanted = "is missing" if damage == "missing" else "that were written"
        for door in (stored_params, lambda path: OrbaxReader(path, ("params",)), checksums.verify):
            with pytest.raises(CheckpointError, match=wanted) as caught:
                door(copy)
            assert str(copy / name) in str(caught.value) and "\n" not in str(caught.value)
        check_files(copy, "contract")  # the other item is whole


def test_reading_that_fails_names_the_file_whose_bytes_changed(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "copy")
    name = max((n for n in files_of(saved) if n.startswith("params/")), key=lambda n: (saved / n).stat().st_size)
    content = bytearray((saved / name).read_bytes())
    content[10] ^= 0xFF
    (tmp_path / "copy" / name).write_bytes(content)
    with pytest.raises(CheckpointError, match="its bytes are not those") as caught, reading_item(tmp_path / "copy"):
        raise KeyError("Orbax's own error, of 190 lines\n" * 190)
    assert str(tmp_path / "copy" / name) in str(caught.value) and "\n" not in str(caught.value)


def test_reading_item_leaves_memory_that_runs_out_alone(saved):
    for error in (MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: out of memory")):
        with pytest.raises(type(error)), reading_item(saved):
            raise error


def test_checksums_of_several_processes_are_read_together(tmp_path):
    """Two processes write into one item; the second one's file alone would look complete without the first."""
    (tmp_path / "params" / "ocdbt.process_1" / "d").mkdir(parents=True)
    (tmp_path / "params" / "ocdbt.process_1" / "d" / "x").write_bytes(b"second")
    (tmp_path / "params" / "manifest.ocdbt").write_bytes(b"first")
    params = epath.Path(tmp_path / "params")
    for process in (0, 1):
        checksums.write(params.parent, checksums.digest_folder(params, process), process, 2)
    first, second = (
        json.loads((tmp_path / name).read_text())["files"] for name in ("checksums.json", "checksums.1.json")
    )
    assert (list(first), list(second)) == (["params/manifest.ocdbt"], ["params/ocdbt.process_1/d/x"])
    assert checksums.verify(tmp_path) == (2, 11)
    (tmp_path / "checksums.1.json").unlink()
    with pytest.raises(CheckpointError, match=r"checksums\.1\.json: is missing"):
        checksums.verify(tmp_path)


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"{}", b'{"processes": 1}', b'{"processes": 1, "files": {"a": {"bytes": "x"}}}']
)
def test_damaged_checksums_are_named(saved, tmp_path, text):
    shutil.copytree(saved, tmp_path / "copy")
    (tmp_path / "copy" / "checksums.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=r"checksums\.json: ") as caught:
        checksums.verify(tmp_path / "copy")
    assert "\n" not in str(caught.value)


def test_save_without_all_its_items_leaves_no_checkpoint(tmp_path):
    """Checksums that cannot be written fail the save: they come before the marker."""

    def fail(directory):
        raise OSError("disk")

    with pytest.raises(Exception, match="disk"), checksums.noting_context():
        ocp.save_checkpointables(tmp_path / "bad", checksums.noted({"params": TREE, "contract": Files(fail)}))
    assert not (tmp_path / "bad").exists()


def test_note_is_written_by_the_item_that_is_complete_last(tmp_path):
    note, folders = checksums.Note(2), [tmp_path / "params", tmp_path / "contract"]

    class Directory:
        def __init__(self, path):
            self.path = path

        async def await_creation(self):
            return epath.Path(self.path)

    async def take(folder):
        await note.take(asyncio.sleep(0), Directory(folder))

    for folder in folders:
        folder.mkdir()
        (folder / "x").write_text(folder.name)
    asyncio.run(take(folders[0]))
    assert not (tmp_path / "checksums.json").exists()
    asyncio.run(take(folders[1]))
    assert checksums.verify(tmp_path) == (2, 14)


def test_old_checkpoint_says_that_it_has_no_checksums(capsys):
    with pytest.raises(CheckpointError, match="no checksums are stored with it"):
        verify_checksums(V1)
    with pytest.raises(CheckpointError, match="no checksums are stored with it"):
        load_model(V1, verify=True)
    with pytest.raises(SystemExit) as ended:
        convert_weights.main(["verify", str(V1)])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "no checksums are stored with it; save or import it again" in line


def test_verify_command_says_how_much_it_read(saved, capsys):
    assert convert_weights.main(["verify", str(saved)]) == 0
    assert "are as they were written (" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["_CHECKPOINT_METADATA", "contract/config.json", "contract/dataset_statistics.json"])
def test_open_checkpoint_names_what_is_missing(saved, tmp_path, name):
    for place in (tmp_path / "import", tmp_path / "run" / "checkpoints" / "4"):
        shutil.copytree(saved, place)
        (place / name).unlink()
        given = tmp_path / place.relative_to(tmp_path).parts[0]
        with pytest.raises(CheckpointError, match=f"{place / name}: is missing") as caught:
            open_checkpoint(given)
        assert "copy or save it again" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("params/_METADATA", "is not JSON"),
        ("params/_sharding", "is not JSON"),
        ("params/array_metadatas/process_0", "is not JSON"),
        ("params/manifest.ocdbt", "is empty"),
    ],
)
def test_damage_of_a_checkpoint_without_checksums_is_named(tmp_path, name, message):
    shutil.copytree(V1, tmp_path / "copy")
    content = (V1 / name).read_bytes()
    (tmp_path / "copy" / name).write_bytes(b"" if message == "is empty" else content[: len(content) // 2])
    with pytest.raises(InputError, match=f"{name}: {message}") as caught:
        load_model(tmp_path / "copy")
    assert "\n" not in str(caught.value)
