"""Twenty steps of the real PyTorch training, from the same weights on the same batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import OPTIMISED, golden
from ml_collections import ConfigDict

from openvla_jax.checkpoint.reading import load_contract, load_params
from openvla_jax.convert import import_weights
from openvla_jax.data.batches import Batch
from openvla_jax.models.tree import with_shardings
from openvla_jax.parallel.sharding import global_batch, make_mesh
from openvla_jax.training.optimizer import make_optimizer, make_schedule
from openvla_jax.training.state import TrainState, abstract_state
from openvla_jax.training.step import make_train_step

ADAMW = ConfigDict(
    dict(learning_rate=2e-4, schedule="constant", warmup_steps=0, final_fraction=0.0, weight_decay=0.0,
         b1=0.9, b2=0.999, eps=1e-8, clip_norm=1.0)
)  # fmt: skip


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
    step = make_train_step(model, optimizer, schedule, mesh, dtype=jnp.float32, datasets=1)
    step = jax.jit(step, out_shardings=(placed, None), compiler_options=OPTIMISED)

    batches = []
    for ids, labels, image in zip(expected["input_ids"], expected["labels"], pixels, strict=True):
        positions = np.stack([np.flatnonzero(row != -100) for row in labels]).astype(np.int32)
        assert positions.shape == (4, 8)
        mask, dataset = np.ones(positions.shape, bool), np.zeros(4, np.int32)
        batch = Batch(image.transpose(0, 2, 3, 1), ids.astype(np.int32), positions, mask, dataset)
        batches.append(global_batch(batch, mesh))
    metrics = []
    for i in range(20):
        state, got = step(state, batches[i % 2])
        metrics.append(jax.device_get(got))
    np.testing.assert_allclose([m["loss"] for m in metrics], expected["loss"], rtol=1e-4)
    np.testing.assert_allclose([m["grad_norm"] for m in metrics], expected["grad_norm"], rtol=1e-3)
    np.testing.assert_allclose([m["action_accuracy"] for m in metrics], expected["accuracy"], atol=1e-6)
