"""What quantisation costs and saves: memory, agreement of action tokens, error in physical units, latency."""

import dataclasses
import gc
import time
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from openvla_jax.evaluation import offline
from openvla_jax.evaluation.offline import Frame
from openvla_jax.evaluation.rollouts import Rollouts, evaluate
from openvla_jax.inference.policy import Policy
from openvla_jax.models.quantize import EXCLUDE, KINDS, count_bytes


@dataclasses.dataclass(frozen=True)
class Row:
    """One way to store the weights; `agreement` and `l1` are against the first row, of which they say nothing."""

    name: str
    bytes: int
    agreement: float
    l1: np.ndarray  # [A], the dataset's units
    seconds: float  # median of one action
    rollouts: Rollouts | None


def measure(
    checkpoint: str,
    frames: Mapping[str, Sequence[Frame]],
    kinds: Sequence[str] = tuple(KINDS),
    *,
    dtype: str | None = None,
    exclude: Sequence[str] = EXCLUDE,
    episodes: int = 0,
    timed: int = 20,
) -> list[Row]:
    """A row for full precision and one for each kind; `frames` by dataset. One policy is in memory at a time.

    With `episodes` each also runs that many scenes of the embedded tabletop world.
    """
    rows: list[Row] = []
    reference: dict[str, np.ndarray] = {}
    for kind in (None, *kinds):
        policy = Policy.from_checkpoint(checkpoint, dtype, kind, exclude=exclude)
        spec = policy.contract.action
        actions, equal, differences = {}, [], []
        for key, rows_of_key in frames.items():
            actions[key] = offline.predict(policy, rows_of_key, key)
            statistics = policy.contract.statistics[key]["action"]
            base = reference.setdefault(key, actions[key])
            tokens = [
                offline.token_bins(offline.normalize_actions(values, statistics, spec.normalization), spec.bins)
                for values in (actions[key], base)
            ]
            equal.append((tokens[0] == tokens[1]).ravel())
            differences.append(np.abs(actions[key] - base).mean(axis=0))
        name = kind or str(policy.model.dtype)
        l1 = np.mean(differences, axis=0) if len({len(d) for d in differences}) == 1 else differences[0]
        rollouts = evaluate(policy, episodes)["policy"] if episodes else None
        agreement, seconds = float(np.concatenate(equal).mean()), latency(policy, frames, timed)
        rows.append(Row(name, count_bytes(policy.model), agreement, l1, seconds, rollouts))
        del policy
        gc.collect()
        jax.clear_caches()  # compiled programs hold on to weights
    return rows


def latency(policy: Policy, frames: Mapping[str, Sequence[Frame]], times: int) -> float:
    """Median seconds of one action, batch 1."""
    rows = next(iter(frames.values()))
    took = []
    for i in range(times + 1):
        frame = rows[i % len(rows)]
        began = time.perf_counter()
        policy.predict_chunk(frame.observation)
        took.append(time.perf_counter() - began)
    return float(np.median(took[1:]))


def table(rows: Sequence[Row]) -> str:
    """Markdown, one line per row."""
    first = rows[0]
    lines = [
        f"| weights | memory | of {first.name} | tokens as {first.name} | L1 by dimension | ms per action | success |",
        "| --- " * 7 + "|",
    ]
    for row in rows:
        l1 = " ".join(f"{value:.2g}" for value in row.l1)
        success = "-"
        if row.rollouts is not None:
            low, high = row.rollouts.interval
            success = f"{row.rollouts.success.sum()}/{len(row.rollouts.success)} ({low:.0%} to {high:.0%})"
        lines.append(
            f"| {row.name} | {row.bytes / 1e6:,.2f} MB | {row.bytes / first.bytes:.3f}x | {row.agreement:.1%} | {l1} "
            f"| {1e3 * row.seconds:.1f} | {success} |"
        )
    return "\n".join(lines)
