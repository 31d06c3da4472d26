"""Frames that cannot be trained on: marked inside tf.data, reported outside it.

An exception inside tf.data would lose the frame's name, end the stream, and could not be counted. So a faulty frame
travels through the pipeline like any other, and carries a mark:

  step == NO_FRAMES          the dataset yields no frame at all; without the mark the stream would search forever
  step == SHORT_EPISODE      the episode has fewer steps than a chunk has actions
  broken_<camera> is not ""  the image of this camera cannot be decoded; the column holds its bytes, for the message

`drop_faulty` takes out frames that are to be skipped. It hands a line about each to the "skipped" column of the next
good frame, so that they are counted exactly, also after a resume. Frames that are not dropped stop the run: `check`
raises, naming dataset, episode and step.
"""

import logging
from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow as tf

from openvla_jax.data import BadImageError, DataError, images
from openvla_jax.data.statistics import Grippers, check_finite, check_grippers

NO_FRAMES = -1
SHORT_EPISODE = -2
_IN_A_ROW = 1000  # faulty frames that are skipped before a good one must come
_LOGGED = 20  # skipped frames that are logged one by one

# A lambda's parameters would be taken apart; autograph is not needed, and cannot convert code without a file.
_plain = tf.autograph.experimental.do_not_convert


def drop_faulty(stream: tf.data.Dataset, skip_broken: bool) -> tf.data.Dataset:
    """Drops frames of short episodes and, if `skip_broken`, those with a broken image; adds the column "skipped".

    After 1000 faulty frames in a row the next one is passed through, so that `check` raises.
    """

    def note(state: tuple[tf.Tensor, tf.Tensor], frame: dict):
        places, count = state
        short = frame["step"] == SHORT_EPISODE
        broken = [frame[key] != "" for key in frame if key.startswith("broken_")]
        faulty = (short | tf.reduce_any(broken)) if skip_broken else short
        drop = faulty & (count < _IN_A_ROW)
        numbers = [tf.strings.as_string(frame[key]) for key in ("dataset", "step")]
        place = tf.strings.join([*numbers, frame["episode"]], separator=" ")
        noted = tf.cond(drop, lambda: (tf.strings.join([places, place, "\n"]), count + 1), lambda: ("", 0))
        return noted, (frame | {"skipped": places}, drop)

    noted = stream.scan((tf.constant(""), tf.constant(0)), _plain(note))
    kept = noted.filter(_plain(lambda frame, drop: tf.logical_not(drop)))
    return kept.map(_plain(lambda frame, drop: frame))


class Skipped:
    """Counts and logs the frames that `drop_faulty` took out."""

    def __init__(self, names: Sequence[str]):
        self.names = names
        self.images = 0
        self.short_episodes = 0

    def note(self, lines: np.ndarray) -> None:
        """lines: the "skipped" column of a batch, bytes [B]."""
        for line in "".join(text.decode() for text in lines.tolist()).splitlines():
            dataset, step, episode = line.split(" ", 2)
            if int(step) == SHORT_EPISODE:
                self.short_episodes += 1
                place, fault, count = "", "fewer steps than action.horizon; it", self.short_episodes
            else:
                self.images += 1
                place, fault, count = f", step {step}", "the image cannot be decoded; the frame", self.images
            if count <= _LOGGED:
                logging.warning(
                    "dataset %r, episode %s%s: %s is skipped (%d so far%s)",
                    self.names[int(dataset)], episode, place, fault, count,
                    "; further ones are only counted" if count == _LOGGED else "",
                )  # fmt: skip


def where(rows: Mapping[str, np.ndarray], row: int, names: Sequence[str]) -> str:
    """Returns dataset, episode and step of a row, for a message."""
    name, episode = names[rows["dataset"][row]], rows["episode"][row].decode()
    return f"dataset {name!r}, episode {episode}, step {rows['step'][row]}"


def check(
    rows: Mapping[str, np.ndarray],
    names: Sequence[str],
    cameras: Sequence[str],
    grippers: Sequence[Grippers] = (),
    horizon: int = 1,
) -> None:
    """Raises for the first row that cannot be trained on.

    Args:
        rows: columns of a batch, as `batches` delivers them.
        names: of the datasets.
        cameras: whose images a row holds.
        grippers: of each dataset's actions.
        horizon: actions of a row.

    Raises:
        DataError: a dataset yields no frames.
        BadImageError: an image is broken.
        BadActionError: an action or state is NaN or infinite, or a gripper outside its declared range.
    """
    for row in np.flatnonzero(rows["step"] == NO_FRAMES)[:1].tolist():
        raise DataError(
            f"dataset {names[rows['dataset'][row]]!r}: not one frame of the episodes that this process reads "
            f"has an instruction and passes the dataset's filter: label them, or leave the dataset out"
        )
    for row in np.flatnonzero(rows["step"] == SHORT_EPISODE)[:1].tolist():
        raise DataError(
            f"dataset {names[rows['dataset'][row]]!r}: {_IN_A_ROW} episodes in a row have fewer steps than "
            f"action.horizon, the last is {rows['episode'][row].decode()}: lower it, or leave the dataset out"
        )
    for camera in cameras:
        broken = rows[f"broken_{camera}"]
        for row in np.flatnonzero(broken != b"")[:1].tolist():
            reason = images.reason(broken[row])
            raise BadImageError(
                f"{where(rows, row, names)}: the image of camera {camera!r} cannot be decoded ({reason}): "
                f"fix it, or set data.bad_images=skip"
            )
    for column in ("action", "state"):
        for row in np.flatnonzero(~np.isfinite(rows[column]).all(axis=1))[:1].tolist() if column in rows else ():
            name, one = names[rows["dataset"][row]], slice(row, row + 1)
            check_finite(rows[column][one], column, name, rows["episode"][one], rows["step"][one])
    for index, ranges in enumerate(grippers):
        if ranges:
            own = np.flatnonzero(rows["dataset"] == index)
            actions = rows["action"][own].reshape(len(own) * horizon, -1)
            places = (np.repeat(rows[key][own], horizon) for key in ("episode", "step"))
            check_grippers(actions, "action", ranges, names[index], *places)
