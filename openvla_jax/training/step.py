"""One training step and one evaluation step, as pure functions to be compiled."""

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from openvla_jax.config import VLAConfig
from openvla_jax.errors import InputError
from openvla_jax.models.heads import ActionHead, make_head, summarize
from openvla_jax.models.openvla import OpenVLA
from openvla_jax.models.tuning import FULL, Tuning, make_graph
from openvla_jax.parallel.execution import PLAIN, Execution
from openvla_jax.parallel.sharding import BATCH
from openvla_jax.settings import AugmentConfig, Settings
from openvla_jax.training.optimizer import average, make_optimizer, make_schedule
from openvla_jax.training.state import TrainState, abstract_state
from openvla_jax.types import ActionSpec, Batch
from openvla_jax.vision.augment import augment

Metrics = dict[str, Array]
DEFAULT_ACTION = ActionSpec()


def loss_and_sums(
    model: OpenVLA,
    batch: Batch,
    head: ActionHead,
    datasets: int,
    execution: Execution = PLAIN,
    keys: Array | None = None,
    *,
    evaluate: bool = False,
) -> tuple[Array, Metrics]:
    """Returns the head's summed loss over the batch, and its sums for the metrics by dataset, each [datasets].

    Images are uint8; floating ones are taken as normalised already. `keys` [B] are for what a head draws for each row;
    None takes fixed ones. With `evaluate` chunks are predicted as a policy does, for metrics.
    """
    floating = jnp.issubdtype(batch.images.dtype, jnp.floating)
    pixels = batch.images if floating else model.normalize(batch.images)
    keys = row_keys(jax.random.key(0), jnp.arange(batch.images.shape[0])) if keys is None else keys
    if evaluate:
        per_row = head.evaluate(model, pixels, batch, execution, keys)
        loss = per_row["loss"].sum()
    else:
        loss, per_row = head.loss(model, pixels, batch, execution, keys)
    in_dataset = jax.nn.one_hot(batch.dataset, datasets)
    sums = {name: jnp.matmul(row, in_dataset, precision=jax.lax.Precision.HIGHEST) for name, row in per_row.items()}
    return loss, sums


def row_keys(key: Array, rows: Array) -> Array:
    """Returns a key for each row [B] of a batch, by its number: the same however the batch is divided."""
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)


def make_forward(
    model: VLAConfig,
    head: ActionHead,
    execution: Execution,
    *,
    dtype,
    datasets: int,
    tuning: Tuning = FULL,
    evaluate: bool = False,
) -> Callable[..., tuple[Array, Metrics]]:
    """Makes `(params, frozen, batch, keys=None, dropout_key=None) -> (summed loss, sums)` of `loss_and_sums`.

    The train step and the eval step both run this function, so they agree in sharding, kernels and padding.

    Args:
        model: The model's config.
        head: What the model predicts with.
        execution: How the model runs; it needs a mesh.
        dtype: Of activations and products.
        datasets: Number of datasets that the sums are split by.
        tuning: Which parameters are in `params`, and which are in `frozen`.
        evaluate: Predict chunks as a policy does, for metrics.
    """
    graph, mesh = make_graph(model, dtype, tuning), execution.mesh
    if mesh is None:
        raise ValueError("execution has no mesh: a step needs one; pass Execution(make_mesh({'fsdp': 1}, devices))")
    # Not beside adapters or frozen parts, which keep their widths, nor across chips that share an MLP.
    everything = tuning.trainable == FULL.trainable and tuning.lora is None and mesh.shape["tensor"] == 1
    whole_lanes = everything and mesh.devices.flat[0].platform == "tpu"

    def forward(
        params: nnx.State, frozen: nnx.State, batch: Any, keys: Array | None = None, dropout_key: Array | None = None
    ):
        params = pad_to_lanes(params) if whole_lanes else params
        network = nnx.merge(graph, params, frozen)
        own = execution.with_dropout_key(dropout_key)
        return loss_and_sums(network, batch, head, datasets, own, keys, evaluate=evaluate)

    return forward


