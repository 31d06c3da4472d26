"""Which model a PyTorch checkpoint holds: named by its JSON files, sized by its tensors.

The reference's files name a vision backbone and a language model, and say little else. Widths, depths and so on are
read off the tensors' shapes. What shapes do not show is taken from the named model where the width is the named
one's, so for every published checkpoint. In shrunken ones (tests) an attention has `SHRUNKEN_HEADS` heads and the
rest are transformers' defaults, unless the files or the user's overrides say otherwise; every such guess is noted.
"""

import copy
import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from openvla_jax.checkpoint.contract import parse_object
from openvla_jax.config import (
    LANGUAGE_MODELS,
    PRESETS,
    VISION_BACKBONES,
    LlamaConfig,
    VisionConfig,
    VLAConfig,
    compose,
    nearest,
    preset,
)
from openvla_jax.convert.names import ConversionError, Shape
from openvla_jax.errors import reading

SHRUNKEN_HEADS = 4

# timm's names of the towers; where timm's activation is overridden (as the HF class does) the HF config says so.
TIMM_IDS: dict[str, tuple[str, ...]] = {
    "clip-vit-b": ("vit_base_patch16_clip_224.openai",),
    "clip-vit-l": ("vit_large_patch14_clip_224.openai",),
    "clip-vit-l-336px": ("vit_large_patch14_clip_336.openai",),
    "siglip-vit-b16-224px": ("vit_base_patch16_siglip_224",),
    "siglip-vit-b16-256px": ("vit_base_patch16_siglip_256",),
    "siglip-vit-b16-384px": ("vit_base_patch16_siglip_384",),
    "siglip-vit-so400m": ("vit_so400m_patch14_siglip_224",),
    "siglip-vit-so400m-384px": ("vit_so400m_patch14_siglip_384",),
    "dinov2-vit-l": ("vit_large_patch14_reg4_dinov2.lvd142m",),
    "in1k-vit-l": ("vit_large_patch16_224.augreg_in21k_ft_in1k",),
    "dinosiglip-vit-so-224px": ("vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"),
    "dinosiglip-vit-so-384px": ("vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_384"),
    "dinoclip-vit-l-336px": ("vit_large_patch14_reg4_dinov2.lvd142m", "vit_large_patch14_clip_336.openai"),
}
# What the HF class fills in where config.json is silent.
HF_DEFAULTS: dict[str, Any] = {
    "vision_backbone_id": "siglip-vit-so400m",
    "llm_backbone_id": "vicuna-v15-7b",
    "image_resize_strategy": "letterbox",
    "pad_to_multiple_of": 64,
    "llm_max_length": 2048,
    "n_action_bins": 256,
}
LLM_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "sliding_window": None},
    "mistral": {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "sliding_window": 4096},
}

Shapes = Mapping[str, Shape]
_NESTED = ("preset", "towers", "llama", "projector")  # keys of overrides that are no fields of the model


