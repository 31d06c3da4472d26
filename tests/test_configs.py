"""The configs of pretraining runs: the reference's registered ones, and the slices."""

import pytest

from configs import openvla_7b, openvla_7b_384px, openvla_13b, registered
from configs.common import SLICES
from openvla_jax.config import model_config
from openvla_jax.data.oxe.mixtures import resolve_mixture
from openvla_jax.models.stack import remat_policy
from openvla_jax.models.tuning import matches
from openvla_jax.parallel.tpu import parse_slice

# Copied from the reference's prismatic/conf/vla.py: run, VLM, flags, mixture, GPUs, global batch. The flags say what is
# frozen: vision, LLM; and whether the LLM's last layer is trained all the same.
REFERENCE = """
siglip-224px+mx-bridge                             siglip-224px+7b            FFF bridge                     8  256
siglip-224px-icy+mx-bridge                         siglip-224px+7b            TFF bridge                     8  256
prism-dinosiglip-224px+mx-bridge                   prism-dinosiglip-224px+7b  FFF bridge                     8  256
siglip-224px+mx-oxe-magic-soup                     siglip-224px+7b            FFF oxe_magic_soup            64 2048
prism-dinosiglip-224px+mx-oxe-magic-soup-plus      prism-dinosiglip-224px+7b  FFF oxe_magic_soup_plus_minus 64 2048
siglip-224px+mx-tdroid_carrot_in_bowl              siglip-224px+7b            FFF tdroid_carrot_in_bowl      8  256
siglip-224px+mx-tdroid_pour_corn_in_pot            siglip-224px+7b            FFF tdroid_pour_corn_in_pot    8  256
siglip-224px-icy+mx-tdroid_carrot_in_bowl          siglip-224px+7b            TFF tdroid_carrot_in_bowl      8  256
siglip-224px-last_layer+mx-tdroid_carrot_in_bowl   siglip-224px+7b            TTT tdroid_carrot_in_bowl      8  256
siglip-224px-sandwich+mx-tdroid_carrot_in_bowl     siglip-224px+7b            FTT tdroid_carrot_in_bowl      8  256
siglip-224px+mx-droid_wipe                         siglip-224px+7b            FFF droid_wipe                 8  256
"""
ROWS = [line.split() for line in REFERENCE.strip().splitlines()]
# What the reference's stages train, by one parameter of each part; embedding and head go with the last layer.
LAST = {"llama/embed/embedding", "llama/last/attention/q/kernel", "llama/head/kernel"}
BODY = {"llama/blocks/mlp/up/kernel"}
VISION, PROJECTOR = {"vision/siglip/patch/kernel"}, {"projector/fc1/kernel"}
ALL = LAST | BODY | VISION | PROJECTOR
TRAINED = {"FFF": ALL, "TFF": ALL - VISION, "FTT": ALL - BODY, "TTT": LAST}


def test_runs_are_those_of_the_reference():
    assert set(registered.RUNS) == {row[0] for row in ROWS}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_run_has_the_settings_of_the_reference(row):
    name, vlm, flags, mixture, _, batch_size = row
    config = registered.get_config(name)
    model = model_config(config.model.to_dict())
    assert [tower.name for tower in model.towers] == (["dino", "siglip"] if "dino" in vlm else ["siglip"])
    assert model.resize == ("resize-naive" if "dino" in vlm else "letterbox")
    assert (config.data.dataset, config.train.batch_size) == (mixture, int(batch_size))
    assert resolve_mixture(mixture)
    assert {path for path in ALL if matches(path, config.trainable.split(","))} == TRAINED[flags]
    assert (config.optimizer.learning_rate, config.optimizer.schedule) == (2e-5, "constant")
    assert (config.optimizer.weight_decay, config.optimizer.clip_norm, config.optimizer.warmup_steps) == (0.0, 1.0, 0)
    assert config.data.shuffle_buffer == 256_000 and not config.augment.enabled


def test_unknown_runs_and_slices_are_refused():
    with pytest.raises(ValueError, match="unknown run 'bridge'"):
        registered.get_config("bridge")
    with pytest.raises(ValueError, match="unknown slice 'v5p'"):
        openvla_7b.get_config("v5p")
    assert registered.get_config("siglip-224px+mx-oxe-magic-soup,v5e-256").mesh.data == 8


@pytest.mark.parametrize("name", SLICES)
@pytest.mark.parametrize("module", [openvla_7b, openvla_7b_384px, openvla_13b])
def test_batch_and_widths_divide_over_every_slice(module, name):
    config, tpu = module.get_config(name), parse_slice(SLICES[name]["topology"])
    remat_policy(config.train.remat)
    data = config.mesh.data or tpu.slices
    shards, left = divmod(tpu.chips, data)
    assert not left and config.train.batch_size % (tpu.chips * config.train.accumulation) == 0
    cores = 2 if tpu.facts.dimensions == 3 else 1
    assert int(name.split("-")[1]) == tpu.chips * cores
    model = model_config(config.model.to_dict())
    for width in (model.llama.width, *(tower.width for tower in model.towers)):
        assert width % shards == 0
    assert module is openvla_7b or config.train.remat == "full"


def test_the_7b_is_the_papers_run():
    config = openvla_7b.get_config()
    assert model_config(config.model.to_dict()).image_size == 224
    assert model_config(openvla_7b_384px.get_config().model.to_dict()).image_size == 384
    assert model_config(openvla_13b.get_config().model.to_dict()).llama.width == 5120
    assert (config.train.batch_size, config.optimizer.learning_rate) == (2048, 2e-5)
