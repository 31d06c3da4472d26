"""The arms of an evaluation on LIBERO: the same initial states under other conditions.

policy        the suite as it is
blank         every image black: what the instruction and the state alone give
instruction   LIBERO-PRO's sentence for another object of the same scene; success stays with the first
object        LIBERO-PRO's suite in which the object looks different; its own placements, under the same indices
phrasing      LIBERO-PRO's sentence that means the same
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from openvla_jax.config import nearest
from openvla_jax.errors import InputError
from openvla_jax.sim.libero.conventions import base_suite

ARMS = ("policy", "blank", "instruction", "object", "phrasing")
_OTHER_SENTENCE = {"instruction": "task", "phrasing": "lan"}  # arm -> the suite of LIBERO-PRO that has it

Rows = list[dict[str, Any]]  # of the simulator's answer to "suite"
Ask = Callable[[str], Rows]


@dataclasses.dataclass(frozen=True)
class Condition:
    """Where and how a task is run in one arm."""

    suite: str
    task: int
    instruction: str
    states: int  # how many initial states there are
    blank: bool = False


def conditions(ask: Ask, suite: str, arms: Sequence[str]) -> dict[str, list[Condition]]:
    """Returns the condition of every task of a suite, by arm.

    `ask` returns the tasks of a suite by its name. Raises InputError for an unknown suite or arm, and for an arm that
    the suite does not have.
    """
    base = base_suite(suite)
    for arm in arms:
        if arm not in ARMS:
            raise InputError(f"arm {arm!r}: {nearest(arm, ARMS)}")
    rows, originals = ask(suite), _by_name(ask(base))
    found = {}
    for arm in arms:
        if arm == "object":
            if suite != base:
                raise InputError(f"arm 'object': suite {suite!r} is changed already; evaluate {base!r} with it")
            found[arm] = _conditions(f"{base}_object", ask(f"{base}_object"), originals)
        elif arm in _OTHER_SENTENCE:
            others = _by_name(ask(f"{base}_{_OTHER_SENTENCE[arm]}"))
            plain = _conditions(suite, rows, originals)
            found[arm] = [_reworded(arm, condition, row, others) for condition, row in zip(plain, rows, strict=True)]
        else:
            plain = _conditions(suite, rows, originals)
            found[arm] = [dataclasses.replace(condition, blank=arm == "blank") for condition in plain]
    return found


def sentence(row: Mapping[str, Any], original: Mapping[str, Any] | None) -> str:
    """Returns what a policy is asked for in a task.

    The reference takes the sentence of the file's name. LIBERO-PRO keeps that name and changes the sentence inside
    the file: if it is another than the one of the `original` task, it counts.
    """
    changed = original is not None and row["file_language"] != original["file_language"]
    return row["file_language"] if changed else row["language"]


def _conditions(suite: str, rows: Rows, originals: Mapping[str, Mapping[str, Any]]) -> list[Condition]:
    return [
        Condition(suite, index, sentence(row, originals.get(row["name"])), row["states"])
        for index, row in enumerate(rows)
    ]


def _reworded(
    arm: str, condition: Condition, row: Mapping[str, Any], others: Mapping[str, Mapping[str, Any]]
) -> Condition:
    if row["name"] not in others:
        raise InputError(f"arm {arm!r}: LIBERO-PRO has no such sentence for task {condition.task}, {row['name']}")
    return dataclasses.replace(condition, instruction=others[row["name"]]["file_language"])


def _by_name(rows: Rows) -> dict[str, Mapping[str, Any]]:
    return {row["name"]: row for row in rows}
