"""Whatever is wrong with an input: one clear error, and the destination absent or as it was."""

import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from fabricate import STATISTICS, write_hf, write_native
from safetensors.numpy import load_file, save_file

from openvla_jax.checkpoint.load import load_model, save_model
from openvla_jax.checkpoint.reading import load_contract
from openvla_jax.convert import (
    ConversionError,
    export_weights,
    import_weights,
    inspect_weights,
    torch_io,
    verify_weights,
)
from openvla_jax.convert.torch_io import read_pt
from openvla_jax.errors import InputError


@pytest.fixture
def hf(tmp_path) -> Path:
    write_hf(tmp_path / "hf", "siglip-letterbox", "bfloat16", shards=2)
    return tmp_path / "hf"


@pytest.fixture
def single(tmp_path) -> Path:
    write_hf(tmp_path / "single", "siglip-letterbox")
    return tmp_path / "single"


def assert_refused(src: Path, *wanted: str, lines: int = 1, **options) -> None:
    """The import stops with one line that has all of `wanted`, and leaves nothing behind, neither DST nor half of
    it.
    """
    dst = src.parent / "dst"
    before = sorted(src.parent.iterdir())
    with pytest.raises(ConversionError) as error:
        import_weights(src, dst, **options)
    for text in wanted:
        assert text in str(error.value)
    assert len(str(error.value).splitlines()) == lines
    assert sorted(src.parent.iterdir()) == before


# ---------------------------------------------------------------------------------------------------------------------
# safetensors
# ---------------------------------------------------------------------------------------------------------------------


def test_truncated_file(hf):
    file = hf / "part1.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert_refused(hf, "part1.safetensors", "truncated", "download it again")


def test_truncated_header(single):
    (single / "model.safetensors").write_bytes((single / "model.safetensors").read_bytes()[:200])
    assert_refused(single, "model.safetensors", "no safetensors header")


def test_bytes_after_the_tensors(single):
    with (single / "model.safetensors").open("ab") as file:
        file.write(bytes(16))
    assert_refused(single, "followed by foreign bytes")


def test_missing_shard(hf):
    (hf / "part1.safetensors").unlink()
    assert_refused(hf, "model.safetensors.index.json", "names shards that are not there: part1.safetensors")


def test_shard_outside_the_folder(hf):
    index = json.loads((hf / "model.safetensors.index.json").read_text())
    name = next(iter(index["weight_map"]))
    index["weight_map"][name] = "../secret.safetensors"
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_refused(hf, "../secret.safetensors")


def test_index_that_names_another_shard_for_a_tensor(hf):
    index = json.loads((hf / "model.safetensors.index.json").read_text())
    name = next(name for name, file in index["weight_map"].items() if file == "part0.safetensors")
    index["weight_map"][name] = "part1.safetensors"
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_refused(hf, f"{name} is not in part1.safetensors", f"{name} in part0.safetensors is not in the index")


def test_several_files_without_an_index(hf):
    (hf / "model.safetensors.index.json").unlink()
    assert_refused(hf, "2 *.safetensors files and no model.safetensors.index.json")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda entry: entry.update(shape=[entry["shape"][0] + 1, *entry["shape"][1:]]), "the header lies"),
        (lambda entry: entry.update(data_offsets=[entry["data_offsets"][0] + 4, entry["data_offsets"][1] + 4]), "lies"),
        (lambda entry: entry.update(shape=[-1]), "damaged safetensors header"),
        (lambda entry: entry.update(shape=["1"]), "damaged safetensors header"),
        (lambda entry: entry.update(shape="11"), "damaged safetensors header"),
        (lambda entry: entry.update(data_offsets=[0]), "damaged safetensors header"),
        (lambda entry: entry.update(dtype=5), "damaged safetensors header"),
        (lambda entry: entry.pop("shape"), "damaged safetensors header"),
    ],
)
def test_header_that_lies(single, change, text):
    file = single / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header[sorted(header)[5]])
    encoded = json.dumps(header).encode()
    file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data[8 + length :])
    assert_refused(single, "model.safetensors", text)


