"""Random checkpoints of any model config, in the reference's layouts, written with the libraries that the field
uses.
"""

import dataclasses
import json
import zlib
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from openvla_jax.config import LlamaConfig, ProjectorConfig, VLAConfig, compose
from openvla_jax.convert.describe import TIMM_IDS
from openvla_jax.convert.names import source_shapes, table
from openvla_jax.tokens.tokenizer import load_tokenizer, save_tokenizer

TOKENIZER = load_tokenizer("tiny")  # a small vocabulary keeps the files small
VOCABULARY = TOKENIZER.pad_token_id

STATISTICS = {
    "bridge_orig": {
        "action": {
            "mask": [True] * 6 + [False],
            **{key: [scale] * 7 for key, scale in (("mean", 0.0), ("std", 0.5), ("min", -1.0), ("max", 1.0))},
            "q01": [-0.5, -0.4, -0.3, -0.2, -0.1, -0.6, 0.0],
            "q99": [0.5, 0.4, 0.3, 0.2, 0.1, 0.6, 1.0],
        },
        "num_transitions": 1000,
        "num_trajectories": 10,
    }
}
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}

# name: (vision backbone, language model, projector, image resizing); each tower shrunken to a few narrow blocks.
VARIANTS = {
    "dinosiglip": ("dinosiglip-vit-so-224px", "llama2-7b-pure", "fused-gelu-mlp", "resize-naive"),
    "dinosiglip-384px": ("dinosiglip-vit-so-384px", "llama2-7b-pure", "fused-gelu-mlp", "resize-crop"),
    "siglip-letterbox": ("siglip-vit-so400m", "vicuna-v15-7b", "gelu-mlp", "letterbox"),
    "clip": ("clip-vit-l-336px", "llama2-7b-chat", "gelu-mlp", "resize-naive"),
    "dinoclip": ("dinoclip-vit-l-336px", "llama2-7b-pure", "fused-gelu-mlp", "resize-naive"),
    "in1k": ("in1k-vit-l", "llama2-7b-pure", "gelu-mlp", "resize-naive"),
    "dino-mistral": ("dinov2-vit-l", "mistral-v0.1-7b-instruct", "gelu-mlp", "resize-naive"),
    "siglip-linear": ("siglip-vit-so400m", "llama2-7b-pure", "linear", "resize-naive"),
}
NATIVE_ONLY = ("siglip-linear",)


def shrunken(variant: str) -> VLAConfig:
    """A tiny model with the mechanisms of a variant: 4 heads everywhere, the real image and patch sizes."""
    vision, llm, projector, resize = VARIANTS[variant]
    named = compose(vision, llm, projector, resize)
    towers = []
    for index, tower in enumerate(named.towers):
        width = (32, 48)[index]
        towers.append(dataclasses.replace(tower, width=width, depth=3, heads=4, mlp_dim=2 * width + 8))
    kv_heads = 2 if named.llama.sliding_window else 4
    llama = dataclasses.replace(
        named.llama,
        width=64,
        depth=2,
        heads=4,
        kv_heads=kv_heads,
        mlp_dim=88,
        vocab_size=VOCABULARY + 64,
        norm_eps=1e-6,
    )
    return dataclasses.replace(
        named, towers=tuple(towers), llama=llama, projector=ProjectorConfig(projector), base_vocab_size=VOCABULARY
    )


def random_tensors(config: VLAConfig, layout: str, dtype: str = "float32", seed: int = 0) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint; the same values in every layout and order."""
    tensors = {}
    slots = {slot.source: slot for slot in table(config, layout)}
    for name, shape in source_shapes(slots.values()).items():
        slot = slots[name]
        key = zlib.crc32(f"{slot.target} {slot.layer}".encode())
        values = np.random.default_rng([seed, key]).normal(0.0, 1.0, shape)
        is_scale = name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "norm_pre.weight", "layernorm.weight"))
        values = 1.0 + 0.1 * values if is_scale else values * (0.2 if ".ls" in name else 0.05)
        tensors[name] = values.astype(DTYPES[dtype])
    return tensors


def hf_config(config: VLAConfig, variant: str, dtype: str) -> dict:
    """config.json of the reference, as published checkpoints have it: sizes of the language model, none of the
    towers.
    """
    vision, llm, projector, resize = VARIANTS[variant]
    llama: LlamaConfig = config.llama
    return {
        "model_type": "openvla",
        "vision_backbone_id": vision,
        "llm_backbone_id": llm,
        "arch_specifier": f"no-align+{projector}",
        "use_fused_vision_backbone": len(config.towers) > 1,
        "timm_model_ids": list(TIMM_IDS[vision]),
        "timm_override_act_layers": [
            None if tower.activation == "gelu" else tower.activation for tower in config.towers
        ],
        "image_sizes": [tower.image_size for tower in config.towers],
        "image_resize_strategy": resize,
        "llm_max_length": 2048,
        "pad_token_id": VOCABULARY,
        "pad_to_multiple_of": 64,
        "text_config": {
            "model_type": "mistral" if llama.sliding_window else "llama",
            "hidden_size": llama.width,
            "intermediate_size": llama.mlp_dim,
            "num_hidden_layers": llama.depth,
            "num_attention_heads": llama.heads,
            "num_key_value_heads": llama.kv_heads,
            "pad_token_id": VOCABULARY,
            "vocab_size": llama.vocab_size,
            "torch_dtype": dtype,
        },
        "n_action_bins": 256,
        "norm_stats": STATISTICS,
        "torch_dtype": dtype,
    }


def write_hf(
    folder: Path, variant: str, dtype: str = "float32", shards: int = 1, seed: int = 0
) -> dict[str, np.ndarray]:
    """A HuggingFace folder in `shards` files; returns its tensors."""
    config = shrunken(variant)
    tensors = random_tensors(config, "hf", dtype, seed)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(hf_config(config, variant, dtype)))
    save_tokenizer(TOKENIZER, folder)
    names = list(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return tensors
    weight_map = {}
    for index in range(shards):
        file = f"part{index}.safetensors"  # the index names the files, not a pattern
        part = names[index::shards]
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tensors


def write_native(
    folder: Path, variant: str, dtype: str = "float32", seed: int = 0, vision: bool = True
) -> dict[str, np.ndarray]:
    """A Prismatic run directory with one `.pt`, written by torch.save; returns its tensors by dotted name."""
    import torch

    vision_id, llm, projector, resize = VARIANTS[variant]
    tensors = random_tensors(shrunken(variant), "native", dtype, seed)
    nested: dict[str, dict] = {}
    for name, value in tensors.items():
        part, _, rest = name.partition(".")
        if vision or part != "vision_backbone":
            nested.setdefault(part, {})[rest] = torch.tensor(value.astype(np.float32)).to(getattr(torch, dtype))
    (folder / "checkpoints").mkdir(parents=True)
    torch.save(
        {"model": nested, "optimizer": {"step": 3, "lr": [1e-4]}},
        folder / "checkpoints" / "step-000010-epoch-01-loss=0.1.pt",
    )
    model = {
        "model_id": variant,
        "vision_backbone_id": vision_id,
        "llm_backbone_id": llm,
        "image_resize_strategy": resize,
    }
    model |= {"arch_specifier": "linear" if projector == "linear" else f"no-align+{projector}", "llm_max_length": 2048}
    (folder / "config.json").write_text(json.dumps({"model": model, "model_config": {"base_vocab_size": VOCABULARY}}))
    (folder / "dataset_statistics.json").write_text(json.dumps(STATISTICS))
    save_tokenizer(TOKENIZER, folder)
    return tensors
