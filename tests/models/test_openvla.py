"""The whole model against an assembly of transformers' modules: logits, gradients, precision, decoding, batching."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openvla_jax.config import LlamaConfig, ProjectorConfig, VisionConfig, VLAConfig, tiny
from openvla_jax.models.openvla import OpenVLA, Projector
from openvla_jax.models.stack import REMAT_POLICIES
from openvla_jax.parallel.execution import PLAIN, Execution

torch = pytest.importorskip("torch")
import torch_reference as reference

pytestmark = pytest.mark.torch

DINO = VisionConfig("dino", 24, 3, 2, 96, image_size=30, patch_size=7, registers=4, class_token=True, layer_scale=True)
SIGLIP = VisionConfig("siglip", 20, 4, 2, 36, image_size=30, patch_size=7, attention_pool=True)
CLIP = VisionConfig(
    "clip", 16, 2, 2, 48, 30, 7, class_token=True, position_for_class_token=True, pre_norm=True, norm_eps=1e-5
)
LLAMA = LlamaConfig(width=32, depth=3, heads=4, kv_heads=2, mlp_dim=56, vocab_size=128)
FUSED = VLAConfig("fused", (DINO, SIGLIP), LLAMA, base_vocab_size=100)
SINGLE = dataclasses.replace(FUSED, name="single", towers=(SIGLIP,), projector=ProjectorConfig("gelu-mlp"))
DINOCLIP = dataclasses.replace(FUSED, name="dinoclip", towers=(DINO, CLIP))

BATCH, LENGTH = 3, 9
TARGETS = np.array([[4, 5, 6], [5, 6, 7], [6, 7, 8]])  # text indices, near the end of each row as action tokens are

logits_of = jax.jit(lambda model, pixels, ids: model(pixels, ids))


def pair(config: VLAConfig, seed: int, dtype=jnp.float32):
    module = reference.TorchVLA(config, seed)
    return module, reference.filled(lambda key: OpenVLA(config, key, dtype), module.arrays())


def inputs(config: VLAConfig, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels, and ids right-padded after each row's last target."""
    rng = np.random.default_rng(seed)
    size = config.image_size
    pixels = rng.standard_normal((BATCH, size, size, 3 * len(config.towers)), dtype=np.float32)
    ids = rng.integers(2, config.base_vocab_size, (BATCH, LENGTH))
    ids[:, 0] = 1
    ids[np.arange(LENGTH) > TARGETS[:, -1:]] = config.pad_token
    return pixels, ids


def torch_logits(module, pixels: np.ndarray, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        dtype = module.projector[0].weight.dtype
        return module(reference.channels_first(pixels).to(dtype), torch.tensor(ids)).double().numpy()


def mean_loss(model, pixels, ids, remat):
    """Mean cross-entropy at the targets."""
    execution = Execution(remat=remat)
    logits = model.target_logits(model.hidden(pixels, ids, execution), jnp.asarray(TARGETS), execution)
    labels = jnp.take_along_axis(ids, jnp.asarray(TARGETS), axis=1)
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1).mean()


# ---------------------------------------------------------------------------------------------------------------------
# Projector
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "gelu-mlp", "fused-gelu-mlp"])
def test_projector(kind):
    config = dataclasses.replace(FUSED, projector=ProjectorConfig(kind))
    module = reference.projector(config, seed=0)
    model = reference.filled(lambda key: Projector(key, config), reference.projector_arrays(module))
    x = np.random.default_rng(0).standard_normal((2, 5, config.vision_width), dtype=np.float32)
    expected = module.double()(torch.tensor(x).double())
    assert reference.difference(jax.jit(lambda model, x: model(x, PLAIN))(model, jnp.asarray(x)), expected) < 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# Forward
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "seed"), [(FUSED, 0), (FUSED, 1), (SINGLE, 2), (DINOCLIP, 3)], ids=lambda x: getattr(x, "name", x)
)
def test_logits_match_the_torch_assembly(config, seed):
    module, model = pair(config, seed)
    pixels, ids = inputs(config, seed)
    expected = torch_logits(module.double(), pixels, ids)
    logits = np.asarray(logits_of(model, jnp.asarray(pixels), jnp.asarray(ids)))
    assert logits.shape == (BATCH, 16 + LENGTH, 128)
    assert reference.difference(logits, expected) < 1e-5
    np.testing.assert_array_equal(logits.argmax(-1), expected.argmax(-1))