@dataclasses.dataclass(frozen=True)
class Description:
    """What a checkpoint says of its model (as `VLAConfig.to_dict`), and where heads were guessed.

    `guessed`: the width of each such tower, and of "llama".
    """

    data: Mapping[str, Any]
    guessed: Mapping[str, int]

    def model(self, overrides: Mapping[str, Any]) -> VLAConfig:
        """The model with nested overrides: sections, towers by name, top-level fields."""
        data = copy.deepcopy(dict(self.data)) | {key: v for key, v in overrides.items() if key not in _NESTED}
        for section in ("llama", "projector"):
            data[section] |= dict(overrides.get(section) or {})
        if "kv_heads" not in overrides.get("llama", {}):
            data["llama"]["kv_heads"] = (
                data["llama"]["heads"] * self.data["llama"]["kv_heads"] // self.data["llama"]["heads"]
            )
        names = [tower["name"] for tower in data["towers"]]
        for name, values in (overrides.get("towers") or {}).items():
            if name not in names:
                raise ConversionError(f"--model_config: no tower {name!r} in this model; {nearest(name, names)}")
            data["towers"][names.index(name)] |= values
        try:
            return VLAConfig.from_dict(data)
        except ValueError as error:
            raise ConversionError(f"{error}; --model_config sets what the files do not say") from None

    def notes(self, overrides: Mapping[str, Any]) -> list[str]:
        """A line for each guess that no override replaces."""
        lines = []
        for name, width in self.guessed.items():
            override = {"llama": {"heads": "N"}} if name == "llama" else {"towers": {name: {"heads": "N"}}}
            section = overrides.get("llama") if name == "llama" else (overrides.get("towers") or {}).get(name)
            if "heads" not in (section or {}):
                lines.append(
                    f"{name} is {width} wide, unlike the named model, and nothing says how many heads it has: "
                    f"{SHRUNKEN_HEADS} assumed; --model_config '{json.dumps(override)}' says otherwise"
                )
        return lines


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file. Raises ConversionError if it is missing or holds no object."""
    if not path.exists():
        raise ConversionError(f"{path} is missing: name a folder that has it")
    with reading(path, "download it again", ConversionError):
        text = path.read_bytes()
    try:
        return parse_object(text)
    except ValueError as error:
        raise ConversionError(f"{path} {error}: download it again") from None


def read_overrides(text: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """`--model_config`: a JSON file, JSON text, or a preset's name."""
    if text is None or isinstance(text, Mapping):
        return dict(text or {})
    if Path(text).suffix == ".json":
        return read_json(Path(text))
    if not text.lstrip().startswith("{"):
        return {"preset": text}
    try:
        return parse_object(text.encode())
    except ValueError as error:
        raise ConversionError(f"--model_config {text!r} {error}: pass JSON, a .json file or a preset") from None


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Nested overrides `over` on top of `base`."""
    both = {
        key: merge(base[key], over[key])
        for key in base
        if isinstance(base[key], Mapping) and isinstance(over.get(key), Mapping)
    }
    return {**base, **over, **both}


# ---------------------------------------------------------------------------------------------------------------------
# Named
# ---------------------------------------------------------------------------------------------------------------------


def named_hf(config: Mapping[str, Any], processor: Mapping[str, Any]) -> VLAConfig:
    """The model that a HuggingFace config.json names; its class takes three projector layers for two towers, else two.

    `processor` is preprocessor_config.json, or empty: what it states of images is what the HF code normalises with.
    """
    config = {**HF_DEFAULTS, **config}
    _known(config["vision_backbone_id"], VISION_BACKBONES, "vision_backbone_id")
    _known(config["llm_backbone_id"], LANGUAGE_MODELS, "llm_backbone_id")
    named = compose(config["vision_backbone_id"], config["llm_backbone_id"], None, config["image_resize_strategy"])
    sizes = config.get("image_sizes") or [tower.image_size for tower in named.towers]
    # The HF class runs quick GELU in every CLIP tower unless its file says otherwise.
    default = ["quick_gelu" if tower.name == "clip" else None for tower in named.towers]
    acts = config.get("timm_override_act_layers") or default
    if not len(sizes) == len(acts) == len(named.towers):
        raise ConversionError(
            f"config.json: image_sizes {sizes} and timm_override_act_layers {acts} for {len(named.towers)} towers"
        )
    stated = processor.get("tvf_normalize_params") or [
        {"mean": mean, "std": std}
        for mean, std in zip(processor.get("means", ()), processor.get("stds", ()), strict=False)
    ]
    if len(stated) not in (0, len(sizes)):
        raise ConversionError(f"preprocessor_config.json: image statistics for {len(stated)} towers of {len(sizes)}")
    towers = []
    for index, (tower, size, act) in enumerate(zip(named.towers, sizes, acts, strict=True)):
        pixels: Any = {key: tuple(stated[index][key]) for key in ("mean", "std")} if stated else {}
        towers.append(dataclasses.replace(tower, image_size=int(size), activation=act or "gelu", **pixels))
    return dataclasses.replace(
        named,
        towers=tuple(towers),
        resize=processor.get("image_resize_strategy", named.resize),
        llama=dataclasses.replace(named.llama, max_length=int(config["llm_max_length"])),
    )


def named_native(config: Mapping[str, Any]) -> VLAConfig:
    """The model that a run directory's config.json names: a VLA run by its base VLM, a VLM run by its backbones."""
    if "vla" in config:
        names = [str(config["vla"].get(key, "")) for key in ("base_vlm", "vla_id")]
        # `base_vlm` may be a path to the VLM's checkpoint: some part of it is the name.
        for name in [part for given in names for part in [given, *reversed(Path(given).parts)]]:
            if name in PRESETS:
                return preset(name)
        raise ConversionError(
            f"config.json: base_vlm {names[0]!r} is not known; {nearest(names[0], PRESETS)}; or pass --model_config"
        )
    model = config.get("model")
    if not isinstance(model, Mapping) or "vision_backbone_id" not in model:
        raise ConversionError("config.json is not of a Prismatic or OpenVLA run: pass --model_config with its preset")
    _known(model["vision_backbone_id"], VISION_BACKBONES, "vision_backbone_id")
    _known(model["llm_backbone_id"], LANGUAGE_MODELS, "llm_backbone_id")
    arch = model.get("arch_specifier", "")
    kinds = [kind for kind in ("fused-gelu-mlp", "gelu-mlp", "linear") if arch.endswith(kind)]
    if not kinds:
        raise ConversionError(
            f"config.json: arch_specifier {arch!r} is not known: linear, *gelu-mlp or *fused-gelu-mlp"
        )
    return compose(model["vision_backbone_id"], model["llm_backbone_id"], kinds[0], model["image_resize_strategy"])


