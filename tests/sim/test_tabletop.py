"""The embedded task: the world and its renderer, the expert, and the RLDS dataset that it writes."""

import json

import numpy as np
import pytest
from conftest import ROOT

from openvla_jax.sim.tabletop import (
    ACTION_DIM,
    COLORS,
    GRASP_RADIUS,
    LIFT_HEIGHT,
    MAX_STEP,
    Tabletop,
    expert_action,
    sample_scene,
)


def run(world, act, steps=24):
    for step in range(steps):
        if world.step(act(world)):
            return step + 1
    return None


def test_expert_lifts_the_named_object():
    lengths = [run(Tabletop(seed), expert_action) for seed in range(200)]
    assert sum(length is not None for length in lengths) >= 198
    assert 3 <= np.mean([length for length in lengths if length]) <= 8


def test_expert_recovers_from_noise_and_wrong_gripper_commands():
    rng = np.random.default_rng(0)

    def noisy(world):
        action = expert_action(world) + np.array([*rng.normal(0, 0.02, 3), 0, 0, 0, 0]) * (rng.random() < 0.5)
        return action if rng.random() > 0.05 else np.array([*action[:6], 1 - action[6]])

    assert np.mean([run(Tabletop(seed), noisy, 40) is not None for seed in range(200)]) >= 0.97


def test_random_actions_rarely_succeed():
    rng = np.random.default_rng(0)
    low, high = [-MAX_STEP] * 3 + [0] * 4, [MAX_STEP] * 3 + [0] * 3 + [1]
    assert (
        np.mean([run(Tabletop(seed), lambda world: rng.uniform(low, high)) is not None for seed in range(300)]) <= 0.1
    )


def test_scenes_are_deterministic_separated_and_balanced():
    targets = []
    for seed in range(600):
        scene, again = sample_scene(seed), sample_scene(seed)
        assert scene.instruction() == again.instruction() and np.array_equal(scene.positions, again.positions)
        assert len(set(scene.colors)) == len(scene.colors)
        gaps = np.linalg.norm(scene.positions[:, None] - scene.positions[None], axis=-1)
        assert gaps[np.triu_indices(len(gaps), 1)].min() > 2 * GRASP_RADIUS
        targets.append(scene.colors[scene.target])
    counts = [targets.count(color) for color in COLORS]
    assert min(counts) >= 150 and max(counts) <= 250  # 200 expected of each, standard deviation 12


def test_episodes_are_deterministic():
    first, second = Tabletop(5), Tabletop(5)
    for _ in range(8):
        first.step(expert_action(first))
        second.step(expert_action(second))
    assert np.array_equal(first.state, second.state) and np.array_equal(first.render(), second.render())
    assert not np.array_equal(Tabletop(5).render(), Tabletop(6).render())


def test_grasp_needs_height_and_nearness_and_release_drops():
    world = Tabletop(0)
    target = world.objects[world.scene.target].copy()
    close, wait = np.zeros(7), np.array([0, 0, 0, 0, 0, 0, 1.0])
    for offset, height, holds in [
        ((0, 0), 0.0, True),
        ((0, 0), 0.06, False),
        ((0.05, 0), 0.0, False),
        ((0.02, 0.02), 0.02, True),
    ]:
        world = Tabletop(0)
        world.gripper = np.array([*(target[:2] + offset), height])
        world.step(wait)
        world.step(close)
        assert (world.held == world.scene.target) is holds, (offset, height)
    up = np.array([0, 0, MAX_STEP, 0, 0, 0, 0])
    assert world.step(up) and world.gripper[2] >= LIFT_HEIGHT
    world.step(wait)
    assert not world.success and world.held is None and world.objects[world.scene.target, 2] == 0


def test_lifting_another_object_is_no_success():
    world = Tabletop(0)
    other = (world.scene.target + 1) % 3
    world.gripper = world.objects[other].copy()
    for action in ([0] * 7, [0, 0, MAX_STEP, 0, 0, 0, 0], [0, 0, MAX_STEP, 0, 0, 0, 0], [0, 0, MAX_STEP, 0, 0, 0, 0]):
        world.step(np.array(action, float))
    assert world.held == other and world.objects[other, 2] >= LIFT_HEIGHT and not world.success


@pytest.mark.parametrize(
    "action", [np.zeros(6), np.zeros((1, 7)), np.array([np.nan] + [0] * 6), np.array([0] * 6 + [np.inf])]
)
def test_bad_actions_are_refused(action):
    with pytest.raises(ValueError, match="expected 7 finite numbers"):
        Tabletop(0).step(action)


