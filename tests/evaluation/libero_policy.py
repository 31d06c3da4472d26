"""A policy that solves the fake simulator's tasks, and a run of it in a process of its own, to be killed."""

import argparse
import dataclasses
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from sim.fake_libero import OBJECTS, STRIDE, place_of

from openvla_jax.evaluation.benchmarks import command
from openvla_jax.sim.libero.conventions import STATE
from openvla_jax.types import ActionSpec, ObservationSpec, Preprocessing

ROW = {"q01": [-1.0] * 6 + [0.0], "q99": [1.0] * 7, "mask": [True] * 6 + [False]}
INFO = {
    "observation": dataclasses.asdict(ObservationSpec(("primary", "wrist"), state=STATE)),
    "action": dataclasses.asdict(ActionSpec(horizon=4, executed=3, head="l1")),
    "preprocessing": dataclasses.asdict(Preprocessing()),
    "statistics": {"libero_object_no_noops": {"action": ROW}},
    "training": {},
}


class ScriptedPolicy:
    """Moves to the object that the instruction names, if it sees anything; keeps what it was shown."""

    def __init__(self, executed=3):
        self.executed, self.seen = executed, []

    def predict_chunks(self, observations):
        chunks = []
        for observation in observations:
            levels = {name: int(image[0, 0, 0]) for name, image in observation.images.items()}
            self.seen.append((levels, observation.instruction, observation.state, observation.unnorm_key))
            named = next(name for name in OBJECTS if name in observation.instruction)
            hand, chunk = np.array(observation.state[:3]), []
            for _ in range(self.executed + 1):
                move = np.clip((place_of(named) - hand) / STRIDE, -1, 1) * bool(levels["primary"])
                hand = hand + STRIDE * move
                chunk.append([*move, 0, 0, 0, 1.0])
            chunk[-1] = [9.0] * 7  # beyond what is executed
            chunks.append(np.array(chunk))
        return np.stack(chunks)


def arguments(out, *more):
    """The parsed arguments of `evaluate libero`."""
    parser = argparse.ArgumentParser()
    command.add_libero_arguments(parser)
    return parser.parse_args(["--suite", "libero_object", "--states", "0-4", "--out", str(out), *more])


def evaluate(out, *more, policy=None, info=INFO, name="scripted"):
    """Runs `evaluate libero` with a policy in the place of a checkpoint."""
    command.run_libero(arguments(out, *more), info, name, lambda: policy or ScriptedPolicy())


if __name__ == "__main__":
    evaluate(*sys.argv[1:])
