"""The layers against PyTorch's: float32 near a float64 oracle, bfloat16 as near as PyTorch's own bfloat16."""

import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from openvla_jax.config import LlamaConfig
from openvla_jax.models import activations, linear, norms
from openvla_jax.models import attention as attention_lib
from openvla_jax.models import stack as stack_lib
from openvla_jax.models.llama import Embedding
from openvla_jax.parallel.execution import PLAIN, Execution

torch = pytest.importorskip("torch")
from torch_reference import difference, filled
from transformers.models.llama import modeling_llama

pytestmark = pytest.mark.torch

few = hypothesis.settings(max_examples=8)
seeds = st.integers(0, 2**31)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def in_bfloat16(x: np.ndarray) -> tuple[jax.Array, "torch.Tensor", "torch.Tensor"]:
    """The array in bfloat16 for both, and the same values in float64."""
    rounded = torch.tensor(x).bfloat16()
    return jnp.asarray(x, jnp.bfloat16), rounded, rounded.double()


# ---------------------------------------------------------------------------------------------------------------------
# Linear and norms
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [True, False])
def test_linear(bias):
    torch.manual_seed(0)
    theirs = torch.nn.Linear(24, 40, bias=bias)
    arrays = {"kernel": theirs.weight.detach().numpy().T} | ({"bias": theirs.bias.detach().numpy()} if bias else {})
    ours = filled(lambda key: linear.Linear(key, 24, 40, ("embed", "mlp"), bias=bias), arrays)
    x = normal(0, 3, 5, 24)
    assert difference(ours(jnp.asarray(x), PLAIN), theirs.double()(torch.tensor(x).double())) < 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_linear_scaled_and_its_gradients_are_those_of_the_plain_formula(dtype):
    arrays = {"kernel": normal(0, 24, 40) / 5, "bias": normal(1, 40)}
    layer = filled(lambda key: linear.Linear(key, 24, 40, ("embed", "mlp"), bias=True), arrays)
    scale, x = nnx.Param(jnp.asarray(normal(2, 40) / 10)), jnp.asarray(normal(3, 300, 24), dtype)
    weights = jnp.asarray(normal(4, 300, 40), dtype)

    def ours(layer, scale, x):
        return (layer(x, PLAIN, scale=scale) * weights).astype(jnp.float32).sum()

    def plain(kernel, bias, scale, x):
        return ((x @ kernel + bias) * scale * np.asarray(weights, np.float64)).sum()

    exact = [np.asarray(array, np.float64) for array in (*arrays.values(), scale[...], x)]
    found = layer(x, PLAIN, scale=scale)
    assert found.dtype == dtype
    gradients = jax.jit(jax.grad(ours, argnums=(0, 1, 2)))(layer, scale, x)
    by_name = [gradients[0].kernel[...], gradients[0].bias[...], gradients[1][...], gradients[2]]
    tolerance = 1e-6 if dtype == jnp.float32 else 1e-2
    with jax.enable_x64(True):
        expected = jax.grad(plain, argnums=(0, 1, 2, 3))(*map(jnp.asarray, exact))
    assert difference(found, (exact[3] @ exact[0] + exact[1]) * exact[2]) < tolerance
    for gradient, exactly in zip(by_name, expected, strict=True):
        assert difference(gradient, exactly) < tolerance


def test_the_gradient_of_a_scale_needs_no_product_again():
    layer = linear.Linear(jax.random.key(0), 24, 40, ("embed", "mlp"), bias=True)
    scale, x = nnx.Param(jnp.ones(40)), jnp.ones((300, 24), jnp.bfloat16)

    def products(function):
        def loss(layer, scale, x):
            return jnp.sin(jax.checkpoint(function)(layer, scale, x).astype(jnp.float32)).sum()

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(layer, scale, x).compile()
        # A canary: another spelling of products by the compiler breaks it, and nothing else.
        return len(re.findall(r"\bdot\(|custom_call_target=\"[^\"]*(?:matmul|gemm)", compiled.as_text()))

    assert products(lambda layer, scale, x: layer(x, PLAIN, scale=scale)) == 3  # forward, to the input, to the kernel
    assert products(lambda layer, scale, x: linear.apply_row_parameter(jnp.multiply, layer(x, PLAIN), scale)) == 4


