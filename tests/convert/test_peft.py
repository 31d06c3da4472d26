"""PEFT's adapters: a real one's logits, files that come back bit for bit, merging, and bad input in one line."""

import json
import shutil

import jax
import numpy as np
import pytest
from conftest import golden
from flax import nnx
from jax.sharding import PartitionSpec as P

from openvla_jax.checkpoint.contract import CheckpointError
from openvla_jax.checkpoint.load import load_adapted, load_model, tensor_mesh
from openvla_jax.checkpoint.reading import load_contract, open_checkpoint
from openvla_jax.convert import ConversionError, export_adapter, import_adapter, import_weights, merge_weights
from openvla_jax.convert.peft import CONFIG, WEIGHTS, modules
from openvla_jax.convert.sources import open_source
from openvla_jax.convert.torch_io import fill, read_safetensors

BOUND = 2e-4


@pytest.fixture(scope="module")
def folders(tmp_path_factory, shared):
    """(base checkpoint, adapter checkpoint, PEFT's folder)."""
    root, peft = tmp_path_factory.mktemp("peft"), golden("openvla_tiny") / "lora"
    import_weights(golden("openvla_tiny"), root / "base", tokenizer=shared / "data" / "llama2_tokenizer")
    import_adapter(peft, root / "adapter", root / "base")
    return root / "base", root / "adapter", peft


@pytest.fixture(scope="module")
def merged(folders, tmp_path_factory):
    """(the merged checkpoint, the report)."""
    base, _, peft = folders
    path = tmp_path_factory.mktemp("merged") / "merged"
    return path, merge_weights(base, peft, path)


@pytest.fixture(scope="module")
def logits():
    """The model's logits on the golden's inputs."""
    with np.load(golden("openvla_tiny") / "expected.npz", allow_pickle=False) as arrays:
        ids = arrays["input_ids"].astype(np.int32)
    pixels = np.load(golden("openvla_tiny") / "pixel_values.npy").transpose(0, 2, 3, 1)
    run = jax.jit(lambda model: model(pixels, ids))
    return lambda model: np.asarray(run(model))


def test_logits_are_those_of_peft_beside_the_base_and_merged(folders, merged, logits, tmp_path):
    base, adapter, peft = folders
    with np.load(peft / "expected.npz", allow_pickle=False) as arrays:
        expected = dict(arrays)
    unmerged = logits(load_adapted(open_checkpoint(adapter), load_contract(adapter), "float32", merge=False))
    assert np.abs(unmerged[:, 256:, ::29] - expected["logits_text"]).max() <= BOUND
    np.testing.assert_array_equal(unmerged.argmax(-1), expected["argmax"])
    plain = logits(load_model(base)[0])
    assert np.abs(plain - unmerged).max() > 0.1  # the adapter does something

    path, report = merged
    assert report.passed and 0 < report.max_logit_difference <= 1e-4
    assert np.abs(logits(load_model(path)[0]) - unmerged).max() <= 1e-4
    mesh = tensor_mesh(load_contract(base).model, jax.devices()[:2])
    spread = load_model(adapter, mesh=mesh)[0]
    assert spread.llama.blocks.mlp.down.kernel[...].sharding.spec == P(None, "tensor")
    kernels = [nnx.state(model) for model in (load_model(path)[0], load_model(adapter)[0], spread)]
    for state in kernels[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), kernels[0], state)
    with pytest.raises(ConversionError, match="beyond 1e-09: raise --threshold") as caught:
        merge_weights(base, adapter, tmp_path / "strict", threshold=1e-9)
    assert "\n" not in str(caught.value) and not (tmp_path / "strict").exists()


def test_dead_modules_are_merged_as_peft_does(folders, merged):
    """The attention pool is never run, but PEFT's merged checkpoint holds its merged weights."""
    base, _, peft = folders
    tensors = {name: tensor.read() for name, tensor in read_safetensors(peft / WEIGHTS).items()}
    before, after = open_source(base).weights, open_source(merged[0]).weights
    for module, leaf, rows in (("kv", "pool/v", slice(96, 192)), ("mlp.fc2", "pool/mlp/down", slice(0, 96))):
        name = f"base_model.model.vision_backbone.fused_featurizer.attn_pool.{module}"
        delta = tensors[f"{name}.lora_B.weight"][rows] @ tensors[f"{name}.lora_A.weight"]
        leaf = f"unused/siglip/{leaf}/kernel"
        np.testing.assert_allclose(after.read(leaf), before.read(leaf) + delta.T, atol=1e-6)


