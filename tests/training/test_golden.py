"""Twenty steps of the real PyTorch training, from the same weights on the same batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import OPTIMISED, golden

from openvla_jax.checkpoint.reading import load_contract, load_params
from openvla_jax.convert import import_weights
from openvla_jax.models.tree import with_shardings
from openvla_jax.parallel.execution import Execution
from openvla_jax.parallel.sharding import global_batch, make_mesh
from openvla_jax.settings import OptimizerSettings
from openvla_jax.training.optimizer import make_optimizer, make_schedule
from openvla_jax.training.state import TrainState, abstract_state
from openvla_jax.training.step import make_train_step
from openvla_jax.types import Batch

ADAMW = OptimizerSettings(learning_rate=2e-4)


@pytest.mark.slow
def test_twenty_steps_give_the_losses_of_pytorch(tmp_path):
    import_weights(golden("openvla_tiny"), tmp_path / "start")
    with np.load(golden("openvla_tiny") / "train_expected.npz", allow_pickle=False) as arrays:
        expected = dict(arrays)
    shape = (2, 4, 6, 224, 224)
    pixels = np.random.default_rng(int(expected["pixel_seed"])).standard_normal(shape, dtype=np.float32) * 0.5

    model = load_contract(tmp_path / "start").model
    mesh = make_mesh({}, jax.devices()[:1])
    schedule = make_schedule(ADAMW, 20)
    optimizer = make_optimizer(ADAMW, schedule)
    abstract, placed = abstract_state(model, jnp.float32, optimizer, mesh)
    params = load_params(tmp_path / "start", with_shardings(abstract.params, placed.params))
    state = jax.device_put(TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params)), placed)
    step = make_train_step(model, optimizer, schedule, Execution(mesh), dtype=jnp.float32, datasets=1)
    step = jax.jit(step, out_shardings=(placed, None), compiler_options=OPTIMISED)

    batches = []
    for ids, labels, image in zip(expected["input_ids"], expected["labels"], pixels, strict=True):
        positions = np.stack([np.flatnonzero(row != -100) for row in labels]).astype(np.int32)
        assert positions.shape == (4, 8)
        mask, dataset = np.ones(positions.shape, bool), np.zeros(4, np.int32)
        batch = Batch(
            images=image.transpose(0, 2, 3, 1)[:, None],
            image_mask=np.ones((4, 1), bool),
            state=None,
            tokens=ids.astype(np.int32),
            target_positions=positions,
            target_mask=mask,
            actions=np.zeros((4, 1, 7), np.float32),
            action_mask=np.ones((4, 1, 7), bool),
            dataset=dataset,
        )
        batches.append(global_batch(batch, mesh))
    metrics = []
    for i in range(20):
        state, got = step(state, batches[i % 2])
        metrics.append(jax.device_get(got))
    np.testing.assert_allclose([m["loss"] for m in metrics], expected["loss"], rtol=1e-4)
    np.testing.assert_allclose([m["grad_norm"] for m in metrics], expected["grad_norm"], rtol=1e-3)
    np.testing.assert_allclose([m["action_accuracy"] for m in metrics], expected["accuracy"], atol=1e-6)
