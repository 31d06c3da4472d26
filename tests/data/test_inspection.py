"""The tools that look at datasets: what they find, print and draw."""

import functools
import io
import json
import re
from unittest import mock

import fake_rlds
import numpy as np
import pytest
import tensorflow as tf

from openvla_jax.data import BadActionError, DataError, DatasetNotFoundError, faults, inspection, statistics
from openvla_jax.data.__main__ import main
from openvla_jax.data.batches import make_eval_batches, make_train_iterator
from openvla_jax.data.custom import Columns, describe
from openvla_jax.data.ingest.stand_ins import write_stand_in
from openvla_jax.data.inspection import validate
from openvla_jax.data.mixture import open_phases
from openvla_jax.data.oxe import DATASETS, MIXTURES
from openvla_jax.data.oxe.schemas import SCHEMAS
from openvla_jax.data.rlds import dataset_statistics
from openvla_jax.data.source import Source, open_source
from openvla_jax.errors import InputError
from openvla_jax.tokens.tokenizer import load_tokenizer


def _episodes(count=4, steps=6):
    """Good ones: moving, gripper open then closed, warm colours."""
    episodes = []
    for number in range(count):
        episode = fake_rlds.episode(number, steps=steps)
        for t, step in enumerate(episode["steps"]):
            step["action"][6] = float(t < steps / 2)
            step["observation"]["image"] = np.full((24, 24, 3), (120, 100, 80), np.uint8)
        episodes.append(episode)
    return episodes


def _findings(tmp_path, change=lambda steps: None, episodes=None, **config):
    episodes = episodes or _episodes()
    for episode in episodes:
        change(episode["steps"])
    fake_rlds.write(tmp_path, {"train": [episodes], "val": [_episodes(1)]})
    found = validate(open_source(fake_rlds.config(**config), str(tmp_path)), 100)
    return {finding.check: finding for finding in found}


def test_good_data_have_no_findings(tmp_path):
    found = _findings(tmp_path)
    assert {finding.level for finding in found.values()} == {"ok"}
    assert found["episodes"].detail == "4 read, 24 steps"
    assert found["image size"].detail == "24x24 (height x width)"


def _each(steps, **fields):
    for step in steps:
        step.update(fields)


def _colour(steps, colour):
    for step in steps:
        step["observation"]["image"] = np.full((24, 24, 3), colour, np.uint8)


def _action(steps, index, values):
    for t, step in enumerate(steps):
        step["action"][index] = values[t] if isinstance(values, list) else values


def _rest(idle, steps):
    for i in range(6):
        _action(idle, i, 0.0)
    _action(steps, 6, 1.0)


@pytest.mark.parametrize(
    ("change", "check", "level", "detail"),
    [
        (lambda s: _colour(s, (80, 100, 120)), "colour order", "warning", "blue outweighs red in 100%"),
        (lambda s: _action(s, 3, 0.25), "variance", "warning", "dimensions [3] never change"),
        (lambda s: _action(s, 0, [0, np.nan, 0, 0, 0, 0]), "action", "error", "4 values are NaN or infinite"),
        (lambda s: _action(s, 6, [0, 0, 0, 1, 1, 1]), "gripper polarity", "warning", "100% of the episodes start"),
        (lambda s: _action(s, 6, [-1, -1, 1, 1, 1, 1]), "gripper range", "warning", "values from -1 to 1"),
        (lambda s: _each(s[1:3], language_instruction=""), "language", "warning", "33.3% of the frames have none"),
        (lambda s: _each(s, language_instruction=" "), "language", "error", "no frame has an instruction"),
        (lambda s: s[0]["observation"].update(image=b"broken"), "images", "error", "4 frames cannot"),
        (lambda s: _rest(s[2:5], s), "idle frames", "warning", "50.0%"),
        (lambda s: s[0]["observation"].update(image=np.zeros((9, 9, 3), np.uint8)), "image size", "warning", "9x9, 24"),
    ],
    ids=["bgr", "constant", "nan", "polarity", "range", "some-language", "no-language", "broken", "idle", "sizes"],
)  # fmt: skip
def test_what_is_wrong_is_found(tmp_path, change, check, level, detail):
    finding = _findings(tmp_path, change)[check]
    assert (finding.level, detail in finding.detail) == (level, True), finding