def test_target_logits_are_those_before_each_target():
    """The token at text index t stands at position patches + t: the logits at patches + t - 1 predict it."""
    _, model = pair(FUSED, seed=0)
    pixels, ids = (jnp.asarray(x) for x in inputs(FUSED, 0))
    everywhere = np.asarray(logits_of(model, pixels, ids))
    at_targets = jax.jit(lambda model: model.target_logits(model.hidden(pixels, ids), jnp.asarray(TARGETS)))(model)
    expected = everywhere[np.arange(BATCH)[:, None], FUSED.patches + TARGETS - 1]
    assert reference.difference(at_targets, expected) < 1e-6


def test_rows_do_not_depend_on_their_batch_nor_on_pads():
    """A row alone, without its pads, has the logits that it has in a padded batch."""
    _, model = pair(FUSED, seed=1)
    pixels, ids = inputs(FUSED, 1)
    together = np.asarray(logits_of(model, jnp.asarray(pixels), jnp.asarray(ids)))
    length = TARGETS[0, -1] + 1
    assert (ids[0, length:] == FUSED.pad_token).sum() == 2
    alone = logits_of(model, jnp.asarray(pixels[:1]), jnp.asarray(ids[:1, :length]))
    assert reference.difference(alone, together[:1, : FUSED.patches + length]) < 1e-6


