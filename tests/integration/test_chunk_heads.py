"""Runs with heads that predict a chunk at once, from the config to the policy that acts."""

import sys

import numpy as np
import pytest
from conftest import ROOT, on_one_device

sys.path.insert(0, str(ROOT / "tests" / "data"))
import fake_rlds
import frozen
from test_cameras import MODULE, STATE

from openvla_jax import Observation, Policy
from openvla_jax.errors import InputError
from openvla_jax.training import loop
from openvla_jax.training.metrics import read_metrics


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chunks")
    episodes = [fake_rlds.two_cameras(i) for i in range(6)]
    splits = {"train": [episodes[:5]], "val": [episodes[5:]]}
    fake_rlds.write(folder / "data", splits, name="two", schema=fake_rlds.two_camera_features())
    (folder / "mine.py").write_text(MODULE)
    return folder


def settings(folder, **changes):
    config = frozen.settings(folder)
    config.data.update(dict(dataset="two", module=str(folder / "mine.py"), text_length=96))
    config.data.statistics_dir = str(folder / "statistics")
    config.update_from_flattened_dict(
        {
            "observation.cameras": ("primary", "wrist"), "observation.state": STATE, "action.horizon": 3,
            "action.executed": 3, "action.dim": 7, "film": True, "train.steps": 2, "train.checkpoint_every": 2,
            "train.eval_every": 2, "train.eval_batches": 1, "augment.enabled": True,
        } | changes
    )  # fmt: skip
    return config


@pytest.mark.long
@pytest.mark.parametrize("head", ["l1", "diffusion", "parallel_tokens"])
def test_run_with_a_chunk_head_trains_and_acts(folder, tmp_path, monkeypatch, head):
    on_one_device(monkeypatch)
    loop.run(settings(folder, **{"action.head": head, "action.denoising_steps": 5}), tmp_path / head)
    rows = [row for row in read_metrics(tmp_path / head)]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert np.isfinite(losses).all() and len(losses) == 2
    validation = next(row for row in rows if "val/loss" in row)
    assert np.isfinite([validation["val/first_action_l1"], validation["val/next_actions_l1"]]).all()
    policy = Policy.from_checkpoint(tmp_path / head, check_images=False)
    rng = np.random.default_rng(0)
    images = lambda: {name: rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) for name in ("primary", "wrist")}
    seen = [Observation(images(), text, rng.normal(size=6)) for text in ("lift the cup", "push the red block away")]
    chunks = policy.predict_chunks(seen)
    assert chunks.shape == (2, 3, 7)
    for observation, chunk in zip(seen, chunks, strict=True):
        np.testing.assert_allclose(policy.predict_chunk(observation), chunk, atol=1e-5)


@pytest.mark.long
def test_run_refuses_a_head_of_another_size_than_the_actions(folder, tmp_path, monkeypatch):
    on_one_device(monkeypatch)
    with pytest.raises(InputError, match=r"action.dim is 6, the head's, but the data have 7 action dimensions"):
        loop.run(settings(folder, **{"action.head": "l1", "action.dim": 6}), tmp_path / "run")
