"""npz episodes as other tools write them, damaged ones, and what a conversion leaves behind when it fails."""

import io
import json
import re
import resource
import subprocess
import sys
import tracemalloc
import zipfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from conftest import ROOT

from openvla_jax.data import DataError, SplitNotFoundError
from openvla_jax.data.__main__ import main
from openvla_jax.data.batches import make_eval_batches, make_train_iterator
from openvla_jax.data.custom import catalogue
from openvla_jax.data.ingest import demonstrations, npz, writer
from openvla_jax.data.inspection import validate
from openvla_jax.data.mixture import open_phases
from openvla_jax.data.source import episode_ranges, open_source
from openvla_jax.tokens.tokenizer import load_tokenizer

CUP = "pick up the cup"
STEPS = 6


def _arrays(number=0, steps=STEPS, **changes):
    rng = np.random.default_rng(number)
    arrays = {
        "action": rng.normal(size=(steps, 7)).astype(np.float32),
        "image": np.repeat(rng.integers(0, 255, (steps, 1, 1, 1), dtype=np.uint8), 3, 3)
        + np.zeros((16, 16, 1), np.uint8),
        "language_instruction": np.array(CUP),
    } | changes
    return {key: value for key, value in arrays.items() if value is not None}


def _folder(tmp_path, count=3, save=np.savez, **changes):
    folder = tmp_path / "episodes"
    folder.mkdir()
    for number in range(count):
        save(folder / f"e{number:02}.npz", **_arrays(number, **changes))
    return folder


def _source(out, name="mine"):
    return open_source(catalogue(str(out / f"{name}.py"))[0][name], str(out))


def _told(out, name="mine"):
    """The instructions of each stored episode, as bytes."""
    dataset = tfds.builder_from_directory(str(out / name / "1.0.0")).as_dataset(split="all")
    return [[step["language_instruction"].numpy() for step in episode["steps"]] for episode in dataset]


# ---------------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stored", [CUP.encode(), np.array([CUP]), np.array([CUP] * STEPS), np.array([[CUP.encode()]] * STEPS)], ids=repr
)
def test_npz_instruction_is_stored_as_text(tmp_path, stored):
    npz.convert(_folder(tmp_path, language_instruction=stored), tmp_path / "out", "mine")
    assert _told(tmp_path / "out") == [[CUP.encode()] * STEPS] * 3


def test_npz_instructions_that_change_stay_with_their_steps(tmp_path):
    changing = ["reach for the cup"] * 3 + ["lift the cup"] * 3
    npz.convert(_folder(tmp_path, language_instruction=np.array(changing)), tmp_path / "out", "mine")
    assert _told(tmp_path / "out") == [[text.encode() for text in changing]] * 3


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (np.array("None"), r"e00.npz: language_instruction: instruction 'None' looks like a printed Python value"),
        (np.arange(STEPS), r"e00.npz: language_instruction, step 0: the instruction is 0 \(int\), not text"),
        (np.array([CUP] * 2), r"e00.npz: language_instruction: 2 instructions for 6 steps"),
        (np.array(CUP.encode("utf-16")), r"e00.npz: language_instruction: .* is not UTF-8 but UTF-16"),
        (np.array(""), r"e00.npz: language_instruction: instruction '' is empty"),
        (np.array([], "U5"), r"e00.npz has no language_instruction"),
        (np.array([CUP, None], object), r"e00.npz: language_instruction.npy holds Python objects"),
    ],
    ids=repr,
)
def test_npz_instruction_that_is_no_text_is_refused(tmp_path, stored, message):
    with pytest.raises(DataError, match=message):
        npz.convert(_folder(tmp_path, language_instruction=stored), tmp_path / "out", "mine")
    assert not (tmp_path / "out").exists()