def _known(name: str, table: Mapping[str, Any], what: str) -> None:
    if name not in table:
        raise ConversionError(f"config.json: {what} {name!r} is not supported; {nearest(name, table)}")


# ---------------------------------------------------------------------------------------------------------------------
# Sized
# ---------------------------------------------------------------------------------------------------------------------


def describe(
    named: VLAConfig,
    shapes: Shapes,
    prefixes: Callable[[int], str],
    llama_prefix: str,
    *,
    text_config: Mapping[str, Any] | None = None,
    padding_rows: int | None = None,
    name: str,
) -> Description:
    """The model in a checkpoint: `named`, with the sizes of its tensors and the numbers that its files state.

    `prefixes(i)` begins the names of tower i's tensors; `text_config` is the language model's part of a HF config.json,
    whose tokenizer has `padding_rows` fewer entries than the embedding has rows.
    Raises ConversionError where a tensor is missing that sizes are read from, or a stated number is another.
    """
    guessed: dict[str, int] = {}
    data = named.to_dict() | {"name": name}
    data["towers"] = list(data["towers"])
    for index, tower in enumerate(named.towers):
        values = _tower(tower, _below(shapes, prefixes(index)), prefixes(index))
        if values["width"] != tower.width:
            values["heads"] = SHRUNKEN_HEADS
            guessed[tower.name] = values["width"]
        data["towers"][index] |= values
    values = _llama(named.llama, _below(shapes, llama_prefix), llama_prefix, text_config)
    if values["width"] != named.llama.width and "num_attention_heads" not in (text_config or {}):
        guessed["llama"] = values["width"]
    data["llama"] |= values
    if padding_rows is not None:
        data["base_vocab_size"] = values["vocab_size"] - padding_rows
    return Description(data, guessed)


