"""Models of random weights, made on the device leaf by leaf, and their requests; what cards can do at most."""

import dataclasses
import math
import zlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from openvla_jax.config import LlamaConfig, VisionConfig, VLAConfig, preset, tiny
from openvla_jax.models.openvla import OpenVLA, abstract_model
from openvla_jax.models.quantize import choose_paths, quantize_array, quantize_model

SIZES = ("tiny", "0.4b", "0.8b", "7b")
# Vendors' data sheets, by a part of the device's name: bytes per second of memory, dense bfloat16 FLOP per second.
BANDWIDTH = {"H200": 4.8e12, "H100": 3.35e12, "A100": 2.0e12, "4090": 1.01e12, "A6000": 0.77e12}
PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "4090": 165e12, "A6000": 155e12}


def card_limit(table: dict[str, float]) -> float | None:
    """Returns the table's value of the first device, or None if the card is not in it."""
    kind = jax.local_devices()[0].device_kind
    return next((value for name, value in table.items() if name in kind), None)


def sized(size: str) -> VLAConfig:
    """Returns the model of one of SIZES, or `smallest`, for runs that measure nothing."""
    if size == "7b":
        return preset("openvla-7b")
    if size in ("smallest", "tiny"):
        config = tiny(image_size=28) if size == "smallest" else tiny()
        depth = 2 if size == "smallest" else config.towers[0].depth
        dino, siglip = (dataclasses.replace(tower, depth=depth) for tower in config.towers)
        dino = dataclasses.replace(dino, mlp_dim=4 * dino.width)  # as transformers' DINOv2 has it
        return dataclasses.replace(config, towers=(dino, siglip))
    towers = (
        VisionConfig("dino", 768, 12, 12, 3072, registers=4, class_token=True, layer_scale=True),
        VisionConfig("siglip", 768, 12, 12, 3072),
    )
    depth = {"0.8b": 10, "0.4b": 2}[size]
    return VLAConfig(size, towers, LlamaConfig(width=2048, depth=depth, heads=16, kv_heads=16, mlp_dim=5504))


def named_leaves(tree: Any) -> dict[str, Any]:
    """Returns leaves by path, for example `llama/blocks/attention/q/kernel`."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value"): leaf for path, leaf in leaves
    }


def random_model(config: VLAConfig, dtype: Any, quantize: str | None = None) -> OpenVLA:
    """Returns a model with weights that depend on the arguments alone; products keep the size of activations."""

    def make(key: jax.Array) -> OpenVLA:
        model = OpenVLA(config, key, dtype)
        return model if quantize is None else quantize_model(model, quantize, choose_paths(model))

    abstract = jax.eval_shape(make, jax.random.key(0))
    cast = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype if leaf.dtype == jnp.float32 else leaf.dtype)
    return fill(jax.tree.map(cast, abstract))


def fill(abstract: Any) -> Any:
    """Returns the tree with random arrays. The largest are made first, so that their temporaries raise no peak."""
    leaves, made = named_leaves(abstract), {}
    for name, leaf in sorted(leaves.items(), key=lambda item: -item[1].size):
        if name.endswith("/values"):  # a kernel is made, quantised and dropped
            kernel = random_leaf(name.removesuffix("/values"), leaf.shape, jnp.bfloat16)
            made[name], made[f"{name.removesuffix('values')}scale"] = _quantize(kernel, str(leaf.dtype))
        elif name not in made and f"{name.removesuffix('scale')}values" not in leaves:
            made[name] = random_leaf(name, leaf.shape, leaf.dtype)
    return jax.tree.unflatten(jax.tree.structure(abstract), [made[name] for name in leaves])


_quantize = jax.jit(quantize_array, static_argnums=1)


def random_leaf(name: str, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Norms are 1, LayerScales 0.1, biases and adapters' B 0. Other leaves are uniform; the name is the seed."""
    if len(shape) < 2 or any(part in name for part in ("norm", "bias", "scale", "lora/b")):
        small = any(part in name for part in ("bias", "lora/b"))
        return jnp.full(shape, 0.0 if small else 0.1 if "scale1" in name or "scale2" in name else 1.0, dtype)
    deviation = 0.02 if "table" in name or "position" in name else shape[-2] ** -0.5
    return _uniform(np.uint32(zlib.crc32(name.encode())), shape, jnp.dtype(dtype), float(deviation))


@partial(jax.jit, static_argnums=(1, 2))
def _uniform(seed: Any, shape: tuple[int, ...], dtype: Any, deviation: Any) -> jax.Array:
    """Hashes each element's index by MurmurHash3's finalizer.

    It compiles in a tenth of the time of `jax.random.normal`, of which a model needs one program for each shape, and
    needs no memory beyond the result.
    """
    x = jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape) ^ seed
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    unit = (x ^ (x >> 16)).astype(jnp.float32) / 2.0**32
    return ((unit - 0.5) * (12**0.5 * deviation)).astype(dtype)


def requests(config: VLAConfig, batch: int, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns images uint8 [B, S, S, 3], prompts int32 [B, T] padded to the policy's bucket, lengths int32 [B]."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (batch, config.image_size, config.image_size, 3), dtype=np.uint8)
    ids = np.full((batch, -(-length // 32) * 32), config.pad_token, np.int32)
    ids[:, :length] = rng.integers(3, 31000, (batch, length))
    ids[:, 0] = 1
    return images, ids, np.full(batch, length, np.int32)


def count_billions(config: VLAConfig) -> float:
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_model(config))) / 1e9