def _demonstration(**changes):
    frames = {"primary": [np.full((8, 8, 3), t, np.uint8) for t in range(3)]}
    fields = {"cameras": frames, "action": np.zeros((3, 7), np.float32), "state": np.zeros((3, 0), np.float32)}
    return demonstrations.Episode(**fields | {"instructions": [CUP] * 3} | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"instructions": [CUP, ["lift it"], CUP]}, r"^here: episode 0, step 1: the instruction is \['lift it'\]"),
        ({"instructions": [CUP, "", CUP]}, r"^here: episode 0, step 1: instruction '' is empty"),
        ({"cameras": {"state": []}}, r"^here: camera 'state': use letters"),
        ({"cameras": {"a/b": []}}, r"^here: camera 'a/b': use letters"),
        ({"cameras": {"front": [np.zeros((0, 8, 3), np.uint8)]}}, r"'front': a frame is uint8 \[0, 8, 3\]"),
        ({"cameras": {"front": [np.zeros((1, 65501, 3), np.uint8)]}}, r"JPEG has 65500 pixels a side"),
    ],
)
def test_write_refuses_demonstrations_that_cannot_be_stored(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        demonstrations.write(tmp_path / "out", "mine", [_demonstration(**changes)], 1, 0.0, "here")
    assert not (tmp_path / "out").exists()


def test_write_takes_one_text_for_all_steps(tmp_path):
    demonstrations.write(tmp_path, "mine", [_demonstration(instructions=CUP)], 1, 0.0, "here")
    assert _told(tmp_path) == [[CUP.encode()] * 3]


# ---------------------------------------------------------------------------------------------------------------------
# Damaged files
# ---------------------------------------------------------------------------------------------------------------------


def _spoil(path, change):
    data = bytearray(path.read_bytes())
    path.write_bytes(change(data) or data)


def _with_header(shape, data=b"\0" * 96):
    """A .npy file that declares a shape of float32."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return file.getvalue() + data


def _member(path, name, content):
    """Replaces one array of an npz file."""
    with zipfile.ZipFile(path) as archive:
        held = {info: archive.read(info) for info in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for info, data in (held | {name: content}).items():
            archive.writestr(info, data)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: _spoil(p, lambda data: data[: len(data) // 2]), r"not a zip file"),
        (lambda p: _spoil(p, lambda data: data.__setitem__(slice(120, 170), bytes(50))), r"e01.npz: .*; copy the file"),
        (lambda p: p.write_bytes(b""), r"e01.npz: .*; copy the file again"),
        (lambda p: p.write_bytes(bytes(500)), r"not a zip file"),
        (lambda p: _member(p, "action.npy", b"text"), r"e01.npz: .*magic string"),
        (lambda p: _member(p, "action.npy", _with_header((10**12, 7))), r"declares 28,000,000,000,000 bytes"),
        (lambda p: _member(p, "action.npy", _with_header((-2, -12))), r"action.npy declares"),
        (lambda p: _member(p, "action.npy", _with_header((10**15, 0), b"")), r"action has shape \[10+, 0\]"),
        (lambda p: np.savez(p, **_arrays(action=np.array([["1"] * 7] * STEPS))), r"action is <U1, not numbers"),
        (lambda p: np.savez(p, **_arrays(image_primary=_arrays()["image"])), r"camera 'primary' twice"),
        (lambda p: p.unlink() or p.mkdir(), r"e01.npz: cannot be read: Is a directory"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_that_is_damaged_is_named(tmp_path, capsys, spoil, message, save):
    folder = _folder(tmp_path, save=save)
    spoil(folder / "e01.npz")
    with pytest.raises(SystemExit, match="2"):
        main(["from-npz", str(folder), str(tmp_path / "out"), "--name", "mine"])
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line) and "e01.npz" in line
    assert not (tmp_path / "out").exists()


def test_npz_arrays_that_are_read_whole_have_a_limit(tmp_path, monkeypatch):
    folder = _folder(tmp_path, image=np.asfortranarray(_arrays()["image"]))
    assert list(npz.read_episode(folder / "e00.npz").cameras["primary"])[2].shape == (16, 16, 3)
    monkeypatch.setattr(npz, "MAX_BYTES", 1000)
    with pytest.raises(DataError, match=r"image.npy has shape \[6, 16, 16, 3\] in uint8, more than .* C order"):
        list(npz.read_episode(folder / "e00.npz").cameras["primary"])


# ---------------------------------------------------------------------------------------------------------------------
# The disk and memory
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [300, 20_000])
def test_conversion_to_a_full_disk_leaves_nothing(tmp_path, capsys, size):
    """A limit on the size of files stands for the disk: writes fail in the same calls."""
    folder = _folder(tmp_path, image=np.random.default_rng(0).integers(0, 255, (STEPS, 64, 64, 3), dtype=np.uint8))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        with pytest.raises(SystemExit, match="2"):
            main(["from-npz", str(folder), str(tmp_path / "new" / "out"), "--name", "mine"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (line,) = capsys.readouterr().err.splitlines()
    assert "mine/1.0.0: cannot be written: File too large; free space" in line
    assert not (tmp_path / "new").exists()


def test_conversion_removes_the_dataset_if_its_description_cannot_be_written(tmp_path, monkeypatch):
    def fail(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(demonstrations, "atomic_write", fail)
    (tmp_path / "out" / "other").mkdir(parents=True)
    with pytest.raises(DataError, match=r"mine.py: cannot be written: No space left on device"):
        npz.convert(_folder(tmp_path), tmp_path / "out", "mine")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["other"]  # what was there before stays


def test_conversion_into_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "out").write_text("")
    with pytest.raises(SystemExit, match="2"):
        main(["from-npz", str(_folder(tmp_path)), str(tmp_path / "out"), "--name", "mine"])
    assert "cannot be written: Not a directory" in capsys.readouterr().err


def test_all_or_nothing_keeps_what_is_there(tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(FileExistsError), writer.all_or_nothing(tmp_path / "mine"):
        pass
    assert (tmp_path / "mine").is_dir()


def test_long_episode_is_refused_while_it_is_read(tmp_path, monkeypatch):
    """Its noisy frames take 7 kB each as JPEG: 100 kB are exceeded long before the end."""
    drawn = []

    def frames():
        for t in range(100):
            drawn.append(t)
            yield np.random.default_rng(t).integers(0, 255, (64, 64, 3), dtype=np.uint8)

    long = {"action": np.zeros((100, 7), np.float32), "state": np.zeros((100, 0), np.float32), "instructions": CUP}
    monkeypatch.setattr(writer, "MAX_EPISODE_BYTES", 100_000)
    episodes = [_demonstration(), _demonstration(cameras={"primary": frames()}, **long)]
    message = r"^here: episode 1 takes 0.000\d+ GB in 100 steps.* at most 1\d steps"
    with pytest.raises(DataError, match=message) as caught:
        demonstrations.write(tmp_path / "out", "mine", episodes, 2, 0.0, "here")
    assert len(drawn) < 20 and not (tmp_path / "out").exists()
    fits = int(re.search(r"at most (\d+) steps", str(caught.value))[1])
    short = {key: value if key == "instructions" else value[:fits] for key, value in long.items()}
    kept = _demonstration(cameras={"primary": list(frames())[:fits]}, **short)
    demonstrations.write(tmp_path, "mine", [kept], 1, 0.0, "here")


_FEATURES = {
    "steps": tfds.features.Dataset(
        {"data": tfds.features.Text(), "number": tfds.features.Tensor(shape=(3,), dtype=np.float32)}
    )
}


def _example(size):
    return {"steps": [{"data": "a" * size, "number": np.zeros(3, np.float32)}]}


def test_writer_refuses_an_episode_that_no_record_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "MAX_EPISODE_BYTES", 1000)
    episodes = {"train": [_example(10), _example(2000)]}
    with pytest.raises(DataError, match=r"^dataset 'mine', split 'train', episode 1 takes .* at most 0 steps"):
        writer.write_dataset(tmp_path / "mine" / "1.0.0", _FEATURES, episodes, description="")
    assert not list(tmp_path.iterdir())


def test_writer_holds_a_bounded_amount(tmp_path, monkeypatch):
    """40 episodes of 1 MB, a quarter of them held out, with 4 MB to be held."""
    monkeypatch.setattr(writer, "HELD_BYTES", 4 * 10**6)
    pairs = (("train" if i % 4 else "val", _example(10**6)) for i in range(40))
    tracemalloc.start()
    directory = writer.write_interleaved(
        tmp_path / "mine" / "1.0.0", _FEATURES, ["train", "val"], pairs, description="", episodes_per_file=8
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < (4 + 5 + 1) * 10**6
    assert {k: v.num_examples for k, v in tfds.builder_from_directory(directory).info.splits.items()} == {
        "train": 30, "val": 10,
    }  # fmt: skip


_PEAK = """
import io, re, sys
from pathlib import Path
import numpy as np
import tensorflow_datasets as tfds
from openvla_jax.data.ingest import writer

features = {"steps": tfds.features.Dataset({"image": tfds.features.Image(shape=(None, None, 3)), **writer.FLAGS})}
frame, length = bytes(100_000), 2000
episode = lambda: {"steps": [{"image": io.BytesIO(frame + b"."), **writer.flags(t, length)} for t in range(length)]}
small = {"steps": [{"image": io.BytesIO(frame), **writer.flags(0, 1)}]}
writer.write_dataset(Path(sys.argv[1]) / "small" / "1.0.0", features, {"train": [small]}, description="")
# Not ru_maxrss, which a child process inherits from the one that forked it.
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
before = peak()
pairs = (episode() for _ in range(3))
writer.write_dataset(Path(sys.argv[1]) / "mine" / "1.0.0", features, {"train": pairs}, description="")
print((peak() - before) / (length * len(frame)))
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_writer_needs_six_times_the_longest_episode(tmp_path):
    """Three episodes of 200 MB, of which two are held at once."""
    run = subprocess.run(
        [sys.executable, "-c", _PEAK, str(tmp_path)], capture_output=True, text=True, check=True, timeout=300, cwd=ROOT
    )
    held = writer.HELD_BYTES / 200e6
    assert 2 < float(run.stdout) < 6 + held


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"data": ["a"], "number": np.zeros(3)}, r"steps/0/data is list \['a'\], expected Text"),
        ({"data": "a", "number": np.zeros(4)}, r"steps/0/number is ndarray float64 of shape \(4,\), expected Tensor\("),
        ({"data": "a"}, r"steps/0 has no 'number'"),
        ({"data": "a", "number": np.zeros(3), "more": 1}, r"steps/0 has 'more', which the features lack"),
    ],
)  # fmt: skip
def test_writer_names_the_feature_that_does_not_fit(tmp_path, step, message):
    episodes = {"train": [_example(1), {"steps": [step]}]}
    with pytest.raises(
        DataError, match=rf"'mine', split 'train', episode 1 does not fit the features: {message}"
    ) as caught:
        writer.write_dataset(tmp_path / "mine" / "1.0.0", _FEATURES, episodes, description="")
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# Few episodes
# ---------------------------------------------------------------------------------------------------------------------


