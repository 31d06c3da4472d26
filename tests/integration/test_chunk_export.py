"""A run that adds a head and FiLM to its base: merged, exported as OpenVLA-OFT's files, imported again."""

import jax
import numpy as np
import pytest
from conftest import on_one_device
from test_finetune import base, data_dir, settings  # noqa: F401 - fixtures

from openvla_jax import Policy
from openvla_jax.checkpoint.reading import load_contract
from openvla_jax.convert import export_weights, import_weights, merge_weights, verify_weights
from openvla_jax.convert.components import find_components
from openvla_jax.training import loop


@pytest.mark.long
@pytest.mark.parametrize("head", ["l1", "diffusion", "parallel_tokens"])
def test_run_that_adds_a_chunk_head_is_merged_and_exported(base, data_dir, tmp_path, monkeypatch, head):  # noqa: F811
    on_one_device(monkeypatch)
    parts = {"l1": "action_head", "diffusion": "action_head,noisy_projector", "parallel_tokens": ""}[head]
    config = settings(base, data_dir, train__steps=2, trainable=f"*/lora,*/film,{parts}".rstrip(","), film=True)
    config.update_from_flattened_dict(
        {"action.head": head, "action.horizon": 4, "action.executed": 4, "action.dim": 7, "data.text_length": 96}
    )
    loop.run(config, tmp_path / "run")
    report = merge_weights(base, tmp_path / "run", tmp_path / "merged", dtype="float32")
    what = {"l1": "action chunks", "diffusion": "predicted noise"}.get(head, "action slots")
    assert report.passed and what in str(report)
    models = [
        Policy.from_checkpoint(tmp_path / name, check_images=False, base=base if name == "run" else None).model
        for name in ("run", "merged")
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *models)
    notes = export_weights(tmp_path / "merged", tmp_path / "back")
    assert any("NUM_ACTIONS_CHUNK = 4, ACTION_DIM = 7" in note for note in notes)
    assert any("written as zeros" in note for note in notes)
    files = {path.name for path in find_components(tmp_path / "back").values()}
    assert {name.partition("--")[2] for name in files} == {"latest_checkpoint.pt"}
    import_weights(tmp_path / "back", tmp_path / "again")
    assert load_contract(tmp_path / "again").action == load_contract(tmp_path / "merged").action
    assert verify_weights(tmp_path / "merged", tmp_path / "again").passed
