"""Model configurations: frozen dataclasses, and every backbone and registered run of OpenVLA as a preset by name.

Plain data: nothing here imports JAX. Sizes are the published models' (arXiv 2406.09246, Prismatic VLMs); what a
checkpoint states about itself (RMSNorm eps, image statistics) is kept in the checkpoint and replaces the values here.
"""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from openvla_jax.errors import InputError

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
# How a model predicts actions (`models/heads.py`). All but "tokens" predict a chunk at once.
HEADS = ("tokens", "parallel_tokens", "l1", "diffusion")
CONTINUOUS_HEADS = HEADS[2:]  # which predict numbers
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """One ViT tower. `name` is its place in the parameter tree; `depth` counts the reference's blocks, of which the
    last is never run (features are the output of block `depth - 2`, without final norm, prefix tokens dropped)."""

    name: str
    width: int
    depth: int
    heads: int
    mlp_dim: int
    image_size: int = 224
    patch_size: int = 14
    registers: int = 0
    class_token: bool = False
    position_for_class_token: bool = False  # the position table has a row for the class token (CLIP, ImageNet ViT)
    layer_scale: bool = False
    pre_norm: bool = False  # LayerNorm before the first block; its patch convolution has no bias (CLIP)
    attention_pool: bool = False  # SigLIP's pooling head: in checkpoints, never run
    activation: str = "gelu"  # exact erf GELU, as timm evaluates it; or quick_gelu
    norm_eps: float = 1e-6
    mean: tuple[float, ...] = HALF[0]
    std: tuple[float, ...] = HALF[1]

    @property
    def patches(self) -> int:
        """Patches of one image; pixels beyond the last whole patch are ignored (384 px / 14)."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def prefix_tokens(self) -> int:
        return int(self.class_token) + self.registers


@dataclasses.dataclass(frozen=True)
class ProjectorConfig:
    """Vision features to language embeddings: `linear`, `gelu-mlp` (two layers) or `fused-gelu-mlp` (three, 4x
    wide).
    """

    kind: str = "fused-gelu-mlp"


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """A Llama-2 family decoder (Vicuna and Mistral included). `vocab_size` is the padded number of embedding rows."""

    width: int = 4096
    depth: int = 32
    heads: int = 32
    kv_heads: int = 32
    mlp_dim: int = 11008
    vocab_size: int = 32064
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5  # training value; the HF export of openvla-7b runs with 1e-6 and its checkpoint says so
    sliding_window: int | None = None
    max_length: int = 2048

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


@dataclasses.dataclass(frozen=True)
class VLAConfig:
    """A whole vision-language-action model: towers in channel order, projector, language model, token layout."""

    name: str
    towers: tuple[VisionConfig, ...]
    llama: LlamaConfig
    projector: ProjectorConfig = ProjectorConfig()
    resize: str = "resize-naive"  # or resize-crop, letterbox
    prompt_family: str = "pure"
    cameras: int = 1  # images of one observation, each of which becomes patches
    state_dim: int = 0  # columns of the state, which becomes one token; 0: none
    head: str = "tokens"  # one of HEADS
    action_dim: int = 0  # of the heads "l1" and "diffusion", whose parameters depend on it; 0 for the others
    film: bool = False  # the towers' blocks are modulated by the instruction
    base_vocab_size: int = 32000  # the tokenizer's own entries: action tokens are its last `ActionSpec.bins`

    def __post_init__(self) -> None:
        sections = {f"tower {t.name!r}": t for t in self.towers} | {"llama": self.llama}
        problems = [
            f"{where}: {field.name} must be a whole number of at least 1, got {value!r}"
            for where, section in sections.items()
            for field in dataclasses.fields(section)
            if field.type is int and field.name != "registers"
            for value in [getattr(section, field.name)]
            if not isinstance(value, int) or value < 1
        ]
        if problems:  # the checks below divide by these
            raise InputError(f"model config {self.name!r}: " + "; ".join(problems))
        for t in self.towers:
            if t.width % t.heads:
                problems.append(f"tower {t.name!r}: width {t.width} is not a multiple of heads {t.heads}")
            if t.depth < 2:
                problems.append(f"tower {t.name!r}: depth {t.depth} is below 2, and the last block never runs")
            if not t.patches:
                problems.append(f"tower {t.name!r}: image_size {t.image_size} is below patch_size {t.patch_size}")
            if t.activation not in ("gelu", "quick_gelu"):
                problems.append(f"tower {t.name!r}: unknown activation {t.activation!r}: gelu or quick_gelu")
        if self.llama.width % self.llama.heads or self.llama.heads % self.llama.kv_heads:
            problems.append(
                f"llama: width {self.llama.width}, heads {self.llama.heads}, kv_heads {self.llama.kv_heads} are at odds"
            )
        elif self.llama.head_dim % 2:
            problems.append(
                f"llama: head dim {self.llama.head_dim} (width / heads) is odd, rotary embedding pairs halves"
            )
        if self.llama.sliding_window is not None and self.llama.sliding_window < 1:
            problems.append(f"llama: sliding_window {self.llama.sliding_window} sees no key: None or at least 1")
        if len({t.name for t in self.towers}) != len(self.towers) or not self.towers:
            problems.append(f"towers need distinct names, got {[t.name for t in self.towers]}")
        if len({(t.image_size, t.patches) for t in self.towers}) > 1:
            problems.append(
                f"towers differ in image size or patches: {[(t.name, t.image_size, t.patches) for t in self.towers]}"
            )
        if self.base_vocab_size >= self.llama.vocab_size:
            problems.append(
                f"llama.vocab_size {self.llama.vocab_size} has no row for the pad token, {self.base_vocab_size}"
            )
        if self.projector.kind not in ("linear", "gelu-mlp", "fused-gelu-mlp"):
            problems.append(f"unknown projector.kind {self.projector.kind!r}: linear, gelu-mlp or fused-gelu-mlp")
        if self.head not in HEADS:
            problems.append(f"unknown head {self.head!r}: one of {', '.join(HEADS)}")
        elif self.is_continuous != (self.action_dim > 0):
            problems.append(f"head {self.head!r}, action_dim {self.action_dim}: l1 and diffusion need one, others 0")
        if self.resize not in ("resize-naive", "resize-crop", "letterbox"):
            problems.append(f"unknown resize {self.resize!r}: resize-naive, resize-crop or letterbox")
        if problems:
            raise InputError(f"model config {self.name!r}: " + "; ".join(problems))

    @property
    def is_continuous(self) -> bool:
        """Whether the head predicts numbers, with parameters beside the language model's."""
        return self.head in CONTINUOUS_HEADS

    @property
    def is_parallel(self) -> bool:
        """Whether a chunk is predicted at once: attention then is not causal."""
        return self.head != "tokens"

    @property
    def image_size(self) -> int:
        return self.towers[0].image_size

    @property
    def patches(self) -> int:
        return self.towers[0].patches

    @property
    def vision_width(self) -> int:
        return sum(tower.width for tower in self.towers)

    @property
    def end_token(self) -> int:
        """Id of `</s>`, the same in all Llama-2 family tokenizers."""
        return 2

    @property
    def pad_token(self) -> int:
        """Id of `<PAD>`, added after the tokenizer's own entries."""
        return self.base_vocab_size

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "VLAConfig":
        """Inverse of `to_dict`; unknown keys raise with the nearest right one."""
        data = dict(data)
        if "towers" in data:
            data["towers"] = tuple(from_dict(VisionConfig, tower, "towers") for tower in data["towers"])
        for section, kind in (("llama", LlamaConfig), ("projector", ProjectorConfig)):
            if section in data:
                data[section] = from_dict(kind, data[section], section)
        return from_dict(cls, data, "model")


