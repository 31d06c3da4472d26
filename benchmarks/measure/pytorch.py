"""The PyTorch side: transformers' modules assembled as OpenVLA's own code is, with our weights; PEFT's step.

Attention is SDPA, the cache transformers' own, and decoding computes logits of the last position only. Like the
reference it runs the towers' last block, whose output nobody reads. The modules are tests/models/torch_reference.py's.
"""

import os
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import numpy as np
import torch
import torch_reference
import transformers

from measure.actions import STEPS, Parts
from measure.models import named_leaves
from measure.training import TEXT
from openvla_jax.config import VisionConfig, VLAConfig

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
wait = torch.cuda.synchronize if CUDA else (lambda: None)


def make_modules(config: VLAConfig, dtype: str, model: Any = None) -> Any:
    """Returns the modules on the device in `dtype`, with the weights of our `model` or random ones."""
    if not CUDA:  # as many threads as XLA takes; small products cost less than waiting for a second thread
        torch.set_num_threads(len(os.sched_getaffinity(0)) if config.llama.width >= 1024 else 1)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        # Keeps the initial values: the oracle draws random ones on the host, which takes minutes for a 7B.
        leave = mock.patch.object(torch_reference, "randomize", lambda module, seed: module.eval())
        with torch.device(DEVICE), leave:
            modules = torch_reference.TorchVLA(config, 0).eval()
    finally:
        torch.set_default_dtype(before)
    for part in (*modules.towers, modules.llama):
        part.set_attn_implementation("sdpa")
    if model is not None:
        with torch.no_grad():
            _copy_weights(modules, named_leaves(model))
    return modules


def peak_gb() -> float | None:
    """Returns the most memory that PyTorch has held on the GPU so far, or None without a GPU."""
    return torch.cuda.max_memory_allocated() / 1e9 if CUDA else None


# ---------------------------------------------------------------------------------------------------------------------
# Our weights into PyTorch's modules, on the device
# ---------------------------------------------------------------------------------------------------------------------


