"""The training step: its loss and metrics against plain numpy, and its independence of how the work is divided."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from training.batches import MODEL, random_batch

from openvla_jax.models.heads import TokenHead, summarize
from openvla_jax.models.openvla import OpenVLA
from openvla_jax.parallel.execution import Execution
from openvla_jax.parallel.sharding import global_batch, make_mesh
from openvla_jax.settings import AugmentConfig, OptimizerSettings
from openvla_jax.training.optimizer import make_optimizer, make_schedule
from openvla_jax.training.state import abstract_state, init_state
from openvla_jax.training.step import loss_and_sums, make_augment, make_train_step, pad_to_lanes
from openvla_jax.types import ActionSpec

SETTINGS = OptimizerSettings(learning_rate=1e-3)
HEAD = TokenHead(MODEL, ActionSpec())


def make_step(mesh, accumulation=1, augment=None):
    """(the jitted step, where the leaves of its state lie)."""
    schedule = make_schedule(SETTINGS, 10)
    optimizer = make_optimizer(SETTINGS, schedule)
    _, placed = abstract_state(MODEL, jnp.float32, optimizer, mesh)
    step = make_train_step(
        MODEL,
        optimizer,
        schedule,
        Execution(mesh),
        dtype=jnp.float32,
        datasets=2,
        accumulation=accumulation,
        augment=augment,
    )
    return jax.jit(step, out_shardings=(placed, None)), placed


def fresh(mesh):
    return init_state(MODEL, jnp.float32, make_optimizer(SETTINGS, make_schedule(SETTINGS, 10)), mesh, seed=3)


def losses(step, state, mesh, steps=10):
    collected, gradients = [], None
    for i in range(steps):
        state, metrics = step(state, global_batch(random_batch(16, i), mesh))
        collected.append(jax.device_get(metrics))
        if i == 0:  # Adam's first moment is then a tenth of the clipped gradient
            gradients = jax.device_get(optax.tree.get(state.opt_state, "mu"))
    return collected, gradients


@pytest.fixture(scope="module")
def single():
    """(mesh of one device, new state, step); compiled once."""
    mesh = make_mesh({"fsdp": 1}, jax.devices()[:1])
    return mesh, fresh(mesh), make_step(mesh)[0]


@pytest.fixture(scope="module")
def reference(single):
    mesh, state, step = single
    return losses(step, state, mesh)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [
        {"data": 8},
        pytest.param({"data": 4, "fsdp": 2}, marks=pytest.mark.long),
        pytest.param({"data": 2, "fsdp": 2, "tensor": 2}, marks=pytest.mark.long),
    ],
)
def test_any_mesh_gives_the_losses_and_gradients_of_one_device(sizes, single, reference):
    mesh = make_mesh(sizes)
    step, placed = make_step(mesh)
    # Initial values are drawn where they lie; one mesh is enough to see that they do not depend on it.
    state = fresh(mesh) if "tensor" in sizes else jax.device_put(jax.device_get(single[1]), placed)
    collected, gradients = losses(step, state, mesh)
    assert jax.tree.structure(gradients) == jax.tree.structure(reference[1])
    for (path, one), many in zip(
        jax.tree_util.tree_flatten_with_path(reference[1])[0], jax.tree.leaves(gradients), strict=True
    ):
        # To the largest of the leaf: the key biases' gradients are rounding errors of much larger terms.
        scale = np.abs(one).max() if "'bias'" not in jax.tree_util.keystr(path) else max(np.abs(one).max(), 1e-4)
        np.testing.assert_allclose(many, one, atol=1e-4 * scale, rtol=0, err_msg=jax.tree_util.keystr(path))
    for one, many in zip(reference[0], collected, strict=True):
        assert many["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert many["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
        np.testing.assert_allclose(many["action_accuracy_by_dataset"], one["action_accuracy_by_dataset"], atol=1e-6)


def test_accumulation_gives_the_losses_of_the_whole_batch(single, reference):
    mesh, state, _ = single
    collected, _ = losses(make_step(mesh, accumulation=4)[0], state, mesh, steps=3)
    for one, parts in zip(reference[0][:3], collected, strict=True):
        assert parts["loss"] == pytest.approx(one["loss"], rel=1e-6)
        assert parts["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)
        assert parts["action_l1"] == pytest.approx(one["action_l1"], rel=1e-6)


@pytest.mark.long
def test_augmentation_in_the_step_does_not_depend_on_the_devices(single, reference):
    augment = make_augment(AugmentConfig(enabled=True))
    mesh = make_mesh({"data": 8})
    (step, _), (sharded, placed) = make_step(single[0], augment=augment), make_step(mesh, augment=augment)
    one, _ = losses(step, single[1], single[0], steps=2)
    eight, _ = losses(sharded, jax.device_put(jax.device_get(single[1]), placed), mesh, steps=2)
    for ours, theirs, plain in zip(one, eight, reference[0][:2], strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-5)
        assert theirs["grad_norm"] == pytest.approx(ours["grad_norm"], rel=1e-4)
        assert abs(ours["loss"] - plain["loss"]) > 1e-4 * plain["loss"], "nothing was augmented"


def test_training_lowers_the_loss_of_one_batch(single):
    mesh, state, step = single
    batch, found = global_batch(random_batch(16), mesh), []
    for _ in range(20):
        state, metrics = step(state, batch)
        found.append(float(metrics["loss"]))
    assert found[-1] < 0.6 * found[0]


def test_a_step_without_a_finite_loss_changes_nothing_but_its_number(single):
    """The parameters, the moments and Adam's count stay."""
    mesh, state, step = single
    batch = global_batch(random_batch(16), mesh)
    state, metrics = step(state, batch)
    assert not metrics["skipped"]
    table = state.params.llama.embed.table
    broken = jax.tree.map(lambda leaf: leaf, state)
    broken.params.llama.embed.table = table.replace(table[...].at[1].set(jnp.nan))  # of the token that begins each row
    skipped, metrics = step(broken, batch)
    assert metrics["skipped"] and int(skipped.step) == int(broken.step) + 1
    assert np.isnan(metrics["loss"])
    for before, now in zip(
        jax.tree.leaves((broken.params, broken.opt_state)),
        jax.tree.leaves((skipped.params, skipped.opt_state)), strict=True,
    ):  # fmt: skip
        np.testing.assert_array_equal(before, now)


