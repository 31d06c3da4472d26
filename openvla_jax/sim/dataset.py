"""Writes the tabletop's expert episodes as a TFDS/RLDS dataset, as robot datasets are published.

python -m openvla_jax.sim.dataset --out data --episodes 2000

Of the world "wrist" it is the dataset tabletop_wrist, with a second camera, for policies that predict chunks.
"""

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from openvla_jax import cli
from openvla_jax.data.ingest import writer
from openvla_jax.errors import InputError
from openvla_jax.sim import tabletop
from openvla_jax.sim.tabletop import ACTION_DIM, CEILING, REACH, STATE_DIM, Tabletop, expert_action, find_world

NAME, WRIST_NAME = "tabletop", "tabletop_wrist"
VERSION = "1.0.0"
IMAGE_SIZE = 48
# Scenes of the splits never meet, nor those of the evaluation, which counts from 0.
FIRST_SEED = {"train": 1_000_000, "val": 2_000_000}
MAX_STEPS = 24
JUMP_LOW, JUMP_HIGH = (-0.16, -0.16, -0.02), (0.16, 0.2, 0.1)  # where a disturbance puts the gripper; z is relative
SHARDS = 8  # of the train split
# In the world "wrist": an arm is so often closed at first, and so many steps follow the success: a chunk of up to one
# more than that begins at every step of the task.
CLOSED_AT_FIRST, HELD_STEPS = 0.15, 7


def features(cameras: Sequence[str]) -> dict:
    """Steps are laid out as in Open X-Embodiment: observation (with an image by each key of `cameras`), action,
    instruction and the RLDS flags.
    """
    image = writer.kinds.Image(shape=(IMAGE_SIZE, IMAGE_SIZE, 3), encoding_format="png")
    state = writer.kinds.Tensor(shape=(STATE_DIM,), dtype=np.float32)
    step = {
        "observation": {**dict.fromkeys(cameras, image), "state": state},
        "action": writer.kinds.Tensor(shape=(ACTION_DIM,), dtype=np.float32),
        "language_instruction": writer.kinds.Text(),
        **writer.FLAGS,
    }
    return {"steps": writer.kinds.Dataset(step), "episode_metadata": {"seed": writer.kinds.Scalar(np.int64)}}


def expert_episode(seed: int, noise: float, world_name: str = "tabletop") -> tuple[str, list[dict]]:
    """(instruction, steps) of one episode; each step has image uint8 [48, 48, 3], state [8], action [7] float32.

    What is stored is what the expert would do; what is executed is, now and then, that plus noise or a jump to anywhere
    (and rarely the wrong gripper command), so that the episodes also visit states beside the expert's path and show the
    way back (Laskey et al. 2017, DART). `noise` is the standard deviation in metres; 0 executes what is stored.
    """
    rng = np.random.default_rng([seed, 1])
    world = Tabletop(seed, world_name)
    steps = []
    for _ in range(MAX_STEPS):
        action = expert_action(world)
        steps.append({"image": world.render(IMAGE_SIZE), "state": world.state, "action": action})
        executed = action.astype(np.float64)
        kind = rng.random() if noise else 1.0
        if kind < 0.25:
            executed[:3] = rng.uniform(JUMP_LOW, JUMP_HIGH) - world.gripper * (1, 1, 0)
        elif kind < 0.5:
            executed[:3] += rng.normal(0.0, noise, 3)
        if noise and rng.random() < 0.03:
            executed[6] = 1.0 - executed[6]
        if world.step(executed):
            break
    return world.instruction, steps


