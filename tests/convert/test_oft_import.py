"""Published forms of OpenVLA-OFT checkpoints: merged, with towers in a file of their own, not merged, and of tokens."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from conftest import golden
from fabricate import DTYPES, STATISTICS, write_hf
from oft.cases import FOLDER, import_case, imported, names, reference_folder, settings
from oft_files import change, policy, stored, write_oft, write_pt

from openvla_jax.checkpoint.reading import load_contract
from openvla_jax.config import preset
from openvla_jax.convert import OftOptions, export_weights, import_weights, inspect_weights, verify_weights
from openvla_jax.convert.names import leaf_shapes
from openvla_jax.convert.orbax_io import OrbaxReader


def leaves(path) -> dict[str, np.ndarray]:
    reader = OrbaxReader(path)
    return {leaf: reader.read(leaf, 0, shape[0]) for leaf, (_, shape) in reader.leaves.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Parameters
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "changes", "count"),
    [
        ("action_head/", {"head": "l1", "action_dim": 7}, 151_117_831),
        ("action_head/", {"head": "diffusion", "action_dim": 7}, 151_117_831),
        ("action_head/", {"head": "l1", "action_dim": 14}, 268_644_366),
        ("noisy_projector/", {"head": "diffusion", "action_dim": 7}, 16_789_504),
        ("state_projector/", {"state_dim": 8}, 16_818_176),
        ("state_projector/", {"state_dim": 14}, 16_842_752),
        ("/film/", {"film": True}, 456_241_920),
    ],
)
def test_leaf_shapes_count_the_reference_s_parameters(part, changes, count):
    model = dataclasses.replace(preset("openvla-7b"), **changes)
    assert sum(int(np.prod(shape)) for leaf, shape in leaf_shapes(model).items() if part in leaf) == count


# ---------------------------------------------------------------------------------------------------------------------
# Forms
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["latest_checkpoint.pt", "150000_checkpoint.pt"])
def test_import_reads_latest_and_numbered_files(tmp_path, suffix):
    tensors = write_oft(tmp_path / "oft", suffix=suffix)
    source = import_weights(tmp_path / "oft", tmp_path / "orbax", oft=OftOptions("libero"))
    assert source.origin["oft"] == {"suffix": suffix, "lora_rank": None}
    contract, params = load_contract(tmp_path / "orbax"), leaves(tmp_path / "orbax")
    assert dataclasses.replace(contract.model, name="") == dataclasses.replace(policy(), name="")
    assert (contract.action.horizon, contract.observation.cameras) == (8, ("primary", "wrist"))
    np.testing.assert_array_equal(params["params/action_head/fc1/kernel"].T, tensors["action_head.model.fc1.weight"])
    assert params["params/action_head/fc1/kernel"].dtype == DTYPES["bfloat16"]
    assert params["params/state_projector/fc1/kernel"].dtype == np.float32


def test_import_takes_a_plain_folder_for_a_token_policy(tmp_path):
    """As RL projects publish them: the model, q01 and q99 in config.json, one camera, no file beside."""
    write_hf(tmp_path / "rl", "dinosiglip")
    source = import_weights(tmp_path / "rl", tmp_path / "orbax", oft=OftOptions("libero"))
    assert sum("parallel_tokens" in note or "token policies" in note for note in source.notes) == 2
    contract = load_contract(tmp_path / "orbax")
    assert (contract.action.head, contract.action.horizon, contract.action.normalization) == (
        "parallel_tokens", 8, "bounds_q99",
    )  # fmt: skip
    assert contract.observation.cameras == ("primary",) and contract.statistics == STATISTICS


def test_import_takes_sizes_of_an_own_robot_from_options(tmp_path):
    write_oft(tmp_path / "oft", columns=3, dim=5)
    options = OftOptions("libero", ("primary", "wrist"), 4, ("a", "b", "c"))
    import_weights(tmp_path / "oft", tmp_path / "orbax", oft=options)
    contract = load_contract(tmp_path / "orbax")
    assert (contract.action.dim, contract.action.horizon, contract.observation.state) == (5, 4, ("a", "b", "c"))
    notes = " ".join(export_weights(tmp_path / "orbax", tmp_path / "back"))
    assert "NUM_ACTIONS_CHUNK = 4, ACTION_DIM = 5, PROPRIO_DIM = 3" in notes


def test_import_accepts_projectors_of_a_token_policy_if_told(tmp_path):
    write_oft(tmp_path / "oft", head="parallel_tokens")
    import_weights(tmp_path / "oft", tmp_path / "orbax", oft=OftOptions("libero", head="parallel_tokens"))
    contract = load_contract(tmp_path / "orbax")
    assert (contract.action.head, len(contract.observation.state)) == ("parallel_tokens", 8)


@pytest.mark.parametrize(("rank", "scale"), [(20, 0.8), (4, 1.0)])
def test_import_merges_the_adapters_of_towers(tmp_path, rank, scale):
    write_oft(tmp_path / "oft", film=True, rank=rank, dtype="float32")
    assert (
        import_weights(tmp_path / "oft", tmp_path / "orbax", oft=OftOptions("libero")).origin["oft"]["lora_rank"]
        == rank
    )
    file, params = stored(tmp_path / "oft" / "vision_backbone--10_checkpoint.pt"), leaves(tmp_path / "orbax")
    place = "vision_backbone.featurizer.blocks.1.block.mlp.fc1."
    w, a, b = (file[place + name] for name in ("base_layer.weight", "lora_A.default.weight", "lora_B.default.weight"))
    np.testing.assert_allclose(params["params/vision/dino/blocks/mlp/up/kernel"][1].T, w + scale * (b @ a), atol=1e-6)
    place = "vision_backbone.fused_featurizer.patch_embed.proj."
    w, a, b = (file[place + name] for name in ("base_layer.weight", "lora_A.default.weight", "lora_B.default.weight"))
    merged = w + scale * np.einsum("dr,rchw->dchw", b[:, :, 0, 0], a)
    kernel = params["params/vision/siglip/patch_embed/kernel"]
    np.testing.assert_allclose(kernel, merged.transpose(2, 3, 1, 0).reshape(kernel.shape), atol=1e-6)


def test_import_keeps_the_dtype_of_towers_whose_adapters_are_zero(tmp_path):
    write_oft(tmp_path / "oft", film=True)
    path = tmp_path / "oft" / "vision_backbone--10_checkpoint.pt"
    write_pt(path, {name: np.zeros_like(x) if ".lora_B." in name else x for name, x in stored(path).items()})
    import_weights(tmp_path / "oft", tmp_path / "zero", oft=OftOptions("libero"))
    found = {leaf: x.dtype.name for leaf, x in leaves(tmp_path / "zero").items() if "/dino/" in leaf}
    assert {name for leaf, name in found.items() if "/film/" not in leaf} == {"bfloat16"}
    assert {name for leaf, name in found.items() if "/film/" in leaf} == {"float32"}


@pytest.mark.long
@pytest.mark.parametrize("name", names(float32=False, use_film=False))
def test_import_of_a_run_that_was_not_merged_is_near_its_merged_model(name, tmp_path):
    """The reference merges in bfloat16, with a rounding of its own at each step."""
    folder = golden("oft_tiny") / name
    if not (folder / "lora_adapter").exists():
        pytest.skip("the case has no adapter")
    whole = reference_folder(name, tmp_path / "whole")
    shutil.copytree(whole, tmp_path / "run")
    shutil.copytree(folder / "lora_adapter", tmp_path / "run" / "lora_adapter")
    for file in ("model.safetensors", "config.json", "generation_config.json"):
        (tmp_path / "run" / file).unlink()
    rounded = tmp_path / "base"
    export_weights(import_case(name, FOLDER / "base", tmp_path / "base-import"), rounded, dtype="bfloat16")
    options = OftOptions(settings(name)["platform"])
    import_case(name, tmp_path / "run", tmp_path / "orbax", oft=options, base=rounded)
    ours, theirs, before = leaves(tmp_path / "orbax"), leaves(imported(name)), leaves(tmp_path / "base-import")
    assert ours.keys() == theirs.keys()
    moved = 0
    for leaf, x in ours.items():
        assert x.dtype == theirs[leaf].dtype, leaf
        a, b = x.astype(np.float32), theirs[leaf].astype(np.float32)
        np.testing.assert_allclose(a, b, atol=2e-3, rtol=2**-7, err_msg=leaf)
        if leaf in before:
            start = before[leaf].astype(DTYPES["bfloat16"]).astype(np.float32)
            moved += np.abs(b - start).max() > 0
            assert np.abs(a - b).mean() <= 0.2 * np.abs(b - start).mean() or np.array_equal(a, b), leaf
    assert moved > 10


# ---------------------------------------------------------------------------------------------------------------------
# verify and inspect
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "film"),
    [("l1", False), *(pytest.param(*case, marks=pytest.mark.long) for case in [
        ("l1", True), ("diffusion", False), ("parallel_tokens", True)
    ])],
)  # fmt: skip
def test_verify_compares_chunks_of_a_folder_and_its_import(tmp_path, head, film):
    """What the folder does not say is the import's; one case either way round."""
    write_oft(tmp_path / "oft", head, film=film)
    options = OftOptions("libero", head="parallel_tokens" if head == "parallel_tokens" else None)
    import_weights(tmp_path / "oft", tmp_path / "orbax", oft=options)
    pairs = [(tmp_path / "oft", tmp_path / "orbax")]
    for pair in [*pairs, *([pairs[0][::-1]] if film and head == "l1" else [])]:
        report = verify_weights(*pair)
        assert report.passed and report.max_logit_difference == 0, str(report)
        wanted = "action slots" if head == "parallel_tokens" else "chunks of 8 actions of 7 numbers, 2 observations"
        assert wanted in str(report) and "actions with mine_no_noops: max |d| 0" in str(report)
        assert "tensors of state_projector: 4 of 4 leaves equal" in str(report)


