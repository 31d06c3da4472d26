"""OpenVLA in PyTorch, put together from transformers' own modules, loading an exported HuggingFace folder.

Independent of this project's model and of its table of names: what it reads is what the reference's code would read.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    LlamaConfig,
    LlamaForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)


def load_folder(folder: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    config = json.loads((folder / "config.json").read_text())
    index = folder / "model.safetensors.index.json"
    files = (
        sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else ["model.safetensors"]
    )
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        tensors |= load_file(folder / file)
    return config, {name: tensor.float() for name, tensor in tensors.items()}


def below(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def fill(module: torch.nn.Module, values: dict[str, torch.Tensor], unused: tuple[str, ...]) -> torch.nn.Module:
    """Loads values; what the module has beyond them must be named in `unused`."""
    result = module.load_state_dict(values, strict=False)
    assert not result.unexpected_keys, result.unexpected_keys
    assert all(name.startswith(unused) for name in result.missing_keys), result.missing_keys
    return module.eval()


def encoder_layer(t: dict[str, torch.Tensor], i: int, names: dict[str, str]) -> dict[str, torch.Tensor]:
    """One of timm's blocks under the names that `names` gives to its parts."""
    values = {}
    for kind in ("weight", "bias"):
        q, k, v = t[f"blocks.{i}.attn.qkv.{kind}"].chunk(3)
        parts = {"q": q, "k": k, "v": v, "o": t[f"blocks.{i}.attn.proj.{kind}"]}
        parts |= {part: t[f"blocks.{i}.{part}.{kind}"] for part in ("norm1", "norm2")}
        parts |= {"fc1": t[f"blocks.{i}.mlp.fc1.{kind}"], "fc2": t[f"blocks.{i}.mlp.fc2.{kind}"]}
        values |= {f"{names[part]}.{kind}": tensor for part, tensor in parts.items()}
    return values


