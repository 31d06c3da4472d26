"""Batches: what is in them, that they repeat and resume exactly, and what stops them."""

import hashlib
import json
import logging
import os
import re
import subprocess
import sys

import fake_rlds
import ml_collections
import numpy as np
import pytest
from conftest import ROOT, golden

from openvla_jax.data import (
    BadActionError,
    BadImageError,
    CorruptRecordError,
    DataError,
    SplitNotFoundError,
    StatisticsError,
    images,
    mixture,
)
from openvla_jax.data.batches import make_eval_batches, make_train_iterator
from openvla_jax.data.memory import estimate
from openvla_jax.data.mixture import open_phases
from openvla_jax.data.oxe import ActionEncoding
from openvla_jax.tokens.actions import ActionTokenizer, normalize_actions
from openvla_jax.tokens.prompts import prompt_ids
from openvla_jax.tokens.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer("tiny")
ACTIONS = ActionTokenizer(TOKENIZER.vocab_size)


def _data(dataset, data_dir, **changes):
    fields = {
        "dataset": dataset,
        "data_dir": str(data_dir),
        "shuffle_buffer": 16,
        "text_length": 48,
        "statistics": None,
        "statistics_dir": None,
        "num_parallel_reads": 2,
        "max_host_ram_gb": None,
        "skip_unlabeled": True,
    }
    return ml_collections.ConfigDict(fields | changes, convert_dict=False)


def _iterator(data, **changes):
    kwargs = {"batch_size": 4, "image_size": 32, "seed": 0}
    return make_train_iterator(data, TOKENIZER, **(kwargs | changes))


