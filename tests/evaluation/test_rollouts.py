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

from openvla_jax.evaluation import figures, pace
from openvla_jax.evaluation.environments.tabletop import MAX_STEPS, TabletopEnvironment, misnamed
from openvla_jax.evaluation.rollouts import (
    BlankedPolicy,
    RandomPolicy,
    evaluate,
    run_rollouts,
    wilson_interval,
)
from openvla_jax.sim.tabletop import MAX_STEP, Tabletop, expert_action
from openvla_jax.types import ActionSpec, Observation

STATISTICS = {
    "q01": [-MAX_STEP] * 3 + [0.0] * 4,
    "q99": [MAX_STEP] * 3 + [0.0] * 3 + [1.0],
    "mask": [True] * 6 + [False],
}


class Expert:
    """Looks at the worlds instead of the images, and keeps what it was shown."""

    def __init__(self, environments, lazy=()):
        self.environments, self.lazy, self.seen = environments, lazy, []

    @property
    def worlds(self):
        return [environment.world for environment in self.environments]

    def predict_chunks(self, observations):
        self.seen.append(shown(observations))
        actions = [np.zeros(7) if i in self.lazy else expert_action(world) for i, world in enumerate(self.worlds)]
        return np.stack(actions)[:, None]


def shown(observations):
    return np.stack([o.images["primary"] for o in observations]), [o.instruction for o in observations]


def scenes(count, **settings):
    """(environments, their seeds) of a number of scenes."""
    return [TabletopEnvironment(**settings) for _ in range(count)], range(count)


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
    environments, seeds = scenes(12)
    policy = Expert(environments, lazy={1, 4})
    result = run_rollouts(policy, environments, seeds, record=5)
    assert result.success.tolist() == [i not in {1, 4} for i in range(12)]
    assert result.rate == 10 / 12 and result.interval == wilson_interval(10, 12)
    for index, seed in enumerate(range(12)):
        if index in {1, 4}:
            assert result.steps[index] == MAX_STEPS
            continue
        world = Tabletop(seed)
        taken = next(step for step in range(1, 30) if world.step(expert_action(world)))
        assert result.steps[index] == taken
    assert len(result.frames) == 5 and [len(f) for f in result.frames] == [s + 1 for s in result.steps[:5]]
    assert np.array_equal(result.frames[0][0], Tabletop(0).render())
    assert np.array_equal(result.frames[0][-1], environments[0].world.render())
    shapes = {images.shape for images, _ in policy.seen}
    assert shapes == {(12, 48, 48, 3)}, "every call has the same batch"
    assert policy.seen[0][1] == [Tabletop(seed).instruction for seed in range(12)]


def test_rollouts_stop_when_all_have_succeeded():
    environments, seeds = scenes(4)
    policy = Expert(environments)
    result = run_rollouts(policy, environments, seeds)
    assert result.success.all() and len(policy.seen) == result.steps.max()


def test_misnamed_asks_for_another_object_and_success_stays_with_the_first():
    class Obedient(Expert):
        def predict_chunks(self, observations):
            actions = []
            for world, observation in zip(self.worlds, observations, strict=True):
                named = [world.scene.instruction(i) for i in range(3)].index(observation.instruction)
                pretended = copy.copy(world)
                pretended.scene = dataclasses.replace(world.scene, target=named)
                actions.append(expert_action(pretended))
            return np.stack(actions)[:, None]

    environments, seeds = scenes(30)
    assert run_rollouts(Obedient(environments), environments, seeds).success.all()
    environments, seeds = scenes(30, instruct=misnamed)
    result = run_rollouts(Obedient(environments), environments, seeds)
    worlds = [environment.world for environment in environments]
    assert all(misnamed(world) != world.instruction for world in worlds)
    assert not result.success.any()
    assert all(world.held is not None and world.held != world.scene.target for world in worlds)


def test_blanked_policy_sees_black_and_the_same_words():
    environments, seeds = scenes(3)
    policy = Expert(environments)
    run_rollouts(BlankedPolicy(policy), environments, seeds)
    assert not any(images.any() for images, _ in policy.seen)
    assert policy.seen[0][1] == [world.instruction for world in policy.worlds]


