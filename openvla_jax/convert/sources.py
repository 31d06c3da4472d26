"""Opens what holds weights: a HuggingFace OpenVLA folder or hub id, a Prismatic run or `.pt`, an Orbax checkpoint.

All three give their leaves in the tree's arrangement, layer by layer (`Source.weights`), so that importing, exporting
and comparing do not care which it is.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from openvla_jax.checkpoint.base import MERGE
from openvla_jax.checkpoint.contract import action_spec, check_statistics, short
from openvla_jax.checkpoint.reading import is_complete, load_contract, open_checkpoint
from openvla_jax.config import preset
from openvla_jax.convert.components import ADAPTER, merge_adapter, read_components
from openvla_jax.convert.describe import (
    HF_DEFAULTS,
    Description,
    describe,
    merge,
    named_hf,
    named_native,
    read_json,
    read_overrides,
)
from openvla_jax.convert.names import (
    ConversionError,
    Shape,
    tower_prefix,
)
from openvla_jax.convert.oft import PLATFORMS, POLICY, OftOptions, PolicySpecs, choose, model_fields
from openvla_jax.convert.orbax_io import OrbaxReader
from openvla_jax.convert.parts import load_towers, open_parts
from openvla_jax.convert.source import Source, TorchWeights
from openvla_jax.convert.torch_io import Tensor, read_pt, read_torch_folder
from openvla_jax.errors import InputError, reading
from openvla_jax.storage import is_remote
from openvla_jax.types import ObservationSpec, Preprocessing

AS_PROCESSOR = Preprocessing(resize_kernel="bicubic")  # as the Hugging Face processor, which serves imports
HUB_FILES = ["*.json", "*.safetensors", "tokenizer.model", "*--*checkpoint.pt"]


def open_source(
    src: str | Path,
    *,
    model_config: str | Mapping[str, Any] | None = None,
    tokenizer: str | Path | None = None,
    parts: Mapping[str, str] | None = None,
    oft: OftOptions | PolicySpecs | None = None,
    base: str | Path | None = None,
) -> Source:
    """The weights at `src`, which is in a bucket only if it is an Orbax checkpoint.

    `parts`: paths of base weights, by tower name, `llm` or `projector` (see `parts.py`). `oft`: what the files of an
    OpenVLA-OFT checkpoint do not say. `base`: the HuggingFace model that an OpenVLA-OFT run adapted, if it was not
    merged.

    Raises ConversionError (or CheckpointError for an Orbax checkpoint), one line, for anything that is not such
    weights.
    """
    if is_remote(src):
        return open_orbax(src)
    overrides = read_overrides(model_config)
    path = Path(src)
    given: Any = {"overrides": overrides, "tokenizer": None if tokenizer is None else Path(tokenizer)}
    if not path.exists() and parts and "llm" in parts:
        return open_parts(str(src), parts, **given)
    path = path if path.exists() else _from_hub(str(src))
    if path.is_file():
        return open_native(path, parts or {}, **given)
    runs = path / "checkpoints"
    if is_complete(epath.Path(path)) or (runs.is_dir() and not list(runs.glob("*.pt"))):
        return open_orbax(path)
    if runs.is_dir():
        return open_native(_latest_pt(runs), parts or {}, **given)
    if (path / "config.json").exists():
        if base is not None:
            raise ConversionError(f"{path} is merged already, it has a config.json: leave --base out")
        return open_hf(path, **given, oft=oft)
    if (path / ADAPTER).is_dir():
        if base is None:
            raise ConversionError(
                f"{path} holds {ADAPTER}/ and no merged model: name the model that was adapted, --base MODEL"
            )
        return open_unmerged(path, base, **given, oft=oft)
    if (path / "adapter_config.json").exists():
        raise ConversionError(f"{path} is a LoRA adapter: name the model that it belongs to, --base CHECKPOINT")
    return open_orbax(path)


def _from_hub(name: str) -> Path:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ConversionError(
            f"{name} does not exist: pass a folder, a .pt file or a hub id such as openvla/openvla-7b"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:  # the hub client raises its own, requests' and OS errors
        line = str(error).strip().splitlines()[0]
        raise ConversionError(
            f"{name} is no folder here, and the hub gave nothing ({type(error).__name__}: {line})"
        ) from None


# ---------------------------------------------------------------------------------------------------------------------
# HuggingFace
# ---------------------------------------------------------------------------------------------------------------------


def open_hf(
    folder: Path,
    overrides: Mapping[str, Any],
    tokenizer: Path | None,
    oft: OftOptions | PolicySpecs | None = None,
) -> Source:
    """A folder as the reference's HF class saves it. `dataset_statistics.json` beside it replaces `norm_stats`."""
    config, tensors = read_json(folder / "config.json"), read_torch_folder(folder)
    with reading(folder / "config.json", "correct it, or download it again", ConversionError):
        return _open_hf(folder, config, tensors, overrides, tokenizer, oft)