# The trainable parts of the paper's fine-tuning table (arXiv 2406.09246, Table 1): patterns of `config.trainable`,
# separated by commas.
TRAINABLE: dict[str, str] = {
    "full": "*",
    "last_layer": "llama/embed,llama/last,llama/head",
    "frozen_vision": "projector,llama",
    "sandwich": "vision,projector,llama/embed,llama/last,llama/head",
    "lora": "*/lora",
}


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters beside frozen kernels (`models/lora.py`), scaled by alpha / rank.

    `targets`: "all" (every linear layer that is run), "reference" (what PEFT's all-linear adapts in OpenVLA: also patch
    embeddings and the tensors that are never run), or path patterns separated by commas.
    """

    rank: int = 0  # 0: no adapters
    alpha: float | None = None  # None: min(rank, 16), the reference's choice
    dropout: float = 0.0
    targets: str = "all"

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise InputError(f"lora.rank {self.rank}: at least 1, or 0 for no adapters")
        if not 0 <= self.dropout < 1:
            raise InputError(f"lora.dropout {self.dropout}: at least 0 and below 1")
        if self.alpha is not None and self.alpha <= 0:
            raise InputError(f"lora.alpha {self.alpha}: above 0, or None for min(rank, 16)")

    @property
    def scale(self) -> float:
        return (min(self.rank, 16) if self.alpha is None else self.alpha) / self.rank


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the closest of the known names, then all of them (at most 20)."""
    known = sorted(str(k) for k in known)
    listed = ", ".join(known[:20]) + (", ..." if len(known) > 20 else "")
    return " ".join([*did_you_mean(name, known), f"known: {listed or 'none'}"])