def _few(tmp_path, count):
    npz.convert(_folder(tmp_path, count), tmp_path / "out", "mine")
    module = str(tmp_path / "out" / "mine.py")
    return {
        "dataset": "mine",
        "data_dir": str(tmp_path / "out"),
        "module": module,
        "shuffle_buffer": 8,
        "text_length": 48,
    }


COUNTS = [(1, 0), (2, 0), (9, 0), (19, 1), (20, 1)]


@pytest.mark.parametrize(
    ("count", "held_out"), [pytest.param(*pair, marks=[pytest.mark.long] * (pair[0] in (2, 19))) for pair in COUNTS]
)
def test_few_episodes_are_validated_with_advice(tmp_path, count, held_out):
    mixture = open_phases(_few(tmp_path, count))[-1].mixture
    assert mixture.datasets_with_split("train") == [0]
    found = {finding.check: finding for finding in validate(_source(tmp_path / "out"), 50)}
    if held_out:
        assert mixture.datasets_with_split("val") == [0]
        assert found["validation"].level == "ok" and "1 of 1 held out" in found["validation"].detail
        return
    assert found["validation"].level == "warning" and "--val_share" in found["validation"].detail
    with pytest.raises(
        SplitNotFoundError, match=rf"5% of {count} episodes are none; set train.eval_every=0 .*--val_share"
    ):
        mixture.datasets_with_split("val")


