"""Several cameras, state and action chunks: frames and batches as `ObservationSpec` and `ActionSpec` ask for them."""

import dataclasses
import json

import fake_rlds
import numpy as np
import pytest
from conftest import golden

from openvla_jax.data import DataError, StatisticsError, statistics
from openvla_jax.data.batches import make_eval_batches, make_train_iterator
from openvla_jax.data.episodes import read_episodes
from openvla_jax.data.memory import estimate
from openvla_jax.data.mixture import DATASETS, open_phases
from openvla_jax.data.oxe import ActionEncoding
from openvla_jax.data.oxe.state import without_pads
from openvla_jax.data.source import episode_ranges
from openvla_jax.tokens.actions import ActionTokenizer, normalize_actions
from openvla_jax.tokens.prompts import prompt_ids
from openvla_jax.tokens.tokenizer import load_tokenizer
from openvla_jax.types import ActionSpec, ObservationSpec

TOKENIZER = load_tokenizer("tiny")
OBSERVATION = ObservationSpec(cameras=("wrist", "primary"), state=("c", "a"))
ACTION = ActionSpec(horizon=3, executed=3, bins=128)
BOTH = (("two", 1.0), ("one", 1.0))
STEPS, WIDTH = (5, 4), (7, 14)  # of an episode of "two" and "one"
COLUMNS = ("a", "b", "c", "d", "e", "f", "pad")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """ "two" has two cameras, actions of width 7 and a short episode; "one" has one camera and actions of width 14."""
    folder = tmp_path_factory.mktemp("data")
    train = [
        [fake_rlds.two_cameras(0), fake_rlds.two_cameras(1)],
        [fake_rlds.two_cameras(2), fake_rlds.two_cameras(3, steps=2)],
    ]
    fake_rlds.write(
        folder,
        {"train": train, "val": [[fake_rlds.two_cameras(4)]]},
        name="two",
        schema=fake_rlds.two_camera_features(),
    )
    wide = [fake_rlds.episode(20 + i, steps=4, action_dim=14, instruction="fold") for i in range(3)]
    schema = fake_rlds.features(action_dim=14)
    fake_rlds.write(folder, {"train": [wide[:2]], "val": [wide[2:]]}, name="one", schema=schema)
    views = {"primary": "image", "secondary": None, "wrist": "wrist"}
    bimanual = ActionEncoding.JOINT_POS_BIMANUAL
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DATASETS, "two", fake_rlds.config("two", image_keys=views, state_columns=COLUMNS))
        patch.setitem(DATASETS, "one", fake_rlds.config("one", action_encoding=bimanual, state_columns=COLUMNS))
        yield {
            "dataset": BOTH, "data_dir": str(folder), "shuffle_buffer": 8, "text_length": 96, "num_parallel_reads": 2,
            "statistics_dir": str(folder / "statistics"),
        }  # fmt: skip


def _iterator(data, observation=OBSERVATION, action=ACTION, **changes):
    kwargs = {"batch_size": 4, "image_size": 24, "seed": 0} | changes
    return make_train_iterator(data, TOKENIZER, observation=observation, action=action, **kwargs)


@pytest.fixture(scope="module")
def drawn(data, tmp_path_factory):
    """An iterator, saved after 4 batches, and its first 12."""
    folder = str(tmp_path_factory.mktemp("state"))
    iterator = _iterator(data)
    batches = [next(iterator) for _ in range(4)]
    iterator.save(folder)
    saved = (folder, iterator.skipped_episodes)
    return iterator, batches + [next(iterator) for _ in range(8)], saved


def _rows(batches):
    """(the row of each field by name, dataset, number of the episode, step) of all rows; the pixels tell which."""
    for batch in batches:
        for row, dataset in enumerate(batch.dataset.tolist()):
            fields = {name: array[row] for name, array in batch._asdict().items()}
            level = int(np.median(fields["images"][1]))
            numbers = (range(5), range(20, 23))[dataset]
            number, step = next((n, t) for n in numbers for t in range(STEPS[dataset]) if 7 * n + t == level)
            yield fields, dataset, number, step


def _episode(dataset, number):
    return fake_rlds.episode(number, steps=STEPS[dataset], action_dim=WIDTH[dataset])["steps"]


# ---------------------------------------------------------------------------------------------------------------------
# Contents
# ---------------------------------------------------------------------------------------------------------------------


def test_images_stand_in_the_order_of_the_spec_and_missing_cameras_are_masked_and_black(drawn):
    _, batches, _ = drawn
    assert batches[0].images.shape == (4, 2, 24, 24, 3)
    seen = set()
    for row, dataset, number, step in _rows(batches):
        level = 7 * number + step
        wrist = 0 if dataset else 255 - level
        assert np.unique(row["images"][0]).tolist() == [wrist] and np.unique(row["images"][1]).tolist() == [level]
        assert row["image_mask"].tolist() == [not dataset, True]
        seen.add(dataset)
    assert seen == {0, 1}