def make_model(params):
    abstract = jax.eval_shape(lambda key: OpenVLA(MODEL, key), jax.random.key(0))
    return nnx.merge(nnx.split(abstract, nnx.Param)[0], params)


@jax.jit
def value_and_gradient(params, batch):
    """((loss, sums of three datasets), gradient) of a model of these parameters."""
    return jax.value_and_grad(lambda p: loss_and_sums(make_model(p), batch, HEAD, 3), has_aux=True)(params)


@pytest.fixture(scope="module")
def params(single):
    return single[1].params


def test_metrics_equal_a_plain_computation(params):
    batch = random_batch(6)._replace(target_mask=np.arange(8) < np.array([8, 8, 5, 8, 3, 8])[:, None])
    (_, sums), _ = value_and_gradient(params, batch)
    got = jax.device_get(summarize(HEAD, sums))

    run = jax.jit(lambda model: model(model.normalize(batch.images[:, 0]), batch.tokens))
    logits = np.asarray(run(make_model(params)), np.float64)
    base, edges = MODEL.base_vocab_size, np.linspace(-1, 1, 256)
    centers = (edges[1:] + edges[:-1]) / 2
    cross_entropy, correct, l1 = [], {0: [], 1: []}, {0: [], 1: []}
    for row in range(6):
        for column in range(8):
            if not batch.target_mask[row, column]:
                continue
            at = batch.target_positions[row, column]
            target, scores = batch.tokens[row, at], logits[row, MODEL.patches + at - 1]
            cross_entropy.append(np.log(np.exp(scores - scores.max()).sum()) + scores.max() - scores[target])
            if base - 256 <= target < base:
                predicted = scores.argmax()
                correct[batch.dataset[row]].append(predicted == target)
                value = lambda token: centers[np.clip(base - token - 1, 0, 254)]
                l1[batch.dataset[row]].append(abs(value(predicted) - value(target)))
    assert got["loss"] == pytest.approx(np.mean(cross_entropy), rel=1e-5)
    assert got["action_accuracy"] == pytest.approx(np.mean(correct[0] + correct[1]), abs=1e-6)
    assert got["action_l1"] == pytest.approx(np.mean(l1[0] + l1[1]), rel=1e-5)
    np.testing.assert_allclose(got["action_l1_by_dataset"][:2], [np.mean(l1[0]), np.mean(l1[1])], rtol=1e-5)
    assert np.isnan(got["action_l1_by_dataset"][2])  # a dataset without rows has no accuracy, not zero


