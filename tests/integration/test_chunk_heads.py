"""Runs with heads that predict a chunk at once, from the config to the policy that acts."""

import json
import sys

import jax
import numpy as np
import pytest
from conftest import ROOT, on_one_device

sys.path.insert(0, str(ROOT / "tests" / "data"))
import fake_rlds
import frozen
from test_cameras import MODULE, STATE

from configs.finetune import oft
from openvla_jax import Observation, Policy
from openvla_jax.checkpoint.reading import load_contract, load_params, open_checkpoint, stored_params
from openvla_jax.errors import InputError
from openvla_jax.evaluation import offline
from openvla_jax.models.tree import flat
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
    rounding = 1e-3 if head == "diffusion" else 1e-5  # each denoising step multiplies it
    for observation, chunk in zip(seen, chunks, strict=True):
        np.testing.assert_allclose(policy.predict_chunk(observation), chunk, atol=rounding)


@pytest.fixture(scope="module")
def base(folder, tmp_path_factory):
    """A policy with the token head, one camera and no state: what a pretrained checkpoint is."""
    workdir = tmp_path_factory.mktemp("base")
    config = frozen.settings(folder)
    config.data.update(dict(dataset="two", module=str(folder / "mine.py"), statistics_dir=str(folder / "statistics")))
    config.train.update(dict(steps=1, checkpoint_every=1))
    with pytest.MonkeyPatch.context() as patch:
        on_one_device(patch)
        loop.run(config, workdir)
    return workdir


def recipe(folder, base, **changes):
    """OpenVLA-OFT's recipe, two steps of it on the folder's data."""
    config = oft.get_config("libero")
    config.update_from_flattened_dict(
        {
            "init_from": str(base), "data.dataset": "two", "data.data_dir": str(folder / "data"), "lora.rank": 2,
            "data.module": str(folder / "mine.py"), "data.statistics_dir": str(folder / "statistics"),
            "data.shuffle_buffer": 16, "data.num_parallel_reads": 2, "observation.state": STATE, "action.horizon": 3,
            "train.steps": 2, "train.batch_size": 4, "train.eval_every": 2, "train.eval_batches": 1,
            "train.checkpoint_every": 2, "train.log_every": 1, "train.dtype": "float32", "frozen_dtype": "float32",
            "train.compilation_cache": "", "mesh.fsdp": 1, "mesh.data": 1,
        } | changes
    )  # fmt: skip
    return config


def trained_parts(workdir):
    """Paths of the parameters that a checkpoint holds, without their adapters' sites."""
    return set(flat(stored_params(open_checkpoint(workdir))))


@pytest.mark.long
@pytest.mark.parametrize("head", ["l1", "diffusion", "parallel_tokens"])
def test_recipe_trains_any_head_on_a_token_policy(folder, base, tmp_path, monkeypatch, head):
    on_one_device(monkeypatch)
    changes = {"action.head": head, "action.denoising_steps": 2, "film": head == "l1"}
    loop.run(recipe(folder, base, **changes), tmp_path / "run")
    found = trained_parts(tmp_path / "run")
    parts = {"state_projector", *({"action_head"} if head != "parallel_tokens" else set())}
    parts |= {"noisy_projector"} if head == "diffusion" else set()
    assert {path.split("/")[0] for path in found if "/lora/" not in path and "/film/" not in path} == parts
    assert any("/film/" in path for path in found) == (head == "l1") and any("/lora/" in path for path in found)
    contract = load_contract(tmp_path / "run")
    assert (contract.action.horizon, contract.action.executed, contract.action.head) == (3, 3, head)
    assert Policy.from_checkpoint(tmp_path / "run", check_images=False).contract.model.film == (head == "l1")


@pytest.mark.long
def test_full_fine_tuning_changes_the_head_of_a_policy(folder, base, tmp_path, monkeypatch):
    """All weights, first with a head of numbers, and from that checkpoint on with tokens again."""
    on_one_device(monkeypatch)
    full = {"trainable": "*", "lora.rank": 0, "train.steps": 1, "train.checkpoint_every": 1, "train.eval_every": 0}
    loop.run(recipe(folder, base, **full), tmp_path / "l1")
    assert "action_head/fc1/kernel" in trained_parts(tmp_path / "l1")
    loop.run(recipe(folder, tmp_path / "l1", **full, **{"action.head": "parallel_tokens"}), tmp_path / "tokens")
    assert not any(path.startswith("action_head") for path in trained_parts(tmp_path / "tokens"))


