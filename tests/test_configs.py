"""The configs of pretraining runs: the reference's registered ones, and the slices."""

import pytest

from configs import openvla_7b, openvla_7b_384px, openvla_13b, registered
from configs.common import SLICES
from openvla_jax.config import PRESETS, model_config
from openvla_jax.data.oxe.mixtures import resolve_mixture
from openvla_jax.models.stack import remat_policy
from openvla_jax.parallel.tpu import parse_slice


def test_every_registered_run_is_there():
    assert set(registered.RUNS) == {name for name in PRESETS if "+mx-" in name}


@pytest.mark.parametrize("name", registered.RUNS)
def test_a_registered_run_has_its_model_data_and_batch(name):
    trainable = registered.RUNS[name][2]
    config = registered.get_config(name)
    model = model_config(config.model.to_dict())
    assert [tower.name for tower in model.towers] == (["dino", "siglip"] if "dinosiglip" in name else ["siglip"])
    assert model.resize == ("resize-naive" if "dinosiglip" in name else "letterbox")
    assert config.train.batch_size == (2048 if "oxe" in name else 256)
    assert config.optimizer.learning_rate == 2e-5 and config.optimizer.schedule == "constant"
    assert not config.augment.enabled
    assert resolve_mixture(config.data.dataset)
    assert config.trainable == trainable
    frozen = [part for part in ("icy", "last_layer", "sandwich") if part in name]
    assert (trainable == "*") == (not frozen)


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
