"""Makes a small LeRobot dataset with LeRobot itself, and writes down what LeRobot's own reader returns for each row.

Runs in an environment of its own with either version; tests/data/lerobot_v3.0 is by lerobot 0.6.1 (Python 3.12, torch
2.7.1, av 15.1.0), tests/data/lerobot_v2.1 by lerobot 0.3.3 (Python 3.11, torch 2.7.1, av 15.1.0), both with 3 episodes:

    python tests/data/make_lerobot.py make FOLDER EPISODES FPS
    python tests/data/make_lerobot.py read FOLDER FOLDER/expected.npz

The cameras `front` (video) and `wrist` (images in parquet) show the episode and step as 16 black or white blocks; so
do action and state, in numbers. With 0.6.1 there is `depth` too: 16-bit images, in millimetres.
"""

import importlib.metadata
import shutil
import sys
from pathlib import Path

import numpy as np

try:
    from lerobot.datasets import LeRobotDataset
except ImportError:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

SHAPE = (64, 128)  # the AV1 encoder takes no less than 64
DEPTH = importlib.metadata.version("lerobot") >= "0.6"


def steps(episode: int) -> int:
    return 5 + (episode * 5) % 23


def picture(episode: int, step: int) -> np.ndarray:
    bits = [(episode >> i) & 1 for i in range(8)] + [(step >> i) & 1 for i in range(8)]
    row = np.repeat(np.array(bits, np.uint8) * 255, SHAPE[1] // 16)
    return np.broadcast_to(row[None, :, None], (*SHAPE, 3)).copy()


def depth(episode: int, step: int) -> np.ndarray:
    return (500 + np.indices(SHAPE)[1] * 400 + 100 * episode + step).astype(np.uint16)[..., None]  # up to 51 m


def make(folder: Path, episodes: int, fps: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    names = [f"joint_{i}" for i in range(6)]
    camera = {"shape": (*SHAPE, 3), "names": ["height", "width", "channels"]}
    features = {
        "observation.images.front": {"dtype": "video", **camera},
        "observation.images.wrist": {"dtype": "image", **camera},
        "observation.state": {"dtype": "float32", "shape": (6,), "names": names},
        "action": {"dtype": "float32", "shape": (6,), "names": names},
    }
    if DEPTH:
        features["observation.images.depth"] = {
            "dtype": "image",
            "shape": (*SHAPE, 1),
            "names": ["height", "width", "channels"],
            "info": {"is_depth_map": True},
        }
    dataset = LeRobotDataset.create("me/made", fps=fps, features=features, root=folder, robot_type="so100")
    for episode in range(episodes):
        for step in range(steps(episode)):
            frame = {
                "observation.images.front": picture(episode, step),
                "observation.images.wrist": 255 - picture(episode, step),
                "observation.state": np.full(6, step, np.float32),
                "action": np.full(6, episode + step / 100, np.float32),
            }
            if DEPTH:
                frame["observation.images.depth"] = depth(episode, step)
            task = f"task {(episode + step // 4) % 3}"
            if DEPTH:
                dataset.add_frame({**frame, "task": task})
            else:
                dataset.add_frame(frame, task=task)
        dataset.save_episode()
    if DEPTH:
        dataset.finalize()
    shutil.rmtree(folder / "images", ignore_errors=True)  # what the videos were made of


def read(folder: Path, out: Path) -> None:
    dataset = LeRobotDataset("me/made", root=folder, video_backend="pyav")
    rows = [dataset[i] for i in range(len(dataset))]
    columns = {"episode": "episode_index", "frame": "frame_index", "timestamp": "timestamp", "action": "action"}
    columns["state"] = "observation.state"
    arrays = {name: np.stack([row[key].numpy() for row in rows]) for name, key in columns.items()}
    for view in ("front", "wrist", "depth"):
        key = f"observation.images.{view}"
        if key in rows[0]:
            scale = 1 if view == "depth" else 255
            frames = np.stack([row[key].numpy() for row in rows]).transpose(0, 2, 3, 1)
            arrays[view] = np.round(frames * scale).astype(np.uint16 if view == "depth" else np.uint8)
    np.savez_compressed(out, task=np.array([row["task"] for row in rows]), **arrays)
    print(importlib.metadata.version("lerobot"), len(rows), "rows")


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    else:
        read(Path(sys.argv[2]), Path(sys.argv[3]))
