"""OpenVLA-OFT's files out again: what its loader reads, tensors bit for bit, and what it must be told."""

import dataclasses
import filecmp
import json
import re
from pathlib import Path

import numpy as np
import pytest
from fabricate import DTYPES
from oft.cases import imported, names, reference_folder, settings
from oft_files import SUFFIX, model_of, stored, write_oft, write_pt

from openvla_jax.checkpoint.reading import load_contract
from openvla_jax.convert import ConversionError, OftOptions, export_weights, exporter, import_weights
from openvla_jax.convert.sources import open_source

# A directory of a real run, in its dtypes, is quick; the other cases are long.
QUICK = {*names(use_l1_regression=True, use_proprio=True, use_film=False, float32=False)[:1]}
# What the reference's loader copies beside the weights; the hub's code knows no chunks.
LOCAL_CODE = {
    "AutoConfig": "configuration_prismatic.OpenVLAConfig",
    "AutoModelForVision2Seq": "modeling_prismatic.OpenVLAForActionPrediction",
}
CASES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in names()]


def files(folder: Path, pattern: str = "*") -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob(pattern) if path.is_file())


def assert_same_bytes(a: Path, b: Path) -> None:
    assert files(a) == files(b)
    different = [name for name in files(a) if not filecmp.cmp(a / name, b / name, shallow=False)]
    assert not different


# ---------------------------------------------------------------------------------------------------------------------
# Files of the real code
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.torch
@pytest.mark.parametrize("name", CASES)
def test_export_gives_back_the_files_of_the_reference(name, tmp_path):
    """Loaded by PyTorch without unpickling objects. The towers of FiLM's file are merged, see the next test."""
    torch = pytest.importorskip("torch")
    original = reference_folder(name, tmp_path / "original")
    export_weights(imported(name), tmp_path / "back")
    load = lambda folder, file: torch.load(folder / file, weights_only=True, map_location="cpu")
    components = files(original, "*--*.pt")
    assert files(tmp_path / "back", "*--*.pt") == components
    for file in components:
        before, after = load(original, file), load(tmp_path / "back", file)
        assert list(after) == list(before), file
        for key, tensor in after.items():
            assert tensor.shape == before[key].shape and tensor.is_contiguous(), key
            is_film = re.search(r"\.blocks\.\d+\.(scale|shift)\.", key)
            if not file.startswith("vision_backbone") or is_film:
                assert tensor.dtype == before[key].dtype and torch.equal(tensor, before[key]), key
    before, after = model_of(original), model_of(tmp_path / "back")
    assert before.keys() == after.keys()
    for key, x in after.items():
        if not (settings(name)["use_film"] and key.startswith("vision_backbone.")):
            assert x.dtype == before[key].dtype and x.tobytes() == before[key].tobytes(), key
    statistics = "dataset_statistics.json"
    assert (tmp_path / "back" / statistics).read_bytes() == (original / statistics).read_bytes()
    configs = [json.loads((folder / "config.json").read_text()) for folder in (original, tmp_path / "back")]
    for key in configs[0].keys() - {"norm_stats", "torch_dtype", "text_config", "auto_map"}:
        assert configs[1][key] == configs[0][key], key
    assert configs[1]["auto_map"] == LOCAL_CODE


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.long) for name in names(use_film=True)])
def test_export_writes_towers_merged_with_zero_adapters(name, tmp_path):
    original = stored(next(reference_folder(name, tmp_path / "original").glob("vision_backbone--*")))
    export_weights(imported(name), tmp_path / "back")
    written, model = stored(next((tmp_path / "back").glob("vision_backbone--*"))), model_of(tmp_path / "back")
    assert list(written) == list(original)
    rank = settings(name)["lora_rank"]
    for key, x in written.items():
        assert x.shape == original[key].shape, key
        if ".lora_" in key:
            assert not x.any(), key
            continue
        wanted = original[key].astype(np.float32)
        if key.endswith(".base_layer.weight"):
            a, b = (original[key.replace("base_layer", f"lora_{side}.default")].astype(np.float32) for side in "AB")
            wanted = wanted + min(rank, 16) / rank * (b.reshape(len(b), -1) @ a.reshape(len(a), -1)).reshape(x.shape)
        np.testing.assert_allclose(x.astype(np.float32), wanted, atol=1e-6, err_msg=key)
        plain = re.sub(r"(\.blocks\.\d+)\.block\.", r"\1.", key).replace(".base_layer.", ".")
        if plain in model:
            assert model[plain].tobytes() == x.tobytes(), key
        else:
            assert re.search(r"\.(scale|shift)\.", key)


@pytest.mark.long
@pytest.mark.parametrize("name", names())
def test_export_comes_back_bit_for_bit(name, tmp_path):
    """Every array and the policy, with no word about the platform; and exported again, every byte of every file."""
    export_weights(imported(name), tmp_path / "back")
    import_weights(tmp_path / "back", tmp_path / "again")
    for item in ("params", "unused"):
        assert_same_bytes(imported(name) / item, tmp_path / "again" / item)
    first, second = (load_contract(path) for path in (imported(name), tmp_path / "again"))
    for field in ("observation", "action", "preprocessing", "statistics"):
        assert getattr(first, field) == getattr(second, field), field
    assert dataclasses.replace(first.model, name="") == dataclasses.replace(second.model, name="")
    export_weights(tmp_path / "again", tmp_path / "twice")
    assert_same_bytes(tmp_path / "back", tmp_path / "twice")