@pytest.fixture(scope="module")
def names():
    """Configurations that tests add to the known ones: "fake", and "wide" with 14-dimensional actions."""
    configs = {
        "fake": fake_rlds.config(),
        "wide": fake_rlds.config("wide", action_encoding=ActionEncoding.JOINT_POS_BIMANUAL),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, config in configs.items():
            patch.setitem(mixture.DATASETS, name, config)
        yield configs


@pytest.fixture(scope="module")
def fakes(names, tmp_path_factory):
    """data_dir with "fake" (6 train episodes of 5 frames) and "wide" (3 of 4); instructions differ per episode."""
    data_dir = tmp_path_factory.mktemp("data")
    narrow = [fake_rlds.episode(i, instruction=f"pick up cube {i}") for i in range(7)]
    fake_rlds.write(data_dir, {"train": [narrow[:2], narrow[2:4], narrow[4:6]], "val": [narrow[6:]]})
    wide = [fake_rlds.episode(20 + i, steps=4, action_dim=14, instruction=f"FOLD {i}") for i in range(4)]
    schema = fake_rlds.features(action_dim=14)
    fake_rlds.write(data_dir, {"train": [wide[:1], wide[1:3]], "val": [wide[3:]]}, name="wide", schema=schema)
    return data_dir


def _same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Contents
# ---------------------------------------------------------------------------------------------------------------------


def test_rows_are_the_frames_that_were_written(fakes):
    iterator = _iterator(_data((("fake", 1.0), ("wide", 1.0)), fakes))
    assert iterator.dataset_names == ("fake", "wide")
    assert iterator.num_examples == 35 + 16
    assert iterator.statistics["wide"]["num_transitions"] == 16
    seen = set()
    for _ in range(12):
        batch = next(iterator)
        assert batch.images.shape == (4, 1, 32, 32, 3)
        assert {name: x.dtype.name for name, x in batch._asdict().items() if x is not None} == {
            "images": "uint8", "image_mask": "bool", "tokens": "int32", "target_positions": "int32",
            "target_mask": "bool", "actions": "float32", "action_mask": "bool", "dataset": "int32",
        }  # fmt: skip
        assert (batch.tokens.shape, batch.target_positions.shape) == ((4, 48), (4, 15))
        rows = (batch.images, batch.tokens, batch.target_positions, batch.target_mask, batch.dataset)
        for image, tokens, positions, mask, dataset in zip(*rows, strict=True):
            steps, width = ((5, 7), (4, 14))[dataset]
            level = int(np.median(image))  # the episode and its step are the gray level of the image
            number, t = next((i, t) for i in (*range(6), *range(20, 23)) for t in range(steps) if 7 * i + t == level)
            assert (number >= 20) == dataset
            step = fake_rlds.episode(number, steps=steps, action_dim=width)["steps"][t]
            np.testing.assert_array_equal(image[0], images.resize(step["observation"]["image"], 32))
            instruction = f"FOLD {number - 20}" if dataset else f"pick up cube {number}"
            stats = iterator.statistics[iterator.dataset_names[dataset]]["action"]
            ids = ACTIONS.encode(normalize_actions(step["action"], stats).astype(np.float32))
            expected = [*prompt_ids(TOKENIZER, instruction), *ids, TOKENIZER.eos_token_id]
            assert tokens[: len(expected)].tolist() == expected
            assert (tokens[len(expected) :] == TOKENIZER.pad_token_id).all()
            assert mask.tolist() == [True] * (width + 1) + [False] * (14 - width)
            assert tokens[positions[mask]].tolist() == expected[-width - 1 :]
            assert (positions < 48).all()
            seen.add((number, t))
    assert len(seen) > 15


def test_bridge_batches(shared, tmp_path):
    data = _data("bridge", shared / "data", statistics=str(golden("pipeline/run_dir/dataset_statistics.json")))
    iterator = _iterator(data, batch_size=8, image_size=224)
    assert (iterator.dataset_names, iterator.num_examples) == (("bridge_orig",), 400)
    with np.load(golden("pipeline/bridge.npz")) as file:
        arrays = dict(file)
    found = 0
    known = {
        tuple(ACTIONS.encode(arrays[f"traj{i}/norm_bounds_q99/action"][t])): (i, t) for i in range(5) for t in range(8)
    }
    first = {i: arrays[f"traj{i}/image/resized224"] for i in range(5)}
    for _ in range(50):  # two passes
        batch = next(iterator)
        for row in range(8):
            ids = tuple(batch.tokens[row][batch.target_positions[row]][:-1])
            if ids in known and known[ids][1] == 0:
                found += 1
                difference = batch.images[row, 0].astype(int) - first[known[ids][0]].astype(int)
                assert np.abs(difference).mean() < 2  # decoders differ a little
    assert found >= 8


# ---------------------------------------------------------------------------------------------------------------------
# Repeating and resuming
# ---------------------------------------------------------------------------------------------------------------------


def test_the_same_arguments_give_the_same_batches(fakes):
    data = _data((("fake", 1.0), ("wide", 1.0)), fakes)
    first, again, other = _iterator(data), _iterator(data), _iterator(data, seed=1)
    batches = [next(first) for _ in range(15)]
    assert all(_same(batch, next(again)) for batch in batches)
    assert not all(_same(batch, next(other)) for batch in batches)


def test_processes_see_different_frames(fakes):
    def seen(**kwargs):
        iterator = _iterator(_data("fake", fakes), **kwargs)
        return {int(np.median(image)) for _ in range(20) for image in next(iterator).images}

    parts = [seen(process_index=i, process_count=3) for i in range(3)]
    assert all(len(part) == 10 for part in parts)
    assert len(set.union(*parts)) == 30
    assert set.union(*parts) == seen()


@pytest.mark.parametrize("steps", [0, 23])
def test_a_restored_stream_goes_on_exactly(fakes, tmp_path, steps):
    data = _data((("fake", 1.0), ("wide", 2.0)), fakes, text_length=len(prompt_ids(TOKENIZER, "fold 1")) + 14)
    whole = _iterator(data)
    for _ in range(steps):
        next(whole)
    whole.save(str(tmp_path / "state"))
    truncated = whole.truncated_instructions
    expected = [next(whole) for _ in range(20)]  # over the ends of passes
    resumed = _iterator(data)
    resumed.restore(str(tmp_path / "state"))
    assert resumed.truncated_instructions == truncated
    assert all(_same(batch, next(resumed)) for batch in expected)
    assert resumed.truncated_instructions == whole.truncated_instructions > truncated
    with pytest.raises(RuntimeError, match="restore it before its first batch"):
        resumed.restore(str(tmp_path / "state"))
    prefix = "stream_00000-of-00001"
    files = sorted(path.name for path in (tmp_path / "state").iterdir())
    assert files == [f"{prefix}.data-00000-of-00001", f"{prefix}.index", f"{prefix}.json"]


def test_a_state_of_something_else_is_refused(fakes, tmp_path):
    data = _data("fake", fakes)
    saved = _iterator(data)
    saved.save(str(tmp_path))
    with pytest.raises(DataError, match=r"stream_00000-of-00001.json: seed was 0, now is 1: set it back, or use"):
        _iterator(data, seed=1).restore(str(tmp_path))
    with pytest.raises(DataError, match=r"shuffle_buffer was 16, now is 15"):
        _iterator(_data("fake", fakes, shuffle_buffer=15)).restore(str(tmp_path))
    with pytest.raises(DataError, match=r"stream_00000-of-00002.json is missing: .*data.resume='reseed'"):
        _iterator(data, process_count=2).restore(str(tmp_path))
    (tmp_path / "stream_00000-of-00001.data-00000-of-00001").write_bytes(b"short")
    with pytest.raises(DataError, match=r"stream_00000-of-00001.* cannot be read .*data.resume='reseed'") as caught:
        _iterator(data).restore(str(tmp_path))
    assert "\n" not in str(caught.value)
    (tmp_path / "stream_00000-of-00001.json").unlink()  # what a save that was killed leaves behind
    with pytest.raises(DataError, match="is missing"):
        _iterator(data).restore(str(tmp_path))


_ANOTHER_PROCESS = """
import hashlib, json, sys
from openvla_jax.data.batches import make_train_iterator
from openvla_jax.tokens import load_tokenizer
data, state, index, count = json.loads(sys.argv[1])
iterator = make_train_iterator(
    data, load_tokenizer("tiny"), batch_size=4, image_size=32, seed=0, process_index=index, process_count=count
)
if state:
    iterator.restore(state)
digest = hashlib.sha256()
for _ in range(10):
    for array in filter(lambda x: x is not None, next(iterator)):
        digest.update(array.tobytes())
print(digest.hexdigest())
"""


@pytest.mark.long
def test_other_processes_give_and_resume_the_same_stream(shared, tmp_path):
    """Hash seeds, ids and threads differ between processes; batches, and keys of statistics, do not."""
    data = _data("bridge_orig", shared / "data", statistics_dir=str(tmp_path / "statistics"), shuffle_buffer=50)

    def digest(iterator):
        result = hashlib.sha256()
        for _ in range(10):
            for array in filter(lambda x: x is not None, next(iterator)):
                result.update(array.tobytes())
        return result.hexdigest()

    def elsewhere(state, index, count, hash_seed):
        arguments = json.dumps([data.to_dict(), state, index, count])
        command = [sys.executable, "-c", _ANOTHER_PROCESS, arguments]
        environment = {"PYTHONHASHSEED": hash_seed, "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=True)

    here = _iterator(data, process_index=1, process_count=2)
    first = digest(here)
    here.save(str(tmp_path / "state"))
    second = digest(here)
    assert first != second
    assert elsewhere(None, 1, 2, "1").stdout.strip() == first
    assert elsewhere(str(tmp_path / "state"), 1, 2, "2").stdout.strip() == second
    assert len(list((tmp_path / "statistics").iterdir())) == 1


_SHARES = """
import json, sys
import numpy as np
from openvla_jax.data.batches import make_train_iterator
from openvla_jax.tokens import load_tokenizer
data, index = json.loads(sys.argv[1])
seen = {}
for count in (2, 4):
    if index < count:
        iterator = make_train_iterator(
            data, load_tokenizer("tiny"), batch_size=4, image_size=16, seed=0, process_index=index, process_count=count
        )
        levels = [int(np.median(image)) for _ in range(20) for image in next(iterator).images]
        seen[count] = sorted(set(levels))
print(json.dumps(seen))
"""


@pytest.mark.long
def test_two_and_four_real_processes_share_the_frames(tmp_path):
    """Each sees its part again and again; the parts are disjoint and make up the whole."""
    (tmp_path / "mine.py").write_text(
        "from openvla_jax.data.custom import Columns, describe\n"
        "DATASETS = [describe('mine', cameras={'primary': 'image'}, action=[Columns('action', 0, 7)])]\n"
    )
    episodes = [[fake_rlds.episode(2 * file), fake_rlds.episode(2 * file + 1)] for file in range(4)]  # 7 levels apart
    fake_rlds.write(tmp_path, {"train": episodes, "val": [[fake_rlds.episode(9)]]}, name="mine")
    data = {
        "dataset": "mine", "data_dir": str(tmp_path), "module": str(tmp_path / "mine.py"), "shuffle_buffer": 8,
        "text_length": 64, "num_parallel_reads": 2, "statistics_dir": str(tmp_path / "statistics"),
    }  # fmt: skip
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    commands = [[sys.executable, "-c", _SHARES, json.dumps([data, index])] for index in range(4)]
    options = {"stdout": subprocess.PIPE, "cwd": ROOT, "env": environment}
    processes = [subprocess.Popen(command, **options) for command in commands]
    outputs = [json.loads(process.communicate(timeout=300)[0]) for process in processes]
    everything = sorted(7 * number + t for number in range(8) for t in range(5))
    for count in (2, 4):
        parts = [output[str(count)] for output in outputs[:count]]
        assert sorted(level for part in parts for level in part) == everything
    assert len(list((tmp_path / "statistics").glob("*.json"))) == 1  # none of them got in another's way


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------


def test_evaluation_batches_are_fixed_and_held_out(fakes):
    data = _data((("fake", 1.0), ("wide", 1.0)), fakes)
    statistics = _iterator(data).statistics
    kwargs = {"batch_size": 4, "image_size": 32, "num_batches": 3, "statistics": statistics}
    batches = make_eval_batches(data, TOKENIZER, **kwargs)
    assert len(batches) == 3
    assert all(_same(a, b) for a, b in zip(batches, make_eval_batches(data, TOKENIZER, **kwargs), strict=True))
    levels = {int(np.median(image)) for batch in batches for image in batch.images}
    assert levels <= {*range(42, 47), *range(161, 165)}  # episodes 6 and 23
    assert len(levels) > 4
    fake_rlds.write(fakes / "no_val", {"train": [[fake_rlds.episode(0)]]})
    with pytest.raises(SplitNotFoundError, match=r"split 'train\[95%:\]' has no episodes"):
        make_eval_batches(_data("fake", fakes / "no_val"), TOKENIZER, **kwargs)


# ---------------------------------------------------------------------------------------------------------------------
# Limits
# ---------------------------------------------------------------------------------------------------------------------


def test_long_instructions_are_cut_counted_and_logged_once(fakes, caplog):
    iterator = _iterator(_data("fake", fakes, text_length=len(prompt_ids(TOKENIZER, "pick up cube 0")) + 7))
    with caplog.at_level(logging.WARNING):
        batches = [next(iterator) for _ in range(5)]
    assert iterator.truncated_instructions == 20
    assert caplog.text.count("the instruction is too long and is cut: raise data.text_length") == 1
    for batch in batches:
        assert (batch.tokens[np.arange(4), batch.target_positions[:, -1]] == TOKENIZER.eos_token_id).all()
    assert _iterator(_data("fake", fakes)).truncated_instructions == 0
    with pytest.raises(DataError, match=r"dataset 'fake', episode .*, step \d: text_length 12 cannot hold prompt"):
        next(_iterator(_data("fake", fakes, text_length=12)))


def test_the_buffer_shrinks_to_the_memory_and_to_the_data(fakes, caplog):
    def identity(iterator):
        return iterator.identity["shuffle_buffer"]

    whole = _iterator(_data("fake", fakes, shuffle_buffer=10**6))
    assert identity(whole) == 35  # one epoch
    memory = estimate([phase.mixture for phase in open_phases(_data("fake", fakes))], readers=2)
    frame_bytes = memory.frame_bytes
    fixed = whole.state_bytes - 35 * frame_bytes
    assert 900 < frame_bytes < 1300
    images = 3 * 4 + 16 * os.cpu_count()  # three batches, and a group for each core
    assert fixed == pytest.approx(images * 32 * 32 * 3 + memory.reader_bytes, abs=1)
    assert f"35 frames x {frame_bytes / 1e3:.1f} kB" in whole.summary
    limit = (fixed + 20.5 * frame_bytes) / 1e9
    cut = _iterator(_data("fake", fakes, shuffle_buffer=10**6, max_host_ram_gb=limit))
    assert identity(cut) == 20
    assert cut.state_bytes <= limit * 1e9 < cut.state_bytes + frame_bytes
    assert "shuffle buffer cut from 35 to 20 frames by data.max_host_ram_gb" in caplog.text
    with pytest.raises(DataError, match=r"data.max_host_ram_gb=1e-06 holds not even one batch of 4 frames beside"):
        _iterator(_data("fake", fakes, max_host_ram_gb=1e-6))


# ---------------------------------------------------------------------------------------------------------------------
# Schedules
# ---------------------------------------------------------------------------------------------------------------------

BOTH = (("fake", 1.0), ("wide", 1.0))


@pytest.mark.long
def test_the_mixture_changes_at_the_steps_of_the_schedule(fakes, tmp_path):
    data = _data("fake", fakes, schedule=(("wide", 2), (BOTH, 5)), shuffle_buffer=64)
    whole = _iterator(data)
    assert whole.dataset_names == ("fake", "wide")  # the last mixture's first, all of them always
    assert re.search(r"dataset +to 2 +to 5 +then ", whole.summary)
    assert re.search(r"\nwide +100.00% +\S+% +0.00% ", whole.summary)
    batches = []
    for step in range(1, 9):
        if step in (3, 5):  # in the middle of a phase, and after its first batch
            whole.save(str(tmp_path / str(step - 1)))
        batches.append(next(whole))
    drawn = [set(batch.dataset.tolist()) for batch in batches]
    assert drawn[:2] == [{1}, {1}] and drawn[5:] == [{0}] * 3
    assert set().union(*drawn[2:5]) == {0, 1}
    for done in (2, 4):
        resumed = _iterator(data)
        resumed.restore(str(tmp_path / str(done)))
        assert all(_same(next(resumed), batch) for batch in batches[done:])
    assert set(next(_iterator(data, step=5)).dataset.tolist()) == {0}  # reseeded: the step alone decides
    assert set(next(_iterator(data, step=1)).dataset.tolist()) == {1}


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ((("wide", 5), ("fake", 5)), r"data.schedule ends its mixtures at steps \[5, 5\]: they must rise"),
        (("wide",), r"data.schedule is \('wide',\): give \(mixture, last step\) pairs, as in"),
        ((("wide", 0.5),), r"give \(mixture, last step\) pairs"),
        ((("wider", 5),), r"unknown dataset or mixture 'wider' \(did you mean 'wide'\?\)"),
    ],
)
def test_schedules_that_make_no_sense_are_told(fakes, schedule, message):
    with pytest.raises(ValueError, match=message):
        _iterator(_data("fake", fakes, schedule=schedule))