@pytest.mark.parametrize("dtype", ["U16", "U32", "U64", "C64", "F8_E8M0", "F4", "of_later"])
def test_safetensors_type_that_is_not_supported_is_named(single, dtype):
    file = single / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = sorted(header)[5]
    header[name]["dtype"] = dtype
    encoded = json.dumps(header).encode()
    file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data[8 + length :])
    assert_refused(single, f"{file}: tensor {name} has type {dtype}, which is not supported; save it as float32")


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["uint16", "complex64", "uint64"])
def test_bin_type_that_is_not_supported_is_named(single, dtype):
    torch = pytest.importorskip("torch")
    tensors = {name: torch.tensor(x) for name, x in load_file(single / "model.safetensors").items()}
    name = "language_model.model.norm.weight"
    tensors[name] = tensors[name].abs().to(getattr(torch, dtype))
    (single / "model.safetensors").unlink()
    torch.save(tensors, single / "pytorch_model.bin")
    found = {"complex64": "ComplexFloatStorage"}.get(dtype, dtype)
    assert_refused(single, f"pytorch_model.bin: tensor {name} has type {found}, which is not supported")


def test_tied_output_head_is_explained(single):
    tensors = load_file(single / "model.safetensors")
    del tensors["language_model.lm_head.weight"]
    save_file(tensors, single / "model.safetensors")
    assert_refused(single, "lm_head.weight: missing", "tied to the embedding", lines=2)


def test_every_misfit_is_listed(single):
    tensors = load_file(single / "model.safetensors")
    names = sorted(tensors)
    gone, cut = names[3], next(name for name in names if name.endswith("fc1.weight"))
    del tensors[gone]
    tensors[cut] = np.ascontiguousarray(tensors[cut][:, :-1])
    tensors["foreign.weight"] = np.zeros(2, np.float32)
    save_file(tensors, single / "model.safetensors")
    assert_refused(
        single, "3 tensors do not fit", f"{gone}: missing", f"{cut}: shape", "foreign.weight: not part", lines=4
    )


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nan_and_infinity(tmp_path, value, dtype):
    write_hf(tmp_path / "hf", "siglip-letterbox", dtype)
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    tensors["language_model.model.norm.weight"][7] = value
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    assert_refused(tmp_path / "hf", "language_model.model.norm.weight", "NaN or infinity")


# ---------------------------------------------------------------------------------------------------------------------
# .pt
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [25, 2000])
def test_pickle_that_names_a_dict_in_another_very_often_is_refused(tmp_path, monkeypatch, levels):
    monkeypatch.setattr(torch_io, "PICKLE_NODES", 1000)
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w") as archive:
        archive.writestr("x/data.pkl", pickled(levels))
    with pytest.raises(ConversionError, match=r"bomb.pt: (has more than|does not have|maximum recursion)") as caught:
        read_pt(tmp_path / "bomb.pt")
    assert "\n" not in str(caught.value)


def pickled(levels: int) -> bytes:
    """The pickle of a dict of dicts, `levels` deep, with twice as many dicts on each level."""
    both = b"q\0}(X\1\0\0\0ah\0X\1\0\0\0bh\0u"  # keeps what was made last, and makes {"a": it, "b": it}
    return b"\x80\2}" + both * levels + b"."


def test_pickle_that_declares_too_much_is_not_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"\x80\x02" + bytes(torch_io.PICKLE_BYTES))
    with pytest.raises(ConversionError, match=r"bomb\.pt: its pickle would have 100,000,002 bytes"):
        read_pt(tmp_path / "bomb.pt")


class Exploit:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def native_run(folder: Path) -> Path:
    pytest.importorskip("torch")
    write_native(folder, "siglip-letterbox")
    return next((folder / "checkpoints").glob("*.pt"))


