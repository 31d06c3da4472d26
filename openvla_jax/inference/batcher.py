"""Requests of concurrent clients, decoded together: one thread owns the policy, a bounded queue feeds it."""

import concurrent.futures
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from openvla_jax.errors import InputError
from openvla_jax.inference.policy import NonFiniteActionError, Policy, Request


class QueueFullError(RuntimeError):
    """More requests wait than the queue holds."""


class StoppedError(RuntimeError):
    """The batcher takes no more requests."""


class _Item(NamedTuple):
    request: Request
    future: "concurrent.futures.Future[np.ndarray]"
    arrived: float


class Batcher:
    """Collects requests for at most `wait` seconds after the first, or up to `max_batch`, and decodes them together.

    While one batch is decoded, the next one gathers, so that under load batches fill up without waiting. Batches are
    padded to the next power of two. `observe(size, waited, took)` is called after each.
    """

    def __init__(
        self,
        policy: Policy,
        max_batch: int = 16,
        wait: float = 0.004,
        max_queue: int = 64,
        observe: Callable[[int, Sequence[float], float], None] = lambda size, waited, took: None,
    ):
        if max_batch < 1 or max_queue < max_batch or wait < 0:
            raise InputError(f"max_batch {max_batch}, max_queue {max_queue}, wait {wait}: 1 <= max_batch <= max_queue")
        self.policy, self.max_batch, self.wait, self.observe = policy, max_batch, wait, observe
        self.batch_sizes = sorted({min(2**n, max_batch) for n in range(max_batch.bit_length() + 1)})
        self._queue: queue.Queue[_Item | None] = queue.Queue(max_queue)
        self._lock = threading.Lock()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        return self._queue.qsize()

    def submit(self, requests: Sequence[Request]) -> "list[concurrent.futures.Future[np.ndarray]]":
        """Returns futures of their chunks [K, A]. All are taken, or none: QueueFullError or StoppedError at once.

        A future raises what the policy raised for its batch, but NonFiniteActionError only for its own chunk.
        """
        now = time.perf_counter()
        items = [_Item(request, concurrent.futures.Future(), now) for request in requests]
        with self._lock:
            if self._stopped:
                raise StoppedError("the server is stopping")
            if self._queue.qsize() + len(items) > self._queue.maxsize:  # it only shrinks meanwhile
                raise QueueFullError(f"{self._queue.qsize()} requests wait already")
            for item in items:
                self._queue.put_nowait(item)
        return [item.future for item in items]

    def stop(self) -> None:
        """Takes no more requests, and returns when those that were taken are answered."""
        with self._lock:
            if self._stopped:
                return
            self._stopped = True
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        last = False
        while not last:
            item = self._queue.get()
            if item is None:
                return
            batch, deadline = [item], time.perf_counter() + self.wait
            while len(batch) < self.max_batch:
                try:
                    item = self._queue.get(timeout=max(0.0, deadline - time.perf_counter()))
                except queue.Empty:
                    break
                if item is None:
                    last = True
                    break
                batch.append(item)
            # A client that hung up cancels its future.
            self._answer([item for item in batch if item.future.set_running_or_notify_cancel()])

    def _answer(self, batch: list[_Item]) -> None:
        if not batch:
            return
        began = time.perf_counter()
        try:
            size = next(size for size in self.batch_sizes if size >= len(batch))
            chunks: list[Any] = self.policy.act([item.request for item in batch], size)
        except Exception as error:  # one batch fails, the server goes on
            if isinstance(error, NonFiniteActionError) and len(batch) > 1:
                for item in batch:  # alone, because the other rows' actions may be good
                    self._answer([item])
                return
            for item in batch:
                item.future.set_exception(error)
            return
        took = time.perf_counter() - began
        self.observe(len(batch), [began - item.arrived for item in batch], took)
        for item, chunk in zip(batch, chunks, strict=True):
            item.future.set_result(chunk)
