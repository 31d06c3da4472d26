"""Adapters in PEFT's files (`adapter_config.json`, `adapter_model.safetensors`), as OpenVLA's own fine-tuning saves
them: which tensor is which factor, and which settings are understood.
"""

import collections
import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from openvla_jax.checkpoint.contract import is_finite, short
from openvla_jax.config import LoRAConfig, VLAConfig, nearest
from openvla_jax.convert.describe import read_json
from openvla_jax.convert.names import TRANSFORMS, ConversionError, Shape, is_stacked, table
from openvla_jax.convert.source import require_finite
from openvla_jax.convert.torch_io import Tensor, read_safetensors
from openvla_jax.convert.torch_write import fill, lay_out_safetensors
from openvla_jax.models.tuning import MODES, Tuning, abstract_prepared, sites_of

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# Settings that leave the merged weights as they are: where the adapter is from, and which modules have one, which its
# tensors show. Those of a method that `init_lora_weights` or a switch below must have chosen are among them.
FREE = {
    "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "exclude_modules", "layers_pattern",
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type",
    "megatron_core", "qalora_group_size", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "ensure_weight_tying", "runtime_config",
}  # fmt: skip
# Settings that change what the factors mean, and the values for which nothing changes. Others are refused unless they
# are off: null, false or empty.
PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": (True, False, "gaussian", "orthogonal", None),
}  # fmt: skip
OFF = (None, False, [], {})
CONVERTIBLE = ("pissa", "olora", "corda", "lora_ga")  # beginnings of init_lora_weights that change the base


class Module(NamedTuple):
    """A module of the PyTorch model that may have an adapter."""

    path: str  # of the place in this project's tree, as `models/tuning.py` names it
    layer: int | None  # of its stack
    patches: bool  # a convolution
    rows: int
    columns: int


