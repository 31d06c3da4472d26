"""Training steps of heads that predict chunks: on any mesh, in any parts, with a moving average of the weights."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from training.batches import ONE_TOWER, random_batch

from openvla_jax.checkpoint.contract import Contract
from openvla_jax.checkpoint.load import load_model
from openvla_jax.config import LoRAConfig
from openvla_jax.models.heads import Inputs, make_head, summarize
from openvla_jax.models.openvla import OpenVLA
from openvla_jax.models.tree import flat
from openvla_jax.parallel.execution import Execution
from openvla_jax.parallel.sharding import global_batch, make_mesh
from openvla_jax.settings import AugmentConfig, OptimizerSettings, Settings
from openvla_jax.tokens.tokenizer import load_tokenizer
from openvla_jax.training.checkpoint import Checkpoints, restore_state
from openvla_jax.training.optimizer import average, make_optimizer, make_schedule
from openvla_jax.training.state import abstract_state, init_state
from openvla_jax.training.step import augment_cameras, loss_and_sums, make_augment, make_job, make_train_step
from openvla_jax.types import ActionSpec, ObservationSpec

HORIZON, DIM, DECAY = 2, 3, 0.6
OPTIMIZER = OptimizerSettings(learning_rate=1e-2, ema=DECAY)


def model_of(head):
    dim = 0 if head == "parallel_tokens" else DIM
    return dataclasses.replace(ONE_TOWER, head=head, action_dim=dim, cameras=2, state_dim=4, film=True)


def action_of(head):
    return ActionSpec(DIM, HORIZON, HORIZON, head)


def batch_of(model, seed=0, rows=8):
    """Rows of different text length; some lack the second camera, some the last dimension."""
    batch, rng = random_batch(rows, seed, model, text_length=18, action_dim=HORIZON * DIM), np.random.default_rng(seed)
    second = random_batch(rows, seed + 100, model, action_dim=HORIZON * DIM).images
    action_mask = np.ones((rows, HORIZON, DIM), bool)
    action_mask[::3, :, -1] = False
    return batch._replace(
        images=np.concatenate([batch.images, second], axis=1),
        image_mask=np.stack([np.ones(rows, bool), np.arange(rows) % 4 > 0], axis=1),
        state=rng.normal(size=(rows, 4)).astype(np.float32),
        actions=rng.uniform(-1, 1, (rows, HORIZON, DIM)).astype(np.float32),
        action_mask=action_mask,
    )


def make_step(head, mesh, accumulation=1):
    schedule = make_schedule(OPTIMIZER, 10)
    optimizer = make_optimizer(OPTIMIZER, schedule)
    abstract, placed = abstract_state(model_of(head), jnp.float32, optimizer, mesh, averaged=True)
    step = make_train_step(
        model_of(head), optimizer, schedule, Execution(mesh), dtype=jnp.float32, datasets=2, accumulation=accumulation,
        action=action_of(head), ema=DECAY,
    )  # fmt: skip
    return jax.jit(step, out_shardings=(placed, None)), abstract, placed


@functools.cache
def single(head):
    """(states before and after each of three steps on one device, their metrics)."""
    mesh = make_mesh({}, jax.devices()[:1])
    step, _, _ = make_step(head, mesh)
    optimizer = make_optimizer(OPTIMIZER, make_schedule(OPTIMIZER, 10))
    states = [init_state(model_of(head), jnp.float32, optimizer, mesh, seed=1, averaged=True)]
    found = []
    for number in range(3):
        state, metrics = step(states[-1], global_batch(batch_of(model_of(head), number), mesh))
        states.append(state)
        found.append(jax.device_get(metrics))
    return states, found


def check_same_step(head, state, metrics):
    """Asserts that a first step gave what one device gives: loss, gradients (in Adam's first moment) and average."""
    states, expected = single(head)
    assert metrics["loss"] == pytest.approx(expected[0]["loss"], rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(expected[0]["grad_norm"], rel=1e-4)
    moments = lambda state: flat(nnx.to_pure_dict(nnx.as_pure(optax.tree.get(state.opt_state, "mu"))))
    many = moments(state)
    for name, gradient in moments(states[1]).items():
        # To the largest of the leaf: the key biases' gradients are rounding errors of much larger terms.
        scale = max(np.abs(gradient).max(), 1e-4 if name.endswith("bias") else 0)
        np.testing.assert_allclose(many[name], gradient, atol=1e-4 * scale, rtol=0, err_msg=name)
    assert jax.tree.structure(state) == jax.tree.structure(states[1])


@pytest.mark.long
@pytest.mark.parametrize("head", ["l1", "diffusion"])
def test_chunk_step_on_eight_devices_equals_one(head):
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    step, _, placed = make_step(head, mesh)
    state = jax.device_put(jax.device_get(single(head)[0][0]), placed)
    state, metrics = step(state, global_batch(batch_of(model_of(head)), mesh))
    check_same_step(head, jax.device_get(state), jax.device_get(metrics))


@pytest.mark.long
@pytest.mark.parametrize("head", ["l1", "diffusion"])
def test_chunk_step_in_parts_equals_the_whole_batch(head):
    mesh = make_mesh({}, jax.devices()[:1])
    step, _, _ = make_step(head, mesh, accumulation=4)
    state, metrics = step(single(head)[0][0], global_batch(batch_of(model_of(head)), mesh))
    check_same_step(head, jax.device_get(state), jax.device_get(metrics))


@pytest.mark.long
@pytest.mark.parametrize("head", ["l1", "parallel_tokens"])
def test_validation_measures_what_a_policy_predicts(head):
    """The metrics of a batch equal those of the chunks that `predict`, the serving path, gives for its rows."""
    model_config = model_of(head)
    model, batch = OpenVLA(model_config, jax.random.key(0)), batch_of(model_config)
    batch = batch._replace(action_mask=np.ones_like(batch.action_mask), image_mask=np.ones_like(batch.image_mask))
    head = make_head(model_config, action_of(head))
    _, sums = jax.jit(lambda batch: loss_and_sums(model, batch, head, 2, evaluate=True))(batch)
    means = summarize(head, sums)
    lengths = batch.target_positions[:, 0]
    inputs = Inputs(batch.images, batch.tokens, lengths, batch.state)
    predicted = jax.jit(lambda inputs: head.predict(model, inputs, DIM, constrained=False))(inputs)
    if predicted.tokens is None:
        errors = np.abs(np.asarray(predicted.actions) - batch.actions)
    else:
        true = np.take_along_axis(batch.tokens, batch.target_positions[:, :-1], axis=1)
        decode = lambda tokens: head.tokenizer.decode(np.asarray(tokens)).reshape(-1, HORIZON, DIM)
        errors = np.abs(decode(predicted.tokens) - decode(true))
        correct = (np.asarray(predicted.tokens) == true).reshape(-1, HORIZON, DIM)
        assert means["first_action_accuracy"] == pytest.approx(correct[:, 0].mean())
        assert means["next_actions_accuracy"] == pytest.approx(correct[:, 1:].mean())
        assert means["action_accuracy"] == pytest.approx(correct.mean())
    assert means["first_action_l1"] == pytest.approx(errors[:, 0].mean(), rel=1e-4)
    assert means["next_actions_l1"] == pytest.approx(errors[:, 1:].mean(), rel=1e-4)
    assert means["action_l1"] == pytest.approx(errors.mean(), rel=1e-4)


def test_augment_cameras_draws_for_each_camera():
    images = np.broadcast_to(np.random.default_rng(0).integers(0, 256, (1, 1, 16, 16, 3), np.uint8), (2, 2, 16, 16, 3))
    augmented = augment_cameras(make_augment(AugmentConfig(enabled=True)), jax.random.key(0), jnp.asarray(images))
    assert augmented.shape == images.shape
    assert len({np.asarray(image).tobytes() for row in augmented for image in row}) == 4


# ---------------------------------------------------------------------------------------------------------------------
# The moving average
# ---------------------------------------------------------------------------------------------------------------------


def test_average_follows_its_recurrence_from_a_short_memory_to_a_long_one():
    rng = np.random.default_rng(0)
    params = rng.normal(size=(30, 4)).astype(np.float32)
    expected = ours = params[0]
    for step in range(29):
        decay = min(0.7, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * params[step + 1]
        ours = average({"w": ours}, {"w": params[step + 1]}, jnp.int32(step), 0.7)["w"]
        np.testing.assert_allclose(ours, expected, atol=1e-6)


@pytest.mark.parametrize("decay", [1.0, 0.0, -0.5, float("nan")])
def test_ema_out_of_range_is_refused(decay):
    with pytest.raises(ValueError, match=r"optimizer.ema is .*: give a decay above 0 and below 1, as 0.999, or None"):
        OptimizerSettings(ema=decay)


def test_state_without_an_average_has_no_leaf_more():
    settings, mesh = Settings(trainable="*/lora", lora=LoRAConfig(2)), make_mesh({}, jax.devices()[:1])
    plain = make_job(settings, ONE_TOWER, mesh, datasets=1).abstract
    job = make_job(dataclasses.replace(settings, optimizer=OPTIMIZER), ONE_TOWER, mesh, datasets=1)
    averaged, placed = job.abstract, job.placed
    trained = len(jax.tree.leaves(plain.params))
    assert len(jax.tree.leaves(averaged)) == len(jax.tree.leaves(plain)) + trained
    assert jax.tree.structure(averaged.ema) == jax.tree.structure(plain.params), "of adapters alone"
    assert jax.tree.structure(placed.ema) == jax.tree.structure(placed.params)
    assert plain.acting is plain.params and averaged.acting is averaged.ema


@pytest.mark.long
def test_step_keeps_the_average_of_its_weights():
    states, _ = single("l1")
    leaves = lambda tree: jax.tree.leaves(jax.device_get(tree))
    for expected, params in zip(leaves(states[0].ema), leaves(states[0].params), strict=True):
        np.testing.assert_array_equal(expected, params)
    for step, (before, after) in enumerate(itertools.pairwise(states)):
        decay = min(DECAY, (1 + step) / (10 + step))
        for old, new, kept in zip(leaves(before.ema), leaves(after.params), leaves(after.ema), strict=True):
            np.testing.assert_allclose(kept, decay * old + (1 - decay) * new, rtol=1e-5, atol=1e-7)


@pytest.mark.long
def test_average_is_saved_as_what_acts_and_resumed_bit_for_bit(tmp_path):
    state, model = single("l1")[0][2], model_of("l1")
    row = {name: [value] * DIM for name, value in (("q01", -1.0), ("q99", 1.0), ("min", -1.0), ("max", 1.0))}
    statistics = {"toy": {"action": row, "proprio": {name: values[:1] * 4 for name, values in row.items()}}}
    contract = Contract(
        model, load_tokenizer("tiny"), statistics,
        observation=ObservationSpec(("primary", "wrist"), state=("a", "b", "c", "d")), action=action_of("l1"),
    )  # fmt: skip
    checkpoints = Checkpoints(tmp_path, keep_last=1, keep_every=None)
    checkpoints.save(2, state, contract)
    checkpoints.close()
    _, abstract, placed = make_step("l1", make_mesh({"data": 2, "fsdp": 4}))
    restored = restore_state(tmp_path, 2, abstract, placed)
    assert jax.tree.structure(restored) == jax.tree.structure(abstract)
    for before, after in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True):
        np.testing.assert_array_equal(before, after)
    loaded = flat(nnx.to_pure_dict(nnx.as_pure(nnx.state(load_model(tmp_path)[0], nnx.Param))))
    for name, value in flat(nnx.to_pure_dict(nnx.as_pure(state.ema))).items():
        np.testing.assert_array_equal(loaded[name], value)