def wrist_episode(seed: int) -> tuple[str, list[dict]]:
    """(instruction, steps) of an episode in the world "wrist"; a step also has wrist_image, uint8 [48, 48, 3].

    The gripper starts anywhere and does what is stored: every action follows from the first image, as those of a chunk
    must. The starts show the way from everywhere. After the success the arm holds still.
    """
    rng = np.random.default_rng([seed, 1])
    world = Tabletop(seed, "wrist")
    world.gripper = rng.uniform((-REACH, -REACH, 0.0), (REACH, REACH, CEILING))
    world.open = rng.random() >= CLOSED_AT_FIRST
    steps, held = [], 0  # steps that end in success
    while held <= HELD_STEPS and len(steps) < MAX_STEPS + HELD_STEPS:
        action = expert_action(world)
        if world.success:
            action[:3] = 0.0
        images = {"image": world.render(IMAGE_SIZE), "wrist_image": world.render_wrist(IMAGE_SIZE)}
        steps.append({**images, "state": world.state, "action": action})
        held += world.step(action)
    return world.instruction, steps


def write_dataset(
    out: str | Path, episodes: int, val_episodes: int | None = None, noise: float = 0.02, world: str = "tabletop"
) -> Path:
    """Writes out/tabletop/1.0.0 with splits train and val (5% of `episodes` by default); returns that folder. `world`
    is one of `tabletop.WORLDS`; of "wrist" it is out/tabletop_wrist/1.0.0, without noise.

    A complete dataset of the same parameters is kept.
    Raises FileExistsError if the folder holds a dataset of other parameters, InputError for less than one episode.
    """
    counts = {"train": episodes, "val": max(1, episodes // 20) if val_episodes is None else val_episodes}
    if min(counts.values()) < 1:
        raise InputError(f"episodes {counts}: write at least 1 in each split")
    code = hashlib.sha256(Path(tabletop.__file__).read_bytes() + Path(__file__).read_bytes()).hexdigest()[:16]
    plain = find_world(world).shows_arm
    parameters = {"episodes": counts, "noise": noise if plain else 0.0, "world": world, "code": code}
    directory = Path(out) / (NAME if plain else WRIST_NAME) / VERSION
    if directory.exists():
        found = _parameters(directory)
        if found == parameters:
            print(f"{directory} is complete and has these parameters: kept")
            return directory
        raise FileExistsError(
            f"{directory} holds a dataset with other parameters ({found}): remove it or choose another --out"
        )
    seeds = {split: range(FIRST_SEED[split], FIRST_SEED[split] + count) for split, count in counts.items()}
    return writer.write_dataset(
        directory,
        features(["image"] if plain else ["image", "wrist_image"]),
        {split: (_example(seed, parameters) for seed in numbers) for split, numbers in seeds.items()},
        description="Scripted pick-up episodes in a rendered tabletop world (openvla_jax.sim).",
        episodes_per_file=-(-max(counts.values()) // SHARDS),
        metadata=parameters,
    )


def _parameters(directory: Path) -> dict | None:
    try:
        return json.loads((directory / "metadata.json").read_text())
    except (OSError, ValueError):
        return None


def _example(seed: int, parameters: dict) -> dict:
    if find_world(parameters["world"]).shows_arm:
        instruction, steps = expert_episode(seed, parameters["noise"], parameters["world"])
    else:
        instruction, steps = wrist_episode(seed)
    images = [key for key in steps[0] if key.endswith("image")]
    return {
        "steps": [
            {
                "observation": {**{key: writer.encode(step[key]) for key in images}, "state": step["state"]},
                "action": step["action"],
                "language_instruction": instruction,
                **writer.flags(i, len(steps)),
            }
            for i, step in enumerate(steps)
        ],
        "episode_metadata": {"seed": seed},
    }


def parser() -> cli.Parser:
    parser = cli.Parser(prog="python -m openvla_jax.sim.dataset", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder in which tabletop/1.0.0 is written")
    parser.add_argument("--episodes", type=int, default=2000, help="episodes of the train split; val gets 5%% more")
    parser.add_argument("--noise", type=float, default=0.02, help="standard deviation of the executed noise in metres")
    parser.add_argument(
        "--world",
        choices=tuple(tabletop.WORLDS),
        default="tabletop",
        help="changed: for fine-tuning; wrist: for chunks",
    )
    return parser


@cli.command
def main(arguments: Sequence[str]) -> None:
    args = parser().parse_args(arguments)
    print(write_dataset(args.out, args.episodes, noise=args.noise, world=args.world))


if __name__ == "__main__":
    sys.exit(main())
