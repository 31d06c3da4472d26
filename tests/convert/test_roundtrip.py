"""Out and in and out again: byte-equal tensors, same dtypes, same keys, same model, for every variant."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import golden
from fabricate import NATIVE_ONLY, STATISTICS, VARIANTS, shrunken, write_hf, write_native
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from orbax.checkpoint import v1 as ocp
from safetensors import safe_open

from openvla_jax.checkpoint.reading import load_contract, load_unused
from openvla_jax.convert import ConversionError, export_weights, exporter, import_weights
from openvla_jax.convert.orbax_io import OrbaxReader, OrbaxWriter, chunk_shape
from openvla_jax.convert.sources import flatten, open_source
from openvla_jax.convert.torch_io import read_pt, read_torch_folder
from openvla_jax.convert.torch_write import lay_out_safetensors
from openvla_jax.types import ActionSpec, ObservationSpec

HF_VARIANTS = [variant for variant in VARIANTS if variant not in NATIVE_ONLY]


def assert_same(ours: dict, theirs: dict) -> None:
    """Keys, shapes, dtypes and bytes."""
    assert sorted(ours) == sorted(theirs)
    for name, tensor in ours.items():
        value = tensor.read()
        assert value.shape == theirs[name].shape and value.dtype == theirs[name].dtype, name
        assert value.tobytes() == np.ascontiguousarray(theirs[name]).tobytes(), name


def same_model(a, b) -> bool:
    return dataclasses.replace(a, name="") == dataclasses.replace(b, name="")


@pytest.mark.parametrize("variant", HF_VARIANTS)
@pytest.mark.parametrize(("dtype", "shards"), [("bfloat16", 3), ("float32", 1)])
def test_huggingface_comes_back_bit_for_bit(variant, dtype, shards, tmp_path):
    tensors = write_hf(tmp_path / "hf", variant, dtype, shards)
    import_weights(tmp_path / "hf", tmp_path / "orbax")
    contract = load_contract(tmp_path / "orbax")
    assert same_model(contract.model, shrunken(variant))
    assert contract.statistics == STATISTICS
    export_weights(tmp_path / "orbax", tmp_path / "back")
    assert_same(read_torch_folder(tmp_path / "back"), tensors)
    again = open_source(tmp_path / "back")
    assert same_model(again.model, contract.model) and again.statistics == STATISTICS
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    original = json.loads((tmp_path / "hf" / "config.json").read_text())
    kept = (
        "vision_backbone_id",
        "llm_backbone_id",
        "timm_model_ids",
        "timm_override_act_layers",
        "image_sizes",
        "norm_stats",
    )
    for key in (*kept, "image_resize_strategy", "pad_token_id", "pad_to_multiple_of", "torch_dtype"):
        assert config[key] == original[key], key
    assert "model_config" not in config  # the reference's own keys say everything


@pytest.mark.torch
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_native_comes_back_bit_for_bit(variant, dtype, tmp_path):
    torch = pytest.importorskip("torch")
    tensors = write_native(tmp_path / "run", variant, dtype)
    import_weights(tmp_path / "run", tmp_path / "orbax")
    assert same_model(load_contract(tmp_path / "orbax").model, shrunken(variant))
    export_weights(tmp_path / "orbax", tmp_path / "back", format="prismatic")
    (pt,) = (tmp_path / "back" / "checkpoints").glob("*.pt")
    assert_same(flatten(read_pt(pt)["model"]), tensors)
    assert same_model(open_source(tmp_path / "back").model, shrunken(variant))
    for mmap in (False, True):
        loaded = torch.load(pt, weights_only=True, mmap=mmap)["model"]
        for name, value in tensors.items():
            part, _, rest = name.partition(".")
            assert torch.equal(loaded[part][rest].float(), torch.tensor(value.astype(np.float32))), name
            assert str(loaded[part][rest].dtype) == f"torch.{dtype}"


@pytest.mark.parametrize(("name", "format"), [("openvla_tiny", "hf"), ("openvla_tiny_native", "prismatic")])
def test_goldens_come_back_bit_for_bit(name, format, tmp_path):
    """They have no tokenizer files: the checkpoint has none either, and says so."""
    import_weights(golden(name), tmp_path / "orbax")
    export_weights(tmp_path / "orbax", tmp_path / "back", format=format)
    original = open_source(golden(name)).weights.tensors
    assert_same(open_source(tmp_path / "back").weights.tensors, {n: t.read() for n, t in original.items()})
    assert load_contract(tmp_path / "orbax").tokenizer is None
    assert any("tokenizer" in note for note in open_source(tmp_path / "orbax").notes)


@pytest.mark.torch
def test_huggingface_and_native_hold_the_same_checkpoint(tmp_path):
    pytest.importorskip("torch")
    tensors = write_native(tmp_path / "run", "dinosiglip")
    export_weights(
        tmp_path / "run", tmp_path / "hf"
    )  # from one PyTorch layout to the other, without a checkpoint between
    export_weights(tmp_path / "hf", tmp_path / "run2", format="prismatic")
    assert_same(open_source(tmp_path / "run2").weights.tensors, tensors)
    assert same_model(open_source(tmp_path / "hf").model, shrunken("dinosiglip"))


def test_layer_scale_is_read_under_both_names(tmp_path):
    from safetensors.numpy import load_file, save_file

    tensors = write_hf(tmp_path / "hf", "dinosiglip")
    file = tmp_path / "hf" / "model.safetensors"
    save_file({name.replace("scale_factor", "gamma"): value for name, value in load_file(file).items()}, file)
    import_weights(tmp_path / "hf", tmp_path / "orbax")
    export_weights(tmp_path / "orbax", tmp_path / "back")
    assert_same(read_torch_folder(tmp_path / "back"), tensors)


def test_dead_tensors_travel_apart_from_the_parameters(tmp_path):
    tensors = write_hf(tmp_path / "hf", "dinosiglip")
    import_weights(tmp_path / "hf", tmp_path / "orbax")
    unused = load_unused(tmp_path / "orbax")
    prefix = "vision_backbone.fused_featurizer.attn_pool."
    np.testing.assert_array_equal(unused["siglip"]["pool"]["latent"], tensors[prefix + "latent"][0])
    np.testing.assert_array_equal(unused["siglip"]["pool"]["v"]["kernel"], tensors[prefix + "kv.weight"][48:].T)
    assert "pool" not in ocp.load(tmp_path / "orbax", checkpointable_name="params")["vision"]["siglip"]


def test_statistics_file_beside_the_weights_replaces_norm_stats(tmp_path):
    write_hf(tmp_path / "hf", "siglip-letterbox")
    mine = {"my_robot": STATISTICS["bridge_orig"]}
    (tmp_path / "hf" / "dataset_statistics.json").write_text(json.dumps(mine))
    import_weights(tmp_path / "hf", tmp_path / "orbax")
    assert load_contract(tmp_path / "orbax").statistics == mine


def test_image_statistics_of_the_preprocessor_are_taken_as_stated(tmp_path):
    write_hf(tmp_path / "hf", "dinosiglip")
    rounded = {"mean": [0.484375, 0.455078125, 0.40625], "std": [0.228515625, 0.2236328125, 0.224609375]}
    half = {"mean": [0.5] * 3, "std": [0.5] * 3}
    stated = {"means": [[0.1] * 3] * 2, "stds": [[0.2] * 3] * 2, "tvf_normalize_params": [rounded, half]}
    (tmp_path / "hf" / "preprocessor_config.json").write_text(json.dumps(stated))
    import_weights(tmp_path / "hf", tmp_path / "orbax", center_crop=True)
    contract = load_contract(tmp_path / "orbax")
    assert contract.model.towers[0].mean == tuple(rounded["mean"]) and contract.model.towers[0].std == tuple(
        rounded["std"]
    )
    assert contract.model.towers[1].std == (0.5, 0.5, 0.5)
    assert contract.preprocessing.crop_area == 0.9
    export_weights(tmp_path / "orbax", tmp_path / "back")
    exported = json.loads((tmp_path / "back" / "preprocessor_config.json").read_text())
    assert [{k: p[k] for k in ("mean", "std")} for p in exported["tvf_normalize_params"]] == [rounded, half]


def test_what_files_cannot_say_comes_from_overrides_and_survives_an_export(tmp_path):
    write_hf(tmp_path / "hf", "dinosiglip")
    overrides = {"towers": {"siglip": {"heads": 8}}, "llama": {"norm_eps": 1e-5}}
    import_weights(tmp_path / "hf", tmp_path / "orbax", model_config=json.dumps(overrides))
    model = load_contract(tmp_path / "orbax").model
    assert [tower.heads for tower in model.towers] == [4, 8] and model.llama.norm_eps == 1e-5
    for format in ("hf", "prismatic"):
        export_weights(tmp_path / "orbax", tmp_path / f"back-{format}", format=format)
        assert same_model(open_source(tmp_path / f"back-{format}").model, model)


def test_guesses_are_noted_and_overrides_silence_them(tmp_path):
    write_hf(tmp_path / "hf", "dinosiglip")
    notes = open_source(tmp_path / "hf").notes
    assert [note.split()[0] for note in notes] == ["dino", "siglip"] and "4 assumed" in notes[0]
    told = {"towers": {"dino": {"heads": 2}, "siglip": {"heads": 4}}}
    assert open_source(tmp_path / "hf", model_config=told).notes == []


def test_a_checkpoint_that_orbax_wrote_is_exported_alike(tmp_path):
    """As after training: written by Orbax, in other chunks, without the tensors that are never run."""
    tensors = write_hf(tmp_path / "hf", "dinosiglip", "bfloat16")
    import_weights(tmp_path / "hf", tmp_path / "orbax")
    params = ocp.load(tmp_path / "orbax", checkpointable_name="params")
    trained = tmp_path / "trained"
    ocp.save_checkpointables(trained, {"params": params})
    (trained / "contract").mkdir()
    load_contract(tmp_path / "orbax").save(trained / "contract")
    notes = export_weights(trained, tmp_path / "back")
    assert any("written as zeros" in note for note in notes)
    back = read_torch_folder(tmp_path / "back")
    assert sorted(back) == sorted(tensors)
    last = (".blocks.2.", "featurizer.norm.", "attn_pool")
    for name, value in tensors.items():
        dead = name.startswith("vision_backbone") and any(part in name for part in last)
        assert back[name].read().tobytes() == (bytes(value.nbytes) if dead else value.tobytes()), name


def test_export_in_another_dtype_rounds_every_tensor(tmp_path):
    tensors = write_hf(tmp_path / "hf", "siglip-letterbox", "float32")
    export_weights(tmp_path / "hf", tmp_path / "back", dtype="bfloat16")
    assert_same(
        read_torch_folder(tmp_path / "back"), {name: value.astype(jnp.bfloat16) for name, value in tensors.items()}
    )
    assert json.loads((tmp_path / "back" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_the_hf_code_has_no_linear_projector(tmp_path):
    config = shrunken("siglip-linear")
    assert config.projector.kind == "linear"
    write_hf(tmp_path / "hf", "siglip-letterbox")
    linear = {"projector": {"kind": "linear"}}
    with pytest.raises(ConversionError, match="do not fit the model"):
        import_weights(tmp_path / "hf", tmp_path / "orbax", model_config=linear)


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def test_shards_split_where_the_reference_splits_them(tmp_path, monkeypatch):
    """Sizes and first tensors of the three files of openvla-7b, laid out without making them."""
    from openvla_jax.config import preset
    from openvla_jax.convert import torch_write
    from openvla_jax.convert.names import source_shapes, table

    sizes = []
    monkeypatch.setattr(torch_write, "_create", lambda path, size: (path.touch(), sizes.append(size)))
    dtype = np.dtype(jnp.bfloat16)
    tensors = lay_out_safetensors(
        tmp_path, {n: (dtype, s) for n, s in source_shapes(table(preset("openvla-7b"), "hf")).items()}
    )
    starts = [
        min(t.offset for t in tensors.values() if t.file.name == f"model-0000{i}-of-00003.safetensors")
        for i in (1, 2, 3)
    ]
    assert [size - start for size, start in zip(sizes, starts, strict=True)] == [
        6_948_858_752,
        6_971_211_776,
        1_162_403_840,
    ]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 15_082_474_368
    files = index["weight_map"]
    layer = "language_model.model.layers.12.mlp."
    assert files[layer + "gate_proj.weight"] != files[layer + "up_proj.weight"]


def test_the_safetensors_library_reads_what_is_written(tmp_path):
    tensors = write_hf(tmp_path / "hf", "clip", "bfloat16")
    export_weights(tmp_path / "hf", tmp_path / "back")
    with safe_open(tmp_path / "back" / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
        assert sorted(file.keys()) == sorted(tensors)
        for name in file.keys():  # noqa: SIM118 - not a dict
            assert file.get_tensor(name).tobytes() == tensors[name].tobytes()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple),
    stacked=st.booleans(),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    chunk=st.integers(1, 200),
)
def test_leaves_written_slice_by_slice_are_what_orbax_reads(shape, stacked, dtype, chunk, tmp_path_factory):
    from openvla_jax.convert import orbax_io

    stacked = stacked and len(shape) > 1
    leaf = "params/a/blocks/x" if stacked else "params/a/x"
    dtype = np.dtype(jnp.dtype(dtype))
    folder = tmp_path_factory.mktemp("orbax")
    values = np.random.default_rng(0).normal(size=shape).astype(dtype)
    bytes_before, orbax_io.CHUNK_BYTES = orbax_io.CHUNK_BYTES, chunk
    try:
        writer = OrbaxWriter(folder)
        writer.create(leaf, shape, dtype)
    finally:
        orbax_io.CHUNK_BYTES = bytes_before
    for layer in reversed(range(shape[0])) if stacked else [None]:
        writer.write(leaf, layer, values if layer is None else values[layer])
    writer.finish()
    tree = ocp.load(folder, checkpointable_name="params")
    read = tree["a"]["blocks"]["x"] if stacked else tree["a"]["x"]
    assert read.dtype == dtype and read.tobytes() == values.tobytes()
    again = OrbaxReader(folder)
    step = again.step(leaf)
    parts = [again.read(leaf, first, step) for first in range(0, shape[0], step)] if stacked else [again.read(leaf)]
    assert np.concatenate(parts).tobytes() == values.tobytes() if stacked else parts[0].tobytes() == values.tobytes()


def test_chunks_hold_one_layer_at_most_and_few_bytes():
    bf16 = np.dtype(jnp.bfloat16)
    assert chunk_shape("params/llama/blocks/mlp/up/kernel", (32, 4096, 11008), bf16) == (1, 512, 11008)
    assert chunk_shape("params/llama/embed/table", (32064, 4096), bf16) == (2004, 4096)
    assert chunk_shape("params/llama/norm/scale", (4096,), bf16) == (4096,)
    assert chunk_shape("params/llama/blocks/norm1/scale", (32, 4096), bf16) == (1, 4096)


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_float8_is_imported_with_its_values(tmp_path, dtype, file):
    """As PyTorch converts it: to bfloat16, or to the type of the leaf's other layers."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file as load
    from safetensors.torch import save_file as save

    write_hf(tmp_path / "hf", "siglip-letterbox")
    tensors = load(tmp_path / "hf" / "model.safetensors")
    head, one = "language_model.lm_head.weight", "language_model.model.layers.1.mlp.up_proj.weight"
    tensors |= {name: tensors[name].to(getattr(torch, dtype)) for name in (head, one)}
    (tmp_path / "hf" / "model.safetensors").unlink()
    (save if file == "model.safetensors" else torch.save)(tensors, tmp_path / "hf" / file)
    import_weights(tmp_path / "hf", tmp_path / "orbax")
    weights = OrbaxReader(tmp_path / "orbax")
    kernel = weights.read("params/llama/head/kernel")
    assert kernel.dtype.name == "bfloat16"
    np.testing.assert_array_equal(kernel.astype(np.float32).T, tensors[head].float().numpy())
    layer = weights.read("params/llama/blocks/mlp/up/kernel", 1)[0]
    assert layer.dtype.name == "float32"
    np.testing.assert_array_equal(layer.T, tensors[one].float().numpy())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"action": ActionSpec(horizon=8, executed=4)}, r"action\.horizon is 8"),
        ({"action": ActionSpec(normalization="bounds")}, r"action\.normalization is 'bounds'"),
        ({"observation": ObservationSpec(state=("x",))}, r"observation\.state is 1"),
        ({"observation": ObservationSpec(cameras=("primary", "wrist"))}, r"observation\.cameras is 2"),
    ],
)
@pytest.mark.parametrize("format", ["hf", "prismatic"])
def test_export_refuses_what_the_reference_cannot_do(tmp_path, monkeypatch, change, message, format):
    write_hf(tmp_path / "hf", "siglip-letterbox")
    source = dataclasses.replace(open_source(tmp_path / "hf"), **change)
    monkeypatch.setattr(exporter, "open_source", lambda path: source)
    with pytest.raises(ConversionError, match=message) as caught:
        export_weights(tmp_path / "hf", tmp_path / "out", format=format)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
