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


def damaged(seeds: Sequence[bytes], tokens: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    """Returns a strategy of inputs: a seed after up to eight edits, or, rarely, bytes of no form at all."""
    pieces = st.one_of(st.binary(max_size=16), st.sampled_from([*EXTREMES, *tokens]))
    edit = st.tuples(
        st.sampled_from(("replace", "insert", "delete", "cut", "repeat")),
        st.one_of(st.floats(0, 1), st.floats(0, 0.02)),  # headers are at the beginning
        pieces,
    )

    def apply(seed: bytes, edits: list[tuple[str, float, bytes]]) -> bytes:
        for kind, share, piece in edits:
            at = int(share * len(seed))
            if kind == "replace":
                seed = seed[:at] + piece + seed[at + len(piece) :]
            elif kind == "insert":
                seed = seed[:at] + piece + seed[at:]
            elif kind == "delete":
                seed = seed[:at] + seed[at + max(len(piece), 1) :]
            elif kind == "cut":
                seed = seed[:at]
            else:
                seed = seed[:at] + seed[at : at + 64] * (len(piece) + 1) + seed[at:]
        return seed

    return st.one_of(
        st.builds(apply, st.sampled_from(list(seeds)), st.lists(edit, min_size=1, max_size=8)), st.binary(max_size=256)
    )


def check(target: Target, data: bytes) -> bool:
    """Parses one input; returns whether it was accepted. Raises AssertionError if the parser does not end well."""
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
    assert message.strip() and "\n" not in message, f"not one line: {message!r}"
    assert took < SECONDS, f"{took:.2f} s for {len(data)} bytes"
    assert peak <= allowed, f"{peak:,} bytes allocated for {len(data):,} bytes of input; {allowed:,} allowed"
    assert grown <= allowed + 64 * 2**20, f"the process grew by {grown:,} bytes for {len(data):,} bytes of input"
    return accepted


def fuzz(target: Target, inputs: int, seed: int | None = None) -> tuple[int, int]:
    """Checks `inputs` damaged inputs; returns how many were tried and how many of them were accepted.

    Args:
        target: the parser.
        inputs: how many.
        seed: None for the same inputs each time; otherwise other ones for each seed.

    Raises:
        AssertionError: or whatever the parser raised, with the smallest input found that does it.
    """
    seeds = list(target.seeds())
    for valid in seeds:
        assert check(target, valid), f"{target.name}: a seed is refused"
    counts = {True: 0, False: 0}

    @hypothesis.settings(
        max_examples=inputs,
        database=None,
        deadline=None,
        derandomize=seed is None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
    )
    @hypothesis.given(damaged(seeds, target.tokens))
    def run(data: bytes) -> None:
        counts[check(target, data)] += 1

    if seed is not None:
        run = hypothesis.seed(seed)(run)
    run()
    return sum(counts.values()), counts[True]
