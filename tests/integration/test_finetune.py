"""Fine-tuning, whole: small checkpoints that need their base, resumed, acting, merged; and its bad input."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import ROOT, on_one_device
from orbax.checkpoint import v1 as ocp

from configs import debug
from configs.finetune import frozen_vision, full, last_layer, lora, sandwich
from openvla_jax.checkpoint.contract import CheckpointError
from openvla_jax.checkpoint.load import load_model
from openvla_jax.checkpoint.reading import load_contract, open_checkpoint, steps_in
from openvla_jax.convert import merge_weights
from openvla_jax.inference.policy import Policy
from openvla_jax.models.tuning import MODES
from openvla_jax.settings import Settings
from openvla_jax.sim.dataset import write_dataset
from openvla_jax.training import loop
from openvla_jax.training.metrics import read_metrics
from openvla_jax.training.step import make_tuning

RANK = 4


@pytest.fixture
def one_device(monkeypatch):
    on_one_device(monkeypatch)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    write_dataset(directory, episodes=12, world="changed")
    return directory


@pytest.fixture(scope="module")
def base(tmp_path_factory, data_dir):
    """A checkpoint to start from; its statistics are of another robot."""
    workdir = tmp_path_factory.mktemp("base")
    config = debug.get_config()
    config.update_from_flattened_dict({"data.data_dir": str(data_dir), "train.steps": 2, "train.eval_every": 0})
    with pytest.MonkeyPatch.context() as patch:
        on_one_device(patch)
        loop.run(config, workdir)
    contract = open_checkpoint(workdir) / "contract"
    statistics = json.loads((contract / "dataset_statistics.json").read_text())
    (contract / "dataset_statistics.json").write_text(json.dumps({"other": statistics["tabletop"]}))
    return workdir


def settings(base, data_dir, **changes):
    config = debug.get_config()
    config.update_from_flattened_dict(
        {
            "model": {"preset": ""}, "tokenizer": "", "init_from": str(base), "data.data_dir": str(data_dir),
            "trainable": "*/lora", "lora.rank": RANK, "train.steps": 6, "train.eval_every": 0, "statistics": "join",
            "augment.enabled": True, "train.checkpoint_every": 3,
        }
        | {key.replace("__", "."): value for key, value in changes.items()}
    )  # fmt: skip
    return config


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, base, data_dir):
    """A LoRA run in two parts: three steps, then on to six."""
    workdir = tmp_path_factory.mktemp("tuned")
    with pytest.MonkeyPatch.context() as patch:
        on_one_device(patch)
        loop.run(settings(base, data_dir, train__steps=3), workdir)
        loop.run(settings(base, data_dir), workdir)
    return workdir


@pytest.mark.long
def test_a_run_of_adapters_resumes_and_its_checkpoints_hold_only_them(
    tuned, base, data_dir, tmp_path, capsys, one_device
):
    loop.run(settings(base, data_dir), tmp_path / "straight")
    printed = capsys.readouterr().out
    assert "the rest is frozen in bfloat16" in printed and "vision/siglip" in printed
    curves = [[row["train/loss"] for row in read_metrics(workdir)] for workdir in (tuned, tmp_path / "straight")]
    assert len(curves[0]) == 6 and curves[0] == curves[1]
    loop.run(settings(base, data_dir), tuned)
    assert "nothing to do" in capsys.readouterr().out
    files = lambda path: (Path(open_checkpoint(path)) / "params").rglob("*")
    size = lambda path: sum(file.stat().st_size for file in files(path) if file.is_file())
    assert size(tuned) < size(base) / 4
    contract = load_contract(tuned)
    assert contract.adapter["base"] == str(open_checkpoint(base))
    assert (list(contract.statistics), contract.default_key) == (["other", "tabletop"], "tabletop")
    assert contract.preprocessing.crop_area == 0.9


@pytest.mark.long
def test_watch_counts_no_compilation_as_a_hang(base, data_dir, tmp_path, monkeypatch, one_device):
    """Both programs are compiled before the first turn that `hang_timeout` is counted from."""
    turns, programs = [], []
    monkeypatch.setattr(loop.hosts.Watch, "at", lambda watch, step, doing: turns.append(doing))

    def compile_programs(run, batch, make=loop.compile_programs):
        assert not turns
        programs.extend(make(run, batch))
        return programs

    monkeypatch.setattr(loop, "compile_programs", compile_programs)
    loop.run(settings(base, data_dir, train__steps=2, train__eval_every=2), tmp_path / "run")
    assert "evaluation" in turns
    assert [type(program) for program in programs] == [jax.stages.Compiled] * 2


@pytest.mark.long
def test_a_policy_of_base_and_adapter_is_that_of_the_merged_weights(tuned, base, tmp_path):
    merged = merge_weights(base, tuned, tmp_path / "merged", dtype="float32")
    assert merged.passed and merged.max_logit_difference <= 1e-4
    shutil.copytree(base, tmp_path / "moved")
    policies = [
        Policy.from_checkpoint(tuned, check_images=False, base=tmp_path / "moved"),
        Policy.from_checkpoint(tmp_path / "merged", check_images=False),
    ]
    # The adapters were trained beside bfloat16 weights, and both are merged into float32 ones.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *(policy.model for policy in policies))
    image = np.zeros((48, 48, 3), np.uint8)
    assert policies[0].prepare(policies[0].observe(image, "pick up the red cube")).unnorm_key == "tabletop"
    assert load_contract(tmp_path / "merged").adapter is None


@pytest.mark.long
def test_a_last_layer_run_is_base_with_three_parts_replaced(base, data_dir, tmp_path, one_device):
    """Trained beside int4 weights, used beside the base's own; it stops where its accuracy is good enough (at once)."""
    config = settings(base, data_dir, trainable=last_layer.get_config().trainable, lora__rank=0, train__steps=1)
    config.train.stop_at_action_accuracy = 0.0
    config.train.steps, config.frozen_dtype, config.quantize = 4, "float32", "int4"
    loop.run(config, tmp_path / "run")
    assert steps_in(tmp_path / "run" / "checkpoints") == [3]  # known of step 1 when step 3 begins
    assert merge_weights(base, tmp_path / "run", tmp_path / "merged").passed
    before, after, direct = (load_model(path)[0] for path in (base, tmp_path / "merged", tmp_path / "run"))
    for part in ("vision", "projector"):
        assert jax.tree.all(jax.tree.map(np.array_equal, getattr(before, part), getattr(after, part)))
    kernels = [model.llama.blocks.mlp.up.kernel[...] for model in (before, after, direct)]
    np.testing.assert_array_equal(kernels[0][:-1], kernels[1][:-1])
    assert not np.array_equal(kernels[0][-1], kernels[1][-1])
    np.testing.assert_array_equal(kernels[1], kernels[2])


