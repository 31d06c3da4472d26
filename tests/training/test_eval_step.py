"""The evaluation step on a mesh: the sums of one device, and the memory of each device's own rows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from training.batches import ONE_TOWER, random_batch

from openvla_jax.models.heads import TokenHead
from openvla_jax.models.openvla import OpenVLA
from openvla_jax.parallel.execution import Execution
from openvla_jax.parallel.sharding import BATCH, global_batch, make_mesh, shardings
from openvla_jax.training.step import make_eval_step, make_forward
from openvla_jax.types import ActionSpec

ROWS = 64
WIDE = dataclasses.replace(
    ONE_TOWER,
    towers=(dataclasses.replace(ONE_TOWER.towers[0], width=256, heads=4, mlp_dim=512),),
    llama=dataclasses.replace(ONE_TOWER.llama, width=256, heads=4, kv_heads=4, mlp_dim=512),
)


def one_device() -> Mesh:
    return make_mesh({"fsdp": 1}, jax.devices()[:1])


def run(mesh: Mesh, rows: int, dtype):
    """The compiled evaluation of `rows` random rows on a mesh, and the arguments for it."""
    params = nnx.state(jax.jit(lambda key: OpenVLA(WIDE, key))(jax.random.key(0)), nnx.Param)
    placed, frozen = shardings(params, mesh), nnx.State({})
    step = make_eval_step(WIDE, Execution(mesh), dtype=dtype, datasets=2)
    step = jax.jit(step, in_shardings=(placed, frozen, NamedSharding(mesh, BATCH)))
    arguments = jax.device_put(params, placed), frozen, global_batch(random_batch(rows, model=WIDE), mesh)
    return step.lower(*arguments).compile(), arguments


def test_evaluation_on_a_mesh_gives_the_sums_of_one_device():
    one, many = (run(mesh, 16, jnp.float32) for mesh in (one_device(), make_mesh({"data": 2, "fsdp": 4})))
    expected, found = (jax.device_get(step(*arguments)) for step, arguments in (one, many))
    assert expected["targets"].sum() == 16 * 8
    for name, sums in expected.items():
        np.testing.assert_allclose(found[name], sums, rtol=1e-5, err_msg=name)


def test_evaluation_needs_the_memory_of_a_devices_own_rows():
    """Without constraints the compiler gathers the batch: 18.5 MiB of temporaries for these rows instead of 5.3."""
    weights = sum(
        leaf.size * 2 for leaf in jax.tree.leaves(jax.eval_shape(lambda key: OpenVLA(WIDE, key), jax.random.key(0)))
    )
    alone, spread = (
        run(mesh, rows, jnp.bfloat16)[0].memory_analysis().temp_size_in_bytes
        for mesh, rows in ((one_device(), ROWS // 8), (make_mesh({"fsdp": 8}), ROWS))
    )
    assert spread < alone + weights


def test_eval_and_train_step_share_their_constraints():
    """The evaluation has every sharding constraint of the train step's forward pass, and that of the batch."""
    execution = Execution(make_mesh({"fsdp": 8}), remat="full")
    params = nnx.state(jax.eval_shape(lambda key: OpenVLA(WIDE, key), jax.random.key(0)), nnx.Param)
    arguments = params, nnx.State({}), random_batch(8, model=WIDE)
    count = lambda function: str(jax.make_jaxpr(function)(*arguments)).count("sharding_constraint[")
    forward = count(make_forward(WIDE, TokenHead(WIDE, ActionSpec()), execution, dtype=jnp.bfloat16, datasets=2))
    leaves = len(jax.tree.leaves(arguments[2]))
    assert count(make_eval_step(WIDE, execution, dtype=jnp.bfloat16, datasets=2)) == forward + leaves > leaves


def test_make_eval_step_rejects_an_execution_without_mesh():
    with pytest.raises(ValueError, match="execution has no mesh"):
        make_eval_step(WIDE, Execution(), dtype=jnp.float32, datasets=2)
