"""Policies that predict a chunk at once: one compiled call without a cache, alone, in batches, quantised, sharded."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_policy import CAMERAS, INSTRUCTIONS, chunk_policy

from openvla_jax import Observation
from openvla_jax.checkpoint.load import load_model, save_model
from openvla_jax.inference.policy import Policy
from openvla_jax.models.openvla import OpenVLA
from openvla_jax.models.quantize import QTensor, choose_paths, count_bytes, quantize_model

HEADS = ["l1", *(pytest.param(head, marks=pytest.mark.long) for head in ("diffusion", "parallel_tokens"))]
make = functools.cache(chunk_policy)
BATCH_BOUND = 2e-5  # sums in another order, of actions up to 2 in size


def observations(count, seed=0):
    rng = np.random.default_rng(seed)
    image = lambda: rng.integers(0, 256, (*rng.integers(30, 90, 2), 3), dtype=np.uint8)
    texts = [INSTRUCTIONS[i % len(INSTRUCTIONS)] for i in range(count)]
    return [Observation({name: image() for name in CAMERAS}, text, rng.uniform(-1, 1, 3)) for text in texts]


@pytest.mark.parametrize("head", HEADS)
def test_chunk_takes_one_compiled_call_without_a_cache(head, monkeypatch):
    for name in ("prefill", "decode_step"):
        monkeypatch.setattr(OpenVLA, name, lambda *args, **kwargs: pytest.fail("a cache is filled"))
    policy, calls = make(head), []
    policy = Policy(policy.model, policy.contract)  # nothing is compiled yet
    predict = policy._predict
    monkeypatch.setattr(policy, "_predict", lambda *args: calls.append(args) or predict(*args))
    seen = observations(3)
    chunk = policy.predict_chunk(seen[0])
    assert (chunk.shape, chunk.dtype, len(calls)) == ((4, 3), np.float64, 1)
    np.testing.assert_array_equal(policy.predict_chunk(seen[0]), chunk)
    policy.predict_chunks(seen)
    assert len(calls) == 3 and predict._cache_size() == len(policy.programs) == 2, "one program for each batch size"


@pytest.mark.parametrize("head", HEADS)
def test_chunks_of_a_batch_equal_the_single_calls(head):
    policy, seen = make(head), observations(3, seed=1)
    together = policy.predict_chunks(seen)
    assert together.shape == (3, 4, 3)
    alone = np.stack([policy.predict_chunk(observation) for observation in seen])
    np.testing.assert_allclose(together, alone, rtol=0, atol=BATCH_BOUND)
    padded = policy.act([policy.prepare(observation) for observation in seen], batch_size=4)
    np.testing.assert_allclose(padded, alone, rtol=0, atol=BATCH_BOUND)
    assert np.abs(np.diff(alone, axis=0)).max() > 100 * BATCH_BOUND, "the observations matter"


@pytest.mark.parametrize("change", ["primary", "wrist", "state", "instruction"])
def test_every_part_of_an_observation_changes_the_chunk(change):
    policy, (seen,) = make("l1"), observations(1, seed=2)
    parts = {"images": dict(seen.images), "instruction": seen.instruction, "state": seen.state}
    if change in CAMERAS:
        parts["images"][change] = 255 - seen.images[change]
    else:
        parts[change] = -seen.state if change == "state" else INSTRUCTIONS[1]
    assert np.abs(policy.predict_chunk(Observation(**parts)) - policy.predict_chunk(seen)).max() > 1e-4


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Returns the checkpoint of a head's policy."""

    @functools.cache
    def save(head, film=False):
        folder = tmp_path_factory.mktemp(head) / "checkpoint"
        policy = make(head, film=film) if film else make(head)
        save_model(policy.model, policy.contract, folder)
        return folder

    return save


@pytest.mark.long
@pytest.mark.parametrize(
    ("head", "kind"), [("l1", "int8"), ("l1", "int4"), ("diffusion", "int8"), ("parallel_tokens", "int4")]
)
def test_quantised_policy_acts_by_its_rounded_weights(saved, head, kind):
    """The oracle is a policy in full precision whose kernels are the rounded ones."""
    small = Policy.from_checkpoint(saved(head), quantize=kind, check_images=False)
    model, seen = load_model(saved(head))[0], observations(3, seed=3)
    assert count_bytes(small.model) < count_bytes(model)
    quantize_model(model, kind, choose_paths(model))
    for _, module in list(nnx.iter_modules(model)):
        if isinstance(getattr(module, "kernel", None), QTensor):
            axes = module.kernel.values.get_metadata()["axes"]
            module.kernel = nnx.Param(module.kernel.dequantize(jnp.float32), axes=axes)
    rounded = Policy(model, small.contract).predict_chunks(seen)
    chunks = small.predict_chunks(seen)
    np.testing.assert_allclose(chunks, rounded, rtol=0, atol=1e-4)
    alone = np.stack([small.predict_chunk(observation) for observation in seen])
    np.testing.assert_allclose(chunks, alone, rtol=0, atol=BATCH_BOUND)


@pytest.mark.long
@pytest.mark.parametrize(
    ("head", "film", "quantize"),
    [
        ("l1", False, None), ("l1", False, "int8"), ("l1", True, None), ("diffusion", False, None),
        ("parallel_tokens", False, "int4"),
    ],
)  # fmt: skip
def test_eight_devices_that_share_every_layer_act_as_one(saved, head, film, quantize):
    settings = {"quantize": quantize, "exclude": (), "check_images": False}
    load = functools.partial(Policy.from_checkpoint, saved(head, film), **settings)
    one, eight = load(), load(tensor=8)
    part = lambda x: jax.ShapeDtypeStruct(x.sharding.shard_shape(x.shape), x.dtype)
    held = lambda policy: count_bytes(jax.tree.map(part, jax.tree.leaves(policy.model.llama)))
    assert held(eight) < 0.16 * held(one), "only norms and scales are whole on each"
    seen = observations(2, seed=4)
    np.testing.assert_allclose(eight.predict_chunks(seen), one.predict_chunks(seen), rtol=0, atol=1e-4)
