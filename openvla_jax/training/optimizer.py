"""AdamW with global-norm clipping and a constant, cosine or stepped learning rate."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from openvla_jax.settings import OptimizerSettings


def make_schedule(settings: OptimizerSettings, steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up over `warmup_steps`, then constant, cosine to `final_fraction` of the
    peak, or a tenth of the peak after `decay_at` updates.

    The update that makes step 1 uses the value at 0: without warm-up that is the peak, as in the reference.
    """
    peak, warmup = settings.learning_rate, settings.warmup_steps
    if settings.schedule == "constant":
        after = optax.constant_schedule(peak)
    elif settings.schedule == "step":
        after = optax.piecewise_constant_schedule(peak, {max(0, settings.decay_at - warmup): 0.1})
    else:
        after = optax.cosine_decay_schedule(peak, max(1, steps - warmup), alpha=settings.final_fraction)
    if warmup == 0:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def decays(params: Any) -> Any:
    """Which parameters weight decay touches: kernels and the token table, not norms, biases, positions or layer scales.

    The reference decides by the number of dimensions after FSDP has flattened them, which decays nothing; here it is
    by name.
    """

    def decayed(variable: nnx.Variable) -> bool:
        axes = [axis for axis in variable.get_metadata()["axes"] if axis != "layers"]
        return len(axes) >= 2 and "position" not in axes

    is_variable = lambda x: isinstance(x, nnx.Variable)
    return jax.tree.map(lambda v: v.replace(decayed(v)), params, is_leaf=is_variable)


def make_optimizer(settings: OptimizerSettings, schedule: optax.Schedule) -> optax.GradientTransformation:
    """AdamW (float32 moments) after clipping by the global norm (0 = no clipping)."""
    adamw = optax.adamw(
        schedule,
        b1=settings.b1,
        b2=settings.b2,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        mask=decays if settings.weight_decay and not settings.decay_all else None,
    )
    if settings.clip_norm:
        return optax.chain(clip_by_global_norm(settings.clip_norm), adamw)
    return optax.chain(optax.identity(), adamw)


def average(ema: Any, params: Any, step: Any, decay: float) -> Any:
    """Returns the moving average of the weights after one more update.

    Args:
        ema: The average so far, a tree of `params`.
        params: The weights after the update.
        step: int [], updates before this one. The decay is min(decay, (1 + step) / (10 + step)), so that the first
            weights do not weigh on the average for long (`tf.train.ExponentialMovingAverage` with `num_updates`).
        decay: Its largest value.
    """
    return optax.incremental_update(params, ema, 1 - jnp.minimum(decay, (1 + step) / (10 + step)))


def clip_by_global_norm(limit: float) -> optax.GradientTransformation:
    """As `torch.nn.utils.clip_grad_norm_`: the scale is limit / (norm + 1e-6), never above 1."""

    def update(grads, state, params=None):
        scale = jnp.minimum(1.0, limit / (optax.tree.norm(grads) + 1e-6))
        return jax.tree.map(lambda g: g * scale.astype(g.dtype), grads), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
