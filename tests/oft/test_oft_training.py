"""Training of OpenVLA-OFT's models against the real code: losses, metrics, gradients, curves."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oft.cases import FOLDER, imported, names, settings
from oft.runs import batch_of, batches, places, recorded, specs_of, start_of

from configs.finetune import oft
from openvla_jax.checkpoint.load import load_model
from openvla_jax.models.heads import make_head, summarize
from openvla_jax.models.heads.chunks import L1Head
from openvla_jax.models.tree import flat
from openvla_jax.models.tuning import make_graph
from openvla_jax.parallel.execution import PLAIN, Execution
from openvla_jax.parallel.sharding import make_mesh
from openvla_jax.settings import Settings
from openvla_jax.training.optimizer import make_optimizer, make_schedule
from openvla_jax.training.state import fresh_state
from openvla_jax.training.step import make_train_step

RUNS = sorted(path.parent.name for path in FOLDER.glob("*/init.npz"))
METRICS = {
    "curr_action_l1_loss": "first_action_l1",
    "next_actions_l1_loss": "next_actions_l1",
    "curr_action_accuracy": "first_action_accuracy",
    "next_actions_accuracy": "next_actions_accuracy",
}


@pytest.mark.long
@pytest.mark.parametrize("name", names(float32=True))
def test_heads_give_the_losses_of_the_reference(name):
    model, expected = load_model(imported(name))[0], np.load(FOLDER / name / "train.npz")
    head = make_head(model.config, specs_of(name)[1])
    head.average_pads = True
    for number in range(batches(name)):
        batch = batch_of(name, number)

        @jax.jit
        def run(images, number=number, batch=batch):
            pixels = model.normalize(images)
            if f"step{number}/noise" in expected:
                noise, timestep = expected[f"step{number}/noise"], expected[f"step{number}/timesteps"]
                return head.noise_loss(model, pixels, batch, PLAIN, noise, timestep.astype(np.int32))[1]
            return head.loss(model, pixels, batch, PLAIN, jax.random.split(jax.random.key(0), len(batch.tokens)))[1]

        means = summarize(head, jax.tree.map(lambda row: row.sum()[None], run(batch.images)))
        np.testing.assert_allclose(means["loss"], expected[f"step{number}/metric/loss_value"], rtol=1e-4)
        for theirs, ours in METRICS.items():
            if f"step{number}/metric/{theirs}" in expected and ours in means:
                np.testing.assert_allclose(means[ours], expected[f"step{number}/metric/{theirs}"], rtol=1e-4)


@pytest.mark.long
def test_diffusion_head_is_evaluated_by_sampling():
    """What validation measures is the error of sampled chunks, beside the loss."""
    (name, *_) = names(use_diffusion=True, float32=True) or [pytest.skip("needs reference files: a diffusion case")]
    model, batch = load_model(imported(name))[0], batch_of(name, 0)
    head, keys = make_head(model.config, specs_of(name)[1]), jax.random.split(jax.random.key(3), len(batch.tokens))
    head.steps = 2
    sums, loss = jax.jit(
        lambda images: (
            head.evaluate(model, model.normalize(images), batch, PLAIN, keys),
            head.loss(model, model.normalize(images), batch, PLAIN, keys)[1],
        )
    )(batch.images)
    np.testing.assert_allclose(sums["loss"], loss["loss"], rtol=1e-6)
    rows, horizon, dim = batch.actions.shape
    assert (sums["first"].sum(), sums["next"].sum()) == (rows * dim, rows * (horizon - 1) * dim)
    assert 0 < sums["first_l1"].sum() / sums["first"].sum() < 2


@pytest.mark.long
@pytest.mark.parametrize("name", [*names(float32=True), *RUNS])
def test_gradients_of_every_tensor_have_the_norms_of_the_reference(name):
    model, action, tuning = specs_of(name)
    expected, norms = np.load(FOLDER / name / "train.npz"), recorded(name)
    head = make_head(model, action)
    head.average_pads = True
    params, frozen = start_of(name)
    graph, batch = make_graph(model, jnp.float32, tuning), jax.tree.map(jnp.asarray, batch_of(name, 0))

    @jax.jit
    def gradient(params, frozen, images):
        def loss(params):
            network = nnx.merge(graph, params, frozen)
            pixels = network.normalize(images)
            if "step0/noise" in expected:
                draws = expected["step0/noise"], expected["step0/timesteps"].astype(np.int32)
                return head.noise_loss(network, pixels, batch, PLAIN, *draws)[0] / head.targets(batch)
            keys = jax.random.split(jax.random.key(0), len(batch.tokens))
            return head.loss(network, pixels, batch, PLAIN, keys)[0] / head.targets(batch)

        return jax.grad(loss)(params)

    grads = flat(nnx.to_pure_dict(nnx.as_pure(gradient(params, frozen, batch.images))))
    norm = lambda x: float(np.sqrt(np.square(np.asarray(x, np.float64)).sum()))
    total = norm([norm(x) for x in grads.values()])
    np.testing.assert_allclose(total, expected["grad_norm"][0], rtol=1e-3)
    for original, place in places(norms["first_grad_norm"], model, tuning.lora.rank).items():
        found = grads[place.path] if place.layer is None else grads[place.path][place.layer]
        np.testing.assert_allclose(
            norm(found), norms["first_grad_norm"][original], rtol=1e-3, atol=1e-6 * total, err_msg=original
        )
    for original, place in places(norms["no_grad"], model, tuning.lora.rank).items():
        if place.path in grads:
            assert not np.any(grads[place.path] if place.layer is None else grads[place.path][place.layer]), original


@pytest.mark.long
@pytest.mark.parametrize("name", RUNS)
def test_run_follows_the_losses_of_the_reference(name, monkeypatch):
    """The steps of `finetune()`, with the optimiser of the recipe and the run's own learning rate."""
    monkeypatch.setattr(L1Head, "average_pads", True)
    model, action, tuning = specs_of(name)
    options, expected = settings(name), np.load(FOLDER / name / "expected.npz")
    recipe = Settings.from_dict(oft.get_config(options["platform"]).to_dict()).optimizer
    recipe = dataclasses.replace(
        recipe, learning_rate=options["learning_rate"], decay_at=options["num_steps_before_decay"]
    )
    schedule = make_schedule(recipe, len(expected["loss"]))
    optimizer = make_optimizer(recipe, schedule)
    mesh = make_mesh({}, jax.devices()[:1])
    step = make_train_step(
        model, optimizer, schedule, Execution(mesh), dtype=jnp.float32, datasets=1, tuning=tuning, action=action
    )
    state, found = fresh_state(*start_of(name), optimizer, averaged=False), []
    step = jax.jit(step)
    for number in range(len(expected["loss"])):
        state, metrics = step(state, batch_of(name, number % batches(name)))
        found.append(jax.device_get(metrics))
    for theirs, ours, tolerance in (
        ("loss", "loss", 1e-4), ("curr_action_l1", "first_action_l1", 1e-4), ("lr", "learning_rate", 1e-6),
        ("next_actions_l1", "next_actions_l1", 1e-4), ("grad_norm", "grad_norm", 1e-3),
    ):  # fmt: skip
        np.testing.assert_allclose([one[ours] for one in found], expected[theirs], rtol=tolerance, err_msg=theirs)
    final, leaves = np.load(FOLDER / name / "final.npz"), flat(nnx.to_pure_dict(nnx.as_pure(state.params)))
    moved = [original for original in final if original not in recorded(name)["no_grad"]]
    for original, place in places(moved, model, tuning.lora.rank).items():
        found = leaves[place.path] if place.layer is None else leaves[place.path][place.layer]
        np.testing.assert_allclose(found, place.to_tree(final[original]), atol=1e-4, err_msg=original)
