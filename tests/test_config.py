"""Model configurations: the reference's parameter counts, presets by name, and errors that say what is meant."""

import dataclasses
import json
import math

import hypothesis
import hypothesis.strategies as st
import jax
import pytest

from openvla_jax import config as configs
from openvla_jax.config import VLAConfig, compose, model_config, preset, tiny
from openvla_jax.models.llama import Llama
from openvla_jax.models.openvla import count_parameters
from openvla_jax.models.vit import UnusedViT, ViT


def size(*makers) -> int:
    """Number of parameters of the modules that each maker makes from a key."""
    trees = [jax.eval_shape(make, jax.random.key(0)) for make in makers]
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(trees))


# ---------------------------------------------------------------------------------------------------------------------
# Parameter counts (released checkpoints)
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "total", "unused"),
    [("openvla-7b", 7_541_237_184, 43_080_480), ("openvla-v01-7b", 7_188_124_608, 30_480_160)],
)
def test_released_models_have_their_number_of_parameters(name, total, unused):
    config = preset(name)
    assert count_parameters(config, include_unused=True) == total
    assert count_parameters(config) == total - unused


TOWERS = {
    ("dinov2-vit-l", 0): 303_230_976,
    ("siglip-vit-so400m", 0): 427_680_704,
    ("dinosiglip-vit-so-384px", 0): 303_715_328,
    ("siglip-vit-so400m-384px", 0): 428_225_600,
    ("dinosiglip-vit-so-384px", 1): 428_225_600,
    ("clip-vit-l", 0): 303_179_776,
    ("clip-vit-l-336px", 0): 303_507_456,
    ("dinoclip-vit-l-336px", 1): 303_507_456,
    ("in1k-vit-l", 0): 303_301_632,
    ("siglip-vit-b16-224px", 0): 92_884_224,
}


@pytest.mark.parametrize(("backbone", "index"), TOWERS)
def test_towers_have_their_number_of_parameters(backbone, index):
    tower = configs.VISION_BACKBONES[backbone][index]
    count = size(lambda key: ViT(key, tower), lambda key: UnusedViT(key, tower))
    assert count == TOWERS[backbone, index]


@pytest.mark.parametrize(
    ("name", "count"),
    [("llama2-7b-pure", 6_738_939_904), ("llama2-13b-pure", 13_016_519_680), ("vicuna-v15-7b", 6_738_939_904)],
)
def test_language_models_have_their_number_of_parameters(name, count):
    assert size(lambda key: Llama(key, configs.LANGUAGE_MODELS[name][0])) == count


def test_vision_that_runs():
    """687,831,200 of openvla-7b's vision parameters are ever used."""
    towers = preset("openvla-7b").towers
    assert sum(size(lambda key, t=t: ViT(key, t)) for t in towers) == 687_831_200


# ---------------------------------------------------------------------------------------------------------------------
# Presets
# ---------------------------------------------------------------------------------------------------------------------

BACKBONES = {  # image size, patches, concatenated width
    "clip-vit-b": (224, 196, 768),
    "clip-vit-l": (224, 256, 1024),
    "clip-vit-l-336px": (336, 576, 1024),
    "siglip-vit-b16-224px": (224, 196, 768),
    "siglip-vit-b16-256px": (256, 256, 768),
    "siglip-vit-b16-384px": (384, 576, 768),
    "siglip-vit-so400m": (224, 256, 1152),
    "siglip-vit-so400m-384px": (384, 729, 1152),
    "dinov2-vit-l": (224, 256, 1024),
    "in1k-vit-l": (224, 196, 1024),
    "dinosiglip-vit-so-224px": (224, 256, 2176),
    "dinosiglip-vit-so-384px": (384, 729, 2176),
    "dinoclip-vit-l-336px": (336, 576, 2048),
}
RUNS = {
    "siglip-224px+mx-bridge": "siglip",
    "siglip-224px-icy+mx-bridge": "siglip",
    "prism-dinosiglip-224px+mx-bridge": "prism",
    "siglip-224px+mx-oxe-magic-soup": "siglip",
    "prism-dinosiglip-224px+mx-oxe-magic-soup-plus": "prism",
    "siglip-224px+mx-tdroid_carrot_in_bowl": "siglip",
    "siglip-224px+mx-tdroid_pour_corn_in_pot": "siglip",
    "siglip-224px-icy+mx-tdroid_carrot_in_bowl": "siglip",
    "siglip-224px-last_layer+mx-tdroid_carrot_in_bowl": "siglip",
    "siglip-224px-sandwich+mx-tdroid_carrot_in_bowl": "siglip",
    "siglip-224px+mx-droid_wipe": "siglip",
}
FAMILIES = {
    "llama2-7b-pure": "pure",
    "llama2-7b-chat": "llama2_chat",
    "llama2-13b-pure": "pure",
    "llama2-13b-chat": "llama2_chat",
    "vicuna-v15-7b": "vicuna_v15",
    "vicuna-v15-13b": "vicuna_v15",
    "mistral-v0.1-7b-pure": "pure",
    "mistral-v0.1-7b-instruct": "mistral_instruct",
}


