"""Freezes checkpoints of the present format, for the tests of later ones: python tests/integration/frozen.py OUT

OUT/run is a run of 8 steps with the checkpoint of step 4 left: parameters, optimiser, contract and data position.
OUT/adapter is a LoRA run of 2 steps on it, OUT/data the episodes of both. OUT/expected.npz holds the losses of steps 5
to 8 and the actions that both checkpoints predict on two images.
"""

import json
import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KEPT, STEPS = 4, 8
INSTRUCTIONS = ["pick up the red cube", "pick up the blue ball"]


def settings(directory: Path):
    """The debug config with 8 steps of 4 rows and a model of one tower and one layer; its data in `directory`/data."""
    from configs import debug

    config = debug.get_config()
    size = {"width": 16, "heads": 2, "mlp_dim": 32}
    config.model = {
        "preset": "siglip-vit-so400m+llama2-7b-pure",
        "towers": {"siglip": {"image_size": 28, "depth": 2} | size},
        "llama": {"depth": 1, "kv_heads": 2} | size,
    }
    config.data.update(dict(data_dir=str(directory / "data"), shuffle_buffer=16))
    config.train.update(dict(steps=STEPS, batch_size=4, checkpoint_every=KEPT, eval_every=0, keep_every=KEPT))
    config.train.compilation_cache = ""
    config.mesh.update({"data": 1, "fsdp": 1})
    return config


def get_config():
    """The settings for train.py; the data are then named on the command line."""
    return settings(Path())


def adapter_settings(directory: Path):
    """Two steps of LoRA on the checkpoint in `directory`/run."""
    config = settings(directory)
    config.model = {"preset": ""}
    config.tokenizer, config.init_from = "", str(directory / "run")
    config.trainable, config.lora.rank = "*/lora", 2
    config.train.update(dict(steps=2, checkpoint_every=2))
    config.optimizer.learning_rate = 0.1  # in two steps it must act otherwise than its base
    return config


def images():
    """Two fixed images, uint8 [48, 48, 3]."""
    import numpy as np

    return np.random.default_rng(0).integers(0, 256, (2, 48, 48, 3), dtype=np.uint8)


def losses(workdir: Path) -> list[float]:
    """The losses of steps 5 to 8."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row and row["step"] > KEPT]


def main() -> None:
    import numpy as np

    from openvla_jax.inference.policy import Policy
    from openvla_jax.sim.dataset import write_dataset
    from openvla_jax.training import loop

    out = Path(sys.argv[1])
    os.makedirs(out)
    os.chdir(out)
    here = Path()
    write_dataset(here / "data", episodes=2, val_episodes=1)
    loop.run(settings(here), "run")
    expected = {"losses": losses(here / "run")}
    shutil.rmtree(here / "run" / "checkpoints" / str(STEPS))
    shutil.rmtree(here / "run" / "tensorboard")
    loop.run(adapter_settings(here), "adapter")
    shutil.rmtree(here / "adapter" / "checkpoints" / "2" / "data")
    for name in ("run", "adapter"):
        expected[name] = Policy.from_checkpoint(name, check_images=False).predict_actions(images(), INSTRUCTIONS)
    for path in (*here.rglob("commit_success.txt"), *here.rglob("config.json")):
        path.write_text(path.read_text().replace(f"{Path.cwd()}/", ""))  # paths of the machine that wrote them
    np.savez("expected.npz", **expected)


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT)]
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
