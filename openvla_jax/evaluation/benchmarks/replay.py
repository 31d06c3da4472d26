"""Replays a dataset of the scripted expert: stored actions, from the stored states, by the conventions of a contract.

Actions go the whole way of a policy's: RLDS, the dataset's transform, normalisation, and back by what a contract made
from the data says. If that succeeds, the conventions fit each other.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from openvla_jax.checkpoint.contract import action_spec
from openvla_jax.errors import InputError, reading
from openvla_jax.evaluation.benchmarks.results import Episode, Outcome
from openvla_jax.evaluation.environments.libero import LiberoEnvironment
from openvla_jax.sim.libero.process import Simulator
from openvla_jax.tokens.actions import unnormalize_actions


def replay(data_dir: Path, suite: str, simulator: Simulator) -> Iterator[Outcome]:
    """Replays each episode of data_dir/<suite>_no_noops, and yields what became of it.

    Raises InputError if the dataset is not the expert's, or was written with noise, which is no part of its actions.
    """
    from openvla_jax.data.rlds import dataset_statistics, make_dataset  # TensorFlow comes with these
    from openvla_jax.data.source import open_source

    name = f"{suite}_no_noops"
    source = open_source(name, str(data_dir))
    described = _described(Path(str(source.directory)))
    statistics = dataset_statistics(source)
    action = action_spec({name: statistics})
    for split, starts in described["starts"].items():
        trajectories = make_dataset(
            name,
            str(data_dir),
            split,
            statistics=statistics,
            normalization=action.normalization,
            load_proprio=False,
            num_parallel_reads=1,  # in the order in which they were written
        )
        for (task, state), trajectory in zip(starts, trajectories.as_numpy_iterator(), strict=True):
            actions = unnormalize_actions(trajectory["action"], statistics["action"], action.normalization)
            instruction = trajectory["task"]["language_instruction"][0].decode()
            environment = LiberoEnvironment(simulator, suite, task, instruction, gripper=action.gripper)
            environment.reset(state)
            success, steps = False, 0
            while steps < len(actions) and not success:
                _, _, success = environment.step(actions[steps])
                steps += 1
            yield Outcome(*Episode("replay", task, state), success, steps, instruction)


def _described(directory: Path) -> dict[str, Any]:
    path = directory / "metadata.json"
    with reading(path, "replay what `python -m openvla_jax.sim.libero --noise 0` wrote"):
        described = json.loads(path.read_text())
        noise, starts = described["noise"], described["starts"]
    if noise:
        raise InputError.of(path, f"was written with noise {noise}", "write a dataset with --noise 0 to replay it")
    if not all(starts.values()):
        raise InputError.of(path, "lists no episodes", "write the dataset again")
    return described
