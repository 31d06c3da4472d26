"""Statistics of actions and states: computed in one pass, cached as JSON, checked before use.

The JSON of one dataset is the reference's: {"action": {mean, std, max, min, q01, q99, mask}, "proprio": {the same
without mask}, "num_transitions", "num_trajectories"}; a file of several holds {dataset name: that}. If a policy sees a
state, "proprio" also has "names": what its columns are called.
"""

import json
import logging
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from openvla_jax.config import nearest
from openvla_jax.data import BadActionError, DataError, StatisticsError
from openvla_jax.data.oxe.state import without_pads
from openvla_jax.errors import reading, reason
from openvla_jax.storage import atomic_write

_FIELDS = ("mean", "std", "max", "min", "q01", "q99")
_FALLBACK = "~/.cache/openvla_jax"
GRIPPER_TOLERANCE = 0.05  # of the range: sensors overshoot a little

Grippers = Mapping[int, tuple[float, float]]  # dimension -> (closed, open) in the data's units


def summarize(trajectories: Iterable[Mapping], name: str, grippers: Mapping[str, Grippers] | None = None) -> dict:
    """Statistics of a dataset from its standardised, unfiltered, unnormalised trajectories.

    trajectories: {"action": float [T, A], optionally "proprio": float [T, P], "episode": bytes, "step": int [T]}.
    Moments and quantiles are float64 over all steps; std is that of the population, quantiles are exact (linear
    interpolation). Without proprio its statistics are zeros as wide as the action, as in the reference.
    grippers: of "action" and "proprio", see `check_grippers`.
    Raises BadActionError for the first NaN or infinity, or gripper outside its range, naming the dataset, episode, step
    and dimension, and DataError for an empty dataset. Episodes that the transform leaves without steps count as
    trajectories and are logged.
    """
    columns: dict[str, list[np.ndarray]] = {"action": [], "proprio": []}
    trajectory_count, empty = 0, []
    for trajectory in trajectories:
        trajectory_count += 1
        if len(trajectory["action"]) == 0:
            empty.append(trajectory["episode"].decode())
        for key in columns.keys() & trajectory.keys():
            episodes = np.repeat(np.array(trajectory["episode"], object), len(trajectory[key]))
            check_finite(trajectory[key], key, name, episodes, trajectory["step"])
            check_grippers(trajectory[key], key, (grippers or {}).get(key, {}), name, episodes, trajectory["step"])
            columns[key].append(trajectory[key])
    if trajectory_count == len(empty):
        raise DataError(f"dataset {name!r} has no steps at all in {trajectory_count} episodes: nothing to learn from")
    if empty:
        first = ", ".join(empty[:5])
        logging.warning("dataset %r: %d of %d episodes have no steps: %s", name, len(empty), trajectory_count, first)
    action = np.concatenate(columns["action"])
    proprio = np.concatenate(columns["proprio"]) if columns["proprio"] else np.zeros((1, action.shape[1]))
    return {
        "action": _describe(action),
        "proprio": _describe(proprio),
        "num_transitions": len(action),
        "num_trajectories": trajectory_count,
    }


def _describe(values: np.ndarray) -> dict[str, list[float]]:
    rows = []
    for column in values.T:  # one dimension at a time: half the memory, and float64 where it matters
        column = column.astype(np.float64)
        low, high = np.quantile(column, [0.01, 0.99])
        rows.append((column.mean(), column.std(), column.max(), column.min(), low, high))
    return {field: [float(row[i]) for row in rows] for i, field in enumerate(_FIELDS)}


def check_finite(values: np.ndarray, what: str, name: str, episodes: np.ndarray, steps: np.ndarray) -> None:
    """Raises BadActionError for the first NaN or infinity of values [N, D], with its row of episodes and steps [N]."""
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        row, dimension = bad[0]
        raise BadActionError(
            f"dataset {name!r}, episode {episodes[row].decode()}, step {steps[row]}: {what} dimension {dimension} is "
            f"{values[row, dimension]}: fix the data or its transform"
        )


