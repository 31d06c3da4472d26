"""OpenVLA-OFT's models against outputs of the real code: hidden states, chunks, tokens, denoising."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oft.cases import FOLDER, imported, names

from openvla_jax import Observation, Policy
from openvla_jax.models.heads import Inputs
from openvla_jax.models.heads.chunks import chunk_text, see
from openvla_jax.models.regression import denoise, kept_signal, sampling_timesteps
from openvla_jax.models.sequence import take_positions
from openvla_jax.parallel.execution import PLAIN

# The case with the most parts that is quick; the others are long.
QUICK = names(use_l1_regression=True, use_proprio=True, use_film=False, float32=True)[:1]
CASES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in names()]


def observations(policy, expected):
    cameras = policy.contract.observation.cameras
    key = next(iter(policy.contract.statistics))
    for i, (images, instruction) in enumerate(zip(expected["images"], expected["instructions"], strict=True)):
        state = expected["state"][i] if policy.contract.observation.state else None
        yield i, Observation(dict(zip(cameras, images, strict=True)), str(instruction), state, key)


def inputs_of(request):
    state = None if request.state is None else request.state[None]
    return Inputs(request.images[None], np.asarray([request.prompt]), np.asarray([len(request.prompt)]), state)


@pytest.mark.parametrize("name", CASES)
def test_policy_gives_the_chunks_and_hidden_states_of_the_reference(name):
    expected, policy = np.load(FOLDER / name / "expected.npz"), Policy.from_checkpoint(imported(name), "float32")
    model, layout = policy.model, policy.model.layout

    @jax.jit
    def run(inputs):
        text, slots = chunk_text(model, inputs, numbers)
        patches = see(model, inputs.images, text, slots, PLAIN)
        hidden = model.chunk_hidden(patches, text, slots, PLAIN, inputs.state)
        return patches, take_positions(hidden, layout.predictor(slots.positions))

    for i, observation in observations(policy, expected):
        request = policy.prepare(observation)
        numbers = policy.contract.action.horizon * request.action_dim
        ids = expected[f"{i}/input_ids"].tolist()
        assert request.prompt == [*ids, 29871]
        assert expected[f"{i}/seq"].tolist() == [
            layout.prefix, len(request.prompt), numbers, layout.length(len(request.prompt) + numbers + 1)
        ]  # fmt: skip
        if f"{i}/proprio_normalized" in expected:
            np.testing.assert_allclose(request.state, expected[f"{i}/proprio_normalized"], atol=1e-6)
        if f"{i}/noise" in expected:
            continue
        patches, hidden = run(inputs_of(request))
        np.testing.assert_allclose(patches[0, ::37], expected[f"{i}/projector_sub"], atol=2e-4)
        np.testing.assert_allclose(hidden[0], expected[f"{i}/hidden"], atol=2e-4)
        predicted = policy.predict_normalized([request])
        if f"{i}/token_ids" in expected:
            np.testing.assert_array_equal(predicted[0], expected[f"{i}/token_ids"])
        chunk = policy.head.decode(predicted, request.action_dim)[0]
        np.testing.assert_allclose(chunk, expected[f"{i}/normalized"], atol=5e-5)
        np.testing.assert_allclose(policy.predict_chunk(observation), expected[f"{i}/actions"], atol=5e-5)


def test_diffusion_tables_are_those_of_diffusers():
    for name in names(use_diffusion=True):
        expected = np.load(FOLDER / name / "expected.npz")
        np.testing.assert_allclose(kept_signal(), expected["alphas_cumprod"], rtol=1e-6, atol=1e-10)  # float32 there
        np.testing.assert_array_equal(sampling_timesteps(50), expected["timesteps"])


@pytest.mark.long
@pytest.mark.parametrize("name", names(use_diffusion=True))
@pytest.mark.parametrize("file", ["expected", "expected_10_steps"])
def test_diffusion_head_takes_each_step_of_the_reference(name, file):
    """Each step from the reference's own noisy chunk: with random weights the 50 steps are chaotic, a difference of
    3e-6 in the first is one of 0.003 after seven.
    """
    if not (FOLDER / name / f"{file}.npz").exists():
        pytest.skip(f"needs reference files: {FOLDER / name / file}.npz")
    expected, policy = np.load(FOLDER / name / f"{file}.npz"), Policy.from_checkpoint(imported(name), "float32")
    model, head = policy.model, policy.head
    steps = len(expected["0/x"])

    @jax.jit
    def run(inputs, noisy, timesteps):
        text, slots = chunk_text(model, inputs, noisy[0].size)
        patches = see(model, inputs.images, text, slots, PLAIN)

        def step(_, scanned):
            x, timestep = scanned
            known = slots._replace(noisy=x.reshape(1, -1), timestep=timestep[None])
            hidden = model.chunk_hidden(patches, text, known, PLAIN, inputs.state)
            noise = head.read(model, hidden, slots.positions, PLAIN)
            return None, (noise[0], denoise(x[None], noise, timestep, steps)[0])

        return jax.lax.scan(step, None, (noisy, timesteps))[1]

    for i, observation in observations(policy, expected):
        timesteps = sampling_timesteps(steps)
        np.testing.assert_array_equal(timesteps, expected[f"{i}/t"])
        before = np.concatenate([expected[f"{i}/noise"][None], expected[f"{i}/x"][:-1]])
        noise, after = run(inputs_of(policy.prepare(observation)), jnp.asarray(before), jnp.asarray(timesteps))
        np.testing.assert_allclose(noise, expected[f"{i}/eps"], atol=5e-5)
        np.testing.assert_allclose(after, expected[f"{i}/x"], atol=1e-4)
        chunk = jnp.asarray(expected[f"{i}/noise"])
        for timestep, predicted in zip(timesteps, expected[f"{i}/eps"], strict=True):
            chunk = denoise(chunk[None], jnp.asarray(predicted)[None], jnp.asarray(timestep), steps)[0]
        np.testing.assert_allclose(chunk, expected[f"{i}/normalized"], atol=1e-4)
