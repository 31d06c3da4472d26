"""The decoder against transformers' Llama and Mistral, and its KV cache against its own full forward."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openvla_jax.config import LlamaConfig
from openvla_jax.models.llama import Llama
from openvla_jax.parallel.execution import PLAIN

torch = pytest.importorskip("torch")
import torch_reference as reference

pytestmark = pytest.mark.torch

BASE = LlamaConfig(width=48, depth=3, heads=4, kv_heads=4, mlp_dim=80, vocab_size=96)
CONFIGS = {
    "mha": BASE,
    "gqa": dataclasses.replace(BASE, kv_heads=2, rope_theta=500.0, norm_eps=1e-6),
    "one kv head, one layer": dataclasses.replace(BASE, kv_heads=1, depth=1, rope_theta=1e6, norm_eps=1e-2),
    "sliding window": dataclasses.replace(BASE, kv_heads=2, sliding_window=5),
}
LENGTH = 16

full = jax.jit(lambda model, ids: model.logits(model(model.embed(ids, jnp.float32, PLAIN), PLAIN), PLAIN))


@jax.jit
def prefill(model, ids):
    hidden, cache = model.prefill(model.embed(ids, jnp.float32, PLAIN), LENGTH, PLAIN)
    return model.logits(hidden, PLAIN), cache


@jax.jit
def decode(model, ids, positions, cache):
    hidden, cache = model.decode_step(model.embed(ids[:, None], jnp.float32, PLAIN), positions, cache, PLAIN)
    return model.logits(hidden[:, 0], PLAIN), cache


def pair(config: LlamaConfig, seed: int):
    module = reference.llama(config, seed)
    return module, reference.filled(lambda key: Llama(key, config), reference.llama_arrays(module, config))


def random_ids(config: LlamaConfig, seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, config.vocab_size, shape)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_match_transformers(name, seed):
    config = CONFIGS[name]
    module, model = pair(config, seed)
    ids = random_ids(config, seed, 3, LENGTH)
    with torch.no_grad():
        expected = module.double()(torch.tensor(ids)).logits.numpy()
    logits = np.asarray(full(model, jnp.asarray(ids)))
    assert reference.difference(logits, expected) < 1e-5
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    np.testing.assert_array_equal(logits.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("mha", {"rope_theta": 5000.0}),
        ("one kv head, one layer", {"norm_eps": 1e-3}),
        ("sliding window", {"sliding_window": 6}),
        ("sliding window", {"sliding_window": None}),
    ],
)
def test_comparison_sees_a_wrong_setting(name, change):
    config = CONFIGS[name]
    module = reference.llama(config, seed=0)
    wrong = dataclasses.replace(config, **change)
    model = reference.filled(lambda key: Llama(key, wrong), reference.llama_arrays(module, config))
    ids = random_ids(config, 0, 3, LENGTH)
    with torch.no_grad():
        expected = module(torch.tensor(ids)).logits
    assert reference.difference(full(model, jnp.asarray(ids)), expected) > 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["mha", "gqa", "sliding window"])
def test_decoding_rows_of_different_length_equals_the_full_forward(name):
    """Greedy steps from a right-padded prefill: every row, token for token, as if it were alone."""
    config = CONFIGS[name]
    module, model = pair(config, seed=2)
    lengths, steps = np.array([4, 7, 10]), 5
    ids = random_ids(config, 2, 3, 10)

    logits, cache = prefill(model, jnp.asarray(ids))
    logits = np.asarray(logits)[np.arange(3), lengths - 1]
    stepwise, rows = [logits], [list(row[:n]) for row, n in zip(ids, lengths, strict=True)]
    for step in range(steps):
        tokens = logits.argmax(-1)
        for row, token in zip(rows, tokens, strict=True):
            row.append(int(token))
        logits, cache = decode(model, jnp.asarray(tokens), jnp.asarray(lengths + step), cache)
        logits = np.asarray(logits)
        stepwise.append(logits)

    for row, length, got in zip(rows, lengths, np.stack(stepwise, axis=1), strict=True):
        with torch.no_grad():
            alone = module(torch.tensor([row])).logits[0, length - 1 :].numpy()
        assert reference.difference(got, alone) < 1e-5
        np.testing.assert_array_equal(alone[:-1].argmax(-1), row[length:])


@pytest.mark.gpu
def test_pads_never_reach_a_decoded_token():
    """Whatever stands behind a row's end at prefill: a decoded position overwrites its slot and sees no later one."""
    config = CONFIGS["gqa"]
    _, model = pair(config, seed=3)
    lengths = jnp.asarray([4, 7, 10])
    ids = random_ids(config, 3, 3, 10)
    other = np.where(np.arange(10) < np.asarray(lengths)[:, None], ids, random_ids(config, 4, 3, 10))
    assert (ids != other).sum() > 3
    outputs = []
    for tokens in (ids, other):
        _, cache = prefill(model, jnp.asarray(tokens))
        for step in range(3):
            logits, cache = decode(model, jnp.asarray([5, 6, 7]) + step, lengths + step, cache)
            outputs.append(np.asarray(logits))
    for a, b in zip(outputs[:3], outputs[3:], strict=True):
        np.testing.assert_array_equal(a, b)


def test_cache_holds_each_position_once():
    """Decoding at position p writes slot p of that row and no other."""
    config = CONFIGS["gqa"]
    _, model = pair(config, seed=3)
    _, before = prefill(model, jnp.asarray(random_ids(config, 3, 3, 10)))
    at = np.array([4, 7, 10])
    _, after = decode(model, jnp.asarray([5, 6, 7]), jnp.asarray(at), before)
    assert before.k.shape == (config.depth, 3, LENGTH, config.kv_heads, config.head_dim)
    for old, new in zip(before, after, strict=True):
        written = np.asarray(old != new).any(axis=(0, 3, 4))
        np.testing.assert_array_equal(written, np.arange(LENGTH) == at[:, None])