def make_train_step(
    model: VLAConfig,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    execution: Execution,
    *,
    dtype,
    datasets: int,
    accumulation: int = 1,
    augment: Callable[[Array, Array], Array] | None = None,
    seed: int = 0,
    tuning: Tuning = FULL,
    action: ActionSpec = DEFAULT_ACTION,
    ema: float | None = None,
) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
    """Makes `(state, batch) -> (state, metrics)` on the global batch.

    Gradients, with respect to `state.params` alone, of the mean loss over all targets of the global batch, in
    `accumulation` parts that are summed in float32; the result does not depend on the number of parts, devices or
    hosts beyond rounding. `augment(key, images)` runs on the device, keyed by seed and step. A step whose loss or
    gradient is not finite changes neither parameters nor optimiser state, and says so: metric `skipped`. `execution`
    needs a mesh; its dropout key is not used, as the step draws one from `seed` and its number. `ema` is the decay of
    the state's average (`optimizer.average`), None for a state without one.
    """
    head = make_head(model, action)
    forward = make_forward(model, head, execution, dtype=dtype, datasets=datasets, tuning=tuning)
    mesh = cast(Mesh, execution.mesh)
    drops = tuning.lora is not None and tuning.lora.dropout > 0

    def part_loss(
        params: nnx.State, frozen: nnx.State, batch: Any, keys: Array, total: Array, dropout_key: Array
    ) -> tuple[Array, Metrics]:
        loss, sums = forward(params, frozen, batch, keys, dropout_key if drops else None)
        return loss / total, sums

    def train_step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        batch = jax.lax.with_sharding_constraint(batch, NamedSharding(mesh, BATCH))
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        if augment is not None:
            with jax.named_scope("augment"):
                batch = batch._replace(images=augment_cameras(augment, key, batch.images))
        dropout_keys = jax.random.split(jax.random.fold_in(key, 1), accumulation)
        keys, total = row_keys(jax.random.fold_in(key, 2), jnp.arange(batch.images.shape[0])), head.targets(batch)
        gradient = jax.grad(part_loss, has_aux=True)
        if accumulation == 1:
            grads, sums = gradient(state.params, state.frozen, batch, keys, total, dropout_keys[0])
        else:
            # Rows are dealt out in turn, so that each part spans all devices without moving data.
            split = lambda x: x.reshape(x.shape[0] // accumulation, accumulation, *x.shape[1:]).swapaxes(0, 1)
            parts = jax.lax.with_sharding_constraint(jax.tree.map(split, batch), NamedSharding(mesh, P(None, *BATCH)))

            def add(carry, scanned):
                part, keys, dropout_key = scanned
                grads = gradient(state.params, state.frozen, part, keys, total, dropout_key)
                return jax.tree.map(jnp.add, carry, grads), None

            scanned = (parts, split(keys), dropout_keys)
            part, *rest = jax.tree.map(lambda x: x[0], scanned)
            shapes = jax.eval_shape(gradient, state.params, state.frozen, part, rest[0], total, rest[1])
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            (grads, sums), _ = jax.lax.scan(add, zeros, scanned)
        metrics = summarize(head, sums) | {"grad_norm": optax.tree.norm(grads), "learning_rate": schedule(state.step)}
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
            keep = lambda new, old: jnp.where(finite, new, old)
            params, opt_state = jax.tree.map(keep, (params, opt_state), (state.params, state.opt_state))
            averaged = None
            if ema is not None:
                averaged = jax.tree.map(keep, average(state.ema, params, state.step, ema), state.ema)
        return TrainState(state.step + 1, params, opt_state, state.frozen, averaged), metrics | {"skipped": ~finite}

    return train_step


def augment_cameras(augment: Callable[[Array, Array], Array], key: Array, images: Array) -> Array:
    """Augments images [B, C, H, W, 3]; every camera of a row gets its own draws."""
    return augment(key, rearrange(images, "B C H W c -> (B C) H W c")).reshape(images.shape)


def pad_to_lanes(params: nnx.State, lanes: int = 128) -> nnx.State:
    """Returns kernels with MLP widths and vocabulary padded with zeros to whole TPU lanes, if that adds less than 2%.

    Products of whole lanes are faster on TPUs, by their compiler's estimate (docs/performance.md). Gradients come back
    in the parameters' shapes, and what the model computes stays the same: `Llama.logits` drops columns without a token.
    """

    def pad(param: nnx.Param) -> nnx.Variable:
        widths = [(0, 0)] * param.ndim
        for axis, (size, name) in enumerate(zip(param.shape, param.axes, strict=True)):
            if (name == "mlp" or (name == "vocab" and axis == param.ndim - 1)) and -size % lanes < 0.02 * size:
                widths[axis] = (0, -size % lanes)
        return param.replace(jnp.pad(param[...], widths))

    return jax.tree.map(pad, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def make_tuning(config: Settings) -> Tuning:
    """Returns what a config trains and freezes. Raises InputError for settings that contradict each other."""
    patterns = tuple(part.strip() for part in config.trainable.split(",") if part.strip())
    if config.quantize and patterns == FULL.trainable:
        raise InputError("quantize needs frozen weights: train adapters (lora.rank, trainable='*/lora') or name parts")
    return Tuning(patterns, config.lora if config.lora.rank else None, config.frozen_dtype, config.quantize or None)


@dataclasses.dataclass(frozen=True)
class Job:
    """What a config makes of a model on a mesh: two jitted functions, and the shapes and shardings of their state.

    The training loop runs both functions and the planner compiles both, so that a plan is of the same programs.
    """

    tuning: Tuning
    head: ActionHead
    optimizer: optax.GradientTransformation
    abstract: TrainState
    placed: TrainState
    execution: Execution  # of the step; the evaluation recomputes and drops nothing
    step: Any  # jitted `(state, batch) -> (state, metrics)`, which donates the state
    evaluate: Any  # jitted `(params, frozen, batch) -> sums`


def make_job(
    config: Settings,
    model: VLAConfig,
    mesh: Mesh,
    datasets: int,
    compiler_options: dict[str, str] | None = None,
    action: ActionSpec = DEFAULT_ACTION,
) -> Job:
    """Returns the job of a config (see `settings.py`). No arrays are made."""
    train, dtype, tuning = config.train, jnp.dtype(config.train.dtype), make_tuning(config)
    schedule = make_schedule(config.optimizer, train.steps)
    optimizer = make_optimizer(config.optimizer, schedule)
    ema = config.optimizer.ema
    abstract, placed = abstract_state(model, dtype, optimizer, mesh, tuning, averaged=ema is not None)
    kernels = train.kernels and mesh.devices.flat[0].platform == "tpu"
    execution = Execution(mesh, kernels, train.remat)
    step = make_train_step(
        model, optimizer, schedule, execution, dtype=dtype, datasets=datasets, accumulation=train.accumulation,
        augment=make_augment(config.augment), seed=config.seed, tuning=tuning, action=action, ema=ema,
    )  # fmt: skip
    evaluate = make_eval_step(model, execution, dtype=dtype, datasets=datasets, tuning=tuning, action=action)
    rows, everywhere = NamedSharding(mesh, BATCH), NamedSharding(mesh, P())  # every host reads the metrics
    step = jax.jit(step, donate_argnums=0, out_shardings=(placed, everywhere), compiler_options=compiler_options)
    evaluate = jax.jit(
        evaluate, in_shardings=(placed.params, placed.frozen, rows), out_shardings=everywhere,
        compiler_options=compiler_options,
    )  # fmt: skip
    return Job(tuning, make_head(model, action), optimizer, abstract, placed, execution, step, evaluate)


def make_augment(config: AugmentConfig) -> Callable[[Array, Array], Array] | None:
    """Returns `augment(key, images)` as configured, or None if it is disabled."""
    return (lambda key, images: augment(key, images, config)) if config.enabled else None


def make_eval_step(
    model: VLAConfig,
    execution: Execution,
    *,
    dtype,
    datasets: int,
    tuning: Tuning = FULL,
    action: ActionSpec = DEFAULT_ACTION,
) -> Callable[[nnx.State, nnx.State, Any], Metrics]:
    """Makes `(params, frozen, batch) -> sums`, to be added over batches and passed to `heads.summarize`.

    It runs under the mesh and the kernels of `execution`, without rematerialisation or dropout.
    """
    without_remat = dataclasses.replace(execution, remat="none")
    head = make_head(model, action)
    forward = make_forward(model, head, without_remat, dtype=dtype, datasets=datasets, tuning=tuning, evaluate=True)

    def eval_step(params: nnx.State, frozen: nnx.State, batch: Any) -> Metrics:
        batch = jax.lax.with_sharding_constraint(batch, NamedSharding(cast(Mesh, execution.mesh), BATCH))
        return forward(params, frozen, batch)[1]

    return eval_step
