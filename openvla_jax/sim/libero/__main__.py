"""Writes episodes of a scripted expert in LIBERO as RLDS, in the form of the reference's libero_*_no_noops.

python -m openvla_jax.sim.libero --suite libero_object --tasks 0-9 --states 0-19 --out data

It needs the simulator's environment (make libero-env), about 27 CPU seconds an episode, and can be interrupted: it
goes on with the episodes that are missing. The expert knows tasks of one object and one place.
"""

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

from openvla_jax import cli
from openvla_jax.errors import InputError
from openvla_jax.sim.libero import fingerprint
from openvla_jax.sim.libero.conventions import MAX_STEPS, numbers
from openvla_jax.sim.libero.process import TIMEOUT, Simulator, starting


def parser() -> cli.Parser:
    parser = cli.Parser(prog="python -m openvla_jax.sim.libero", description=__doc__)
    parser.add_argument("--suite", required=True, choices=tuple(MAX_STEPS))
    parser.add_argument("--tasks", default="0-9", help="as 0-9 or 0,3")
    parser.add_argument("--states", default="0-19", help="initial states of each task")
    parser.add_argument("--noise", type=float, default=0.2, help="standard deviation of executed noise, in actions")
    parser.add_argument("--allow_other_simulator", action="store_true", help="go on if the fingerprint differs")
    parser.add_argument("--timeout", type=float, default=2 * TIMEOUT, help="seconds that an episode may take")
    parser.add_argument("--out", type=Path, required=True, help="folder in which <suite>_no_noops/1.0.0 is written")
    return parser


@cli.command
def main(arguments: Sequence[str]) -> None:
    args = parser().parse_args(arguments)
    tasks, states = numbers(args.tasks), numbers(args.states)
    if not 0 <= args.noise <= 1:
        raise InputError(f"noise {args.noise}: from 0 to 1, the largest action")
    from openvla_jax.sim.libero import dataset  # TensorFlow comes with it

    with contextlib.closing(Simulator(args.timeout)) as simulator:
        with starting():
            rows = simulator.ask("suite", suite=args.suite)["tasks"]
            for task in tasks:
                if task >= len(rows):
                    raise InputError(f"task {task}: suite {args.suite!r} has tasks 0 to {len(rows) - 1}")
                if states[-1] >= rows[task]["states"]:
                    raise InputError(f"state {states[-1]}: task {task} has states 0 to {rows[task]['states'] - 1}")
            found = fingerprint.check(fingerprint.measure(simulator, args.suite), args.allow_other_simulator)
        starts = [dataset.Start(task, state) for task in tasks for state in states]
        solved = 0
        for start, success, steps in dataset.collect(simulator, args.suite, starts, args.noise, args.out):
            solved += success
            ended = f"solved in {steps} steps" if success else "failed"
            print(f"task {start.task}, state {start.state}: {ended}", flush=True)
    print(f"{solved} of {len(starts)} episodes succeeded")
    instructions = {task: rows[task]["language"] for task in tasks}
    metadata = {"noise": args.noise, "expert": dataset.digest(), "simulator": found}
    print(dataset.write(args.suite, starts, instructions, args.out, metadata))


if __name__ == "__main__":
    sys.exit(main())
