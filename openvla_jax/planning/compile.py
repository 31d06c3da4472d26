"""Compiles a program for a TPU slice without one, and estimates its memory and time."""

import math
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from openvla_jax.errors import InputError
from openvla_jax.parallel.tpu import Slice
from openvla_jax.planning.environment import schedules
from openvla_jax.planning.hlo import Cost, Instruction, Program

_OUT_OF_MEMORY = re.compile(r"(?:Used |\()([\d.]+)([KMG])\)? (?:of|exceeds available HBM)")


_SCHEDULE = re.compile(r"\d+-(?P<name>.+)-\d+-pre-delay_hlo-static-per-bundle-utilization\.txt")
_BUNDLE = re.compile(r"\d+( \d+)*")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


class PlanError(InputError):
    """A plan that cannot be made, in one line."""


class Compiled(NamedTuple):
    """What the TPU compiler made of a program, for one chip."""

    seconds: float  # of compiling
    peak_bytes: int
    memory: Any  # its memory analysis; None if the program does not fit; so is the cost
    cost: Cost | None


def compile_for(lowered: Any, name: str, tpu: Slice, dump: Path, options: Mapping[str, str] | None = None) -> Compiled:
    """Compiles a lowered function called `name`, and estimates its cost from what the compiler wrote into `dump`."""
    for path in schedules(dump).glob("*"):  # of the program before, whose instructions had the same names
        path.unlink()
    began = time.perf_counter()
    try:
        compiled = lowered.compile(compiler_options=dict(options or {}))
    except jax.errors.JaxRuntimeError as error:
        return Compiled(time.perf_counter() - began, _bytes_wanted(error), None, None)
    seconds = time.perf_counter() - began
    texts = [path for path in dump.glob("*.after_codegen.txt") if name in path.name]
    if not texts:
        raise PlanError(f"the compiler left no text in {dump}: set planning_environment() before jax is imported")
    program = Program(max(texts, key=lambda path: path.stat().st_mtime_ns).read_text())
    cost = program.cost(tpu.facts.clock, link_time(tpu), kernel_time(tpu, program, dump))
    for path in texts:
        path.unlink()
    memory = compiled.memory_analysis()
    # Not the sum of its parts: of a program with donated arguments, `temp_size_in_bytes` counts some of them again.
    peak = memory.peak_memory_in_bytes + memory.generated_code_size_in_bytes
    return Compiled(seconds, int(peak), memory, cost)


def topology_devices(tpu: Slice) -> list[Any]:
    """Descriptions of the slice's devices, from libtpu; PlanError where that is missing or knows no such slice."""
    from jax.experimental import topologies

    three = tpu.facts.dimensions == 3
    options: dict[str, Any] = {"chip_config_name": "megacore" if tpu.facts.megacore else "default"}
    if tpu.hosts > 1:
        options["chips_per_host_bounds"] = (2, 2, 1)
    elif tpu.chips == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if tpu.torus:
        options["wrap"] = (True,) * 3 if three else (True, True, False)
    if tpu.slices > 1:
        options["num_slices"] = tpu.slices
    try:
        return list(
            topologies.get_topology_desc(
                platform="tpu", topology_name=f"{tpu.generation}:{tpu.topology}", **options
            ).devices
        )
    except Exception as error:
        text = " ".join(str(error).split())
        if "libtpu" in text and ("not found" in text or "No module" in text or "Unable" in text):
            raise PlanError("planning needs the TPU compiler: pip install 'openvla_jax[tpu]' (x86-64 Linux)") from error
        raise PlanError(f"libtpu knows no topology {tpu}: {text[:200]}") from error


def link_time(tpu: Slice):
    """Seconds of a collective: bytes received over all links of a chip; half of the links if the slice is no torus."""
    rate = tpu.facts.ici_bytes_per_second * (1.0 if tpu.torus else 0.5)
    return lambda kind, size, group: size / rate


def kernel_time(tpu: Slice, program: Program, dump: Path):
    """Seconds of a kernel: cycles that the compiler scheduled for its code, times programs over a chip's cores; or
    those that HBM takes for its operands and results, if that is more.
    """
    kernels = program.kernels()
    cycles = scheduled_cycles(kernels, schedules(dump))

    def seconds(kernel: Instruction) -> float:
        code = kernels[kernel.name]
        if code not in cycles or kernel.programs is None:
            raise PlanError(f"the compiler left no schedule of kernel {kernel.name}; --config.train.kernels=False")
        cores = 2 if tpu.facts.megacore else 1
        computing = cycles[code] * math.ceil(kernel.programs / cores) / tpu.facts.clock
        return max(computing, kernel.kernel_bytes / tpu.facts.hbm_bytes_per_second)

    return seconds


def scheduled_cycles(kernels: Mapping[str, tuple[str, ...]], folder: Path) -> dict[tuple[str, ...], int]:
    """Returns the cycles of each code of `kernels`, a value of `Program.kernels`.

    Not by name: kernels of the same code share one schedule, and its file is named after one of them. With `full`
    rematerialisation a forward kernel and its second run can be such a pair.
    """
    by_name: dict[str, int] = {}
    for path in sorted(folder.glob("*-pre-delay_*")):  # by time: the last schedule of an instruction counts
        found = _SCHEDULE.fullmatch(path.name)
        if found is None:
            raise PlanError(f"schedule {path.name!r}: the compiler's format is not the one known here")
        if found["name"] in kernels:
            by_name[found["name"]] = count_bundles(path)
    cycles: dict[tuple[str, ...], int] = {}
    for name, count in by_name.items():
        if cycles.setdefault(kernels[name], count) != count:
            raise PlanError(f"kernel {name}: scheduled in {count} cycles, but its code in {cycles[kernels[name]]}")
    return cycles


def count_bundles(path: Path) -> int:
    """Returns the number of rows of a schedule's table: one for each bundle of instructions, which takes a cycle."""
    _, found, table = path.read_text().partition("== UTILIZATION:\n")
    rows = table.splitlines()
    if not found or not rows or not all(_BUNDLE.fullmatch(row) for row in rows):
        raise PlanError(f"schedule {path.name!r}: the compiler's format is not the one known here")
    return len(rows)


def _bytes_wanted(error: Exception) -> int:
    """What a program that the compiler could not fit would take; raises what is no lack of memory."""
    found = _OUT_OF_MEMORY.search(str(error))
    if found is None:
        raise PlanError(f"the TPU compiler failed: {' '.join(str(error).split())[:300]}") from error
    return int(float(found.group(1)) * _UNITS[found.group(2).upper()])
