"""A frozen run of checkpoint format 1 (tests/data/checkpoint_v1): it acts, resumes and serves as a base as it did."""

import json
import shutil

import frozen
import numpy as np
import pytest
import tensorflow as tf
from conftest import ROOT, on_one_device

from openvla_jax.inference.policy import Policy
from openvla_jax.training import loop

V1 = ROOT / "tests" / "data" / "checkpoint_v1"


@pytest.fixture(scope="module")
def expected():
    with np.load(V1 / "expected.npz", allow_pickle=False) as arrays:
        return dict(arrays)


@pytest.mark.parametrize("name", ["run", "adapter"])
def test_policy_of_format_1_acts_as_it_did(name, expected):
    base = V1 / "run" if name == "adapter" else None
    policy = Policy.from_checkpoint(V1 / name, check_images=False, base=base)
    actions = policy.predict_actions(frozen.images(), frozen.INSTRUCTIONS)
    np.testing.assert_allclose(actions, expected[name], rtol=0, atol=1e-9)
    assert not np.array_equal(expected["run"], expected["adapter"]), "the adapter would not be seen"


def test_run_of_format_1_resumes_with_its_optimizer_and_data_position(tmp_path, monkeypatch, capsys, expected):
    """The losses are the uninterrupted run's. Another TensorFlow cannot read the data position: it begins anew, and
    says so.
    """
    shutil.copytree(V1, tmp_path / "v1")
    on_one_device(monkeypatch)
    loop.run(frozen.settings(tmp_path / "v1"), tmp_path / "v1" / "run")
    printed = capsys.readouterr().out
    assert f"resumed from step {frozen.KEPT}" in printed
    losses = frozen.losses(tmp_path / "v1" / "run")
    notes = V1 / "run" / "checkpoints" / str(frozen.KEPT) / "data" / "stream_00000-of-00001.json"
    if json.loads(notes.read_text())["identity"]["tensorflow"] == tf.__version__:
        np.testing.assert_allclose(losses, expected["losses"], rtol=1e-4)
    else:
        assert "data: the stream continues with another seed" in printed
        assert len(losses) == len(expected["losses"])