def spoiled(source, target, part, name, factor):
    """A copy of a checkpoint with one parameter multiplied."""
    source = open_checkpoint(source)
    params = ocp.load(source, checkpointable_name="params")
    part(params)[name] = part(params)[name] * factor
    ocp.save_checkpointables(target, {"params": params})
    shutil.copytree(source / "contract", target / "contract")
    return target


@pytest.mark.long
def test_bad_input_is_told_in_one_line_and_writes_nothing(tuned, base, data_dir, tmp_path):
    other = spoiled(base, tmp_path / "other", lambda params: params["llama"]["head"], "kernel", 2)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    strange = tmp_path / "statistics.json"
    strange.write_text(json.dumps({"bridge_orig": {}}))
    cases = [
        (settings(other, data_dir), tuned, "was trained on another base: its fingerprint is"),
        (settings(base, data_dir, lora__rank=8), tuned, "lora was .*'rank': 4.* is .*'rank': 8"),
        (settings(base, data_dir, trainable="llama/head"), tuned, "trainable was .*, is 'llama/head'"),
        (settings(base, data_dir, lora__targets="llama/*/query"), None, "'llama/\\*/query' matches no layer"),
        (settings(base, data_dir, trainable="llama/heads"), None, "'llama/heads' matches no parameter"),
        (settings(tmp_path / "hf", data_dir), None, "holds no complete checkpoint"),
        (settings(tuned, data_dir), None, "is an adapter, not a whole model: convert_weights.py merge"),
        (settings(base, data_dir, data__statistics=str(strange)), None, "has no dataset 'tabletop'"),
        (settings(base, data_dir, data__statistics="base"), None, "start from has no dataset 'tabletop'"),
        (settings(base, data_dir, quantize="int3"), None, "config.quantize is 'int3': one of"),
        (settings(base, data_dir, statistics="both"), None, "config.statistics is 'both': one of"),
        (settings(base, data_dir, trainable="*", quantize="int4", lora__rank=0), None, "quantize needs frozen weights"),
    ]
    for number, (config, workdir, message) in enumerate(cases):
        target = workdir or tmp_path / f"run{number}"
        before = steps_in(target / "checkpoints")
        with pytest.raises((ValueError, OSError), match=message) as caught:
            loop.run(config, target)
        assert "\n" not in str(caught.value)
        assert steps_in(target / "checkpoints") == before and (workdir or not target.exists())