def test_every_vision_backbone_is_there():
    assert configs.VISION_BACKBONES.keys() == BACKBONES.keys()
    assert configs.LANGUAGE_MODELS.keys() == FAMILIES.keys()


@pytest.mark.parametrize("llm", FAMILIES)
@pytest.mark.parametrize("vision", BACKBONES)
def test_backbones_compose(vision, llm):
    config = preset(f"{vision}+{llm}")
    assert (config.image_size, config.patches, config.vision_width) == BACKBONES[vision]
    assert config.prompt_family == FAMILIES[llm]
    assert config.projector.kind == ("fused-gelu-mlp" if len(config.towers) == 2 else "gelu-mlp")
    assert (config.llama.width, config.llama.depth) == ((5120, 40) if "13b" in llm else (4096, 32))
    assert (config.llama.kv_heads, config.llama.sliding_window) == (
        (8, 4096) if "mistral" in llm else (config.llama.heads, None)
    )
    assert (config.pad_token, config.llama.vocab_size) == (32000, 32064)


@pytest.mark.parametrize("name", RUNS)
def test_registered_runs(name):
    config = preset(name)
    facts = ([t.name for t in config.towers], config.resize, config.projector.kind, config.prompt_family)
    if RUNS[name] == "prism":
        assert facts == (["dino", "siglip"], "resize-naive", "fused-gelu-mlp", "pure")
    else:
        assert facts == (["siglip"], "letterbox", "gelu-mlp", "vicuna_v15")
    same = preset("openvla-7b" if RUNS[name] == "prism" else "openvla-v01-7b")
    assert dataclasses.replace(config, name=same.name) == same


def test_image_statistics_are_those_of_each_tower():
    dino, clip = preset("dinoclip-vit-l-336px+llama2-7b-pure").towers
    assert (dino.mean, dino.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert clip.mean == (0.48145466, 0.4578275, 0.40821073)
    assert clip.std == (0.26862954, 0.26130258, 0.27577711)
    for backbone in ("siglip-vit-so400m", "in1k-vit-l"):
        (tower,) = configs.VISION_BACKBONES[backbone]
        assert (tower.mean, tower.std) == ((0.5,) * 3, (0.5,) * 3)


def test_clip_alone_takes_quick_gelu_and_beside_dino_the_exact_one():
    """As the reference evaluates them."""
    assert configs.VISION_BACKBONES["clip-vit-l-336px"][0].activation == "quick_gelu"
    assert configs.VISION_BACKBONES["dinoclip-vit-l-336px"][1].activation == "gelu"
    assert {t.activation for t in preset("openvla-7b").towers} == {"gelu"}


# ---------------------------------------------------------------------------------------------------------------------
# Dictionaries and overrides
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*configs.PRESETS, "tiny", "clip-vit-b+mistral-v0.1-7b-instruct"])
def test_dictionaries_round_trip(name):
    config = preset(name)
    assert VLAConfig.from_dict(config.to_dict()) == config
    restored = VLAConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert restored == config
    assert hash(restored) == hash(config)  # static in jitted programs: lists would not hash


