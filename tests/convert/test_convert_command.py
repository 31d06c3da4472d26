"""The three commands of a user, and the memory that they take."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from fabricate import STATISTICS, write_hf
from safetensors.numpy import save_file

from openvla_jax import convert_weights
from openvla_jax.convert.torch_io import read_torch_folder


@pytest.fixture
def run(capsys):
    """The command in this process, as importing PyTorch anew takes longer than most of them."""

    def run(*arguments):
        command = list(map(str, arguments))
        try:
            code = convert_weights.main(command)
        except SystemExit as ended:
            code = int(ended.code or 0)
        return subprocess.CompletedProcess(command, code, *capsys.readouterr())

    return run


@pytest.mark.slow
def test_import_verify_export_inspect_and_errors(tmp_path, run):
    tensors = write_hf(tmp_path / "hf", "siglip-letterbox", "bfloat16")
    command = [sys.executable, "convert_weights.py", "import", str(tmp_path / "hf"), str(tmp_path / "orbax")]
    imported = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert imported.returncode == 0, imported.stderr
    assert "4 assumed" in imported.stdout and "B/s" in imported.stderr  # progress shows bytes per second
    verified = run("verify", tmp_path / "hf", tmp_path / "orbax")
    assert verified.returncode == 0 and verified.stdout.strip().endswith("PASSED"), verified.stdout + verified.stderr
    assert run("export", tmp_path / "orbax", tmp_path / "back", "--format", "hf").returncode == 0
    back = read_torch_folder(tmp_path / "back")
    assert {name: t.read().tobytes() for name, t in back.items()} == {name: x.tobytes() for name, x in tensors.items()}
    inspected = run("inspect", tmp_path / "orbax")
    assert inspected.returncode == 0 and "statistics: bridge_orig" in inspected.stdout
    refused = run("import", tmp_path / "hf", tmp_path / "orbax")
    assert refused.returncode == 2
    assert refused.stderr.strip() == (
        f"error: {tmp_path / 'orbax'} exists: name another destination, or pass --overwrite to replace it"
    )
    write_hf(tmp_path / "other", "siglip-letterbox", seed=1)
    different = run("verify", tmp_path / "other", tmp_path / "orbax")
    assert different.returncode == 1 and "FAILED: logits differ" in different.stdout


@pytest.mark.slow
def test_parts_are_named_on_the_command_line(tmp_path, run):
    missing = run("import", "openvla-7b", tmp_path / "dst", "--part", "dino", tmp_path / "a", "--part", "llm", tmp_path)
    assert missing.returncode == 2
    assert missing.stderr.strip().endswith("openvla-7b: no vision tower siglip in it: pass --part siglip PATH")


@pytest.mark.long
def test_the_benchmark_runs_at_tiny_size(tmp_path):
    command = [sys.executable, "benchmarks/convert.py", "--model", "tiny", "--dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "byte-equal after HF -> Orbax -> HF: 130 of 130 tensors, 130 in the export" in done.stdout
    assert list(tmp_path.iterdir()) == []


MEASURE = """
import os, resource, sys
from openvla_jax.convert import OftOptions, export_weights, import_weights
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if sys.argv[1] == "import":
    import_weights(sys.argv[2], sys.argv[3])
elif sys.argv[1] == "unmerged":
    base = os.path.join(os.path.dirname(sys.argv[2]), "hf")
    import_weights(sys.argv[2], sys.argv[3], oft=OftOptions("libero"), base=base)
else:
    export_weights(sys.argv[2], sys.argv[3], format=sys.argv[1])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def write_adapter(folder, tensors, rank=2):
    """A run of OpenVLA-OFT that was not merged: an adapter of every matrix of the language model, and statistics."""
    names = [name for name in tensors if ".layers." in name and tensors[name].ndim == 2]
    factors = {
        f"base_model.model.{name.removesuffix('.weight')}.lora_{side}.weight": np.full(shape, 0.1, np.float32)
        for name in names
        for side, shape in (("A", (rank, tensors[name].shape[1])), ("B", (tensors[name].shape[0], rank)))
    }
    (folder / "lora_adapter").mkdir(parents=True)
    save_file(factors, folder / "lora_adapter" / "adapter_model.safetensors")
    (folder / "lora_adapter" / "adapter_config.json").write_text(json.dumps({"r": rank, "lora_alpha": rank}))
    (folder / "dataset_statistics.json").write_text(json.dumps(STATISTICS))


@pytest.mark.long
def test_memory_is_that_of_some_tensors_not_of_the_checkpoint(tmp_path, monkeypatch):
    """A model of 400 MB with leaves of 90 MB is converted in far less than one leaf beyond what an empty run takes."""
    import dataclasses

    import fabricate

    small = fabricate.shrunken
    sizes = {"width": 512, "heads": 4, "kv_heads": 4, "mlp_dim": 1408, "depth": 32}

    def large(variant):
        config = small(variant)
        return dataclasses.replace(config, llama=dataclasses.replace(config.llama, **sizes))

    monkeypatch.setattr(fabricate, "shrunken", large)
    tensors = write_hf(tmp_path / "hf", "siglip-letterbox", shards=4)
    total = sum(x.nbytes for x in tensors.values())
    leaf = 32 * 512 * 1408 * 4
    assert total > 400e6
    write_adapter(tmp_path / "adapted", tensors)
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    for mode, src, dst in (
        ("import", "hf", "orbax"),
        ("hf", "orbax", "hf2"),
        ("prismatic", "orbax", "run"),
        ("unmerged", "adapted", "oft"),
    ):
        command = [sys.executable, "-c", MEASURE, mode, str(tmp_path / src), str(tmp_path / dst)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        grown = int(done.stdout.split()[-1])
        assert grown < leaf, f"{mode} took {grown / 1e6:.0f} MB for {total / 1e6:.0f} MB"
    names = np.random.default_rng(0).choice(sorted(tensors), 20, replace=False)
    back = read_torch_folder(tmp_path / "hf2")
    assert all(back[name].read().tobytes() == tensors[name].tobytes() for name in names)
