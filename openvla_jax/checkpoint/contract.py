"""Checkpoints: weights, and the contract that says how to use them.

A checkpoint is a directory written by Orbax (v1) with these items:

    params/      nested dict of arrays, paths as in the model (`llama/blocks/attention/q/kernel`); of a run that froze
                 some, only what it trained: such a checkpoint, an adapter, is used together with its base. It is these
                 weights that act: the average, if the run keeps one (optimizer.ema)
    unused/      reference tensors that are never run, by tower (only in imported weights; copied along)
    optimizer/   optimiser state and step (only while training); beside an average also the weights that are trained
    data/        position in the data stream, per process (only where `data.resume` is exact)
    contract/    config.json, dataset_statistics.json, tokenizer files: everything that `Contract` holds

Training keeps them as W/checkpoints/<step>/; an imported checkpoint is one such directory by itself. A directory
appears under its final name only when it is complete.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from openvla_jax.config import VLAConfig, nearest
from openvla_jax.errors import InputError, reading
from openvla_jax.tokens.actions import NORMALIZATIONS, ActionTokenizer
from openvla_jax.types import ActionSpec, ObservationSpec, Preprocessing

FORMAT = 2
CONFIG_FILE, STATISTICS_FILE, TOKENIZER_DIR = "config.json", "dataset_statistics.json", "tokenizer"
REFERENCE_CROP_AREA = 0.9  # of the reference's training crops and of its evaluations
DAMAGED = "the checkpoint is incomplete or damaged: copy or save it again"


class CheckpointError(InputError):
    """A checkpoint that is missing, incomplete, of another model, or not one at all."""


@dataclasses.dataclass(frozen=True)
class Contract:
    """Everything that a user of the weights must know and must not retype.

    model: the architecture. tokenizer: a transformers fast tokenizer; None if an import found no tokenizer files.
    statistics: {dataset: {"action": {...}, "proprio": {...}, "num_transitions", ...}}, rows of numbers; "names" in
    "proprio" are those of its columns. default_key: the dataset whose statistics are used if a request names none.
    training: the run's config, or the source of an import. adapter: {base, fingerprint, tuning} if params hold only
    what was trained.

    Raises CheckpointError for statistics that do not fit the specs.
    """

    model: VLAConfig
    tokenizer: Any
    statistics: Mapping[str, Any]
    observation: ObservationSpec = dataclasses.field(default_factory=ObservationSpec)
    action: ActionSpec = dataclasses.field(default_factory=ActionSpec)
    preprocessing: Preprocessing = dataclasses.field(default_factory=Preprocessing)
    training: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    default_key: str | None = None
    adapter: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.action.bins >= self.model.base_vocab_size:
            raise CheckpointError(
                f"action.bins is {self.action.bins}: the tokenizer of {self.model.name} has "
                f"{self.model.base_vocab_size} entries; use fewer bins"
            )
        shown, taken = self.observation, self.model
        if (len(shown.cameras), len(shown.state)) != (taken.cameras, taken.state_dim):
            raise CheckpointError(
                f"the model of {taken.name} takes {taken.cameras} cameras and {taken.state_dim} columns of state, the "
                f"observation has cameras {', '.join(shown.cameras)} and state {', '.join(shown.state) or 'none'}"
            )
        if (taken.head, taken.action_dim) != (self.action.head, self.action.dim if self.action.is_continuous else 0):
            raise CheckpointError(
                f"the model of {taken.name} has the head {taken.head} for {taken.action_dim} numbers, the action has "
                f"{self.action.head} for {self.action.dim}"
            )
        check_statistics(self.statistics, self.action, self.observation)

    @property
    def action_tokenizer(self) -> ActionTokenizer:
        """The codec of the token head."""
        return ActionTokenizer(self.model.base_vocab_size, self.action.bins)

    def action_dim(self, dataset: str) -> int:
        """Returns the number of action dimensions of a dataset."""
        return len(self.statistics[dataset]["action"][NORMALIZATIONS[self.action.normalization][0]])

    def state_statistics(self, dataset: str) -> dict[str, list[float]]:
        """Returns the rows that normalise the state, with columns in the order of `observation.state`."""
        proprio = self.statistics[dataset]["proprio"]
        columns = _state_columns(dataset, proprio, self.observation.state)
        return {name: [proprio[name][i] for i in columns] for name in _state_rows(self.action.normalization)}

    def check_is_policy(self) -> None:
        """Raises CheckpointError if there are no action statistics, as in a base VLM."""
        if not self.statistics:
            raise CheckpointError(
                "this checkpoint is a VLM: it has no action statistics, so that actions have no units; train it on "
                "robot data (init_from), or name the checkpoint of a policy"
            )

    def to_dict(self) -> dict[str, Any]:
        """Returns what config.json holds."""
        config = {
            "format": FORMAT,
            "model": self.model.to_dict(),
            "observation": dataclasses.asdict(self.observation),
            "action": dataclasses.asdict(self.action),
            "preprocessing": dataclasses.asdict(self.preprocessing),
            "training": dict(self.training),
            "default_key": self.default_key,
        }
        return config | ({} if self.adapter is None else {"adapter": dict(self.adapter)})

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], statistics: Mapping[str, Any], tokenizer: Any = None) -> "Contract":
        """Inverse of `to_dict`, for any format that `migrate` knows.

        Raises ValueError that names an unknown or missing key, CheckpointError for a format that is not known.
        """
        config = migrate(config, statistics)
        known = ("format", "model", "observation", "action", "preprocessing", "training", "default_key", "adapter")
        for key in config:
            if key not in known:
                raise InputError(f"unknown key {key!r} in the contract; {nearest(key, known)}")
        missing = [key for key in known[1:6] if not isinstance(config.get(key), Mapping)]
        if missing:
            raise InputError(f"the contract lacks {', '.join(missing)}")
        default_key, adapter = config.get("default_key"), config.get("adapter")
        if not isinstance(default_key, str | None):
            raise InputError(f"default_key is {default_key!r}, not the name of a dataset")
        if adapter is not None and not (
            isinstance(adapter, Mapping) and {"base", "fingerprint", "tuning"} <= {*adapter}
        ):
            raise InputError("adapter is not an object with base, fingerprint and tuning")
        return cls(
            model=VLAConfig.from_dict(config["model"]),
            tokenizer=tokenizer,
            statistics=statistics,
            observation=ObservationSpec.from_dict(config["observation"]),
            action=ActionSpec.from_dict(config["action"]),
            preprocessing=Preprocessing.from_dict(config["preprocessing"]),
            training=config["training"],
            default_key=default_key,
            adapter=adapter,
        )

    def save(self, directory: os.PathLike | str) -> None:
        """Writes the contract's files into an existing directory."""
        from openvla_jax.tokens.tokenizer import save_tokenizer

        path = epath.Path(directory)
        (path / CONFIG_FILE).write_text(json.dumps(self.to_dict(), indent=2))
        (path / STATISTICS_FILE).write_text(json.dumps(dict(self.statistics), indent=2))
        if self.tokenizer is not None:
            (path / TOKENIZER_DIR).mkdir(exist_ok=True)
            save_tokenizer(self.tokenizer, path / TOKENIZER_DIR)

    @classmethod
    def load(cls, directory: os.PathLike | str) -> "Contract":
        """Reads what `save` wrote, in this version or an earlier one.

        Raises CheckpointError if a file is missing or damaged, or its content is not a contract.
        """
        from openvla_jax.tokens.tokenizer import load_tokenizer

        path = epath.Path(directory)
        config, statistics = read_json(path / CONFIG_FILE), read_json(path / STATISTICS_FILE)
        tokenizer = None
        with reading(path / TOKENIZER_DIR, DAMAGED, CheckpointError):
            if (path / TOKENIZER_DIR).is_dir():
                tokenizer = load_tokenizer(path / TOKENIZER_DIR)
        with reading(path, DAMAGED, CheckpointError):
            try:
                return cls.from_dict(config, statistics, tokenizer)
            except InputError as error:
                raise CheckpointError.of(path, str(error)) from None


