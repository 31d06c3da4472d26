"""Schedules and AdamW against closed forms and PyTorch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from training.batches import MODEL

from openvla_jax.models.openvla import abstract_model
from openvla_jax.settings import OptimizerSettings
from openvla_jax.training.optimizer import decays, make_optimizer, make_schedule

settings = functools.partial(OptimizerSettings, learning_rate=2e-3)


def test_constant_schedule_starts_at_the_peak():
    schedule = make_schedule(settings(), 100)
    assert [float(schedule(step)) for step in (0, 1, 99)] == pytest.approx([2e-3] * 3)


def test_cosine_with_warmup():
    schedule = make_schedule(settings(schedule="cosine", warmup_steps=10, final_fraction=0.1), 110)
    assert float(schedule(0)) == 0.0
    assert float(schedule(5)) == pytest.approx(1e-3)
    assert float(schedule(10)) == pytest.approx(2e-3)
    assert float(schedule(60)) == pytest.approx(2e-3 * (0.1 + 0.9 * 0.5))
    assert float(schedule(110)) == pytest.approx(2e-4)


def test_unknown_schedule_is_named():
    with pytest.raises(ValueError, match="schedule is 'linear': one of constant, cosine"):
        make_schedule(settings(schedule="linear"), 10)


def test_decay_touches_kernels_and_the_token_table_only():
    params = nnx.state(abstract_model(MODEL), nnx.Param)
    chosen = decays(params)
    flat = {jax.tree_util.keystr(p): leaf for p, leaf in jax.tree_util.tree_flatten_with_path(chosen)[0]}
    decayed = {name for name, value in flat.items() if value}
    assert all("kernel" in name or "table" in name for name in decayed)
    assert all("kernel" not in name and "table" not in name for name in flat.keys() - decayed)
    assert len(decayed) > 20


@pytest.mark.torch
@pytest.mark.parametrize(("weight_decay", "clip_norm"), [(0.0, 1.0), (0.1, 0.0), (0.1, 0.3)])
def test_updates_equal_torch(weight_decay, clip_norm):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    start = rng.standard_normal((5, 3)).astype(np.float32)
    gradients = [rng.standard_normal((5, 3)).astype(np.float32) * scale for scale in (0.1, 3.0, 0.5, 1.0)]

    theirs = torch.nn.Parameter(torch.tensor(start))
    adamw = torch.optim.AdamW([theirs], lr=2e-3, weight_decay=weight_decay)
    for gradient in gradients:
        theirs.grad = torch.tensor(gradient)
        if clip_norm:
            torch.nn.utils.clip_grad_norm_([theirs], clip_norm)
        adamw.step()

    options = settings(weight_decay=weight_decay, clip_norm=clip_norm)
    optimizer = make_optimizer(options, make_schedule(options, 10))
    ours = {"kernel": nnx.Param(jnp.asarray(start), axes=("embed", "mlp"))}
    state = optimizer.init(ours)
    for gradient in gradients:
        wrapped = {"kernel": ours["kernel"].replace(jnp.asarray(gradient))}
        updates, state = optimizer.update(wrapped, state, ours)
        ours = optax.apply_updates(ours, updates)
    np.testing.assert_allclose(ours["kernel"][...], theirs.detach().numpy(), atol=2e-6)