def open_unmerged(
    folder: Path,
    base: str | Path,
    overrides: Mapping[str, Any],
    tokenizer: Path | None,
    oft: OftOptions | PolicySpecs | None,
) -> Source:
    """An OpenVLA-OFT run whose adapter was not merged: `base` with the adapter, and the run's other files."""
    source = open_source(base)
    if source.kind != "hf" or not isinstance(source.weights, TorchWeights):
        raise ConversionError(f"{base}: the model of {folder / ADAPTER} is wanted as HuggingFace's folder or hub id")
    tensors = merge_adapter(folder / ADAPTER, source.weights.tensors, base)
    with reading(folder, "download it again", ConversionError):
        return _open_hf(folder, dict(source.origin["config"]), tensors, overrides, tokenizer, oft)


def _open_hf(
    folder: Path,
    config: dict[str, Any],
    tensors: Mapping[str, Any],
    overrides: Mapping[str, Any],
    tokenizer: Path | None,
    oft: OftOptions | PolicySpecs | None,
) -> Source:
    if config.get("model_type") not in ("openvla", "prismatic"):
        raise ConversionError(
            f"{folder} holds a {config.get('model_type')!r} model, not an 'openvla' one: name an OpenVLA checkpoint"
        )
    parts = read_components(folder, tensors)
    tensors = {**tensors, **parts.tensors}
    processor = folder / "preprocessor_config.json"
    described = describe_hf(
        config,
        read_json(processor) if processor.exists() else {},
        {name: tensor.shape for name, tensor in tensors.items()},
        folder.name,
    )
    overrides = merge(config.get("model_config") or {}, overrides)
    statistics = _statistics(folder, {} if config.get("norm_stats") is None else config["norm_stats"])
    try:
        action = action_spec(statistics, bins=config.get("n_action_bins", HF_DEFAULTS["n_action_bins"]))
    except InputError as error:
        raise ConversionError.of(folder / "config.json", f"n_action_bins: {error}") from None
    specs, remarks = PolicySpecs(ObservationSpec(), action, AS_PROCESSOR), list[str]()
    if isinstance(oft, OftOptions):
        specs, remarks = choose(oft, tensors, statistics, folder)
    elif oft is not None or POLICY in config:
        specs = oft or PolicySpecs.from_dict(config[POLICY])
    elif parts.suffix:
        raise ConversionError(
            f"{folder} is an OpenVLA-OFT checkpoint (*--{parts.suffix}): say of which platform, "
            f"--oft {' or '.join(PLATFORMS)}"
        )
    if specs.action.head != "tokens":
        overrides = merge(model_fields(specs, tensors, statistics, folder), overrides)
    model = described.model(overrides)
    if config.get("pad_token_id", model.pad_token) != model.pad_token:
        raise ConversionError(
            f"{folder}/config.json: pad_token_id {config['pad_token_id']}, but vocab_size {model.llama.vocab_size} "
            f"less pad_to_multiple_of is {model.pad_token}: mend config.json"
        )
    tokenizer, notes = _tokenizer(folder, tokenizer, [*described.notes(overrides), *remarks])
    kept = {key: value for key, value in config.items() if key not in ("norm_stats", POLICY)}
    origin: dict[str, Any] = {"kind": "hf", "name": folder.name, "config": kept}
    if parts.suffix:
        origin["oft"] = {"suffix": parts.suffix, "lora_rank": parts.lora_rank}
    weights = TorchWeights(model, "hf", tensors, str(folder))
    return Source(
        "hf", folder, model, weights, statistics, tokenizer, specs.preprocessing, origin, notes, specs.observation,
        specs.action,
    )  # fmt: skip


def describe_hf(
    config: Mapping[str, Any], processor: Mapping[str, Any], shapes: Mapping[str, Shape], name: str
) -> Description:
    """Returns what a HuggingFace folder's config.json and preprocessor_config.json say of the model in its tensors."""
    named = named_hf(config, processor)
    return describe(
        named,
        shapes,
        lambda index: tower_prefix(named, index, "hf"),
        "language_model.",
        text_config=config.get("text_config") or {},
        padding_rows=config.get("pad_to_multiple_of", HF_DEFAULTS["pad_to_multiple_of"]),
        name=name,
    )


def _statistics(folder: Path, otherwise: Any) -> Mapping[str, Any]:
    path = folder / "dataset_statistics.json"
    statistics = read_json(path) if path.exists() else otherwise
    where = path if path.exists() else f"{folder / 'config.json'}: norm_stats"
    try:
        if not isinstance(statistics, Mapping):
            raise ConversionError(f"statistics are {short(statistics)}, not an object of datasets: fix them")
        check_statistics(statistics, action_spec(statistics), ObservationSpec())
    except InputError as error:
        raise ConversionError.of(where, str(error)) from None
    return statistics


