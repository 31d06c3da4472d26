"""Work on many tensors or files, a few at a time, with a progress bar in bytes."""

import concurrent.futures
import itertools
from collections.abc import Callable, Iterable
from typing import TypeVar

from tqdm import tqdm

from openvla_jax.convert.names import ConversionError

T = TypeVar("T")
# Tensors in flight: one is transposed while another is written. Each costs about three times its bytes.
WORKERS = 2


def run_with_progress(
    job: Callable[[T], int], items: Iterable[T], total: int, title: str, workers: int = WORKERS
) -> None:
    """Runs `job` on all items, a few at a time; each returns the bytes it dealt with. A failure stops the rest."""
    with (
        tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1000, desc=title) as bar,
        concurrent.futures.ThreadPoolExecutor(workers) as pool,
    ):
        waiting = iter(items)
        running = {pool.submit(job, item) for item in itertools.islice(waiting, workers)}
        while running:
            done, running = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in done:
                bar.update(future.result())
            running |= {pool.submit(job, item) for item in itertools.islice(waiting, len(done))}
        if bar.n != total:
            raise ConversionError(
                f"{title}: {bar.n} of {total} bytes were dealt with: this is a bug, do not use the result"
            )