@pytest.mark.torch
def test_pickle_with_foreign_objects_is_not_executed(tmp_path):
    pt = native_run(tmp_path / "run")
    marker = tmp_path / "executed"
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "checkpoints").mkdir()
    with zipfile.ZipFile(pt, "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps({"model": Exploit(marker)}, protocol=2))
    assert_refused(tmp_path / "run", str(pt), "posix.mkdir", "foreign object")
    assert not marker.exists()


@pytest.mark.torch
def test_truncated_pt(tmp_path):
    pt = native_run(tmp_path / "run")
    pt.write_bytes(pt.read_bytes()[:-5000])
    assert_refused(tmp_path / "run", str(pt), "not a complete torch.save archive")


@pytest.mark.torch
def test_damaged_pickle(tmp_path):
    pt = native_run(tmp_path / "run")
    with zipfile.ZipFile(pt, "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02}q\x00(X\x05")
    assert_refused(tmp_path / "run", str(pt), "damaged pickle")


@pytest.mark.torch
def test_storage_shorter_than_its_tensor(tmp_path):
    pt = native_run(tmp_path / "run")
    with zipfile.ZipFile(pt) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    name = next(name for name in members if name.endswith("/data/3"))
    members[name] = members[name][:-4]
    with zipfile.ZipFile(pt, "w") as archive:
        for key, content in members.items():
            archive.writestr(key, content)
    assert_refused(tmp_path / "run", "storage 3 is missing or too short")


@pytest.mark.torch
def test_pt_without_a_model_or_without_vision(tmp_path):
    torch = pytest.importorskip("torch")
    native_run(tmp_path / "run")
    torch.save({"weights": {}}, tmp_path / "other.pt")
    assert_refused(tmp_path / "other.pt", "no 'model' in it (weights)")
    write_native(tmp_path / "vlm", "siglip-letterbox", vision=False)
    assert_refused(tmp_path / "vlm", "no vision tower siglip in it", "--part siglip PATH")


# ---------------------------------------------------------------------------------------------------------------------
# Not what it should be
# ---------------------------------------------------------------------------------------------------------------------


def test_wrong_model_family(hf):
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | {"model_type": "llava"}))
    assert_refused(hf, "'llava'", "OpenVLA")


@pytest.mark.parametrize(
    ("change", "texts"),
    [
        ({"vision_backbone_id": "dinosiglip-vit-so-225px"}, ("did you mean 'dinosiglip-vit-so-224px'",)),
        ({"llm_backbone_id": "phi-2-3b"}, ("llm_backbone_id 'phi-2-3b' is not supported",)),
        ({"vision_backbone_id": "dinosiglip-vit-so-224px"}, ("image_sizes [224]", "2 towers")),
        ({"image_sizes": [384]}, ("another image size",)),
        ({"pad_token_id": 5}, ("pad_token_id 5", "mend config.json")),
        ({"text_config": {"model_type": "phi"}}, ("text_config.model_type 'phi'",)),
        ({"text_config": {"hidden_size": 63}}, ("text_config.hidden_size is 63", "have 64")),
        ({"text_config": {"rope_scaling": {"type": "linear", "factor": 2.0}}}, ("scaled RoPE",)),
        ({"norm_stats": {"a": {"action": {"q01": [0.0]}}}}, ("norm_stats", "'a'")),
    ],
)
def test_config_that_does_not_fit(hf, change, texts):
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | change))
    assert_refused(hf, *texts)


@pytest.mark.parametrize(
    "change",
    [{"norm_stats": []}, {"norm_stats": 5}, {"norm_stats": {"a": [1]}}, {"image_sizes": "big"}, {"image_sizes": [None]},
     {"text_config": [1]}, {"text_config": {"rope_scaling": 5}}, {"vision_backbone_id": ["x"]}, {"llm_max_length": "?"},
     {"pad_to_multiple_of": "64"}, {"model_config": 5}, {"n_action_bins": "many"}, {"timm_override_act_layers": 7},
     {"text_config": {"num_attention_heads": "four"}}, {"text_config": {"num_attention_heads": 0}}],
)  # fmt: skip
def test_config_of_another_form_is_named(hf, change):
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | change))
    assert_refused(hf, "config.json")


