"""Closed-loop rollouts of many episodes at once, and success rates with Wilson intervals."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from openvla_jax.errors import InputError
from openvla_jax.evaluation.environments.tabletop import TabletopEnvironment, misnamed
from openvla_jax.types import Environment, Observation

# Evaluation scenes have seeds 0, 1, 2, ...: far below those of the training data.
FIRST_SEED = 0


@runtime_checkable
class PredictsChunks(Protocol):
    """What rollouts need of a policy: `openvla_jax.Policy` and `inference.client.Client` have it."""

    def predict_chunks(self, observations: Sequence[Observation]) -> Any:
        """Returns the next actions of each episode, float [B, K, A]."""


@dataclass(frozen=True)
class Rollouts:
    """The outcome of one condition. `frames` and `instructions` are kept for the first episodes only."""

    success: np.ndarray  # bool [N]
    steps: np.ndarray  # int [N]: actions until success, or `max_steps` without it
    instructions: list[str]
    frames: list[np.ndarray]  # each uint8 [steps + 1, H, W, 3], of the first camera
    achieved: str = "succeeded"  # what a success is called

    @property
    def rate(self) -> float:
        """Share of the episodes that succeeded."""
        return float(self.success.mean())

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson 95% interval of the success rate."""
        return wilson_interval(int(self.success.sum()), len(self.success))


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """Returns the Wilson score interval of a proportion, 95% (Wilson 1927).

    Raises InputError unless 0 <= successes <= trials and trials > 0.
    """
    from scipy.stats import binomtest  # takes a second to import, and most users of this module need none

    if not 0 <= successes <= trials or trials < 1:
        raise InputError(f"{successes} successes of {trials} trials: expected 0 <= successes <= trials, trials >= 1")
    low, high = binomtest(successes, trials).proportion_ci(method="wilson")
    return float(low), float(high)


def run_rollouts(
    policy: PredictsChunks,
    environments: Sequence[Environment],
    seeds: Sequence[int],
    *,
    record: int = 0,
    executed: int = 1,
) -> Rollouts:
    """Runs an episode in every environment, to its end or to `max_steps`.

    The policy sees all episodes in each call, finished ones included, so that its batch has one shape and one program
    is compiled.

    Args:
        policy: Predicts the next actions of all episodes.
        environments: One per episode; they are changed.
        seeds: The episode that each environment begins.
        record: Number of episodes whose frames are kept.
        executed: Actions of a chunk that are executed before the policy is asked again.

    Raises InputError if chunks are shorter than that.
    """
    observations = [environment.reset(seed) for environment, seed in zip(environments, seeds, strict=True)]
    instructions = [observation.instruction for observation in observations[:record]]
    success, done = np.zeros(len(environments), bool), np.zeros(len(environments), bool)
    steps = np.array([environment.max_steps for environment in environments])
    frames = [[_picture(observation)] for observation in observations[:record]]
    for step in range(max(steps)):
        if step % executed == 0:
            chunks = policy.predict_chunks(observations)
            if (length := min(map(len, chunks))) < executed:
                raise InputError(
                    f"the policy predicts {length} actions at once, of which {executed} are to be executed"
                )
        for i in map(int, np.flatnonzero(~done)):
            observations[i], done[i], success[i] = environments[i].step(chunks[i][step % executed])
            if success[i]:
                steps[i] = step + 1
            done[i] |= success[i] or step + 1 >= environments[i].max_steps
            if i < record:
                frames[i].append(_picture(observations[i]))
        if done.all():
            break
    achieved = getattr(environments[0], "achieved", "succeeded")
    return Rollouts(success, steps, instructions, [np.stack(episode) for episode in frames], achieved)


def _picture(observation: Observation) -> np.ndarray:
    return next(iter(observation.images.values()))


class RandomPolicy:
    """Actions uniform between the 1% and 99% quantiles of the training data's actions, the gripper between 0 and 1."""

    def __init__(self, action_statistics: Mapping[str, Sequence[float]], executed: int = 1, seed: int = 0):
        mask = np.asarray(action_statistics.get("mask", [True] * len(action_statistics["q01"])))
        self.low = np.where(mask, action_statistics["q01"], 0.0)
        self.high = np.where(mask, action_statistics["q99"], 1.0)
        self.executed, self.rng = executed, np.random.default_rng(seed)

    def predict_chunks(self, observations: Sequence[Observation]) -> np.ndarray:
        """Returns float64 [B, executed, A]."""
        return self.rng.uniform(self.low, self.high, (len(observations), self.executed, len(self.low)))


class BlankedPolicy:
    """The given policy with images black, of one camera or of all: what it can do without them."""

    def __init__(self, policy: PredictsChunks, camera: str | None = None):
        self.policy, self.camera = policy, camera

    def predict_chunks(self, observations: Sequence[Observation]) -> Any:
        """Returns what the policy answers to black images."""
        hidden = lambda name: self.camera in (None, name)
        blank = lambda images: {name: np.zeros_like(x) if hidden(name) else x for name, x in images.items()}
        return self.policy.predict_chunks([dataclasses.replace(o, images=blank(o.images)) for o in observations])


class StatelessPolicy:
    """The given policy with a state of zeros: what it can do from the images alone."""

    def __init__(self, policy: PredictsChunks):
        self.policy = policy

    def predict_chunks(self, observations: Sequence[Observation]) -> Any:
        """Returns what the policy answers to a state of zeros."""
        return self.policy.predict_chunks([dataclasses.replace(o, state=np.zeros_like(o.state)) for o in observations])


def evaluate(
    policy: Any,
    episodes: int,
    *,
    controls: bool = False,
    first_seed: int = FIRST_SEED,
    record: int = 8,
    action_statistics: Mapping[str, Any] | None = None,
    executed: int | None = None,
    world: str = "tabletop",
) -> dict[str, Rollouts]:
    """Rolls `policy` out, by condition, on the scenes first_seed ... first_seed + episodes - 1 of the tabletop.

    Conditions: "policy", and with `controls` also "another object named", "image blanked" and "random actions"; in the
    world "wrist" also "camera on the wrist blanked" and "state zeroed". Random actions are drawn from
    `action_statistics`. These and `executed` default to what `policy.contract` says, of one dataset. Raises InputError
    for less than one episode.
    """
    if episodes < 1:
        raise InputError(f"episodes {episodes}: evaluate at least 1")
    if executed is None:
        executed = policy.contract.action.executed
    seeds = range(first_seed, first_seed + episodes)

    def run(policy: PredictsChunks, record: int = 0, **settings: Callable) -> Rollouts:
        environments = [TabletopEnvironment(world, **settings) for _ in seeds]
        return run_rollouts(policy, environments, seeds, record=record, executed=executed)

    results = {"policy": run(policy, record)}
    if controls:
        if action_statistics is None:
            (statistics,) = policy.contract.statistics.values()
            action_statistics = statistics["action"]
        results["another object named"] = run(policy, instruct=misnamed)
        results["image blanked"] = run(BlankedPolicy(policy))
        if TabletopEnvironment(world).spec.state:
            results["camera on the wrist blanked"] = run(BlankedPolicy(policy, "wrist"))
            results["state zeroed"] = run(StatelessPolicy(policy))
        results["random actions"] = run(RandomPolicy(action_statistics, executed))
    return results
