"""How fast policies act: actions per forward pass of the language model, and the time of one action."""

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from openvla_jax.types import ActionSpec, Observation


@dataclasses.dataclass(frozen=True)
class Pace:
    """Of one prediction: forward passes of the language model, actions that are executed of it, and median seconds."""

    passes: int
    actions: int
    seconds: float


def passes(action: ActionSpec) -> int:
    """Returns how often the language model runs for one chunk; a cached step of decoding counts as once."""
    if action.head == "tokens":
        return action.horizon * action.dim
    return action.denoising_steps if action.head == "diffusion" else 1


def measure(policy: Any, observation: Observation, calls: int = 20) -> Pace:
    """Times `calls` predictions of one observation, preprocessing included, after one that compiles."""
    spec, times = policy.contract.action, []
    policy.predict_chunk(observation)
    for _ in range(calls):
        began = time.perf_counter()
        policy.predict_chunk(observation)
        times.append(time.perf_counter() - began)
    return Pace(passes(spec), spec.executed, float(np.median(times)))


def table(paces: Mapping[str, Pace]) -> str:
    """Returns a markdown table, a row per policy."""
    rows = [("policy", "actions per forward pass", "time of a prediction", "time of an action"), ("---",) * 4]
    for name, pace in paces.items():
        share, whole = pace.actions / pace.passes, 1e3 * pace.seconds
        rows.append((name, f"{share:.2g}", f"{whole:.1f} ms", f"{whole / pace.actions:.2f} ms"))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
