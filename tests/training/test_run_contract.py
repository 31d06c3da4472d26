"""What a run's checkpoints say: derived from its config, its data and the checkpoint that it started from."""

from types import SimpleNamespace

import pytest

from openvla_jax.checkpoint.contract import Contract
from openvla_jax.config import tiny
from openvla_jax.settings import AugmentConfig, Settings
from openvla_jax.training.contract import build_contract, choose_specs
from openvla_jax.types import ActionSpec, ObservationSpec, Preprocessing

ROW = {"q01": [-1.0] * 7, "q99": [1.0] * 7, "mask": [True] * 6 + [False]}
ITERATOR = SimpleNamespace(dataset_names=("arm",), statistics={"arm": {"action": ROW}}, simulators={})
BASE = Contract(
    tiny(), None, {"old": {"action": ROW}}, ObservationSpec(rotation=180), ActionSpec(horizon=4, bins=128),
    Preprocessing("bicubic", 0.9, True, 99),
)  # fmt: skip


def settings(**sections):
    return Settings.from_dict(sections)


def test_build_contract_of_a_fresh_run():
    augment = {"enabled": True, "crop_scale": (0.8, 0.8)}
    config = settings(augment=augment, data={"text_length": 40}, action={"bins": 64, "horizon": 2})
    contract = build_contract(config, tiny(), None, None, ITERATOR, None)
    assert contract.preprocessing == Preprocessing("lanczos3", 0.8, False, 40)
    assert contract.action == ActionSpec(bins=64, horizon=2) and contract.observation == ObservationSpec()
    assert contract.default_key == "arm" and contract.training["data"]["text_length"] == 40


def test_build_contract_keeps_of_a_base_what_training_does_not_change():
    contract = build_contract(settings(), tiny(), None, BASE, ITERATOR, {"base": "b"})
    assert contract.preprocessing == Preprocessing("lanczos3", None, True, 64)
    assert contract.action == ActionSpec(horizon=4, bins=128) and contract.observation.rotation == 180
    assert list(contract.statistics) == ["arm"] and contract.adapter == {"base": "b"}
    joined = build_contract(settings(statistics="join"), tiny(), None, BASE, ITERATOR, None)
    assert list(joined.statistics) == ["old", "arm"]


def test_build_contract_takes_the_conventions_from_the_data():
    joints = {"q01": [-1.0] * 14, "q99": [1.0] * 14, "mask": [True] * 14}
    iterator = SimpleNamespace(dataset_names=("aloha",), statistics={"aloha": {"action": joints}}, simulators={})
    contract = build_contract(settings(), tiny(), None, BASE, iterator, None)
    assert (contract.action.dim, contract.action.gripper, contract.action.frame) == (14, "", "")


def test_build_contract_records_the_simulator_that_drew_the_data():
    assert "simulators" not in build_contract(settings(), tiny(), None, BASE, ITERATOR, None).training
    drawn = SimpleNamespace(**vars(ITERATOR) | {"simulators": {"arm": {"digest": "0"}}})
    contract = build_contract(settings(), tiny(), None, BASE, drawn, None)
    assert contract.training["simulators"] == {"arm": {"digest": "0"}}


@pytest.mark.parametrize(
    ("scale", "area"), [((0.9, 0.9), 0.9), ((0.8, 1.0), 0.9), ((0.8, 0.8), 0.8), ((1.0, 1.0), None)]
)
def test_policy_crop_area_is_the_mean_of_the_training_crops(scale, area):
    assert AugmentConfig(crop_scale=scale, enabled=True).policy_crop_area == area
    assert AugmentConfig(crop_scale=scale).policy_crop_area is None, "no augmentation, no crop"


def test_choose_specs_prefers_the_config_and_refuses_contradictions():
    assert choose_specs(settings(), None) == (ObservationSpec(), ActionSpec())
    assert choose_specs(settings(), BASE) == (BASE.observation, BASE.action)
    assert choose_specs(settings(action={"bins": 64}), BASE)[1] == ActionSpec(horizon=4, bins=64)
    with pytest.raises(ValueError, match=r"action.executed is 8: at most action.horizon, 4"):
        choose_specs(settings(action={"executed": 8}), BASE)