CLIP_LIKE = {part: f"self_attn.{part}_proj" for part in "qkv"} | {"o": "self_attn.out_proj"}
CLIP_LIKE |= {"norm1": "layer_norm1", "norm2": "layer_norm2", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
DINO = {part: f"attention.{part}_proj" for part in "qkvo"}
DINO |= {part: part for part in ("norm1", "norm2")} | {part: f"mlp.{part}" for part in ("fc1", "fc2")}


def tower(t: dict[str, torch.Tensor], timm_id: str, size: int, act: str | None, heads: int):
    """A function from pixels [B, 3, S, S] to the second-to-last block's patch features."""
    width, _, patch, _ = t["patch_embed.proj.weight"].shape
    depth = 1 + max(int(name.split(".")[1]) for name in t if name.startswith("blocks."))
    common = {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "image_size": size,
        "patch_size": patch,
        "hidden_act": act or "gelu",
        "attn_implementation": "eager",
    }
    mlp = t["blocks.0.mlp.fc1.weight"].shape[0]
    values: dict[str, torch.Tensor] = {}
    if "dinov2" in timm_id:
        config = Dinov2WithRegistersConfig(**common, mlp_ratio=1, num_register_tokens=4, layer_norm_eps=1e-6)
        module, prefix = Dinov2WithRegistersModel(config), 5
        for layer in module.encoder.layer:  # the class takes whole ratios only
            layer.mlp.fc1, layer.mlp.fc2 = torch.nn.Linear(width, mlp), torch.nn.Linear(mlp, width)
        values |= {"embeddings.cls_token": t["cls_token"], "embeddings.register_tokens": t["reg_token"]}
        values["embeddings.patch_embeddings.projection.weight"] = t["patch_embed.proj.weight"]
        values["embeddings.patch_embeddings.projection.bias"] = t["patch_embed.proj.bias"]
        none = torch.zeros(1, 1, width)  # timm's class token holds its position already
        values["embeddings.position_embeddings"] = torch.cat([none, t["pos_embed"]], dim=1)
        for i in range(depth):
            layer = encoder_layer(t, i, DINO)
            layer |= {f"layer_scale{j}.lambda1": t[f"blocks.{i}.ls{j}.scale_factor"] for j in (1, 2)}
            values |= {f"encoder.layer.{i}.{name}": tensor for name, tensor in layer.items()}
        values |= {f"layernorm.{kind}": t[f"norm.{kind}"] for kind in ("weight", "bias")}
        module = fill(module, values, ("embeddings.mask_token",))
    elif "siglip" in timm_id:
        module, prefix = SiglipVisionModel(SiglipVisionConfig(**common, intermediate_size=mlp, layer_norm_eps=1e-6)), 0
        values["embeddings.patch_embedding.weight"] = t["patch_embed.proj.weight"]
        values["embeddings.patch_embedding.bias"] = t["patch_embed.proj.bias"]
        values["embeddings.position_embedding.weight"] = t["pos_embed"][0]
        module = fill_clip_like(module, t, depth, values, ("head.", "post_layernorm."))
    elif "clip" in timm_id:
        module, prefix = CLIPVisionModel(CLIPVisionConfig(**common, intermediate_size=mlp, layer_norm_eps=1e-5)), 1
        values["embeddings.class_embedding"] = t["cls_token"][0, 0]
        values["embeddings.patch_embedding.weight"] = t["patch_embed.proj.weight"]
        values["embeddings.position_embedding.weight"] = t["pos_embed"][0]
        values |= {f"pre_layrnorm.{kind}": t[f"norm_pre.{kind}"] for kind in ("weight", "bias")}
        module = fill_clip_like(module, t, depth, values, ("post_layernorm.",))
    else:
        raise ValueError(timm_id)

    def features(pixels: torch.Tensor) -> torch.Tensor:
        return module(pixels, output_hidden_states=True).hidden_states[depth - 1][:, prefix:]

    return features


def fill_clip_like(module, t, depth, values, unused):
    for i in range(depth):
        values |= {f"encoder.layers.{i}.{name}": tensor for name, tensor in encoder_layer(t, i, CLIP_LIKE).items()}
    nested = any(name.startswith("vision_model.") for name in module.state_dict())
    prefix = "vision_model." if nested else ""
    return fill(
        module, {prefix + name: tensor for name, tensor in values.items()}, tuple(prefix + name for name in unused)
    )


class OracleVLA:
    """`oracle(pixel_values [B, C, S, S], input_ids [B, T])` -> logits [B, P + T, V]."""

    def __init__(self, folder: Path, vision_heads: int):
        config, tensors = load_folder(folder)
        prefixes = ("vision_backbone.featurizer.", "vision_backbone.fused_featurizer.")
        described = zip(
            prefixes, config["timm_model_ids"], config["image_sizes"], config["timm_override_act_layers"], strict=False
        )
        self.towers = [
            tower(below(tensors, prefix), timm, size, act, vision_heads) for prefix, timm, size, act in described
        ]
        self.projector = below(tensors, "projector.")
        text = {key: value for key, value in config["text_config"].items() if key not in ("model_type", "torch_dtype")}
        self.llama = LlamaForCausalLM(LlamaConfig(**text, attn_implementation="eager"))
        self.llama = fill(self.llama, below(tensors, "language_model."), ())

    @torch.no_grad()
    def __call__(self, pixels: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        features = [tower(part) for tower, part in zip(self.towers, pixels.split(3, dim=1), strict=True)]
        x = torch.cat(features, dim=-1)
        layers = len(self.projector) // 2
        for i in range(1, layers + 1):
            x = torch.nn.functional.linear(x, self.projector[f"fc{i}.weight"], self.projector[f"fc{i}.bias"])
            x = torch.nn.functional.gelu(x) if i < layers else x
        text = self.llama.get_input_embeddings()(ids)
        return self.llama(inputs_embeds=torch.cat([text[:, :1], x, text[:, 1:]], dim=1)).logits
