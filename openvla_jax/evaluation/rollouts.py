"""Closed-loop rollouts in the tabletop world, all scenes in parallel, and success rates with Wilson intervals."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from openvla_jax.sim.tabletop import Tabletop

MAX_STEPS = 12  # the expert needs about 5
# Evaluation scenes have seeds 0, 1, 2, ...: far below those of the training data.
FIRST_SEED = 0


@runtime_checkable
class ActsOnImages(Protocol):
    """What rollouts need of a policy."""

    def predict_actions(self, images: Sequence[np.ndarray], instructions: Sequence[str]) -> np.ndarray:
        """Actions [B, 7] for images uint8 [H, W, 3] and their instructions."""


@dataclass(frozen=True)
class Rollouts:
    """The outcome of one condition. `frames` and `instructions` are kept for the first scenes only."""

    success: np.ndarray  # bool [N]
    steps: np.ndarray  # int [N]: actions until success, MAX_STEPS where there was none
    instructions: list[str]
    frames: list[np.ndarray]  # each uint8 [steps + 1, H, W, 3]

    @property
    def rate(self) -> float:
        return float(self.success.mean())

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson 95% interval of the success rate."""
        return wilson_interval(int(self.success.sum()), len(self.success))


def wilson_interval(successes: int, trials: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson 1927): the rates that a score test at `z` does not reject.

    ValueError unless 0 <= successes <= trials and trials > 0.
    """
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"{successes} successes of {trials} trials: expected 0 <= successes <= trials, trials >= 1")
    rate = successes / trials
    center = rate + z * z / (2 * trials)
    margin = z * math.sqrt(rate * (1 - rate) / trials + (z / (2 * trials)) ** 2)
    scale = 1 + z * z / trials
    # Without successes the lower bound is 0, and rounding must not move it; likewise 1 without failures.
    low = (center - margin) / scale if successes else 0.0
    high = (center + margin) / scale if successes < trials else 1.0
    return low, high


def run_rollouts(
    policy: ActsOnImages,
    worlds: Sequence[Tabletop],
    *,
    instruct: Callable[[Tabletop], str] = lambda world: world.instruction,
    image_size: int = 48,
    max_steps: int = MAX_STEPS,
    record: int = 0,
) -> Rollouts:
    """Runs every world to its success or to `max_steps`. The policy sees all scenes in each call, finished ones
    included, so that its batch has one shape and one program is compiled.

    `instruct` gives the sentence that the policy reads; success is always that of the scene's own target.
    `record` is the number of scenes whose frames are kept. The worlds are changed.
    """
    instructions = [instruct(world) for world in worlds]
    success = np.zeros(len(worlds), bool)
    steps = np.full(len(worlds), max_steps)
    images = [world.render(image_size) for world in worlds]
    frames = [[image] for image in images[:record]]
    for step in range(1, max_steps + 1):
        actions = policy.predict_actions(images, instructions)
        for index in map(int, np.flatnonzero(~success)):
            if worlds[index].step(actions[index]):
                success[index], steps[index] = True, step
            images[index] = worlds[index].render(image_size)
            if index < record:
                frames[index].append(images[index])
        if success.all():
            break
    return Rollouts(success, steps, instructions[:record], [np.stack(episode) for episode in frames])


class RandomPolicy:
    """Actions uniform between the 1% and 99% quantiles of the training data's actions, the gripper between 0 and 1."""

    def __init__(self, action_statistics: Mapping[str, Sequence[float]], seed: int = 0):
        mask = np.asarray(action_statistics.get("mask", [True] * 7))
        self.low = np.where(mask, action_statistics["q01"], 0.0)
        self.high = np.where(mask, action_statistics["q99"], 1.0)
        self.rng = np.random.default_rng(seed)

    def predict_actions(self, images, instructions):
        return self.rng.uniform(self.low, self.high, (len(images), len(self.low)))


class BlankedPolicy:
    """The given policy with every image black: what it can do from the instruction alone."""

    def __init__(self, policy: ActsOnImages):
        self.policy = policy

    def predict_actions(self, images, instructions):
        return self.policy.predict_actions([np.zeros_like(image) for image in images], instructions)


def misnamed(world: Tabletop) -> str:
    """The instruction for another object of the same scene: what is left of success if words are ignored."""
    return world.scene.instruction((world.scene.target + 1) % len(world.scene.colors))


def evaluate(
    policy: Any,
    episodes: int,
    *,
    controls: bool = False,
    image_size: int = 48,
    first_seed: int = FIRST_SEED,
    record: int = 8,
    action_statistics: Mapping[str, Any] | None = None,
    world: str = "tabletop",
) -> dict[str, Rollouts]:
    """Rollouts of `policy` by condition on the scenes first_seed ... first_seed + episodes - 1 of `world`.

    Conditions: "policy", and with `controls` also "another object named", "image blanked" and "random actions". The
    last draws from `action_statistics`; by default they are those of `policy.contract.statistics`, of one dataset.
    """
    if episodes < 1:
        raise ValueError(f"episodes {episodes}: evaluate at least 1")

    def worlds():
        return [Tabletop(seed, world) for seed in range(first_seed, first_seed + episodes)]

    results = {"policy": run_rollouts(policy, worlds(), image_size=image_size, record=record)}
    if controls:
        if action_statistics is None:
            (statistics,) = policy.contract.statistics.values()
            action_statistics = statistics["action"]
        results["another object named"] = run_rollouts(policy, worlds(), instruct=misnamed, image_size=image_size)
        results["image blanked"] = run_rollouts(BlankedPolicy(policy), worlds(), image_size=image_size)
        results["random actions"] = run_rollouts(RandomPolicy(action_statistics), worlds(), image_size=image_size)
    return results
