"""What a run's checkpoints say: derived from its config, its data and the checkpoint that it started from."""

import dataclasses
from types import SimpleNamespace

import pytest

from configs import common
from openvla_jax.checkpoint.contract import CheckpointError, Contract
from openvla_jax.config import tiny
from openvla_jax.training.contract import action_bins, build_contract, policy_crop_area
from openvla_jax.types import ActionSpec, ObservationSpec, Preprocessing

ROW = {"q01": [-1.0] * 7, "q99": [1.0] * 7, "mask": [True] * 6 + [False]}
ITERATOR = SimpleNamespace(dataset_names=("arm",), statistics={"arm": {"action": ROW}})
BASE = Contract(
    tiny(), None, {"old": {"action": ROW}}, ObservationSpec(rotation=180), ActionSpec(bins=128),
    Preprocessing("bicubic", 0.9, True, 99),
)  # fmt: skip


def test_build_contract_of_a_fresh_run():
    config = common.base()
    config.augment.enabled, config.augment.crop_scale = True, (0.8, 0.8)
    config.data.text_length, config.action.bins = 40, 64
    contract = build_contract(config, tiny(), None, None, ITERATOR, None)
    assert contract.preprocessing == Preprocessing("lanczos3", 0.8, False, 40)
    assert contract.action == ActionSpec(bins=64) and contract.observation == ObservationSpec()
    assert contract.default_key == "arm" and contract.training["data"]["text_length"] == 40


def test_build_contract_keeps_of_a_base_what_training_does_not_change():
    config = common.base()
    contract = build_contract(config, tiny(), None, BASE, ITERATOR, {"base": "b"})
    assert contract.preprocessing == Preprocessing("lanczos3", None, True, 64)
    assert contract.action.bins == 128 and contract.observation.rotation == 180
    assert list(contract.statistics) == ["arm"] and contract.adapter == {"base": "b"}
    config.statistics = "join"
    assert list(build_contract(config, tiny(), None, BASE, ITERATOR, None).statistics) == ["old", "arm"]


@pytest.mark.parametrize(
    ("scale", "area"), [((0.9, 0.9), 0.9), ((0.8, 1.0), 0.9), ((0.8, 0.8), 0.8), ((1.0, 1.0), None)]
)
def test_policy_crop_area_is_the_mean_of_the_training_crops(scale, area):
    config = common.base()
    config.augment.crop_scale = scale
    assert policy_crop_area(config.augment) is None, "no augmentation, no crop"
    config.augment.enabled = True
    assert policy_crop_area(config.augment) == area


def test_action_bins_refuses_what_contradicts_the_checkpoint():
    config = common.base()
    assert (action_bins(config, None), action_bins(config, BASE)) == (256, 128)
    config.init_from, config.action.bins = "C", 64
    with pytest.raises(CheckpointError, match=r"config.action.bins is 64, C has 128: leave it out"):
        action_bins(config, BASE)
    other = dataclasses.replace(BASE, action=ActionSpec(normalization="bounds"))
    with pytest.raises(CheckpointError, match="actions of C are normalised by 'bounds'"):
        action_bins(config, other)
