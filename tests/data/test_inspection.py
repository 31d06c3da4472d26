"""The tools that look at datasets: what they find, print and draw."""

import functools
import json

import fake_rlds
import numpy as np
import pytest

from openvla_jax.data import DataError, DatasetNotFoundError
from openvla_jax.data.__main__ import main
from openvla_jax.data.batches import make_train_iterator
from openvla_jax.data.ingest.stand_ins import write_stand_in
from openvla_jax.data.inspection import validate
from openvla_jax.data.mixture import open_phases
from openvla_jax.data.oxe import DATASETS, MIXTURES
from openvla_jax.data.oxe.schemas import SCHEMAS
from openvla_jax.data.source import open_source
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
    assert set(DATASETS) - {"tabletop"} == set(SCHEMAS)


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