def read_json(path: epath.Path) -> dict[str, Any]:
    """Returns the object in a JSON file of a checkpoint. Raises CheckpointError if there is none."""
    with reading(path, DAMAGED, CheckpointError):
        if not path.exists():
            raise CheckpointError.of(path, "is missing", DAMAGED)
        text = path.read_bytes()
    try:
        return parse_object(text)
    except ValueError as error:
        raise CheckpointError.of(path, str(error), DAMAGED) from None


def parse_object(text: bytes) -> dict[str, Any]:
    """Returns the object in JSON text. Raises ValueError, without a place, if it is not JSON or no object."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"holds a {type(content).__name__}, not an object")
    return content


# ---------------------------------------------------------------------------------------------------------------------
# Formats
# ---------------------------------------------------------------------------------------------------------------------


def migrate(config: Mapping[str, Any], statistics: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a stored config of any known format as one of `FORMAT`, format by format.

    Raises CheckpointError for a format that is newer than this version, or none.
    """
    config = dict(config)
    while config.get("format") != FORMAT:
        found = config.get("format")
        if found not in MIGRATIONS:
            raise CheckpointError(
                f"contract of format {found!r}, this version reads 1 to {FORMAT}: "
                "update openvla_jax, or name another checkpoint"
            )
        try:
            config = MIGRATIONS[found](config, statistics)
        except KeyError as error:
            raise InputError(f"the contract, of format {found}, lacks {error}") from None
    return config