@pytest.mark.long
def test_nan_in_an_adapter_is_refused(tuned, tmp_path):
    spoiled(tuned, tmp_path / "bad", lambda params: params["llama"]["blocks"]["mlp"]["up"]["lora"], "b", np.nan)
    with pytest.raises(CheckpointError, match="llama/blocks/mlp/up/lora/b holds NaN or infinity") as caught:
        load_model(tmp_path / "bad")
    assert "\n" not in str(caught.value)


def test_every_row_of_the_paper_s_table_is_a_config():
    modules = {
        "full": full,
        "last_layer": last_layer,
        "frozen_vision": frozen_vision,
        "sandwich": sandwich,
        "lora": lora,
    }
    assert modules.keys() == MODES.keys()
    for name, module in modules.items():
        config = module.get_config()
        tuning = make_tuning(Settings.from_dict(config.to_dict()))
        assert tuning.trainable == MODES[name]
        assert (config.train.batch_size, config.augment.enabled, config.data.shuffle_buffer) == (16, True, 100_000)
    assert (config.lora.rank, tuning.lora.scale, config.optimizer.learning_rate) == (32, 0.5, 5e-4)
    assert make_tuning(Settings.from_dict(lora.get_config("int4").to_dict())).quantize == "int4"
    assert dataclasses.replace(tuning.lora, rank=8).scale == 1.0


@pytest.mark.long
def test_the_notebook_runs_from_start_to_end(base, tmp_path, monkeypatch, one_device):
    """Every code cell, in order, in one namespace; few steps on few scenes."""
    shutil.copytree(open_checkpoint(base), tmp_path / "base")
    statistics = tmp_path / "base" / "contract" / "dataset_statistics.json"
    statistics.write_text(statistics.read_text().replace('"other"', '"tabletop"'))
    monkeypatch.chdir(ROOT)
    for name, value in {"BASE": tmp_path / "base", "WORK": tmp_path / "work", "STEPS": 4, "SCENES": 2}.items():
        monkeypatch.setenv(f"OPENVLA_{name}", str(value))
    cells = json.loads((ROOT / "notebooks" / "finetune.ipynb").read_text())["cells"]
    namespace: dict = {}
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), namespace)
    assert len(namespace["after"].success) == 2 and namespace["compared"].true.shape[1:] == (7,)
    assert load_contract(tmp_path / "work" / "merged").adapter is None
    assert (tmp_path / "work" / "peft" / "adapter_model.safetensors").exists()
    assert (tmp_path / "work" / "curves.png").stat().st_size > 1000