@pytest.mark.long
def test_run_with_an_average_resumes_exactly_and_acts_by_it(folder, base, tmp_path, monkeypatch):
    on_one_device(monkeypatch)
    changes = {"optimizer.ema": 0.5, "data.resume": "exact", "train.checkpoint_every": 2, "train.eval_every": 4}
    run = lambda name, steps: loop.run(recipe(folder, base, **changes, **{"train.steps": steps}), tmp_path / name)
    whole = run("whole", 4)
    run("halves", 2)
    halves = run("halves", 4)
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(halves), strict=True):
        np.testing.assert_array_equal(one, other)
    rows = [[row for row in read_metrics(tmp_path / name) if "val/loss" in row][-1] for name in ("whole", "halves")]
    assert rows[0]["val/loss"] == rows[1]["val/loss"]
    stored = load_params(open_checkpoint(tmp_path / "whole"), whole.ema)
    kept, average, last = (jax.tree.leaves(jax.device_get(tree)) for tree in (stored, whole.ema, whole.params))
    assert all(map(np.array_equal, kept, average)) and not all(map(np.array_equal, average, last))
    with pytest.raises(InputError, match=r"optimizer.ema was 0.5, is None; "):
        loop.run(recipe(folder, base, **changes | {"optimizer.ema": None}), tmp_path / "whole")


@pytest.mark.long
def test_bad_chunk_settings_are_told_in_one_line_and_write_nothing(folder, base, tmp_path, monkeypatch):
    on_one_device(monkeypatch)
    statistics = json.loads((open_checkpoint(base) / "contract" / "dataset_statistics.json").read_text())
    (tmp_path / "statistics.json").write_text(json.dumps(statistics))
    with_state = tmp_path / "with_state"
    loop.run(recipe(folder, base, **{"trainable": "*", "lora.rank": 0, "train.steps": 1}), with_state)
    cases = [
        ({"action.horizon": 9}, r"1000 episodes in a row have fewer steps than action.horizon"),
        ({"observation.cameras": ("primary", "wrst")}, r"'wrst', which no dataset knows; did you mean 'wrist'"),
        ({"observation.state": ("state_0", "gripper")}, r"no state column 'gripper'"),
        (
            {"init_from": str(with_state), "observation.state": STATE[:5]},
            r"fc1/kernel has shape \(6, 16\)",
        ),
        ({"data.statistics": str(tmp_path / "statistics.json")}, r"'two': their state has 7 columns without names"),
        ({"action.dim": 6}, r"action.dim is 6, the head's, but the data have 7 action dimensions"),
        ({"action.head": "l2"}, r"action.head is 'l2': one of"),
        ({"trainable": "*/lora"}, r"has no action_head/.* which the model needs .*: add 'added' to trainable"),
        ({"trainable": "*/lora,noisy_projector"}, r"'noisy_projector' matches no parameter"),
        ({"film": True, "trainable": "*/lora,action_head,state_projector"}, r"/film/.*: add 'added' to trainable"),
        ({"action.executed": 4}, r"action.executed is 4: at most action.horizon, 3"),
        ({"data.text_length": 30}, r"text_length"),
        ({"optimizer.ema": 1.0}, r"config.optimizer.ema is 1.0: give a decay above 0 and below 1"),
        ({"train.stop_at_action_accuracy": 0.9}, r"stop_at_action_accuracy: the head 'l1' has no tokens"),
    ]
    for number, (changes, message) in enumerate(cases):
        with pytest.raises(InputError, match=message) as caught:
            loop.run(recipe(folder, base, **changes), tmp_path / f"run{number}")
        assert "\n" not in str(caught.value) and not (tmp_path / f"run{number}").exists()


@pytest.mark.long
def test_offline_evaluation_shows_every_camera_and_the_state(folder, base, tmp_path, monkeypatch):
    on_one_device(monkeypatch)
    loop.run(recipe(folder, base, **{"action.normalization": "bounds"}), tmp_path / "run")
    policy = Policy.from_checkpoint(tmp_path / "run", check_images=False)
    contract = policy.contract
    frames = offline.held_out_frames(
        "two", str(folder / "data"), contract.statistics["two"], 3, module=str(folder / "mine.py"),
        observation=contract.observation, normalization="bounds",
    )  # fmt: skip
    episode = fake_rlds.two_cameras(5)["steps"]
    rows = contract.statistics["two"]["proprio"]
    for frame in frames:
        step = episode[frame.step]
        for camera, key in (("primary", "image"), ("wrist", "wrist")):
            np.testing.assert_array_equal(frame.observation.images[camera], step["observation"][key])
        state = np.clip(step["observation"]["state"], rows["min"], rows["max"])
        np.testing.assert_allclose(frame.observation.state, state, atol=1e-5)
    predicted = offline.predict(policy, frames, "two")
    for frame, action in zip(frames, predicted, strict=True):
        np.testing.assert_allclose(policy.predict_chunk(frame.observation)[0], action, atol=1e-5)
    result = offline.compare(predicted, frames, contract.statistics["two"]["action"], contract.action)
    raw = np.stack([episode[frame.step]["action"] for frame in frames])
    np.testing.assert_allclose(result.true, raw, atol=1e-5)
