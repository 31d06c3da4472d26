"""Writes an OpenVLA-OFT policy's files as the reference's loader wants them, and says what that loader must be told."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from openvla_jax.checkpoint.contract import REFERENCE_CROP_AREA
from openvla_jax.config import VLAConfig
from openvla_jax.convert.components import COMPONENTS
from openvla_jax.convert.names import ConversionError, Shape, table
from openvla_jax.convert.oft import PLATFORMS, POLICY, TOKENS, PolicySpecs
from openvla_jax.convert.source import Source
from openvla_jax.convert.torch_io import Tensor
from openvla_jax.convert.torch_write import PtWriter, Specs, lay_out_safetensors

LATEST = "latest_checkpoint.pt"  # of the reference's file names, if nothing says which step it was
LORA_RANK = 32  # the reference's own
# What the reference trains and saves in float32 whatever the model's dtype is.
FILM = re.compile(r"vision_backbone\..*\.blocks\.\d+\.(scale|shift)\.")
FLOAT32 = re.compile(rf"proprio_projector\.|noisy_action_projector\.|{FILM.pattern}")
CODE = {
    "AutoConfig": "configuration_prismatic.OpenVLAConfig",
    "AutoModelForVision2Seq": "modeling_prismatic.OpenVLAForActionPrediction",
}  # the reference's loader copies these files beside the weights


class Entry(NamedTuple):
    """A tensor of a component's file. `source` is its name in `names.table`; None for a factor of a zero adapter."""

    source: str | None
    dtype: np.dtype
    shape: Shape


def check_policy(source: Source) -> None:
    """Raises ConversionError for a chunk policy that the reference's code cannot run."""
    action, observation = source.action, source.observation
    if action.normalization == "normal":
        raise ConversionError(
            f"{source.path}: action.normalization is 'normal', and OpenVLA-OFT's PyTorch code knows bounds and "
            "bounds_q99 alone; such a policy cannot be exported, serve it from here"
        )
    if len(observation.cameras) > 1 and len(source.model.towers) == 1:
        raise ConversionError(
            f"{source.path}: observation.cameras is {len(observation.cameras)}, and OpenVLA-OFT's PyTorch code shows a "
            "model of one tower one camera; such a policy cannot be exported, serve it from here"
        )


def config_entries(source: Source) -> dict[str, Any]:
    """Returns what an export's config.json says of a chunk policy, for the reference and for importing it again."""
    specs = PolicySpecs(source.observation, source.action, source.preprocessing)
    return {"auto_map": CODE, POLICY: specs.to_dict()}


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def component_files(source: Source, specs: Specs) -> dict[str, dict[str, Entry]]:
    """Returns what each component's file holds, in the reference's order: {file name: {name there: entry}}.

    Args:
        source: the policy.
        specs: (dtype, shape) of all its tensors by their names in `names.table`.
    """
    suffix = source.origin.get("oft", {}).get("suffix", LATEST)
    files: dict[str, dict[str, Entry]] = {}
    for name, (dtype, shape) in specs.items():
        component, _, rest = name.partition(".")
        if component in COMPONENTS[:3]:
            files.setdefault(f"{component}--{suffix}", {})[f"module.{rest}"] = Entry(name, dtype, shape)
    if source.model.film:
        files[f"vision_backbone--{suffix}"] = _towers(source.model, specs, lora_rank(source))
    return files


def lora_rank(source: Source) -> int:
    """Returns the rank of the adapters that the loader of FiLM's towers asks for."""
    return source.origin.get("oft", {}).get("lora_rank") or LORA_RANK


def _towers(model: VLAConfig, specs: Specs, rank: int) -> dict[str, Entry]:
    """Returns the wrapped towers: every linear layer is a `base_layer` with an adapter beside it."""
    adapted = {
        slot.source.removesuffix(".weight")
        for slot in table(model, "hf")
        if slot.target.endswith("/kernel") and "/film/" not in slot.target
    }
    entries: dict[str, Entry] = {}
    for name, (dtype, shape) in specs.items():
        if not name.startswith("vision_backbone."):
            continue
        place, _, kind = name.rpartition(".")
        wrapped = re.sub(r"(\.blocks\.\d+)\.(?!scale$|shift$)", r"\1.block.", place)
        if place not in adapted:
            entries[f"{wrapped}.{kind}"] = Entry(name, dtype, shape)
            continue
        entries[f"{wrapped}.base_layer.{kind}"] = Entry(name, dtype, shape)
        if kind == "bias" or f"{place}.bias" not in specs:  # the last of its module
            dtype, (rows, *columns) = specs[f"{place}.weight"]
            for factor, sizes in (("A", (rank, *columns)), ("B", (rows, rank, *(1 for _ in columns[1:])))):
                entries[f"{wrapped}.lora_{factor}.default.weight"] = Entry(None, dtype, sizes)
    return entries


