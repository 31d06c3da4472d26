"""From RLDS directories to batches.

The way of the data, by module:

- `source` opens a dataset's folder and divides its episodes among processes; `episodes` reads them.
- `pipeline` composes the stages of `trajectory`: standardise, normalise by `statistics`, chunk, frames.
- `mixture` draws frames from several datasets; `faults` marks those that cannot be trained on.
- `batches` shuffles them while encoded, decodes them with `images`, and sizes the buffer with `memory`.
- `encoder` adds tokens; `stream` is the iterator, which can be saved and resumed exactly.
- `rlds` reads one dataset alone.

TensorFlow is imported by those modules, never by this file.
"""

import os

from openvla_jax.errors import InputError

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # has to be set before TensorFlow is first imported


class DataError(InputError):
    """The data on disk, or what was asked of them, cannot be trained on.

    The message is one line: what is wrong, where, how to fix it.
    """


class DatasetNotFoundError(DataError):
    """A dataset or one of its files is not where it was looked for."""


class SplitNotFoundError(DataError):
    """A dataset has no such split, or no episodes in it."""


class CorruptRecordError(DataError):
    """A record file is damaged, cut off or does not fit the schema beside it."""


class BadImageError(DataError):
    """A camera frame cannot be decoded, or is not stored as an encoded image."""


class BadActionError(DataError):
    """An action (or state) is NaN or infinite, or a gripper is outside its declared range."""


class StatisticsError(DataError):
    """Normalisation statistics are missing, malformed, or belong to other actions."""