@few
@hypothesis.given(seed=seeds, eps=st.sampled_from([1e-6, 1e-5, 1e-2]), offset=st.sampled_from([0.0, 30.0]))
def test_layer_norm(seed, eps, offset):
    """Also where the mean is far from zero: a one-pass variance would lose three digits there."""
    x, scale, bias = normal(seed, 4, 48) + np.float32(offset), normal(seed + 1, 48), normal(seed + 2, 48)
    ours = filled(lambda _: norms.LayerNorm(48, eps), {"scale": scale, "bias": bias})
    expected = torch.nn.functional.layer_norm(torch.tensor(x).double(), (48,), eps=eps)
    expected = expected * torch.tensor(scale) + torch.tensor(bias)
    assert difference(ours(jnp.asarray(x)), expected) < 1e-5


@few
@hypothesis.given(seed=seeds, eps=st.sampled_from([1e-6, 1e-5, 1e-1]), size=st.sampled_from([1e-3, 1.0, 100.0]))
def test_rms_norm(seed, eps, size):
    x, scale = normal(seed, 4, 48) * np.float32(size), normal(seed + 1, 48)
    ours = filled(lambda _: norms.RMSNorm(48, eps), {"scale": scale})
    wide = torch.tensor(x).double()
    expected = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * torch.tensor(scale)
    assert difference(ours(jnp.asarray(x)), expected) < 1e-6


def test_rms_norm_rounds_as_llama():
    """In bfloat16 the normed value is rounded before the weight multiplies it: bits equal to transformers'."""
    x, scale = normal(0, 400, 64), 1 + normal(1, 64) / 4
    theirs = modeling_llama.LlamaRMSNorm(64, 1e-5)
    theirs.weight.data = torch.tensor(scale)
    ours = filled(lambda _: norms.RMSNorm(64, 1e-5), {"scale": scale})
    jax_x, torch_x, _ = in_bfloat16(x)
    with torch.no_grad():
        expected = theirs.bfloat16()(torch_x).float().numpy()
    # A handful of values may sit on a rounding boundary, where the order of the sum decides.
    assert np.mean(np.asarray(ours(jax_x), np.float32) != expected) < 1e-3