def did_you_mean(name: str, known: Iterable[str]) -> list[str]:
    """Returns a question that names the closest of the known names, or nothing if none is close."""
    close = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.4)
    return [f"did you mean {close[0]!r}?"] if close else []


def from_dict(cls: Any, data: Mapping[str, Any], where: str) -> Any:
    """Makes a dataclass from a mapping; lists become tuples. Raises InputError that names an unknown or missing key."""
    fields = {field.name for field in dataclasses.fields(cls)}
    for key in data:
        if key not in fields:
            raise InputError(f"unknown key {key!r} in {where} config; {nearest(key, fields)}")
    missing = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING and f.name not in data]
    if missing:
        raise InputError(f"{where} config lacks {', '.join(missing)}")
    return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in data.items()})


# ---------------------------------------------------------------------------------------------------------------------
# Vision backbones (timm names in the reference's registry)
# ---------------------------------------------------------------------------------------------------------------------


def _dino(image_size: int) -> VisionConfig:
    return VisionConfig(
        "dino", 1024, 24, 16, 4096, image_size, registers=4, class_token=True, layer_scale=True,
        mean=IMAGENET[0], std=IMAGENET[1],
    )  # fmt: skip


def _siglip(image_size: int) -> VisionConfig:
    return VisionConfig("siglip", 1152, 27, 16, 4304, image_size, attention_pool=True)


def _siglip_b16(image_size: int) -> VisionConfig:
    return VisionConfig("siglip", 768, 12, 12, 3072, image_size, patch_size=16, attention_pool=True)


def _clip(
    width: int, depth: int, heads: int, image_size: int, patch_size: int, activation="quick_gelu"
) -> VisionConfig:
    return VisionConfig(
        "clip", width, depth, heads, 4 * width, image_size, patch_size, class_token=True, position_for_class_token=True,
        pre_norm=True, activation=activation, norm_eps=1e-5, mean=CLIP[0], std=CLIP[1],
    )  # fmt: skip


VISION_BACKBONES: dict[str, tuple[VisionConfig, ...]] = {
    "clip-vit-b": (_clip(768, 12, 12, 224, 16),),
    "clip-vit-l": (_clip(1024, 24, 16, 224, 14),),
    "clip-vit-l-336px": (_clip(1024, 24, 16, 336, 14),),
    "siglip-vit-b16-224px": (_siglip_b16(224),),
    "siglip-vit-b16-256px": (_siglip_b16(256),),
    "siglip-vit-b16-384px": (_siglip_b16(384),),
    "siglip-vit-so400m": (_siglip(224),),
    "siglip-vit-so400m-384px": (_siglip(384),),
    "dinov2-vit-l": (_dino(224),),
    "in1k-vit-l": (VisionConfig("in1k", 1024, 24, 16, 4096, 224, 16, class_token=True, position_for_class_token=True),),
    "dinosiglip-vit-so-224px": (_dino(224), _siglip(224)),
    "dinosiglip-vit-so-384px": (_dino(384), _siglip(384)),
    # The native class keeps timm's erf GELU in the CLIP tower, unlike the stand-alone CLIP backbones.
    "dinoclip-vit-l-336px": (_dino(336), _clip(1024, 24, 16, 336, 14, activation="gelu")),
}

