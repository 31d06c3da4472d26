"""Datasets that users describe in a file of their own."""

import fake_rlds
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from openvla_jax.data import DataError
from openvla_jax.data.batches import make_train_iterator
from openvla_jax.data.custom import GRIPPERS, Columns, catalogue, describe
from openvla_jax.data.ingest.writer import FLAGS, flags, write_dataset
from openvla_jax.data.rlds import make_dataset
from openvla_jax.data.source import open_source
from openvla_jax.tokens.actions import ActionTokenizer
from openvla_jax.tokens.tokenizer import load_tokenizer

FILE = """
from openvla_jax.data.custom import Columns, describe

def louder(trajectory):
    trajectory["action"] = [2, 2, 2, 2, 2, 2, 1] * trajectory["action"]
    return trajectory

DATASETS = [
    describe(
        "mine",
        cameras={"primary": "image"},
        state=[Columns("observation/state", 0, 3)],
        action=[Columns("action", 1, 4), Columns("action", 0, absolute=True, normalize=False),
                Columns("action", 6, gripper="-1 is open, 1 closed")],
        transform=louder,
    ),
]
MIXTURES = {"ours": [("mine", 2.0)]}
"""


@pytest.fixture
def mine(tmp_path):
    """A folder with the dataset "mine" and the file that describes it."""
    (tmp_path / "my_data.py").write_text(FILE)
    fake_rlds.write(tmp_path, {"train": [[fake_rlds.episode(i) for i in range(3)]]}, name="mine")
    return tmp_path


def test_a_described_dataset_is_read_as_described(mine):
    configs, mixtures = catalogue(str(mine / "my_data.py"))
    config = configs["mine"]
    assert mixtures["ours"] == [("mine", 2.0)] and "bridge_orig" in configs
    assert config.absolute_action_mask == (False, False, False, True, True)
    assert config.action_normalization_mask == (True, True, True, False, False)
    bounds = {"mean": [0.0], "std": [1.0], "min": [-2.0], "max": [2.0], "q01": [-2.0], "q99": [2.0]}
    statistics = {
        part: {key: value * n for key, value in bounds.items()}
        for part, n in (("action", 5), ("proprio", 3))
    } | {"num_transitions": 15, "num_trajectories": 3}  # fmt: skip
    read = next(iter(make_dataset(config, str(mine), statistics=statistics, split="all")))
    steps = fake_rlds.episode(0)["steps"]
    raw = np.stack([step["action"] for step in steps])
    expected = np.concatenate([raw[:, 1:4], 2 * raw[:, :1], (1 - raw[:, 6:]) / 2], axis=1)
    np.testing.assert_allclose(read["action"], expected, atol=1e-6)
    state = np.stack([step["observation"]["state"][:3] for step in steps])
    np.testing.assert_allclose(read["observation"]["proprio"], np.clip(state / 2, -1, 1), atol=1e-6)
    assert read["task"]["language_instruction"].numpy().tolist() == [b"pick up the cup"] * 5


def test_a_described_dataset_is_trained_on_by_its_mixture(mine):
    data = {
        "dataset": "ours", "data_dir": str(mine), "module": str(mine / "my_data.py"), "shuffle_buffer": 20,
        "text_length": 48,
    }  # fmt: skip
    tokenizer = load_tokenizer("tiny")
    iterator = make_train_iterator(data, tokenizer, batch_size=4, image_size=24, seed=0)
    batch = next(iterator)
    assert batch.target_mask.sum(axis=1).tolist() == [6] * 4
    ids = np.take_along_axis(batch.tokens, batch.target_positions, axis=1)[:, :5]
    actions = ActionTokenizer(tokenizer.vocab_size).decode(ids)
    assert np.all(np.abs(actions) <= 1) and np.unique(actions).size > 5


FLAT = """
from openvla_jax.data.custom import Columns, describe

def nested(trajectory):
    trajectory["observation"] = {"image": trajectory["frames"]}
    return trajectory

DATASETS = [describe("flat", cameras={"primary": "image"}, action=[Columns("action", 0, 7)], transform=nested)]
"""


def test_steps_need_no_observation_of_their_own(tmp_path):
    """The transform makes it up."""
    (tmp_path / "flat.py").write_text(FLAT)
    steps = [
        flags(t, 5) | {"frames": step["observation"]["image"], "action": step["action"], "language_instruction": "lift"}
        for t, step in enumerate(fake_rlds.episode(3)["steps"])
    ]
    step = {
        "frames": tfds.features.Image(shape=(24, 24, 3), encoding_format="png"),
        "action": tfds.features.Tensor(shape=(7,), dtype=np.float32),
        "language_instruction": tfds.features.Text(),
        **FLAGS,
    }
    schema = {"steps": tfds.features.Dataset(step)}
    write_dataset(tmp_path / "flat" / "1.0.0", schema, {"train": [{"steps": steps}]}, description="No observation.")
    data = {
        "dataset": "flat", "data_dir": str(tmp_path), "module": str(tmp_path / "flat.py"), "shuffle_buffer": 20,
        "text_length": 48,
    }  # fmt: skip
    images = next(make_train_iterator(data, load_tokenizer("tiny"), batch_size=5, image_size=16, seed=0)).images
    assert images.shape == (5, 1, 16, 16, 3)
    levels = images.reshape(5, -1)
    assert np.all(levels == levels[:, :1]) and set(levels[:, 0].tolist()) <= {21, 22, 23, 24, 25}