def lay_out(
    folder: Path, specs: Specs, files: Mapping[str, Mapping[str, Entry]]
) -> tuple[dict[str, list[Tensor]], list[PtWriter]]:
    """Makes model.safetensors and the component files; returns where each tensor goes, and what is to be finished.

    Towers with FiLM are in both: the model's are what the loader reads first and then replaces.
    """
    inside = {
        name: spec
        for name, spec in specs.items()
        if name.partition(".")[0] not in COMPONENTS[:3] and not FILM.match(name)
    }
    places = {name: [tensor] for name, tensor in lay_out_safetensors(folder, inside).items()}
    writers = []
    for file, entries in files.items():
        writer = PtWriter(folder / file, {name: (entry.dtype, entry.shape) for name, entry in entries.items()})
        for name, entry in entries.items():
            if entry.source:
                places.setdefault(entry.source, []).append(writer.tensors[name])
        writers.append(writer)
    return places, writers


# ---------------------------------------------------------------------------------------------------------------------
# What the reference must be told
# ---------------------------------------------------------------------------------------------------------------------


def remarks(source: Source) -> list[str]:
    """Returns what no file tells the reference's code: its options, its constants, and the names of its inputs."""
    action, observation, film = source.action, source.observation, source.model.film
    crop, cameras = source.preprocessing.crop_area, observation.cameras
    options = {
        "use_l1_regression": action.head == "l1",
        "use_diffusion": action.head == "diffusion",
        "use_film": film,
        "num_images_in_input": len(cameras),
        "use_proprio": bool(observation.state),
        "center_crop": crop is not None,
        **({"lora_rank": lora_rank(source)} if film else {}),
        **({"num_diffusion_steps_inference": action.denoising_steps} if action.head == "diffusion" else {}),
    }
    notes = [
        f"options of openvla-oft: {' '.join(f'--{name} {value}' for name, value in options.items())}",
        _constants(source),
    ]
    wrists = ", then ".join(f"*wrist* = {name}" for name in cameras[1:])
    notes.append(f"its observation: full_image = {cameras[0]}{f', then {wrists}, in this order' if wrists else ''}")
    if film:
        notes.append(
            "adapters are part of the towers now: model.safetensors and vision_backbone--*.pt hold them merged, the "
            f"latter with zero adapters of rank {lora_rank(source)}, which the loader asks for"
        )
    if crop not in (None, REFERENCE_CROP_AREA):
        notes.append(f"it crops {REFERENCE_CROP_AREA} of the area, this policy was trained to see {crop}")
    if action.head == TOKENS and (film or observation.state):
        notes.append(
            "its evaluation leaves out state and FiLM of a token policy (openvla_utils.py), which acts otherwise then"
        )
    return notes


def _constants(source: Source) -> str:
    """Returns which of the reference's constants are right, which it chooses by a word on its command line."""
    action, columns = source.action, len(source.observation.state)
    for name, known in PLATFORMS.items():
        if (action.horizon, action.dim, action.normalization) == (known.horizon, known.dim, known.normalization) and (
            columns in (0, len(known.state))
        ):
            return f"its constants are right if its command line has the word {name}"
    wanted = {
        "NUM_ACTIONS_CHUNK": action.horizon,
        "ACTION_DIM": action.dim,
        **({"PROPRIO_DIM": columns} if columns else {}),
        "ACTION_PROPRIO_NORMALIZATION_TYPE": f"NormalizationType.{action.normalization.upper()}",
    }
    listed = ", ".join(f"{name} = {value}" for name, value in wanted.items())
    return f"its prismatic/vla/constants.py has no platform for this: set {listed}"
