"""Settings: one set of defaults, which config files and flags change and a run reads back, typed and checked."""

import pytest

from configs import bridge_tiny, openvla_7b, tabletop
from configs.common import base
from configs.finetune import lora
from openvla_jax.settings import Settings


def test_base_config_is_the_defaults():
    assert Settings.from_dict(base().to_dict()) == Settings()


@pytest.mark.parametrize(
    "config",
    [bridge_tiny.get_config(), openvla_7b.get_config("v5p-128"), tabletop.get_config(), lora.get_config("int4")],
)
def test_settings_survive_json(config):
    """What a checkpoint stores of its run reads back as the same settings."""
    settings = Settings.from_dict(config.to_dict())
    assert Settings.from_dict(settings.to_dict()) == settings
    for name in ("data.dataset", "train.steps", "lora.rank", "optimizer.learning_rate"):
        section, field = name.split(".")
        assert getattr(getattr(settings, section), field) == config[section][field]


def test_flags_change_a_setting_without_a_value():
    config = base()
    config.lock()
    config.update_from_flattened_dict({"train.keep_every": 500, "action.horizon": 8, "data.statistics": "base"})
    settings = Settings.from_dict(config.to_dict())
    assert (settings.train.keep_every, settings.action.horizon, settings.data.statistics) == (500, 8, "base")
    with pytest.raises(TypeError):
        config.train.keep_every = "often"


def test_from_dict_takes_lists_and_whole_numbers():
    given = {"data": {"schedule": [["oxe", 20]]}, "optimizer": {"clip_norm": 1}, "augment": {"crop_scale": [1, 1]}}
    settings = Settings.from_dict(given)
    assert settings.data.schedule == (("oxe", 20),)
    assert isinstance(settings.optimizer.clip_norm, float)
    assert settings.augment.crop_scale == (1, 1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"trian": {}}, "unknown setting config.trian; did you mean 'train'"),
        ({"train": {"step": 3}}, "unknown setting config.train.step; did you mean 'steps'"),
        ({"train": {"steps": "many"}}, "config.train.steps is 'many': its type is int"),
        ({"train": {"steps": True}}, "config.train.steps is True: its type is int"),
        ({"train": {"steps": 0}}, "config.train.steps is 0: at least 1"),
        ({"train": 3}, "config.train is 3: it is a section"),
        ({"train": {"compiler_options": "fast"}}, "config.train.compiler_options is 'fast': one of tuned, default"),
        ({"data": {"bad_images": "ignore"}}, "config.data.bad_images is 'ignore': one of stop, skip"),
        ({"data": {"resume": "maybe"}}, "config.data.resume is 'maybe'"),
        ({"augment": {"hue": 0.7}}, "config.augment.hue is 0.7"),
        ({"optimizer": {"schedule": "linear"}}, "config.optimizer.schedule is 'linear': one of constant, cosine"),
        ({"optimizer": {"learning_rate": float("nan")}}, "config.optimizer.learning_rate is nan"),
        ({"statistics": "merge"}, "config.statistics is 'merge': one of replace, join"),
        ({"quantize": "int2"}, "config.quantize is 'int2'"),
        ({"lora": {"rank": -1}}, "config.lora.rank"),
    ],
)
def test_from_dict_names_what_is_wrong(given, message):
    with pytest.raises(ValueError, match=r"^(config|unknown)") as caught:
        Settings.from_dict(given)
    assert message in str(caught.value) and "\n" not in str(caught.value)