def test_state_is_normalised_by_the_quantiles_of_its_dataset(drawn):
    iterator, batches, _ = drawn
    numbers = (((0, 5), (1, 5), (2, 5), (3, 2), (4, 5)), ((20, 4), (21, 4), (22, 4)))
    for row, dataset, number, step in _rows(batches):
        raw = [s["observation"]["state"][[2, 0]] for n, t in numbers[dataset] for s in _states(dataset, n, t)]
        low, high = np.quantile(np.array(raw, np.float64), [0.01, 0.99], axis=0)
        state = _episode(dataset, number)[step]["observation"]["state"][[2, 0]]
        np.testing.assert_allclose(row["state"], np.clip(2 * (state - low) / (high - low) - 1, -1, 1), atol=1e-5)
        assert row["state"].dtype == np.float32
    assert iterator.statistics["two"]["proprio"]["names"] == ["c", "a"]


def _states(dataset, number, steps):
    return fake_rlds.episode(number, steps=steps, action_dim=WIDTH[dataset])["steps"]


def test_chunks_are_the_next_actions_of_the_episode(drawn):
    iterator, batches, _ = drawn
    assert batches[0].actions.shape == batches[0].action_mask.shape == (4, 3, 14)
    steps = {0: set(), 1: set()}
    for row, dataset, number, step in _rows(batches):
        width, stats = WIDTH[dataset], iterator.statistics[("two", "one")[dataset]]["action"]
        actions = np.array([s["action"] for s in _episode(dataset, number)[step : step + 3]])
        np.testing.assert_allclose(row["actions"][:, :width], normalize_actions(actions, stats), atol=1e-5)
        assert not row["actions"][:, width:].any()
        assert row["action_mask"].tolist() == [[True] * width + [False] * (14 - width)] * 3
        assert number != 3  # the short episode
        steps[dataset].add(step)
    assert steps == {0: {0, 1, 2}, 1: {0, 1}}


def test_tokens_hold_the_chunk_and_decode_with_the_same_bins(drawn):
    _, batches, _ = drawn
    codec = ActionTokenizer(TOKENIZER.vocab_size, 128)
    for row, dataset, number, _ in _rows(batches):
        width = WIDTH[dataset]
        targets = row["tokens"][row["target_positions"][row["target_mask"]]]
        assert len(row["target_positions"]) == 3 * 14 + 1 and len(targets) == 3 * width + 1
        assert targets[-1] == TOKENIZER.eos_token_id
        decoded = codec.decode(targets[:-1]).reshape(3, width)
        assert np.abs(decoded - row["actions"][:, :width].clip(-1, 1)).max() <= 1 / 127 + 1e-6  # half a bin
        prompt = prompt_ids(TOKENIZER, "fold" if dataset else f"pick up cube {number}")
        assert row["tokens"][: len(prompt)].tolist() == prompt
        assert row["target_positions"][0] == len(prompt)


@pytest.mark.long
def test_short_episodes_are_skipped_counted_and_logged(data, drawn, caplog):
    iterator, _, _ = drawn
    assert iterator.skipped_episodes > 0 and iterator.skipped_images == 0
    again = _iterator(data)
    next(again)
    while not again.skipped_episodes:
        next(again)
    episode = "dataset 'two', episode two-train.tfrecord-00001-of-00002#1"
    assert f"{episode}: fewer steps than action.horizon; it is skipped" in caplog.text
    with pytest.raises(DataError, match=r"dataset 'two': 1000 episodes in a row have fewer steps than action.horizon"):
        next(_iterator(data | {"dataset": "two"}, action=ActionSpec(horizon=6)))


