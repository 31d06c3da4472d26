"""The files that OpenVLA-OFT (arXiv 2502.19645) keeps beside a HuggingFace folder: action head, projectors, towers with
FiLM, and the adapter of a run that was not merged.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from openvla_jax.config import nearest
from openvla_jax.convert import peft
from openvla_jax.convert.names import ConversionError, canonical_names
from openvla_jax.convert.source import Made
from openvla_jax.convert.torch_io import AGAIN, BFLOAT16, Tensor, read_pt, read_safetensors
from openvla_jax.errors import reading

# The start of each file's name: what the reference's loader looks for.
COMPONENTS = ("action_head", "proprio_projector", "noisy_action_projector", "vision_backbone")
ADAPTER = "lora_adapter"
EMBEDDING = "language_model.model.embed_tokens.weight"
ONE_RUN = "use the files of one run"


class Components(NamedTuple):
    """What the files beside a model hold."""

    tensors: dict[str, Any]  # by their names in `names.table`
    suffix: str = ""  # of the files' names, as "150000_checkpoint.pt"; empty without files
    lora_rank: int | None = None  # of the adapters inside the towers' file


def find_components(folder: Path) -> dict[str, Path]:
    """Returns the component files of a folder, by component.

    Raises ConversionError for several files of one component, or files of different steps.
    """
    found = {}
    for name in COMPONENTS:
        files = sorted(folder.glob(f"{name}--*.pt"))
        if len(files) > 1:
            listed = ", ".join(file.name for file in files)
            raise ConversionError(f"{folder}: several files of {name}: {listed}; keep the files of one step")
        if files:
            found[name] = files[0]
    if len({suffix_of(path) for path in found.values()}) > 1:
        listed = ", ".join(path.name for path in found.values())
        raise ConversionError(f"{folder}: files of different steps: {listed}; keep the files of one step")
    return found


def suffix_of(path: Path) -> str:
    return path.name.partition("--")[2]


def read_components(folder: Path, model: Mapping[str, Any]) -> Components:
    """Returns what the component files of a folder hold.

    FiLM's towers replace those of the model: their adapters are merged, in float32. One whose B is zero changes
    nothing, and its weight keeps its dtype.

    Args:
        folder: the checkpoint.
        model: tensors of the model that the files lie beside, by HuggingFace name.

    Raises ConversionError for a file of another form, or of another model.
    """
    files = find_components(folder)
    tensors: dict[str, Any] = {}
    rank = None
    for component, path in files.items():
        with reading(path, AGAIN, ConversionError):
            stored = _stored(path, component)
            if component == "vision_backbone":
                towers, rank = _film_towers(stored, path)
                _check_base(towers, model, path)
                tensors |= towers
            else:
                _check_width(stored, model, path)
                tensors |= {f"{component}.{name}": tensor for name, tensor in stored.items()}
    if any(name.startswith("action_head.noise_predictor.") for name in tensors):
        if "noisy_action_projector" not in files:
            raise ConversionError(f"{folder}: a diffusion head without noisy_action_projector--*.pt: download it")
    elif "noisy_action_projector" in files:
        raise ConversionError(f"{folder}: noisy_action_projector--*.pt without a diffusion head: {ONE_RUN}")
    _check_adapter_beside(folder, rank, "vision_backbone" in files)
    suffix = suffix_of(next(iter(files.values()))) if files else ""
    return Components(tensors, suffix, rank)


def _stored(path: Path, component: str) -> dict[str, Tensor]:
    """Returns the tensors of a component's file, without DDP's prefix."""
    stored = {str(name).removeprefix("module."): tensor for name, tensor in read_pt(path).items()}
    foreign = [name for name, tensor in stored.items() if not isinstance(tensor, Tensor)]
    if foreign or not stored:
        raise ConversionError(f"{path}: {', '.join(foreign[:3]) or 'nothing'} in it: no {component} of OpenVLA-OFT")
    return stored


def _width(model: Mapping[str, Any]) -> int | None:
    return model[EMBEDDING].shape[-1] if EMBEDDING in model else None


def _check_width(stored: Mapping[str, Tensor], model: Mapping[str, Any], path: Path) -> None:
    """Raises ConversionError unless head or projector belongs to a language model of the model's width."""
    width = _width(model)
    for name, tensor in stored.items():
        if re.search(r"(^|\.)fc1\.weight$", name) and width not in (None, tensor.shape[0]):
            raise ConversionError(
                f"{path}: {name} has shape {list(tensor.shape)}, made for a language model {tensor.shape[0]} wide; "
                f"the model's is {width}: {ONE_RUN}"
            )


