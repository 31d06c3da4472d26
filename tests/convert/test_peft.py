"""PEFT's adapters: a real one's logits, files that come back bit for bit, merging, and bad input in one line."""

import json
import shutil

import jax
import numpy as np
import pytest
from conftest import ROOT, golden
from flax import nnx
from jax.sharding import PartitionSpec as P

from openvla_jax.checkpoint.contract import CheckpointError
from openvla_jax.checkpoint.load import load_adapted, load_model, tensor_mesh
from openvla_jax.checkpoint.reading import load_contract, open_checkpoint
from openvla_jax.convert import ConversionError, export_adapter, import_adapter, import_weights, merge_weights
from openvla_jax.convert.adapters import merged_leaf, open_adapter
from openvla_jax.convert.peft import CONFIG, WEIGHTS, modules, read_settings
from openvla_jax.convert.sources import open_source
from openvla_jax.convert.torch_io import read_safetensors
from openvla_jax.convert.torch_write import fill

BOUND = 2e-4
ADAPTERS = ROOT / "tests" / "data" / "peft_adapters"


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
        ({"peft_type": "IA3"}, None, "peft_type is 'IA3': only \"LORA\" can be read"),
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


@pytest.mark.parametrize("kind", ["gaussian", "plain", "orthogonal", "rslora", "pissa_converted"])
def test_merged_leaves_are_those_of_peft(folders, kind):
    """The adapters are PEFT's own (tests/data/peft_adapters/make.py), and so are the kernels to compare with."""
    source = open_source(folders[0])
    adapter = open_adapter(ADAPTERS / kind, source)
    with np.load(ADAPTERS / kind / "expected.npz", allow_pickle=False) as expected:
        for layer, name in ((0, "q"), (1, "v")):
            leaf = f"params/llama/blocks/attention/{name}/kernel"
            wanted = expected[f"model.layers.{layer}.self_attn.{name}_proj.weight"].T
            np.testing.assert_allclose(merged_leaf(source, adapter, leaf, layer), wanted, atol=2e-7)
            assert np.abs(wanted - source.weights.read(leaf, layer)[0]).max() > 1e-3  # the adapter does something


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("pissa", "init_lora_weights is 'pissa': .*path_initial_model_for_weight_conversion"),
        ("olora", "init_lora_weights is 'olora': .*path_initial_model_for_weight_conversion"),
        ("dora", "use_dora is True: .*merge_and_unload"),
        ("patterns", "(alpha|rank)_pattern is {'q_proj': (2|16)}: .*merge_and_unload"),
        ("lora_bias", "lora_bias is True: .*merge_and_unload"),
        ("norms_saved", r"modules_to_save is \['input_layernorm'\]: .*merge_and_unload"),
        ("tokens", "trainable_token_indices is {'embed_tokens': .*merge_and_unload"),
    ],
)
def test_adapters_of_other_methods_are_refused_by_name(folders, tmp_path, kind, message):
    for use in (import_adapter, merge_weights):
        arguments = (ADAPTERS / kind, tmp_path / "dst", folders[0])
        arguments = arguments if use is import_adapter else (folders[0], ADAPTERS / kind, tmp_path / "dst")
        with pytest.raises(ConversionError, match=message) as caught:
            use(*arguments)
        assert "\n" not in str(caught.value) and not (tmp_path / "dst").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(({"init_lora_weights": value}, f"init_lora_weights is '{value}'") for value in
          ("loftq", "pissa_niter_16", "corda", "eva", "lora_ga", "something_new")),
        ({"alora_invocation_tokens": [1, 2]}, r"alora_invocation_tokens is \[1, 2\]"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora is {'nblocks': 2}"),
        ({"use_qalora": True}, "use_qalora is True"),
        ({"layer_replication": [[0, 2]]}, r"layer_replication is \[\[0, 2\]\]"),
        ({"target_parameters": ["experts"]}, "target_parameters is"),
        ({"bias": "lora_only"}, "bias is 'lora_only': only \"none\" can be read"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
        ({"of_a_later_version": 3}, "of_a_later_version is 3: such adapters cannot be read"),
        ({"of_a_later_version": 0.0}, None),
        ({"of_a_later_version": None, "another": False, "a_third": {}}, None),
        ({"use_rslora": "yes"}, "use_rslora is 'yes', not true or false"),
        *(({"r": value}, "r is .*, not a whole number") for value in (None, 0, -1, True, "4", 4.5, [4], 10**30 + 0.5)),
        *(({"lora_alpha": value}, "lora_alpha is .*, not a number above 0") for value in
          (None, 0, -8, True, "8", float("nan"), float("inf"), 10**400, [8])),
        *(({"lora_dropout": value}, "lora_dropout is .*, not a number from 0") for value in
          (1.0, -0.1, "0.1", float("nan"))),
    ],
)  # fmt: skip
def test_read_settings_knows_what_it_accepts(tmp_path, change, message):
    settings = json.loads((ADAPTERS / "gaussian" / CONFIG).read_text()) | change
    (tmp_path / CONFIG).write_text(json.dumps(settings))
    if message is None:
        assert read_settings(tmp_path / CONFIG).scale == 2.0
        return
    with pytest.raises(ConversionError, match=message) as caught:
        read_settings(tmp_path / CONFIG)
    assert str(caught.value).startswith(f"{tmp_path / CONFIG}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["r", "lora_alpha"])
def test_read_settings_names_what_is_missing(tmp_path, key):
    settings = json.loads((ADAPTERS / "gaussian" / CONFIG).read_text())
    del settings[key]
    (tmp_path / CONFIG).write_text(json.dumps(settings))
    with pytest.raises(ConversionError, match=f"{key} is None"):
        read_settings(tmp_path / CONFIG)


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
