"""Quantised kernels: error bounds, products, what is left out, memory, and quantising while loading."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from openvla_jax.checkpoint.contract import CheckpointError, Contract
from openvla_jax.checkpoint.load import abstract_quantized, load_model, save_model, stored_quantization
from openvla_jax.config import model_config, preset, tiny
from openvla_jax.models.linear import matmul
from openvla_jax.models.llama import Llama
from openvla_jax.models.openvla import OpenVLA, abstract_model
from openvla_jax.models.quantize import (
    EXCLUDE,
    KINDS,
    BlockedQTensor,
    QTensor,
    choose_paths,
    count_bytes,
    group_size,
    quantize_array,
    quantize_model,
    scaled,
)
from openvla_jax.parallel.execution import PLAIN
from openvla_jax.tokens.tokenizer import load_tokenizer


def random_kernel(seed, rows, columns, spread=3.0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((rows, columns)) * np.exp(spread * rng.standard_normal(columns))).astype(np.float32)


@settings(max_examples=25)
@given(st.integers(0, 1000), st.sampled_from([1, 176, 256]), st.sampled_from(list(KINDS)))  # few shapes to compile
def test_no_weight_is_off_by_more_than_half_a_step(seed, rows, kind):
    columns = 5
    kernel = random_kernel(seed, rows, columns)
    kernel[:, 0] = 0
    values, scale = quantize_array(jnp.asarray(kernel), kind)
    size, largest = group_size(rows, kind), KINDS[kind][1]
    assert scale.shape == (rows // size, columns) and scale.dtype == jnp.bfloat16
    assert np.abs(np.asarray(values, np.int32)).max() <= largest
    steps = np.repeat(np.asarray(scale, np.float32), size, axis=0)
    restored = np.asarray(scaled(values, scale, jnp.float32))
    assert (np.abs(restored - kernel) <= 0.5001 * steps).all()
    # A step is what the group's largest weight asks for, but for the scale's rounding: no finer step reaches it.
    needed = np.abs(kernel.reshape(-1, size, columns)).max(axis=1) / largest
    np.testing.assert_allclose(np.asarray(scale, np.float32), needed, rtol=2**-8, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_products_rows_and_stacks_equal_the_restored_kernel(kind):
    rng = np.random.default_rng(0)
    stack = jnp.stack([random_kernel(i, 256, 24, 1.0) for i in range(3)])
    values, _ = quantize_array(stack, kind)
    x = jnp.asarray(rng.standard_normal((5, 256)), jnp.float32)
    for layer in range(3):
        alone_values, alone_scale = quantize_array(stack[layer], kind)
        np.testing.assert_array_equal(values[layer], alone_values)
        tensor = QTensor(nnx.Param(alone_values), nnx.Param(alone_scale))
        restored = np.asarray(tensor.dequantize(jnp.float32), np.float64)
        np.testing.assert_allclose(matmul(x, tensor, PLAIN), np.asarray(x, np.float64) @ restored, rtol=1e-5, atol=1e-4)
        ids = np.array([[0, 255], [128, 7]])
        np.testing.assert_array_equal(tensor.rows(ids, jnp.float32), restored[ids].astype(np.float32))
        assert matmul(x.astype(jnp.bfloat16), tensor, PLAIN).dtype == jnp.bfloat16
    assert [group_size(n, "int4") for n in (64, 128, 2176, 4304, 11008)] == [64, 128, 128, 16, 128]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [512, 264, 24])
def test_a_cpu_s_blocks_hold_the_same_numbers_in_no_more_memory(kind, rows):
    tensor = QTensor(*map(nnx.Param, quantize_array(jnp.asarray(random_kernel(5, rows, 24, 1.0)), kind)))
    blocks = tensor.blocked()
    assert isinstance(blocks, BlockedQTensor) and blocks.kind == tensor.kind == kind
    assert count_bytes(blocks) == count_bytes(tensor)
    assert blocks.block == {"int8": {512: 256, 264: 132, 24: 24}, "int4": {512: 128, 264: 88, 24: 24}}[kind][rows]
    # A row of an identity reads a row of the kernel: int4 as it was quantised, int8 and its scale in float32.
    np.testing.assert_array_equal(matmul(jnp.eye(rows), blocks, PLAIN), tensor.dequantize(jnp.float32))
    ids = np.array([[0, 13], [rows - 1, rows // 2]])
    np.testing.assert_array_equal(blocks.rows(ids, jnp.float32), tensor.rows(ids, jnp.float32))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, rows)), jnp.float32)
    exact = np.asarray(x, np.float64) @ np.asarray(tensor.dequantize(jnp.float32), np.float64)
    np.testing.assert_allclose(matmul(x, blocks, PLAIN), exact, rtol=1e-5, atol=1e-4)
    assert matmul(x.astype(jnp.bfloat16), blocks, PLAIN).dtype == jnp.bfloat16


def test_rows_that_make_no_blocks_stay_as_they_are():
    for kind, rows in (("int4", 131), ("int8", 257)):
        tensor = QTensor(*map(nnx.Param, quantize_array(jnp.ones((rows, 8)), kind)))
        assert tensor.blocked() is tensor


def test_exclusion_by_path_and_its_typing_errors():
    model = abstract_model(tiny())
    chosen = choose_paths(model)
    assert not [path for path in chosen if path.startswith(EXCLUDE)]
    assert {"projector/fc1/kernel", "llama/blocks/attention/q/kernel", "llama/blocks/mlp/down/kernel"} <= set(chosen)
    everything = choose_paths(model, ())
    assert {"vision/dino/patch_embed/kernel", "llama/embed/table", "llama/head/kernel"} <= set(everything)
    assert len(everything) == len(set(everything)) > len(chosen)
    with pytest.raises(ValueError, match=r"exclude 'llama/haed' .* did you mean 'llama/head'"):
        choose_paths(model, ["llama/haed"])
    with pytest.raises(ValueError, match=r"unknown quantisation 'int3'.*int4"):
        abstract_quantized(tiny(), "int3", chosen)


@pytest.mark.gpu
def test_a_language_model_quantised_whole_runs_and_stays_close():
    make = lambda key: Llama(key, tiny(base_vocab_size=500).llama)
    model = jax.jit(make)(jax.random.key(0))
    ids = jnp.asarray(np.random.default_rng(0).integers(3, 500, (2, 9)), jnp.int32)
    run = jax.jit(lambda model: model.logits(model(model.embed(ids, jnp.float32, PLAIN), PLAIN), PLAIN))
    exact = run(model)
    errors = {}
    for kind in KINDS:
        graph, params = nnx.split(model)
        quantised = quantize_model(nnx.merge(graph, params), kind, choose_paths(model, ()))
        errors[kind] = float(jnp.abs(run(quantised) - exact).mean() / jnp.abs(exact).mean())
    assert errors["int8"] < 0.03 and errors["int8"] * 4 < errors["int4"] < 0.4, errors


@pytest.mark.parametrize(
    ("kind", "exclude", "ratio"),
    [("int8", EXCLUDE, 0.563), ("int4", EXCLUDE, 0.352), ("int8", ("vision",), 0.546), ("int4", ("vision",), 0.326)],
)
def test_memory_of_the_7b_against_bfloat16(kind, exclude, ratio):
    model = abstract_model(preset("openvla-7b"))
    full = 2 * sum(leaf.size for leaf in jax.tree.leaves(model))
    small = jax.eval_shape(
        lambda: quantize_model(OpenVLA(model.config, jax.random.key(0)), kind, choose_paths(model, exclude))
    )
    floats = [leaf for leaf in jax.tree.leaves(small) if leaf.dtype == jnp.float32]
    got = (count_bytes(small) - count_bytes(floats) // 2) / full  # floats are loaded as bfloat16
    assert got == pytest.approx(ratio, abs=0.001)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    tokenizer = load_tokenizer("tiny")
    config = model_config({"preset": "tiny", "base_vocab_size": tokenizer.vocab_size})
    directory = tmp_path_factory.mktemp("quantised") / "full"
    model = jax.jit(lambda key: OpenVLA(config, key))(jax.random.key(3))
    save_model(model, Contract(config, tokenizer, {}), directory)
    return directory


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_while_loading_saved_and_loaded_again(saved, tmp_path, kind):
    full, config = load_model(saved)
    expected = quantize_model(full, kind, choose_paths(full))
    got, _ = load_model(saved, quantize=kind)
    contract = Contract(config, load_tokenizer("tiny"), {})
    save_model(got, contract, tmp_path / kind)
    assert stored_quantization(tmp_path / kind)[0] == kind
    again, _ = load_model(tmp_path / kind, dtype="bfloat16")
    assert again.llama.head.kernel.dtype == jnp.bfloat16
    for other in (got, again):
        for (path, want), leaf in zip(
            jax.tree_util.tree_leaves_with_path(nnx.state(expected)), jax.tree.leaves(nnx.state(other)), strict=True
        ):
            np.testing.assert_array_equal(np.asarray(want).astype(leaf.dtype), leaf, err_msg=str(path))
    other = next(name for name in KINDS if name != kind)
    with pytest.raises(CheckpointError, match=f"{kind} already"):
        load_model(tmp_path / kind, quantize=other)
    with pytest.raises(CheckpointError, match="exists"):
        save_model(got, contract, tmp_path / kind)


def test_the_full_precision_kernels_are_never_all_there(saved, monkeypatch):
    """What is read at a time is one kernel: no load asks for two that are quantised."""
    from orbax.checkpoint import v1 as ocp

    asked, load = [], ocp.load_checkpointables

    def spy(path, items):
        asked.append({"/".join(key.key for key in keys) for keys, _ in jax.tree_util.tree_leaves_with_path(items)})
        return load(path, items)

    monkeypatch.setattr(ocp, "load_checkpointables", spy)
    model, _ = load_model(saved, quantize="int8")
    quantised = {f"params/{path}" for path in stored_paths(model)}
    assert len(quantised) > 5
    assert sorted(map(len, (names & quantised for names in asked))) == [0] + [1] * len(quantised)


def stored_paths(model):
    return ["/".join(map(str, path)) for path, module in nnx.iter_modules(model) if isinstance(module, QTensor)]
