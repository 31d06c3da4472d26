"""Decoding and the policy: cached = full, batch = single, and bad requests refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import OPTIMISED, golden
from small_policy import INSTRUCTIONS, ROW, small_policy

from openvla_jax.inference.decode import decode_actions
from openvla_jax.inference.load import save_model
from openvla_jax.inference.policy import Policy, reference_tokens
from openvla_jax.models.quantize import count_bytes
from openvla_jax.tokens import prompt_ids, unnormalize_actions
from openvla_jax.training.checkpoint import CheckpointError


@pytest.fixture(scope="module")
def policy():
    return small_policy()


def images(count, seed=0, size=56):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


whole_pass = jax.jit(lambda model, images, ids: model(model.normalize(images), ids))


@pytest.mark.gpu
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

    base, patches = model.config.base_vocab_size, model.config.patches
    ids = np.full((1, lengths.max() + 5), model.config.pad_token, np.int32)
    for row, prompt in enumerate(prompts):
        ids[0] = model.config.pad_token
        ids[0, : len(prompt)] = prompt
        for position, at in enumerate(range(len(prompt), len(prompt) + 5)):
            logits = np.asarray(whole_pass(model, pixels[row : row + 1], ids)[0, patches + at - 1])
            assert bool(got.outside[row, position]) == (not base - 256 <= logits.argmax() < base)
            token = base - 256 + logits[base - 256 : base].argmax() if constrained else logits.argmax()
            assert got.tokens[row, position] == token
            ids[0, at] = token


@pytest.mark.gpu
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


@pytest.mark.gpu
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


def test_sampling_is_by_row_and_seed_and_cold_rows_stay_greedy(policy):
    pixels, text = images(1)[0], INSTRUCTIONS[0]
    rows = [policy.prepare(pixels, text, "arm", temperature, seed) for temperature, seed in ((2, 1), (2, 2), (0, 3))]
    together = policy.decode(rows)
    for row, tokens in zip(rows, together, strict=True):
        np.testing.assert_array_equal(policy.decode([row])[0], tokens)
    np.testing.assert_array_equal(together[2], policy.decode([policy.prepare(pixels, text, "arm")])[0])
    assert (together[0] != together[1]).any() and (together[0] != together[2]).any()
    # Drawn in proportion to exp(logits / temperature), among action tokens: first tokens of many seeds.
    logits = np.asarray(policy._run(rows[2:]).logits)[0, policy.action_tokenizer.first_token :][:256]
    chances = np.exp((logits - logits.max()) / 2)
    chances /= chances.sum()
    many = [policy.prepare(pixels, text, "arm", 2.0, seed) for seed in range(512)]
    drawn = np.concatenate([policy.decode(many[i : i + 128])[:, 0] for i in range(0, 512, 128)])
    got = np.bincount(drawn - policy.action_tokenizer.first_token, minlength=256) / 512
    assert 0.5 * np.abs(got - chances).sum() < 0.5 * np.abs(np.roll(chances, 7) - chances).sum()
    top = np.argsort(-chances)[:64]  # Hoeffding: off by more than 0.1 once in 50,000 times
    assert abs(got[top].sum() - chances[top].sum()) < 0.1


def test_early_ends_shift_as_in_the_reference():
    prompt = [1, 11, 12, 13, 14]
    tokens = np.array([31900, 31901, 2, 31902, 31903, 31904, 31905])
    # generate() stops behind the end token: prompt + 3 ids, of which the last 7 are taken.
    assert reference_tokens(prompt, tokens, 2).tolist() == [11, 12, 13, 14, 31900, 31901, 2]
    assert reference_tokens(prompt, np.array([5, 6, 2]), 2).tolist() == [5, 6, 2]
    assert reference_tokens(prompt, np.array([5, 6, 7]), 2).tolist() == [5, 6, 7]


def test_a_model_that_ignores_its_images_is_refused(policy):
    policy.check_images()
    blind = small_policy()
    fc = blind.model.projector.fc3
    fc.kernel[...] = fc.kernel[...] * 0
    blind = Policy(blind.model, blind.contract)
    with pytest.raises(CheckpointError, match="ignore the image"):
        blind.check_images()
    fc.kernel[...] = fc.kernel[...] + np.nan
    with pytest.raises(CheckpointError, match="not finite"):
        Policy(blind.model, blind.contract).check_images()


def test_a_loaded_policy_acts_alike_with_its_layers_apart(policy, tmp_path):
    save_model(policy.model, policy.contract, tmp_path / "checkpoint")
    loaded = Policy.from_checkpoint(tmp_path / "checkpoint", preprocessing={"center_crop": True})
    assert len(loaded.model.llama.blocks) == 2, "on a CPU every layer has arrays of its own"
    assert loaded.contract.preprocessing["center_crop"] and not policy.contract.preprocessing["center_crop"]
    rows = [policy.prepare(pixels, text, "arm") for pixels, text in zip(images(2, seed=5), INSTRUCTIONS, strict=False)]
    np.testing.assert_array_equal(loaded.decode(rows), policy.decode(rows))
    with pytest.raises(ValueError, match="did you mean 'lanczos3'"):
        Policy.from_checkpoint(tmp_path / "checkpoint", preprocessing={"resize_kernel": "lanczos"})


@pytest.mark.parametrize("quantize", [None, "int4", pytest.param("int8", marks=pytest.mark.long)])
def test_several_devices_that_share_every_layer_act_as_one(policy, tmp_path, quantize):
    save_model(policy.model, policy.contract, tmp_path / "checkpoint")
    load = functools.partial(Policy.from_checkpoint, tmp_path / "checkpoint", quantize=quantize, exclude=())
    one, four = load(), load(tensor=4)  # on a CPU the one has its layers apart, the four run what accelerators run
    part = lambda x: jax.ShapeDtypeStruct(x.sharding.shard_shape(x.shape), x.dtype)
    held = lambda policy: count_bytes(jax.tree.map(part, jax.tree.leaves(policy.model.llama)))
    assert held(four) < 0.28 * held(one), "only norms and scales of groups are whole on each"
    rows = [one.prepare(pixels, text, "arm") for pixels, text in zip(images(3, seed=6), INSTRUCTIONS, strict=True)]
    np.testing.assert_allclose(four._run(rows).logits, one._run(rows).logits, atol=1e-4)
    np.testing.assert_array_equal(four.decode(rows), one.decode(rows))
    wrong = {3: "3 chips do not divide the 4 heads", 99: "from 1 to the 8 devices", 0: "from 1"}
    for number, message in wrong.items():
        with pytest.raises(ValueError, match=message):
            load(tensor=number)


@pytest.mark.long
def test_200_mixed_batches_of_the_golden_equal_single_calls(tmp_path, shared, monkeypatch):
    from openvla_jax.convert import import_weights

    monkeypatch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=OPTIMISED))

    import_weights(golden("openvla_tiny"), tmp_path / "c", tokenizer=shared / "data" / "llama2_tokenizer")
    policy = Policy.from_checkpoint(tmp_path / "c")
    rng = np.random.default_rng(0)
    words = ["pick", "up", "the", "red", "block", "and", "put", "it", "into", "drawer", "slowly", "to", "left"]
    keys = list(policy.contract.statistics)

    def request():
        height, width = rng.integers(40, 300, 2)
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        return policy.prepare(pixels, " ".join(rng.choice(words, rng.integers(1, 24))), keys[rng.integers(len(keys))])

    pool = [request() for _ in range(40)]
    assert len({-(-len(r.prompt) // 32) for r in pool}) == 2, "both text lengths occur"
    single = [policy.decode([r])[0] for r in pool]
    for _ in range(200):
        chosen = rng.choice(len(pool), rng.integers(1, 5), replace=False)
        tokens = policy.decode([pool[i] for i in chosen], batch_size=4)
        np.testing.assert_array_equal(tokens, np.stack([single[i] for i in chosen]))
    assert len({tuple(tokens) for tokens in single}) > 10
