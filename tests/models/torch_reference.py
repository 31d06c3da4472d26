"""PyTorch oracles of the model's parts, made of transformers' modules, and the way their weights map onto ours.

Nothing here is shared with the package: names and layouts are spelled out a second time.
"""

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from transformers.models.dinov2_with_registers import modeling_dinov2_with_registers

from openvla_jax.config import LlamaConfig, VisionConfig, VLAConfig


def _projections(attention: str, out: str) -> dict[str, str]:
    return {n: f"{attention}.{n}_proj" for n in "qkv"} | {"o": f"{attention}.{out}"}


_DINO = _projections("attention", "o_proj")
if hasattr(modeling_dinov2_with_registers, "Dinov2WithRegistersSelfAttention"):  # as in transformers 5.17
    _DINO = {"q": "attention.attention.query", "k": "attention.attention.key", "v": "attention.attention.value"}
    _DINO["o"] = "attention.output.dense"
# Where transformers keeps each part of a block: stack, first norm, second norm, attention's projections by our names.
PARTS = {
    "dino": ("encoder.layer", "norm1", "norm2", _DINO),
    "siglip": ("encoder.layers", "layer_norm1", "layer_norm2", _projections("self_attn", "out_proj")),
    "clip": ("encoder.layers", "layer_norm1", "layer_norm2", _projections("self_attn", "out_proj")),
    "in1k": ("layers", "layernorm_before", "layernorm_after", _projections("attention", "o_proj")),
}