@pytest.mark.long
def test_verify_fails_for_another_head_state_or_camera(tmp_path):
    write_oft(tmp_path / "oft", dtype="float32")
    import_weights(tmp_path / "oft", tmp_path / "orbax", oft=OftOptions("libero"))
    for component, name in (("action_head", "module__model__fc2__bias"), ("proprio_projector", "module__fc2__bias")):
        shutil.copytree(tmp_path / "oft", tmp_path / component)
        change(tmp_path / component / f"{component}--10_checkpoint.pt", **{name: lambda x: x + 0.5})
        report = verify_weights(tmp_path / component, tmp_path / "orbax")
        assert any("action chunks differ by" in failure for failure in report.failures), str(report)
    swapped = verify_weights(tmp_path / "oft", tmp_path / "oft", oft=OftOptions("libero", ("primary",)))
    assert swapped.passed  # both were told
    text = json.loads((tmp_path / "oft" / "dataset_statistics.json").read_text())
    text["mine_no_noops"]["action"]["q99"][0] = 0.9
    (tmp_path / "action_head" / "dataset_statistics.json").write_text(json.dumps(text))
    report = verify_weights(tmp_path / "action_head", tmp_path / "orbax")
    assert any("actions with mine_no_noops differ" in failure for failure in report.failures)


def test_inspect_tells_cameras_state_and_parts(tmp_path):
    write_oft(tmp_path / "oft", film=True)
    text = inspect_weights(tmp_path / "oft", oft=OftOptions("libero"))
    assert "cameras: primary, wrist; state: x, y, z" in text and "state_projector: 4,736 parameters, float32" in text
    assert "'head': 'l1'" in text and "'horizon': 8" in text
