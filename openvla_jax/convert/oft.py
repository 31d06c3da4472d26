"""The files that OpenVLA-OFT (arXiv 2502.19645) keeps beside a HuggingFace folder: action head, projectors, towers.

No file records the chunk's length, the cameras, or what the head is: shapes and file names tell some of it, and the
platform that the reference chooses by its command line the rest.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from openvla_jax.config import nearest
from openvla_jax.convert.names import ConversionError
from openvla_jax.convert.source import Made
from openvla_jax.convert.torch_io import Tensor, read_pt
from openvla_jax.types import ActionSpec, ObservationSpec, Preprocessing


@dataclasses.dataclass(frozen=True)
class Platform:
    """What the reference fixes for one platform (its `constants.py`), with the names that are used here.

    `state` names the columns of its state without pads; `cameras` are all that its recipe shows.
    """

    horizon: int
    cameras: tuple[str, ...]
    normalization: str
    state: tuple[str, ...]
    frame: str
    control_rate: float | None


_ARM = tuple(f"joint_{i}" for i in range(1, 7))
_BY_SIDE = tuple(f"{side}_{name}" for side in ("left", "right") for name in (*_ARM, "gripper"))
PLATFORMS = {
    "libero": Platform(
        8, ("primary", "wrist"), "bounds_q99",
        ("x", "y", "z", "rx", "ry", "rz", "gripper_left", "gripper_right"), "delta", 20.0,
    ),
    "aloha": Platform(25, ("primary", "left_wrist", "right_wrist"), "bounds", _BY_SIDE, "joint", 25.0),
    "bridge": Platform(
        5, ("primary", "wrist"), "bounds_q99", ("x", "y", "z", "roll", "pitch", "yaw", "gripper"), "delta", 5.0
    ),
}  # fmt: skip
PROMPT_TOKENS = 64  # of a prompt and the end token, beside the chunk
# The start of each file's name: what the reference's loader looks for.
COMPONENTS = ("action_head", "proprio_projector", "noisy_action_projector", "vision_backbone")


@dataclasses.dataclass(frozen=True)
class OftOptions:
    """What no file of an OpenVLA-OFT checkpoint says.

    platform: a name of PLATFORMS. cameras: names in order; None for the platform's. horizon: actions of a chunk; None
    for the platform's. Raises ConversionError for an unknown platform.
    """

    platform: str
    cameras: tuple[str, ...] | None = None
    horizon: int | None = None

    def __post_init__(self) -> None:
        if self.platform not in PLATFORMS:
            raise ConversionError(f"--oft {self.platform!r}: {nearest(self.platform, PLATFORMS)}")


def find_components(folder: Path) -> dict[str, Path]:
    """Returns the component files of a folder, by component. Raises ConversionError if there are several of one."""
    found = {}
    for name in COMPONENTS:
        files = sorted(folder.glob(f"{name}--*.pt"))
        if len(files) > 1:
            listed = ", ".join(file.name for file in files)
            raise ConversionError(f"{folder}: several files of {name}: {listed}; keep the files of one step")
        if files:
            found[name] = files[0]
    return found


def read_components(where: Path, options: OftOptions | None) -> dict[str, Any]:
    """Returns the tensors of a folder's component files by their names in `names.table`; none without such files.

    FiLM's towers replace the towers of the HuggingFace folder: their adapters are merged, in float32.

    Raises ConversionError for a file of another form, for files without `options`, and for a diffusion head without
    its projector.
    """
    files = find_components(where)
    if files and options is None:
        listed = ", ".join(path.name for path in files.values())
        raise ConversionError(
            f"{where} is an OpenVLA-OFT checkpoint ({listed}): say of which platform, --oft {' or '.join(PLATFORMS)}"
        )
    tensors: dict[str, Any] = {}
    for component, path in files.items():
        stored = {name.removeprefix("module."): tensor for name, tensor in read_pt(path).items()}
        foreign = [name for name, tensor in stored.items() if not isinstance(tensor, Tensor)]
        if foreign or not stored:
            raise ConversionError(f"{path}: {', '.join(foreign[:3]) or 'nothing'} in it: no {component} of OpenVLA-OFT")
        if component == "vision_backbone":
            tensors |= _film_towers(stored, path)
        else:
            tensors |= {f"{component}.{name}": tensor for name, tensor in stored.items()}
    if any(name.startswith("action_head.noise_predictor.") for name in tensors):
        if "noisy_action_projector" not in files:
            raise ConversionError(f"{where}: a diffusion head without noisy_action_projector--*.pt: download that file")
    elif "noisy_action_projector" in files:
        raise ConversionError(f"{where}: noisy_action_projector--*.pt without a diffusion head: it is of another run")
    return tensors


def _film_towers(stored: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """Returns plain towers with FiLM, adapters merged: `W + min(r, 16) / r * B A`."""
    tensors: dict[str, Any] = {}
    for name, tensor in stored.items():
        if ".lora_" in name:
            continue
        plain = re.sub(r"(\.blocks\.\d+)\.block\.", r"\1.", name).replace(".base_layer.", ".")
        adapter = name.replace(".base_layer.weight", ".lora_{}.default.weight")
        if adapter != name:
            a, b = (stored.get(adapter.format(side)) for side in "AB")
            if a is None or b is None:
                raise ConversionError(f"{path}: {name} without both factors of its adapter: download it again")
            tensors[plain] = _merged(tensor, a, b)
        else:
            tensors[plain] = tensor
    if not any(re.search(r"\.blocks\.\d+\.scale\.weight$", name) for name in tensors):
        raise ConversionError(f"{path}: no blocks.*.scale.weight: not towers with FiLM")
    return tensors


def _merged(weight: Tensor, a: Tensor, b: Tensor) -> Made:
    def read() -> np.ndarray:
        rank = a.shape[0]
        factors = [x.read().astype(np.float32).reshape(x.shape[0], -1) for x in (b, a)]
        delta = (factors[0] @ factors[1]).reshape(weight.shape) * np.float32(min(rank, 16) / rank)
        return weight.read().astype(np.float32) + delta

    return Made(weight.shape, np.dtype(np.float32), read)


def same_dtypes(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Widens tower tensors to float32 wherever one layer of the same kind is float32, as merged adapters are.

    All layers of one leaf must have one dtype; a reference run adapts all but the dead layers alike.
    """
    kinds: dict[str, set[np.dtype]] = {}
    for name, tensor in tensors.items():
        kinds.setdefault(re.sub(r"\d+", "#", name), set()).add(tensor.dtype)
    return {
        name: _widened(tensor) if len(kinds[re.sub(r"\d+", "#", name)]) > 1 else tensor
        for name, tensor in tensors.items()
    }