def check_grippers(
    values: np.ndarray, what: str, grippers: Grippers, name: str, episodes: np.ndarray, steps: np.ndarray
) -> None:
    """Raises BadActionError for the first gripper command of values [N, D] that is outside its declared range.

    Args:
        values: grippers go from 0, closed, to 1, open.
        what: "action" or "proprio".
        grippers: the dimensions to check.
        name: of the dataset.
        episodes, steps: [N], the places of the rows.
    """
    for dimension, (closed, opened) in grippers.items():
        bad = np.flatnonzero(np.abs(values[:, dimension] - 0.5) > 0.5 + GRIPPER_TOLERANCE)
        if len(bad):
            value = closed + values[bad[0], dimension] * (opened - closed)
            raise BadActionError(
                f"dataset {name!r}, episode {episodes[bad[0]].decode()}, step {steps[bad[0]]}: {what} dimension "
                f"{dimension}, a gripper, is {value:.4g}, and was declared as {closed:g} closed, {opened:g} open: "
                f"declare gripper_range=(closed, open) in the data's units"
            )


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def load(path: str | Mapping, name: str) -> dict:
    """The statistics of dataset `name` from a JSON file of one dataset or of several, or from what such a file holds.

    Raises StatisticsError where the file is missing or malformed, or lacks the dataset; it lists the names there are.
    """
    where = "the checkpoint to start from" if isinstance(path, Mapping) else f"statistics file {path}"
    with reading(where, "fix its path, or compute it again", StatisticsError):
        content = path if isinstance(path, Mapping) else json.loads(epath.Path(path).expanduser().read_text())
    if not isinstance(content, Mapping):
        raise StatisticsError(f"{where} holds a {type(content).__name__}, not an object: fix its path")
    if "action" not in content and name not in content:
        raise StatisticsError(
            f"{where} has no dataset {name!r}; {nearest(name, content)}; compute its statistics, or name another file"
        )
    own = content if "action" in content else content[name]
    if not isinstance(own, Mapping):
        raise StatisticsError(f"{where} holds a {type(own).__name__} for {name!r}, not an object: compute it again")
    return dict(own)


def cached(
    file_name: str, folders: Sequence[str], compute: Callable[[], dict], prepared: Callable[[Mapping], dict]
) -> dict:
    """The JSON `file_name` from the first folder that has it; else computed and written to the first that takes it.

    Returns what `prepared` makes of it; a file that it refuses is computed anew. The user's cache folder is tried last,
    for data that are read-only. Files appear whole, so processes that compute at the same time do not disturb each
    other.
    """
    paths = [epath.Path(folder).expanduser() / file_name for folder in (*folders, _FALLBACK)]
    for path in paths:
        if path.exists():
            try:
                with reading(path, kind=StatisticsError):
                    return prepared(json.loads(path.read_text()))
            except StatisticsError as error:
                logging.warning("%s: computing the statistics anew", error)
    result = compute()
    for path in paths:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path, json.dumps(result, indent=2) + "\n")
        except Exception as error:  # whatever a remote file system raises; the cache is a convenience
            logging.info("cannot keep statistics at %s (%s)", path, reason(error))
            continue
        logging.info("statistics written to %s", path)
        break
    return prepared(result)


# ---------------------------------------------------------------------------------------------------------------------
# Before use
# ---------------------------------------------------------------------------------------------------------------------


def prepare(statistics: Mapping, name: str, mask: Sequence[bool], with_proprio: bool = False) -> dict:
    """The same statistics with the normalisation mask in "action", checked.

    Raises StatisticsError where a field is missing, is not all finite numbers, or has another length than the mask, and
    where another mask is there already. Dimensions that never change are logged: they are trained, and act, as 0.
    """
    for part in ("action", "proprio") if with_proprio else ("action",):
        _check_fields(statistics.get(part, {}), f"statistics of {name!r}: {part}")
    action = {field: statistics["action"][field] for field in _FIELDS}
    for field, values in action.items():
        if len(values) != len(mask):
            raise StatisticsError(
                f"statistics of {name!r}: action/{field} has {len(values)} dimensions, the actions have {len(mask)}: "
                f"use those of the same dataset"
            )
    own = statistics["action"].get("mask", mask)
    if not isinstance(own, Sequence) or list(own) != list(mask):
        raise StatisticsError(
            f"statistics of {name!r}: their mask {_short(own)} is not the dataset's, {list(mask)}: "
            f"use those of the same dataset"
        )
    steps: Any = statistics.get("num_transitions")
    episodes = statistics.get("num_trajectories", 0)
    if not _is_finite(steps) or steps <= 0 or not _is_finite(episodes):
        counts = f"num_transitions is {_short(steps)}, num_trajectories {_short(episodes)}"
        raise StatisticsError(f"statistics of {name!r}: {counts}: compute them again")
    constant = [i for i in range(len(mask)) if action["min"][i] == action["max"][i]]
    normalised = [i for i in range(len(mask)) if mask[i] and i not in constant]
    spiky = [i for i in normalised if action["q01"][i] == action["q99"][i]]
    if constant:
        logging.warning("dataset %r: action dimensions %s never change; they are trained as 0", name, constant)
    if spiky:
        logging.warning("dataset %r: action dimensions %s have q01 == q99; they are trained as -1 or 1", name, spiky)
    return {**statistics, "action": {**action, "mask": list(mask)}}


