"""Decoding and the policy: cached = full, batch = single, and bad requests refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openvla_jax.config import model_config
from openvla_jax.inference.decode import decode_actions
from openvla_jax.inference.policy import Policy
from openvla_jax.models.openvla import OpenVLA
from openvla_jax.tokens import load_tokenizer, prompt_ids, unnormalize_actions
from openvla_jax.training.checkpoint import Contract

ROW = {"q01": [-0.1, -2.0, 0.0], "q99": [0.3, 2.0, 1.0], "mask": [True, True, False]}
WIDE = {name: [*values, *values] for name, values in ROW.items()}
STATISTICS = {"arm": {"action": ROW}, "two_arms": {"action": WIDE}}
INSTRUCTIONS = ["pick up the red cube", "Pick up the blue ball", "push the green block to the left of the red block"]


@pytest.fixture(scope="module")
def policy():
    tokenizer = load_tokenizer("tiny")
    config = model_config({"preset": "tiny", "base_vocab_size": tokenizer.vocab_size})
    model = OpenVLA(config, jax.random.key(1))
    # At initialisation all logits are alike; spread out, different inputs choose different tokens.
    for linear in (model.llama.head, model.llama.blocks.attention.v, model.llama.blocks.attention.o):
        linear.kernel[...] = linear.kernel[...] * 4
    return Policy(model, Contract(config, tokenizer, STATISTICS))


def images(count, seed=0, size=56):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


@pytest.mark.parametrize("constrained", [True, False])
def test_cached_decoding_equals_whole_forward_passes(policy, constrained):
    model, tokenizer = policy.model, policy.contract.tokenizer
    prompts = [prompt_ids(tokenizer, text) for text in INSTRUCTIONS]
    lengths = np.array([len(prompt) for prompt in prompts])
    padded = np.full((3, lengths.max() + 3), model.config.pad_token, np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    pixels = images(3)
    got = decode_actions(model, jnp.asarray(pixels), jnp.asarray(padded), jnp.asarray(lengths), 5, constrained)

    base = model.config.base_vocab_size
    for row, prompt in enumerate(prompts):
        ids = list(prompt)
        for position in range(5):
            logits = np.asarray(model(model.normalize(pixels[row : row + 1]), np.asarray([ids], np.int32))[0, -1])
            assert bool(got.outside[row, position]) == (not base - 256 <= logits.argmax() < base)
            token = base - 256 + logits[base - 256 : base].argmax() if constrained else logits.argmax()
            assert got.tokens[row, position] == token
            ids.append(int(token))


def test_a_batch_equals_its_rows_one_by_one(policy):
    pixels = images(4, seed=1)
    instructions = [INSTRUCTIONS[i % 3] for i in range(4)]
    together = policy.predict_actions(pixels, instructions, ["arm"] * 4)
    assert together.shape == (4, 3)
    assert together.dtype == np.float64
    alone = [policy.predict_action(p, text, "arm") for p, text in zip(pixels, instructions, strict=True)]
    np.testing.assert_array_equal(together, np.stack(alone))
    assert len({tuple(row) for row in together}) > 1  # the inputs matter


def test_datasets_of_different_action_size_share_a_batch(policy):
    pixels = images(2, seed=2)
    short, long = policy.predict_actions(pixels, INSTRUCTIONS[:2], ["arm", "two_arms"])
    assert short.shape == (3,)
    assert long.shape == (6,)
    np.testing.assert_array_equal(short, policy.predict_action(pixels[0], INSTRUCTIONS[0], "arm"))


def test_actions_are_in_the_units_of_the_dataset(policy):
    tokens = policy.decode([policy.prepare(images(1)[0], INSTRUCTIONS[0], "arm")])
    edges = np.linspace(-1, 1, 256)
    centers = (edges[1:] + edges[:-1]) / 2
    normalised = centers[np.clip(policy.model.config.base_vocab_size - tokens[0] - 1, 0, 254)]
    expected = [-0.1 + 0.2 * (normalised[0] + 1), 2.0 * normalised[1], normalised[2]]
    np.testing.assert_allclose(policy.predict_action(images(1)[0], INSTRUCTIONS[0], "arm"), expected, atol=1e-12)
    np.testing.assert_allclose(unnormalize_actions(normalised, ROW), expected, atol=1e-12)


def test_the_image_and_the_instruction_change_the_logits(policy):
    model, tokenizer = policy.model, policy.contract.tokenizer
    black, white = np.zeros((1, 56, 56, 3), np.uint8), np.full((1, 56, 56, 3), 255, np.uint8)

    def last(image, instruction):
        ids = np.asarray([prompt_ids(tokenizer, instruction)], np.int32)
        return np.asarray(model(model.normalize(image), ids)[0, -1])

    plain = last(black, "pick up the red cube")
    assert np.abs(plain - last(white, "pick up the red cube")).max() > 1e-3
    assert np.abs(plain - last(black, "pick up the blue ball")).max() > 1e-3


def test_tokens_outside_the_actions_are_counted(policy):
    before = policy.decoded_tokens
    policy.predict_action(images(1)[0], INSTRUCTIONS[0], "arm")
    assert policy.decoded_tokens == before + 3
    assert 0 <= policy.outside_tokens <= policy.decoded_tokens


@pytest.mark.parametrize(
    ("image", "instruction", "key", "message"),
    [
        (np.zeros((56, 56, 3), np.float32), "push", "arm", "dtype float32 .* give uint8 RGB"),
        (np.zeros((56, 56), np.uint8), "push", "arm", r"shape \(56, 56\)"),
        (np.zeros((56, 56, 4), np.uint8), "push", "arm", r"shape \(56, 56, 4\)"),
        (np.zeros((0, 56, 3), np.uint8), "push", "arm", r"shape \(0, 56, 3\)"),
        (np.zeros((56, 56, 3), np.uint8), "  ", "arm", "instruction"),
        (np.zeros((56, 56, 3), np.uint8), "push " * 600, "arm", "shorten it"),
        (np.zeros((56, 56, 3), np.uint8), "push", "arms", "arm"),
        (np.zeros((56, 56, 3), np.uint8), "push", None, "two_arms"),
    ],
)
def test_bad_requests_are_refused_in_one_line(policy, image, instruction, key, message):
    with pytest.raises(ValueError, match=message) as caught:
        policy.predict_action(image, instruction, key)
    assert "\n" not in str(caught.value)


def test_rows_must_agree_in_number(policy):
    with pytest.raises(ValueError, match="2 images, 1 instructions"):
        policy.predict_actions(images(2), INSTRUCTIONS[:1], ["arm"] * 2)
