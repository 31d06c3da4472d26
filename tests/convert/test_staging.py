"""Checkpoints in a bucket: converted as local ones are, as far as needed, and no copy is left."""

import gc
import shutil
import tempfile
from collections import namedtuple

import pytest
from conftest import golden
from fabricate import write_hf

from openvla_jax import convert_weights
from openvla_jax.checkpoint.reading import load_contract
from openvla_jax.convert import staging
from openvla_jax.convert.torch_io import read_torch_folder

RUN = "gs://b/run"


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The folder that copies are made in."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def run(capsys):
    """(exit code, stdout, stderr) of the command."""

    def run(*arguments):
        try:
            code = convert_weights.main(list(map(str, arguments)))
        except SystemExit as ended:
            code = ended.code
        gc.collect()  # of what an error held
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def weights(bucket, tmp_path, run):
    """The tensors of the checkpoint of step 7 of RUN, which has an optimizer state too."""
    tensors = write_hf(tmp_path / "hf", "siglip-letterbox", "bfloat16")
    assert run("import", tmp_path / "hf", tmp_path / "imported")[0] == 0
    step = bucket / "b" / "run" / "checkpoints" / "7"
    shutil.copytree(tmp_path / "imported", step)
    (step / "optimizer").mkdir()
    (step / "optimizer" / "state").write_bytes(bytes(1000))
    return tensors


def test_export_inspect_and_verify_read_a_checkpoint_in_a_bucket(weights, tmp_path, temporary, run, monkeypatch):
    copied, stage = [], staging.stage

    def watch(directory, items):
        folder = stage(directory, items)
        copied.append({path.name for path in folder.iterdir()})
        return folder

    monkeypatch.setattr("openvla_jax.convert.orbax_io.stage", watch)
    code, _, err = run("export", RUN, tmp_path / "back")
    assert (code, "copy 7: " in err) == (0, True), err
    back = {name: tensor.read().tobytes() for name, tensor in read_torch_folder(tmp_path / "back").items()}
    assert back == {name: x.tobytes() for name, x in weights.items()}
    code, out, err = run("inspect", RUN)
    assert (code, out.startswith(f"{RUN}/checkpoints/7: Orbax checkpoint")) == (0, True), err
    assert f"tokenizer: {RUN}/checkpoints/7/contract/tokenizer" in out
    code, out, err = run("verify", f"{RUN}/checkpoints/7", tmp_path / "hf", "--tensors_only")
    assert (code, out.strip().endswith("PASSED")) == (0, True), err
    assert copied == [{"params", "unused"}] * 3
    assert not list(temporary.iterdir())


def test_stage_leaves_nothing_when_a_copy_fails(weights, tmp_path, temporary, run, monkeypatch):
    seen, copy = [], staging._copy

    def fail(source, target):
        seen.append(source)
        if len(seen) > 3:
            raise OSError("the bucket is gone")
        copy(source, target)

    monkeypatch.setattr(staging, "_copy", fail)
    monkeypatch.setattr("openvla_jax.storage.pause", lambda attempt: None)
    code, _, err = run("export", RUN, tmp_path / "back")
    assert code == 2 and "failed 4 times: the bucket is gone" in err
    assert not list(temporary.iterdir()) and not (tmp_path / "back").exists()


def test_export_that_fails_leaves_no_copy(weights, tmp_path, temporary, run, bucket):
    chunk = next((bucket / "b/run/checkpoints/7/params").glob("projector.fc1.kernel/0.0"))
    chunk.write_bytes(b"")
    code, _, err = run("export", RUN, tmp_path / "back")
    assert code == 2 and "projector.fc1.kernel/0.0: has 0 bytes" in err
    assert not list(temporary.iterdir())


def test_stage_refuses_a_disk_without_room(weights, tmp_path, temporary, run, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1))
    code, _, err = run("inspect", RUN)
    assert code == 2 and "GB free; set TMPDIR to a folder with more room" in err.splitlines()[-1]
    assert not list(temporary.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "gs://b/none", "dst"], "checkpoint gs://b/none does not exist"),
        (["export", "gs://b/hf", "dst"], "gs://b/hf holds no complete checkpoint (params and contract); it holds: con"),
        (["export", "src", "gs://b/dst"], "gs://b/dst: the destination has to be on a local disk; name a folder here"),
        (["import", "src", "gs://b/dst"], "gs://b/dst: the destination has to be on a local disk"),
    ],
)  # fmt: skip
def test_convert_tells_what_a_bucket_cannot_give(bucket, run, arguments, message):
    (bucket / "b" / "hf").mkdir(parents=True)
    (bucket / "b" / "hf" / "config.json").write_text("{}")
    code, _, err = run(*arguments)
    assert (code, err.count("\n")) == (2, 1)
    assert message in err


@pytest.mark.long
def test_adapters_know_their_base_by_its_place_in_the_bucket(bucket, tmp_path, temporary, run, shared):
    peft, adapter = golden("openvla_tiny") / "lora", tmp_path / "adapter"
    tokenizer = shared / "data" / "llama2_tokenizer"
    assert run("import", golden("openvla_tiny"), tmp_path / "base", "--tokenizer", tokenizer)[0] == 0
    shutil.copytree(tmp_path / "base", bucket / "b" / "base")
    code, _, err = run("import", peft, adapter, "--base", "gs://b/base")
    assert code == 0, err
    assert load_contract(adapter).adapter["base"] == "gs://b/base"
    shutil.copytree(adapter, bucket / "b" / "adapter")
    code, out, err = run("merge", "gs://b/base", "gs://b/adapter", tmp_path / "merged")
    assert (code, out.strip().endswith("PASSED")) == (0, True), err
    code, _, err = run("export", "gs://b/adapter", tmp_path / "peft")
    assert code == 0 and '"gs://b/base"' in (tmp_path / "peft" / "adapter_config.json").read_text(), err
    assert not list(temporary.iterdir())
