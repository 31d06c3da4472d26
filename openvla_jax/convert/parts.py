"""The parts that pretraining starts from: vision towers in timm's naming, a Llama in transformers', a Prismatic
projector.

They are put together under the names of a HuggingFace OpenVLA checkpoint, as the reference puts its modules together:
position tables resampled to the image size, a pad token's row (and rows up to a multiple of 64) added to the
vocabulary.
"""

import functools
import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from openvla_jax.config import VisionConfig, VLAConfig, padded_vocab_size, preset
from openvla_jax.convert.describe import describe, read_json
from openvla_jax.convert.names import ConversionError, tower_prefix
from openvla_jax.convert.source import Made, Source, TorchWeights
from openvla_jax.convert.torch_io import Tensor, read_pt, read_safetensors, read_torch_folder
from openvla_jax.types import Preprocessing

NEW_ROW_SCALE = 0.02  # standard deviation of new embedding rows, transformers' initializer_range
# Heads for other tasks, and what was only used to pretrain a tower: no part of it here.
NOT_OF_A_TOWER = ("head.", "head_dist.", "fc_norm.", "mask_token")
OPEN_CLIP_TOWER = "visual.trunk."  # timm's tower inside an open_clip file, beside the text tower


def open_parts(name: str, parts: Mapping[str, str], overrides: Mapping[str, Any], tokenizer: Path | None) -> Source:
    """Base weights for the model of the preset `name`. `parts`: a path for each tower by name, `llm`, and maybe
    `projector`.
    """
    named = preset(str(overrides.get("preset", name)))
    folder = Path(parts["llm"])
    known = {*(tower.name for tower in named.towers), "llm", "projector"}
    if set(parts) - known:
        raise ConversionError(f"parts {sorted(set(parts) - known)} are not of {name}: its parts are {sorted(known)}")
    tensors = load_towers(
        named, parts, {t.name: tower_prefix(named, i, "hf") for i, t in enumerate(named.towers)}, name
    )
    language, base_vocab = _language_model(folder, seed=named.vision_width)
    vision = sum(tensor.shape[0] for name, tensor in tensors.items() if name.endswith(".patch_embed.proj.weight"))
    width = language["language_model.model.embed_tokens.weight"].shape[1]
    projector, notes = _projector(named.projector.kind, parts.get("projector"), vision, width)
    tensors |= projector | language
    stated = {key: value for key, value in read_json(folder / "config.json").items() if key != "vocab_size"}
    described = describe(
        named,
        {name: tensor.shape for name, tensor in tensors.items()},
        lambda index: tower_prefix(named, index, "hf"),
        "language_model.",
        text_config=stated,
        padding_rows=language["language_model.lm_head.weight"].shape[0] - base_vocab,
        name=name,
    )
    model = described.model(overrides)
    weights = TorchWeights(model, "hf", tensors, name)
    if tokenizer is None and any((folder / file).exists() for file in ("tokenizer.json", "tokenizer.model")):
        tokenizer = folder
    origin = {"kind": "parts", "name": name, "parts": {key: Path(path).name for key, path in parts.items()}}
    return Source(
        "parts",
        folder,
        model,
        weights,
        {},
        tokenizer,
        Preprocessing(),
        origin,
        [*described.notes(overrides), *notes],
    )


# ---------------------------------------------------------------------------------------------------------------------
# Towers
# ---------------------------------------------------------------------------------------------------------------------


def load_towers(
    named: VLAConfig, parts: Mapping[str, str], prefixes: Mapping[str, str], where: str
) -> dict[str, Tensor | Made]:
    """All towers of a model from timm's files, under `prefixes` by tower name, at the model's image size."""
    missing = [tower.name for tower in named.towers if tower.name not in parts]
    if missing:
        wanted = " ".join(f"--part {name} PATH" for name in missing)
        raise ConversionError(f"{where}: no vision tower {' and '.join(missing)} in it: pass {wanted}")
    return {
        prefixes[tower.name] + name: tensor
        for tower in named.towers
        for name, tensor in _tower(tower, Path(parts[tower.name])).items()
    }


def _tower(config: VisionConfig, path: Path) -> dict[str, Tensor | Made]:
    stored = _read(path)
    if any(name.startswith(OPEN_CLIP_TOWER) for name in stored):
        stored = {n.removeprefix(OPEN_CLIP_TOWER): t for n, t in stored.items() if n.startswith(OPEN_CLIP_TOWER)}
    tensors: dict[str, Tensor | Made] = {n: t for n, t in stored.items() if not n.startswith(NOT_OF_A_TOWER)}
    if "pos_embed" not in tensors or "patch_embed.proj.weight" not in tensors:
        raise ConversionError(f"{path}: no pos_embed and patch_embed.proj.weight: not a ViT in timm's naming")
    size = config.image_size // tensors["patch_embed.proj.weight"].shape[-1]
    prefix = int(config.position_for_class_token)
    table = tensors["pos_embed"]
    if table.shape[1] != size * size + prefix:
        shape = (1, size * size + prefix, table.shape[2])
        tensors["pos_embed"] = Made(shape, table.dtype, lambda: resample_positions(table.read(), size, prefix))
    return tensors


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise ConversionError(f"{path} does not exist: pass a folder, or a .safetensors, .pt or .bin file")
    if path.is_dir():
        return read_torch_folder(path)
    return read_safetensors(path) if path.suffix == ".safetensors" else read_pt(path)