@pytest.mark.parametrize("size", [32, 48, 64])
def test_every_part_of_the_state_can_be_seen(size):
    """Moving the gripper along any axis, closing it, or grasping changes many pixels, and differently."""

    def picture(dx=0.0, dy=0.0, dz=0.0, opened=True, held=None):
        world = Tabletop(3)
        world.gripper = np.array([dx, dy, 0.05 + dz])
        world.open, world.held = opened, held
        if held is not None:
            world.objects[held] = world.gripper
        return world.render(size).astype(int)

    rest = picture()
    assert rest.shape == (size, size, 3)
    variants = [
        picture(dx=0.02),
        picture(dy=0.02),
        picture(dz=0.02),
        picture(opened=False),
        picture(opened=False, held=0),
    ]
    for index, variant in enumerate(variants):
        for other in [rest, *variants[:index]]:
            changed = (np.abs(variant - other).max(axis=-1) > 12).sum()
            assert changed >= 0.004 * size * size, (index, changed)


def test_objects_appear_in_their_color_where_they_are():
    for seed in range(20):
        world = Tabletop(seed)
        world.gripper = np.array([-0.2, 0.2, 0.16])
        image = world.render(96).astype(int)
        for name, (x, _, _) in zip(world.scene.colors, world.objects, strict=True):
            distance = np.abs(image - np.array(COLORS[name])).sum(axis=-1)
            _, cols = np.nonzero(distance < 40)
            expected = 96 / 2 + 96 / 0.5 * x
            assert len(cols) > 30 and abs(np.median(cols) + 0.5 - expected) < 4, (seed, name)


def test_wrist_world_shows_the_arm_to_the_state_and_the_wrist_camera_only():
    world, other = Tabletop(3, "wrist"), Tabletop(3, "wrist")
    other.gripper = other.gripper + [0.05, 0.08, -0.03]
    other.open = False
    np.testing.assert_array_equal(world.render(), other.render())
    assert np.abs(world.render_wrist().astype(int) - other.render_wrist()).max() > 50
    np.testing.assert_allclose(other.state[:3] - world.state[:3], [0.05, 0.08, -0.03], atol=1e-6)
    opened = Tabletop(3, "wrist")
    opened.gripper = other.gripper
    changed = np.abs(opened.render_wrist().astype(int) - other.render_wrist()).max(axis=-1) > 50
    assert changed.sum() > 20, "whether it is closed"


def test_wrist_camera_shows_objects_where_they_are_seen_from_the_gripper():
    for seed in range(20):
        world = Tabletop(seed, "wrist")
        target = world.objects[world.scene.target]
        world.gripper = target + [-0.03, 0.02, 0.1]
        image = world.render_wrist(96).astype(int)
        color = np.array(COLORS[world.scene.colors[world.scene.target]])
        rows, cols = np.nonzero(np.abs(image - color).sum(axis=-1) < 10)
        assert len(rows) > 300
        centre = [(cols.min() + cols.max() + 1) / 2, (rows.min() + rows.max() + 1) / 2]
        np.testing.assert_allclose(centre, [48 + 96 * 0.03 / 0.24, 48 + 96 * 0.02 / 0.24], atol=1.5)


def test_wrist_camera_leaves_out_what_is_beside_it():
    world = Tabletop(0, "wrist")
    world.gripper = np.array([0.0, -0.18, 0.16])
    world.objects[:, 1] = 0.17
    image = world.render_wrist().astype(int)
    assert not any((np.abs(image - np.array(color)).sum(axis=-1) < 60).any() for color in COLORS.values())


def test_expert_lifts_with_small_steps_in_the_wrist_world():
    worlds = [Tabletop(seed, "wrist") for seed in range(100)]
    lengths = [run(world, expert_action, 40) for world in worlds]
    assert all(length and length < world.kind.patience / 2 for length, world in zip(lengths, worlds, strict=True))
    assert np.mean(lengths) > 10
    assert np.abs([expert_action(world)[:3] for world in worlds]).max() <= worlds[0].kind.max_step + 1e-6


# --- The dataset ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    pytest.importorskip("tensorflow_datasets")
    from openvla_jax.sim.dataset import write_dataset

    out = tmp_path_factory.mktemp("rlds")
    return out, write_dataset(out, episodes=9, val_episodes=3)


def test_dataset_reads_back_as_written(written):
    import tensorflow_datasets as tfds

    from openvla_jax.sim.dataset import FIRST_SEED, expert_episode

    _, directory = written
    builder = tfds.builder_from_directory(directory)
    assert {name: split.num_examples for name, split in builder.info.splits.items()} == {"train": 9, "val": 3}
    assert builder.info.splits["train"].num_shards > 1
    seeds = {}
    for split in ("train", "val"):
        for episode in tfds.as_numpy(builder.as_dataset(split)):
            seed = int(episode["episode_metadata"]["seed"])
            seeds.setdefault(split, set()).add(seed)
            instruction, expected = expert_episode(seed, noise=0.02)
            steps = list(episode["steps"])
            assert len(steps) == len(expected) >= 3
            for step, want in zip(steps, expected, strict=True):
                assert np.array_equal(step["observation"]["image"], want["image"])
                assert step["observation"]["state"].tobytes() == want["state"].tobytes()
                assert step["action"].tobytes() == want["action"].tobytes() and step["action"].shape == (ACTION_DIM,)
                assert step["language_instruction"].decode() == instruction
            flags = [(step["is_first"], step["is_last"], step["is_terminal"], step["reward"]) for step in steps]
            assert flags[0] == (True, False, False, 0) and flags[-1] == (False, True, True, 1)
            assert not any(map(any, flags[1:-1]))
    assert seeds == {
        split: set(range(FIRST_SEED[split], FIRST_SEED[split] + count)) for split, count in [("train", 9), ("val", 3)]
    }