def modules(config: VLAConfig) -> dict[str, Module]:
    """All modules with a kernel, by PyTorch name; one for the three input projections that the reference fuses."""
    found = {}
    for slot in table(config, "hf"):
        if not slot.target.endswith("/kernel") or slot.block:
            continue
        name = slot.source.removesuffix(".weight")
        path = slot.target.removeprefix("params/").removesuffix("/kernel")
        if slot.blocks > 1:
            path = f"{path.rpartition('/')[0]}/{name.rpartition('.')[2]}"
        columns, *rest = slot.source_shape
        found[name] = Module(path, slot.layer, slot.transform == "patches", int(np.prod(rest)), columns)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def read_peft(folder: Path, config: VLAConfig) -> tuple[Tuning, dict[str, np.ndarray], dict[str, Tensor]]:
    """(tuning, factors by path `.../lora/a`, copies of base weights by PyTorch name) of an adapter's folder.

    Raises ConversionError with all that does not fit the model, or for settings that are not understood.
    """
    settings = read_settings(folder / CONFIG)
    if not (folder / WEIGHTS).exists():
        raise ConversionError(f"{folder / WEIGHTS} is missing: save the adapter as safetensors")
    rank = settings.rank
    factors: dict[str, dict[int | None, np.ndarray]] = {}
    copies, problems, known = {}, [], modules(config)
    for key, tensor in read_safetensors(folder / WEIGHTS).items():
        name, _, what = key.removeprefix(PREFIX).partition(".lora_")
        if not what:
            copies[re.sub(r"(\.base_layer)?\.weight$", "", name)] = tensor
        elif name not in known or what not in ("A.weight", "B.weight"):
            problems.append(f"{key}: {nearest(name, known)}" if name not in known else f"{key}: no factor of LoRA")
        elif tensor.shape != (shape := _torch_shape(known[name], what[0], rank)):
            problems.append(f"{key}: shape {list(tensor.shape)}, wanted {list(shape)}")
        else:
            require_finite(tensor.read(), key, folder)
            path = f"{known[name].path}/lora/{what[0].lower()}"
            x = np.array(_to_tree(tensor.read(), known[name], what[0]), np.float32)
            factors.setdefault(path, {})[known[name].layer] = x
    problems += [f"{name}: not part of the model" for name in copies if name not in known]
    depth = collections.Counter(module.path for module in known.values())
    leaves = {}
    for path, layers in factors.items():
        site = path.rpartition("/lora/")[0]
        if len(layers) != depth[site]:
            problems.append(f"{site}: {len(layers)} of {depth[site]} layers have {path[-1].upper()}")
        else:
            leaves[path] = np.stack([layers[i] for i in range(len(layers))]) if is_stacked(path) else layers[None]
    paired = {path.rpartition("/")[0] for path in leaves}
    problems += [f"{p}: only one of its two factors" for p in paired if not {f"{p}/a", f"{p}/b"} <= set(leaves)]
    if problems or not leaves:
        listed = "; ".join(problems[:8]) + (f" and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise ConversionError(f"{folder} is no adapter of {config.name}: {listed or 'it holds no factors'}")
    targets = name_targets(config, {path.rpartition("/lora")[0] for path in paired})
    lora = dataclasses.replace(settings, targets=targets)
    return Tuning(MODES["lora"], lora), leaves, copies


def read_settings(path: Path) -> LoRAConfig:
    """Returns rank, alpha and dropout of an `adapter_config.json`, with `targets` left as they are.

    PEFT scales by alpha / sqrt(rank) with `use_rslora`: the alpha returned is the one that gives the same scale.

    Raises:
        ConversionError: a setting is missing, or is not known to leave the factors' meaning as it is.
    """
    settings = read_json(path)
    for key, value in settings.items():
        if key not in FREE and value not in PLAIN.get(key, OFF):
            raise ConversionError.of(path, f"{key} is {short(value)}: {_only(key)}", _remedy(key, value))
    rank: Any = settings.get("r")
    alpha: Any = settings.get("lora_alpha")
    dropout, rslora = settings.get("lora_dropout") or 0.0, settings.get("use_rslora") or False
    again = "save the adapter again"
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ConversionError.of(path, f"r is {short(rank)}, not a whole number of at least 1", again)
    if not is_finite(alpha) or alpha <= 0:
        raise ConversionError.of(path, f"lora_alpha is {short(alpha)}, not a number above 0", again)
    if not is_finite(dropout) or not 0 <= dropout < 1:
        raise ConversionError.of(path, f"lora_dropout is {short(dropout)}, not a number from 0 to below 1", again)
    if not isinstance(rslora, bool):
        raise ConversionError.of(path, f"use_rslora is {short(rslora)}, not true or false", again)
    return LoRAConfig(rank, float(alpha) * (math.sqrt(rank) if rslora else 1.0), float(dropout))


def _only(key: str) -> str:
    if key not in PLAIN:
        return "such adapters cannot be read"
    return f"only {', '.join(json.dumps(value) for value in PLAIN[key] if value is not None)} can be read"


def _remedy(key: str, value: Any) -> str:
    if key == "init_lora_weights" and isinstance(value, str) and value.startswith(CONVERTIBLE):
        return (
            "its factors belong to a base that this method changed; save it as plain LoRA: "
            "save_pretrained(..., path_initial_model_for_weight_conversion=INITIAL_ADAPTER)"
        )
    return "merge it with PEFT (merge_and_unload), save the model and import that"


def name_targets(config: VLAConfig, paths: set[str]) -> str:
    """The shortest name of a set of places: one of the two sets that have names, or all paths."""
    for name in ("all", "reference"):
        if sites_of(abstract_prepared(config, Tuning(MODES["lora"], LoRAConfig(1, targets=name)))) == paths:
            return name
    return ",".join(sorted(paths))


def _torch_shape(module: Module, factor: str, rank: int) -> Shape:
    if not module.patches:
        return (rank, module.rows) if factor == "A" else (module.columns, rank)
    return TRANSFORMS["patches"].torch_shape((module.rows, rank)) if factor == "A" else (module.columns, rank, 1, 1)


def _to_tree(x: np.ndarray, module: Module, factor: str) -> np.ndarray:
    if module.patches:
        return TRANSFORMS["patches"].to_tree(x) if factor == "A" else x[:, :, 0, 0].T
    return x.T


def _to_torch(x: np.ndarray, module: Module, factor: str) -> np.ndarray:
    if module.patches:
        return TRANSFORMS["patches"].to_torch(x) if factor == "A" else x.T[:, :, None, None]
    return x.T


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def write_peft(folder: Path, config: VLAConfig, tuning: Tuning, leaves: Mapping[str, np.ndarray], base: str) -> None:
    """The two files in an existing folder. PEFT's own copy of the output head is left out: it is the base's."""
    lora = tuning.lora
    assert lora is not None
    adapted = {name: m for name, m in modules(config).items() if f"{m.path}/lora/a" in leaves}
    specs = {
        f"{PREFIX}{name}.lora_{factor}.weight": (np.dtype(np.float32), _torch_shape(module, factor, lora.rank))
        for name, module in adapted.items()
        for factor in "AB"
    }
    tensors = lay_out_safetensors(folder, specs, shard_bytes=2**62)
    for name, module in adapted.items():
        for factor in "AB":
            x = leaves[f"{module.path}/lora/{factor.lower()}"]
            x = x if module.layer is None or not is_stacked(module.path + "/") else x[module.layer]
            x = np.ascontiguousarray(_to_torch(x, module, factor).astype(np.float32))
            fill(tensors[f"{PREFIX}{name}.lora_{factor}.weight"], 0, x)
    (folder / "model.safetensors").rename(folder / WEIGHTS)
    settings = {
        "alpha_pattern": {}, "auto_mapping": {"base_model_class": "OpenVLAForActionPrediction"},
        "base_model_name_or_path": base, "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
        "init_lora_weights": "gaussian", "layers_pattern": None, "layers_to_transform": None,
        "lora_alpha": lora.scale * lora.rank, "lora_dropout": lora.dropout, "modules_to_save": None,
        "peft_type": "LORA", "r": lora.rank, "rank_pattern": {}, "revision": None,
        "target_modules": target_expression(adapted), "task_type": None, "use_dora": False, "use_rslora": False,
    }  # fmt: skip
    (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")


def target_expression(names: Iterable[str]) -> str:
    """A regular expression of exactly these modules, which PEFT matches with full names: lists match by suffix, and
    would also adapt what is not in them.
    """
    numbers: dict[str, list[str]] = {}
    for name in names:
        template = re.sub(r"\.\d+\.", ".#.", name)
        numbers.setdefault(template, []).extend(re.findall(r"\.(\d+)\.", name))
    parts = [re.escape(t).replace(r"\#", f"({'|'.join(found)})") for t, found in numbers.items()]
    return f"({'|'.join(parts)})"
