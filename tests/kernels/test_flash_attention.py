"""The attention kernel, interpreted on a CPU, against attention in float64; and in a whole training step."""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh
from training.batches import ONE_TOWER, random_batch

from openvla_jax.config import LoRAConfig
from openvla_jax.kernels import flash_attention as flash
from openvla_jax.models import vit
from openvla_jax.models.attention import attention, attention_kernel, rope
from openvla_jax.models.lora import LoRA
from openvla_jax.models.quantize import QTensor, quantize_array
from openvla_jax.models.stack import remat_policy
from openvla_jax.parallel.execution import PLAIN, Execution
from openvla_jax.parallel.sharding import global_batch, make_mesh
from openvla_jax.settings import OptimizerSettings
from openvla_jax.training.optimizer import make_optimizer, make_schedule
from openvla_jax.training.state import abstract_state, init_state
from openvla_jax.training.step import make_train_step

THETA = 10000.0


class Kind(NamedTuple):
    causal: bool
    rotated: bool
    masked: bool = False  # some keys are hidden from all queries


TOWER, LLAMA = Kind(False, False), Kind(True, True)
CASES = {  # length, heads, head dim, kind
    "llama": (320, 2, 128, LLAMA),
    "a length that is no multiple of anything": (77, 1, 128, LLAMA),
    "a chunk at once, with pads": (140, 2, 128, Kind(False, True, masked=True)),
    "a camera that a row does not have": (150, 2, 128, Kind(True, True, masked=True)),
    "siglip": (256, 16, 72, TOWER),
    "dino, with its prefix": (261, 2, 64, TOWER),
    "fewer keys than a register": (5, 2, 64, TOWER),
}


def one_device() -> Mesh:
    return make_mesh({"fsdp": 1}, jax.devices()[:1])


def inputs(length, heads, dim, rows=2):
    """q, k, v and the gradient of the result, [B, T, N, H], rounded to bfloat16 and kept in float64."""
    draws = np.random.default_rng(length).standard_normal((4, rows, length, heads, dim))
    draws[:2] *= 2.0  # some weights near 1
    return draws.astype(ml_dtypes.bfloat16).astype(np.float64)


def shown(q, kind: Kind):
    """Which keys [B, T] are not hidden: not a stretch in the middle, of another length in each row, nor the last."""
    rows, length = q.shape[:2]
    keys = np.ones((rows, length), bool)
    if kind.masked:
        for row in range(rows):
            keys[row, 3 : 40 + 30 * row] = False
            keys[row, length - 5 - row :] = False
    return keys


