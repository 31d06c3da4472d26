"""OpenVLA-OFT checkpoints that cannot be: one line that says what to do, exit code 2, and nothing left behind."""

import json
import shutil

import numpy as np
import pytest
from fabricate import write_hf
from oft_files import SUFFIX, change, stored, write_oft, write_pt
from safetensors.numpy import save_file

from openvla_jax import convert_weights


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One folder of each kind, made once."""
    root = tmp_path_factory.mktemp("oft")
    write_oft(root / "l1")
    write_oft(root / "diffusion", "diffusion")
    write_oft(root / "film", film=True)
    write_hf(root / "plain", "dinosiglip", "bfloat16")
    return root


@pytest.fixture
def refused(made, tmp_path, capsys):
    """Runs `import` on a copy of a folder that `damage` has changed; returns the line of the error."""

    def refused(kind, damage=None, *options, oft="libero"):
        folder = tmp_path / kind
        shutil.copytree(made / kind, folder)
        if damage is not None:
            damage(folder)
        given = ["--oft", oft] if oft else []
        with pytest.raises(SystemExit) as ended:
            convert_weights.main(["import", str(folder), str(tmp_path / "dst"), *given, *options])
        error = capsys.readouterr().err.strip()
        assert ended.value.code == 2 and error.startswith("error: ") and len(error.splitlines()) == 1, error
        assert sorted(path.name for path in tmp_path.iterdir()) == [kind]
        return error

    return refused


def remove(component):
    return lambda folder: (folder / f"{component}--{SUFFIX}").unlink()


def statistics(**changes):
    """Changes rows of the state's statistics: None takes all away."""

    def damage(folder):
        path = folder / "dataset_statistics.json"
        content = json.loads(path.read_text())
        entry = content["mine_no_noops"]
        if changes:
            entry["proprio"] |= changes
        else:
            del entry["proprio"]
        path.write_text(json.dumps(content))

    return damage


@pytest.mark.parametrize(
    ("kind", "component", "wanted"),
    [
        ("l1", "action_head", "proprio_projector--*.pt without action_head--*.pt: download that file"),
        ("film", "action_head", "without action_head--*.pt"),
        ("diffusion", "noisy_action_projector", "a diffusion head without noisy_action_projector--*.pt"),
        ("diffusion", "action_head", "noisy_action_projector--*.pt without a diffusion head"),
    ],
)
def test_head_without_its_projector_and_the_reverse(refused, kind, component, wanted):
    assert wanted in refused(kind, remove(component))


def test_files_of_an_oft_checkpoint_without_a_platform(refused):
    assert f"(*--{SUFFIX}): say of which platform, --oft libero or aloha or bridge" in refused("l1", oft=None)


def test_options_without_a_platform(refused):
    assert "--cameras, --horizon describes an OpenVLA-OFT checkpoint" in refused(
        "plain", None, "--cameras", "primary", "--horizon", "8", oft=None
    )


def test_unknown_platform_and_head(refused):
    assert "--oft 'libera'" in refused("plain", oft="libera")


def test_head_that_the_files_do_not_have(refused):
    assert "but the action head is l1: leave --head out" in refused("l1", None, "--head", "parallel_tokens")


def test_adapters_of_several_ranks_in_the_towers_file(refused):
    def damage(folder):
        path = folder / f"vision_backbone--{SUFFIX}"
        name = "vision_backbone.featurizer.blocks.0.block.mlp.fc1.lora_{}.default.weight"
        tensors = stored(path)
        tensors[name.format("A")], tensors[name.format("B")] = (
            tensors[name.format("A")][:8],
            tensors[name.format("B")][:, :8],
        )
        write_pt(path, tensors)

    assert "adapters of several ranks, 20 of" in refused("film", damage)


def test_factors_of_an_adapter_that_do_not_fit(refused):
    name = "vision_backbone__featurizer__blocks__0__block__attn__qkv__lora_A__default__weight"
    line = refused("film", lambda folder: change(folder / f"vision_backbone--{SUFFIX}", **{name: lambda x: x[:4]}))
    assert "blocks.0.attn.qkv.weight: its adapter's factors have shapes [4, 32] and [96, 20]" in line


def test_adapter_of_another_rank_than_the_towers_file(refused):
    def damage(folder):
        (folder / "lora_adapter").mkdir()
        (folder / "lora_adapter" / "adapter_config.json").write_text(json.dumps({"r": 32, "lora_alpha": 16}))

    assert "lora_adapter has rank 32, the adapters in vision_backbone--*.pt have 20" in refused("film", damage)


def test_towers_file_of_another_base_of_the_same_sizes(refused, tmp_path_factory):
    other, file = tmp_path_factory.mktemp("other") / "film", f"vision_backbone--{SUFFIX}"
    write_oft(other, film=True, seed=1)
    line = refused("film", lambda folder: shutil.copy(other / file, folder / file))
    assert "towers of another base" in line and "is not the model's: use the files of one run" in line


def test_towers_file_of_another_base_of_other_sizes(refused):
    file = f"vision_backbone--{SUFFIX}"
    name = "vision_backbone__featurizer__blocks__0__block__norm1__bias"
    line = refused("film", lambda folder: change(folder / file, **{name: lambda x: x[:-1]}))
    assert "towers of another base: vision_backbone.featurizer.blocks.0.norm1.bias has shape [31]" in line


def test_towers_file_with_other_blocks(refused):
    def damage(folder):
        path = folder / f"vision_backbone--{SUFFIX}"
        write_pt(path, {n: x for n, x in stored(path).items() if "fused_featurizer.blocks.2." not in n})

    assert (
        "towers of another base: only one of file and model has vision_backbone.fused_featurizer.blocks.2."
        in refused("film", damage)
    )