def _from_1_to_2(config: Mapping[str, Any], statistics: Mapping[str, Any]) -> dict[str, Any]:
    """Format 1 had one camera, no state, bins in the model, and a crop that was switched on or off."""
    model, old = dict(config["model"]), dict(config["preprocessing"])
    action = action_spec(
        statistics,
        bins=model.pop("action_bins", ActionSpec.bins),
        normalization=old.pop("action_normalization", ActionSpec.normalization),
    )
    crop_area = REFERENCE_CROP_AREA if old.pop("center_crop") else None
    return {
        **config,
        "format": 2,
        "model": model,
        "observation": dataclasses.asdict(ObservationSpec()),
        "action": dataclasses.asdict(action),
        "preprocessing": {**old, "crop_area": crop_area},
    }


MIGRATIONS: dict[Any, Callable[..., dict[str, Any]]] = {1: _from_1_to_2}


def action_spec(statistics: Mapping[str, Any], **known: Any) -> ActionSpec:
    """Returns the action convention of datasets that state none, from the shape of their statistics.

    known: fields of ActionSpec that need no guess. Open X-Embodiment's transforms leave a gripper unnormalised, with 1
    for open, and 7 dimensions only for changes of an end effector. Other sizes have no known convention.
    """
    entries = [entry["action"] for entry in statistics.values() if isinstance(entry, Mapping) and "action" in entry]
    rows = [row for row in entries if isinstance(row, Mapping)]  # what else is wrong is named by `check_statistics`
    widths = [len(row["q01"]) for row in rows if isinstance(row.get("q01"), list) and row["q01"]]
    masks = [row["mask"] for row in rows if isinstance(row.get("mask"), list) and row["mask"]]
    grippers = len(masks) == len(rows) and not any(mask[-1] for mask in masks)
    guessed = {
        "dim": max(widths, default=ActionSpec.dim),
        "gripper": "open" if grippers else "",
        "frame": "delta" if set(widths) <= {7} else "",
    }
    return ActionSpec(**(guessed | known))


# ---------------------------------------------------------------------------------------------------------------------
# Statistics
# ---------------------------------------------------------------------------------------------------------------------