def _tower(named: VisionConfig, shapes: Shapes, prefix: str) -> dict[str, Any]:
    width, _, patch, _ = _need(shapes, "patch_embed.proj.weight", prefix, 4)
    depth = _layers(shapes, "blocks", prefix)
    positions = _need(shapes, "pos_embed", prefix, 3)[1] - int(named.position_for_class_token)
    if positions != (named.image_size // patch) ** 2:
        raise ConversionError(
            f"{prefix}pos_embed has {positions} patches, but {named.image_size} px in patches of {patch} are "
            f"{(named.image_size // patch) ** 2}: the files name another image size"
        )
    sizes = {
        "width": width,
        "patch_size": patch,
        "depth": depth,
        "mlp_dim": _need(shapes, "blocks.0.mlp.fc1.weight", prefix)[0],
    }
    return sizes | ({"registers": _need(shapes, "reg_token", prefix, 3)[1]} if named.registers else {})


def _llama(named: LlamaConfig, shapes: Shapes, prefix: str, stated: Mapping[str, Any] | None) -> dict[str, Any]:
    vocab, width = _need(shapes, "model.embed_tokens.weight", prefix)
    values: dict[str, Any] = {
        "vocab_size": vocab,
        "width": width,
        "depth": _layers(shapes, "model.layers", prefix),
        "mlp_dim": _need(shapes, "model.layers.0.mlp.gate_proj.weight", prefix)[0],
    }
    kv_width = _need(shapes, "model.layers.0.self_attn.k_proj.weight", prefix)[0]
    full_size = width == named.width
    values["heads"] = named.heads if full_size else SHRUNKEN_HEADS
    if stated is not None:
        values |= _stated(stated, values, prefix)
    elif not full_size:
        values |= {"norm_eps": LLM_DEFAULTS["llama"]["rms_norm_eps"], "rope_theta": LLM_DEFAULTS["llama"]["rope_theta"]}
    values["kv_heads"] = kv_width * values["heads"] // width
    return values


def _stated(text_config: Mapping[str, Any], found: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The numbers of a HF text_config, with transformers' defaults for what it leaves out."""
    kind = text_config.get("model_type", "llama")
    if kind not in LLM_DEFAULTS:
        raise ConversionError(
            f"config.json: text_config.model_type {kind!r} is not supported: {' or '.join(LLM_DEFAULTS)}"
        )
    rope = text_config.get("rope_parameters") or text_config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise ConversionError(f"config.json: text_config asks for scaled RoPE {dict(rope)}, which is not supported")
    config = LLM_DEFAULTS[kind] | dict(text_config)
    names = {
        "hidden_size": "width",
        "num_hidden_layers": "depth",
        "intermediate_size": "mlp_dim",
        "vocab_size": "vocab_size",
    }
    for key, field in names.items():
        if key in text_config and text_config[key] != found[field]:
            raise ConversionError(
                f"config.json: text_config.{key} is {text_config[key]}, but the tensors of {prefix} have {found[field]}"
            )
    return {
        "heads": config.get("num_attention_heads", found["heads"]),
        "norm_eps": float(config["rms_norm_eps"]),
        "rope_theta": float(rope.get("rope_theta", config["rope_theta"])),
        "sliding_window": config["sliding_window"],
    }


def _below(shapes: Shapes, prefix: str) -> dict[str, Shape]:
    return {name[len(prefix) :]: shape for name, shape in shapes.items() if name.startswith(prefix)}


def _need(shapes: Shapes, name: str, prefix: str, rank: int = 2) -> Shape:
    if len(shapes.get(name, ())) != rank:
        found = f"has shape {list(shapes[name])}" if name in shapes else "is missing"
        raise ConversionError(
            f"{prefix}{name} {found}: the weights are incomplete, or of another model than the files name"
        )
    return shapes[name]


def _layers(shapes: Shapes, stem: str, prefix: str) -> int:
    numbers = [int(match[1]) for name in shapes if (match := re.match(rf"{re.escape(stem)}\.(\d+)\.", name))]
    if not numbers:
        raise ConversionError(f"{prefix}{stem}.* are missing: the weights are incomplete, or of another model")
    return max(numbers) + 1