def _copy_weights(modules: Any, leaves: dict[str, jax.Array]) -> None:
    """Removes each leaf from the dict when it is copied, so that the device never holds both sides."""
    config = modules.config
    for module, tower in zip(modules.towers, config.towers, strict=True):
        _copy_tower(module, tower, leaves, f"vision/{tower.name}")
    for i in range(sum(name.startswith("projector/") for name in leaves) // 2):
        _copy_linear(modules.projector[2 * i], leaves, f"projector/fc{i + 1}")
    llama = modules.llama
    names = {f"self_attn.{n}_proj": f"attention/{n}/kernel" for n in "qkvo"}
    names |= {f"mlp.{n}_proj": f"mlp/{n}/kernel" for n in ("gate", "up", "down")}
    names |= {"input_layernorm": "norm1/scale", "post_attention_layernorm": "norm2/scale"}
    _copy_blocks(llama.model.layers, leaves, "llama/blocks", {f"{k}.weight": v for k, v in names.items()})
    llama.model.embed_tokens.weight.copy_(_tensor(leaves.pop("llama/embed/table")))
    llama.lm_head.weight.copy_(_tensor(leaves.pop("llama/head/kernel")).T)
    llama.model.norm.weight.copy_(_tensor(leaves.pop("llama/norm/scale")))
    assert not leaves, f"weights without a place in PyTorch's modules: {sorted(leaves)}"


def _copy_tower(module: Any, tower: VisionConfig, leaves: dict[str, jax.Array], path: str) -> None:
    stack, norm1, norm2, projections = torch_reference.PARTS[tower.name]
    modules = {norm1: "norm1", norm2: "norm2", "mlp.fc1": "mlp/up", "mlp.fc2": "mlp/down"}
    modules |= {theirs: f"attention/{ours}" for ours, theirs in projections.items()}
    names = {"layer_scale1.lambda1": "scale1", "layer_scale2.lambda1": "scale2"} if tower.layer_scale else {}
    for theirs, ours in modules.items():
        weight = "scale" if ours.startswith("norm") else "kernel"
        names |= {f"{theirs}.weight": f"{ours}/{weight}", f"{theirs}.bias": f"{ours}/bias"}
    _copy_blocks(module.get_submodule(stack)[: tower.depth - 1], leaves, f"{path}/blocks", names)

    embeddings, size = module.embeddings, tower.patch_size
    patch = embeddings.patch_embedding if tower.name == "siglip" else embeddings.patch_embeddings.projection
    kernel = _tensor(leaves.pop(f"{path}/patch_embed/kernel")).reshape(size, size, 3, tower.width)
    patch.weight.copy_(kernel.permute(3, 2, 0, 1))
    patch.bias.copy_(_tensor(leaves.pop(f"{path}/patch_embed/bias")))
    position = _tensor(leaves.pop(f"{path}/position"))
    if tower.name == "siglip":
        embeddings.position_embedding.weight.copy_(position)
    else:  # our class token is the sum of theirs and its position
        embeddings.position_embeddings.zero_()[:, 1:] = position
        embeddings.cls_token.copy_(_tensor(leaves.pop(f"{path}/class_token"))[None])
        embeddings.register_tokens.copy_(_tensor(leaves.pop(f"{path}/registers"))[None])


def _copy_blocks(blocks: Any, leaves: dict[str, jax.Array], path: str, names: dict[str, str]) -> None:
    """`names`: theirs to ours, within a block."""
    for theirs, ours in names.items():
        stacked = _tensor(leaves.pop(f"{path}/{ours}"))
        for block, values in zip(blocks, stacked, strict=True):
            block.get_parameter(theirs).copy_(values.T if values.ndim == 2 else values)


def _copy_linear(layer: Any, leaves: dict[str, jax.Array], path: str) -> None:
    layer.weight.copy_(_tensor(leaves.pop(f"{path}/kernel")).T)
    layer.bias.copy_(_tensor(leaves.pop(f"{path}/bias")))


def _tensor(array: jax.Array) -> torch.Tensor:
    """Returns a tensor that shares the array's memory."""
    return torch.from_dlpack(jax.block_until_ready(array))


# ---------------------------------------------------------------------------------------------------------------------
# Actions
# ---------------------------------------------------------------------------------------------------------------------


class Eager:
    """The modules without compilation, with transformers' cache."""

    def __init__(self, modules: Any, images: np.ndarray, ids: np.ndarray, lengths: np.ndarray):
        """All prompts have the same length, so no mask for padding is needed."""
        self.modules, self.config, self.images = modules, modules.config, images
        self.text = torch.tensor(ids[:, : int(lengths[0])].astype(np.int64)).to(DEVICE)
        self.length = self.config.patches + self.text.shape[1]

    def vision(self) -> torch.Tensor:
        unit = torch.tensor(self.images).to(DEVICE).permute(0, 3, 1, 2).float() / 255
        features = []
        for module, tower in zip(self.modules.towers, self.config.towers, strict=True):
            mean, std = (torch.tensor(x, device=DEVICE).reshape(3, 1, 1) for x in (tower.mean, tower.std))
            features.append(torch_reference.features(module, tower, ((unit - mean) / std).to(self.modules.llama.dtype)))
        return self.modules.projector(torch.cat(features, dim=-1))

    def sequence(self, patches: torch.Tensor) -> torch.Tensor:
        embedded = self.modules.llama.model.embed_tokens(self.text)
        return torch.cat([embedded[:, :1], patches, embedded[:, 1:]], dim=1)

    def prefill(self, patches: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """(logits [B, V] of the next token, cache)"""
        out = self.modules.llama(inputs_embeds=self.sequence(patches), use_cache=True, logits_to_keep=1)
        return out.logits[:, -1], out.past_key_values

    def step(self, token: torch.Tensor, cache: Any) -> torch.Tensor:
        """Returns the logits after one more token [B] and adds it to the cache."""
        llama = self.modules.llama
        return llama(input_ids=token[:, None], past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]

    def rewind(self, cache: Any) -> None:
        """Removes the last token from the cache."""
        cache.crop(-1)


class Compiled(Eager):
    """Layers by `torch.compile`, which compiles one and runs all with it. The cache has room for the whole action.

    transformers' own layers read their index from the module, so PyTorch would compile each of them.
    """

    def __init__(self, modules: Any, *request: np.ndarray):
        super().__init__(modules, *request)
        backend = "inductor" if CUDA else "eager"  # on a CPU inductor's C++ takes half a minute to compile
        for module, tower in zip(modules.towers, self.config.towers, strict=True):
            for block in module.get_submodule(torch_reference.PARTS[tower.name][0]):
                block.forward = torch.compile(block.forward, backend=backend)
        self.layer = torch.compile(_layer, backend=backend, dynamic=False)
        shape = (len(self.text), self.config.llama.kv_heads, self.length + STEPS, self.config.llama.head_dim)
        new = lambda: torch.zeros(shape, device=DEVICE, dtype=modules.llama.dtype)
        self.cache = [(new(), new()) for _ in range(self.config.llama.depth)]
        self.position = torch.zeros(1, dtype=torch.int64, device=DEVICE)

    def _run(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        model = self.modules.llama.model
        angles = model.rotary_emb(x, positions[None])
        visible = torch.arange(self.length + STEPS, device=DEVICE) <= positions[:, None]
        for layer, (keys, values) in zip(model.layers, self.cache, strict=True):
            x = self.layer(layer, x, *angles, keys, values, positions, visible)
        return self.modules.llama.lm_head(model.norm(x[:, -1]))

    def prefill(self, patches: torch.Tensor) -> tuple[torch.Tensor, Any]:
        self.position.fill_(self.length)
        return self._run(self.sequence(patches), torch.arange(self.length, device=DEVICE)), None

    def step(self, token: torch.Tensor, cache: Any) -> torch.Tensor:
        logits = self._run(self.modules.llama.model.embed_tokens(token[:, None]), self.position)
        self.position += 1
        return logits

    def rewind(self, cache: Any) -> None:
        self.position -= 1


def _layer(layer, x, cos, sin, keys, values, positions, visible):
    """A layer of transformers' Llama with a cache of fixed size [B, K, S, H], which it writes at `positions`."""
    attention, shape = layer.self_attn, (*x.shape[:2], -1, keys.shape[-1])
    normed = layer.input_layernorm(x)
    q, k, v = (f(normed).view(shape).transpose(1, 2) for f in (attention.q_proj, attention.k_proj, attention.v_proj))
    q, k = transformers.models.llama.modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)
    keys.index_copy_(2, positions, k)
    values.index_copy_(2, positions, v)
    mixed = torch.nn.functional.scaled_dot_product_attention(
        q, keys, values, attn_mask=visible, enable_gqa=q.shape[1] != keys.shape[1]
    )
    x = x + attention.o_proj(mixed.transpose(1, 2).reshape(x.shape))
    return x + layer.mlp(layer.post_attention_layernorm(x))


class Graphed(Compiled):
    """The decode step as one CUDA graph."""

    def __init__(self, modules: Any, *request: np.ndarray):
        super().__init__(modules, *request)
        self.token = torch.zeros(len(self.text), dtype=torch.int64, device=DEVICE)
        self.graph: Any = None

    def _capture(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles, and lets cuBLAS take its memory
            for _ in range(2):
                super().step(self.token, None)
                self.position -= 1
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = super().step(self.token, None)

    def step(self, token: torch.Tensor, cache: Any) -> torch.Tensor:
        self.token.copy_(token)
        if self.graph is None:
            self._capture()
        self.graph.replay()
        return self.logits


SIDES: dict[str, type[Eager]] = {"eager": Eager, "compiled": Compiled, "compiled, CUDA graph": Graphed}


def action_parts(side: Eager) -> Parts:
    """Returns functions for PARTS, as `measure.actions.action_parts` does."""
    made: dict[str, Any] = {}  # inputs of later parts, computed at first use

    def patches() -> torch.Tensor:
        if "patches" not in made:
            made["patches"] = side.vision()
        return made["patches"]

    def prefilled() -> tuple[torch.Tensor, Any]:
        if "prefilled" not in made:
            made["prefilled"] = side.prefill(patches())
        return made["prefilled"]

    def action() -> tuple[np.ndarray, np.ndarray]:
        first, cache = side.prefill(side.vision())
        tokens = [first.argmax(-1)]
        for _ in range(STEPS - 1):
            tokens.append(side.step(tokens[-1], cache).argmax(-1))
        return torch.stack(tokens, dim=1).cpu().numpy(), first.float().cpu().numpy()

    def one_step() -> None:
        logits, cache = prefilled()
        side.step(logits.argmax(-1), cache)
        side.rewind(cache)

    parts = {
        "action": action,
        "decode step": one_step,
        "prefill": lambda: side.prefill(patches()),
        "vision": side.vision,
    }
    return {name: _timed(part) for name, part in parts.items()}


def _timed(function: Callable[[], Any]) -> Callable[[], Any]:
    """Returns the function without gradients, which waits until its work is done."""

    def run() -> Any:
        with torch.inference_mode():
            result = function()
            wait()
            return result

    return run


# ---------------------------------------------------------------------------------------------------------------------
# Fine-tuning
# ---------------------------------------------------------------------------------------------------------------------


def peft_step(config: VLAConfig, batch: Any, dtype: str, rank: int, checkpointing: bool = False) -> Callable[[], None]:
    """Returns a step of LoRA on every linear layer, by PEFT and torch's AdamW. Computes all logits like the reference.

    With `checkpointing` the backward pass recomputes the language model's layers. Raises ImportError without peft.
    """
    from peft import LoraConfig, get_peft_model

    modules = make_modules(config, dtype)
    targets = [name for name, module in modules.named_modules() if isinstance(module, torch.nn.Linear)]
    lora = LoraConfig(r=rank, lora_alpha=min(rank, 16), init_lora_weights="gaussian", target_modules=targets)
    model = get_peft_model(modules, lora).to(DEVICE).train()
    inner = model.get_base_model()
    if checkpointing:
        inner.llama.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4)
    rows = len(batch.tokens)
    pixels = torch.rand(rows, 3 * len(config.towers), config.image_size, config.image_size, device=DEVICE)
    pixels = (2 * pixels - 1).to(getattr(torch, dtype))
    ids = torch.tensor(np.asarray(batch.tokens).astype(np.int64)).to(DEVICE)
    labels = torch.full((rows, config.patches + TEXT), -100, device=DEVICE)
    places = torch.tensor(np.asarray(batch.target_positions).astype(np.int64)).to(DEVICE)
    labels.scatter_(1, places + config.patches, ids.gather(1, places))
    seen = torch.ones(rows, config.patches, dtype=torch.bool, device=DEVICE)
    real = torch.cat([seen, ids != config.pad_token], 1)

    def run() -> None:
        parts = zip(inner.towers, config.towers, pixels.split(3, dim=1), strict=True)
        patches = inner.projector(torch.cat([torch_reference.features(*part) for part in parts], dim=-1))
        text = inner.llama.model.embed_tokens(ids)
        embedded = torch.cat([text[:, :1], patches, text[:, 1:]], dim=1)
        loss = inner.llama(inputs_embeds=embedded, attention_mask=real, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert np.isfinite(loss.item())  # waits for the device

    return run
