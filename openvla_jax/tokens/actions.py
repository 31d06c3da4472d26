"""Actions as tokens, and their normalisation."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from openvla_jax.config import nearest
from openvla_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class ActionTokenizer:
    """Actions in [-1, 1] <-> the last `bins` ids of the vocabulary; -1 is the highest id (OpenVLA paper, section 3.2).

    `bins` edges make `bins - 1` intervals, and an action of exactly 1.0 has an id of its own: `first_token` (1.0) and
    `first_token + 1` decode alike. Pretrained weights depend on it.
    vocab_size: the tokenizer's own (32000 in Llama-2), without added tokens and padding.
    """

    vocab_size: int = 32000
    bins: int = 256

    @property
    def first_token(self) -> int:
        """The lowest action id (31744 in Llama-2)."""
        return self.vocab_size - self.bins

    @property
    def last_token(self) -> int:
        """The highest action id (31999 in Llama-2), inclusive."""
        return self.vocab_size - 1

    @functools.cached_property
    def bin_edges(self) -> np.ndarray:
        """float64 [bins], from -1 to 1."""
        return np.linspace(-1.0, 1.0, self.bins)

    @functools.cached_property
    def bin_centers(self) -> np.ndarray:
        """float64 [bins - 1], ascending; `bin_centers[clip(last_token - ids, 0, bins - 2)]` decodes on a device too."""
        return (self.bin_edges[:-1] + self.bin_edges[1:]) / 2.0

    def encode(self, actions: ArrayLike) -> np.ndarray:
        """Normalised actions [..., A] -> int32 ids [..., A]. Beyond [-1, 1] is clipped; NaN raises InputError."""
        actions = np.asarray(actions, np.float64)  # float32 edges compare as the reference compares them
        if np.isnan(actions).any():
            where = tuple(int(i) for i in np.argwhere(np.isnan(actions))[0])
            raise InputError(f"action has NaN at index {where}: fix the data or its statistics")
        return (self.vocab_size - np.digitize(np.clip(actions, -1.0, 1.0), self.bin_edges)).astype(np.int32)

    def decode(self, ids: ArrayLike) -> np.ndarray:
        """Integer ids [..., A] -> float64 bin centres; as in the reference an id outside the range gets the nearest."""
        ids = np.asarray(ids)
        if ids.dtype.kind not in "iu":
            raise InputError(f"action ids are {ids.dtype}, not integers: decode takes token ids")
        return self.bin_centers[np.clip(self.last_token - ids.astype(np.int64), 0, self.bins - 2)]


NORMALIZATIONS = {"normal": ("mean", "std"), "bounds": ("min", "max"), "bounds_q99": ("q01", "q99")}


def normalize_actions(actions: ArrayLike, stats: Mapping[str, Any], kind: str = "bounds_q99") -> np.ndarray:
    """Physical actions [..., A] -> normalised, float64 [..., A].

    stats: `statistics[dataset]["action"]` (or "proprio"), rows of length A. "normal" standardises; "bounds" and
    "bounds_q99" map [min, max] or [q01, q99] onto [-1, 1] and clip. Dims where the mask is False pass unchanged; but
    under both bounds a dim with min == max becomes 0 whatever its mask, as in the reference (a constant gripper reads
    0).     Raises InputError for an unknown kind, or where dims differ.
    """
    actions, mask, first, second = _aligned(actions, stats, kind)
    if kind == "normal":
        return np.where(mask, (actions - first) / (second + 1e-8), actions)
    scaled = np.clip(2 * (actions - first) / (second - first + 1e-8) - 1, -1.0, 1.0)
    _, _, least, most = _aligned(actions, stats, "bounds")
    return np.where(least == most, 0.0, np.where(mask, scaled, actions))


def unnormalize_actions(actions: ArrayLike, stats: Mapping[str, Any], kind: str = "bounds_q99") -> np.ndarray:
    """Normalised actions [..., A] -> physical, float64 [..., A]; arguments and errors as in `normalize_actions`.

    As in the reference without the 1e-8 of `normalize_actions`; dims where the mask is False pass unchanged.
    """
    actions, mask, first, second = _aligned(actions, stats, kind)
    if kind == "normal":
        return np.where(mask, actions * second + first, actions)
    return np.where(mask, 0.5 * (actions + 1) * (second - first) + first, actions)


def choose_unnorm_key(statistics: Mapping[str, Any], key: str | None = None) -> str:
    """The dataset whose statistics unnormalise: `key`, or where it is None the only one there is. Raises InputError."""
    if key is None:
        if len(statistics) == 1:
            return next(iter(statistics))
        raise InputError(f"unnorm_key is None and there are {len(statistics)} datasets; {nearest('', statistics)}")
    if key not in statistics:
        raise InputError(f"unnorm_key {key!r} has no statistics; {nearest(key, statistics)}")
    return key


def _aligned(actions: ArrayLike, stats: Mapping[str, Any], kind: str) -> tuple[np.ndarray, ...]:
    """actions, mask and the two rows of statistics that `kind` needs, of one size A."""
    if kind not in NORMALIZATIONS:
        raise InputError(f"normalisation {kind!r} is unknown; {nearest(kind, NORMALIZATIONS)}")
    missing = [name for name in NORMALIZATIONS[kind] if name not in stats]
    if missing:
        raise InputError(f"statistics have {sorted(stats)} but no {missing[0]!r}: pass statistics[dataset]['action']")
    actions = np.asarray(actions, np.float64)
    first, second = (np.asarray(stats[name], np.float64) for name in NORMALIZATIONS[kind])
    mask = np.asarray(stats.get("mask", np.ones_like(first)), bool)
    if not actions.shape[-1:] == mask.shape == first.shape == second.shape:
        raise InputError(
            f"actions of shape {actions.shape} do not fit statistics of {first.size} dims with a mask of {mask.size}: "
            "use the statistics of the same dataset"
        )
    return actions, mask, first, second