def resample_positions(table: np.ndarray, size: int, prefix: int) -> np.ndarray:
    """Position table [1, prefix + n * n, D] -> [1, prefix + size * size, D], as timm does when it makes a model.

    Bicubic with antialiasing, in float32, the rows of prefix tokens untouched.
    """
    old = math.isqrt(table.shape[1] - prefix)
    if old * old != table.shape[1] - prefix:
        raise ConversionError(f"pos_embed of shape {list(table.shape)} with {prefix} prefix rows is no square grid")
    grid = table[0, prefix:].astype(np.float32).reshape(old, old, -1)
    weights = _bicubic(old, size)
    grid = np.einsum("ih,hwd->iwd", weights, np.einsum("jw,hwd->hjd", weights, grid))
    return np.concatenate([table[0, :prefix], grid.reshape(size * size, -1).astype(table.dtype)])[None]


def _bicubic(old: int, new: int) -> np.ndarray:
    """[new, old] interpolation weights of PyTorch's antialiased bicubic resize (a = -0.5), float32."""
    scale = old / new
    stretch = max(scale, 1.0)
    centers = (np.arange(new) + 0.5) * scale
    x = np.abs((np.arange(old) + 0.5)[None] - centers[:, None]) / stretch
    a = -0.5
    near, far = ((a + 2) * x - (a + 3)) * x * x + 1, ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Language model and projector
# ---------------------------------------------------------------------------------------------------------------------


def _language_model(folder: Path, seed: int) -> tuple[dict[str, Tensor | Made], int]:
    """(tensors, entries of its tokenizer): the vocabulary padded as the reference pads it after adding `<PAD>`."""
    stored = _read(folder)
    tensors: dict[str, Tensor | Made] = {f"language_model.{name}": tensor for name, tensor in stored.items()}
    missing = [name for name in ("model.embed_tokens.weight", "lm_head.weight") if name not in stored]
    if missing:
        raise ConversionError(f"{folder}: {' and '.join(missing)} missing: not a Llama for causal language modelling")
    rows, width = stored["model.embed_tokens.weight"].shape
    padded = padded_vocab_size(rows)

    def extended(tensor: Tensor, key: int) -> Made:
        def read() -> np.ndarray:
            new = np.random.default_rng([seed, key]).normal(0.0, NEW_ROW_SCALE, (padded - rows, width))
            return np.concatenate([tensor.read(), new.astype(tensor.dtype)])

        return Made((padded, width), tensor.dtype, read)

    for key, name in enumerate(("model.embed_tokens.weight", "lm_head.weight")):
        tensors[f"language_model.{name}"] = extended(stored[name], key)
    return tensors, rows


def _projector(kind: str, path: str | None, vision: int, width: int) -> tuple[dict[str, Tensor | Made], list[str]]:
    """A stored projector under its HF names, or a new one as PyTorch initialises linear layers."""
    hidden = {"linear": [], "gelu-mlp": [width], "fused-gelu-mlp": [4 * vision, width]}[kind]
    sizes = [vision, *hidden, width]
    if path is not None:
        content = read_pt(Path(path))
        stored = (content.get("model") or {}).get("projector")
        if not isinstance(stored, Mapping):
            raise ConversionError(f"{path}: no model.projector in it: not a Prismatic checkpoint")
        names = ["projector."] if kind == "linear" else [f"projector.{2 * i}." for i in range(len(sizes) - 1)]
        pairs = ((old, i, part) for i, old in enumerate(names, start=1) for part in ("weight", "bias"))
        renamed = {f"{old}{part}": f"projector.fc{i}.{part}" for old, i, part in pairs}
        return {renamed.get(name, f"projector.{name}"): tensor for name, tensor in stored.items()}, []
    random = np.random.default_rng(vision)
    tensors: dict[str, Tensor | Made] = {}
    for i, (size_in, size_out) in enumerate(itertools.pairwise(sizes), start=1):
        for part, shape in (("weight", (size_out, size_in)), ("bias", (size_out,))):
            values = random.uniform(-(size_in**-0.5), size_in**-0.5, shape).astype(np.float32)
            tensors[f"projector.fc{i}.{part}"] = Made(shape, values.dtype, functools.partial(np.asarray, values))
    return tensors, ["no projector given: it is initialised at random, as for a first alignment"]