def _tokenizer(folder: Path, given: Path | None, notes: Sequence[str]) -> tuple[Path | None, list[str]]:
    if given is None and any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        given = folder
    missing = "no tokenizer files beside the weights: a policy needs them, --tokenizer FOLDER brings them"
    return given, [*notes, *([] if given else [missing])]


# ---------------------------------------------------------------------------------------------------------------------
# Native (Prismatic)
# ---------------------------------------------------------------------------------------------------------------------


def open_native(path: Path, parts: Mapping[str, str], overrides: Mapping[str, Any], tokenizer: Path | None) -> Source:
    """A `.pt` of the reference's trainer, with its run directory's JSON files where they are.

    Checkpoints of VLM training hold no vision backbone: `parts` then names the towers.
    """
    content = read_pt(path)
    if not isinstance(content.get("model"), Mapping):
        raise ConversionError(
            f"{path}: no 'model' in it ({', '.join(map(str, list(content)[:5]))}): not a Prismatic checkpoint"
        )
    run = next((folder for folder in path.absolute().parents[:2] if (folder / "config.json").exists()), path.parent)
    with reading(run / "config.json", "correct it, or pass --model_config", ConversionError):
        return _open_native(path, run, content["model"], parts, overrides, tokenizer)


def _open_native(
    path: Path, run: Path, content: Mapping[str, Any], parts: Mapping[str, str], overrides: Mapping[str, Any],
    tokenizer: Path | None,
) -> Source:  # fmt: skip
    if "preset" in overrides:
        named = preset(overrides["preset"])
        config = {}
    else:
        config = read_json(run / "config.json")
        named = named_native(config)
    tensors: dict[str, Any] = flatten(content)
    if parts or not any(name.startswith("vision_backbone.") for name in tensors):
        prefixes = {tower.name: tower_prefix(named, i, "native") for i, tower in enumerate(named.towers)}
        tensors = {name: t for name, t in tensors.items() if not name.startswith("vision_backbone.")}
        tensors = load_towers(named, parts, prefixes, where=str(path)) | tensors
    described = describe(
        named,
        {name: tensor.shape for name, tensor in tensors.items()},
        lambda index: tower_prefix(named, index, "native"),
        "llm_backbone.llm.",
        name=run.name,
    )
    overrides = merge(config.get("model_config") or {}, overrides)
    model = described.model(overrides)
    weights = TorchWeights(model, "native", tensors, str(path))
    statistics = _statistics(run, {})
    tokenizer, notes = _tokenizer(run, tokenizer, described.notes(overrides))
    origin = {"kind": "native", "name": path.stem, "config": config}
    action = action_spec(statistics)
    return Source("native", path, model, weights, statistics, tokenizer, AS_PROCESSOR, origin, notes, action=action)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """Nested dicts of tensors by dotted name."""
    tensors: dict[str, Tensor] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            tensors |= flatten(value, f"{prefix}{key}.")
        elif isinstance(value, Tensor):
            tensors[f"{prefix}{key}"] = value
        else:
            raise ConversionError(
                f"model.{prefix}{key} is {type(value).__name__}, not a tensor: not a Prismatic checkpoint"
            )
    return tensors


def _latest_pt(folder: Path) -> Path:
    """The latest step of a run, as its file names count them (`step-295000-epoch-40-loss=0.2200.pt`)."""

    def step(path: Path) -> tuple[int, str]:
        match = re.match(r"step-(\d+)", path.name)
        return (int(match[1]) if match else -1), path.name

    latest = folder / "latest-checkpoint.pt"
    return latest if latest.exists() else max(folder.glob("*.pt"), key=step)


# ---------------------------------------------------------------------------------------------------------------------
# Orbax
# ---------------------------------------------------------------------------------------------------------------------


def open_orbax(path: str | os.PathLike) -> Source:
    """A checkpoint of this project: an import, a step of a run, or a run (its latest step)."""
    directory = open_checkpoint(path)
    contract = load_contract(directory)
    if contract.adapter is not None:
        raise ConversionError(f"{directory} is an adapter of {contract.adapter['base']}: {MERGE}")
    tokenizer = directory / "contract" / "tokenizer" if contract.tokenizer is not None else None
    origin = contract.training.get("source", {})
    notes = [] if tokenizer else ["the checkpoint has no tokenizer: import it again with --tokenizer"]
    return Source(
        "orbax", directory, contract.model, OrbaxReader(directory), contract.statistics, tokenizer,
        contract.preprocessing, origin, notes, contract.observation, contract.action,
    )  # fmt: skip