def randomize(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Random values everywhere, so that no bias, norm weight or token can be left out unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            centre = 1.0 if name.endswith("weight") or "lambda1" in name else 0.0  # weights of norms, LayerScale
            values = centre + 0.3 * values
        elif "embed_tokens" not in name and "position" not in name and "token" not in name:
            values = values / parameter[0].numel() ** 0.5
        parameter.data.copy_(values)
    return module.eval()


def tower(config: VisionConfig, seed: int) -> torch.nn.Module:
    """The transformers model of the tower's family, with random weights."""
    common = {
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "layer_norm_eps": config.norm_eps,
        "hidden_act": config.activation,
        "attn_implementation": "eager",
    }
    if config.name == "dino":
        assert config.mlp_dim == 4 * config.width, config
        settings = transformers.Dinov2WithRegistersConfig(num_register_tokens=config.registers, mlp_ratio=4, **common)
        return randomize(transformers.Dinov2WithRegistersModel(settings), seed)
    kinds = {
        "siglip": (transformers.SiglipVisionConfig, transformers.SiglipVisionModel),
        "clip": (transformers.CLIPVisionConfig, transformers.CLIPVisionModel),
        "in1k": (transformers.ViTConfig, transformers.ViTModel),
    }
    settings, model = kinds[config.name]
    return randomize(model(settings(intermediate_size=config.mlp_dim, **common)), seed)


def features(module: torch.nn.Module, config: VisionConfig, pixels: torch.Tensor) -> torch.Tensor:
    """Output of block `depth - 2` at the patches, [B, P, D]; pixels [B, 3, height, width]."""
    kept = []
    block = module.get_submodule(PARTS[config.name][0])[config.depth - 2]
    hook = block.register_forward_hook(lambda _module, _inputs, output: kept.append(output))
    module(pixels)
    hook.remove()
    output = kept[0][0] if isinstance(kept[0], tuple) else kept[0]
    return output[:, config.class_token + config.registers :]


def _tensors(module: torch.nn.Module, gradients: bool) -> dict[str, np.ndarray]:
    pairs = ((name, p.grad if gradients else p.detach()) for name, p in module.named_parameters())
    return {name: value.double().numpy() for name, value in pairs if value is not None}


def _stacked(tensors: dict[str, np.ndarray], stack: str, layers: int, names: dict[str, str]) -> dict[str, np.ndarray]:
    """`names`: ours to theirs, within a block; linear weights [out, in] become kernels [in, out]."""
    stacked = {}
    for ours, theirs in names.items():
        weights = np.stack([tensors[f"{stack}.{i}.{theirs}"] for i in range(layers)])
        stacked[ours] = weights.swapaxes(1, 2) if weights.ndim == 3 else weights
    return stacked


def tower_arrays(module: torch.nn.Module, config: VisionConfig, gradients: bool = False) -> dict[str, np.ndarray]:
    """The module's weights, or their gradients, under our names."""
    tensors = _tensors(module, gradients)
    stack, norm1, norm2, projections = PARTS[config.name]
    names = {"scale1": "layer_scale1.lambda1", "scale2": "layer_scale2.lambda1"} if config.layer_scale else {}
    for ours, theirs in (("norm1", norm1), ("norm2", norm2)):
        names |= {f"{ours}/scale": f"{theirs}.weight", f"{ours}/bias": f"{theirs}.bias"}
    linears = {f"attention/{ours}": theirs for ours, theirs in projections.items()}
    for ours, theirs in (linears | {"mlp/up": "mlp.fc1", "mlp/down": "mlp.fc2"}).items():
        names |= {f"{ours}/kernel": f"{theirs}.weight", f"{ours}/bias": f"{theirs}.bias"}
    arrays = {f"blocks/{k}": v for k, v in _stacked(tensors, stack, config.depth - 1, names).items()}

    patch = "embeddings.patch_embedding" + ("" if config.name in ("siglip", "clip") else "s.projection")
    arrays["patch_embed/kernel"] = tensors[f"{patch}.weight"].transpose(2, 3, 1, 0).reshape(-1, config.width)
    if not config.pre_norm:
        arrays["patch_embed/bias"] = tensors[f"{patch}.bias"]
    if config.name == "dino":
        token, position = tensors["embeddings.cls_token"][0], tensors["embeddings.position_embeddings"][0]
        # Released weights hold the sum of the class token and its position as one token.
        arrays["class_token"] = token if gradients else token + position[:1]
        arrays["position"] = position[1:]
        arrays["registers"] = tensors["embeddings.register_tokens"][0]
    elif config.name == "siglip":
        arrays["position"] = tensors["embeddings.position_embedding.weight"]
    elif config.name == "clip":
        arrays["class_token"] = tensors["embeddings.class_embedding"][None]
        arrays["position"] = tensors["embeddings.position_embedding.weight"]
        arrays |= {"pre_norm/scale": tensors["pre_layrnorm.weight"], "pre_norm/bias": tensors["pre_layrnorm.bias"]}
    else:
        arrays["class_token"] = tensors["embeddings.cls_token"][0]
        arrays["position"] = tensors["embeddings.position_embeddings"][0]
    return arrays


def llama(config: LlamaConfig, seed: int) -> torch.nn.Module:
    """`LlamaForCausalLM`, or `MistralForCausalLM` where there is a sliding window, with random weights."""
    common = {
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "intermediate_size": config.mlp_dim,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attn_implementation": "eager",
        "use_cache": False,
    }
    if config.sliding_window is None:
        return randomize(transformers.LlamaForCausalLM(transformers.LlamaConfig(**common)), seed)
    settings = transformers.MistralConfig(sliding_window=config.sliding_window, **common)
    return randomize(transformers.MistralForCausalLM(settings), seed)


def llama_arrays(module: torch.nn.Module, config: LlamaConfig, gradients: bool = False) -> dict[str, np.ndarray]:
    """The module's weights, or their gradients, under our names."""
    tensors = _tensors(module, gradients)
    names = {f"attention/{n}/kernel": f"self_attn.{n}_proj.weight" for n in "qkvo"}
    names |= {f"mlp/{n}/kernel": f"mlp.{n}_proj.weight" for n in ("gate", "up", "down")}
    names |= {"norm1/scale": "input_layernorm.weight", "norm2/scale": "post_attention_layernorm.weight"}
    arrays = {f"blocks/{k}": v for k, v in _stacked(tensors, "model.layers", config.depth, names).items()}
    arrays["embed/table"] = tensors["model.embed_tokens.weight"]
    arrays["head/kernel"] = tensors["lm_head.weight"].T
    arrays["norm/scale"] = tensors["model.norm.weight"]
    return arrays


def projector(config: VLAConfig, seed: int) -> torch.nn.Sequential:
    """The reference's three kinds, layer by layer."""
    vision, width, linear = config.vision_width, config.llama.width, torch.nn.Linear
    layers = {
        "linear": [linear(vision, width)],
        "gelu-mlp": [linear(vision, width), torch.nn.GELU(), linear(width, width)],
        "fused-gelu-mlp": [
            *(linear(vision, 4 * vision), torch.nn.GELU()),
            *(linear(4 * vision, width), torch.nn.GELU()),
            linear(width, width),
        ],
    }[config.projector.kind]
    return randomize(torch.nn.Sequential(*layers), seed)


def projector_arrays(module: torch.nn.Sequential, gradients: bool = False) -> dict[str, np.ndarray]:
    tensors = _tensors(module, gradients)
    arrays = {}
    for name, value in tensors.items():
        index, kind = name.split(".")
        arrays[f"fc{int(index) // 2 + 1}/{'kernel' if kind == 'weight' else 'bias'}"] = value.T
    return arrays


class TorchVLA(torch.nn.Module):
    """Towers, projector and Llama put together as the reference does: patches directly after BOS, pads masked."""

    def __init__(self, config: VLAConfig, seed: int):
        super().__init__()
        self.config = config
        self.towers = torch.nn.ModuleList(tower(t, seed + i) for i, t in enumerate(config.towers))
        self.projector = projector(config, seed + 10)
        self.llama = llama(config.llama, seed + 11)

    def forward(self, pixels: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Logits [B, P+T, V]; pixels [B, 3 * towers, height, width]."""
        per_tower = zip(self.towers, self.config.towers, pixels.split(3, dim=1), strict=True)
        patches = self.projector(torch.cat([features(*arguments) for arguments in per_tower], dim=-1))
        text = self.llama.model.embed_tokens(ids)
        embeddings = torch.cat([text[:, :1], patches, text[:, 1:]], dim=1)
        real = torch.cat([torch.ones(patches.shape[:2], dtype=torch.bool), ids != self.config.pad_token], dim=1)
        return self.llama(inputs_embeds=embeddings, attention_mask=real).logits

    def arrays(self, gradients: bool = False) -> dict[str, np.ndarray]:
        arrays = {f"llama/{k}": v for k, v in llama_arrays(self.llama, self.config.llama, gradients).items()}
        arrays |= {f"projector/{k}": v for k, v in projector_arrays(self.projector, gradients).items()}
        for module, config in zip(self.towers, self.config.towers, strict=True):
            values = tower_arrays(module, config, gradients)
            arrays |= {f"vision/{config.name}/{k}": v for k, v in values.items()}
        return arrays


# ---------------------------------------------------------------------------------------------------------------------
# Ours
# ---------------------------------------------------------------------------------------------------------------------


def named_leaves(tree) -> dict[str, jax.Array]:
    """Leaves of a model, or of its gradient, by the path that a reader would type."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(p, simple=True, separator="/").removesuffix("/value"): leaf for p, leaf in leaves}


def filled(make, arrays: dict[str, np.ndarray]):
    """The module that `make(key)` makes, holding float32 `arrays`: every leaf has one and every array has a leaf."""
    abstract = jax.eval_shape(make, jax.random.key(0))
    leaves = named_leaves(abstract)
    assert leaves.keys() == arrays.keys(), leaves.keys() ^ arrays.keys()
    for name, leaf in leaves.items():
        assert leaf.shape == arrays[name].shape, (name, leaf.shape, arrays[name].shape)
    values = [jnp.asarray(arrays[name], jnp.float32) for name in leaves]
    return jax.tree.unflatten(jax.tree.structure(abstract), values)


def channels_first(pixels: np.ndarray) -> torch.Tensor:
    return torch.tensor(np.moveaxis(pixels, -1, 1))


def difference(ours, reference) -> float:
    """Largest absolute difference, relative to the largest value of the reference."""
    reference = reference.detach().double().numpy() if isinstance(reference, torch.Tensor) else np.asarray(reference)
    ours = np.asarray(ours, np.float64)
    assert ours.shape == reference.shape, (ours.shape, reference.shape)
    assert np.isfinite(ours).all()
    return float(np.abs(ours - reference).max() / np.abs(reference).max())