@pytest.mark.parametrize(
    "change",
    [{"q01": [float("nan")] * 7}, {"q01": [None] * 7}, {"q99": [float("inf")] * 7},
     {"q01": [1.0] * 7, "q99": [-1.0] * 7}, {"mean": 0.0}, {"q01": [[-1.0]] * 7}, {"q99": ["1"] * 7},
     {"q01": [], "q99": []}, {"mask": [1] * 7},
     {"std": [-1.0] * 7}, {"q99": [True] * 7}, {"min": [1.0] * 7, "max": [0.0] * 7}, {"q01": [0.0] * 6}],
)  # fmt: skip
def test_statistics_that_cannot_scale_are_refused_at_import(hf, change):
    row = STATISTICS["bridge_orig"]["action"] | change
    (hf / "dataset_statistics.json").write_text(json.dumps({"mine": {"action": row}}))
    assert_refused(hf, "dataset_statistics.json", "statistics of 'mine': action")


def test_config_that_is_no_json(hf):
    (hf / "config.json").write_text("{")
    assert_refused(hf, "config.json is not JSON")


def test_tokenizer_of_another_model(hf, shared):
    assert_refused(hf, "its pad token is 32000", tokenizer=shared / "data" / "llama2_tokenizer")


def test_unknown_tower_or_field_in_overrides(hf):
    assert_refused(hf, "no tower 'siglib'", "did you mean 'siglip'", model_config={"towers": {"siglib": {"heads": 4}}})
    assert_refused(hf, "unknown key 'head'", "did you mean 'heads'", model_config={"towers": {"siglip": {"head": 4}}})
    assert_refused(hf, "not a multiple of heads", model_config='{"towers": {"siglip": {"heads": 5}}}')
    assert_refused(hf, "is not JSON", model_config="{heads: 4}")


def test_folders_that_hold_something_else(tmp_path):
    for name in ("empty", "adapter"):
        (tmp_path / name).mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    assert_refused(tmp_path / "adapter", "LoRA adapter")
    with pytest.raises(ValueError, match="no complete checkpoint"):
        import_weights(tmp_path / "empty", tmp_path / "dst")
    assert_refused(tmp_path / "nowhere", "does not exist")


@pytest.mark.parametrize(
    ("change", "text"),
    [("remove", "1.0.0: is missing"), ("cut", "1.0.0: has .* bytes, not"), ("metadata", "_METADATA: has 1 bytes, not")],
)
def test_damaged_checkpoint_is_not_exported(hf, tmp_path, change, text):
    import_weights(hf, tmp_path / "orbax")
    chunk = tmp_path / "orbax" / "params" / "llama.blocks.mlp.up.kernel" / "1.0.0"
    if change == "remove":
        chunk.unlink()
    elif change == "cut":
        chunk.write_bytes(chunk.read_bytes()[:-2])
    else:
        (tmp_path / "orbax" / "params" / "_METADATA").write_text("{")
    with pytest.raises(InputError, match=text) as error:
        export_weights(tmp_path / "orbax", tmp_path / "out")
    assert len(str(error.value).splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "orbax"]


# ---------------------------------------------------------------------------------------------------------------------
# The destination
# ---------------------------------------------------------------------------------------------------------------------


def test_quantised_checkpoints_are_told_apart(hf, tmp_path):
    import_weights(hf, tmp_path / "whole")
    model, _ = load_model(tmp_path / "whole", quantize="int8", exclude=("vision", "llama"))
    save_model(model, load_contract(tmp_path / "whole"), tmp_path / "int8")
    for refuse in (
        lambda: export_weights(tmp_path / "int8", tmp_path / "dst"),
        lambda: verify_weights(tmp_path / "whole", tmp_path / "int8"),
        lambda: import_weights(tmp_path / "int8", tmp_path / "dst"),
    ):
        with pytest.raises(ConversionError) as error:
            refuse()
        assert "\n" not in str(error.value) and "int8" in str(error.value)
    assert not (tmp_path / "dst").exists()
    assert "int8 kernels" in inspect_weights(tmp_path / "int8").splitlines()[0]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_existing_destination_is_refused_and_untouched(hf, tmp_path):
    dst = tmp_path / "dst"
    dst.mkdir()
    (dst / "mine.txt").write_text("mine")
    for convert in (import_weights, export_weights):
        with pytest.raises(ConversionError, match=r"exists: .* --overwrite"):
            convert(hf, dst)
    assert contents(dst) == {"mine.txt": b"mine"}


