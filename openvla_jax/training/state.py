"""The training state: step, parameters, optimiser state. Made abstractly first, then initialised already sharded."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct
from jax.sharding import Mesh

from openvla_jax.config import VLAConfig
from openvla_jax.models.openvla import OpenVLA
from openvla_jax.models.tuning import FULL, Tuning
from openvla_jax.parallel.sharding import shardings


@struct.dataclass
class TrainState:
    """A pytree; `params` and the Adam moments are `nnx.State`s of float32 `nnx.Param`s with logical axes. `frozen`
    holds what is not trained, in the dtypes that `Tuning` says, and has neither gradient nor optimiser state. `ema` is
    the moving average of `params`, or None if the run keeps none.

    The same structure holds arrays, shapes or shardings, hence the loose types.
    """

    step: Any  # int32 []
    params: Any
    opt_state: Any
    frozen: Any = dataclasses.field(default_factory=lambda: nnx.State({}))
    ema: Any = None

    @property
    def acting(self) -> Any:
        """The trained weights that a policy acts with: their average, if there is one."""
        return self.params if self.ema is None else self.ema


def fresh_state(params: Any, frozen: Any, optimizer: optax.GradientTransformation, averaged: bool) -> TrainState:
    """Returns the state before the first step. An average begins as a copy of the weights."""
    ema = jax.tree.map(jnp.copy, params) if averaged else None
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), frozen, ema)


def make_init(
    model: VLAConfig, dtype, optimizer: optax.GradientTransformation, tuning: Tuning = FULL, averaged: bool = False
) -> Callable[[jax.Array], TrainState]:
    """A jittable function from a key to a fresh state."""

    def init(key: jax.Array) -> TrainState:
        _, params, frozen = tuning.split(tuning.prepare(OpenVLA(model, key, dtype), key))
        return fresh_state(params, frozen, optimizer, averaged)

    return init


def abstract_state(
    model: VLAConfig,
    dtype,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    tuning: Tuning = FULL,
    averaged: bool = False,
) -> tuple[TrainState, TrainState]:
    """Shapes and shardings of the state (two trees of one structure); no arrays are made."""
    state = jax.eval_shape(make_init(model, dtype, optimizer, tuning, averaged), jax.random.key(0))
    return state, shardings(state, mesh)


def init_state(
    model: VLAConfig,
    dtype,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    seed: int,
    tuning: Tuning = FULL,
    averaged: bool = False,
) -> TrainState:
    """A fresh state, every leaf created on the devices that hold it."""
    _, placed = abstract_state(model, dtype, optimizer, mesh, tuning, averaged)
    init = make_init(model, dtype, optimizer, tuning, averaged)
    return jax.jit(init, out_shardings=placed)(jax.random.key(seed))
