"""OpenVLA-OFT's models against outputs of the real code: hidden states, chunks, tokens, denoising."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oft.cases import FOLDER, imported, names, settings

from openvla_jax import Observation, Policy
from openvla_jax.models.heads.chunks import chunk_text, see
from openvla_jax.models.regression import kept_signal, sampling_timesteps
from openvla_jax.models.sequence import take_positions

CASES = names()


def observations(policy, expected):
    cameras = policy.contract.observation.cameras
    key = next(iter(policy.contract.statistics))
    for i, (images, instruction) in enumerate(zip(expected["images"], expected["instructions"], strict=True)):
        state = expected["state"][i] if policy.contract.observation.state else None
        yield i, Observation(dict(zip(cameras, images, strict=True)), str(instruction), state, key)


@pytest.mark.parametrize("name", CASES)
def test_policy_gives_the_chunks_of_the_reference(name):
    expected, policy = np.load(FOLDER / name / "expected.npz"), Policy.from_checkpoint(imported(name), "float32")
    for i, observation in observations(policy, expected):
        request = policy.prepare(observation)
        ids = expected[f"{i}/input_ids"]
        assert request.prompt[: len(ids)] == ids.tolist() and request.prompt[len(ids) :] == [29871]
        if f"{i}/proprio_normalized" in expected:
            np.testing.assert_allclose(request.state, expected[f"{i}/proprio_normalized"], atol=1e-6)
        if f"{i}/noise" in expected:
            continue
        chunk = policy.head.decode(policy.predict_normalized([request]), request.action_dim)[0]
        np.testing.assert_allclose(chunk, expected[f"{i}/normalized"], atol=5e-5)
        np.testing.assert_allclose(policy.predict_chunk(observation), expected[f"{i}/actions"], atol=5e-5)
        np.testing.assert_array_equal(policy.act([request])[0], policy.predict_chunk(observation))


@pytest.mark.parametrize("name", CASES)
def test_model_gives_the_hidden_states_of_the_reference(name):
    expected, policy = np.load(FOLDER / name / "expected.npz"), Policy.from_checkpoint(imported(name), "float32")
    for i, observation in observations(policy, expected):
        if f"{i}/noise" in expected:
            continue
        request = policy.prepare(observation)
        inputs = inputs_of(request)
        model, numbers = policy.model, policy.contract.action.horizon * request.action_dim

        @jax.jit
        def run(images, state, model=model, inputs=inputs, numbers=numbers):
            text, slots = chunk_text(model, inputs, numbers)
            patches = see(model, images, text, slots, PLAIN)
            hidden = model.chunk_hidden(patches, text, slots, PLAIN, state)
            return patches, take_positions(hidden, model.layout.predictor(slots.positions)), hidden.shape[1]

        patches, hidden, length = run(inputs.images, inputs.state)
        np.testing.assert_allclose(patches[0, ::37], expected[f"{i}/projector_sub"], atol=2e-4)
        np.testing.assert_allclose(hidden[0], expected[f"{i}/hidden"], atol=2e-4)
        prefix, prompt, slots, whole = expected[f"{i}/seq"]
        layout = model.layout
        assert (layout.prefix, len(request.prompt), numbers) == (prefix, prompt, slots) and length == whole
