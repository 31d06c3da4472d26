"""Training of OpenVLA-OFT's models against the real code: losses, metrics, gradients, curves."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oft.cases import FOLDER, imported, names
from oft.runs import batch_of, batches, specs_of, start_of

from openvla_jax.checkpoint.load import load_model
from openvla_jax.models.heads import make_head, summarize
from openvla_jax.models.tree import flat
from openvla_jax.parallel.execution import PLAIN, Execution
from openvla_jax.parallel.sharding import make_mesh
from openvla_jax.training.step import make_forward

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
@pytest.mark.parametrize("name", RUNS)
def test_gradients_have_the_norms_of_the_reference(name):
    model, action, tuning = specs_of(name)
    head = make_head(model, action)
    head.average_pads = True
    params, frozen = start_of(name)
    execution = Execution(make_mesh({}, jax.devices()[:1]))
    forward = make_forward(model, head, execution, dtype=jnp.float32, datasets=1, tuning=tuning)
    batch = jax.tree.map(jnp.asarray, batch_of(name, 0))
    loss = lambda params: forward(params, frozen, batch)[0] / head.targets(batch)
    grads = flat(nnx.to_pure_dict(nnx.as_pure(jax.jit(jax.grad(loss))(params))))
    squares = lambda x: float(np.square(np.asarray(x, np.float64)).sum())
    total = np.sqrt(sum(map(squares, grads.values())))
    np.testing.assert_allclose(total, np.load(FOLDER / name / "train.npz")["grad_norm"][0], rtol=1e-3)
    recorded = json.loads((FOLDER / name / "grads.json").read_text())
    assert recorded["first_grad_norm"]
