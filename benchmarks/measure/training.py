"""A training step of our model on random weights and rows."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from training.batches import random_batch

from measure.models import fill
from openvla_jax.config import LoRAConfig, VLAConfig
from openvla_jax.models.tuning import FULL, MODES, Tuning
from openvla_jax.parallel.execution import Execution
from openvla_jax.parallel.sharding import global_batch, make_mesh
from openvla_jax.planning.train import model_flops
from openvla_jax.settings import OptimizerSettings
from openvla_jax.training.optimizer import make_optimizer, make_schedule
from openvla_jax.training.state import abstract_state
from openvla_jax.training.step import make_train_step

__all__ = ["FULL", "TEXT", "Step", "lora", "make_step", "model_flops", "rows"]
TEXT = 64


class Step(NamedTuple):
    run: Callable[[], None]  # runs a step and waits for it
    bytes: int  # memory of the compiled step
    compile_seconds: float


def rows(config: VLAConfig, number: int) -> Any:
    """Returns a batch of texts of at most 64 tokens, which end with an action of 7."""
    return random_batch(number, 0, config, TEXT)


def lora(rank: int, base_dtype: str, dtype: str) -> Tuning:
    """Returns adapters on every linear layer. The base has a float dtype, or is int8 or int4 with floats in `dtype`."""
    integers = base_dtype if base_dtype.startswith("int") else None
    return Tuning(MODES["lora"], LoRAConfig(rank), dtype if integers else base_dtype, integers)


def make_step(config: VLAConfig, tuning: Tuning, batch: Any, dtype: str, remat: str) -> Step:
    """Compiles the step, then makes its state. Raises MemoryError if they do not fit on the device."""
    mesh, settings = make_mesh({}, jax.devices()[:1]), OptimizerSettings()
    schedule = make_schedule(settings, 1000)
    optimizer = make_optimizer(settings, schedule)
    abstract, placed = abstract_state(config, jnp.dtype(dtype), optimizer, mesh, tuning)
    step = make_train_step(
        config, optimizer, schedule, Execution(mesh, remat=remat), dtype=jnp.dtype(dtype), datasets=2, tuning=tuning
    )
    batch = global_batch(batch, mesh)
    step = jax.jit(step, donate_argnums=0, out_shardings=(placed, None))
    shapes = jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), abstract, placed)
    began = time.perf_counter()
    compiled = step.lower(shapes, batch).compile()
    compile_seconds = time.perf_counter() - began
    memory = compiled.memory_analysis()
    needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit is not None and needed > limit:
        raise MemoryError(f"remat {remat} needs {needed / 1e9:.1f} GB, the device has {limit / 1e9:.1f} GB")
    params, frozen = fill(abstract.params), fill(abstract.frozen)
    state = abstract.replace(
        step=jnp.zeros((), jnp.int32), params=params, frozen=frozen, opt_state=jax.jit(optimizer.init)(params)
    )
    held = [jax.device_put(state, placed)]
    step = step if tuning.quantize == "int4" else compiled  # see training/setup.py

    def run() -> None:
        held[0], metrics = step(held[0], batch)
        assert np.isfinite(jax.device_get(metrics["loss"]))

    return Step(run, needed, compile_seconds)
