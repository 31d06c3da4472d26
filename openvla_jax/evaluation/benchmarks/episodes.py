"""Runs the episodes of a benchmark: several simulators side by side, one policy that is asked for all of them at once.

Each simulator has a lane. In every round the policy sees the lanes that act, in one batch, and each lane executes its
chunk open loop in a thread of its own. A lane whose simulator fails begins its episode again in a new process.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from openvla_jax.errors import InputError
from openvla_jax.evaluation.benchmarks.results import Episode, Outcome
from openvla_jax.evaluation.environments.libero import LiberoEnvironment
from openvla_jax.evaluation.rollouts import PredictsChunks
from openvla_jax.sim.libero.process import Simulator, SimulatorError
from openvla_jax.types import Observation

ATTEMPTS = 3  # of one episode, before the simulator is given up
FILM_EVERY = 4  # steps between the frames of a film

Build = Callable[[Simulator, Episode], LiberoEnvironment]
Finished = Callable[[Outcome, list[np.ndarray]], None]


@dataclasses.dataclass
class CpuSeconds:
    """Where a run's processor time went."""

    policy: float = 0.0  # predicting, in this process
    evaluator: float = 0.0  # everything else in this process
    simulator: float = 0.0  # the simulators' processes

    @property
    def overhead(self) -> float:
        """The evaluator's share of all processor time."""
        return self.evaluator / max(self.policy + self.evaluator + self.simulator, 1e-9)


class Lane:
    """One simulator and the episode that it is in."""

    def __init__(self, simulator: Simulator, build: Build, filmed: frozenset[Episode] = frozenset()):
        self.simulator, self.build, self.filmed = simulator, build, filmed
        self.episode: Episode | None = None
        self.outcome: Outcome | None = None
        self.observation: Observation

    def begin(self, episode: Episode) -> None:
        """Resets to the start of an episode. Raises InputError if the simulator fails several times."""
        self.episode, self.outcome, self.redone = episode, None, 0
        self.began = time.perf_counter()
        self.environment = self.build(self.simulator, episode)
        try:
            self._reset()
        except SimulatorError as error:
            self._redo(error)

    def advance(self, chunk: np.ndarray) -> None:
        """Executes actions [n, 7] until the episode ends; sets `outcome` if it did."""
        try:
            for action in chunk:
                self.observation, _, success = self.environment.step(action)
                self.steps += 1
                ended = success or self.steps >= self.environment.max_steps
                self._film(ended)
                if ended:
                    self._end(success)
                    return
        except SimulatorError as error:
            self._redo(error)

    def look(self) -> None:
        """Renders the observation, here and not in the policy: beside other lanes, and begun again if it fails."""
        while True:
            try:
                self.observation = dataclasses.replace(self.observation, images=dict(self.observation.images))
                return
            except SimulatorError as error:
                self._redo(error)

    def _reset(self) -> None:
        before = self.simulator.cpu_seconds
        assert self.episode is not None
        self.observation = self.environment.reset(self.episode.state)
        self.steps, self.frames, self.cpu_began = 0, [], before
        self._film(True)

    def _redo(self, error: SimulatorError) -> None:
        assert self.episode is not None
        while True:
            self.redone += 1
            if self.redone == ATTEMPTS:
                where = f"task {self.environment.task}, state {self.episode.state} of {self.environment.suite}"
                raise InputError(f"{error}: {ATTEMPTS} times in {where}; run the command again to go on") from error
            try:
                return self._reset()
            except SimulatorError as again:
                error = again

    def _film(self, due: bool) -> None:
        if self.episode in self.filmed and (due or self.steps % FILM_EVERY == 0):
            self.frames.append(self.environment.frame("primary"))

    def _end(self, success: bool) -> None:
        assert self.episode is not None
        self.outcome = Outcome(
            *self.episode,
            success=success,
            steps=self.steps,
            instruction=self.environment.instruction,
            redone=self.redone,
            cpu_seconds=round(self.simulator.cpu_seconds - self.cpu_began, 3),
            seconds=round(time.perf_counter() - self.began, 3),
        )


def run_episodes(
    policy: PredictsChunks, lanes: Sequence[Lane], episodes: Sequence[Episode], executed: int, finished: Finished
) -> CpuSeconds:
    """Runs every episode; returns where the processor time went.

    Args:
        policy: Predicts chunks; it is always asked for as many observations as there are lanes, so that one program
            is compiled.
        lanes: One per simulator.
        episodes: In the order in which they begin.
        executed: Actions of a chunk that are executed before the policy is asked again.
        finished: Is given each outcome, and the frames of a filmed episode.

    Raises:
        InputError: The policy's chunks are shorter than that; a simulator fails again and again.
    """
    pending = list(reversed(episodes))
    spent = CpuSeconds()
    began, simulated = time.process_time(), sum(lane.simulator.cpu_seconds for lane in lanes)
    with ThreadPoolExecutor(len(lanes)) as pool:
        while True:
            idle = [lane for lane in lanes if lane.episode is None]
            starting = [(lane, pending.pop()) for lane in idle if pending]
            list(pool.map(lambda pair: pair[0].begin(pair[1]), starting))
            acting = [lane for lane in lanes if lane.episode is not None]
            if not acting:
                break
            list(pool.map(Lane.look, acting))
            rows = [lane.observation for lane in acting]
            before = time.process_time()
            chunks = policy.predict_chunks(rows + rows[:1] * (len(lanes) - len(rows)))
            spent.policy += time.process_time() - before
            if (length := min(map(len, chunks))) < executed:
                raise InputError(
                    f"the policy predicts {length} actions at once, of which {executed} are to be executed"
                )
            list(pool.map(Lane.advance, acting, [np.asarray(chunk)[:executed] for chunk in chunks[: len(acting)]]))
            for lane in acting:
                if lane.outcome is not None:
                    finished(lane.outcome, lane.frames)
                    lane.episode = None
    spent.evaluator = time.process_time() - began - spent.policy
    spent.simulator = sum(lane.simulator.cpu_seconds for lane in lanes) - simulated
    return spent