def _widened(tensor: Any) -> Any:
    if tensor.dtype == np.float32:
        return tensor
    return Made(tensor.shape, np.dtype(np.float32), lambda: tensor.read().astype(np.float32))


def choose(
    options: OftOptions, tensors: Mapping[str, Any], statistics: Mapping[str, Any], where: Path
) -> tuple[dict[str, Any], ObservationSpec, ActionSpec, list[str]]:
    """Returns what OFT adds to a model (fields of VLAConfig), what its policy sees and answers, and remarks.

    Args:
        options: what the files do not say.
        tensors: all tensors of the checkpoint.
        statistics: of its datasets.
        where: the folder, for messages.

    Raises ConversionError if the files belong to another platform.
    """
    platform, cameras, horizon = options.platform, options.cameras, options.horizon
    known, notes = PLATFORMS[platform], []
    head, dim = _head(tensors)
    widths = {len(entry["action"]["mean"]) for entry in statistics.values() if "mean" in entry.get("action", {})}
    if dim and widths - {dim}:
        raise ConversionError(
            f"{where}: the action head predicts {dim} numbers, the statistics have {sorted(widths)}: files of two runs"
        )
    state = known.state if "proprio_projector.fc1.weight" in tensors else ()
    if state and tensors["proprio_projector.fc1.weight"].shape[1] != len(state):
        raise ConversionError(
            f"{where}: the state has {tensors['proprio_projector.fc1.weight'].shape[1]} columns, {platform}'s "
            f"{len(state)}: name another platform with --oft"
        )
    if cameras is None:
        cameras = known.cameras
        notes.append(f"cameras {', '.join(cameras)} as in {platform}'s recipe, no file says so: --cameras changes them")
    if horizon is None:
        horizon = known.horizon
    fields = {
        "head": head,
        "action_dim": dim,
        "state_dim": len(state),
        "cameras": len(cameras),
        "film": any(name.endswith(".blocks.0.scale.weight") for name in tensors),
    }
    action = ActionSpec(
        dim=dim or max(widths, default=7), horizon=horizon, executed=horizon, head=head,
        normalization=known.normalization, gripper="open" if platform != "aloha" else "", frame=known.frame,
        control_rate=known.control_rate,
    )  # fmt: skip
    return fields, ObservationSpec(tuple(cameras), 0, state), action, notes


def serving(action: ActionSpec) -> Preprocessing:
    """Returns what the reference does with images and text before its policy sees them, except for the crop."""
    return Preprocessing("lanczos3", jpeg=True, text_length=PROMPT_TOKENS + action.horizon * action.dim)


def _head(tensors: Mapping[str, Any]) -> tuple[str, int]:
    """Returns the kind of head and the dimension of its actions; 0 if tokens are predicted."""
    for head, stem in (("l1", "model"), ("diffusion", "noise_predictor.mlp_resnet")):
        weight = tensors.get(f"action_head.{stem}.fc2.weight")
        if weight is not None:
            return head, weight.shape[0]
    return "parallel_tokens", 0


def component_of(name: str, film: bool) -> str | None:
    """Returns the component file that a tensor of `names.table` is exported to; None for the HuggingFace folder."""
    if film and name.startswith("vision_backbone."):
        return "vision_backbone"
    first = name.partition(".")[0]
    return first if first in COMPONENTS[:3] else None