def exact(q, k, v, gradient, kind):
    """Attention [B, T, N, H] and the gradients of q, k and v in float64, written out."""
    length, dim = q.shape[1], q.shape[-1]
    angles = np.arange(length)[:, None] * THETA ** (-np.arange(dim // 2) / (dim // 2))
    # Cosine and sine are rounded, as the reference does.
    cos, sin = (np.tile(f(angles), 2).astype(ml_dtypes.bfloat16).astype(np.float64) for f in (np.cos, np.sin))
    cos, sin = cos[:, None], sin[:, None]
    half = lambda x: np.concatenate([-x[..., dim // 2 :], x[..., : dim // 2]], axis=-1)
    turn = (lambda x, s: x * cos + half(x) * s) if kind.rotated else (lambda x, s: x)
    q, k = turn(q, sin), turn(k, sin)
    scores = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(dim)
    scores = np.where(shown(q, kind)[:, None, None], scores, -np.inf)
    if kind.causal:
        scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    mixed = np.einsum("bnts,bsnh->btnh", weights, v)
    to_v = np.einsum("bnts,btnh->bsnh", weights, gradient)
    to_weights = np.einsum("btnh,bsnh->bnts", gradient, v)
    to_scores = weights * (to_weights - (weights * to_weights).sum(-1, keepdims=True)) / np.sqrt(dim)
    to_q = turn(np.einsum("bnts,bsnh->btnh", to_scores, k), -sin)
    to_k = turn(np.einsum("bnts,btnh->bsnh", to_scores, q), -sin)
    return mixed, to_q, to_k, to_v


def by_compiler(q, k, v, kind):
    positions = jnp.arange(q.shape[1])[None]
    if kind.rotated:
        q, k = rope(q, positions, THETA), rope(k, positions, THETA)
    mask = jnp.ones((1, q.shape[1], q.shape[1]), bool)
    mask = jnp.tril(mask) if kind.causal else mask
    return attention(q, k, v, mask & shown(q, kind)[:, None])


def by_kernel(q, k, v, kind, mesh=None, merged=False):
    batch, length, heads, dim = q.shape
    flat = [x.reshape(batch, length, heads * dim) for x in (q, k, v)]
    execution = Execution(mesh or one_device(), kernels=True)
    keys = jnp.asarray(shown(q, kind)) if kind.masked else None
    theta = THETA if kind.rotated else None
    kernel = attention_kernel(flat[0], heads, execution, causal=kind.causal, theta=theta, keys=keys)
    assert kernel is not None
    assert kernel.takes_merged or not merged
    return kernel(*([jnp.concatenate(flat, axis=-1)] if merged else flat)).reshape(q.shape)


def with_gradients(function, arrays, kind):
    q, k, v, gradient = (jnp.asarray(x, jnp.bfloat16) for x in arrays)

    @jax.jit
    def run(q, k, v, gradient):
        mixed, back = jax.vjp(lambda *x: function(*x, kind), q, k, v)
        return mixed, *back(gradient)

    return [np.asarray(x, np.float64) for x in run(q, k, v, gradient)]


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.long) if case == "siglip" else case for case in CASES]
)
def test_results_and_gradients_are_as_near_to_float64_as_the_compilers(case):
    length, heads, dim, kind = CASES[case]
    arrays = inputs(length, heads, dim)
    truth = exact(*arrays, kind)
    ours = with_gradients(by_kernel, arrays, kind)
    if not kind.masked:
        merged = with_gradients(partial(by_kernel, merged=True), arrays, kind)
        assert all(np.array_equal(one, other) for one, other in zip(merged, ours, strict=True))
    theirs = with_gradients(by_compiler, arrays, kind)
    for name, exactly, our, their in zip(("result", "q", "k", "v"), truth, ours, theirs, strict=True):
        distance = lambda x, exactly=exactly: np.linalg.norm(x - exactly) / np.linalg.norm(exactly)
        assert distance(our) < 0.012, name
        assert distance(our) < 1.2 * distance(their), name


def test_what_no_position_holds_does_not_matter():
    """Behind the last position lies whatever the memory held: interpreted, that is NaN."""
    arrays = inputs(5, 2, 64)
    assert all(np.isfinite(x).all() for x in with_gradients(by_kernel, arrays, TOWER))
    arrays = inputs(130, 1, 128)
    assert all(np.isfinite(x).all() for x in with_gradients(by_kernel, arrays, LLAMA))
    for causal in (False, True):
        kind = Kind(causal, True, masked=True)
        assert all(np.isfinite(x).all() for x in with_gradients(by_kernel, arrays, kind))


@pytest.mark.parametrize(("kind", "merged"), [(TOWER, False), (TOWER, True), (Kind(False, False, masked=True), False)])
def test_rows_stay_on_their_chips(kind, merged):
    arrays = inputs(48, 2, 64, rows=8)
    spread = partial(by_kernel, mesh=make_mesh({"data": 2, "fsdp": 4}), merged=merged)
    for one, many in zip(with_gradients(by_kernel, arrays, kind), with_gradients(spread, arrays, kind), strict=True):
        assert np.linalg.norm(many - one) < 0.005 * np.linalg.norm(one)  # rounding is the compiler's


def test_what_a_kernel_does_not_take():
    mesh = one_device()
    x = jnp.zeros((1, 64, 256), jnp.bfloat16)
    assert flash.fits(x, 2, True, False, mesh)
    assert flash.fits(x, 2, True, True, mesh)
    assert not flash.fits(x.astype(jnp.float32), 2, True, False, mesh)
    assert not flash.fits(x, 4, True, False, mesh), "heads of 64 are not rotated"
    assert not flash.fits(jnp.zeros((1, 64, 72), jnp.bfloat16), 1, False, False, mesh), "lanes left over"
    assert not flash.fits(jnp.zeros((1, 3000, 4096), jnp.bfloat16), 32, True, False, mesh), "more keys than fit"
    tensor = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    for execution in (PLAIN, Execution(kernels=True), Execution(mesh), Execution(tensor, kernels=True)):
        assert attention_kernel(x, 2, execution, causal=True) is None
    assert attention_kernel(x, 2, Execution(mesh, kernels=True), causal=True) is not None


def test_many_heads_are_not_taken_together():
    execution = Execution(one_device(), kernels=True)
    assert not attention_kernel(jnp.zeros((1, 64, 2048), jnp.bfloat16), 16, execution, causal=True).takes_merged


@pytest.mark.parametrize(("policy", "kept"), [("full", 0), ("gate", 0), ("q", 1), ("k", 1), ("q,k,v", 1)])
def test_merged_projections_are_kept_once_by_any_of_their_names(capsys, policy, kept):
    x = jnp.ones((2, 16, 256), jnp.bfloat16)
    kernel = attention_kernel(x, 2, Execution(one_device(), kernels=True), causal=False)
    mixed = lambda x: kernel(jnp.concatenate([x, jnp.sin(x), jnp.cos(x)], axis=-1)).sum()
    jax.ad_checkpoint.print_saved_residuals(jax.checkpoint(mixed, policy=remat_policy(policy)), x)
    assert capsys.readouterr().out.count("[2,16,768]") == kept


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("adapted", [False, True])
def test_a_towers_projections_are_the_same_merged(stored, adapted):
    """Over eight devices; where there are gradients, these too."""
    tower = dataclasses.replace(ONE_TOWER.towers[0], width=256, heads=4)
    keys = jax.random.split(jax.random.key(0), 6)
    module = vit.Attention(keys[0], tower, None)
    for key, layer in zip(keys[1:], (module.q, module.k, module.v), strict=False):
        layer.bias[...] = jax.random.normal(key, (256,))
        if stored == "bfloat16":
            layer.kernel[...] = layer.kernel[...].astype(jnp.bfloat16)
        if stored == "int8":
            layer.kernel = QTensor(*map(nnx.Param, quantize_array(layer.kernel[...], stored)))
    if adapted:
        adapter = LoRA(keys[4], LoRAConfig(rank=4), "qkv", (256, 768))
        adapter.b[...] = jax.random.normal(keys[4], (4, 768))
        module.qkv = nnx.Dict(lora=adapter)
    x = jax.random.normal(keys[5], (8, 16, 256), jnp.bfloat16)

    def run(kernels):
        def value(module, x):
            return module(x, None, Execution(make_mesh({"data": 2, "fsdp": 4}), kernels))

        @jax.jit
        def value_and_gradients(module, x):
            if stored == "int8":
                return value(module, x)
            mixed, back = jax.vjp(value, module, x)
            to_module, to_x = back(jnp.cos(mixed))
            to_module.k.bias[...] = jnp.zeros(256)  # what a bias of keys gets is rounding: softmax does not see it
            return mixed, to_module, to_x

        return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(value_and_gradients(module, x))]

    for one, other in zip(run(True), run(False), strict=True):
        assert np.linalg.norm(one - other) <= 0.05 * np.linalg.norm(other)


@pytest.mark.long
def test_a_training_step_with_kernels_is_one_without(monkeypatch):
    """The tower and the language model both run as kernels, over eight devices, recomputing what is not kept."""
    tower, llama = ONE_TOWER.towers[0], ONE_TOWER.llama
    tower = dataclasses.replace(tower, width=128, heads=2, depth=3)
    llama = dataclasses.replace(llama, width=256, heads=2, kv_heads=2, depth=2)
    model = dataclasses.replace(ONE_TOWER, towers=(tower,), llama=llama)
    settings = OptimizerSettings(learning_rate=1e-3)
    schedule = make_schedule(settings, 10)
    optimizer, mesh = make_optimizer(settings, schedule), make_mesh({"data": 2, "fsdp": 4})
    _, placed = abstract_state(model, jnp.bfloat16, optimizer, mesh)
    state = init_state(model, jnp.bfloat16, optimizer, mesh, seed=3)
    batch = global_batch(random_batch(8, model=model), mesh)
    called, call = [], flash.flash_attention
    monkeypatch.setattr(flash, "flash_attention", lambda *arguments: called.append(1) or call(*arguments))

    def run(kernels):
        step = make_train_step(
            model, optimizer, schedule, Execution(mesh, kernels, "attention,gate,up"), dtype=jnp.bfloat16, datasets=2
        )
        after, metrics = jax.jit(step, out_shardings=(placed, None))(state, batch)
        return jax.device_get((after.opt_state, metrics["loss"], metrics["grad_norm"]))

    without = run(False)
    assert not called
    with_kernels = run(True)
    assert len(called) == 2, "one in the tower's layers, one in the language model's"
    np.testing.assert_allclose(with_kernels[1:], without[1:], rtol=5e-3)
    pairs = list(zip(jax.tree.leaves(with_kernels[0]), jax.tree.leaves(without[0]), strict=True))
    largest = max(np.linalg.norm(other) for _, other in pairs)
    for one, other in pairs:  # the key biases' gradients are rounding errors of much larger terms
        assert np.linalg.norm(one - other) <= 0.1 * np.linalg.norm(other) + 1e-3 * largest
