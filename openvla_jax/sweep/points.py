"""The points of a sweep: helpers that compose override dicts, and the checks that run before anything starts.

A sweep file has `get_sweep()`, which returns the path of the base config (with its argument, if any: `FILE:ARG`) and a
list of override dicts, `{"optimizer.learning_rate": 1e-4, "seed": 1}`. The key "config" replaces the base config for
one point.
"""

import copy
import hashlib
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from openvla_jax import config_files
from openvla_jax.config import nearest
from openvla_jax.errors import InputError

Overrides = dict[str, Any]
CONFIG = "config"  # the override that names another base config
_SCALARS = (bool, int, float, str)
_NAME_LIMIT = 120  # characters of a point's directory name


class SweepError(InputError):
    """A sweep that cannot be run; the message is one line."""


# ---------------------------------------------------------------------------------------------------------------------
# Composing
# ---------------------------------------------------------------------------------------------------------------------


def axis(key: str, values: Iterable[Any]) -> list[Overrides]:
    """One point for each value of a setting: `axis("train.remat", ["none", "full"])`."""
    return [{key: value} for value in values]


def product(*axes: Sequence[Overrides]) -> list[Overrides]:
    """Every combination of the points of several axes; the last axis varies fastest."""
    return [_merge(parts) for parts in itertools.product(*axes)]


def zipped(*axes: Sequence[Overrides]) -> list[Overrides]:
    """The first points of all axes together, the second ones, and so on. SweepError if their numbers differ."""
    if len({len(points) for points in axes}) > 1:
        lengths = ", ".join(str(len(points)) for points in axes)
        raise SweepError(f"zipped axes have {lengths} points: give equal numbers")
    return [_merge(parts) for parts in zip(*axes, strict=True)]


def chain(*sweeps: Sequence[Overrides]) -> list[Overrides]:
    """The points of several sweeps, one after another."""
    return [dict(point) for point in itertools.chain(*sweeps)]


def log_spaced(low: float, high: float, count: int) -> list[float]:
    """`count` values from low to high (both included, > 0), equally far apart in their logarithm, to 4 digits."""
    if not (low > 0 and high > 0) or count < 1:
        raise SweepError(f"log_spaced({low}, {high}, {count}): both ends must be > 0, and one value at least")
    if count == 1:
        return [float(low)]
    step = math.log(high / low) / (count - 1)
    return [float(f"{low * math.exp(step * i):.4g}") for i in range(count)]


def seeds(count: int, first: int = 0) -> list[Overrides]:
    """`count` seeds, to see how far runs that differ in nothing else lie apart."""
    return axis("seed", range(first, first + count))


def _merge(parts: Iterable[Mapping[str, Any]]) -> Overrides:
    merged: Overrides = {}
    for part in parts:
        if both := merged.keys() & part.keys():
            raise SweepError(f"two axes set {', '.join(sorted(both))}: name each setting once")
        merged |= part
    return merged


# ---------------------------------------------------------------------------------------------------------------------
# Loading and checking
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    name: str  # of its directory
    config: str  # FILE or FILE:ARG
    overrides: Overrides  # flat: "a.b.c" -> scalar or tuple of scalars
    steps: int  # at which the run is finished

    def arguments(self, workdir: str) -> list[str]:
        """The command line of the run, without the interpreter. It needs no checkout, and fine-tunes as well."""
        flags = [f"--config.{key}={_flag(value)}" for key, value in self.overrides.items()]
        return ["-m", "openvla_jax", "train", "--config", self.config, "--workdir", workdir, *flags]


def load_sweep(path: str | Path, overrides: Sequence[str] = (), group: str = "") -> list[Point]:
    """The points of a sweep file, each checked against its base config: keys exist, values have the right type.

    `overrides` are `KEY=VALUE` for all points, as on the command line; what a point sets itself wins. Points that
    log to Weights & Biases without a group of their own are put into `group`. SweepError names the first thing that is
    wrong.
    """
    found = _call(path, "get_sweep")
    try:
        base, points = found
    except (TypeError, ValueError) as error:
        raise SweepError(f"{path}: get_sweep() must return (base config, list of override dicts): {error}") from error
    if not isinstance(base, str) or not isinstance(points, list | tuple):
        raise SweepError(
            f"{path}: get_sweep() must return (base config, list of override dicts), got {base!r}, {points!r}"
        )
    points = [_flatten(point, f"{path}, point {i}") for i, point in enumerate(points)]
    if not points:
        raise SweepError(f"{path}: the sweep has no points")
    common = [_assignment(text) for text in overrides]
    short = _short_names({key for point in points for key in point})
    configs: dict[str, ConfigDict] = {}
    result: list[Point] = []
    for number, overridden in enumerate(points):
        config = overridden.pop(CONFIG, base)
        name = _point_name({CONFIG: config} | overridden if config != base else overridden, short)
        if config not in configs:
            configs[config] = load_config(config)
        where = f"{path}, point {number} ({name})"
        texts = {key: text for key, text in common if key not in overridden}
        settings = texts | overridden
        checked = apply(configs[config], settings, where, parse=texts.keys())
        if not (checked.init_from or checked.model.preset):
            raise SweepError(f"{where}: fine-tuning starts from a checkpoint: give --set init_from=DIR")
        if "wandb" in checked and checked.wandb.project and not checked.wandb.group:
            settings = settings | {"wandb.group": group}
        if name in (other.name for other in result):
            raise SweepError(f"{where} is there twice")
        result.append(Point(name, config, settings, int(checked.train.steps)))
    return result