# ---------------------------------------------------------------------------------------------------------------------
# Bad data
# ---------------------------------------------------------------------------------------------------------------------


def _bad(tmp_path, change, **fields):
    """An iterator over one good and one changed episode, with statistics that do not notice."""
    good = {
        key: [value] * 7
        for key, value in {"mean": 0.0, "std": 1.0, "max": 1.0, "min": -1.0, "q01": -1.0, "q99": 1.0}.items()
    }
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "s.json").write_text(
        json.dumps({"fake": {"action": good, "num_transitions": 10, "num_trajectories": 2}})
    )
    changed = fake_rlds.episode(1)
    change(changed["steps"])
    fake_rlds.write(tmp_path, {"train": [[fake_rlds.episode(0)], [changed]], "val": [[fake_rlds.episode(2)]]})
    return _iterator(_data("fake", tmp_path, statistics=str(tmp_path / "s.json"), shuffle_buffer=4, **fields))


def _exhaust(iterator):
    for _ in range(10):
        next(iterator)


@pytest.mark.parametrize("content", [b"no image at all", b"\xff\xd8\xff\xe0 cut off"])
def test_an_image_that_cannot_be_decoded_is_located(names, tmp_path, content):
    iterator = _bad(tmp_path, lambda steps: steps[3]["observation"].update(image=content))
    message = (
        r"^dataset 'fake', episode fake-train.tfrecord-00001-of-00002#0, step 3: the image of camera 'primary' "
        rf"cannot be decoded \({len(content)} bytes starting b'.*: [^\n]+\): fix it, or set data.bad_images=skip$"
    )
    with pytest.raises(BadImageError, match=message):
        _exhaust(iterator)


