"""The recipes of OpenVLA-OFT, and what a run makes of them with data of another form."""

import pytest

from configs import tabletop, tabletop_oft
from configs.finetune import oft
from openvla_jax.convert import oft as reference
from openvla_jax.data.oxe.datasets import DATASETS
from openvla_jax.data.oxe.mixtures import resolve_mixture
from openvla_jax.models.tuning import ADDED
from openvla_jax.settings import Settings
from openvla_jax.train import load_config
from openvla_jax.training.step import make_tuning

# Platform: batch (GPUs times rows), steps, steps before the decay, FiLM. From the reference's LIBERO.md and ALOHA.md.
RECIPES = {"libero": (8 * 8, 150_000, 100_000, None), "aloha": (8 * 4, 100_000, 50_000, True)}


@pytest.mark.parametrize("platform", oft.PLATFORMS)
def test_recipe_has_the_settings_of_the_reference(platform):
    config, fixed = oft.get_config(platform), reference.PLATFORMS[platform]
    batch, steps, decay_at, film = RECIPES.get(platform, (64, 150_000, 100_000, None))
    assert (config.train.batch_size, config.train.steps, config.optimizer.decay_at) == (batch, steps, decay_at)
    assert (config.film, config.action.head, config.augment.enabled) == (film, "l1", True)
    assert (config.action.horizon, config.action.executed) == (fixed.horizon, fixed.horizon)
    assert (config.action.normalization, config.observation.state) == (fixed.normalization, fixed.state)
    assert config.observation.cameras == fixed.cameras[: len(config.observation.cameras)]
    optimizer = config.optimizer
    assert (optimizer.learning_rate, optimizer.schedule, optimizer.clip_norm) == (5e-4, "step", 0.0)
    assert (optimizer.weight_decay, optimizer.decay_all, optimizer.ema) == (0.01, True, None)
    tuning = make_tuning(Settings.from_dict(config.to_dict()))
    assert (tuning.lora.rank, tuning.lora.scale, tuning.lora.dropout) == (32, 0.5, 0.0)
    assert tuning.patterns == ("*/lora", *ADDED)


@pytest.mark.parametrize("platform", oft.PLATFORMS)
def test_recipe_names_cameras_and_columns_that_its_data_have(platform):
    config = oft.get_config(platform)
    names = [config.data.dataset] + (["libero_4_task_suites_no_noops"] if platform == "libero" else [])
    for name, _ in sum((resolve_mixture(name) for name in names), ()):
        dataset = DATASETS[name]
        assert all(dataset.image_keys[camera] for camera in config.observation.cameras)
        assert set(config.observation.state) <= set(dataset.state_names)
        assert len(dataset.action_normalization_mask) == config.action.dim


@pytest.mark.parametrize(
    ("overrides", "executed", "text_length"),
    [
        ([], 8, 64 + 8 * 7),
        (["--config.action.horizon=10", "--config.action.dim=8"], 10, 64 + 10 * 8),
        (["--config.action.horizon=10", "--config.action.executed=4"], 4, 64 + 10 * 7),
        (["--config.data.text_length=200"], 8, 200),
    ],
)
def test_text_and_executed_actions_follow_the_chunk(overrides, executed, text_length):
    settings = Settings.from_dict(load_config("configs/finetune/oft.py:libero", overrides).to_dict())
    assert (settings.action.executed, settings.data.text_length) == (executed, text_length)


def test_unknown_platforms_and_heads_are_named():
    with pytest.raises(ValueError, match="unknown platform 'alhoa'; did you mean 'aloha'"):
        oft.get_config("alhoa")
    with pytest.raises(ValueError, match="unknown head 'l2'; did you mean 'l1'"):
        tabletop_oft.get_config("l2")


def test_tabletop_config_differs_by_head_in_the_chunk_alone():
    plain, tokens, l1 = tabletop.get_config(), tabletop_oft.get_config("tokens"), tabletop_oft.get_config("l1")
    for name in ("model", "optimizer"):
        assert plain[name] == tokens[name] == l1[name]
    assert tokens.train == l1.train
    assert tokens.data.text_length == plain.data.text_length
    assert l1.data.text_length - tokens.data.text_length == 7 * (l1.action.horizon - 1)
    assert tokens.observation == l1.observation