@pytest.fixture
def exits(capsys):
    def run(*arguments):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as ended:
            code = ended.code
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def test_the_commands_work_on_a_dataset_of_ones_own(tmp_path, exits):
    module = tmp_path / "my_data.py"
    module.write_text(
        "from openvla_jax.data.custom import Columns, describe\n"
        "DATASETS = [describe('mine', cameras={'primary': 'image'}, action=[Columns('action', 0, 6), "
        "Columns('action', 6, gripper='1 is open')])]\n"
    )
    fake_rlds.write(tmp_path, {"train": [_episodes()], "val": [_episodes(1)]}, name="mine")
    where = (tmp_path, "--module", module)
    code, out, _ = exits("validate", "mine", *where)
    assert (code, "0 errors, 0 warnings" in out) == (0, True)
    code, out, _ = exits("inspect", "mine", *where, "--out", tmp_path / "figures")
    assert code == 0 and "30 steps in 5 episodes" in out
    assert [p.name for p in sorted((tmp_path / "figures").iterdir())] == ["mine_actions.png", "mine_frames.png"]
    code, out, _ = exits("mixture", "mine", *where)
    assert code == 0 and "mine: weight 1, drawn 1.00 times over in an epoch" in out
    code, out, err = exits("inspect", "yours", *where)
    assert (code, err.count("\n")) == (2, 1)
    assert "unknown dataset or mixture 'yours'" in err
    code, _, err = exits("mixture", "mine", "--module", module)
    assert (code, "one of the arguments DIR --data_dir is required" in err) == (2, True)
    code, _, err = exits("mixture", "mine", tmp_path, "--data_dir", tmp_path)
    assert (code, "--data_dir: not allowed with argument DIR" in err) == (2, True)


def test_validation_fails_on_errors_and_if_asked_on_warnings(tmp_path, exits, monkeypatch):
    episodes = _episodes()
    for episode in episodes:
        _action(episode["steps"], 3, 0.25)
    fake_rlds.write(tmp_path, {"train": [episodes], "val": [episodes]})
    monkeypatch.setitem(DATASETS, "fake", fake_rlds.config())
    assert exits("validate", "fake", "--data_dir", tmp_path)[0] == 0
    assert exits("validate", "fake", "--data_dir", tmp_path, "--strict")[0] == 1


@pytest.mark.long
def test_bench_measures_every_stage(exits):
    code, out, _ = exits("bench", "--seconds", "0.2", "--image_size", "32", "--batch_size", "16", "--readers", "2")
    assert code == 0
    for text in (
        "+ decode",
        "+ resize, tokens, batch",
        "+ to the device, augmented",
        "+ normalised",
        "the reference's order",
    ):
        assert text in out
    assert "less CPU on the host" in out and "projected" in out
    assert exits("bench", "bridge_orig")[0] == 2


# ---------------------------------------------------------------------------------------------------------------------
# Stand-ins
# ---------------------------------------------------------------------------------------------------------------------


def test_stand_ins_refuse_what_they_cannot_be(tmp_path):
    write_stand_in("jaco_play", tmp_path, episodes=2, steps=3)
    with pytest.raises(FileExistsError, match=r"jaco_play/0.1.0 exists already"):
        write_stand_in("jaco_play", tmp_path)
    with pytest.raises(DataError, match="'tabletop' has no schema"):
        write_stand_in("tabletop", tmp_path)


def test_every_dataset_of_the_reference_has_a_schema():
    assert set(DATASETS) - {"tabletop", "tabletop_wrist"} == set(SCHEMAS)


@pytest.mark.long
def test_the_papers_mixture_is_drawn_from_stand_ins(tmp_path, exits):
    """All 27 datasets: opened, standardised, normalised, mixed; DROID and Language Table leave at step 2."""
    arguments = ("stand-ins", "oxe_magic_soup_plus", tmp_path, "--episodes", 4, "--steps", 4)
    code, out, _ = exits(*arguments)
    assert (code, len(out.splitlines())) == (0, 27)
    assert exits(*arguments)[1].count("is kept") == 27
    bounds = {"mean": [0.0], "std": [1.0], "min": [-1.0], "max": [1.0], "q01": [-1.0], "q99": [1.0]}
    action = {key: 7 * value for key, value in bounds.items()}
    one = {"action": action, "num_transitions": 16, "num_trajectories": 4}
    (tmp_path / "statistics.json").write_text(json.dumps({name: one for name, _ in MIXTURES["oxe_magic_soup_plus"]}))
    data = {
        "statistics": str(tmp_path / "statistics.json"), "dataset": "oxe_magic_soup_plus_minus",
        "data_dir": str(tmp_path), "schedule": (("oxe_magic_soup_plus", 2),), "shuffle_buffer": 200,
        "text_length": 64, "num_parallel_reads": 2, "bad_images": "skip",
    }  # fmt: skip
    iterator = make_train_iterator(data, load_tokenizer("tiny"), batch_size=512, image_size=16, seed=0)
    names = iterator.dataset_names
    assert set(names[25:]) == {"language_table", "droid"}
    early = np.concatenate([next(iterator).dataset for _ in range(2)])
    late = next(iterator).dataset
    assert set(early) >= set(range(20)) and set(late) <= set(range(25))
    # Drawn as the weights say, within the accuracy of a sample of 512: three standard deviations and a half.
    expected = np.array(iterator.identity["weights"][-1])
    seen = np.bincount(late, minlength=27) / late.size
    assert np.all(np.abs(seen - expected) < 3.5 * np.sqrt(expected * (1 - expected) / late.size) + 1e-9)