def test_broken_images_can_be_skipped_and_are_counted(names, tmp_path, caplog):
    def spoil(steps):
        for step in (1, 2):
            steps[step]["observation"]["image"] = b"no image"

    iterator = _bad(tmp_path / "some", spoil, bad_images="skip")
    _exhaust(iterator)  # 40 frames, and 10 in a pass
    assert 6 <= iterator.skipped_images <= 12
    where = "dataset 'fake', episode fake-train.tfrecord-00001-of-00002#0, step 2: the image cannot be decoded"
    assert where in caplog.text
    iterator.save(str(tmp_path / "state"))
    again = _iterator(_data("fake", tmp_path / "some", statistics=str(tmp_path / "some" / "s.json"), shuffle_buffer=4,
                            bad_images="skip"))  # fmt: skip
    again.restore(str(tmp_path / "state"))
    assert again.skipped_images == iterator.skipped_images
    assert _same(next(again), next(iterator))
    with pytest.raises(DataError, match=r"data.bad_images is 'ignore': stop or skip"):
        _iterator(_data("fake", tmp_path / "some", bad_images="ignore"))


def test_nothing_but_broken_images_stops_all_the_same(names, tmp_path):
    broken = fake_rlds.episode(0)
    for step in broken["steps"]:
        step["observation"]["image"] = b"no image"
    fake_rlds.write(tmp_path, {"train": [[broken]], "val": [[broken]]})
    with pytest.raises(BadImageError, match="cannot be decoded"):
        next(_iterator(_data("fake", tmp_path, bad_images="skip")))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_action_that_is_not_finite_is_located(names, tmp_path, value):
    iterator = _bad(tmp_path, lambda steps: steps[2]["action"].__setitem__(6 if np.isnan(value) else 0, value))
    message = (
        r"^dataset 'fake', episode fake-train.tfrecord-00001-of-00002#0, step 2: action dimension [06] is (nan|inf):"
    )
    with pytest.raises(BadActionError, match=message):
        _exhaust(iterator)


