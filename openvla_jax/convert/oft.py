"""What the policy of an OpenVLA-OFT checkpoint (arXiv 2502.19645) is shown and answers.

Files record neither the chunk's length nor the cameras nor the state's columns. Shapes and file names tell some of it,
and the platform that the reference chooses by its command line the rest. An export from here says all in its
config.json.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from openvla_jax.config import nearest
from openvla_jax.convert.names import ConversionError
from openvla_jax.types import ActionSpec, ObservationSpec, Preprocessing


@dataclasses.dataclass(frozen=True)
class Platform:
    """What the reference fixes for one platform (its `constants.py`), with the names that are used here.

    `dim` numbers are an action; `state` names the columns of its state without pads; `cameras` are all that its recipe
    shows.
    """

    horizon: int
    dim: int
    cameras: tuple[str, ...]
    normalization: str
    state: tuple[str, ...]
    frame: str
    control_rate: float | None


_ARM = tuple(f"joint_{i}" for i in range(1, 7))
_BY_SIDE = tuple(f"{side}_{name}" for side in ("left", "right") for name in (*_ARM, "gripper"))
PLATFORMS = {
    "libero": Platform(
        8, 7, ("primary", "wrist"), "bounds_q99",
        ("x", "y", "z", "rx", "ry", "rz", "gripper_left", "gripper_right"), "delta", 20.0,
    ),
    "aloha": Platform(25, 14, ("primary", "left_wrist", "right_wrist"), "bounds", _BY_SIDE, "joint", 25.0),
    "bridge": Platform(
        5, 7, ("primary", "wrist"), "bounds_q99", ("x", "y", "z", "roll", "pitch", "yaw", "gripper"), "delta", 5.0
    ),
}  # fmt: skip
PROMPT_TOKENS = 64  # of a prompt and the end token, beside the chunk
TOKENS = "parallel_tokens"
POLICY = "policy"  # the key of an export's config.json that holds `PolicySpecs`


@dataclasses.dataclass(frozen=True)
class OftOptions:
    """What no file of an OpenVLA-OFT checkpoint says.

    platform: a name of PLATFORMS. cameras: names in order; None for the platform's. horizon: actions of a chunk; None
    for the platform's. state: names of the state's columns; None for the platform's. head: "parallel_tokens" if the
    policy has no action head, but parts of one that usually has. Raises ConversionError for unknown names.
    """

    platform: str
    cameras: tuple[str, ...] | None = None
    horizon: int | None = None
    state: tuple[str, ...] | None = None
    head: str | None = None

    def __post_init__(self) -> None:
        if self.platform not in PLATFORMS:
            raise ConversionError(f"--oft {self.platform!r}: {nearest(self.platform, PLATFORMS)}")
        if self.head not in (None, TOKENS):
            raise ConversionError(f"--head {self.head!r}: {TOKENS}, or leave it out: files show other heads")


@dataclasses.dataclass(frozen=True)
class PolicySpecs:
    """What a policy is shown, what it answers, and what happens to its images before."""

    observation: ObservationSpec
    action: ActionSpec
    preprocessing: Preprocessing

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "PolicySpecs":
        """Inverse of `to_dict`. Raises InputError that names an unknown key."""
        return cls(
            ObservationSpec.from_dict(data["observation"]),
            ActionSpec.from_dict(data["action"]),
            Preprocessing.from_dict(data["preprocessing"]),
        )


def choose(
    options: OftOptions, tensors: Mapping[str, Any], statistics: Mapping[str, Any], where: Path
) -> tuple[PolicySpecs, list[str]]:
    """Returns the policy of a checkpoint, and remarks about what was assumed.

    Args:
        options: what the files do not say.
        tensors: all tensors of the checkpoint.
        statistics: of its datasets.
        where: the folder, for messages.

    Raises ConversionError for what is neither in the files nor in `options`.
    """
    known, notes = PLATFORMS[options.platform], []
    head, dim = head_of(tensors)
    has_parts = bool(head) or _columns(tensors) > 0 or _has_film(tensors)
    if not head:
        if has_parts and options.head is None:
            part = "proprio_projector" if _columns(tensors) else "vision_backbone"
            raise ConversionError(
                f"{where}: {part}--*.pt without action_head--*.pt: download that file, or say --head {TOKENS} if the "
                "policy predicts tokens"
            )
        head, dim = TOKENS, max(_widths(statistics), default=known.dim)
        notes.append(f"no action_head--*.pt: the policy predicts a chunk of tokens at once ({TOKENS})")
    elif options.head is not None:
        raise ConversionError(f"{where}: --head {options.head}, but the action head is {head}: leave --head out")
    cameras = options.cameras
    if cameras is None:
        cameras = known.cameras if has_parts else known.cameras[:1]
        recipe = f"{options.platform}'s recipe" if has_parts else "token policies of RL projects"
        notes.append(f"cameras {', '.join(cameras)} as in {recipe}, no file says so: --cameras changes them")
    elif len(cameras) > len(known.cameras):
        raise ConversionError(
            f"{where}: --cameras names {len(cameras)}, {options.platform}'s recipe shows at most {len(known.cameras)}, "
            f"{', '.join(known.cameras)}: name those of its training"
        )
    horizon = options.horizon
    if horizon is None:
        if dim != known.dim:
            raise ConversionError(
                f"{where}: no file says how many actions a chunk has, and {options.platform}'s {known.horizon} are of "
                f"{known.dim} numbers, these of {dim}: give --horizon K, or another platform with --oft"
            )
        horizon = known.horizon
    action = ActionSpec(
        dim=dim, horizon=horizon, executed=horizon, head=head, normalization=known.normalization,
        gripper="open" if options.platform != "aloha" else "", frame=known.frame, control_rate=known.control_rate,
    )  # fmt: skip
    observation = ObservationSpec(tuple(cameras), 0, _state(options, tensors, where))
    text_length = PROMPT_TOKENS + horizon * dim
    return PolicySpecs(observation, action, Preprocessing("lanczos3", jpeg=True, text_length=text_length)), notes


def _state(options: OftOptions, tensors: Mapping[str, Any], where: Path) -> tuple[str, ...]:
    """Returns the names of the state's columns. Raises ConversionError if they are not as many as the projector's."""
    columns = _columns(tensors)
    names = PLATFORMS[options.platform].state if options.state is None else options.state
    if not columns:
        if options.state is not None:
            raise ConversionError(
                f"{where}: --state, but no proprio_projector--*.pt: download it, or leave --state out"
            )
        return ()
    if len(names) != columns:
        whose = f"{options.platform}'s state" if options.state is None else "--state"
        raise ConversionError(
            f"{where}: the state has {columns} columns, {whose} {len(names)}: name all with --state, or another "
            "platform with --oft"
        )
    return tuple(names)


def model_fields(
    specs: PolicySpecs, tensors: Mapping[str, Any], statistics: Mapping[str, Any], where: Path
) -> dict[str, Any]:
    """Returns what a policy adds to its model (fields of VLAConfig).

    Raises ConversionError if tensors or statistics are of another policy.
    """
    action, observation = specs.action, specs.observation
    head, dim = head_of(tensors)
    if (head or TOKENS) != action.head:
        raise ConversionError(
            f"{where}: the policy's head is {action.head}, the files hold {head or 'no action head'}: download "
            "action_head--*.pt, or use the files of one run"
        )
    if dim and {*_widths(statistics), action.dim} - {dim}:
        raise ConversionError(
            f"{where}: the action head predicts {dim} numbers, the statistics have {sorted(_widths(statistics))}: "
            "use the files of one run"
        )
    if _columns(tensors) != len(observation.state):
        raise ConversionError(
            f"{where}: the policy's state has {len(observation.state)} columns, proprio_projector--*.pt "
            f"{_columns(tensors)}: use the files of one run"
        )
    for dataset, entry in statistics.items() if observation.state else ():
        rows = entry.get("proprio") or {}
        found = {len(row) for name, row in rows.items() if name != "names" and isinstance(row, list)}
        if found != {len(observation.state)}:
            has = f"a state of {max(found)} columns" if found else "no state (proprio)"
            raise ConversionError(
                f"{where}: the statistics of {dataset!r} have {has}, proprio_projector--*.pt takes "
                f"{len(observation.state)}: take dataset_statistics.json of the same run"
            )
    if len(observation.cameras) > 1 and not any(name.startswith("vision_backbone.fused_") for name in tensors):
        raise ConversionError(
            f"{where}: {len(observation.cameras)} cameras, but the model has one tower, and the reference shows such a "
            "model one camera: --cameras primary"
        )
    return {
        "head": action.head,
        "action_dim": dim,
        "state_dim": len(observation.state),
        "cameras": len(observation.cameras),
        "film": _has_film(tensors),
    }


def head_of(tensors: Mapping[str, Any]) -> tuple[str, int]:
    """Returns the kind of action head and how many numbers it predicts; "" and 0 without one."""
    for head, stem in (("l1", "model"), ("diffusion", "noise_predictor.mlp_resnet")):
        weight = tensors.get(f"action_head.{stem}.fc2.weight")
        if weight is not None:
            return head, weight.shape[0]
    return "", 0


def _columns(tensors: Mapping[str, Any]) -> int:
    """Returns how many columns of a state the projector takes; 0 without one."""
    weight = tensors.get("proprio_projector.fc1.weight")
    return 0 if weight is None else weight.shape[-1]


def _has_film(tensors: Mapping[str, Any]) -> bool:
    return any(name.endswith(".blocks.0.scale.weight") for name in tensors)


def _widths(statistics: Mapping[str, Any]) -> set[int]:
    return {len(entry["action"]["mean"]) for entry in statistics.values() if "mean" in entry.get("action", {})}
