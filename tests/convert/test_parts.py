"""Base weights: towers in timm's naming, a Llama, a projector; put together as the reference does."""

import json

import numpy as np
import pytest
from fabricate import TOKENIZER, VOCABULARY, random_tensors, shrunken, write_native
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from openvla_jax.checkpoint.reading import load_contract
from openvla_jax.convert import ConversionError, export_weights, import_weights
from openvla_jax.convert.parts import resample_positions
from openvla_jax.convert.torch_io import read_torch_folder
from openvla_jax.tokens.tokenizer import save_tokenizer

NAME = "prism-dinosiglip-224px+7b"
PREFIXES = {"dino": "vision_backbone.featurizer.", "siglip": "vision_backbone.fused_featurizer."}


def below(tensors, prefix):
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}


@pytest.fixture
def parts(tmp_path):
    """Files of base weights (a DINOv2 of 518 px, an open_clip SigLIP), and the tensors that they should become."""
    tensors = random_tensors(shrunken("dinosiglip"), "hf")
    dino, siglip = (below(tensors, prefix) for prefix in PREFIXES.values())
    grid = np.random.default_rng(0).normal(size=(1, 37 * 37, 32)).astype(np.float32)
    stored = {name.replace("scale_factor", "gamma"): value for name, value in dino.items()} | {"pos_embed": grid}
    save_file(stored | {"head.weight": np.zeros((5, 32), np.float32)}, tmp_path / "dino.safetensors")
    trunk = {f"visual.trunk.{name}": value for name, value in siglip.items()}
    save_file(
        trunk | {"text.positions": np.zeros(3, np.float32), "logit_scale": np.zeros(1, np.float32)},
        tmp_path / "siglip.safetensors",
    )
    llama = below(tensors, "language_model.")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        llama[name] = np.ascontiguousarray(llama[name][:VOCABULARY])
    (tmp_path / "llama").mkdir()
    save_file(
        llama | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(8, np.float32)},
        tmp_path / "llama" / "model.safetensors",
    )
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_attention_heads": 4,
        "rms_norm_eps": 1e-5,
        "vocab_size": VOCABULARY,
    }
    (tmp_path / "llama" / "config.json").write_text(json.dumps(config))
    save_tokenizer(TOKENIZER, tmp_path / "llama")
    paths = {"dino": "dino.safetensors", "siglip": "siglip.safetensors", "llm": "llama"}
    return {name: str(tmp_path / path) for name, path in paths.items()}, tensors, grid


def test_parts_become_one_checkpoint(parts, tmp_path):
    paths, tensors, grid = parts
    source = import_weights(NAME, tmp_path / "dst", parts=paths)
    assert any("initialised at random" in note for note in source.notes)
    contract = load_contract(tmp_path / "dst")
    assert contract.model.name == NAME and contract.statistics == {}
    assert contract.model.llama.norm_eps == 1e-5 and contract.model.towers[0].mean == (0.485, 0.456, 0.406)
    assert contract.model.base_vocab_size == VOCABULARY and contract.model.llama.vocab_size % 64 == 0
    assert contract.tokenizer.pad_token_id == VOCABULARY
    assert (
        contract.preprocessing.resize_kernel == "lanczos3"
    )  # it will be trained here, not run as the reference runs it
    export_weights(tmp_path / "dst", tmp_path / "hf")
    back = {name: tensor.read() for name, tensor in read_torch_folder(tmp_path / "hf").items()}
    assert sorted(back) == sorted(tensors)
    position = "vision_backbone.featurizer.pos_embed"
    resized = {"language_model.model.embed_tokens.weight", "language_model.lm_head.weight", position}
    for name, value in tensors.items():
        if name not in resized and not name.startswith("projector."):
            np.testing.assert_array_equal(back[name], value, err_msg=name)
    np.testing.assert_array_equal(back[position], resample_positions(grid, 16, 0))
    for name in resized - {position}:
        np.testing.assert_array_equal(back[name][:VOCABULARY], tensors[name][:VOCABULARY])
        new = back[name][VOCABULARY:]
        assert 1 <= len(new) <= 64 and 0.01 < new.std() < 0.03 and len(np.unique(new)) > 60  # not rows of zeros
    assert not np.array_equal(*(back[name][VOCABULARY:] for name in sorted(resized - {position})))
    bound = 1 / np.sqrt(32 + 48)
    assert (
        back["projector.fc1.weight"].shape == (320, 80)
        and bound * 0.9 < np.abs(back["projector.fc1.weight"]).max() <= bound
    )