def test_a_missing_part_of_a_mixture_is_told_before_any_work(tmp_path):
    write_stand_in("jaco_play", tmp_path, episodes=2, steps=3)
    opened = functools.partial(open_phases, {"dataset": "oxe_magic_soup", "data_dir": str(tmp_path)})
    with pytest.raises(DatasetNotFoundError, match=r"^2[0-9] of 2[0-9] datasets are missing: .*kuka.*; dataset"):
        opened()
    assert not list(tmp_path.rglob("statistics_*"))


# ---------------------------------------------------------------------------------------------------------------------
# As strict as training
# ---------------------------------------------------------------------------------------------------------------------

LATIN = "prends l'épingle".encode("latin-1")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tiny")


SPOILED = pytest.mark.parametrize(
    ("change", "check"),
    [
        (lambda s: _each(s[4:5], language_instruction=LATIN), "language"),
        (lambda s: _each(s[4:5], language_instruction="\u3000"), "language"),
        (lambda s: _each(s[4:5], language_instruction="<image>"), "language"),
        (lambda s: _action(s[4:5], 2, np.inf), "action"),
        (lambda s: s[4]["observation"].update(image=b"broken"), "images"),
    ],
    ids=["latin", "space", "image-token", "infinite", "broken"],
)
SPLITS = pytest.mark.parametrize("split", ["train", "val"])


def _unread(config=None):
    """A source with no files behind it."""
    source = mock.Mock(spec=Source, config=config)
    source.name = "fake"
    return source


def _spoiled(tmp_path, change, split):
    """A dataset "fake" of which one frame is bad."""
    splits = {"train": [_episodes(3)], "val": [_episodes(1)]}
    change(splits[split][0][-1]["steps"])
    fake_rlds.write(tmp_path, splits)


def test_validate_finds_what_training_stops_at(tmp_path):
    """The last episode of each split has a bad text, number and image."""
    splits = {"train": [_episodes(3)], "val": [_episodes(1)]}
    for (episodes,) in splits.values():
        steps = episodes[-1]["steps"]
        _each(steps[4:5], language_instruction=LATIN)
        _action(steps[3:4], 2, np.inf)
        steps[2]["observation"]["image"] = b"broken"
    fake_rlds.write(tmp_path, splits)
    errors = {
        f.check: f.detail for f in validate(open_source(fake_rlds.config(), str(tmp_path)), 100) if f.level == "error"
    }
    assert sorted(errors) == sorted(
        f"{split}{what}" for split in ("", "validation: ") for what in ("action", "language", "images")
    )
    for split, place in (
        ("", "fake-train.tfrecord-00000-of-00001#2"),
        ("validation: ", "fake-val.tfrecord-00000-of-00001#0"),
    ):
        assert f"episode {place}, step 4: instruction b" in errors[f"{split}language"]
        assert f"1 frames cannot be decoded, the first is episode {place}, step 2" in errors[f"{split}images"]
        assert "1 values are NaN or infinite, in dimensions [2]" in errors[f"{split}action"]


@pytest.mark.parametrize("text", [LATIN, "\u3000".encode(), b"<image>"])
def test_validate_reads_text_as_training_does(text):
    episode = {"language": [b"lift it", b" ", text], "episode": [b"file#0"] * 3, "step": np.arange(3)}
    (found,) = inspection._language(_unread(), [episode])
    assert found.level == "error" and "episode file#0, step 2: instruction" in found.detail


