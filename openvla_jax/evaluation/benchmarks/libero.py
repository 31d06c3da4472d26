"""LIBERO by the reference's protocol: everything that a policy decides comes from its contract."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from openvla_jax.errors import InputError
from openvla_jax.evaluation.benchmarks.arms import Condition, Rows, conditions
from openvla_jax.evaluation.benchmarks.results import Episode
from openvla_jax.evaluation.environments.libero import LiberoEnvironment, check_spec
from openvla_jax.sim.libero.conventions import ACTION_DIM, MAX_STEPS, SEED, SETTLING_STEPS, base_suite
from openvla_jax.sim.libero.process import Simulator
from openvla_jax.types import ActionSpec, ObservationSpec


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How a policy is evaluated on a suite: the benchmark's part, and what the policy's contract says."""

    suite: str
    observation: ObservationSpec
    action: ActionSpec
    unnorm_key: str
    preprocessing: Mapping[str, Any]
    hard_reset: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Returns what results record."""
        return {
            "max_steps": MAX_STEPS[base_suite(self.suite)],
            "settling_steps": SETTLING_STEPS,
            "environment_seed": SEED,
            "hard_reset": self.hard_reset,
            "cameras": list(self.observation.cameras),
            "state": list(self.observation.state),
            "executed": self.action.executed,
            "horizon": self.action.horizon,
            "gripper": self.action.gripper,
            "unnorm_key": self.unnorm_key,
            "preprocessing": dict(self.preprocessing),
        }


def protocol_of(
    info: Mapping[str, Any], suite: str, unnorm_key: str | None = None, hard_reset: bool = True
) -> Protocol:
    """Returns how a policy is evaluated on a suite.

    Args:
        info: Of the policy: observation, action, preprocessing, statistics.
        suite: Its name.
        unnorm_key: The dataset whose statistics count; None for the suite's own, with or without "_no_noops".
        hard_reset: Whether each episode builds the simulation anew.

    Raises:
        InputError: The policy cannot act in LIBERO: other cameras, state, actions or datasets.
    """
    observation, action = ObservationSpec.from_dict(info["observation"]), ActionSpec.from_dict(info["action"])
    statistics = info["statistics"]
    base = base_suite(suite)
    check_spec(observation)
    names = [base, f"{base}_no_noops"] if unnorm_key is None else [unnorm_key]
    key = next((name for name in names if name in statistics), None)
    if key is None:
        raise InputError(
            f"the policy has statistics of {', '.join(statistics)}, not of {' or '.join(names)}: evaluate a policy "
            "that was trained on the suite, or name its dataset with --unnorm_key"
        )
    width = len(next(iter(statistics[key]["action"].values())))
    if width != ACTION_DIM:
        raise InputError(f"the policy's actions of {key!r} have {width} numbers: LIBERO takes {ACTION_DIM}")
    if action.frame not in ("delta", ""):
        raise InputError(
            f"the policy's actions are {action.frame!r}: LIBERO takes changes of the end effector, 'delta'"
        )
    if not action.gripper:
        raise InputError("nothing says what 1 means for the policy's gripper: set action.gripper of its checkpoint")
    return Protocol(suite, observation, action, key, dict(info.get("preprocessing") or {}), hard_reset)


def identity(info: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Returns what results record of a policy: its name, and a digest of what it says of itself."""
    said = {key: info.get(key) for key in ("observation", "action", "preprocessing", "statistics", "training")}
    text = json.dumps(said, sort_keys=True, default=str)
    return {"name": name, "contract": hashlib.sha256(text.encode()).hexdigest()[:16]}


class Suites:
    """The tasks of suites, as a simulator has them."""

    def __init__(self, simulator: Simulator):
        self._simulator = simulator
        self._rows: dict[str, Rows] = {}

    def __call__(self, suite: str) -> Rows:
        """Returns the tasks of a suite. Raises InputError for an unknown one."""
        if suite not in self._rows:
            self._rows[suite] = self._simulator.ask("suite", suite=suite)["tasks"]
        return self._rows[suite]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which episodes an evaluation has. `conditions` are those of every task, by arm."""

    conditions: Mapping[str, Sequence[Condition]]
    tasks: Sequence[int]
    states: Sequence[int]
    shard: tuple[int, int] = (0, 1)

    @classmethod
    def make(
        cls,
        ask: Suites,
        suite: str,
        arms: Sequence[str],
        tasks: Sequence[int] | None,
        states: Sequence[int],
        shard: tuple[int, int] = (0, 1),
    ) -> "Plan":
        """Returns the plan of a suite; None stands for all of its tasks.

        Raises InputError for an unknown suite, arm, task or state.
        """
        found = conditions(ask, suite, arms)
        count = len(ask(suite))
        tasks = range(count) if tasks is None else tasks
        for task in tasks:
            if task >= count:
                raise InputError(f"task {task}: suite {suite!r} has tasks 0 to {count - 1}")
        for rows in found.values():
            for task in tasks:
                if max(states) >= rows[task].states:
                    raise InputError(
                        f"state {max(states)}: task {task} of {rows[task].suite!r} has states 0 to "
                        f"{rows[task].states - 1}; choose others with --states"
                    )
        return cls(found, list(tasks), list(states), shard)

    @cached_property
    def episodes(self) -> list[Episode]:
        """This shard's episodes, task by task, because a task is built once: the arms of a task share most of it."""
        every = [Episode(arm, task, state) for task in self.tasks for arm in self.conditions for state in self.states]
        index, count = self.shard
        return every[len(every) * index // count : len(every) * (index + 1) // count]

    def to_dict(self) -> dict[str, Any]:
        """Returns what results record."""
        return {"arms": list(self.conditions), "tasks": list(self.tasks), "states": list(self.states)}

    def environment(self, protocol: Protocol, simulator: Simulator, episode: Episode) -> LiberoEnvironment:
        """Returns the environment of an episode."""
        condition = self.conditions[episode.arm][episode.task]
        return LiberoEnvironment(
            simulator,
            condition.suite,
            condition.task,
            condition.instruction,
            protocol.observation,
            gripper=protocol.action.gripper,
            blank=condition.blank,
            unnorm_key=protocol.unnorm_key,
            hard_reset=protocol.hard_reset,
        )


def shard_of(text: str) -> tuple[int, int]:
    """Returns (index, count) of "0/4". Raises InputError for another form."""
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise InputError(f"shard {text!r}: give i/n with i from 0 to n - 1, as 0/4")
    return int(index), int(count)
