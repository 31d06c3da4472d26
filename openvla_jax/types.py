"""The types that cross the layers of the package: observations, batches, the parts of a contract, environments."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from openvla_jax.config import CONTINUOUS_HEADS, HEADS, from_dict, nearest
from openvla_jax.errors import InputError

NORMALIZATIONS = ("bounds_q99", "bounds", "normal")
KERNELS = ("lanczos3", "bicubic")


@dataclasses.dataclass(frozen=True, eq=False)
class Observation:
    """What a policy sees at one moment.

    images: uint8 [height, width, 3] RGB by camera name; the first is the main camera. instruction: what to do. state:
    float [S], proprioception in raw units, in the order of `ObservationSpec.state`; None if there is none. unnorm_key:
    the dataset whose statistics scale the state and the action; None for the checkpoint's own.
    """

    images: Mapping[str, np.ndarray]
    instruction: str
    state: np.ndarray | None = None
    unnorm_key: str | None = None


class Batch(NamedTuple):
    """The arrays of one training step; rows of one host, or of all after `global_batch`.

    B rows, C cameras in the order of `ObservationSpec.cameras`, H = W the model's image size, T text tokens, K steps of
    an action chunk, A the largest action dimension of the mixture, N = K * A + 1 (the end token) predicted positions, S
    columns of the state. Positions count text tokens; `SequenceLayout` adds the prefix.
    """

    images: Any  # uint8 [B, C, H, W, 3]
    image_mask: Any  # bool [B, C], False for a camera that the row's dataset does not have
    state: Any  # float32 [B, S], normalised; None without state
    tokens: Any  # int32 [B, T], right-padded
    target_positions: Any  # int32 [B, N], where `tokens` holds what is to be predicted
    target_mask: Any  # bool [B, N], False if a row has fewer targets
    actions: Any  # float32 [B, K, A], normalised
    action_mask: Any  # bool [B, K, A], False for dimensions that the row's dataset does not have
    dataset: Any  # int32 [B], index into dataset_names


@dataclasses.dataclass(frozen=True)
class ObservationSpec:
    """What a policy must be shown.

    cameras: names, in the order in which their patches stand in the sequence. rotation: degrees (0, 90, 180 or 270,
    counter-clockwise) by which an environment's frames must be turned to stand as in the training data. state: the
    names of the state's columns, in order; empty if the policy sees no state.
    """

    cameras: tuple[str, ...] = ("primary",)
    rotation: int = 0
    state: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.cameras, str) or not self.cameras or len(set(self.cameras)) != len(self.cameras):
            raise InputError(f"observation.cameras is {self.cameras}: give at least one name, each once")
        if self.rotation not in (0, 90, 180, 270):
            raise InputError(f"observation.rotation is {self.rotation}: 0, 90, 180 or 270 degrees")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "ObservationSpec":
        """Inverse of `dataclasses.asdict`. Raises InputError that names an unknown key."""
        return from_dict(cls, data, "observation")


@dataclasses.dataclass(frozen=True)
class ActionSpec:
    """What a policy answers with.

    dim: the largest action dimension (A) of the datasets. horizon: actions that are predicted at once (K). executed:
    how many of them are to be executed before the next prediction. head: how they are predicted (`models/heads.py`).
    bins: values of a token of the token head. normalization: how statistics scale an action to [-1, 1]. names: of the
    dimensions; empty if datasets differ. gripper: what the last dimension means: "open" (1 is open), "closed" (1 is
    closed) or "" (no gripper, or unknown). frame: "delta" (end-effector motion per step), "absolute", "joint" or ""
    (unknown). control_rate: actions per second, or None if datasets differ. denoising_steps: of the diffusion head.
    """

    dim: int = 7
    horizon: int = 1
    executed: int = 1
    head: str = "tokens"
    bins: int = 256
    normalization: str = "bounds_q99"
    names: tuple[str, ...] = ()
    gripper: str = "open"
    frame: str = "delta"
    control_rate: float | None = None
    denoising_steps: int = 50

    def __post_init__(self) -> None:
        for name in ("dim", "horizon", "executed", "bins", "denoising_steps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"action.{name} is {value!r}: give a whole number of at least 1")
        if self.denoising_steps > 50:
            raise InputError(f"action.denoising_steps is {self.denoising_steps}: at most 50, as in training")
        if self.executed > self.horizon:
            raise InputError(f"action.executed is {self.executed}: at most action.horizon, {self.horizon}")
        choices = {
            "head": HEADS,
            "normalization": NORMALIZATIONS,
            "gripper": ("open", "closed", ""),
            "frame": ("delta", "absolute", "joint", ""),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise InputError(f"action.{name} is {getattr(self, name)!r}: one of {', '.join(map(repr, known))}")
        if self.names and len(self.names) != self.dim:
            raise InputError(f"action.names has {len(self.names)} names for {self.dim} dimensions")

    @property
    def is_continuous(self) -> bool:
        """Whether the head predicts numbers, not tokens."""
        return self.head in CONTINUOUS_HEADS

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "ActionSpec":
        """Inverse of `dataclasses.asdict`. Raises InputError that names an unknown key."""
        return from_dict(cls, data, "action")


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """What happens to an image and an instruction before the model sees them, in training and in serving.

    resize_kernel: "lanczos3" (TensorFlow's, as the data pipeline) or "bicubic" (PIL's, as the Hugging Face processor).
    crop_area: the share of the image's area that a policy sees, a centre crop; None if training did not crop. jpeg:
    whether a camera frame goes through JPEG first, as in the reference's LIBERO and Bridge evaluations. text_length:
    tokens of a training row: prompt, actions and end token.
    """

    resize_kernel: str = "lanczos3"
    crop_area: float | None = None
    jpeg: bool = False
    text_length: int = 64

    def __post_init__(self) -> None:
        if self.resize_kernel not in KERNELS:
            raise InputError(
                f"unknown preprocessing.resize_kernel {self.resize_kernel!r}; {nearest(self.resize_kernel, KERNELS)}"
            )
        number = isinstance(self.crop_area, int | float) and not isinstance(self.crop_area, bool)
        if self.crop_area is not None and not (number and 0 < self.crop_area <= 1):
            raise InputError(
                f"preprocessing.crop_area is {self.crop_area!r}: give a share of the area within (0, 1], or None"
            )
        if not isinstance(self.jpeg, bool):
            raise InputError(f"preprocessing.jpeg is {self.jpeg!r}: true or false")
        if isinstance(self.text_length, bool) or not isinstance(self.text_length, int) or self.text_length < 1:
            raise InputError(f"preprocessing.text_length is {self.text_length!r}: give a whole number of at least 1")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Preprocessing":
        """Inverse of `dataclasses.asdict`. Raises InputError that names an unknown key."""
        return from_dict(cls, data, "preprocessing")


@runtime_checkable
class Environment(Protocol):
    """A task that a policy can be rolled out in: a simulator, here or behind a connection."""

    max_steps: int
    spec: ObservationSpec

    def reset(self, seed: int) -> Observation:
        """Begins the episode that `seed` decides; returns its first observation."""
        ...

    def step(self, action: np.ndarray) -> tuple[Observation, bool, bool]:
        """Executes one action, float [A] in raw units; returns (observation, done, success)."""
        ...