@pytest.mark.torch
def test_a_vlm_checkpoint_gets_its_towers_and_a_projector_is_taken_from_one(parts, tmp_path):
    pytest.importorskip("torch")
    paths, tensors, _ = parts
    native = write_native(tmp_path / "vlm", "dinosiglip", vision=False)
    towers = {name: paths[name] for name in ("dino", "siglip")}
    import_weights(tmp_path / "vlm", tmp_path / "dst", parts=towers)
    export_weights(tmp_path / "dst", tmp_path / "hf")
    back = {name: tensor.read() for name, tensor in read_torch_folder(tmp_path / "hf").items()}
    np.testing.assert_array_equal(back["projector.fc3.weight"], native["projector.projector.4.weight"])
    name = "vision_backbone.fused_featurizer.attn_pool.latent"
    np.testing.assert_array_equal(back[name], tensors[name])
    (pt,) = (tmp_path / "vlm" / "checkpoints").glob("*.pt")
    import_weights(NAME, tmp_path / "dst2", parts=paths | {"projector": str(pt)})
    export_weights(tmp_path / "dst2", tmp_path / "hf2")
    back = read_torch_folder(tmp_path / "hf2")
    for i in (1, 2, 3):
        np.testing.assert_array_equal(
            back[f"projector.fc{i}.bias"].read(), native[f"projector.projector.{2 * i - 2}.bias"]
        )


@pytest.mark.torch
def test_a_language_model_in_pickled_shards_is_read_alike(parts, tmp_path):
    torch = pytest.importorskip("torch")
    paths, _, _ = parts
    import_weights(NAME, tmp_path / "one", parts=paths)
    folder = tmp_path / "bin"
    folder.mkdir()
    llama = {name: torch.tensor(t.read()) for name, t in read_torch_folder(tmp_path / "llama").items()}
    names = sorted(llama)
    weight_map = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        torch.save({name: llama[name] for name in names if weight_map[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text((tmp_path / "llama" / "config.json").read_text())
    import_weights(NAME, tmp_path / "two", parts=paths | {"llm": str(folder)}, tokenizer=tmp_path / "llama")
    for name in ("one", "two"):
        export_weights(tmp_path / name, tmp_path / f"hf-{name}")
    one, two = (read_torch_folder(tmp_path / f"hf-{name}") for name in ("one", "two"))
    assert all(one[name].read().tobytes() == two[name].read().tobytes() for name in one)


def test_bad_parts_are_refused(parts, tmp_path):
    paths, _, _ = parts
    for change, text in (
        ({"clip": paths["dino"]}, r"parts \['clip'\] are not of"),
        ({"dino": paths["siglip"]}, "reg_token is missing"),
        ({"dino": paths["llm"]}, "not a ViT in timm's naming"),
        ({"llm": str(tmp_path / "nowhere")}, "does not exist"),
    ):
        with pytest.raises(ConversionError, match=text):
            import_weights(NAME, tmp_path / "dst", parts=paths | change)
    del paths["siglip"]
    with pytest.raises(ConversionError, match="no vision tower siglip in it: pass --part siglip PATH"):
        import_weights(NAME, tmp_path / "dst", parts=paths)
    assert not (tmp_path / "dst").exists()


@pytest.mark.torch
@given(old=st.integers(2, 40), new=st.integers(1, 30), prefix=st.integers(0, 1), seed=st.integers(0, 9))
def test_positions_are_resampled_as_timm_does(old, new, prefix, seed):
    torch = pytest.importorskip("torch")
    table = np.random.default_rng(seed).normal(size=(1, prefix + old * old, 3)).astype(np.float32)
    grid = torch.from_numpy(table[:, prefix:]).reshape(1, old, old, 3).permute(0, 3, 1, 2)
    wanted = torch.nn.functional.interpolate(grid, size=(new, new), mode="bicubic", antialias=True)
    wanted = wanted.permute(0, 2, 3, 1).reshape(new * new, 3).numpy()
    ours = resample_positions(table, new, prefix)
    np.testing.assert_array_equal(ours[0, :prefix], table[0, :prefix])
    np.testing.assert_allclose(ours[0, prefix:], wanted, atol=2e-5, rtol=0)  # PyTorch computes the weights in float32