def test_pixels_reach_the_loss(params):
    """A model that ignores the image would pass every other test here."""
    batch = random_batch(6)
    loss = lambda images: value_and_gradient(params, batch._replace(images=images))[0][0]
    black, white = np.zeros_like(batch.images), np.full_like(batch.images, 255)
    assert abs(loss(black) - loss(white)) > 1e-3


def test_profiles_name_what_they_show_like_the_model(params):
    """Every product of the forward pass is within a part of the model."""
    loss = lambda params: loss_and_sums(make_model(params), random_batch(2), HEAD, 2)[0]
    text = jax.jit(loss).lower(params).as_text(debug_info=True)
    for scope in ("vision/dino", "vision/siglip", "projector", "llama", "llama/head"):
        assert f"{scope}/" in text, scope
    assert "attention/" in text and "mlp/" in text


def test_unused_text_positions_do_not_matter(params):
    batch = random_batch(6)
    padded = batch._replace(tokens=np.pad(batch.tokens, ((0, 0), (0, 9)), constant_values=MODEL.pad_token))
    expected = float(value_and_gradient(params, batch)[0][0])
    loss = jax.jit(lambda params, batch: loss_and_sums(make_model(params), batch, HEAD, 3)[0])
    assert float(loss(params, padded)) == pytest.approx(expected, rel=1e-6)


def test_parameters_move_everywhere_but_nowhere_else(params):
    """Every parameter that is run gets a gradient; the tree holds no dead one."""
    _, gradient = value_and_gradient(params, random_batch(6))
    for path, leaf in jax.tree_util.tree_flatten_with_path(gradient)[0]:
        # The key bias shifts all scores of a query alike: softmax does not see it.
        silent = "'k'" in jax.tree_util.keystr(path) and "bias" in jax.tree_util.keystr(path)
        assert silent or float(jnp.abs(leaf).max()) > 0, jax.tree_util.keystr(path)


def test_padding_to_lanes_changes_no_number():
    """Of widths that are no multiple of 128: the loss and every gradient, in the shapes of the parameters."""
    tower = dataclasses.replace(MODEL.towers[1], mlp_dim=126)
    odd = dataclasses.replace(MODEL, towers=(tower,), llama=dataclasses.replace(MODEL.llama, vocab_size=766))
    graph, params = nnx.split(jax.jit(lambda key: OpenVLA(odd, key))(jax.random.key(0)), nnx.Param)
    padded = jax.eval_shape(pad_to_lanes, params)
    assert padded.vision.siglip.blocks.mlp.up.kernel.shape == (2, 64, 128)
    assert padded.vision.siglip.blocks.mlp.down.kernel.shape == (2, 128, 64)
    assert padded.llama.head.kernel.shape == (64, 768) and padded.llama.embed.table.shape == (766, 64)
    assert padded.llama.blocks.mlp.up.kernel.shape == (2, 64, 176)  # 256 would be too much

    batch = random_batch(4, model=odd)
    loss = lambda change: lambda params: loss_and_sums(nnx.merge(graph, change(params)), batch, HEAD, 2)[0]
    plain, aligned = (jax.jit(jax.value_and_grad(loss(change)))(params) for change in (lambda x: x, pad_to_lanes))
    assert float(aligned[0]) == pytest.approx(float(plain[0]), rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), aligned[1], plain[1])