# ---------------------------------------------------------------------------------------------------------------------
# Language models: config and prompt family
# ---------------------------------------------------------------------------------------------------------------------

_LLAMA_7B = LlamaConfig()
_LLAMA_13B = LlamaConfig(width=5120, depth=40, heads=40, kv_heads=40, mlp_dim=13824)
_MISTRAL_7B = LlamaConfig(kv_heads=8, mlp_dim=14336, sliding_window=4096)

LANGUAGE_MODELS: dict[str, tuple[LlamaConfig, str]] = {
    "llama2-7b-pure": (_LLAMA_7B, "pure"),
    "llama2-7b-chat": (_LLAMA_7B, "llama2_chat"),
    "llama2-13b-pure": (_LLAMA_13B, "pure"),
    "llama2-13b-chat": (_LLAMA_13B, "llama2_chat"),
    "vicuna-v15-7b": (_LLAMA_7B, "vicuna_v15"),
    "vicuna-v15-13b": (_LLAMA_13B, "vicuna_v15"),
    "mistral-v0.1-7b-pure": (_MISTRAL_7B, "pure"),
    "mistral-v0.1-7b-instruct": (_MISTRAL_7B, "mistral_instruct"),
}

# ---------------------------------------------------------------------------------------------------------------------
# Whole models
# ---------------------------------------------------------------------------------------------------------------------


def compose(
    vision: str, llm: str, projector: str | None = None, resize: str = "resize-naive", name: str = ""
) -> VLAConfig:
    """A model from a vision backbone's and a language model's id; two towers take the three-layer projector by
    default.
    """
    if vision not in VISION_BACKBONES:
        raise InputError(f"unknown vision backbone {vision!r}; {nearest(vision, VISION_BACKBONES)}")
    if llm not in LANGUAGE_MODELS:
        raise InputError(f"unknown language model {llm!r}; {nearest(llm, LANGUAGE_MODELS)}")
    towers, (llama, family) = VISION_BACKBONES[vision], LANGUAGE_MODELS[llm]
    kind = projector or ("fused-gelu-mlp" if len(towers) > 1 else "gelu-mlp")
    return VLAConfig(name or f"{vision}+{llm}", towers, llama, ProjectorConfig(kind), resize, family)


def _prism(vision: str, llm: str) -> dict[str, str]:
    return {"vision": vision, "llm": llm, "projector": "fused-gelu-mlp", "resize": "resize-naive"}


def _siglip_vlm(llm: str) -> dict[str, str]:
    return {"vision": "siglip-vit-so400m", "llm": llm, "projector": "gelu-mlp", "resize": "letterbox"}


_PRISM_7B = _prism("dinosiglip-vit-so-224px", "llama2-7b-pure")
_SIGLIP_7B = _siglip_vlm("vicuna-v15-7b")

PRESETS: dict[str, dict[str, str]] = {
    # Published policies and the VLMs that they start from.
    "openvla-7b": _PRISM_7B,
    "openvla-v01-7b": _SIGLIP_7B,
    "prism-dinosiglip-224px+7b": _PRISM_7B,
    "prism-dinosiglip-224px+13b": _prism("dinosiglip-vit-so-224px", "llama2-13b-pure"),
    "prism-dinosiglip+7b": _prism("dinosiglip-vit-so-384px", "llama2-7b-pure"),
    "prism-dinosiglip+13b": _prism("dinosiglip-vit-so-384px", "llama2-13b-pure"),
    "siglip-224px+7b": _SIGLIP_7B,
    "siglip-224px+13b": _siglip_vlm("vicuna-v15-13b"),
    # The registered training runs: the model of each.
    "siglip-224px+mx-bridge": _SIGLIP_7B,
    "siglip-224px-icy+mx-bridge": _SIGLIP_7B,
    "prism-dinosiglip-224px+mx-bridge": _PRISM_7B,
    "siglip-224px+mx-oxe-magic-soup": _SIGLIP_7B,
    "prism-dinosiglip-224px+mx-oxe-magic-soup-plus": _PRISM_7B,
    "siglip-224px+mx-tdroid_carrot_in_bowl": _SIGLIP_7B,
    "siglip-224px+mx-tdroid_pour_corn_in_pot": _SIGLIP_7B,
    "siglip-224px-icy+mx-tdroid_carrot_in_bowl": _SIGLIP_7B,
    "siglip-224px-last_layer+mx-tdroid_carrot_in_bowl": _SIGLIP_7B,
    "siglip-224px-sandwich+mx-tdroid_carrot_in_bowl": _SIGLIP_7B,
    "siglip-224px+mx-droid_wipe": _SIGLIP_7B,
}