def test_film_for_another_language_model(refused):
    name = "vision_backbone__featurizer__blocks__0__scale__weight"
    line = refused("film", lambda folder: change(folder / f"vision_backbone--{SUFFIX}", **{name: lambda x: x[:, :32]}))
    assert "FiLM of another base" in line and "32 wide; the model's is 64" in line


@pytest.mark.parametrize(
    ("component", "name"), [("action_head", "module__model__fc1__weight"), ("proprio_projector", "module__fc1__weight")]
)
def test_head_or_projector_for_another_width(refused, component, name):
    line = refused("l1", lambda folder: change(folder / f"{component}--{SUFFIX}", **{name: lambda x: x[:32]}))
    assert f"{component}--{SUFFIX}: " in line and "made for a language model 32 wide; the model's is 64" in line


@pytest.mark.parametrize(
    ("damage", "wanted"),
    [
        (statistics(), "the statistics of 'mine_no_noops' have no state (proprio)"),
        (
            statistics(**{row: [value] * 7 for row, value in (
                ("mean", 0.0), ("std", 1.0), ("min", -1.0), ("max", 1.0), ("q01", -1.0), ("q99", 1.0)
            )}),
            "have a state of 7 columns, proprio_projector--*.pt takes 8",
        ),
    ],
)  # fmt: skip
def test_statistics_without_the_state(refused, damage, wanted):
    assert wanted in refused("l1", damage)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (("--state", "x,y,z"), "the state has 8 columns, --state 3"),
        (("--cameras", "primary,wrist,front"), "--cameras names 3, libero's recipe shows at most 2, primary, wrist"),
        (("--cameras", "primary,primary"), "give at least one name, each once"),
        (("--horizon", "0"), "action.horizon is 0"),
    ],
)
def test_options_that_do_not_fit(refused, options, wanted):
    assert wanted in refused("l1", None, *options)


def test_state_of_another_platform(refused):
    assert "the state has 8 columns, bridge's state 7: name all with --state, or another platform" in refused(
        "l1", oft="bridge"
    )


def test_state_that_no_file_projects(refused):
    assert "--state, but no proprio_projector--*.pt" in refused("plain", None, "--state", "x")


def test_chunk_length_that_nothing_says(refused):
    line = refused("l1", oft="aloha")
    assert (
        "no file says how many actions a chunk has, and aloha's 25 are of 14 numbers, these of 7: give --horizon K"
        in line
    )


def test_run_with_film_without_its_towers(refused):
    def damage(folder):
        (folder / "lora_adapter").mkdir()
        name = "base_model.model.vision_backbone.vision_backbone.featurizer.blocks.0.block.attn.proj.lora_A.weight"
        save_file({name: np.ones((2, 32), np.float32)}, folder / "lora_adapter" / "adapter_model.safetensors")

    assert "a run with FiLM without vision_backbone--*.pt: download that file" in refused("l1", damage)


@pytest.mark.parametrize("component", ["action_head", "proprio_projector"])
def test_files_of_two_steps(refused, component):
    def damage(folder):
        path = folder / f"{component}--{SUFFIX}"
        (shutil.copy if component == "action_head" else shutil.move)(path, folder / f"{component}--20_checkpoint.pt")

    line = refused("l1", damage)
    assert ("several files of action_head" if component == "action_head" else "files of different steps") in line
    assert f"action_head--{SUFFIX}" in line and f"{component}--20_checkpoint.pt" in line


def test_file_that_is_no_component(refused):
    path = f"action_head--{SUFFIX}"
    assert "no action_head of OpenVLA-OFT" in refused("l1", lambda folder: write_pt(folder / path, {}))


def test_file_that_is_cut(refused):
    def damage(folder):
        path = folder / f"action_head--{SUFFIX}"
        path.write_bytes(path.read_bytes()[:-100])

    assert "not a complete torch.save archive" in refused("l1", damage)


def test_two_cameras_for_one_tower(tmp_path, capsys):
    write_hf(tmp_path / "plain", "siglip-letterbox")
    folders = [str(tmp_path / "plain"), str(tmp_path / "dst")]
    with pytest.raises(SystemExit):
        convert_weights.main(["import", *folders, "--oft", "libero", "--cameras", "primary,wrist"])
    assert "2 cameras, but the model has one tower" in capsys.readouterr().err


def test_run_that_was_not_merged(refused):
    def damage(folder):
        (folder / "lora_adapter").mkdir()
        for name in ("config.json", "model.safetensors"):
            (folder / name).unlink()

    assert "holds lora_adapter/ and no merged model: name the model that was adapted, --base MODEL" in refused(
        "l1", damage
    )


def test_base_of_a_run_that_is_merged(refused, made):
    line = refused("l1", None, "--base", str(made / "plain"))
    assert "is merged already" in line and "leave --base out" in line


def test_adapter_of_another_base(refused, made):
    def damage(folder):
        (folder / "lora_adapter").mkdir()
        (folder / "lora_adapter" / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 2}))
        place = "base_model.model.language_model.model.layers.0.self_attn.q_proj."
        factors = {
            f"{place}lora_A.weight": np.ones((2, 32), np.float32),
            f"{place}lora_B.weight": np.ones((64, 2), np.float32),
        }
        save_file(factors, folder / "lora_adapter" / "adapter_model.safetensors")
        for name in ("config.json", "model.safetensors"):
            (folder / name).unlink()

    line = refused("l1", damage, "--base", str(made / "plain"))
    assert "its adapter's factors have shapes [2, 32] and [64, 2]" in line