# ---------------------------------------------------------------------------------------------------------------------
# Towers with FiLM
# ---------------------------------------------------------------------------------------------------------------------


def _film_towers(stored: Mapping[str, Tensor], path: Path) -> tuple[dict[str, Any], int | None]:
    """Returns plain towers with FiLM, adapters merged: `W + min(r, 16) / r * B A`; and their rank r."""
    tensors: dict[str, Any] = {}
    ranks: dict[int, str] = {}
    for name, tensor in stored.items():
        if ".lora_" in name:
            continue
        plain = re.sub(r"(\.blocks\.\d+)\.block\.", r"\1.", name).replace(".base_layer.", ".")
        tensors[plain] = tensor
        adapter = name.replace(".base_layer.weight", ".lora_{}.default.weight")
        if adapter == name:
            continue
        a, b = (stored.get(adapter.format(side)) for side in "AB")
        if a is None or b is None:
            raise ConversionError(f"{path}: {name} without both factors of its adapter: download it again")
        ranks.setdefault(_rank(tensor, a, b, f"{path}: {plain}"), name)
        tensors[plain] = _merged(tensor, a, b, min(a.shape[0], 16) / a.shape[0], np.dtype(np.float32))
    if len(ranks) > 1:
        listed = ", ".join(f"{rank} of {name}" for rank, name in ranks.items())
        raise ConversionError(f"{path}: adapters of several ranks, {listed}: no file of one run")
    if not any(re.search(r"\.blocks\.\d+\.scale\.weight$", name) for name in tensors):
        raise ConversionError(f"{path}: no blocks.*.scale.weight: not towers with FiLM")
    named = canonical_names(tensors, "hf")
    return _same_dtypes({name: tensors[original] for name, original in named.items()}), next(iter(ranks), None)


def _rank(weight: Tensor, a: Tensor, b: Tensor, where: str) -> int:
    """Returns the rank of an adapter. Raises ConversionError unless its factors fit each other and the weight."""
    rows, *columns = weight.shape
    rank = a.shape[0] if a.shape else 0
    if a.shape != (rank, *columns) or b.shape != (rows, rank, *(1 for _ in columns[1:])) or not rank:
        raise ConversionError(
            f"{where}: its adapter's factors have shapes {list(a.shape)} and {list(b.shape)}, of one rank r they are "
            f"[r, {', '.join(map(str, columns))}] and [{rows}, r{', 1, 1' if columns[1:] else ''}]: {ONE_RUN}"
        )
    return rank


def _merged(weight: Any, a: Tensor, b: Tensor, scale: float, dtype: np.dtype) -> Any:
    """Returns `W + scale * B A`, added in float32, as `dtype`; W itself if B is zero."""
    if not np.asarray(b.read(), np.float32).any():
        return weight

    def read() -> np.ndarray:
        factors = [x.read().astype(np.float32).reshape(x.shape[0], -1) for x in (b, a)]
        total = (factors[0] @ factors[1]).reshape(weight.shape)
        total *= np.float32(scale)
        total += weight.read()  # in place: one copy in float32
        return total.astype(dtype, copy=False)

    return Made(weight.shape, dtype, read)


