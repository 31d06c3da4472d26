"""Facts about TPU generations, and the slices that users name: `v5p:4x4x4`, or `v5p:4x4x4*2` for two of them.

Sources: cloud.google.com/tpu/docs (system architecture pages: peak bf16 rate, HBM, inter-chip links per chip) and
cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus (hosts and node labels). The clock is that at which the
matrix units reach the published peak.
"""

import math
import re
from typing import NamedTuple

from openvla_jax.config import nearest
from openvla_jax.errors import InputError


class Generation(NamedTuple):
    """One TPU generation; rates are per chip."""

    flops: float  # bf16, per second
    hbm_bytes: float
    ici_bytes_per_second: float  # all links of a chip together, one way
    clock: float  # Hz
    dimensions: int  # of a slice's topology
    megacore: bool  # two cores compiled as one
    accelerator: str  # GKE's node label
    chips_per_host: int  # in slices of several hosts
    single_host: tuple[int, ...]  # chips that one VM may hold as a whole slice
    sparse_core: bool  # whether collectives can run beside the matrix units
    hbm_bytes_per_second: float


GENERATIONS = {
    "v4": Generation(275e12, 32 * 2**30, 300e9, 1.05e9, 3, True, "tpu-v4-podslice", 4, (4,), False, 1228e9),
    "v5e": Generation(197e12, 16 * 2**30, 200e9, 1.5e9, 2, False, "tpu-v5-lite-podslice", 4, (1, 4, 8), False, 819e9),
    "v5p": Generation(459e12, 95 * 2**30, 600e9, 1.75e9, 3, True, "tpu-v5p-slice", 4, (1, 4), True, 2765e9),
    "v6e": Generation(918e12, 32 * 2**30, 448e9, 1.75e9, 2, False, "tpu-v6e-slice", 4, (1, 4, 8), True, 1640e9),
}


class Slice(NamedTuple):
    """`slices` equal slices of one generation; `chips` and `hosts` count one slice."""

    generation: str
    topology: str  # 4x4x4
    chips: int
    hosts: int
    slices: int = 1

    @property
    def facts(self) -> Generation:
        return GENERATIONS[self.generation]

    @property
    def chips_per_host(self) -> int:
        return self.chips // self.hosts

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(map(int, self.topology.split("x")))

    @property
    def torus(self) -> bool:
        """Whether links wrap around: cubes of 4 in v4 and v5p, whole pods of 16 in v5e and v6e."""
        period = 4 if self.facts.dimensions == 3 else 16
        return all(size % period == 0 for size in self.sizes)

    def __str__(self) -> str:
        return f"{self.generation}:{self.topology}" + (f"*{self.slices}" if self.slices > 1 else "")


def parse_slice(text: str) -> Slice:
    """Returns the slice that `text` names. Raises InputError, with how to fix it, for anything else."""
    name, _, rest = text.partition(":")
    topology, star, count = rest.partition("*")
    if name not in GENERATIONS:
        raise InputError(f"unknown TPU {name!r} in {text!r}; {nearest(name, GENERATIONS)}")
    facts = GENERATIONS[name]
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)" + f"{{{facts.dimensions - 1}}}", topology):
        example = "x".join(["4"] * facts.dimensions)
        raise InputError(f"topology {topology!r} of {name}: give {facts.dimensions} sizes, as {name}:{example}")
    if star and not re.fullmatch(r"[1-9]\d*", count):
        raise InputError(f"{text!r}: after * comes the number of slices, as {name}:{topology}*2")
    chips = math.prod(map(int, topology.split("x")))
    slices = int(count) if star else 1
    if chips in facts.single_host:
        return Slice(name, topology, chips, 1, slices)
    if chips % facts.chips_per_host:
        raise InputError(f"{text} has {chips} chips, which hosts of {facts.chips_per_host} do not make up")
    return Slice(name, topology, chips, chips // facts.chips_per_host, slices)


# Switches of the TPU compiler that its own estimates favour (docs/performance.md), as `compile(compiler_options=...)`
# takes them. More VMEM lets matrix products keep larger tiles, up to where it takes the place of what is fetched ahead;
# larger tiles also take longer to compile. SparseCores run collectives beside the matrix units.
_VMEM_KIB = {"v4": 32768, "v5e": 28672, "v5p": 49152, "v6e": 69632}


# Those named by dimensions are for groups that span as many of the torus: without them gathers wait in line, and a
# reduce-scatter becomes an all-reduce of twice the bytes.
_OFFLOAD = {
    f"xla_tpu_enable_sparse_core_collective_offload_{kind}": "true"
    for kind in (
        "all_gather",
        "2d_all_gather",
        "3d_all_gather",
        "reduce_scatter",
        "nd_reduce_scatter",
        "all_reduce",
    )
}


# Without such cores products carry gathers along. On v5e, and by the compiler's word nowhere else, also all-reduces,
# but single ones only: small ones are joined, large ones left alone. v4 has other cores for gathers, off unless asked.
_OWN = {
    "v4": {"xla_enable_async_all_gather": "true"},
    "v5e": {
        "xla_enable_async_all_reduce": "true",
        "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": "true",
        "xla_jf_crs_combiner_threshold_in_bytes": str(8 * 2**20),
    },
}


def compiler_options(generation: str) -> dict[str, str]:
    """The tuned options of a generation; empty for anything that is no TPU of the table."""
    if generation not in GENERATIONS:
        return {}
    products = {
        "xla_tpu_scoped_vmem_limit_kib": str(_VMEM_KIB[generation]),
        "xla_tpu_dot_dot_fusion": "false",  # a product inside another is computed again for each of its tiles
    }
    return products | (_OFFLOAD if GENERATIONS[generation].sparse_core else {}) | _OWN.get(generation, {})


def generation_of(device_kind: str) -> str:
    """`v5p` for jax's "TPU v5", and so on; empty for what is no TPU of the table."""
    kinds = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e"}
    return kinds.get(device_kind, "")
