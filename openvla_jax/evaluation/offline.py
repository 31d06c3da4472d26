"""Held-out episodes through the serving path: what the policy does with the frames that a robot saw.

Unlike the trainer's validation nothing is teacher-forced, and images enter at the camera's size, as a robot sends them.
Of a chunk the first action is compared.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from openvla_jax.data import DataError, text
from openvla_jax.errors import InputError
from openvla_jax.evaluation.rollouts import PredictsChunks
from openvla_jax.tokens.actions import ActionTokenizer, normalize_actions, unnormalize_actions
from openvla_jax.types import ActionSpec, Observation, ObservationSpec

DEFAULT_OBSERVATION = ObservationSpec()
BATCH = 16
POOL = 32  # frames are picked evenly from at most this many times as many


@dataclasses.dataclass(frozen=True)
class Frame:
    """One step of an episode: what a policy is shown, images of the cameras' sizes, and the normalised action, float32
    [A].
    """

    observation: Observation
    action: np.ndarray
    episode: str
    step: int

    @property
    def image(self) -> np.ndarray:
        """uint8 [H, W, 3], of the first camera."""
        return next(iter(self.observation.images.values()))

    @property
    def instruction(self) -> str:
        return self.observation.instruction


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
    dataset: str,
    data_dir: str,
    statistics: Mapping[str, Any],
    count: int,
    split: str = "val",
    module: str = "",
    observation: ObservationSpec = DEFAULT_OBSERVATION,
    normalization: str = ActionSpec.normalization,
) -> list[Frame]:
    """`count` labelled frames, spread evenly over the split's episodes (over the first POOL * count frames of them).

    `statistics` are those of the dataset in the policy's contract, `module` the run's `data.module`; `observation` and
    `normalization` are the policy's. Raises DataError as reading does.
    """
    from openvla_jax.data import images as image_files  # TensorFlow comes with these
    from openvla_jax.data.custom import catalogue
    from openvla_jax.data.rlds import make_dataset

    if count < 1:
        raise DataError(f"frames {count}: evaluate at least 1")
    trajectories = make_dataset(
        catalogue(module)[0].get(dataset, dataset), data_dir, split, statistics=statistics,
        normalization=normalization, views=observation.cameras, load_proprio=bool(observation.state),
        state=observation.state, skip_unlabeled=True, num_parallel_reads=1,
    )  # fmt: skip
    pool: list[tuple] = []
    for trajectory in trajectories.as_numpy_iterator():
        pool.extend(_steps(trajectory, observation.cameras))
        if len(pool) >= POOL * count:
            break
    if not pool:
        raise DataError(f"dataset {dataset!r}, split {split!r}: no labelled frame; evaluate another split")
    chosen = np.unique(np.linspace(0, len(pool) - 1, min(count, len(pool))).round().astype(int))
    frames = []
    for encoded, told, state, *rest in (pool[i] for i in chosen):
        images = {name: image_files.decode(image).numpy() for name, image in encoded.items()}
        if state is not None:
            state = _raw_state(state, statistics["proprio"], observation.state, normalization)
        frames.append(Frame(Observation(images, told, state, dataset), *rest))
    return frames


def _raw_state(state: np.ndarray, rows: Mapping[str, Any], columns: Sequence[str], normalization: str) -> np.ndarray:
    """Returns a normalised state in raw units, float64 [S]; clipped, as training clips it."""
    order = [list(rows["names"]).index(name) for name in columns] if "names" in rows else list(range(len(columns)))
    own = {name: [values[i] for i in order] for name, values in rows.items() if name not in ("names", "mask")}
    return unnormalize_actions(state, own, normalization)


def _steps(trajectory: Mapping[str, Any], cameras: Sequence[str]) -> Iterator[tuple]:
    seen, length = trajectory["observation"], len(trajectory["step"])
    rows = zip(
        zip(*(seen[f"image_{camera}"] for camera in cameras), strict=True),
        trajectory["task"]["language_instruction"],
        seen.get("proprio", [None] * length),
        trajectory["action"],
        trajectory["step"],
        strict=True,
    )
    for images, instruction, state, action, step in rows:
        if all(images) and instruction.strip():
            episode = _text(trajectory["episode"])
            try:
                told = text.decode(instruction)
            except InputError as error:
                raise DataError(f"episode {episode}, step {step}: {error}") from error
            yield dict(zip(cameras, images, strict=True)), told, state, action, episode, int(step)


def _text(value: Any) -> str:
    first = np.asarray(value).reshape(-1)[0]
    return first.decode() if isinstance(first, bytes) else str(first)


def predict(policy: PredictsChunks, frames: Sequence[Frame], unnorm_key: str) -> np.ndarray:
    """float64 [N, A] in physical units of the dataset `unnorm_key`, in batches of one size."""
    actions: list[np.ndarray] = []
    for start in range(0, len(frames), BATCH):
        part = list(frames[start : start + BATCH])
        padded = part + [part[0]] * (BATCH - len(part) if start else 0)
        seen = [dataclasses.replace(frame.observation, unnorm_key=unnorm_key) for frame in padded]
        actions += [np.asarray(chunk)[0] for chunk in policy.predict_chunks(seen)[: len(part)]]
    return np.stack(actions)


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