def test_exported_and_imported_again_it_is_bit_equal(folders, tmp_path):
    base, adapter, peft = folders
    export_adapter(adapter, tmp_path / "back")
    ours = {name: tensor.read() for name, tensor in read_safetensors(tmp_path / "back" / WEIGHTS).items()}
    theirs = {name: tensor.read() for name, tensor in read_safetensors(peft / WEIGHTS).items()}
    assert set(theirs) - set(ours) == {"base_model.model.language_model.lm_head.base_layer.weight"}
    assert all(x.tobytes() == theirs[name].tobytes() for name, x in ours.items())
    settings = json.loads((tmp_path / "back" / CONFIG).read_text())
    assert (settings["r"], settings["lora_alpha"], settings["peft_type"]) == (8, 8, "LORA")

    import_adapter(tmp_path / "back", tmp_path / "again", base)
    assert load_contract(tmp_path / "again").adapter == load_contract(adapter).adapter
    states = [
        nnx.to_flat_state(nnx.state(load_adapted(open_checkpoint(p), load_contract(p), "float32", merge=False)))
        for p in (adapter, tmp_path / "again")
    ]
    for (path, a), (_, b) in zip(*states, strict=True):
        assert np.asarray(a[...]).tobytes() == np.asarray(b[...]).tobytes(), path


def test_targets_of_the_export_are_exactly_the_adapted_modules(folders, tmp_path):
    import re

    _, adapter, peft = folders
    export_adapter(adapter, tmp_path / "back")
    expression = json.loads((tmp_path / "back" / CONFIG).read_text())["target_modules"]
    tensors = read_safetensors(peft / WEIGHTS)
    adapted = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in tensors}
    adapted = {name for name in adapted if not name.endswith(".weight")}
    model = load_contract(adapter).model
    assert {name for name in modules(model) if re.fullmatch(expression, name)} == adapted
    assert not re.fullmatch(expression, "language_model.model.layers.2.mlp.up_proj")


def _copy(peft, folder, change=None, weights=None):
    shutil.copytree(peft, folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    if change:
        settings = json.loads((folder / CONFIG).read_text()) | change
        (folder / CONFIG).write_text(json.dumps(settings))
    for name, value in (weights or {}).items():
        tensor = read_safetensors(folder / WEIGHTS)[f"base_model.model.{name}"]
        fill(tensor, 0, np.array([value], np.float32))
    return folder


@pytest.mark.parametrize(
    ("change", "weights", "message"),
    [
        ({"r": 16}, None, r"shape \[8, 64\], wanted \[16, 64\]"),
        ({"use_dora": True}, None, "use_dora is True: only False can be read"),
        ({"peft_type": "IA3"}, None, "peft_type is 'IA3'"),
        (None, {"projector.fc2.lora_A.weight": np.nan}, "projector.fc2.lora_A.weight holds NaN"),
        (None, {"language_model.lm_head.base_layer.weight": 9.0}, "trained on another base: its copy of .*lm_head"),
    ],
)
def test_bad_adapters_are_told_in_one_line(folders, tmp_path, change, weights, message):
    base, _, peft = folders
    with pytest.raises(ConversionError, match=message) as caught:
        import_adapter(_copy(peft, tmp_path / "bad", change, weights), tmp_path / "dst", base)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "dst").exists()


def test_an_adapter_of_another_base_is_refused(folders, merged, tmp_path):
    _, adapter, _ = folders
    for use in (
        lambda: merge_weights(merged[0], adapter, tmp_path / "dst"),
        lambda: load_model(adapter, base=merged[0]),
    ):
        with pytest.raises(CheckpointError, match="was trained on another base: its fingerprint is") as caught:
            use()
        assert "\n" not in str(caught.value)
    with pytest.raises(ConversionError, match=r"is an adapter of .*merge BASE ADAPTER DST"):
        open_source(adapter)
    with pytest.raises(CheckpointError, match=r"needs its base: .*does not exist; name it with base"):
        load_model(adapter, base=tmp_path / "nowhere")
