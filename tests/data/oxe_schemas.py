"""Raw trajectories of Open X-Embodiment's schemas, as numpy arrays."""

import numpy as np

from openvla_jax.data.oxe import schemas

# Outputs of the reference decide for these; for the others formulas do, on trajectories made here.
GOLDEN = [
    "bc_z",
    "berkeley_autolab_ur5",
    "berkeley_fanuc_manipulation",
    "berkeley_gnm_recon",
    "bridge_orig",
    "bridge_oxe",
    "cmu_play_fusion",
    "droid",
    "fmb_dataset",
    "fractal20220817_data",
    "furniture_bench_dataset_converted_externally_to_rlds",
    "jaco_play",
    "kuka",
    "language_table",
    "libero_spatial_no_noops",
    "nyu_franka_play_dataset_converted_externally_to_rlds",
    "robo_net",
    "taco_play",
    "tdroid_carrot_in_bowl",
    "stanford_hydra_dataset_converted_externally_to_rlds",
    "toto",
    "viola",
]
ADDED = {"traj_metadata / episode_metadata / file_path": "s", "_len": "i", "_traj_index": "u"}  # on reading
SCHEMAS = {name: {**schema, **ADDED} for name, schema in schemas.SCHEMAS.items() if name not in GOLDEN}

_TYPES = {"f": np.float32, "d": np.float64, "i": np.int32, "u": np.int64, "b": np.bool_}


def raw_trajectory(schema: dict[str, str], seed: int = 0, length: int = 8) -> dict:
    """A nested dict of numpy arrays with the paths and types of a schema; numbers around -1 to 1."""
    generator = np.random.default_rng(seed)
    trajectory: dict = {}
    for path, kind in schema.items():
        shape = (length, *(int(n) for n in kind[1:].split("x") if n))
        if kind[0] in "sj":
            values = np.array([f"{path} {t}".encode() for t in range(length)], object)
        else:
            values = generator.uniform(-1.2, 1.2, shape) if kind[0] in "fd" else generator.integers(0, 2, shape)
            values = values.astype(_TYPES[kind[0]])
        *folders, key = path.split(" / ")
        node = trajectory
        for folder in folders:
            node = node.setdefault(folder, {})
        node[key] = values
    return trajectory