@SPOILED
@SPLITS
@pytest.mark.long
def test_training_stops_at_what_validate_calls_an_error(tmp_path, monkeypatch, tokenizer, change, check, split):
    _spoiled(tmp_path, change, split)
    monkeypatch.setitem(DATASETS, "fake", fake_rlds.config())
    data = {"dataset": [("fake", 1.0)], "data_dir": str(tmp_path), "shuffle_buffer": 8, "text_length": 48}
    with pytest.raises(InputError):  # noqa: PT012
        stream = make_train_iterator(data, tokenizer, batch_size=4, image_size=16, seed=0)
        for _ in range(12):
            next(stream)
        options = {"batch_size": 2, "image_size": 16, "num_batches": 16, "statistics": stream.statistics}
        make_eval_batches(data, tokenizer, **options)


@pytest.mark.parametrize("text", [b"b'pick up'", b"['pick up']", b"np.bytes_(b'pick')", b"None", b"3", b"a\0b"])
def test_validate_flags_printed_values_as_suspicious(text):
    episode = {"language": [b"lift it", text, text], "episode": [b"file#0"] * 3, "step": np.arange(3)}
    whole, strange = inspection._language(_unread(), [episode])
    assert whole.level == "ok" and strange.level == "warning"
    assert strange.detail.startswith("1 instructions are strange, the first in episode file#0, step 1: ")


def test_validate_looks_at_every_camera(tmp_path):
    episodes = [fake_rlds.two_cameras(number) for number in range(2)]
    episodes[1]["steps"][3]["observation"]["wrist"] = io.BytesIO(b"broken")
    fake_rlds.write(tmp_path, {"train": [episodes]}, schema=fake_rlds.two_camera_features())
    config = fake_rlds.config(image_keys={"primary": "image", "wrist": "wrist"})
    found = {finding.check: finding for finding in validate(open_source(config, str(tmp_path)), 100)}
    assert found["images"].level == "error" and "step 3, camera 'wrist'" in found["images"].detail


def test_validate_counts_the_episodes_that_are_there(tmp_path):
    folder = fake_rlds.write(tmp_path, {"train": [_episodes(4)], "val": [_episodes(1)]})
    source = open_source(fake_rlds.config(), str(tmp_path))
    assert validate(source, 2)[0].detail == "2 of 4 read, 12 steps"
    (path,) = folder.glob("*train*")
    records = list(tf.data.TFRecordDataset(str(path)).take(3).as_numpy_iterator())
    with tf.io.TFRecordWriter(str(path)) as writer:
        for record in records:
            writer.write(record)
    assert validate(source, 100)[0].detail.startswith("1 episodes fewer than dataset_info.json says")


def test_inspect_draws_a_dollar_as_a_dollar(tmp_path, monkeypatch, exits):
    from matplotlib.axes import Axes

    texts, drawn, original = ["put the $5 bill next to the $10 bill", "pick up the cup labelled $x_{$"], [], Axes.text
    monkeypatch.setattr(Axes, "text", lambda *args, **options: drawn.append(original(*args, **options)) or drawn[-1])
    episodes = _episodes(2)
    for episode, text in zip(episodes, texts, strict=True):
        _each(episode["steps"], language_instruction=text)
    fake_rlds.write(tmp_path, {"train": [episodes]})
    monkeypatch.setitem(DATASETS, "fake", fake_rlds.config())
    assert exits("inspect", "fake", tmp_path, "--out", tmp_path / "figures")[0] == 0
    assert [shown._preprocess_math(shown.get_text()) for shown in drawn] == [(text, False) for text in texts]


def test_inspect_names_the_frame_of_undecodable_text(tmp_path, monkeypatch, exits):
    episodes = _episodes(2)
    _each(episodes[1]["steps"], language_instruction=LATIN)
    fake_rlds.write(tmp_path, {"train": [episodes]})
    monkeypatch.setitem(DATASETS, "fake", fake_rlds.config())
    code, _, err = exits("inspect", "fake", tmp_path, "--out", tmp_path / "figures")
    assert code == 2 and "dataset 'fake', episode fake-train.tfrecord-00000-of-00001#1, step 0: instruction b" in err
    assert "not UTF-8 but Latin-1" in err


# ---------------------------------------------------------------------------------------------------------------------
# Grippers in other units
# ---------------------------------------------------------------------------------------------------------------------

UNIT = [1.0, 0.9, 0.4, 0.0, 0.1, 0.6]  # opening, step by step


def _described(column, where):
    parts = {"state": [Columns("observation/state", 0, 5)], "action": [Columns("action", 0, 6)]}
    parts[where] = [*parts[where], column]
    return describe("mine", cameras={"primary": "image"}, **parts)


