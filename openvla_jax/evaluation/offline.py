"""Held-out episodes through the serving path: what the policy does with the frames that a robot saw.

Unlike the trainer's validation nothing is teacher-forced, and images enter at the camera's size, as a robot sends them.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from openvla_jax.data import DataError, text
from openvla_jax.errors import InputError
from openvla_jax.tokens.actions import ActionTokenizer, normalize_actions, unnormalize_actions
from openvla_jax.types import ActionSpec

BATCH = 16
POOL = 32  # frames are picked evenly from at most this many times as many


@runtime_checkable
class PredictsActions(Protocol):
    """What evaluation needs of a policy: `openvla_jax.Policy` and `inference.client.Client` have it."""

    def predict_actions(
        self, images: Sequence[np.ndarray], instructions: Sequence[str], unnorm_keys: Sequence[str | None] | None = None
    ) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Frame:
    """One step of an episode: image uint8 [H, W, 3] of the camera's size, normalised action float32 [A]."""

    image: np.ndarray
    instruction: str
    action: np.ndarray
    episode: str
    step: int


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Actions in physical units [N, A] of one dataset, and the bin of each value."""

    predicted: np.ndarray
    true: np.ndarray
    predicted_bins: np.ndarray
    true_bins: np.ndarray

    @property
    def accuracy(self) -> float:
        """Share of the values in the right bin."""
        return float((self.predicted_bins == self.true_bins).mean())

    @property
    def accuracy_by_dimension(self) -> np.ndarray:
        return (self.predicted_bins == self.true_bins).mean(axis=0)

    @property
    def l1_by_dimension(self) -> np.ndarray:
        """Mean absolute difference, in the dataset's units."""
        return np.abs(self.predicted - self.true).mean(axis=0)


def held_out_frames(
    dataset: str, data_dir: str, statistics: Mapping[str, Any], count: int, split: str = "val", module: str = ""
) -> list[Frame]:
    """`count` labelled frames, spread evenly over the split's episodes (over the first POOL * count frames of them).

    `statistics` are those of the dataset in the policy's contract, `module` the run's `data.module`. Raises
    DataError as reading does.
    """
    from openvla_jax.data import images as image_files  # TensorFlow comes with these
    from openvla_jax.data.custom import catalogue
    from openvla_jax.data.rlds import make_dataset

    if count < 1:
        raise DataError(f"frames {count}: evaluate at least 1")
    trajectories = make_dataset(
        catalogue(module)[0].get(dataset, dataset), data_dir, split, statistics=statistics, load_proprio=False,
        skip_unlabeled=True, num_parallel_reads=1,
    )  # fmt: skip
    pool: list[tuple] = []
    for trajectory in trajectories.as_numpy_iterator():
        pool.extend(_steps(trajectory))
        if len(pool) >= POOL * count:
            break
    if not pool:
        raise DataError(f"dataset {dataset!r}, split {split!r}: no labelled frame; evaluate another split")
    chosen = np.unique(np.linspace(0, len(pool) - 1, min(count, len(pool))).round().astype(int))
    return [Frame(image_files.decode(encoded).numpy(), *rest) for encoded, *rest in (pool[i] for i in chosen)]


def _steps(trajectory: Mapping[str, Any]) -> Iterator[tuple]:
    rows = zip(
        trajectory["observation"]["image_primary"],
        trajectory["task"]["language_instruction"],
        trajectory["action"],
        trajectory["step"],
        strict=True,
    )
    for image, instruction, action, step in rows:
        if image and instruction.strip():
            episode = _text(trajectory["episode"])
            try:
                told = text.decode(instruction)
            except InputError as error:
                raise DataError(f"episode {episode}, step {step}: {error}") from error
            yield image, told, action, episode, int(step)


def _text(value: Any) -> str:
    first = np.asarray(value).reshape(-1)[0]
    return first.decode() if isinstance(first, bytes) else str(first)


def predict(policy: PredictsActions, frames: Sequence[Frame], unnorm_key: str) -> np.ndarray:
    """float64 [N, A] in physical units, in batches of one size."""
    actions = []
    for start in range(0, len(frames), BATCH):
        part = list(frames[start : start + BATCH])
        padded = part + [part[0]] * (BATCH - len(part) if start else 0)
        images, instructions = [frame.image for frame in padded], [frame.instruction for frame in padded]
        actions.append(np.stack(policy.predict_actions(images, instructions, [unnorm_key] * len(padded)))[: len(part)])
    return np.concatenate(actions)


def compare(
    predicted: np.ndarray, frames: Sequence[Frame], statistics: Mapping[str, Any], spec: ActionSpec
) -> Comparison:
    """Returns predictions beside what was done.

    The true actions are un-normalised from the training targets, so they are clipped to what tokens can say.
    """
    true = np.stack([frame.action for frame in frames]).astype(np.float64)
    physical = unnormalize_actions(true, statistics, spec.normalization)
    normalized = normalize_actions(predicted, statistics, spec.normalization)
    return Comparison(predicted, physical, token_bins(normalized, spec.bins), token_bins(true, spec.bins))


def token_bins(normalized: np.ndarray, bins: int) -> np.ndarray:
    """Returns the bin of each normalised value. The top bin's two ids decode to one value and count as one."""
    tokenizer = ActionTokenizer(bins=bins)
    return np.minimum(tokenizer.last_token - tokenizer.encode(normalized), tokenizer.bins - 2)


def table(results: Mapping[str, Comparison]) -> str:
    """Markdown: accuracy and L1, over all dimensions and for each."""
    lines = ["| dataset | frames | dimension | token accuracy | L1 (dataset's units) |", "| --- " * 5 + "|"]
    for name, result in results.items():
        count = len(result.true)
        lines.append(f"| {name} | {count} | all | {result.accuracy:.1%} | {result.l1_by_dimension.mean():.4g} |")
        for i, (accuracy, l1) in enumerate(zip(result.accuracy_by_dimension, result.l1_by_dimension, strict=True)):
            lines.append(f"| {name} | {count} | {i} | {accuracy:.1%} | {l1:.4g} |")
    return "\n".join(lines)