def test_run_rollouts_executes_some_actions_of_a_chunk_before_it_asks_again():
    class Planner(Expert):
        """Plans two steps ahead in a copy of each world, and then one that would undo them."""

        def predict_chunks(self, observations):
            self.seen.append(shown(observations))
            chunks = []
            for world in self.worlds:
                copied = copy.deepcopy(world)
                first = expert_action(copied)
                copied.step(first)
                chunks.append(np.stack([first, expert_action(copied), np.full(7, 9.0)]))
            return np.stack(chunks)

    environments, seeds = scenes(6)
    plain = run_rollouts(Expert(environments), environments, seeds)
    planner = Planner(environments)
    result = run_rollouts(planner, environments, seeds, executed=2)
    assert result.success.all() and result.steps.tolist() == plain.steps.tolist()
    assert len(planner.seen) == -(-max(result.steps) // 2)


def test_random_policy_stays_in_the_quantiles_and_fails():
    policy = RandomPolicy(STATISTICS)
    actions = policy.predict_chunks([Observation({}, "")] * 4000)[:, 0]
    assert np.abs(actions[:, :3]).max() <= MAX_STEP and np.abs(actions[:, 3:6]).max() == 0
    assert actions.mean(axis=0) == pytest.approx([0] * 6 + [0.5], abs=0.02)
    assert (actions[:, 6].min(), actions[:, 6].max()) == pytest.approx((0, 1), abs=0.01)
    assert RandomPolicy(STATISTICS, executed=3).predict_chunks([Observation({}, "")]).shape == (1, 3, 7)
    assert run_rollouts(RandomPolicy(STATISTICS), *scenes(200)).rate <= 0.1


def test_evaluate_runs_every_condition_on_the_same_scenes():
    class Still:
        contract = SimpleNamespace(statistics={"tabletop": {"action": STATISTICS}}, action=ActionSpec())

        def __init__(self):
            self.first = []

        def predict_chunks(self, observations):
            self.first.append(shown(observations))
            return np.zeros((len(observations), 1, 7))

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


def test_evaluate_in_the_wrist_world_also_hides_the_second_camera_and_the_state():
    class Still:
        action = ActionSpec(horizon=8, executed=8)
        contract = SimpleNamespace(statistics={"tabletop_wrist": {"action": STATISTICS}}, action=action)

        def __init__(self):
            self.first = []

        def predict_chunks(self, observations):
            self.first.append(observations[0])
            return np.zeros((len(observations), 8, 7))

    policy = Still()
    results = evaluate(policy, 2, controls=True, world="wrist")
    assert list(results)[3:5] == ["camera on the wrist blanked", "state zeroed"]
    each = len(policy.first) // 5
    assert each == TabletopEnvironment("wrist").max_steps // 8
    plain, blanked, zeroed = (policy.first[each * i] for i in (0, 3, 4))
    assert set(plain.images) == {"primary", "wrist"} and plain.state.shape == (3,) and np.abs(plain.state).max() > 0.1
    assert not blanked.images["wrist"].any() and not zeroed.state.any()
    for kept, same in (
        (blanked.images["primary"], plain.images["primary"]), (blanked.state, plain.state),
        (zeroed.images["wrist"], plain.images["wrist"]),
    ):  # fmt: skip
        np.testing.assert_array_equal(kept, same)


def test_pace_counts_the_forward_passes_of_a_chunk():
    specs = {
        "tokens": ActionSpec(),
        "l1": ActionSpec(horizon=8, executed=4, head="l1"),
        "diffusion": ActionSpec(horizon=8, executed=8, head="diffusion", denoising_steps=10),
    }
    assert {name: pace.passes(spec) for name, spec in specs.items()} == {"tokens": 7, "l1": 1, "diffusion": 10}
    calls, seen = [], Observation({}, "pick up the red cube")
    policy = SimpleNamespace(contract=SimpleNamespace(action=specs["l1"]), predict_chunk=calls.append)
    measured = pace.measure(policy, seen, calls=3)
    assert calls == [seen] * 4 and (measured.passes, measured.actions) == (1, 4) and measured.seconds < 0.1
    table = pace.table({"l1": pace.Pace(1, 4, 0.02), "tokens": pace.Pace(7, 1, 0.014)})
    assert table.splitlines()[2:] == ["| l1 | 4 | 20.0 ms | 5.00 ms |", "| tokens | 0.14 | 14.0 ms | 14.00 ms |"]


def test_report_and_figures(tmp_path):
    environments, seeds = scenes(6)
    result = run_rollouts(Expert(environments, lazy={1}), environments, seeds, record=6)
    assert result.achieved == "lifted"
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