@pytest.mark.parametrize(("kind", "opened", "closed"), [
    ("1 is open", 1, 0), ("0 is open", 0, 1), ("1 is open, -1 closed", 1, -1), ("-1 is open, 1 closed", -1, 1),
])  # fmt: skip
def test_grippers_become_one_for_open(kind, opened, closed):
    column = Columns("gripper", gripper=kind)
    read = column.read({"gripper": tf.constant([float(opened), float(closed), (opened + closed) / 2])})
    assert read.numpy().ravel().tolist() == [1.0, 0.0, 0.5]
    assert set(GRIPPERS) == {"1 is open", "0 is open", "1 is open, -1 closed", "-1 is open, 1 closed"}


def test_a_fixed_instruction_stands_in_for_missing_text(mine):
    config = describe(
        "mine", cameras={"primary": "image"}, action=[Columns("action", 0, 7)], fixed_instruction="stack the cups"
    )
    raw = {"observation": {"image": tf.fill([3], "")}, "action": tf.zeros([3, 7])}
    assert config.standardize(raw)["language_instruction"].numpy().tolist() == [b"stack the cups"] * 3
    assert open_source(config, str(mine)).name == "mine"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("DATASETS = 3", "defines no DATASETS"),
        ("import nowhere_to_be_found", r"cannot be loaded \(ModuleNotFoundError: No module named"),
        ("from openvla_jax.data.oxe import DATASETS as D\nDATASETS = [D['kuka']]", r"name that is taken \(kuka\)"),
        (FILE.replace('{"primary": "image"}', "{}"), "dataset 'mine': no cameras: give at least one"),
        (FILE.replace("-1 is open, 1 closed", "open"), "gripper 'open' is unknown: one of '1 is open'"),
        (FILE.replace("1, 4", "4, 4"), "columns 4:4 of 'action' are none"),
    ],
)
def test_files_that_make_no_sense_are_told(tmp_path, text, message):
    path = tmp_path / "my_data.py"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        catalogue(str(path))
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    with pytest.raises(DataError, match="there is no file"):
        catalogue(str(tmp_path / "other.py"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("1, 4", "5, 9"), r"columns 5:9 of 'action' do not fit its shape \[None, 7\]"),
        (('"image"', '"picture"'), r"dataset 'mine': .*observation/picture"),
        (('"primary"', '"front"'), r"observation.cameras has 'primary', which no dataset knows; known: front"),
    ],
)
def test_descriptions_that_do_not_fit_the_data_are_told(mine, change, message):
    (mine / "my_data.py").write_text(FILE.replace(*change))
    data = {"dataset": "mine", "data_dir": str(mine), "module": str(mine / "my_data.py")}
    with pytest.raises(DataError, match=message):
        make_train_iterator(
            data | {"shuffle_buffer": 8, "text_length": 48}, load_tokenizer("tiny"), batch_size=2, image_size=24, seed=0
        )


@pytest.mark.parametrize(
    ("closed_open", "raw", "expected"),
    [
        ((0, 100), [0, 25, 100], [0, 0.25, 1]),
        ((0, 0.08), [0.0, 0.02, 0.08], [0, 0.25, 1]),
        ((0, 850), [0, 425, 850], [0, 0.5, 1]),
        ((850, 0), [0, 425, 850], [1, 0.5, 0]),
        ((20, 100), [20, 60, 100], [0, 0.5, 1]),
        ((0, 100), [-4, 104, 50], [0, 1, 0.5]),  # a sensor overshoots
        ((0, 100), [-40, 140, 50], [-0.4, 1.4, 0.5]),  # stays, to be found
    ],
)
def test_gripper_ranges_are_in_the_units_of_the_data(closed_open, raw, expected):
    column = Columns("action", 1, gripper_range=closed_open)
    read = column.read({"action": tf.constant([[9.0, value] for value in raw])})
    np.testing.assert_allclose(read[:, 0], expected, atol=1e-6)


@pytest.mark.parametrize("ends", [(1, 1), (0, float("nan")), (0, float("inf"))])
def test_gripper_ranges_that_are_none_are_refused(ends):
    with pytest.raises(DataError, match="give two different numbers"):
        Columns("action", 6, gripper_range=ends)
    with pytest.raises(DataError, match="gripper and gripper_range: give one of them"):
        Columns("action", 6, gripper="1 is open", gripper_range=(0, 100))


@pytest.mark.parametrize("text", ["", " ", "None", "['lift it']"])
def test_fixed_instructions_that_are_no_text_are_refused(text):
    described = {"cameras": {"primary": "image"}, "action": [Columns("action", 0, 7)]}
    with pytest.raises(DataError, match="dataset 'mine': fixed_instruction"):
        describe("mine", **described, fixed_instruction=text)