def test_normalize_gives_each_tower_its_own_statistics():
    config = tiny(base_vocab_size=300)
    model = jax.eval_shape(lambda key: OpenVLA(config, key), jax.random.key(0))
    images = np.random.default_rng(0).integers(0, 256, (2, 5, 5, 3), dtype=np.uint8)
    unit = images.astype(np.float64) / 255
    dino = (unit - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    expected = np.concatenate([dino, unit * 2 - 1], axis=-1)
    np.testing.assert_allclose(model.normalize(jnp.asarray(images)), expected, atol=1e-6)


def test_wrong_pixels_name_what_the_model_takes():
    _, model = pair(SINGLE, seed=0)
    with pytest.raises(ValueError, match=r"\(1, 30, 30, 6\): .*'single' takes \[B, 30, 30, 3\]"):
        model(jnp.zeros((1, 30, 30, 6)), jnp.ones((1, 4), jnp.int32))


# ---------------------------------------------------------------------------------------------------------------------
# Decoding
# ---------------------------------------------------------------------------------------------------------------------


def test_prefill_and_decode_give_the_logits_of_the_whole_sequence():
    """Rows of different length in one batch, teacher-forced over their targets."""
    _, model = pair(FUSED, seed=4)
    pixels, ids = inputs(FUSED, 4)
    lengths, steps = TARGETS[:, 0], TARGETS.shape[1]
    everywhere = np.asarray(logits_of(model, jnp.asarray(pixels), jnp.asarray(ids)))
    expected = everywhere[np.arange(BATCH)[:, None], FUSED.patches + TARGETS - 1]

    prefill = jax.jit(OpenVLA.prefill, static_argnames="steps")
    prompt = jnp.asarray(ids[:, : lengths.max()])  # the shorter rows are padded with tokens that must not be seen
    logits, cache = prefill(model, jnp.asarray(pixels), prompt, jnp.asarray(lengths), steps=steps)
    got = [np.asarray(logits)]
    decode = jax.jit(OpenVLA.decode_step)
    for step in range(steps - 1):
        tokens = jnp.asarray(ids[np.arange(BATCH), TARGETS[:, step]])
        logits, cache = decode(model, tokens, jnp.asarray(lengths + step), cache)
        got.append(np.asarray(logits))
    assert cache.k.shape[2] == FUSED.patches + lengths.max() + steps
    assert reference.difference(np.stack(got, axis=1), expected) < 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# Gradients and rematerialisation
# ---------------------------------------------------------------------------------------------------------------------


loss_and_gradients = jax.jit(jax.value_and_grad(mean_loss), static_argnums=3)


def test_gradients_match_torch_autograd():
    """Every leaf, against float64 autograd; and the reference's last blocks get none."""
    module, model = pair(FUSED, seed=5)
    pixels, ids = inputs(FUSED, 5)
    loss, gradients = loss_and_gradients(model, jnp.asarray(pixels), jnp.asarray(ids), "none")

    module, ids, targets = module.double(), torch.tensor(ids), torch.tensor(TARGETS)
    logits = module(reference.channels_first(pixels).double(), ids)
    picked = logits[torch.arange(BATCH)[:, None], FUSED.patches + targets - 1]
    expected = torch.nn.functional.cross_entropy(picked.flatten(0, 1), ids.gather(1, targets).flatten())
    expected.backward()
    assert float(loss) == pytest.approx(expected.item(), rel=1e-6)

    leaves, arrays = reference.named_leaves(gradients), module.arrays(gradients=True)
    assert leaves.keys() == arrays.keys()
    # A key's bias shifts all scores of a query alike: its gradient is zero but for rounding.
    zero = {name for name in leaves if name.endswith("attention/k/bias")}
    assert len(zero) == 2
    for name, leaf in leaves.items():
        if name in zero:
            assert np.abs(leaf).max() < 1e-7
        else:
            assert reference.difference(leaf, arrays[name]) < 1e-4, name
    for tower, config in zip(module.towers, FUSED.towers, strict=True):
        last = tower.get_submodule(reference.PARTS[config.name][0])[-1]
        assert all(p.grad is None for p in last.parameters())


@pytest.fixture(scope="module")
def compiled():
    """The SINGLE model with its inputs, and for each policy the compiled program of loss and gradients."""
    _, model = pair(SINGLE, seed=5)
    pixels, ids = inputs(SINGLE, 5)
    arguments = (model, jnp.asarray(pixels), jnp.asarray(ids))
    return arguments, {name: loss_and_gradients.lower(*arguments, name).compile() for name in REMAT_POLICIES}


@pytest.mark.long
@pytest.mark.parametrize("policy", [name for name in REMAT_POLICIES if name != "none"])
def test_remat_changes_no_number(compiled, policy):
    arguments, programs = compiled
    loss, gradients = programs["none"](*arguments)
    other_loss, other_gradients = programs[policy](*arguments)
    assert float(other_loss) == pytest.approx(float(loss), rel=1e-6)
    leaves, others = reference.named_leaves(gradients), reference.named_leaves(other_gradients)
    for name, leaf in leaves.items():
        np.testing.assert_allclose(others[name], leaf, atol=1e-5 * float(np.abs(leaf).max()) + 1e-7, err_msg=name)


@pytest.mark.long
def test_remat_policies_are_ordered_by_memory(compiled):
    """A policy whose names no layer sets would silently be `full`: tower and Llama each set all of them once."""
    arguments, programs = compiled
    named = re.findall(r"name\[name=(\w+)", str(jax.make_jaxpr(mean_loss, static_argnums=3)(*arguments, "none")))
    assert [named.count(name) for name in ("q", "k", "v", "attention")] == [2, 2, 2, 2]
    memory = {name: program.memory_analysis().temp_size_in_bytes for name, program in programs.items()}
    ordered = [memory[name] for name in ("full", "save_qkv", "save_qkvo", "none")]
    assert ordered == sorted(set(ordered)), memory


# ---------------------------------------------------------------------------------------------------------------------
# bfloat16, initial weights
# ---------------------------------------------------------------------------------------------------------------------


def test_bfloat16_is_as_near_to_float32_as_torch():
    module, model = pair(FUSED, seed=6, dtype=jnp.bfloat16)
    pixels, ids = inputs(FUSED, 6)
    exact = torch_logits(module.double(), pixels, ids)
    theirs = torch_logits(module.bfloat16(), pixels, ids)
    ours = logits_of(model, jnp.asarray(pixels), jnp.asarray(ids))
    assert ours.dtype == jnp.float32
    error, their_error = (np.sqrt(np.square(np.asarray(x) - exact).mean()) for x in (ours, theirs))
    assert error < 1.1 * their_error
    assert error < 0.02 * exact.std()


def test_no_two_parameters_start_alike():
    """Each random parameter has a key of its own; what starts constant is a bias, a norm or a LayerScale."""
    model = jax.jit(lambda key: OpenVLA(FUSED, key))(jax.random.key(0))
    starts = {}
    for name, leaf in reference.named_leaves(model).items():
        values = np.asarray(leaf).ravel()
        if np.ptp(values) == 0:
            assert name.endswith(("bias", "scale", "scale1", "scale2")), name
        else:
            starts[name] = values[:4] / np.abs(values[:4]).max()  # free of the parameter's scale
    names = list(starts)
    values = np.stack([starts[name] for name in names])
    distance = np.abs(values[:, None] - values).max(-1) + np.eye(len(names))
    first, second = np.unravel_index(distance.argmin(), distance.shape)
    assert distance.min() > 1e-4, (names[first], names[second])