@hypothesis.given(
    heads=st.integers(1, 8),
    head_dim=st.integers(1, 16),
    depth=st.integers(2, 6),
    image_size=st.integers(14, 80),
    eps=st.floats(1e-8, 1e-2),
    window=st.none() | st.integers(1, 64),
    kind=st.sampled_from(["linear", "gelu-mlp", "fused-gelu-mlp"]),
)
def test_any_valid_override_survives_json(heads, head_dim, depth, image_size, eps, window, kind):
    siglip = {"heads": heads, "width": heads * head_dim, "depth": depth, "image_size": image_size}
    overrides = {
        "preset": "tiny",
        "towers": {"siglip": siglip, "dino": {"image_size": image_size}},
        "llama": {"heads": heads, "kv_heads": 1, "width": 2 * heads * head_dim}
        | {"norm_eps": eps, "sliding_window": window},
        "projector": {"kind": kind},
    }
    config = model_config(overrides)
    assert config.patches == (image_size // 14) ** 2
    assert config.towers[1].width == heads * head_dim
    assert config.towers[0].width == tiny().towers[0].width
    assert (config.llama.norm_eps, config.llama.sliding_window, config.projector.kind) == (eps, window, kind)
    assert VLAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_overrides_change_what_they_name_alone():
    settings = {"preset": "tiny", "llama": {"depth": 3}, "prompt_family": "vicuna_v15", "towers": None}
    llama = dataclasses.replace(tiny().llama, depth=3)
    assert model_config(settings) == dataclasses.replace(tiny(), llama=llama, prompt_family="vicuna_v15")
    assert settings["preset"] == "tiny"  # the caller's dictionary is left as it was
    assert model_config({}) == preset("openvla-7b")


def test_another_tokenizer_pads_the_vocabulary_anew():
    assert model_config({"preset": "tiny", "base_vocab_size": 400}) == tiny(base_vocab_size=400)
    chosen = model_config({"preset": "tiny", "base_vocab_size": 400, "llama": {"vocab_size": 512}})
    assert chosen.llama.vocab_size == 512


def test_tiny_pads_its_vocabulary_to_64():
    assert [tiny(base_vocab_size=n).llama.vocab_size for n in (300, 319, 320, 32000)] == [320, 320, 384, 32064]


# ---------------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: preset("openvla-7"), "unknown model preset 'openvla-7'; did you mean 'openvla-7b'?"),
        (lambda: preset("dinosiglip-vit-so-244px+llama2-7b-pure"), "did you mean 'dinosiglip-vit-so-224px'?"),
        (lambda: preset("clip-vit-l+llama2-7b-pur"), "language model 'llama2-7b-pur'; did you mean 'llama2-7b-pure'?"),
        (lambda: compose("dinov2-vit-g", "llama2-7b-pure"), "did you mean 'dinov2-vit-l'?"),
        (lambda: model_config({"llama": {"dept": 3}}), "unknown key 'dept' in llama config; did you mean 'depth'?"),
        (lambda: model_config({"towers": {"dyno": {}}}), "unknown tower 'dyno' in model.towers of preset 'openvla-7b'"),
        (lambda: model_config({"towers": {"dyno": {}}}), "did you mean 'dino'?"),
        (lambda: model_config({"towers": {"dino": {"widht": 8}}}), "unknown key 'widht' in towers config"),
        (lambda: model_config({"resiz": "letterbox"}), "unknown key 'resiz' in model config; did you mean 'resize'?"),
        (lambda: VLAConfig.from_dict({"name": "x"}), "model config lacks towers, llama"),
        (lambda: VLAConfig.from_dict({"towers": [{"name": "dino", "heads": 2}]}), "towers config lacks width, depth"),
    ],
)
def test_unknown_names_list_the_nearest(call, message):
    with pytest.raises(ValueError, match=r"known|lacks") as error:
        call()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"towers": {"dino": {"width": 50}}}, "tower 'dino': width 50 is not a multiple of heads 4"),
        ({"towers": {"dino": {"depth": 1}}}, "tower 'dino': depth 1 is below 2"),
        ({"towers": {"siglip": {"heads": 0}}}, "tower 'siglip': heads must be a whole number of at least 1, got 0"),
        ({"towers": {"siglip": {"activation": "relu"}}}, "tower 'siglip': unknown activation 'relu'"),
        ({"towers": {"dino": {"image_size": 70}}}, "towers differ in image size or patches"),
        ({"towers": {n: {"image_size": 10} for n in ("dino", "siglip")}}, "image_size 10 is below patch_size 14"),
        ({"towers": {"siglip": {"name": "dino"}}}, "towers need distinct names, got ['dino', 'dino']"),
        ({"llama": {"kv_heads": 3}}, "kv_heads 3"),
        ({"llama": {"width": 60}}, "head dim 15 (width / heads) is odd"),
        ({"llama": {"depth": 0}}, "llama: depth must be a whole number of at least 1, got 0"),
        ({"llama": {"sliding_window": 0}}, "sliding_window 0 sees no key"),
        ({"llama": {"vocab_size": 32000}}, "llama.vocab_size 32000"),
        ({"projector": {"kind": "mlp"}}, "unknown projector.kind 'mlp'"),
        ({"resize": "crop"}, "unknown resize 'crop'"),
    ],
)
def test_sizes_that_do_not_fit_raise(change, message):
    with pytest.raises(ValueError, match="model config 'tiny'") as error:
        model_config({"preset": "tiny", **change})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_every_problem_is_named_at_once():
    with pytest.raises(ValueError, match=r"width 50 .* kv_heads 3 .* 'crop'"):
        model_config({"preset": "tiny", "towers": {"dino": {"width": 50}}, "llama": {"kv_heads": 3}, "resize": "crop"})


def test_a_tower_that_is_none_is_left_out():
    both, one = model_config({"preset": "tiny"}), model_config({"preset": "tiny", "towers": {"dino": None}})
    assert one.towers == both.towers[1:] and one.llama == both.llama
    with pytest.raises(ValueError, match="towers need distinct names"):
        model_config({"preset": "tiny", "towers": {"dino": None, "siglip": None}})