def test_overwriting_replaces_everything_or_nothing(hf, tmp_path):
    dst = tmp_path / "dst"
    import_weights(hf, dst)
    (dst / "mine.txt").write_text("mine")
    before = contents(dst)
    write_hf(tmp_path / "other", "clip")
    file = tmp_path / "other" / "model.safetensors"
    good = load_file(file)
    save_file(
        good | {"language_model.lm_head.weight": good["language_model.lm_head.weight"] * np.float32(np.nan)}, file
    )
    with pytest.raises(ConversionError, match="NaN"):
        import_weights(tmp_path / "other", dst, overwrite=True)
    assert contents(dst) == before
    save_file(good, file)
    import_weights(tmp_path / "other", dst, overwrite=True)
    assert "mine.txt" not in contents(dst)
    assert [tower.name for tower in load_contract(dst).model.towers] == ["clip"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dst", "hf", "other"]


def test_failing_at_the_last_moment_gives_the_old_destination_back(hf, tmp_path, monkeypatch):
    dst = tmp_path / "dst"
    import_weights(hf, dst)
    before, rename = contents(dst), os.replace

    def fails_to_place(src, target):
        if "incomplete" in str(src):
            raise OSError(errno.EACCES, "Permission denied")
        rename(src, target)

    monkeypatch.setattr(os, "replace", fails_to_place)
    with pytest.raises(OSError, match="Permission denied"):
        import_weights(hf, dst, overwrite=True)
    assert contents(dst) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dst", "hf"]


def test_too_little_space_is_seen_before_anything_is_written(hf, monkeypatch):
    usage = shutil.disk_usage(hf)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert_refused(hf, "0.0 GB free", "are needed")


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), ValueError("RESOURCE_EXHAUSTED: No space left on device")],
)
def test_disk_that_fills_up_on_the_way(hf, tmp_path, monkeypatch, error):
    from openvla_jax.convert import exporter, importer

    def fails(*_, **__):
        raise error

    monkeypatch.setattr(importer.OrbaxWriter, "finish", fails)
    assert_refused(hf, "the disk filled up")
    monkeypatch.setattr(exporter, "fill", fails)
    with pytest.raises(ConversionError, match="the disk filled up"):
        export_weights(hf, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_interrupt_leaves_nothing(hf, monkeypatch):
    from openvla_jax.convert import importer

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(importer, "require_finite", interrupt)
    with pytest.raises(KeyboardInterrupt):
        import_weights(hf, hf.parent / "dst")
    assert sorted(path.name for path in hf.parent.iterdir()) == ["hf"]


def test_killed_process_leaves_no_finished_looking_destination(hf, tmp_path):
    code = """
import sys, time
from openvla_jax.convert import import_weights, importer
original = importer.require_finite
def slow(x, name, where):
    if "lm_head" in name:
        print("writing", flush=True)
        time.sleep(60)
    original(x, name, where)
importer.require_finite = slow
import_weights(sys.argv[1], sys.argv[2])
"""
    dst = tmp_path / "dst"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(hf), str(dst)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        assert process.stdout.readline() == b"writing\n"
        time.sleep(0.1)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    assert not dst.exists()
    (left,) = [path for path in tmp_path.iterdir() if path.name != "hf"]
    assert left.name.startswith(".dst.incomplete-")
    with pytest.raises(ValueError, match="no complete checkpoint"):
        export_weights(left, tmp_path / "out")
    import_weights(hf, dst)  # and the next attempt is not in its way
    assert load_contract(dst).model.towers[0].name == "siglip"
