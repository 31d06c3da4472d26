"""Checkpoints: what is written comes back, on any mesh, and nothing else is taken for one."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training.batches import ONE_TOWER as MODEL
from training.batches import random_batch
from training.test_step import SETTINGS

from openvla_jax.checkpoint import checksums, reading
from openvla_jax.checkpoint.contract import CONFIG_FILE, CheckpointError, Contract
from openvla_jax.checkpoint.load import load_model
from openvla_jax.config import tiny
from openvla_jax.parallel.execution import Execution
from openvla_jax.parallel.sharding import global_batch, make_mesh
from openvla_jax.tokens.tokenizer import load_tokenizer
from openvla_jax.training import checkpoint
from openvla_jax.training.optimizer import make_optimizer, make_schedule
from openvla_jax.training.state import abstract_state, init_state
from openvla_jax.training.step import make_train_step

STATISTICS = {
    "toy": {"action": {"q01": [-1.0], "q99": [1.0], "mask": [True]}, "num_transitions": 3, "num_trajectories": 1}
}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tiny")


@pytest.fixture(scope="module")
def contract(tokenizer):
    return Contract(MODEL, tokenizer, STATISTICS, training={"seed": 1})


def setup(sizes):
    mesh = make_mesh(sizes)
    schedule = make_schedule(SETTINGS, 10)
    optimizer = make_optimizer(SETTINGS, schedule)
    abstract, placed = abstract_state(MODEL, jnp.float32, optimizer, mesh)
    step = make_train_step(MODEL, optimizer, schedule, Execution(mesh), dtype=jnp.float32, datasets=2)
    return mesh, optimizer, abstract, placed, jax.jit(step, out_shardings=(placed, None))


@pytest.fixture(scope="module")
def saved(tmp_path_factory, contract):
    """A run of two steps on an fsdp mesh, saved, and the losses with which it went on."""
    workdir = tmp_path_factory.mktemp("run")
    mesh, optimizer, _, placed, step = setup({"fsdp": -1})
    one = make_mesh({}, jax.devices()[:1])  # for which drawing initial values compiles faster
    state = jax.device_put(jax.device_get(init_state(MODEL, jnp.float32, optimizer, one, seed=0)), placed)
    for i in range(2):
        state, _ = step(state, global_batch(random_batch(8, i), mesh))
    checkpoints = checkpoint.Checkpoints(workdir, keep_last=2, keep_every=None)
    checkpoints.save(2, state, contract, unused={"dino": {"norm": {"scale": np.arange(5.0, dtype=np.float32)}}})
    checkpoints.close()
    host_state = jax.device_get(state)
    losses = []
    for i in range(2, 5):
        state, metrics = step(state, global_batch(random_batch(8, i), mesh))
        losses.append(float(metrics["loss"]))
    return workdir, host_state, losses


@pytest.mark.slow
def test_state_returns_bit_for_bit_and_goes_on_on_another_mesh(saved):
    workdir, host_state, losses = saved
    mesh, _, abstract, placed, step = setup({"data": 2, "fsdp": 2, "tensor": 2})
    state = checkpoint.restore_state(workdir, 2, abstract, placed)
    assert jax.tree.structure(state) == jax.tree.structure(abstract)
    for before, after, where in zip(
        jax.tree.leaves(host_state), jax.tree.leaves(state), jax.tree.leaves(placed), strict=True
    ):
        np.testing.assert_array_equal(before, after)
        assert after.sharding == where
    for i, loss in zip(range(2, 5), losses, strict=True):
        state, metrics = step(state, global_batch(random_batch(8, i), mesh))
        assert float(metrics["loss"]) == pytest.approx(loss, rel=1e-5)


def test_contract_returns(saved, contract, tokenizer):
    loaded = reading.load_contract(saved[0])
    assert loaded.model == contract.model
    assert loaded.statistics == STATISTICS
    assert loaded.preprocessing == contract.preprocessing
    assert loaded.training == {"seed": 1}
    text = "In: What action should the robot take to pick up the red cube?\nOut:"
    assert loaded.tokenizer(text).input_ids == tokenizer(text).input_ids


def test_model_loads_for_inference_in_another_dtype(saved):
    model, config = load_model(saved[0], dtype="bfloat16")
    assert config == MODEL
    kernel = model.llama.head.kernel[...]
    assert kernel.dtype == jnp.bfloat16
    np.testing.assert_array_equal(kernel, saved[1].params.llama.head.kernel[...].astype(jnp.bfloat16))


def test_what_is_read_at_a_time_is_bounded(saved, monkeypatch):
    whole, asked, load = load_model(saved[0])[0], [], checkpoint.ocp.load_checkpointables

    def spy(path, items):
        asked.append([leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(items)])
        return load(path, items)

    monkeypatch.setattr(checkpoint.ocp, "load_checkpointables", spy)
    monkeypatch.setattr(reading, "READ_BYTES", 2**16)
    parts = load_model(saved[0])[0]
    assert len(asked) > 3 and all(len(sizes) == 1 or sum(sizes) <= 2**16 for sizes in asked)
    jax.tree.map(np.testing.assert_array_equal, whole, parts)


def test_unused_tensors_travel_along(saved):
    np.testing.assert_array_equal(reading.load_unused(saved[0])["dino"]["norm"]["scale"], np.arange(5.0))


@pytest.mark.parametrize("below", ["", "checkpoints", "checkpoints/2"])
def test_a_checkpoint_is_found_from_every_level(saved, below):
    assert reading.open_checkpoint(saved[0] / below).name == "2"


def test_only_the_latest_are_kept_and_every_nth_for_good(tmp_path, contract):
    mesh, optimizer, *_ = setup({"fsdp": -1})
    state = init_state(MODEL, jnp.float32, optimizer, mesh, seed=0)
    checkpoints = checkpoint.Checkpoints(tmp_path, keep_last=1, keep_every=4)
    for step in range(2, 9, 2):
        checkpoints.save(step, state, contract)
    checkpoints.close()
    assert reading.steps_in(tmp_path / "checkpoints") == [4, 8]


def test_checksums_of_a_run_cover_all_its_items(saved):
    noted = json.loads((saved[0] / "checkpoints" / "2" / "checksums.json").read_text())["files"]
    assert {name.partition("/")[0] for name in noted} == {"params", "optimizer", "unused", "contract"}
    checksums.verify(saved[0] / "checkpoints" / "2")


@pytest.mark.parametrize("item", ["params", "optimizer"])
@pytest.mark.parametrize("damage", ["missing", "flipped"])
def test_restore_state_names_the_damaged_file(saved, tmp_path, item, damage):
    shutil.copytree(saved[0], tmp_path / "run")
    place = tmp_path / "run" / "checkpoints" / "2" / item / "manifest.ocdbt"
    content = bytearray(place.read_bytes())
    content[len(content) // 2] ^= 0xFF
    place.unlink()
    if damage == "flipped":
        place.write_bytes(content)
    mesh, optimizer = make_mesh({"fsdp": -1}), make_optimizer(SETTINGS, make_schedule(SETTINGS, 10))
    abstract, placed = abstract_state(MODEL, jnp.float32, optimizer, mesh)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.restore_state(tmp_path / "run", 2, abstract, placed)
    assert str(place) in str(caught.value) and "\n" not in str(caught.value)


def test_a_checkpoint_of_another_model_names_the_differences(saved):
    other = dataclasses.replace(tiny(base_vocab_size=900), towers=MODEL.towers)
    mesh, optimizer = make_mesh({"fsdp": -1}), make_optimizer(SETTINGS, make_schedule(SETTINGS, 10))
    abstract, _ = abstract_state(other, jnp.float32, optimizer, mesh)
    with pytest.raises(CheckpointError, match=r"embed/table has shape \(704, 64\), the model \(960, 64\)"):
        reading.load_params(saved[0], abstract.params)


def test_unfinished_and_foreign_directories_are_refused(tmp_path, saved):
    with pytest.raises(CheckpointError, match="does not exist"):
        reading.open_checkpoint(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(CheckpointError, match=r"holds: notes\.txt"):
        reading.open_checkpoint(tmp_path)
    unfinished = tmp_path / "checkpoints" / "7"
    (unfinished / "params").mkdir(parents=True)  # as a crash during a copy would leave it
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        reading.open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"no complete checkpoint of step 9; it has \[2\]"):
        reading.open_checkpoint(saved[0], step=9)


def test_a_checkpoint_without_its_commit_is_not_picked_up(tmp_path, saved):
    """In a bucket without renames a save has its final name from the start."""
    shutil.copytree(saved[0] / "checkpoints" / "2", tmp_path / "checkpoints" / "2")
    assert reading.steps_in(tmp_path / "checkpoints") == [2]
    notes = tmp_path / "checkpoints" / "2" / "_CHECKPOINT_METADATA"
    whole = json.loads(notes.read_text())
    assert whole["commit_timestamp_nsecs"]
    for text in (json.dumps(whole | {"commit_timestamp_nsecs": None}), notes.read_text()[:20]):
        notes.write_text(text)
        assert reading.steps_in(tmp_path / "checkpoints") == []
    notes.unlink()
    assert reading.steps_in(tmp_path / "checkpoints") == []


class Broken:
    """A save that fails: at once, or some time later."""

    def __init__(self, later):
        self._later = later

    def save_checkpointables_async(self, step, items, force):
        if not self._later:
            raise OSError(28, "No space left on device")
        return self

    def result(self, timeout=None):
        if self._later == "not yet":
            self._later = "now"
            raise TimeoutError
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device\n[source locations]")

    def close(self):
        raise ValueError("again")


def test_a_save_that_fails_is_known_at_the_next_step_tried_again_and_then_an_error(tmp_path, contract, monkeypatch):
    pauses = []
    monkeypatch.setattr(checkpoint, "pause", pauses.append)
    mesh, optimizer, *_ = setup({"fsdp": -1})
    state = init_state(MODEL, jnp.float32, optimizer, mesh, seed=0)
    checkpoints = checkpoint.Checkpoints(tmp_path, keep_last=2, keep_every=None)
    checkpoints.save(1, state, contract)
    assert not checkpoints.failed(wait=True)

    (tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp").mkdir()  # what a failure leaves behind
    checkpoints._checkpointer = Broken("not yet")
    checkpoints.save(2, state, contract)
    assert not checkpoints.failed()  # it is still under way
    assert checkpoints.failed()
    assert not (tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp").exists()
    checkpoints.save(3, state, contract)  # there is room again
    assert not checkpoints.failed(wait=True)
    assert reading.steps_in(tmp_path / "checkpoints") == [1, 3] and pauses == [1]

    for step, later in ((4, "now"), (5, ""), (6, "now")):
        checkpoints._checkpointer = Broken(later)
        checkpoints.save(step, state, contract)
        assert checkpoints.failed()
    checkpoints._checkpointer = Broken("now")
    checkpoints.save(7, state, contract)
    with pytest.raises(
        checkpoint.StorageError, match=r"saving step 7 failed, 4 times in a row \(RESOURCE_EXHAUSTED"
    ) as caught:
        checkpoints.failed()
    assert "the last good checkpoint is step 3" in str(caught.value) and "\n" not in str(caught.value)
    assert pauses == [1, 1, 2, 3]
    checkpoints.close()


def test_a_damaged_contract_says_so(tmp_path, contract):
    contract.save(tmp_path)
    (tmp_path / CONFIG_FILE).write_text('{"format": 1, "model": {')
    with pytest.raises(CheckpointError, match=r"config\.json: is not JSON"):
        Contract.load(tmp_path)
    (tmp_path / CONFIG_FILE).write_text(json.dumps({"format": 99}))
    with pytest.raises(CheckpointError, match="format 99, this version reads 1"):
        Contract.load(tmp_path)