# ---------------------------------------------------------------------------------------------------------------------
# Random checkpoints
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "film"),
    [("l1", True), *(pytest.param(*case, marks=pytest.mark.long) for case in [
        ("diffusion", False), ("parallel_tokens", True)
    ])],
)  # fmt: skip
def test_random_checkpoints_come_back(head, film, tmp_path):
    tensors = write_oft(tmp_path / "oft", head, film=film)
    options = OftOptions("libero", head="parallel_tokens" if head == "parallel_tokens" else None)
    import_weights(tmp_path / "oft", tmp_path / "orbax", oft=options)
    notes = " ".join(export_weights(tmp_path / "orbax", tmp_path / "back"))
    assert f"--use_film {film} " in notes and ("--lora_rank 20" in notes) == film
    for file in (tmp_path / "oft").glob("*--*.pt"):
        before, after = stored(file), stored(tmp_path / "back" / file.name)
        assert before.keys() == after.keys()
        kept = [key for key in before if "vision" not in file.name or re.search(r"\.(scale|shift)\.", key)]
        assert kept and all(after[key].tobytes() == before[key].tobytes() for key in kept)
    language = {name: x for name, x in model_of(tmp_path / "back").items() if not name.startswith("vision")}
    assert all(x.tobytes() == tensors[name].tobytes() for name, x in language.items())
    import_weights(tmp_path / "back", tmp_path / "again")
    assert_same_bytes(tmp_path / "orbax" / "params", tmp_path / "again" / "params")


def test_towers_with_zero_adapters_come_back_whole(tmp_path):
    """As they come from an export in bfloat16: nothing is merged, and every byte of the tensors is carried."""
    write_oft(tmp_path / "oft", film=True)
    path = tmp_path / "oft" / f"vision_backbone--{SUFFIX}"
    write_pt(path, {name: np.zeros_like(x) if ".lora_" in name else x for name, x in stored(path).items()})
    import_weights(tmp_path / "oft", tmp_path / "orbax", oft=OftOptions("libero"))
    export_weights(tmp_path / "orbax", tmp_path / "back")
    before, after = stored(path), stored(tmp_path / "back" / path.name)
    assert list(before) == list(after)
    assert all(x.tobytes() == after[name].tobytes() and x.dtype == after[name].dtype for name, x in before.items())


def test_export_in_bfloat16_keeps_what_the_reference_keeps_in_float32(tmp_path):
    write_oft(tmp_path / "oft", film=True, dtype="float32")
    import_weights(tmp_path / "oft", tmp_path / "orbax", oft=OftOptions("libero"))
    export_weights(tmp_path / "orbax", tmp_path / "back", dtype="bfloat16")
    for file in (tmp_path / "back").glob("*--*.pt"):
        for key, x in stored(file).items():
            exact = file.name.startswith("proprio") or re.search(r"\.\d+\.(scale|shift)\.", key)
            assert x.dtype == DTYPES["float32" if exact else "bfloat16"], key
    assert {x.dtype for x in model_of(tmp_path / "back").values()} == {np.dtype(DTYPES["bfloat16"])}


def test_export_says_what_the_reference_must_be_told(tmp_path):
    write_oft(tmp_path / "oft", "diffusion", columns=14, dim=14)
    import_weights(tmp_path / "oft", tmp_path / "orbax", oft=OftOptions("aloha"), center_crop=True)
    notes = export_weights(tmp_path / "orbax", tmp_path / "back")
    assert (
        "options of openvla-oft: --use_l1_regression False --use_diffusion True --use_film False "
        "--num_images_in_input 3 --use_proprio True --center_crop True --num_diffusion_steps_inference 50"
    ) in notes
    assert "its constants are right if its command line has the word aloha" in notes
    assert (
        "its observation: full_image = primary, then *wrist* = left_wrist, then *wrist* = right_wrist, in this order"
        in notes
    )


def test_export_of_a_token_policy_says_what_the_reference_leaves_out(tmp_path):
    write_oft(tmp_path / "oft", "parallel_tokens")
    options = OftOptions("libero", head="parallel_tokens")
    import_weights(tmp_path / "oft", tmp_path / "orbax", oft=options)
    assert any("leaves out state and FiLM" in note for note in export_weights(tmp_path / "orbax", tmp_path / "back"))


@pytest.mark.parametrize(
    ("change", "format", "message"),
    [
        ({"normalization": "normal"}, "hf", r"action\.normalization is 'normal'"),
        ({}, "prismatic", r"action\.horizon is 8, and OpenVLA's PyTorch code knows 1 alone"),
    ],
)
def test_export_refuses_what_the_reference_cannot_do(tmp_path, monkeypatch, change, format, message):
    write_oft(tmp_path / "oft")
    source = open_source(tmp_path / "oft", oft=OftOptions("libero"))
    source = dataclasses.replace(source, action=dataclasses.replace(source.action, **change))
    monkeypatch.setattr(exporter, "open_source", lambda path: source)
    with pytest.raises(ConversionError, match=message) as caught:
        export_weights(tmp_path / "oft", tmp_path / "out", format=format)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
