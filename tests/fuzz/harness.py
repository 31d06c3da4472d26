"""Feeds damaged forms of valid files to a parser and checks that it ends well.

A parser ends well if it returns or raises InputError, within a second, and allocates no more than ten times the input
or the decoded size that the input declares, whichever is larger.
"""

import gc
import resource
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

import hypothesis
from hypothesis import strategies as st

from openvla_jax.errors import InputError

SECONDS = 1.0
ALLOWANCE = 2 * 2**20  # bytes that a parser may use for any input: its own objects, lazily imported modules
# Values at which length fields overflow, turn negative or ask for everything.
EXTREMES = tuple(
    value.to_bytes(size, order)
    for size in (1, 2, 4, 8)
    for value in (0, 1, 2 ** (8 * size - 1) - 1, 2 ** (8 * size - 1), 2 ** (8 * size) - 1)
    for order in ("little", "big")
)


@dataclass(frozen=True)
class Target:
    """A parser to fuzz.

    Args:
        name: what `--targets` calls it.
        seeds: makes valid inputs, each below 64 KiB, that damage is done to.
        parse: reads the bytes as the package does and raises InputError for bad ones.
        declared: returns the decoded size in bytes that a valid or damaged input declares, at most the parser's limit;
            0 if it declares none.
        tokens: byte strings of the format (keywords, brackets, magic numbers) that damage inserts.
    """

    name: str
    seeds: Callable[[], Sequence[bytes]]
    parse: Callable[[bytes], object]
    declared: Callable[[bytes], int] = lambda data: 0
    tokens: Sequence[bytes] = ()


def damaged(random: Random, seeds: Sequence[bytes], tokens: Sequence[bytes]) -> bytes:
    """Returns a seed after up to eight edits or, rarely, bytes of no form at all."""
    if random.random() < 0.05:
        return random.randbytes(random.randrange(256))
    data = random.choice(seeds)
    for _ in range(random.randint(1, 8)):
        if random.random() < 0.5:
            piece = random.randbytes(random.randrange(17))
        else:
            piece = random.choice((*EXTREMES, *tokens))
        at = int(random.random() * len(data) * random.choice((1, 0.02)))  # headers are at the beginning
        kind = random.choice(("replace", "insert", "delete", "cut", "repeat"))
        if kind == "replace":
            data = data[:at] + piece + data[at + len(piece) :]
        elif kind == "insert":
            data = data[:at] + piece + data[at:]
        elif kind == "delete":
            data = data[:at] + data[at + max(len(piece), 1) :]
        elif kind == "cut":
            data = data[:at]
        else:
            data = data[:at] + data[at : at + 64] * (len(piece) + 1) + data[at:]
    return data


def check(target: Target, data: bytes) -> bool:
    """Parses one input; returns whether it was accepted. Raises AssertionError if the parser does not end well.

    An input that takes too much is parsed once more: the first time may have paid for what the process keeps, as
    modules, tables of interned strings and code that is compiled.
    """
    for last in (False, True):
        accepted, problem = _parse(target, data)
        if not problem:
            break
        assert not last, problem
    return accepted


def _parse(target: Target, data: bytes) -> tuple[bool, str]:
    """Returns whether the input was accepted, and what is wrong with how the parser ended."""
    gc.collect(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    began = time.thread_time()  # not the clock: the machine may be shared
    try:
        target.parse(data)
        accepted, message = True, "accepted"
    except InputError as error:
        accepted, message = False, str(error)
    finally:
        took = time.thread_time() - began
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * (1 if sys.platform == "darwin" else 1024)
    allowed = max(10 * len(data), target.declared(data)) + ALLOWANCE
    if not message.strip() or "\n" in message:
        return accepted, f"not one line: {message!r}"
    if took > SECONDS:
        return accepted, f"{took:.2f} s for {len(data)} bytes"
    if peak > allowed:
        return accepted, f"{peak:,} bytes allocated for {len(data):,} bytes of input; {allowed:,} allowed"
    if grown > allowed + 64 * 2**20:
        return accepted, f"the process grew by {grown:,} bytes for {len(data):,} bytes of input"
    return accepted, ""


def fuzz(target: Target, inputs: int, seed: int | None = None) -> tuple[int, int]:
    """Checks `inputs` damaged inputs; returns how many were tried and how many of them were accepted.

    Args:
        target: the parser.
        inputs: how many. Above a thousand, hypothesis draws the start of a series for each thousandth of them, because
            drawing takes longer than parsing.
        seed: None for the same inputs each time; otherwise other ones for each seed.

    Raises:
        AssertionError: or whatever the parser raised, with a note of the input that does it.
    """
    seeds = list(target.seeds())
    for valid in seeds:
        assert check(target, valid), f"{target.name}: a seed is refused"
    counts = {True: 0, False: 0}
    series = max(1, inputs // 1000)

    @hypothesis.settings(
        max_examples=inputs // series,
        database=None,
        deadline=None,
        derandomize=seed is None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=(hypothesis.Phase.generate,),
    )
    @hypothesis.given(st.integers(0, 2**64 - 1))
    def run(start: int) -> None:
        random = Random(start)
        for _ in range(series):
            data = damaged(random, seeds, target.tokens)
            try:
                counts[check(target, data)] += 1
            except Exception as error:
                error.add_note(f"{target.name}: {data!r}")
                raise

    if seed is not None:
        run = hypothesis.seed(seed)(run)
    run()
    return sum(counts.values()), counts[True]
