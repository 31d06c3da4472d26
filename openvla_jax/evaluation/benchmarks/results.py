"""The results of an evaluation: a line per episode, written when it ends, and what they were made with.

OUT/run.json       suite, policy, protocol, simulator, plan, shard
OUT/episodes.jsonl {"arm", "task", "state", "success", "steps", ...}, one line per finished episode

A line counts once it is whole: what a killed process left of one is cut off at the next start, and its episode is done
again.
"""

import dataclasses
import fcntl
import json
import os
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from openvla_jax.errors import InputError, reading
from openvla_jax.storage import atomic_write

RUN_FILE, EPISODES_FILE = "run.json", "episodes.jsonl"
IDENTITY = ("suite", "policy", "protocol", "shard")  # of run.json: what must be equal to go on
WHOLE = [0, 1]  # the shard of an evaluation that is not divided: its plan may grow


class Episode(NamedTuple):
    """Which episode: arm, task and initial state."""

    arm: str
    task: int
    state: int


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of an episode.

    steps: actions until success, or all. redone: how often it was begun again because the simulator failed.
    cpu_seconds: of the simulator. seconds: by the clock.
    """

    arm: str
    task: int
    state: int
    success: bool
    steps: int
    instruction: str
    redone: int = 0
    cpu_seconds: float = 0.0
    seconds: float = 0.0

    @property
    def episode(self) -> Episode:
        """Which episode this is the outcome of."""
        return Episode(self.arm, self.task, self.state)


class Results:
    """An output folder that one process writes to; a context manager."""

    def __init__(self, folder: Path, run: Mapping[str, Any], planned: Sequence[Episode]):
        """Makes the folder, or goes on in it. `planned` are the episodes that are to be there in the end.

        Raises InputError if it holds results of another policy, suite, protocol, shard or simulator, if another
        process writes to it, or if a line is damaged. Raises OSError if it cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._file: IO[bytes] = (folder / EPISODES_FILE).open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            fix = "wait for it or choose another --out"
            raise InputError.of(folder, "another process writes results here", fix) from None
        try:
            if (folder / RUN_FILE).exists():
                check_same(folder, read_run(folder), run)
            self.outcomes = self._recover()
            self.run = {**run, "episodes": len(self.done.union(planned))}
            atomic_write(folder / RUN_FILE, json.dumps(self.run, indent=2) + "\n")
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "Results":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    @property
    def done(self) -> set[Episode]:
        """The episodes that have an outcome."""
        return {outcome.episode for outcome in self.outcomes}

    def add(self, outcome: Outcome) -> None:
        """Appends an outcome; after return it survives a kill. Raises OSError if the disk is full."""
        self._file.write(json.dumps(dataclasses.asdict(outcome)).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.outcomes.append(outcome)

    def _recover(self) -> list[Outcome]:
        self._file.seek(0)
        text = self._file.read()
        whole = text.rfind(b"\n") + 1
        if whole < len(text):
            self._file.truncate(whole)
        return parse(text[:whole], self.folder / EPISODES_FILE)


def read_run(folder: Path) -> dict[str, Any]:
    """Returns run.json. Raises InputError if it is missing or damaged."""
    with reading(folder / RUN_FILE, "name a folder that `evaluate libero` wrote"):
        run = json.loads((folder / RUN_FILE).read_text())
        if missing := [key for key in (*IDENTITY, "plan", "simulator", "episodes") if key not in run]:
            raise KeyError(missing[0])
        return run


def read_outcomes(folder: Path) -> list[Outcome]:
    """Returns the outcomes in a folder, without what is left of a last line."""
    path = folder / EPISODES_FILE
    with reading(path, "name a folder that `evaluate libero` wrote"):
        text = path.read_bytes()
    return parse(text[: text.rfind(b"\n") + 1], path)


def parse(text: bytes, path: Path) -> list[Outcome]:
    """Returns the outcomes in whole lines. Raises InputError for a damaged line, or an episode that is there twice."""
    outcomes: list[Outcome] = []
    seen: set[Episode] = set()
    for number, line in enumerate(text.splitlines(), 1):
        with reading(f"{path}:{number}", "remove the line: its episode is then done again"):
            outcome = Outcome(**json.loads(line))
            for name, kind in typing.get_type_hints(Outcome).items():
                value = getattr(outcome, name)
                allowed = (int, float) if kind is float else kind
                if not isinstance(value, allowed) or isinstance(value, bool) != (kind is bool):
                    raise ValueError(f"{name} is {value!r}")
            if outcome.episode in seen:
                raise ValueError(f"{outcome.episode} is there twice")
        seen.add(outcome.episode)
        outcomes.append(outcome)
    return outcomes


def check_same(folder: Path, found: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """Raises InputError if results of one run cannot stand beside those in `folder`."""
    for key in IDENTITY if run["shard"] == WHOLE else (*IDENTITY, "plan"):
        if found[key] != run[key]:
            raise InputError.of(
                folder,
                f"holds results of another {key}: {_short(found[key])}, not {_short(run[key])}",
                "choose another --out",
            )
    one, other = found["simulator"], run["simulator"]
    if not (one["agrees"] and other["agrees"]) and one["digest"] != other["digest"]:
        raise InputError.of(
            folder,
            f"holds results of another simulator: {_short(one['versions'])}, not {_short(other['versions'])}",
            "choose another --out",
        )


def merge(folders: Sequence[Path], out: Path) -> tuple[dict[str, Any], list[Outcome]]:
    """Joins the results of all shards of one evaluation in `out`; returns what they were made with and the outcomes.

    Raises InputError if a shard is missing, incomplete or there twice, or if they are not of one evaluation.
    """
    runs = [read_run(folder) for folder in folders]
    count = runs[0]["shard"][1]
    by_shard: dict[int, Path] = {}
    for folder, run in zip(folders, runs, strict=True):
        check_same(folder, run, {**runs[0], "shard": [run["shard"][0], count]})
        index = run["shard"][0]
        if index in by_shard:
            raise InputError(f"{folder} and {by_shard[index]} both hold shard {index}/{count}: name one of them")
        by_shard[index] = folder
    if missing := sorted(set(range(count)) - set(by_shard)):
        raise InputError(f"shards {', '.join(f'{index}/{count}' for index in missing)} are missing: name their folders")
    outcomes = []
    for folder, run in zip(folders, runs, strict=True):
        rows = read_outcomes(folder)
        if len(rows) < run["episodes"]:
            raise InputError.of(folder, f"has {len(rows)} of {run['episodes']} episodes", "run its shard to the end")
        outcomes += rows
    outcomes.sort(key=lambda outcome: outcome.episode)
    with Results(out, {**runs[0], "shard": WHOLE}, [outcome.episode for outcome in outcomes]) as results:
        for outcome in outcomes:
            if outcome.episode not in results.done:
                results.add(outcome)
        return results.run, results.outcomes


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."
