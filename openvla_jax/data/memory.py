"""How much host memory the data pipeline takes: estimated before it starts, and measured."""

import logging
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from openvla_jax.data import DataError
from openvla_jax.data.episodes import READ_BYTES, explain_errors, read_episodes
from openvla_jax.data.mixture import Mixture
from openvla_jax.data.source import episode_ranges

_FRAME_OVERHEAD = 900  # bytes that a frame of one camera takes in the shuffle buffer beside its strings, measured
_COLUMN_OVERHEAD = _FRAME_OVERHEAD // 6  # such a frame has six columns


@dataclass(frozen=True)
class Memory:
    """Estimated bytes: frame_bytes for a frame in the shuffle buffer, reader_bytes for the episodes being read."""

    frame_bytes: float
    reader_bytes: float


def estimate(mixtures: Sequence[Mixture], readers: int) -> Memory:
    """Returns what the stream of one process keeps in memory, estimated from the first episodes of each dataset.

    mixtures: of the same datasets with other weights; the largest need counts. readers: record files read at once from
    each dataset. Reads up to four episodes of each dataset that is drawn from.
    """
    samples: dict[int, tuple[float, float]] = {}
    memories = []
    for mixture in mixtures:
        frame_bytes, reader_bytes = np.zeros(len(mixture.sources)), 0.0
        for index in np.flatnonzero(mixture.weights).tolist():
            source = mixture.sources[index]
            if index not in samples:
                samples[index] = _sample(mixture, index)
            frame_bytes[index], episode = samples[index]
            # Each open file has a buffer, a record and a result in work; then `readers` episodes are taken apart.
            record = sum(split.num_bytes for split in source.info.splits.values()) / sum(source.splits.values())
            files = min(readers, len(episode_ranges(source, "train")))
            reader_bytes += files * (READ_BYTES + 2 * record) + readers * episode
        memories.append((float(np.dot(mixture.probabilities, frame_bytes)) + _overhead(mixture), reader_bytes))
    return Memory(max(frame for frame, _ in memories), max(reader for _, reader in memories))


def _overhead(mixture: Mixture) -> int:
    """Bytes of a frame beside its strings."""
    columns = len(mixture.observation.cameras) - 1 + bool(mixture.observation.state)
    numbers = (mixture.action.horizon - 1) * int(mixture.action_dims.max()) + len(mixture.observation.state)
    return _FRAME_OVERHEAD + columns * _COLUMN_OVERHEAD + 4 * numbers


def _sample(mixture: Mixture, index: int) -> tuple[float, float]:
    """Bytes of a frame's strings and of an episode's, in the first episodes of a dataset."""
    source = mixture.sources[index]
    with explain_errors([source]):
        episodes = read_episodes(mixture.traced(index), episode_ranges(source, "train"))
        first = list(episodes.take(4).as_numpy_iterator())
    strings = [column for full in first for column in full.values() if column.dtype == object]
    total = sum(len(text) for column in strings for text in column)
    frames = sum(len(full["step"]) for full in first)
    return total / max(frames, 1), total / len(first)


def fit_buffer(data: Any, buffer: int, frame_bytes: float, fixed_bytes: float, batch_size: int) -> int:
    """Returns the shuffle buffer, in frames, cut so that it and the rest fit data.max_host_ram_gb.

    buffer: frames that were asked for. frame_bytes: of one of them. fixed_bytes: of all else. Raises DataError if not
    even one batch fits.
    """
    limit = data.get("max_host_ram_gb")
    if limit is None or buffer * frame_bytes + fixed_bytes <= limit * 1e9:
        return buffer
    fitting = int((limit * 1e9 - fixed_bytes) / frame_bytes)
    if fitting < batch_size:
        raise DataError(
            f"data.max_host_ram_gb={limit} holds not even one batch of {batch_size} frames beside "
            f"{fixed_bytes / 1e9:.2f} GB of readers and prefetched batches: raise it, or lower data.num_parallel_reads"
        )
    logging.warning("shuffle buffer cut from %d to %d frames by data.max_host_ram_gb=%s", buffer, fitting, limit)
    return fitting


def resident_memory_gb() -> float:
    """Returns the resident memory of this process in GB, or its peak if the system tells only that."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize() / 1e9
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