# ---------------------------------------------------------------------------------------------------------------------
# Rotary positions
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [jnp.add, jnp.multiply])
def test_a_parameter_of_a_row_counts_every_row(function):
    x = jnp.asarray(normal(0, 5000, 4), jnp.bfloat16)
    row = nnx.Param(jnp.asarray(normal(1, 4)))
    plainly = function(x, row[...].astype(jnp.bfloat16))
    np.testing.assert_array_equal(linear.apply_row_parameter(function, x, row), plainly)
    gradient = jax.jit(
        jax.grad(lambda row: linear.apply_row_parameter(function, x, nnx.Param(row)).astype(jnp.float32).sum())
    )
    exact = np.asarray(x, np.float64).sum(0) if function is jnp.multiply else np.full(4, 5000.0)
    np.testing.assert_allclose(gradient(row[...]), exact, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("theta", [100.0, 10_000.0, 1_000_000.0])
def test_rope(theta):
    x = normal(0, 2, 40, 3, 16)
    positions = np.random.default_rng(1).integers(0, 2048, (2, 40))
    settings = modeling_llama.LlamaConfig(head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": theta})
    heads_first = torch.tensor(x).transpose(1, 2)
    cos, sin = modeling_llama.LlamaRotaryEmbedding(settings)(heads_first, torch.tensor(positions))
    expected = modeling_llama.apply_rotary_pos_emb(heads_first, heads_first, cos, sin)[0].transpose(1, 2)
    # The angles reach 2047 and are float32 on both sides: 2047 * 2**-24 = 1.2e-4 of a radian.
    assert difference(attention_lib.rope(jnp.asarray(x), jnp.asarray(positions), theta), expected) < 1e-4


@few
@hypothesis.given(seed=seeds, shift=st.integers(0, 200))
def test_rope_scores_depend_on_distance_alone(seed, shift):
    q, k = jnp.asarray(normal(seed, 1, 6, 1, 16)), jnp.asarray(normal(seed + 1, 1, 6, 1, 16))
    positions = jnp.arange(6)[None]

    def scores(positions):
        return jnp.einsum("BTNH,BSNH->TS", attention_lib.rope(q, positions, 1e4), attention_lib.rope(k, positions, 1e4))

    np.testing.assert_allclose(scores(positions), scores(positions + shift), atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rope_on_a_tpu_is_the_same_number_for_number(dtype):
    x = jnp.asarray(normal(0, 2, 40, 3, 16), dtype)
    angles = normal(1, 2, 40, 1, 8)
    cos, sin = jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)
    np.testing.assert_array_equal(
        attention_lib._rotate_by_product(x, cos, sin), attention_lib._rotate_halves(x, cos, sin)
    )


@pytest.mark.parametrize(("platform", "products"), [("tpu", 2), ("cpu", 0), ("cuda", 0)])
def test_rope_exchanges_halves_by_a_product_on_tpus_alone(platform, products):
    def gradient(x):
        return jax.value_and_grad(lambda x: attention_lib.rope(x, jnp.arange(40)[None], 1e4).sum())(x)

    lowered = jax.jit(gradient).trace(jnp.ones((2, 40, 3, 16))).lower(lowering_platforms=(platform,))
    # A canary: it counts an operation in the lowered program.
    assert lowered.as_text().count("dot_general") == products


def test_gradient_of_rope_is_that_of_the_plain_formula():
    x, weight = jnp.asarray(normal(0, 2, 40, 3, 16)), normal(1, 2, 40, 3, 16)
    positions = jnp.arange(40)[None]
    angles = positions[..., None, None] * 1e4 ** (-np.arange(8) / 8)

    def plain(x):
        return attention_lib._rotate_halves(x, jnp.cos(angles), jnp.sin(angles))

    ours = jax.grad(lambda x: (attention_lib.rope(x, positions, 1e4) * weight).sum())(x)
    assert difference(ours, jax.grad(lambda x: (plain(x) * weight).sum())(x)) < 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------------------------------------------------


attention = jax.jit(attention_lib.attention)


def torch_attention(q, k, v, mask):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = None if mask is None else torch.tensor(mask)[:, None]
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True).transpose(1, 2)


@few
@hypothesis.given(seed=seeds, kv_heads=st.sampled_from([1, 2, 4]), masked=st.booleans(), size=st.sampled_from([1, 20]))
def test_attention(seed, kv_heads, masked, size):
    """Any grouping of heads, any mask with a key for each query, scores of up to hundreds."""
    q, k, v = normal(seed, 2, 5, 4, 6) * size, normal(seed + 1, 2, 9, kv_heads, 6), normal(seed + 2, 2, 9, kv_heads, 6)
    mask = None
    if masked:
        mask = np.random.default_rng(seed).random((2, 5, 9)) < 0.5
        mask[..., 3] = True
    ours = attention(*(jnp.asarray(x) for x in (q, k, v)), None if mask is None else jnp.asarray(mask))
    expected = torch_attention(*(torch.tensor(x).double() for x in (q, k, v)), mask)
    assert difference(ours, expected) < 1e-5


@pytest.mark.gpu
def test_attention_in_bfloat16_is_as_exact_as_torch():
    """Value product and division in float32, one rounding at the end, as fused kernels do."""
    arrays = [in_bfloat16(normal(i, 1, 200, 4, 32)) for i in range(3)]
    mask = np.tril(np.ones((1, 200, 200), bool))
    exact = torch_attention(*(a[2] for a in arrays), mask).numpy()
    theirs = torch_attention(*(a[1] for a in arrays), mask).double().numpy()
    ours = np.asarray(attention(*(a[0] for a in arrays), jnp.asarray(mask)), np.float64)
    assert np.square(ours - exact).mean() < 1.1**2 * np.square(theirs - exact).mean()


# ---------------------------------------------------------------------------------------------------------------------
# Activations
# ---------------------------------------------------------------------------------------------------------------------

TORCH_ACTIVATIONS = {
    "gelu": torch.nn.functional.gelu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": torch.nn.functional.silu,
}


@pytest.mark.parametrize("name", activations.ACTIVATIONS)
def test_activation(name):
    x = np.linspace(-8, 8, 4001, dtype=np.float32)
    function, oracle = activations.ACTIVATIONS[name], TORCH_ACTIVATIONS[name]
    assert np.abs(np.asarray(function(jnp.asarray(x))) - oracle(torch.tensor(x).double()).numpy()).max() < 1e-6
    jax_x, _, exact_x = in_bfloat16(x)
    exact = oracle(exact_x).numpy()
    ours = np.asarray(function(jax_x), np.float64)
    # Half a unit in the last of eight bits (2**-8 relative), and nothing from steps in between.
    assert (np.abs(ours - exact) <= 2**-8 * 1.01 * np.abs(exact) + 1e-6).all()


# ---------------------------------------------------------------------------------------------------------------------
# Gradients, stacks
# ---------------------------------------------------------------------------------------------------------------------


def test_embedding_gradient_adds_up_in_float32():
    """A token that a batch repeats 4096 times gets 4096 gradients; a bfloat16 sum would stop at 256."""
    embedding = Embedding(jax.random.key(0), LlamaConfig(width=4, vocab_size=8))
    ids = jnp.full((8, 512), 3)
    gradient = jax.grad(lambda module: module(ids, jnp.bfloat16, PLAIN).astype(jnp.float32).sum())(embedding).table[...]
    np.testing.assert_array_equal(gradient, np.where(np.arange(8)[:, None] == 3, 4096.0, 0.0) * np.ones(4))


class Stack(nnx.Module):
    def __init__(self, key):
        self.linear = linear.Linear(key, 6, 6, ("embed", "mlp"), bias=True, layers=3)


def test_scan_layers_runs_the_stack_in_order():
    stack = Stack(jax.random.key(0))
    x = jnp.asarray(normal(0, 2, 6))
    body = lambda layer, x, execution: jnp.tanh(layer.linear(x, execution))
    scanned = jax.jit(lambda x, stack: stack_lib.scan_layers(body, x, stack, PLAIN))(x, stack)
    kernel, bias = np.asarray(stack.linear.kernel[...], np.float64), np.asarray(stack.linear.bias[...], np.float64)
    expected = np.asarray(x, np.float64)
    for i in range(3):
        expected = np.tanh(expected @ kernel[i] + bias[i])
    assert difference(scanned, expected) < 1e-6


def test_unknown_remat_policy_lists_the_known():
    with pytest.raises(ValueError, match="unknown remat policy 'ful': one of full, save_qkv"):
        stack_lib.scan_layers(lambda layer, x, _: x, jnp.zeros(6), Stack(jax.random.key(0)), Execution(remat="ful"))


def test_remat_keeps_what_it_names(capsys):
    def function(x):
        return jnp.cos(checkpoint_name(jnp.sin(checkpoint_name(jnp.exp(x), "q")), "gate")).sum()

    def kept(policy):
        jax.ad_checkpoint.print_saved_residuals(
            jax.checkpoint(function, policy=stack_lib.remat_policy(policy)), jnp.ones(3)
        )
        printed = capsys.readouterr().out
        return [name for name in ("q", "gate") if f"named '{name}'" in printed]

    assert (kept("full"), kept("q"), kept("gate,q"), kept("save_qkv")) == ([], ["q"], ["q", "gate"], ["q"])
    with pytest.raises(ValueError, match=r"unknown remat policy 'q,gat': .*of q, k, v"):
        stack_lib.remat_policy("q,gat")


@pytest.mark.parametrize("policy", ["full", "o", "save_qkvo"])
def test_remat_keeps_the_statistics_of_softmax_and_norms(capsys, policy):
    q, k, v = jnp.asarray(normal(0, 3, 2, 5, 4, 8))

    def function(q):
        q = norms.LayerNorm(8, 1e-6)(norms.RMSNorm(8, 1e-5)(q) * 2)
        return jnp.sin(attention_lib.attention(q, k, v)).sum()

    jax.ad_checkpoint.print_saved_residuals(jax.checkpoint(function, policy=stack_lib.remat_policy(policy)), q)
    lines = capsys.readouterr().out.splitlines()
    kept = [re.search(r"\[(.*?)\]", line)[1] for line in lines if "named 'statistics'" in line]
    # Mean square; mean and variance; largest score and sum.
    expected = ["2,5,4"] * 3 + ["2,4,1,5"] * 2
    assert sorted(kept) == ([] if policy == "full" else sorted(expected))


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2)])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_and_its_gradients_are_those_of_the_plain_formula(heads, kv_heads, masked):
    """Against softmax(q k^T) v differentiated by jax in float64; one row of the mask sees nothing."""
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, 5, heads, 8))
    k, v = rng.normal(size=(2, 2, 7, kv_heads, 8))
    mask = rng.random((2, 5, 7)) < 0.6 if masked else None
    if masked:
        mask[0, 1] = False
    weight = rng.normal(size=q.shape)

    def plain(q, k, v):
        k, v = (jnp.repeat(x, heads // kv_heads, axis=2) for x in (k, v))
        scores = jnp.einsum("BTNH,BSNH->BNTS", q, k) / np.sqrt(8)
        if masked:
            scores = jnp.where(mask[:, None], scores, jnp.finfo(jnp.float32).min)
        return (jnp.einsum("BNTS,BSNH->BTNH", jax.nn.softmax(scores), v) * weight).sum()

    with jax.enable_x64(True):
        expected = jax.value_and_grad(plain, argnums=(0, 1, 2))(*(jnp.asarray(x, jnp.float64) for x in (q, k, v)))
    seen = None if mask is None else jnp.asarray(mask)
    ours = lambda q, k, v: (attention_lib.attention(q, k, v, seen) * weight).sum()
    policy = jax.checkpoint(ours, policy=stack_lib.REMAT_POLICIES["save_dots"])
    for function in (ours, policy):
        found = jax.value_and_grad(function, argnums=(0, 1, 2))(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, expected)
