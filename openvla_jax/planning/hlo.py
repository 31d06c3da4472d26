"""Reads a program compiled for TPUs: the compiler's cycle estimates, its loops, and its collectives.

The compiler's dump of a scheduled module (`*.after_codegen.txt`) carries `"estimated_cycles"` for each instruction. A
loop's body stands there once; its instructions count as often as the loop runs. Collectives that start and end apart
overlap with what is scheduled between; they share the chip's links, one after another.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from openvla_jax.errors import InputError

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4,
          "s64": 8, "u64": 8, "f64": 8, "s4": 0.5, "u4": 0.5, "f8e4m3fn": 1, "f8e5m2": 1}  # fmt: skip
_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_INSTRUCTION = re.compile(
    r"^\s+(?:ROOT )?%(?P<name>[\w.\-]+) = (?P<type>\(?.*?\)?) (?P<op>[a-z][a-z0-9\-]*)\((?P<args>.*)$"
)
_HEADER = re.compile(r"^(?P<entry>ENTRY )?%(?P<name>[\w.\-]+) \(.*\{$")
_SHAPE = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+(?:fn)?)?)\[([\d,]*)\]")


class Instruction(NamedTuple):
    name: str
    op: str
    type: str
    text: str  # operands and attributes

    @property
    def cycles(self) -> int:
        found = re.search(r'"estimated_cycles":"(\d+)"', self.text)
        return int(found.group(1)) if found else 0

    @property
    def is_kernel(self) -> bool:
        """Whether it is a kernel of our own, in Pallas, of which the compiler's text has no estimate."""
        return self.op == "custom-call" and 'custom_call_target="tpu_custom_call"' in self.text

    @property
    def programs(self) -> int | None:
        """How often a kernel runs, from its metadata."""
        found = re.search(r'"programs":\s*"(\d+)"', self.text)
        return int(found.group(1)) if found else None

    @property
    def kernel_code(self) -> str:
        """What a kernel runs: its call's configuration with the body that Pallas made, without source locations.

        Its name if the text has no body, as with the compiler's `--xla_jf_dump_static_llo_profile_to`.
        """
        _, found, config = self.text.partition("backend_config=")
        call = json.JSONDecoder().raw_decode(config)[0].get("custom_call_config", {}) if found else {}
        if not call.get("body"):
            return self.name
        return json.dumps({key: value for key, value in call.items() if key != "debug_locations"}, sort_keys=True)

    @property
    def kernel_bytes(self) -> float:
        """Of a kernel's operands and results."""
        operands = re.search(r"operand_layout_constraints=\{(.*?\})\}", self.text)
        return sum(_size(*shape) for shape in _SHAPE.findall(self.type + (operands[1] if operands else "")))

    def called(self, attribute: str) -> str | None:
        found = re.search(rf"\b{attribute}=\{{?%([\w.\-]+)", self.text)
        return found.group(1) if found else None

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.text.split("), ", 1)[0])


@dataclass
class Cost:
    """Of one chip and one run of the program."""

    compute_seconds: float = 0.0
    exposed_seconds: float = 0.0  # waiting for links with nothing else to do
    comm_seconds: float = 0.0  # links busy
    kernel_seconds: float = 0.0  # the part of compute_seconds that is spent in kernels
    collectives: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # bytes received, by kind
    counts: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, other: "Cost", times: float = 1.0) -> None:
        self.compute_seconds += times * other.compute_seconds
        self.exposed_seconds += times * other.exposed_seconds
        self.comm_seconds += times * other.comm_seconds
        self.kernel_seconds += times * other.kernel_seconds
        for kind in other.collectives:
            self.collectives[kind] += times * other.collectives[kind]
            self.counts[kind] += times * other.counts[kind]


LinkTime = Callable[[str, float, int], float]
KernelTime = Callable[[Instruction], float]