@pytest.mark.parametrize(
    ("values", "declared", "level", "detail"),
    [
        (UNIT, {"gripper": "1 is open"}, "ok", "values from 0 to 1, declared as 0 closed, 1 open"),
        ([100 * x for x in UNIT], {"gripper": "1 is open"}, "error", "from 0 to 100, .* outside .*gripper_range"),
        ([20 + 80 * x for x in UNIT], {"gripper": "1 is open"}, "error", "values from 20 to 100, .* outside"),
        ([100 * x for x in UNIT], {"gripper": "0 is open"}, "error", "values from 0 to 100, .* outside"),
        ([850 * x for x in UNIT], {"gripper": "-1 is open, 1 closed"}, "error", "values from 0 to 850, .* outside"),
        ([0.08 * x for x in UNIT], {"gripper": "1 is open"}, "error", "values from 0 to 0.08, .*: never opens; .*0.08"),
        ([0.08 * x for x in UNIT], {"gripper": "0 is open"}, "error", "values from 0 to 0.08, .*: never closes"),
        ([1.0] * 6, {"gripper": "1 is open"}, "error", "never closes"),
        ([0.7 * x for x in UNIT], {"gripper": "1 is open"}, "warning", "never fully open"),
        ([100 * x for x in UNIT], {"gripper_range": (0, 100)}, "ok", "values from 0 to 100, declared as 0 closed"),
        ([102 * x for x in UNIT], {"gripper_range": (0, 100)}, "ok", "values from 0 to 100"),
        ([0.08 * x for x in UNIT], {"gripper_range": (0, 0.08)}, "ok", "0.08 open"),
        ([850 * x for x in UNIT], {"gripper_range": (850, 0)}, "ok", "850 closed, 0 open"),
        ([850 * x for x in UNIT], {"gripper_range": (0, 100)}, "error", "values from 0 to 850, .* outside"),
    ],
)  # fmt: skip
def test_grippers_are_looked_at_in_the_units_of_the_data(values, declared, level, detail):
    column = Columns("action", 6, **declared)
    read = column.read({"action": tf.tile(tf.constant(values, tf.float32)[:, None], [1, 7])}).numpy()
    episode = {"action": np.concatenate([np.zeros((6, 6)), read], axis=1), "episode": b"file#0", "step": np.arange(6)}
    config = _described(column, "action")
    (found,) = inspection._grippers(_unread(config), [episode | {"proprio": np.zeros((6, 5))}])
    assert found.check == "gripper 6" and found.level == level and re.search(detail, found.detail), found
    if "outside" in detail:
        with pytest.raises(BadActionError, match=r"file#0, step \d: action dimension 6, a gripper, is .*gripper_range"):
            statistics.summarize([episode], "mine", config.grippers)
    else:
        result = statistics.summarize([episode], "mine", config.grippers)["action"]
        assert 0 <= result["min"][6] <= result["max"][6] <= 1


@pytest.mark.parametrize(("where", "check"), [("action", "gripper 6"), ("state", "gripper in the state 5")])
def test_validate_and_statistics_refuse_percent_as_a_unit(tmp_path, where, check):
    episodes = _episodes(2)
    for episode in episodes:
        for step, opening in zip(episode["steps"], UNIT, strict=True):
            step["action"][6] = step["observation"]["state"][5] = 100 * opening
    fake_rlds.write(tmp_path, {"train": [episodes]}, name="mine")
    key, dimension = ("action", 6) if where == "action" else ("observation/state", 5)
    source = open_source(_described(Columns(key, dimension, gripper="1 is open"), where), str(tmp_path))
    found = {finding.check: finding for finding in validate(source, 100)}[check]
    assert found.level == "error" and "values from 0 to 100" in found.detail
    with pytest.raises(BadActionError, match=r"dimension \d, a gripper, is 100, and was declared as 0 closed, 1 open"):
        dataset_statistics(source, load_proprio=True)


def test_training_refuses_a_gripper_outside_its_range_with_any_statistics():
    """Statistics from a file are not computed from the data: the rows are looked at too. Two actions a row."""
    rows = {
        "dataset": np.array([0, 1, 1]), "step": np.array([3, 4, 5]), "episode": np.array([b"a", b"b", b"c"], object),
        "action": np.array([[9, 9, 9, 9], [0, 1.02, 0, 1], [0, 0, 0, 0.5]], np.float32),
    }  # fmt: skip
    grippers = [{}, {1: (0.0, 100.0)}]
    faults.check(rows, ["other", "mine"], (), grippers, horizon=2)
    rows["action"][2, 3] = 8.5
    with pytest.raises(BadActionError, match=r"'mine', episode c, step 5: action dimension 1, a gripper, is 850, and"):
        faults.check(rows, ["other", "mine"], (), grippers, horizon=2)
