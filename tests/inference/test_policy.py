"""Decoding and the policy: cached = full, batch = single, and bad requests refused."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import OPTIMISED, golden
from flax import nnx
from small_policy import INSTRUCTIONS, ROW, small_policy

from openvla_jax import Observation, evaluate, serve
from openvla_jax.checkpoint.contract import CheckpointError
from openvla_jax.checkpoint.load import save_model
from openvla_jax.inference.policy import Policy, reference_tokens
from openvla_jax.models.heads import Inputs
from openvla_jax.models.quantize import count_bytes
from openvla_jax.tokens.actions import unnormalize_actions
from openvla_jax.tokens.prompts import encode_example, prompt_ids
from openvla_jax.training.step import loss_and_sums
from openvla_jax.types import ActionSpec, Batch, ObservationSpec, Preprocessing


@pytest.fixture(scope="module")
def policy():
    return small_policy()


def images(count, seed=0, size=56):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def prepared(policy, image, instruction, key, *sampling):
    return policy.prepare(policy.observe(image, instruction, key), *sampling)


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
    inputs = Inputs(jnp.asarray(pixels), jnp.asarray(padded), jnp.asarray(lengths))
    got = policy.head.predict(model, inputs, 5, constrained)

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
    tokens = policy.predict_normalized([prepared(policy, images(1)[0], INSTRUCTIONS[0], "arm")])
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
    rows = [prepared(policy, pixels, text, "arm", temperature, seed) for temperature, seed in ((2, 1), (2, 2), (0, 3))]
    together = policy.predict_normalized(rows)
    for row, tokens in zip(rows, together, strict=True):
        np.testing.assert_array_equal(policy.predict_normalized([row])[0], tokens)
    np.testing.assert_array_equal(together[2], policy.predict_normalized([prepared(policy, pixels, text, "arm")])[0])
    assert (together[0] != together[1]).any() and (together[0] != together[2]).any()
    # Drawn in proportion to exp(logits / temperature), among action tokens: first tokens of many seeds.
    logits = np.asarray(policy.run_model(rows[2:]).logits)[0, policy.head.tokenizer.first_token :][:256]
    chances = np.exp((logits - logits.max()) / 2)
    chances /= chances.sum()
    many = [prepared(policy, pixels, text, "arm", 2.0, seed) for seed in range(512)]
    drawn = np.concatenate([policy.predict_normalized(many[i : i + 128])[:, 0] for i in range(0, 512, 128)])
    got = np.bincount(drawn - policy.head.tokenizer.first_token, minlength=256) / 512
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
    loaded = Policy.from_checkpoint(tmp_path / "checkpoint", preprocessing={"crop_area": 0.9})
    assert len(loaded.model.llama.blocks) == 2, "on a CPU every layer has arrays of its own"
    assert (loaded.contract.preprocessing.crop_area, policy.contract.preprocessing.crop_area) == (0.9, None)
    rows = [
        prepared(policy, pixels, text, "arm") for pixels, text in zip(images(2, seed=5), INSTRUCTIONS, strict=False)
    ]
    np.testing.assert_array_equal(loaded.predict_normalized(rows), policy.predict_normalized(rows))
    with pytest.raises(ValueError, match="did you mean 'lanczos3'"):
        Policy.from_checkpoint(tmp_path / "checkpoint", preprocessing={"resize_kernel": "lanczos"})


def test_a_checkpoint_of_format_1_acts_as_it_did(policy, tmp_path):
    save_model(policy.model, policy.contract, tmp_path / "checkpoint")
    config = json.loads((tmp_path / "checkpoint" / "contract" / "config.json").read_text())
    old = {
        "format": 1,
        "model": config["model"] | {"action_bins": 256},
        "preprocessing": {
            "resize_kernel": "lanczos3", "center_crop": True, "jpeg": False, "text_length": 64,
            "action_normalization": "bounds_q99",
        },
        "training": {},
        "default_key": "arm",
    }  # fmt: skip
    (tmp_path / "checkpoint" / "contract" / "config.json").write_text(json.dumps(old))
    loaded = Policy.from_checkpoint(tmp_path / "checkpoint")
    cropped = dataclasses.replace(policy.contract, preprocessing=Preprocessing(crop_area=0.9), default_key="arm")
    now = Policy(loaded.model, cropped)
    for pixels, text in zip(images(3, seed=8, size=80), INSTRUCTIONS, strict=True):
        np.testing.assert_array_equal(loaded.predict_action(pixels, text), now.predict_action(pixels, text))


# -- Chunks, cameras and state ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chunked(policy):
    action = ActionSpec(dim=6, horizon=2, executed=1)
    return Policy(policy.model, dataclasses.replace(policy.contract, action=action))


def test_a_chunk_begins_with_the_action_of_a_policy_without_chunks(policy, chunked):
    observations = [
        Observation({"primary": pixels}, text, unnorm_key="arm")
        for pixels, text in zip(images(3, seed=3), INSTRUCTIONS, strict=True)
    ]
    together = chunked.predict_chunks(observations)
    assert together.shape == (3, 2, 3) and together.dtype == np.float64
    for observation, chunk in zip(observations, together, strict=True):
        np.testing.assert_array_equal(chunked.predict_chunk(observation), chunk)
        row = observation.images["primary"], observation.instruction, "arm"
        # The token head writes one token after the other, so that later actions do not change the first.
        np.testing.assert_array_equal(policy.predict_action(*row), chunk[0])
        np.testing.assert_array_equal(chunked.predict_action(*row), chunk[0])
        tokens = chunked.predict_normalized([chunked.prepare(observation)])[0]
        normalised = chunked.head.decode(tokens[None], 3)[0]
        np.testing.assert_array_equal(unnormalize_actions(normalised, ROW), chunk)


def test_chunks_of_datasets_of_different_action_size_share_a_batch(chunked):
    rows = [Observation({"primary": images(1)[0]}, INSTRUCTIONS[0], unnorm_key=key) for key in ("arm", "two_arms")]
    short, long = chunked.predict_chunks(rows)
    assert short.shape == (2, 3) and long.shape == (2, 6)
    np.testing.assert_array_equal(short, chunked.predict_chunk(rows[0]))


PROPRIO = {"q01": [0.0, -1.0, 5.0], "q99": [1.0, 1.0, 15.0], "min": [0.0, -1.0, 4.0], "max": [1.0, 1.0, 16.0]}


@pytest.fixture(scope="module")
def two_cameras(policy):
    statistics = {"arm": {"action": ROW, "proprio": PROPRIO | {"names": ["x", "y", "gripper"]}}}
    spec = ObservationSpec(("primary", "wrist"), state=("gripper", "x"))
    model = dataclasses.replace(policy.contract.model, cameras=2, state_dim=2)  # `prepare` needs no weights of it
    changes = {"model": model, "statistics": statistics, "observation": spec}
    return Policy(policy.model, dataclasses.replace(policy.contract, **changes))


def test_prepare_orders_cameras_and_normalises_the_state(two_cameras):
    first, second = images(2, seed=4)
    request = two_cameras.prepare(Observation({"wrist": second, "primary": first}, "push", np.array([5.0, 0.75])))
    np.testing.assert_array_equal(request.images, np.stack([first, second]))
    assert request.state.dtype == np.float32 and request.unnorm_key == "arm"
    np.testing.assert_allclose(request.state, [-1.0, 0.5], atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": {"primary": images(1)[0]}}, "no image of camera 'wrist': the policy sees primary, wrist"),
        ({"images": {"primary": images(1)[0], "wrsit": images(1)[0]}}, "unknown camera 'wrsit'; did you mean 'wrist'"),
        ({"images": dict.fromkeys(("primary", "wrist"), np.zeros((4, 4, 1), np.uint8))}, "camera 'primary': image has"),
        ({"state": None}, "state is missing: give gripper, x"),
        ({"state": np.zeros(3)}, r"state has shape \(3,\): give 2 numbers, gripper, x"),
        ({"state": np.array([0.0, np.nan])}, "state column 'x' is not finite"),
        ({"unnorm_key": "arms"}, "unnorm_key 'arms' has no statistics; did you mean 'arm'"),
    ],
)
def test_prepare_refuses_a_wrong_observation_in_one_line(two_cameras, changes, message):
    both = dict.fromkeys(("primary", "wrist"), images(1)[0])
    with pytest.raises(ValueError, match=message) as caught:
        two_cameras.prepare(Observation(**{"images": both, "instruction": "push", "state": np.zeros(2)} | changes))
    assert "\n" not in str(caught.value)


def test_prepare_refuses_a_state_that_the_policy_was_not_trained_with(policy):
    with pytest.raises(ValueError, match="state is given, but the policy was trained without one"):
        policy.prepare(Observation({"primary": images(1)[0]}, "push", np.zeros(2), "arm"))


def test_a_long_instruction_is_cut_as_in_training_with_one_warning(policy, caplog):
    tokenizer = policy.contract.tokenizer
    fresh, text = Policy(policy.model, policy.contract), "push the red cube " * 40
    request = prepared(fresh, images(1)[0], text, "arm")
    row, _, cut = encode_example(tokenizer, fresh.head.tokenizer, text, np.zeros(3), 64)
    assert cut and request.prompt == row[: len(request.prompt)].tolist() and len(request.prompt) == 64 - 3 - 1
    prepared(fresh, images(1)[0], text, "arm")
    assert fresh.cut_instructions == 2
    assert [record.levelname for record in caplog.records if "is cut" in record.message] == ["WARNING"]


# -- Bins -------------------------------------------------------------------------------------------------------------


def test_a_policy_with_128_bins_does_what_it_was_trained_to_do(policy):
    """Trains on one example with the codec of the contract, then acts: bins agree from encoding to decoding."""
    contract = dataclasses.replace(policy.contract, action=ActionSpec(bins=128))
    codec, tokenizer = contract.action_tokenizer, contract.tokenizer
    normalised, pixels = np.array([-0.7, 0.31, 0.9]), images(1, seed=9)
    tokens, positions, _ = encode_example(tokenizer, codec, INSTRUCTIONS[0], normalised, 40)
    batch = Batch(
        images=pixels[:, None], image_mask=np.ones((1, 1), bool), state=None, tokens=tokens[None],
        target_positions=positions[None], target_mask=np.ones((1, 4), bool), actions=normalised[None, None],
        action_mask=np.ones((1, 1, 3), bool), dataset=np.zeros(1, np.int32),
    )  # fmt: skip
    graph, params = nnx.split(policy.model, nnx.Param)
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(params, state):
        loss = lambda params: loss_and_sums(nnx.merge(graph, params), batch, policy.head, 1)
        grads, sums = jax.grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, sums

    state = optimizer.init(params)
    for _ in range(30):
        params, state, sums = step(params, state)
    assert float(sums["correct"].sum()) == 3 and float(sums["l1"].sum()) == 0
    trained = Policy(nnx.merge(graph, params), contract)
    action = trained.predict_action(pixels[0], INSTRUCTIONS[0], "arm")
    expected = unnormalize_actions(normalised, ROW)
    assert (np.abs(action - expected) <= np.array([0.2, 2.0, 1.0]) / 127 + 1e-9).all(), (action, expected)
    free = prepared(Policy(policy.model, contract), images(1, seed=1)[0], INSTRUCTIONS[1], "arm")
    assert codec.first_token == tokenizer.vocab_size - 128
    assert (Policy(policy.model, contract).predict_normalized([free]) >= codec.first_token).all()


def test_a_vlm_is_refused_in_one_line(policy, tmp_path, capsys):
    vlm = dataclasses.replace(policy.contract, statistics={}, default_key=None)
    with pytest.raises(CheckpointError, match="this checkpoint is a VLM: it has no action statistics"):
        Policy(policy.model, vlm)
    save_model(policy.model, vlm, tmp_path / "vlm")
    for command, arguments in (
        (serve.main, ["--port", "0", "--compilation_cache", ""]),
        (evaluate.main, ["rollout", "--out", "o"]),
        (evaluate.main, ["offline", "--data_dir", "D", "--out", "o"]),
        (evaluate.main, ["quantization"]),
    ):
        with pytest.raises(SystemExit) as caught:
            command([*arguments, "--checkpoint", str(tmp_path / "vlm")])
        error = capsys.readouterr().err
        assert caught.value.code == 2 and "this checkpoint is a VLM" in error and error.count("\n") == 1, error


@pytest.mark.parametrize("quantize", [None, *(pytest.param(kind, marks=pytest.mark.long) for kind in ("int8", "int4"))])
def test_several_devices_that_share_every_layer_act_as_one(policy, tmp_path, quantize):
    save_model(policy.model, policy.contract, tmp_path / "checkpoint")
    load = functools.partial(Policy.from_checkpoint, tmp_path / "checkpoint", quantize=quantize, exclude=())
    one, four = load(), load(tensor=4)  # on a CPU the one has its layers apart, the four run what accelerators run
    part = lambda x: jax.ShapeDtypeStruct(x.sharding.shard_shape(x.shape), x.dtype)
    held = lambda policy: count_bytes(jax.tree.map(part, jax.tree.leaves(policy.model.llama)))
    assert held(four) < 0.28 * held(one), "only norms and scales of groups are whole on each"
    rows = [prepared(one, pixels, text, "arm") for pixels, text in zip(images(3, seed=6), INSTRUCTIONS, strict=True)]
    np.testing.assert_allclose(four.run_model(rows).logits, one.run_model(rows).logits, atol=1e-4)
    np.testing.assert_array_equal(four.predict_normalized(rows), one.predict_normalized(rows))
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
        text = " ".join(rng.choice(words, rng.integers(1, 24)))
        return prepared(policy, pixels, text, keys[rng.integers(len(keys))])

    pool = [request() for _ in range(40)]
    assert len({-(-len(r.prompt) // 32) for r in pool}) == 2, "both text lengths occur"
    single = [policy.predict_normalized([r])[0] for r in pool]
    for _ in range(200):
        chosen = rng.choice(len(pool), rng.integers(1, 5), replace=False)
        tokens = policy.predict_normalized([pool[i] for i in chosen], batch_size=4)
        np.testing.assert_array_equal(tokens, np.stack([single[i] for i in chosen]))
    assert len({tuple(tokens) for tokens in single}) > 10
