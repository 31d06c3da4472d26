"""Which action is next: the first ones of a chunk, or the mean of what several chunks planned for this moment."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from openvla_client.errors import ClientError


class ActionQueue:
    """Executes the first actions of a policy's chunk, then asks for the next chunk.

    Args:
        policy: has `predict_chunk(observation)`, which returns float [K, A], as `Client` and `openvla_jax.Policy`.
        execute: how many actions of a chunk are executed, 1 to K; None: all of them.
        ensemble: None, or m of temporal ensembling as in ACT (Zhao et al. 2023, arXiv 2304.13705, section IV): the
            action is the mean of what all chunks so far planned for this moment, weighted by exp(-m * i), with i = 0
            for the oldest chunk. ACT plans at every step (execute=1), with m = 0.01. All dimensions are averaged, a
            gripper's too.

    Raises ClientError for a wrong setting.
    """

    def __init__(self, policy: Any, execute: int | None = None, ensemble: float | None = None):
        if execute is not None and (isinstance(execute, bool) or not isinstance(execute, int) or execute < 1):
            raise ClientError(f"execute {execute!r}: give a whole number of at least 1, or None")
        if ensemble is not None and not math.isfinite(ensemble):
            raise ClientError(f"ensemble {ensemble!r}: give a finite number as 0.01, or None")
        self.policy, self.execute, self.ensemble = policy, execute, ensemble
        self.reset()

    def reset(self) -> None:
        """Forgets what was planned: an episode begins."""
        self._step = 0
        self._chunks: list[tuple[int, np.ndarray]] = []  # (step of the first action, actions), oldest first

    @property
    def empty(self) -> bool:
        """Whether `next` asks the policy, and so needs an observation."""
        if not self._chunks:
            return True
        begun, chunk = self._chunks[-1]
        return self._step - begun >= (self.execute or len(chunk))

    def next(self, observation: Any = None) -> np.ndarray:
        """Returns the next action, float64 [A].

        observation: what the policy takes; it is looked at only if the queue is `empty`.

        Raises ClientError for an empty queue without observation, or a chunk that is shorter than `execute`, and what
        the policy raises. The queue is then as before.
        """
        if self.empty:
            if observation is None:
                raise ClientError("the queue is empty: give an observation")
            self._plan(np.asarray(self.policy.predict_chunk(observation), np.float64))
        planned = np.stack([chunk[self._step - begun] for begun, chunk in self._chunks])
        weights = np.exp(-(self.ensemble or 0.0) * np.arange(len(planned)))
        self._step += 1
        self._chunks = [(begun, chunk) for begun, chunk in self._chunks if self._step - begun < len(chunk)]
        return weights @ planned / weights.sum()

    def _plan(self, chunk: np.ndarray) -> None:
        if chunk.ndim != 2 or len(chunk) < (self.execute or 1):
            raise ClientError(f"execute {self.execute}: the policy's chunk has shape {chunk.shape}, give at most K")
        kept = [] if self.ensemble is None else self._chunks
        if kept and kept[-1][1].shape[1] != chunk.shape[1]:
            raise ClientError(f"an action of {chunk.shape[1]} numbers after others: reset() between episodes")
        self._chunks = [*kept, (self._step, chunk)]