def load_config(path: str) -> ConfigDict:
    """The config of FILE, FILE:ARG, NAME or NAME:ARG."""
    try:
        file, _, argument = config_files.find(path).partition(":")
    except ValueError as error:
        raise SweepError(str(error)) from error
    return _call(file, "get_config", *([argument] if argument else []))


def apply(config: ConfigDict, overrides: Mapping[str, Any], where: str, parse: Iterable[str] = ()) -> ConfigDict:
    """A copy of `config` with flat overrides; SweepError for an unknown key or a wrong type. Values of the keys in
    `parse` are text, to be read as the type of the setting."""
    config = copy.deepcopy(config)
    parse = set(parse)
    for key, value in overrides.items():
        *parents, last = key.split(".")
        node: Any = config
        for depth, part in enumerate([*parents, last]):
            if not isinstance(node, ConfigDict) or part not in node:
                known = [".".join([*parents[:depth], k]) for k in node] if isinstance(node, ConfigDict) else []
                raise SweepError(
                    f"{where}: the config has no {key!r}; {nearest('.'.join([*parents[:depth], part]), known)}"
                )
            if depth < len(parents):
                node = node[part]
        old, kind = node[last], node.get_type(last)
        if isinstance(old, ConfigDict):
            raise SweepError(f"{where}: {key!r} is a group of settings; set {', '.join(f'{key}.{k}' for k in old)}")
        if key in parse:
            value = _parsed(value, kind, old, f"{where}: {key}")
        if not _fits(value, kind):
            raise SweepError(f"{where}: {key} is {kind.__name__} ({old!r}), not {type(value).__name__} ({value!r})")
        node[last] = float(value) if kind is float else value
    return config


def _call(path: str | Path, function: str, *arguments: str) -> Any:
    try:
        return config_files.call(path, function, *arguments)
    except ValueError as error:
        raise SweepError(str(error)) from error


def _flatten(point: Any, where: str, prefix: str = "") -> Overrides:
    if not isinstance(point, Mapping):
        raise SweepError(f"{where} is {point!r}: give a dict of overrides")
    flat: Overrides = {}
    for key, value in point.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= _flatten(value, where, f"{name}.")
            continue
        if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
            value = value.item()  # a NumPy scalar
        if not isinstance(value, _SCALARS) and not (
            isinstance(value, tuple | list) and all(isinstance(x, _SCALARS) for x in value)
        ):
            raise SweepError(f"{where}: {name} is {value!r}: give a number, a string, a bool or a tuple of them")
        flat[name] = tuple(value) if isinstance(value, list) else value
    return flat


def _fits(value: Any, kind: type) -> bool:
    if kind is bool or isinstance(value, bool):
        return kind in (bool, type(None)) and isinstance(value, bool)
    if kind is float:
        return isinstance(value, int | float)
    if kind in (tuple, list):
        return isinstance(value, tuple)
    return kind is type(None) or isinstance(value, kind)


def _assignment(text: str) -> tuple[str, str]:
    key, sign, value = text.partition("=")
    if not sign:
        raise SweepError(f"override {text!r}: write KEY=VALUE")
    return key, value


def _parsed(text: str, kind: type, old: Any, where: str) -> Any:
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if kind in (tuple, list):
            element = type(old[0]) if old else str
            return tuple(element(part) for part in text.strip("()[] ").split(",") if part.strip())
        return text if kind is type(None) else kind(text)
    except (KeyError, ValueError) as error:
        raise SweepError(f"{where} is {kind.__name__} ({old!r}), not {text!r}") from error


def _flag(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _short_names(keys: Iterable[str]) -> dict[str, str]:
    """The last part of each key, or as many parts as tell it from the others."""
    keys = set(keys)
    short = {}
    for key in keys:
        parts = key.split(".")
        for count in range(1, len(parts) + 1):
            candidate = ".".join(parts[-count:])
            if sum(other == candidate or other.endswith("." + candidate) for other in keys) == 1:
                break
        short[key] = candidate
    return short


def _point_name(overrides: Overrides, short: Mapping[str, str]) -> str:
    """`learning_rate=0.0001,seed=1`: what tells the points apart, usable as a directory."""
    parts = [f"{short.get(key, key)}={_flag(value)}" for key, value in overrides.items()] or ["base"]
    name = re.sub(r"[^A-Za-z0-9_.=,+-]+", "_", ",".join(parts)).strip(".")
    if len(name) > _NAME_LIMIT:
        name = name[: _NAME_LIMIT - 9] + "-" + hashlib.sha256(name.encode()).hexdigest()[:8]
    return name
