"""The debug config without DINOv2: it compiles faster, and what is tested here is the run."""

from configs import debug


def get_config():
    config = debug.get_config()
    config.model.towers = {"dino": None}
    return config