def test_data_without_instructions_are_told(names, tmp_path):
    def silence(steps):
        for step in steps:
            step["language_instruction"] = ""

    iterator = _bad(tmp_path / "half", silence)
    _exhaust(iterator)  # the other episode has instructions
    fake_rlds.write(
        tmp_path / "none", {"train": [[fake_rlds.episode(0, instruction="")]], "val": [[fake_rlds.episode(1)]]}
    )
    with pytest.raises(
        DataError, match=r"dataset 'fake': not one frame of the episodes that this process reads has an"
    ):
        _exhaust(_iterator(_data("fake", tmp_path / "none")))
    with pytest.raises(DataError, match=r"'fake', episode fake-train.*#0, step \d: instruction '' is empty"):
        _exhaust(_iterator(_data("fake", tmp_path / "none", skip_unlabeled=False)))


def test_damaged_files_and_wrong_statistics_are_told(names, tmp_path):
    iterator = _bad(tmp_path, lambda steps: None)
    (path,) = tmp_path.rglob("fake-train*-00001-of-00002")
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CorruptRecordError, match=rf"^dataset 'fake': record file {path} is damaged \(truncated record"):
        _exhaust(iterator)
    content = json.loads((tmp_path / "s.json").read_text())
    content["fake"]["action"]["q01"].pop()
    (tmp_path / "s.json").write_text(json.dumps(content))
    with pytest.raises(StatisticsError, match=r"'fake': action/q01 has 6 dimensions, the actions have 7"):
        _iterator(_data("fake", tmp_path, statistics=str(tmp_path / "s.json")))
    with pytest.raises(DataError, match=r"data.data_dir is not set: name the folder"):
        _iterator(_data("fake", ""))
    with pytest.raises(ValueError, match=r"unknown dataset or mixture 'fakes' \(did you mean 'fake'\?\)"):
        _iterator(_data("fakes", tmp_path))