def test_a_complete_dataset_is_kept_and_another_refused(written, capsys):
    from openvla_jax.sim.dataset import write_dataset

    out, directory = written
    before = {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}
    assert write_dataset(out, episodes=9, val_episodes=3) == directory
    assert "kept" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in directory.iterdir()} == before
    assert [path.name for path in directory.parent.iterdir()] == ["1.0.0"]  # nothing half-written beside it
    with pytest.raises(FileExistsError, match="other parameters"):
        write_dataset(out, episodes=10, val_episodes=3)
    assert json.loads((directory / "metadata.json").read_text())["episodes"] == {"train": 9, "val": 3}


def test_wrist_dataset_reads_back_as_written(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")
    from openvla_jax.sim.dataset import HELD_STEPS, wrist_episode, write_dataset

    directory = write_dataset(tmp_path, episodes=2, val_episodes=1, world="wrist")
    assert directory == tmp_path / "tabletop_wrist" / "1.0.0"
    found = tfds.as_numpy(tfds.builder_from_directory(directory).as_dataset("train"))
    for episode in found:
        instruction, expected = wrist_episode(int(episode["episode_metadata"]["seed"]))
        steps = list(episode["steps"])
        assert len(steps) == len(expected) and steps[0]["language_instruction"].decode() == instruction
        for step, want in zip(steps, expected, strict=True):
            for key in ("image", "wrist_image", "state"):
                np.testing.assert_array_equal(step["observation"][key], want[key])
            np.testing.assert_array_equal(step["action"], want["action"])
        held = np.stack([step["action"] for step in steps[-HELD_STEPS:]])
        assert not held.any(), "it holds still, closed"


def test_wrist_episode_does_what_it_stores():
    """From the first scene the stored actions alone lift the object: those of a chunk are no answers to noise."""
    from openvla_jax.sim.dataset import HELD_STEPS, wrist_episode

    starts = []
    for seed in range(30):
        instruction, steps = wrist_episode(seed)
        world = Tabletop(seed, "wrist")
        world.gripper = steps[0]["state"][:3].astype(np.float64)
        world.open = bool(steps[0]["state"][7])
        done = [world.step(step["action"]) for step in steps]
        assert done.index(True) == len(steps) - HELD_STEPS - 1 and all(done[-HELD_STEPS:])
        assert world.instruction == instruction
        starts.append(steps[0]["state"])
    starts = np.stack(starts)
    assert (np.ptp(starts[:, :3], axis=0) > [0.2, 0.2, 0.1]).all() and 0 < starts[:, 7].mean() < 1


def test_demo_episodes_are_those_of_earlier_versions():
    """Bit for bit those in a dataset that an earlier version wrote."""
    tfds = pytest.importorskip("tensorflow_datasets")
    from openvla_jax.sim.dataset import expert_episode

    builder = tfds.builder_from_directory(ROOT / "tests/data/checkpoint_v1/data/tabletop/1.0.0")
    for episode in tfds.as_numpy(builder.as_dataset("train")):
        instruction, expected = expert_episode(int(episode["episode_metadata"]["seed"]), noise=0.02)
        steps = list(episode["steps"])
        assert len(steps) == len(expected) and steps[0]["language_instruction"].decode() == instruction
        for step, want in zip(steps, expected, strict=True):
            assert np.array_equal(step["observation"]["image"], want["image"])
            assert step["observation"]["state"].tobytes() == want["state"].tobytes()
            assert step["action"].tobytes() == want["action"].tobytes()


def test_no_episodes_is_an_error(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    from openvla_jax.sim.dataset import write_dataset

    with pytest.raises(ValueError, match="at least 1"):
        write_dataset(tmp_path, episodes=0)
    assert not list(tmp_path.iterdir())


def test_in_the_changed_world_gripper_commands_are_reversed():
    worlds = [Tabletop(seed, "changed") for seed in range(40)]
    assert all(run(world, expert_action) for world in worlds)
    reversed_expert = lambda world: expert_action(world) * [1, 1, 1, 1, 1, 1, -1] + [0, 0, 0, 0, 0, 0, 1]
    assert not any(run(Tabletop(seed, "changed"), reversed_expert) for seed in range(40))
    for seed in range(5):
        np.testing.assert_array_equal(Tabletop(seed, "changed").render(), Tabletop(seed).render())
    with pytest.raises(ValueError, match="unknown world 'moon': one of tabletop, changed, wrist"):
        Tabletop(0, "moon")