def check_statistics(statistics: Mapping[str, Any], action: ActionSpec, observation: ObservationSpec) -> None:
    """Checks statistics at every door: import, export, loading, saving, serving.

    Rows must be lists of finite numbers of one length, of at most `action.dim` for actions, or exactly that if the head
    is continuous. Lower bounds must not be
    above upper ones, and no `std` below 0; equal bounds and a `std` of 0 mean that a dimension never changes.
    A mask is a list of booleans. With `observation.state` every dataset needs statistics of all its columns; without,
    a state's statistics are checked if there are any.

    Raises:
        CheckpointError: names dataset, row and value.
    """
    for dataset, entry in statistics.items():
        where = f"statistics of {dataset!r}"
        if not isinstance(entry, Mapping):
            raise CheckpointError(f"{where} are {short(entry)}, not an object: fix or remove them")
        width = _check_rows(entry.get("action"), f"{where}: action", NORMALIZATIONS[action.normalization])
        if width > action.dim:
            raise CheckpointError(f"{where}: {width} action dimensions, but action.dim is {action.dim}: raise it")
        if width < action.dim and action.is_continuous:  # its slots stand for as many numbers as the head predicts
            raise CheckpointError(
                f"{where}: {width} action dimensions, but the head {action.head!r} predicts {action.dim}: "
                "fix or remove this dataset"
            )
        if observation.state:
            _check_rows(entry.get("proprio"), f"{where}: proprio", _state_rows(action.normalization))
            _state_columns(dataset, entry["proprio"], observation.state)
        elif entry.get("proprio"):
            _check_rows(entry["proprio"], f"{where}: proprio", ())


def _state_rows(kind: str) -> tuple[str, ...]:
    """Returns the statistics that a state is normalised with: under bounds a column that never changes becomes 0."""
    return NORMALIZATIONS[kind] if kind == "normal" else tuple(dict.fromkeys((*NORMALIZATIONS[kind], "min", "max")))


def _check_rows(rows: Any, where: str, needed: Sequence[str]) -> int:
    """Returns the width of the rows of numbers, of which `needed` must be there."""
    if not isinstance(rows, Mapping) or not set(needed) <= set(rows):
        raise CheckpointError(f"{where} has no rows {' and '.join(needed) or 'at all'}: fix or remove this dataset")
    names = [name for name in ("mean", "std", "min", "max", "q01", "q99") if name in rows]
    for name in names:
        if not _is_list(rows[name], is_finite):
            raise CheckpointError(
                f"{where}/{name} is {short(rows[name])}, not a list of finite numbers: fix or remove this dataset"
            )
    if "mask" in rows and not _is_list(rows["mask"], lambda value: isinstance(value, bool)):
        raise CheckpointError(f"{where}/mask is {short(rows['mask'])}, not a list of true and false: fix this dataset")
    sizes = {name: len(rows[name]) for name in (*names, *(["mask"] if "mask" in rows else []))}
    if len(set(sizes.values())) > 1:
        raise CheckpointError(f"{where} has rows of different length, {sizes}: fix or remove this dataset")
    for low, high in (("q01", "q99"), ("min", "max")):
        for i, (least, most) in enumerate(zip(rows.get(low, ()), rows.get(high, ()), strict=False)):
            if least > most:
                raise CheckpointError(f"{where}: dimension {i} has {low} {least} above {high} {most}: fix this dataset")
    for i, value in enumerate(rows.get("std", ())):
        if value < 0:
            raise CheckpointError(f"{where}: dimension {i} has std {value}, below 0: fix this dataset")
    return len(rows[names[0]]) if names else 0


def _is_list(row: Any, accepts: Callable[[Any], bool]) -> bool:
    return isinstance(row, list | tuple) and bool(row) and all(map(accepts, row))


def is_finite(value: Any) -> bool:
    """Returns whether a value of JSON is a number, and one that float64 holds."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def short(value: Any) -> str:
    """Returns the value as it stands in Python, cut for a message."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _state_columns(dataset: str, proprio: Mapping[str, Any], wanted: Sequence[str]) -> list[int]:
    """Returns the columns of a dataset's statistics of the state that the policy's state consists of."""
    width = len(proprio["q01"] if "q01" in proprio else proprio["mean"])
    names = proprio.get("names", wanted)
    if not _is_list(names, lambda name: isinstance(name, str)) or len(names) != width:
        raise CheckpointError(
            f"statistics of {dataset!r}: proprio has {width} columns, the state is {short(names)}: name each column"
        )
    for name in wanted:
        if name not in names:
            raise CheckpointError(f"statistics of {dataset!r}: no state column {name!r}; {nearest(name, names)}")
    return [list(names).index(name) for name in wanted]
