"""Measures the seconds and the memory of functions that return when their work is done."""

import resource
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import psutil

WARM_UP = 2


class Samples(NamedTuple):
    first: float  # seconds of the first call: compilation and one run
    seconds: np.ndarray  # of each call after the warm-up

    def cells(self) -> dict[str, Any]:
        """Returns a ledger's columns: percentiles of the raw samples in milliseconds, and the number of samples."""
        p50, p95, p99 = 1e3 * np.quantile(self.seconds, [0.5, 0.95, 0.99])
        return {"p50 ms": p50, "p95 ms": p95, "p99 ms": p99, "runs": len(self.seconds), "first call s": self.first}


def sample(function: Callable[[], Any], limit: int, seconds: float) -> Samples:
    """Times at least one and at most `limit` runs. None starts later than `seconds` after the warm-up."""
    began = time.perf_counter()
    function()
    first = time.perf_counter() - began
    for _ in range(WARM_UP):
        function()
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while len(taken) < limit and (not taken or time.perf_counter() < end):
        began = time.perf_counter()
        function()
        taken.append(time.perf_counter() - began)
    return Samples(first, np.asarray(taken))


def time_in_turns(sides: dict[Any, Callable[[], Any]], runs: int) -> dict[Any, np.ndarray]:
    """Returns the seconds of each run by side. The sides take turns, so that a busy machine slows all of them."""
    times: dict[Any, list[float]] = {side: [] for side in sides}
    for run in range(runs + 1):
        for side, function in sides.items():
            began = time.perf_counter()
            function()
            if run:  # the first compiles and fills caches
                times[side].append(time.perf_counter() - began)
    return {side: np.asarray(values) for side, values in times.items()}


def peak_gb() -> float:
    """Returns the most memory that this process has held, in GB: on its GPU if jax has one, else resident."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class PeakMemory:
    """Largest resident memory of the process while the block runs, sampled."""

    def __enter__(self) -> "PeakMemory":
        self.bytes, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def _sample(self) -> None:
        process = psutil.Process()
        while not self._stop.wait(0.05):
            self.bytes = max(self.bytes, process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