def _same_dtypes(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Widens tower tensors to float32 wherever one layer of the same kind is float32, as merged adapters are.

    All layers of one leaf must have one dtype; a reference run adapts all but the dead layers alike.
    """
    kind = lambda name: re.sub(r"(\.blocks)\.\d+\.", r"\1.#.", name)
    kinds: dict[str, set[np.dtype]] = {}
    for name, tensor in tensors.items():
        kinds.setdefault(kind(name), set()).add(tensor.dtype)
    return {name: _widened(tensor) if len(kinds[kind(name)]) > 1 else tensor for name, tensor in tensors.items()}


def _widened(tensor: Any) -> Any:
    if tensor.dtype == np.float32:
        return tensor
    return Made(tensor.shape, np.dtype(np.float32), lambda: tensor.read().astype(np.float32))


def _check_base(towers: Mapping[str, Any], model: Mapping[str, Any], path: Path) -> None:
    """Raises ConversionError unless the towers are those of the model, with FiLM and adapters added.

    Shapes are compared, and the values of vectors, which adapters leave alone.
    """
    named = canonical_names((name for name in model if name.startswith("vision_backbone.")), "hf")
    known = {name: model[original] for name, original in named.items()}
    film = {name for name in towers if re.search(r"\.blocks\.\d+\.(scale|shift)\.", name)}
    names = (known.keys() ^ towers.keys()) - film
    if known and names:
        raise ConversionError(f"{path}: towers of another base: only one of file and model has {min(names)}: {ONE_RUN}")
    width = _width(model)
    for name, tensor in towers.items():
        if name in film:
            if name.endswith(".weight") and width not in (None, tensor.shape[-1]):
                raise ConversionError(
                    f"{path}: FiLM of another base: {name} has shape {list(tensor.shape)}, for a language model "
                    f"{tensor.shape[-1]} wide; the model's is {width}: {ONE_RUN}"
                )
        elif name in known and tensor.shape != known[name].shape:
            raise ConversionError(
                f"{path}: towers of another base: {name} has shape {list(tensor.shape)}, the model's "
                f"{list(known[name].shape)}: {ONE_RUN}"
            )
        elif name in known and len(tensor.shape) == 1:
            values = [x.read().astype(BFLOAT16) for x in (tensor, known[name])]
            if not np.array_equal(*values):
                raise ConversionError(f"{path}: towers of another base: {name} is not the model's: {ONE_RUN}")


def _check_adapter_beside(folder: Path, rank: int | None, film: bool) -> None:
    """Raises ConversionError for an adapter of another rank than the towers' file, or of towers that are not there."""
    adapter = folder / ADAPTER
    if (adapter / peft.CONFIG).exists() and rank is not None:
        found = peft.read_settings(adapter / peft.CONFIG).rank
        if found != rank:
            raise ConversionError(
                f"{adapter} has rank {found}, the adapters in vision_backbone--*.pt have {rank}: {ONE_RUN}"
            )
    if (adapter / peft.WEIGHTS).exists() and not film:
        wrapped = [name for name in read_safetensors(adapter / peft.WEIGHTS) if ".block." in name]
        if wrapped:
            raise ConversionError(f"{folder}: a run with FiLM without vision_backbone--*.pt: download that file")


# ---------------------------------------------------------------------------------------------------------------------
# Runs that were not merged
# ---------------------------------------------------------------------------------------------------------------------


def merge_adapter(folder: Path, model: Mapping[str, Any], base: object) -> dict[str, Any]:
    """Returns the tensors of `model` with the adapter in `folder` added, in float32, rounded to their own dtypes.

    Adapters of towers with FiLM are left out: `vision_backbone--*.pt` holds them.

    Raises ConversionError for an adapter of another model.
    """
    lora = peft.read_settings(folder / peft.CONFIG)
    stored = {name.removeprefix(peft.PREFIX): tensor for name, tensor in _adapter_tensors(folder).items()}
    merged: dict[str, Any] = dict(model)
    for name, tensor in stored.items():
        place, _, factor = name.partition(".lora_")
        weight = f"{place.removesuffix('.weight').removesuffix('.base_layer')}.weight"
        if place.startswith("vision_backbone.vision_backbone."):
            continue
        if weight not in model:
            raise ConversionError(f"{folder} is an adapter of another model: {place}; {nearest(weight, model)}")
        if not factor:
            if not np.array_equal(tensor.read().astype(BFLOAT16), model[weight].read().astype(BFLOAT16)):
                raise ConversionError(
                    f"{folder} was trained on another base: its copy of {weight} is not that of {base}: name the base "
                    "that it was trained on"
                )
        elif factor == "A.weight":
            if (b := stored.get(f"{place}.lora_B.weight")) is None:
                raise ConversionError(f"{folder}: {name} without its other factor: download it again")
            rank = _rank(model[weight], tensor, b, f"{folder}: {weight}")
            if rank != lora.rank:
                raise ConversionError(f"{folder}: {name} has rank {rank}, {peft.CONFIG} says {lora.rank}: {ONE_RUN}")
            merged[weight] = _merged(model[weight], tensor, b, lora.scale, model[weight].dtype)
    return merged


def _adapter_tensors(folder: Path) -> dict[str, Tensor]:
    if not (folder / peft.WEIGHTS).exists():
        raise ConversionError(f"{folder / peft.WEIGHTS} is missing: download it")
    return read_safetensors(folder / peft.WEIGHTS)
