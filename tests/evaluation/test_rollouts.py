"""Rollouts, intervals, and the figures made of them."""

import copy
import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from openvla_jax.evaluation import figures
from openvla_jax.evaluation.rollouts import (
    MAX_STEPS,
    BlankedPolicy,
    RandomPolicy,
    evaluate,
    misnamed,
    run_rollouts,
    wilson_interval,
)
from openvla_jax.sim.tabletop import MAX_STEP, Tabletop, expert_action

STATISTICS = {
    "q01": [-MAX_STEP] * 3 + [0.0] * 4,
    "q99": [MAX_STEP] * 3 + [0.0] * 3 + [1.0],
    "mask": [True] * 6 + [False],
}


class Expert:
    """Looks at the worlds instead of the images, and keeps what it was shown."""

    def __init__(self, worlds, lazy=()):
        self.worlds, self.lazy, self.seen = worlds, lazy, []

    def predict_actions(self, images, instructions):
        self.seen.append((np.stack(images), list(instructions)))
        return np.stack(
            [np.zeros(7) if i in self.lazy else expert_action(world) for i, world in enumerate(self.worlds)]
        )


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [  # Newcombe 1998, table I: Wilson without continuity correction
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_against_published_values(successes, trials, low, high):
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_bounds_are_where_the_score_test_is_on_the_edge(counts):
    successes, trials = counts
    rate, z = successes / trials, 1.959963984540054
    low, high = wilson_interval(successes, trials)
    assert 0 <= low <= rate <= high <= 1
    for bound in (low, high):
        if 0 < bound < 1:
            assert abs(rate - bound) == pytest.approx(z * math.sqrt(bound * (1 - bound) / trials), abs=1e-9)
    mirrored = wilson_interval(trials - successes, trials)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-12)


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (3, 2), (-1, 5)])
def test_wilson_refuses_impossible_counts(successes, trials):
    with pytest.raises(ValueError, match="successes"):
        wilson_interval(successes, trials)


def test_successes_steps_and_frames_are_counted_right():
    worlds = [Tabletop(seed) for seed in range(12)]
    policy = Expert(worlds, lazy={1, 4})
    result = run_rollouts(policy, worlds, max_steps=15, record=5)
    assert result.success.tolist() == [i not in {1, 4} for i in range(12)]
    assert result.rate == 10 / 12 and result.interval == wilson_interval(10, 12)
    for index, seed in enumerate(range(12)):
        if index in {1, 4}:
            assert result.steps[index] == 15
            continue
        world = Tabletop(seed)
        taken = next(step for step in range(1, 30) if world.step(expert_action(world)))
        assert result.steps[index] == taken
    assert len(result.frames) == 5 and [len(f) for f in result.frames] == [s + 1 for s in result.steps[:5]]
    assert np.array_equal(result.frames[0][0], Tabletop(0).render())
    assert np.array_equal(result.frames[0][-1], worlds[0].render())
    shapes = {images.shape for images, _ in policy.seen}
    assert shapes == {(12, 48, 48, 3)}, "every call has the same batch"
    assert policy.seen[0][1] == [Tabletop(seed).instruction for seed in range(12)]


def test_rollouts_stop_when_all_have_succeeded():
    worlds = [Tabletop(seed) for seed in range(4)]
    policy = Expert(worlds)
    result = run_rollouts(policy, worlds)
    assert result.success.all() and len(policy.seen) == result.steps.max()


def test_misnamed_asks_for_another_object_and_success_stays_with_the_first():
    class Obedient(Expert):
        def predict_actions(self, images, instructions):
            actions = []
            for world, instruction in zip(self.worlds, instructions, strict=True):
                named = [world.scene.instruction(i) for i in range(3)].index(instruction)
                pretended = copy.copy(world)
                pretended.scene = dataclasses.replace(world.scene, target=named)
                actions.append(expert_action(pretended))
            return np.stack(actions)

    worlds = [Tabletop(seed) for seed in range(30)]
    assert run_rollouts(Obedient(worlds), worlds).success.all()
    worlds = [Tabletop(seed) for seed in range(30)]
    assert all(misnamed(world) != world.instruction for world in worlds)
    result = run_rollouts(Obedient(worlds), worlds, instruct=misnamed)
    assert not result.success.any()
    assert all(world.held is not None and world.held != world.scene.target for world in worlds)


