"""Real PyTorch outputs: an imported golden gives the reference's logits, action tokens and actions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import golden
from flax import nnx

from openvla_jax.checkpoint.reading import load_contract, load_params
from openvla_jax.convert import import_weights
from openvla_jax.models.openvla import abstract_model
from openvla_jax.tokens.actions import ActionTokenizer, unnormalize_actions

BOUND = 2e-4


@pytest.fixture(scope="module", params=["openvla_tiny", "openvla_tiny_native"])
def imported(request, tmp_path_factory):
    """(graphdef, state, contract) of an imported golden, its parameters spread over a mesh of eight devices by
    Orbax.
    """
    dst = tmp_path_factory.mktemp("imported") / request.param
    import_weights(golden(request.param), dst)
    contract = load_contract(dst)
    graph, abstract = nnx.split(abstract_model(contract.model))
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))

    def target(leaf):
        axes = ["fsdp" if size % 8 == 0 else None for size in leaf.shape[-1:]]
        spec = jax.sharding.PartitionSpec(*[None] * (len(leaf.shape) - 1), *axes)
        return jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=jax.sharding.NamedSharding(mesh, spec))

    state = load_params(dst, jax.tree.map(target, abstract))
    assert len(state["llama"]["head"]["kernel"][...].sharding.device_set) == 8
    # Computed on one device: this test is about weights, not about sharded products.
    return graph, jax.device_put(jax.device_get(state), jax.devices()[0]), contract


@pytest.fixture(scope="module")
def expected():
    with np.load(golden("openvla_tiny") / "expected.npz", allow_pickle=False) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def pixels():
    return np.load(golden("openvla_tiny") / "pixel_values.npy").transpose(0, 2, 3, 1)


def test_projected_patches_and_logits_are_the_reference_s(imported, expected, pixels):
    graph, state, _ = imported

    @jax.jit
    def run(state, pixels, ids):
        model = nnx.merge(graph, state)
        return model.project(pixels), model(pixels, ids)

    patches, logits = map(np.asarray, run(state, pixels, expected["input_ids"].astype(np.int32)))
    assert np.abs(patches[:, ::37] - expected["projector"]).max() <= BOUND
    assert np.abs(logits[:, 256:, ::29] - expected["logits_text"]).max() <= BOUND
    np.testing.assert_array_equal(logits.argmax(-1), expected["argmax"])


def test_greedy_action_tokens_and_actions_are_the_reference_s(imported, expected, pixels):
    graph, state, contract = imported
    rows, steps = np.array([0, 2]), 7
    # The reference appends the lone space to the whole row.
    ids = np.concatenate([expected["input_ids"][rows], np.full((2, 1), 29871)], axis=1).astype(np.int32)

    @jax.jit
    def decode(state, pixels, ids):
        model = nnx.merge(graph, state)
        lengths = jnp.full(2, ids.shape[1])
        logits, cache = model.prefill(pixels, ids, lengths, steps)
        tokens = [logits.argmax(-1)]
        for step in range(steps - 1):
            logits, cache = model.decode_step(tokens[-1], lengths + step, cache)
            tokens.append(logits.argmax(-1))
        return jnp.stack(tokens, axis=1)

    tokens = np.asarray(decode(state, pixels[rows], ids))
    np.testing.assert_array_equal(tokens, expected["action_tokens"])
    normalized = ActionTokenizer(contract.model.base_vocab_size).decode(tokens)
    keys = ("bridge_orig", "fractal20220817_data")
    actions = [unnormalize_actions(row, contract.statistics[key]["action"]) for row in normalized for key in keys]
    np.testing.assert_allclose(actions, expected["actions"], rtol=0, atol=1e-12)


def test_the_contract_carries_statistics_and_what_was_assumed(imported):
    _, _, contract = imported
    assert sorted(contract.statistics) == ["bridge_orig", "fractal20220817_data"]
    assert contract.preprocessing.resize_kernel == "bicubic"
    assert contract.training["source"]["kind"] in ("hf", "native")
    assert [(tower.name, tower.heads, tower.mean[0]) for tower in contract.model.towers] == [
        ("dino", 4, 0.485),
        ("siglip", 4, 0.5),
    ]
    assert contract.model.llama.norm_eps == 1e-6


def test_import_carries_the_tokenizer_that_it_is_given(tmp_path, shared):
    import_weights(golden("openvla_tiny"), tmp_path / "start", tokenizer=shared / "data" / "llama2_tokenizer")
    contract = load_contract(tmp_path / "start")
    assert contract.tokenizer.pad_token_id == contract.model.pad_token == 32000
