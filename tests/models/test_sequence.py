"""The sequence layout, several cameras and the state, against sequences that are put together by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openvla_jax.config import tiny
from openvla_jax.models.openvla import OpenVLA
from openvla_jax.models.sequence import SequenceLayout, take_positions
from openvla_jax.parallel.execution import PLAIN

ONE = tiny(image_size=28, base_vocab_size=700)
CONFIG = dataclasses.replace(ONE, towers=ONE.towers[1:], cameras=3, state_dim=4)
IDS = jnp.asarray([[1, 40, 41, 42, 43, 700], [1, 50, 51, 52, 700, 700]])


@pytest.fixture(scope="module")
def model():
    return OpenVLA(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def pixels(model):
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 28, 28, 3), dtype=np.uint8)
    return model.normalize(images)


STATE = jnp.asarray(np.random.default_rng(1).uniform(-1, 1, (2, 4)), jnp.float32)


def test_layout_counts_bos_patches_state_and_text():
    layout = SequenceLayout(patches=4, cameras=2, state=True)
    marks = layout.join(jnp.arange(3.0).reshape(1, 3, 1), 10 + jnp.arange(8.0).reshape(1, 8, 1), jnp.full((1, 1), 99.0))
    assert marks[0, :, 0].tolist() == [0, *range(10, 18), 99, 1, 2]
    assert (layout.prefix, layout.length(3)) == (9, 12)
    for index in (1, 2):
        position = layout.position(jnp.asarray(index))
        assert marks[0, position, 0] == index
        assert layout.predictor(jnp.asarray(index)) == position - 1
    assert layout.of_text(marks)[0, :, 0].tolist() == [99, 1, 2], "the first row predicts text token 1"


def test_layout_hides_patches_of_missing_cameras():
    layout = SequenceLayout(patches=2, cameras=2, state=True)
    text = jnp.asarray([[True, True, False]])
    assert layout.visible(text).tolist() == [[True] * 6 + [True, False]]
    assert layout.visible(text, jnp.asarray([[True, False]])).tolist() == [
        [True, True, True, False, False, True, True, False]
    ]


def test_layout_refuses_other_parts():
    layout = SequenceLayout(patches=2, cameras=2)
    text, patches, token = jnp.zeros((1, 2, 1)), jnp.zeros((1, 4, 1)), jnp.zeros((1, 1))
    with pytest.raises(ValueError, match="3 patches: the layout has 2 cameras of 2"):
        layout.join(text, patches[:, 1:])
    with pytest.raises(ValueError, match="a state token: the layout differs"):
        layout.join(text, patches, token)
    with pytest.raises(ValueError, match="no timestep token: the layout differs"):
        dataclasses.replace(layout, timestep=True).join(text, patches)


def test_take_positions_is_a_gather_in_any_dtype():
    x = jnp.asarray(np.random.default_rng(2).standard_normal((2, 5, 3)), jnp.bfloat16)
    positions = np.array([[0, 4, 4], [2, 1, 0]])
    expected = np.take_along_axis(np.asarray(x), positions[..., None], axis=1)
    np.testing.assert_array_equal(take_positions(x, jnp.asarray(positions)), expected)


def test_cameras_and_state_stand_in_their_order(model, pixels):
    """The sequence by hand: each camera alone through the towers, then the state's token, then the text."""
    alone = OpenVLA(dataclasses.replace(CONFIG, cameras=1, state_dim=0), jax.random.key(0))
    patches = [alone.project(pixels[:, camera]) for camera in range(3)]
    text = alone.llama.embed(IDS, jnp.float32, execution=PLAIN)
    hidden = jax.nn.gelu(STATE @ model.state_projector.fc1.kernel[...] + model.state_projector.fc1.bias[...], False)
    token = hidden @ model.state_projector.fc2.kernel[...] + model.state_projector.fc2.bias[...]
    expected = jnp.concatenate([text[:, :1], *patches, token[:, None], text[:, 1:]], axis=1)
    np.testing.assert_allclose(model.embed(pixels, IDS, state=STATE), expected, atol=2e-6)


def test_one_camera_needs_no_camera_axis(model, pixels):
    alone = OpenVLA(dataclasses.replace(CONFIG, cameras=1, state_dim=0), jax.random.key(0))
    np.testing.assert_array_equal(alone(pixels[:, 0], IDS), alone(pixels[:, :1], IDS))


def test_a_hidden_camera_does_not_matter(model, pixels):
    """What a row does not have is not attended to: its pixels change nothing, those of a shown camera do."""
    mask = np.array([[True, True, False], [True, True, True]])
    run = jax.jit(lambda pixels: model.hidden(pixels, IDS, state=STATE, image_mask=mask))
    layout = model.layout
    before = layout.of_text(run(pixels))
    after = layout.of_text(run(pixels.at[:, 2].set(0.5)))
    np.testing.assert_array_equal(before[0], after[0])
    assert np.abs(before[1] - after[1]).max() > 1e-4
    shown = layout.of_text(jax.jit(lambda pixels: model.hidden(pixels, IDS, state=STATE))(pixels))
    np.testing.assert_allclose(before[1], shown[1], atol=2e-6)


def test_prefill_and_decode_equal_the_whole_pass(model, pixels):
    lengths = jnp.asarray([4, 3])
    whole = model.layout.of_text(model(pixels, IDS, state=STATE))
    logits, cache = model.prefill(pixels, IDS, lengths, 1, state=STATE)
    np.testing.assert_allclose(logits, whole[jnp.arange(2), lengths - 1], atol=1e-4)
    following = IDS[jnp.arange(2), lengths]
    logits, _ = model.decode_step(following, lengths, cache)
    np.testing.assert_allclose(logits[0], whole[0, 4], atol=1e-4)


@pytest.mark.parametrize(
    ("change", "state", "message"),
    [
        (lambda x: x[:, :2], STATE, r"takes \[B, 3, 28, 28, 3\]"),
        (lambda x: x[:, 0], STATE, r"takes \[B, 3, 28, 28, 3\]"),
        (lambda x: x[..., :14, :, :], STATE, r"takes \[B, 3, 28, 28, 3\]"),
        (lambda x: x, None, "state is missing: 'tiny' takes a state of 4 columns"),
    ],
)
def test_model_refuses_other_inputs(model, pixels, change, state, message):
    with pytest.raises(ValueError, match=message):
        model(change(pixels), IDS, state=state)


def test_model_without_state_refuses_one(pixels):
    alone = OpenVLA(dataclasses.replace(CONFIG, cameras=1, state_dim=0), jax.random.key(0))
    with pytest.raises(ValueError, match="state is given: 'tiny' takes no state"):
        alone(pixels[:, 0], IDS, state=STATE)