def test_blanked_policy_sees_black_and_the_same_words():
    worlds = [Tabletop(seed) for seed in range(3)]
    policy = Expert(worlds)
    run_rollouts(BlankedPolicy(policy), worlds, max_steps=2)
    assert not any(images.any() for images, _ in policy.seen)
    assert policy.seen[0][1] == [world.instruction for world in worlds]


def test_random_policy_stays_in_the_quantiles_and_fails():
    policy = RandomPolicy(STATISTICS)
    actions = policy.predict_actions([None] * 4000, [""] * 4000)
    assert np.abs(actions[:, :3]).max() <= MAX_STEP and np.abs(actions[:, 3:6]).max() == 0
    assert actions.mean(axis=0) == pytest.approx([0] * 6 + [0.5], abs=0.02)
    assert (actions[:, 6].min(), actions[:, 6].max()) == pytest.approx((0, 1), abs=0.01)
    assert run_rollouts(RandomPolicy(STATISTICS), [Tabletop(seed) for seed in range(200)]).rate <= 0.1


def test_evaluate_runs_every_condition_on_the_same_scenes():
    class Still:
        contract = SimpleNamespace(statistics={"tabletop": {"action": STATISTICS}})

        def __init__(self):
            self.first = []

        def predict_actions(self, images, instructions):
            self.first.append((np.stack(images), instructions))
            return np.zeros((len(images), 7))

    policy = Still()
    results = evaluate(policy, 6, controls=True, record=2)
    assert list(results) == ["policy", "another object named", "image blanked", "random actions"]
    assert all(len(result.success) == 6 for result in results.values())
    (plain, words), (same, others), (blank, again) = (policy.first[i * MAX_STEPS] for i in range(3))
    assert np.array_equal(plain, same) and not blank.any()
    assert words == again and not set(zip(words, range(6), strict=True)) & set(zip(others, range(6), strict=True))
    assert len(evaluate(policy, 6)) == 1
    with pytest.raises(ValueError, match="at least 1"):
        evaluate(policy, 0)


def test_report_and_figures(tmp_path):
    worlds = [Tabletop(seed) for seed in range(6)]
    result = run_rollouts(Expert(worlds, lazy={1}), worlds, record=6)
    pytest.importorskip("matplotlib")
    metrics = [
        {"step": s, "train/loss": 5 / s, "train/action_accuracy": 0.1, "train/action_l1": 0.2} for s in range(1, 20)
    ]
    metrics.append({"step": 19, "val/loss": 1.0})
    curves = figures.training_curves(metrics, tmp_path / "curves.png")
    strip = figures.rollout_strip(result, tmp_path / "strip.png")
    animation = figures.rollout_animation(result, tmp_path / "rollouts.gif")
    report = figures.write_report({"policy": result}, tmp_path / "report.md", "A title", [curves, strip]).read_text()
    assert "| policy | 5 / 6 | 83% | 43.6% to 97.0% |" in report and "(strip.png)" in report
    with Image.open(animation) as gif:
        length = sum(gif.info["duration"] for frame in range(gif.n_frames) if gif.seek(frame) is None)
        assert gif.n_frames > 4 and length == 250 * (result.steps.max() + 1 + 3)  # equal frames are stored once
    colors = {color for _, color in Image.open(strip).convert("RGB").getcolors(1 << 20)}
    assert {figures.SUCCESS, figures.FAILURE} <= colors
    with pytest.raises(ValueError, match="no train/loss"):
        figures.training_curves([{"step": 1}], tmp_path / "none.png")