@pytest.mark.parametrize(("count", "held_out"), COUNTS)
@pytest.mark.long
def test_few_episodes_are_trained_on(tmp_path, count, held_out):
    data, sizes = _few(tmp_path, count), {"batch_size": 2, "image_size": 16}
    tokenizer = load_tokenizer("tiny")
    stream = make_train_iterator(data, tokenizer, seed=0, **sizes)
    assert next(stream).tokens.shape == (2, 48)
    options = {"num_batches": 1, "statistics": stream.statistics, **sizes}
    if held_out:
        assert len(make_eval_batches(data, tokenizer, **options)) == 1
        return
    with pytest.raises(SplitNotFoundError, match=r"set train.eval_every=0"):
        make_eval_batches(data, tokenizer, **options)


def test_val_share_of_two_episodes_holds_one_out(tmp_path):
    npz.convert(_folder(tmp_path, 2), tmp_path / "out", "mine", val_share=0.1)
    source = _source(tmp_path / "out")
    assert source.splits == {"train": 1, "val": 1} and len(episode_ranges(source, "val")) == 1
    with pytest.raises(DataError, match=r"0.5 of 1 episodes for validation leaves none to train on: lower --val_share"):
        demonstrations.write(tmp_path / "one", "mine", [_demonstration()], 1, 0.5, "here")


def test_inspect_works_on_one_episode(tmp_path, capsys):
    out = tmp_path / "out"
    npz.convert(_folder(tmp_path, 1), out, "mine")
    assert main(["inspect", "mine", str(out), "--module", str(out / "mine.py")]) == 0
    assert "used {'train': 1, 'val': 0}" in capsys.readouterr().out


def test_description_says_where_the_last_column_goes(tmp_path):
    percent = np.linspace(0, 100, STEPS, dtype=np.float32)[:, None] * np.ones(7, np.float32)
    npz.convert(_folder(tmp_path, action=percent), tmp_path / "out", "mine")
    assert "# Column 6 goes from 0 to 100." in (tmp_path / "out" / "mine.py").read_text()
    assert json.loads((tmp_path / "out" / "mine" / "1.0.0" / "dataset_info.json").read_text())["name"] == "mine"