def test_evaluation_batches_follow_the_specs(data, drawn):
    iterator, _, _ = drawn
    kwargs = {"batch_size": 4, "image_size": 24, "num_batches": 2, "statistics": iterator.statistics}
    batches = make_eval_batches(data, TOKENIZER, observation=OBSERVATION, action=ACTION, **kwargs)
    found = {(dataset, number) for _, dataset, number, _ in _rows(batches)}
    assert found == {(0, 4), (1, 22)}
    assert batches[0].actions.shape == (4, 3, 14) and batches[0].state.shape == (4, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Resuming
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_restored_stream_with_cameras_state_and_chunks_continues_exactly(data, drawn):
    iterator, batches, (folder, skipped) = drawn
    resumed = _iterator(data)
    resumed.restore(folder)
    assert resumed.skipped_episodes == skipped
    for expected in batches[4:]:
        batch = next(resumed)
        assert all(np.array_equal(a, b) for a, b in zip(batch, expected, strict=True))
    assert resumed.skipped_episodes == iterator.skipped_episodes


@pytest.mark.long
def test_identity_names_only_specs_that_are_not_the_default(data, drawn):
    _, _, (folder, _) = drawn
    plain = _iterator(data, ObservationSpec(rotation=180), ActionSpec(dim=14)).identity
    assert set(plain) == {
        "process_index", "process_count", "datasets", "weights", "schedule", "seed", "batch_size", "image_size",
        "decoded_together", "shuffle_buffer", "num_parallel_reads", "skip_unlabeled", "max_action", "max_proprio",
        "bad_images", "tensorflow",
    }  # fmt: skip
    changed = {"cameras": ["wrist", "primary"], "state": ["c", "a"], "horizon": 3, "bins": 128}
    assert _iterator(data).identity == plain | changed
    with pytest.raises(DataError, match=r"horizon was 3, now is 2: set it back"):
        _iterator(data, action=dataclasses.replace(ACTION, horizon=2, executed=2)).restore(folder)


# ---------------------------------------------------------------------------------------------------------------------
# The reference
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("horizon", [8, 5])
def test_frames_are_those_of_openvla_oft(shared, horizon):
    with np.load(golden(f"oft_pipeline/chunk{horizon}.npz")) as file:
        expected = dict(file)
    names = without_pads(DATASETS["bridge_dataset"].state_names)
    observation = ObservationSpec(cameras=("primary", "wrist"), state=names)
    path = str(golden("oft_pipeline/run_dir/dataset_statistics.json"))
    data = {"dataset": "bridge_dataset", "data_dir": str(shared / "data"), "statistics": path}
    (phase,) = open_phases(data, observation, ActionSpec(horizon=horizon))
    mixture = phase.mixture
    assert mixture.camera_mask.tolist() == [[True, False]]
    read = read_episodes(mixture.traced(0), episode_ranges(mixture.sources[0], "train"))
    for number, frames in enumerate(read.take(5).as_numpy_iterator()):
        one = {
            key: expected[f"traj{number}/f{horizon - 1}/{key}"]
            for key in ("action", "proprio", "timestep", "instruction", "wrist_is_padding")
        }
        actions = frames["action"].reshape(-1, horizon, 7)
        np.testing.assert_allclose(actions, one["action"], rtol=0, atol=1e-6)
        np.testing.assert_allclose(frames["state"], one["proprio"][:, 0], rtol=0, atol=1e-6)
        assert frames["step"].tolist() == (one["timestep"][:, 0] + 1).tolist()  # Bridge's first step is dropped
        assert [text.decode() for text in frames["language"]] == one["instruction"].tolist()
        assert [text == b"" for text in frames["image_wrist"]] == one["wrist_is_padding"].tolist()
        assert all(frames["image_primary"])


def test_state_layouts_are_those_of_the_reference_with_and_without_pads():
    padded = {name: len(DATASETS[name].state_names) for name in ("bridge_orig", "libero_spatial_no_noops")}
    assert padded == {"bridge_orig": 8, "libero_spatial_no_noops": 9}
    assert [len(without_pads(DATASETS[name].state_names)) for name in padded] == [7, 8]


# ---------------------------------------------------------------------------------------------------------------------
# Refusals and memory
# ---------------------------------------------------------------------------------------------------------------------


def test_statistics_of_another_state_are_refused(data, tmp_path):
    (phase,) = open_phases(data, OBSERVATION)
    path = tmp_path / "statistics.json"
    path.write_text(json.dumps(phase.mixture.statistics))
    options = data | {"statistics": str(path)}
    swapped = open_phases(options, ObservationSpec(state=("a", "c")))[-1].mixture.statistics["two"]["proprio"]
    assert swapped["q01"] == phase.mixture.statistics["two"]["proprio"]["q01"][::-1]
    with pytest.raises(StatisticsError, match=r"'two': their state has columns c, a, the policy's is a, b: use"):
        open_phases(options, ObservationSpec(state=("a", "b")))
    with pytest.raises(DataError, match=r"dataset 'two' has no state column 'pat'; did you mean 'pad'\?"):
        open_phases(data, ObservationSpec(state=("a", "pat")))
    unnamed = {part: dict.fromkeys(("mean", "std", "max", "min", "q01", "q99"), [0.0] * 6) for part in ("proprio",)}
    with pytest.raises(StatisticsError, match=r"'two': those of the state are zeros: compute them with the state"):
        statistics.select_state(unnamed, "two", COLUMNS, ("a",))


def test_make_train_iterator_refuses_a_camera_that_no_dataset_has(data):
    with pytest.raises(
        DataError, match=r"observation.cameras has 'wrist', of which no dataset has images: leave it out"
    ):
        _iterator(data | {"dataset": "one"}, ObservationSpec(cameras=("primary", "wrist")))


def test_memory_counts_every_camera(data):
    only = data | {"dataset": "two"}
    one, two = (
        estimate([open_phases(only, ObservationSpec(cameras=cameras))[-1].mixture], readers=2).frame_bytes
        for cameras in (("primary",), ("primary", "wrist"))
    )
    iterator = _iterator(only, ObservationSpec(cameras=("primary", "wrist")), ActionSpec())
    images = 3 * 4 * 24 * 24 * 3
    assert two - one > 150  # a PNG of one gray level has about a hundred bytes; its column costs as much again
    assert iterator.state_bytes > 8 * two + 2 * images