class Program:
    """A compiled module, from the text of its dump."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        current: list[Instruction] = []
        for line in text.splitlines():
            if header := _HEADER.match(line):
                current = self.computations[header["name"]] = []
                if header["entry"]:
                    self.entry = header["name"]
            elif found := _INSTRUCTION.match(line):
                current.append(Instruction(found["name"], found["op"], found["type"], found["args"]))
            elif current and line.strip() != "}":  # a kernel's metadata goes over several lines
                current[-1] = current[-1]._replace(text=current[-1].text + line)
        if not self.entry:
            raise InputError("no entry computation in the compiler's text: its format is not the one known here")

    def kernels(self) -> dict[str, tuple[str, ...]]:
        """Returns what identifies the machine code of each kernel, by the kernel's name.

        That is what it runs, and the types of its result and operands: their layouts and memory spaces change the code.
        The compiler makes code once for kernels that agree in all of it. ValueError for text of an unknown form.
        """
        kernels: dict[str, tuple[str, ...]] = {}
        for instructions in self.computations.values():
            types = {instruction.name: instruction.type for instruction in instructions}
            for kernel in filter(lambda instruction: instruction.is_kernel, instructions):
                operands = re.findall(r"%([\w.\-]+(?:#\d+)*)", kernel.text.split("), ", 1)[0])
                operand_types = [_operand_type(types, operand) for operand in operands]
                kernels[kernel.name] = (kernel.kernel_code, kernel.type, *operand_types)
        return kernels

    def cost(self, clock: float, seconds: LinkTime, kernel_seconds: KernelTime | None = None) -> Cost:
        """The estimate: `seconds(kind, bytes, group)` is the time that a collective takes on the links, and
        `kernel_seconds(instruction)` returns a kernel's seconds; needed only if the program has kernels.
        """
        return self._cost(self.entry, clock, seconds, kernel_seconds)

    def _cost(self, name: str, clock: float, seconds: LinkTime, kernel_seconds: KernelTime | None) -> Cost:
        cost = Cost()
        now = links_free = 0.0
        ends: dict[str, float] = {}  # of collectives in flight, by their channel or the name of what started them
        # A collective on a SparseCore starts without its operand: that comes with the update.
        updates = {i.operands[0]: i.name for i in self.computations[name] if i.op == "async-update"}
        offloaded: dict[str, tuple[str, float, int]] = {}
        for instruction in self.computations[name]:
            if instruction.op == "while":
                trips = self.trip_count(instruction)
                body = self._cost(instruction.called("body") or "", clock, seconds, kernel_seconds)
                cost.add(body, trips)
                now += trips * (body.compute_seconds + body.exposed_seconds)
                continue
            if instruction.op in ("call", "conditional"):
                inner = instruction.called("to_apply") or instruction.called("branch_computations")
                if inner:
                    part = self._cost(inner, clock, seconds, kernel_seconds)
                    cost.add(part)
                    now += part.compute_seconds + part.exposed_seconds
                continue
            channel, phase = self.carried(instruction)
            if instruction.op.endswith("-done") or phase == "done":
                end = max((ends.pop(key, 0.0) for key in (channel, *instruction.operands)), default=0.0)
                cost.exposed_seconds += max(0.0, end - now)
                now = max(now, end)
            collective = offloaded.pop(instruction.name, None)
            if collective is None and phase in ("", "start"):
                collective = self.collective(instruction)
            if collective is not None and instruction.name in updates:
                offloaded[updates[instruction.name]] = collective
                continue
            if collective is not None:
                kind, size, group = collective
                duration = seconds(kind, size, group)
                cost.collectives[kind] += size
                cost.counts[kind] += 1
                cost.comm_seconds += duration
                links_free = max(now, links_free) + duration
                if instruction.op.endswith(("-start", "-update")) or phase == "start":
                    ends[channel or instruction.name] = links_free
                else:
                    # One instruction: the part that its own computation does not cover is exposed.
                    own = instruction.cycles / clock if instruction.op == "fusion" else 0.0
                    cost.compute_seconds += own
                    cost.exposed_seconds += max(0.0, links_free - now - own)
                    now = max(links_free, now + own)
                continue
            took = instruction.cycles / clock
            if instruction.is_kernel:
                if kernel_seconds is None:
                    raise InputError(f"kernel {instruction.name}: nothing tells how long it takes")
                took = kernel_seconds(instruction)
                cost.kernel_seconds += took
            cost.compute_seconds += took
            now += took
        return cost

    def collective(self, instruction: Instruction) -> tuple[str, float, int] | None:
        """(kind, bytes that a chip receives, chips in a group) of a collective, wrapped or not; None for others."""
        for kind in _KINDS:
            if instruction.op in (kind, f"{kind}-start"):
                return kind, *self._traffic(kind, instruction)
        if instruction.op in ("fusion", "async-start", "custom-call", "call"):
            names = map(instruction.called, ("calls", "called_computations", "to_apply"))
            name = next(filter(None, names), None)
            inner = self.computations.get(name or "", [])
            for other in inner:
                found = self.collective(other)
                if found is None:
                    continue
                if "AllReduceScatterFusion" in instruction.text:
                    # Written as an all-reduce and a slice of it, run as a reduce-scatter.
                    kept = sum(_size(*shape) for shape in _SHAPE.findall(instruction.type))
                    return "reduce-scatter", kept * (found[2] - 1), found[2]
                return found
        return None

    def carried(self, instruction: Instruction) -> tuple[str, str]:
        """(channel, phase) of a collective that the programs of the matrix units move themselves: a fusion begins it
        ("start"), products carry it on beside their work ("carry"), another fusion waits for its end ("done"), and each
        renames it. Empty strings for anything else.
        """
        inner = self.computations.get(instruction.called("calls") or "", []) if instruction.op == "fusion" else []
        for other in inner:
            if "chain_id=" in other.text and (channel := re.search(r"channel_id=\d+", other.text)):
                text = " ".join(each.text for each in inner)
                end = re.search(r'custom_call_target="AsyncCollective(Start|Done)"', text)
                return channel[0], end[1].lower() if end else "carry"
        return "", ""

    def _traffic(self, kind: str, instruction: Instruction) -> tuple[float, int]:
        group = group_size(instruction.text)
        sizes = [_size(*shape) for shape in _SHAPE.findall(instruction.type)]
        if kind == "all-gather":
            total = max(sizes)  # a start's type holds the operand and the result
            return total * (group - 1) / group, group
        if kind == "reduce-scatter":
            return min(sizes) * (group - 1), group
        if kind == "all-reduce":
            total = max(sizes) if instruction.op.endswith("-start") else sum(sizes)
            return 2 * total * (group - 1) / group, group
        return max(sizes), group

    def trip_count(self, loop: Instruction) -> int:
        """How often a `while` runs: what the compiler knows, else the bound in its condition."""
        if found := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.text):
            return int(found.group(1))
        constants = [
            int(match.group(1))
            for instruction in self.computations.get(loop.called("condition") or "", [])
            if instruction.op == "constant" and (match := re.match(r"(\d+)\)", instruction.text))
        ]
        if constants:
            return max(constants)
        raise InputError(f"the trip count of loop {loop.name} is not in the compiler's text")


def group_size(text: str) -> int:
    """Chips that one group of a collective joins: `replica_groups=[1,64]<=[64]`, `{{0,1},{2,3}}` or
    `mesh['a'=4,'b'=16] {'b'}`.
    """
    if found := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(.*?\))? \{(.*?)\}", text):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found.group(1)))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found.group(2)))
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", text):
        return int(found.group(2))
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return found.group(1).count(",") + 1
    if found := re.search(r"source_target_pairs=", text):
        return 2
    raise InputError(f"no replica groups in {text[:120]!r}")


def _size(dtype: str, dimensions: str) -> float:
    return _BYTES.get(dtype, 0) * math.prod(int(d) for d in dimensions.split(",") if d)


def _operand_type(types: Mapping[str, str], operand: str) -> str:
    """Returns the type of `name`, or of element 2 of the tuple for `name#2`; ValueError if `types` has none."""
    name, *indices = operand.split("#")
    found = types.get(name, "")
    for index in map(int, indices):
        elements = _elements(found)
        found = elements[index] if index < len(elements) else ""
    if not found:
        raise InputError(f"operand {operand}: its type is not in the compiler's text, whose format is unknown")
    return found


def _elements(tuple_type: str) -> list[str]:
    """Returns the types of a tuple's elements; none of any other type."""
    if not tuple_type.startswith("("):
        return []
    parts, depth = [""], 0
    for character in re.sub(r"/\*index=\d+\*/", "", tuple_type)[1:-1]:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]
