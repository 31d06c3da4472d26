"""The vision transformer against transformers' DINOv2 with registers, SigLIP, CLIP and ImageNet ViT."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openvla_jax.config import VisionConfig
from openvla_jax.models.vit import UnusedViT, ViT
from openvla_jax.parallel.execution import PLAIN

torch = pytest.importorskip("torch")
import torch_reference as reference

pytestmark = pytest.mark.torch

FAMILIES = {
    "dino": {"registers": 4, "class_token": True, "layer_scale": True},
    "siglip": {"attention_pool": True},
    "clip": {
        "class_token": True,
        "position_for_class_token": True,
        "pre_norm": True,
        "activation": "quick_gelu",
        "norm_eps": 1e-5,
    },
    "in1k": {"class_token": True, "position_for_class_token": True},
}

run = jax.jit(lambda model, pixels: model(pixels, PLAIN))


def random_tower(family: str, seed: int) -> VisionConfig:
    """A small tower; the image is up to a patch larger than whole patches cover."""
    rng = np.random.default_rng(seed)
    heads, head_dim, patch = (int(rng.choice(options)) for options in ([1, 2, 3], [6, 8, 10], [4, 5, 7]))
    image = patch * int(rng.integers(2, 6)) + int(rng.integers(patch))
    width = heads * head_dim
    mlp_dim = 4 * width if family == "dino" else int(rng.integers(10, 80))
    return VisionConfig(family, width, int(rng.integers(2, 5)), heads, mlp_dim, image, patch, **FAMILIES[family])


def compare(config: VisionConfig, seed: int) -> float:
    """Our float32 features against the oracle's in float64."""
    module = reference.tower(config, seed)
    model = reference.filled(lambda key: ViT(key, config), reference.tower_arrays(module, config))
    shape = (2, config.image_size, config.image_size, 3)
    pixels = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    with torch.no_grad():
        expected = reference.features(module.double(), config, reference.channels_first(pixels).double())
    return reference.difference(run(model, jnp.asarray(pixels)), expected)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_tower_matches_transformers(family, seed):
    assert compare(random_tower(family, seed), seed) < 1e-5


@pytest.mark.parametrize("family", ["dino", "siglip"])
def test_pixels_beyond_the_last_whole_patch_are_ignored(family):
    """38 px hold five patches of 7, and 3 px more; as 384 px / 14 does."""
    config = VisionConfig(family, 16, 3, 2, 64, image_size=38, patch_size=7, **FAMILIES[family])
    assert config.patches == 25
    assert compare(config, seed=3) < 1e-5


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("siglip", {"activation": "quick_gelu"}),
        ("clip", {"activation": "gelu"}),
        ("clip", {"norm_eps": 1e-2}),
        ("dino", {"heads": 4}),
    ],
)
def test_comparison_sees_a_wrong_setting(family, change):
    """The same weights under another activation, eps or number of heads are outside of the tolerance."""
    config = VisionConfig(family, 16, 3, 2, 64, image_size=38, patch_size=7, **FAMILIES[family])
    module = reference.tower(config, seed=4)
    wrong = dataclasses.replace(config, **change)
    model = reference.filled(lambda key: ViT(key, wrong), reference.tower_arrays(module, config))
    pixels = np.random.default_rng(4).standard_normal((1, 38, 38, 3), dtype=np.float32)
    with torch.no_grad():
        expected = reference.features(module, config, reference.channels_first(pixels))
    assert reference.difference(run(model, jnp.asarray(pixels)), expected) > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_used_and_unused_parameters_are_those_of_the_reference(family):
    """Together they are the oracle's tensors; the reference folds DINOv2's class position and has no mask token."""
    config = VisionConfig(family, 16, 3, 2, 64, image_size=38, patch_size=7, **FAMILIES[family])
    ours = jax.eval_shape(lambda key: (ViT(key, config), UnusedViT(key, config)), jax.random.key(0))
    module = reference.tower(config, seed=0)
    theirs = {name: p.numel() for name, p in module.named_parameters() if not name.startswith("pooler")}
    expected = sum(theirs.values())
    if family == "dino":
        expected -= theirs["embeddings.mask_token"] + config.width
    assert sum(leaf.size for leaf in jax.tree.leaves(ours)) == expected


def test_equal_tokens_do_not_start_equal():
    """Class token and registers have no position: if two began alike, they would stay alike for ever."""
    config = VisionConfig("dino", 16, 2, 2, 64, image_size=14, patch_size=7, **FAMILIES["dino"])
    model = jax.jit(lambda key: ViT(key, config))(jax.random.key(0))
    tokens = np.concatenate([model.class_token[...], model.registers[...]])
    distances = np.abs(tokens[:, None] - tokens).max(-1)
    assert (distances + np.eye(5) > 1e-3).all()


def test_blocks_of_a_new_tower_differ():
    """A stack is not one block repeated, and its kernels have unit gain."""
    config = VisionConfig("siglip", 64, 4, 4, 256, image_size=14, patch_size=7)
    blocks = jax.jit(lambda key: ViT(key, config))(jax.random.key(0)).blocks
    for kernel in (blocks.attention.q.kernel[...], blocks.attention.k.kernel[...], blocks.mlp.down.kernel[...]):
        assert np.std(kernel) == pytest.approx(kernel.shape[1] ** -0.5, rel=0.05)
        assert np.abs(kernel[0] - kernel[1]).max() > 0.01
    assert np.abs(blocks.attention.q.kernel[...] - blocks.attention.k.kernel[...]).max() > 0.01