def _check_fields(part: object, where: str) -> None:
    """Raises StatisticsError if a part of statistics lacks a field, or has one that is not finite numbers in order."""
    if not isinstance(part, Mapping):
        raise StatisticsError(f"{where} is {_short(part)}, not an object: compute them again")
    for field in _FIELDS:
        values = part.get(field)
        if not isinstance(values, list) or not all(_is_finite(value) for value in values):
            raise StatisticsError(f"{where}/{field} is {_short(values)}, not a list of numbers: compute them again")
    for low, high in (("min", "max"), ("q01", "q99")):
        for dimension, (least, most) in enumerate(zip(part[low], part[high], strict=False)):
            if least > most:
                raise StatisticsError(
                    f"{where}/{low} of dimension {dimension} is {least}, above {high}, {most}: compute them again"
                )


def select_state(statistics: Mapping, name: str, layout: Sequence[str], wanted: Sequence[str]) -> dict:
    """Reduces the statistics of the state to the wanted columns, in order, and stores their names with them.

    Args:
      statistics: of dataset `name`, with those of its state (see `prepare`). "names" in "proprio" says which columns
        they describe; files without it hold the columns of `layout`, or those without pads (OpenVLA-OFT's).
      layout: names of the dataset's state columns, pads included.
      wanted: names of the columns that a policy sees.

    Raises:
      StatisticsError: the statistics describe other columns, or the state was not measured (all zeros).
    """
    proprio = statistics["proprio"]
    width = len(proprio["mean"])
    layouts = {len(names): tuple(names) for names in (without_pads(layout), layout)}
    names = proprio.get("names") or layouts.get(width, ())
    if not isinstance(names, Sequence) or not all(isinstance(column, str) for column in names):
        raise StatisticsError(f"statistics of {name!r}: proprio/names is {_short(names)}, not a list of names")
    columns = tuple(names)
    unknown = [column for column in wanted if column not in columns]
    if unknown or any(len(proprio[field]) != len(columns) for field in _FIELDS):
        held = f"columns {', '.join(columns)}" if columns else f"{width} columns without names"
        raise StatisticsError(
            f"statistics of {name!r}: their state has {held}, the policy's is {', '.join(wanted)}: "
            f"use statistics of the same state"
        )
    if not any(any(proprio[field]) for field in _FIELDS):
        raise StatisticsError(f"statistics of {name!r}: those of the state are zeros: compute them with the state")
    order = [columns.index(column) for column in wanted]
    selected = {field: [proprio[field][i] for i in order] for field in _FIELDS}
    return {**statistics, "proprio": {**selected, "names": list(wanted)}}


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max


def _short(value: object) -> str:
    return repr(value)[:80]


def table(statistics: Mapping[str, Mapping]) -> str:
    """A text table of the action statistics of several datasets, to be printed."""
    lines = []
    for name, stats in statistics.items():
        lines.append(f"{name}: {stats['num_transitions']:,} steps in {stats.get('num_trajectories', 0):,} episodes")
        lines.append("  dim" + "".join(f"{field:>10}" for field in _FIELDS) + "  normalised")
        action = stats["action"]
        for i, mask in enumerate(action["mask"]):
            row = "".join(f"{action[field][i]:10.4f}" for field in _FIELDS)
            constant = action["min"][i] == action["max"][i]
            lines.append(f"  {i:3}{row}  {'constant' if constant else 'yes' if mask else 'no'}")
    return "\n".join(lines)