def preset(name: str) -> VLAConfig:
    """The model of a published policy, a registered run, `tiny`, or any `VISION+LLM` pair of backbone ids."""
    if name == "tiny":
        return tiny()
    if name in PRESETS:
        return compose(**PRESETS[name], name=name)
    vision, _, llm = name.partition("+")
    if vision in VISION_BACKBONES or llm in LANGUAGE_MODELS:
        return compose(vision, llm)
    raise InputError(
        f"unknown model preset {name!r}; {nearest(name, [*PRESETS, 'tiny'])}; or VISION+LLM of backbone ids"
    )


def padded_vocab_size(base_vocab_size: int) -> int:
    """Embedding rows: the tokenizer's entries and the pad token, rounded up to a multiple of 64 as the reference
    does.
    """
    return -(-(base_vocab_size + 1) // 64) * 64


def tiny(name: str = "tiny", image_size: int = 56, patch_size: int = 14, base_vocab_size: int = 32000) -> VLAConfig:
    """The dual-tower architecture shrunken to run in milliseconds on a CPU; every mechanism of openvla-7b is in it."""
    common: Any = {"image_size": image_size, "patch_size": patch_size}
    dino = VisionConfig("dino", 48, 3, 4, 96, registers=4, class_token=True, layer_scale=True,
                        mean=IMAGENET[0], std=IMAGENET[1], **common)  # fmt: skip
    siglip = VisionConfig("siglip", 64, 3, 4, 128, attention_pool=True, **common)
    llama = LlamaConfig(
        width=64, depth=2, heads=4, kv_heads=4, mlp_dim=176, vocab_size=padded_vocab_size(base_vocab_size)
    )
    return VLAConfig(name, (dino, siglip), llama, base_vocab_size=base_vocab_size)


def model_config(settings: Mapping[str, Any]) -> VLAConfig:
    """The model of a training config's `model` section: `{"preset": name, **overrides}`.

    Overrides are nested by section (`llama`, `projector`, `towers` by tower name, and the top-level fields), for
    example `{"preset": "tiny", "llama": {"depth": 3}, "towers": {"dino": {"width": 96}}}`. A tower that is None is left
    out. Unknown keys raise. A
    new `base_vocab_size` (another tokenizer) pads the language model's vocabulary again, to a multiple of 64.
    """
    settings = dict(settings)
    base = preset(settings.pop("preset", "openvla-7b"))
    data = base.to_dict()
    if settings.get("base_vocab_size", base.base_vocab_size) != base.base_vocab_size:
        data["llama"]["vocab_size"] = padded_vocab_size(settings["base_vocab_size"])
    for section in ("llama", "projector"):
        data[section] |= dict(settings.pop(section, None) or {})
    overrides = dict(settings.pop("towers", None) or {})
    names = [tower["name"] for tower in data["towers"]]
    for key in overrides:
        if key not in names:
            raise InputError(f"unknown tower {key!r} in model.towers of preset {base.name!r}; {nearest(key, names)}")
    kept = [tower for tower in data["towers"] if overrides.get(tower["name"], {}) is not None]
    data["towers"] = [tower | dict(overrides.get(tower["name"], {})) for tower in kept]
    return VLAConfig.from_dict(data | settings)
