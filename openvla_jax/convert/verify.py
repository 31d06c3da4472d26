"""Are two checkpoints the same policy? Compared tensor by tensor, and by what they compute on seeded inputs.

Also `inspect`: what a checkpoint is, without converting it.
"""

import dataclasses
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from openvla_jax.checkpoint import checksums
from openvla_jax.checkpoint.contract import CheckpointError
from openvla_jax.checkpoint.reading import load_contract, open_checkpoint
from openvla_jax.config import VLAConfig
from openvla_jax.convert.names import is_stacked, source_shapes
from openvla_jax.convert.oft import OftOptions, PolicySpecs
from openvla_jax.convert.outputs import compare_outputs, compute, make_inputs
from openvla_jax.convert.source import Source, TorchWeights
from openvla_jax.convert.sources import open_source

# Relative rounding of a dtype: two dtypes of one value differ by no more than the coarser one's.
ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


@dataclasses.dataclass(frozen=True)
class Report:
    """The outcome of a comparison: human-readable lines, and what exceeded its threshold (nothing if they agree).

    `max_logit_difference` is that of predicted numbers for a policy that predicts numbers.
    """

    lines: tuple[str, ...]
    failures: tuple[str, ...]
    max_logit_difference: float | None = None

    @property
    def passed(self) -> bool:
        return not self.failures

    def __str__(self) -> str:
        verdict = [f"FAILED: {failure}" for failure in self.failures] or ["PASSED"]
        return "\n".join([*self.lines, *verdict])


def verify_weights(
    a: str | Path,
    b: str | Path,
    *,
    threshold: float = 2e-4,
    seed: int = 0,
    tensors_only: bool = False,
    model_config: str | Mapping[str, Any] | None = None,
    oft: OftOptions | None = None,
) -> Report:
    """Compares any two of HF, OpenVLA-OFT, native and Orbax weights.

    Tensors must be equal bit for bit where their dtypes are, within rounding where not. Logits (float32 computation),
    greedy action tokens and actions are computed on seeded images and instructions; they may differ by `threshold` at
    most, tokens and actions not at all. Of a policy that predicts chunks of numbers, the chunks may differ by
    `threshold`. What no file of an OpenVLA-OFT checkpoint says comes from `oft`, else from the other checkpoint. One
    model is in memory at a time.
    """
    known = oft or next((specs for specs in map(_chunk_specs, (a, b)) if specs is not None), None)
    sources = [open_source(path, model_config=model_config, oft=known) for path in (a, b)]
    for source in sources:
        source.refuse_quantized()
    lines, failures = _compare_descriptions(*sources)
    comparable, difference = not failures, None
    if comparable:
        more = _compare_tensors(*sources)
        lines, failures = lines + more[0], failures + more[1]
    if comparable and not tensors_only:
        inputs = make_inputs(sources[0], seed)
        outputs = [compute(source, inputs) for source in sources]
        difference, *found = compare_outputs(outputs[0], outputs[1], threshold)
        lines, failures = lines + found[0], failures + found[1]
    return Report(tuple(lines), tuple(failures), difference)


def _chunk_specs(path: str | Path) -> PolicySpecs | None:
    """Returns what a checkpoint of this project says of a policy that predicts chunks at once; None for others."""
    try:
        contract = load_contract(path)
    except CheckpointError:
        return None
    if not contract.model.is_parallel:
        return None
    return PolicySpecs(contract.observation, contract.action, contract.preprocessing)


def verify_checksums(path: str | Path) -> str:
    """Reads all files of a checkpoint and compares them with the checksums stored with it; returns a line that says so.

    Raises CheckpointError that names a file that differs, or says that there are no checksums.
    """
    directory = open_checkpoint(path)
    began = time.perf_counter()
    files, nbytes = checksums.verify(directory)
    seconds = time.perf_counter() - began
    return f"{directory}: {files} files, {nbytes:,} bytes, are as they were written ({nbytes / 1e9 / seconds:.2f} GB/s)"


# ---------------------------------------------------------------------------------------------------------------------
# Configs and tensors
# ---------------------------------------------------------------------------------------------------------------------


def _compare_descriptions(a: Source, b: Source) -> tuple[list[str], list[str]]:
    lines = [f"A: {_title(a)}", f"B: {_title(b)}", *(f"note: {note}" for note in dict.fromkeys([*a.notes, *b.notes]))]
    differences = _differences(a.model, b.model)
    lines += [f"model config differs: {text}" for text in differences]
    if a.statistics != b.statistics:
        only = {"A": sorted(set(a.statistics) - set(b.statistics)), "B": sorted(set(b.statistics) - set(a.statistics))}
        values = sorted(key for key in set(a.statistics) & set(b.statistics) if a.statistics[key] != b.statistics[key])
        lines.append(f"statistics differ: only in A {only['A']}, only in B {only['B']}, other values {values}")
    missing = {name: set(y.weights.leaves) - set(x.weights.leaves) for name, x, y in (("A", a, b), ("B", b, a))}
    failures = []
    for name, leaves in missing.items():
        run = sorted(leaf for leaf in leaves if leaf.startswith("params/"))
        if run:
            failures.append(
                f"{name} lacks {', '.join(run[:10])}" + (f" and {len(run) - 10} more" if len(run) > 10 else "")
            )
        elif leaves:
            lines.append(f"{name} lacks {len(leaves)} tensors that no policy runs")
    for leaf in set(a.weights.leaves) & set(b.weights.leaves):
        shapes = a.weights.leaves[leaf][1], b.weights.leaves[leaf][1]
        if shapes[0] != shapes[1]:
            failures.append(f"{leaf} has shape {shapes[0]} in A, {shapes[1]} in B")
    return lines, failures


def _differences(a: VLAConfig, b: VLAConfig, ignore: tuple[str, ...] = ("name",)) -> list[str]:
    def flat(value: Any, path: str) -> dict[str, Any]:
        if isinstance(value, Mapping):
            return {
                k: v for key, child in value.items() for k, v in flat(child, f"{path}.{key}" if path else key).items()
            }
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], Mapping):
            return {k: v for child in value for k, v in flat(child, f"{path}.{child['name']}").items()}
        return {path: value}

    x, y = flat(a.to_dict(), ""), flat(b.to_dict(), "")
    return [
        f"{key} is {x.get(key)} in A, {y.get(key)} in B"
        for key in {**x, **y}
        if x.get(key) != y.get(key) and key not in ignore
    ]


def _compare_tensors(a: Source, b: Source) -> tuple[list[str], list[str]]:
    """Every leaf of both, some layers at a time; a line for each component, a failure for each leaf beyond rounding."""
    components: dict[str, dict[str, Any]] = {}
    failures = []
    leaves = [leaf for leaf in a.weights.leaves if leaf in b.weights.leaves]
    total = sum(math.prod(a.weights.leaves[leaf][1]) * a.weights.leaves[leaf][0].itemsize for leaf in leaves)
    with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1000, desc="compare tensors") as bar:
        for leaf in leaves:
            (dtype_a, shape), (dtype_b, _) = a.weights.leaves[leaf], b.weights.leaves[leaf]
            tolerance = 0.0 if dtype_a == dtype_b else max(ROUNDING[dtype_a.name], ROUNDING[dtype_b.name])
            row = components.setdefault(_component(leaf), {"leaves": 0, "equal": 0, "worst": 0.0, "dtypes": set()})
            step = max(a.weights.step(leaf), b.weights.step(leaf))
            equal, worst, beyond = True, 0.0, False
            for first in range(0, shape[0] if is_stacked(leaf) else 1, step):
                x, y = a.weights.read(leaf, first, step), b.weights.read(leaf, first, step)
                bar.update(x.nbytes)
                if dtype_a == dtype_b and x.tobytes() == y.tobytes():
                    continue
                x, y = x.astype(np.float32), y.astype(np.float32)
                distance = np.abs(x - y)
                equal = equal and not distance.any()
                worst = max(worst, float(distance.max()))
                beyond = beyond or not bool((distance <= tolerance * np.maximum(np.abs(x), np.abs(y))).all())
            row["leaves"] += 1
            row["equal"] += equal
            row["worst"] = max(row["worst"], worst)
            row["dtypes"].add(f"{dtype_a}" if dtype_a == dtype_b else f"{dtype_a} and {dtype_b}")
            if beyond:
                failures.append(f"{leaf} differs by up to {worst:.3g}")
    lines = [
        f"tensors of {name}: {row['equal']} of {row['leaves']} leaves equal, max |d| {row['worst']:.3g} "
        f"({', '.join(sorted(row['dtypes']))})"
        for name, row in components.items()
    ]
    return lines, failures[:20] + ([f"and {len(failures) - 20} more leaves"] if len(failures) > 20 else [])


def _component(leaf: str) -> str:
    """`params/vision/dino/blocks/...` -> vision/dino"""
    item, *path = leaf.split("/")
    if item == "unused":
        return f"unused/{path[0]}"
    return "/".join(path[:2]) if path[0] == "vision" else path[0]


# ---------------------------------------------------------------------------------------------------------------------
# Inspect
# ---------------------------------------------------------------------------------------------------------------------


def inspect_weights(
    src: str | Path, *, model_config: str | Mapping[str, Any] | None = None, oft: OftOptions | None = None
) -> str:
    """What `src` is: model, parameters and dtypes by component, statistics keys, and what is missing."""
    source = open_source(src, model_config=model_config, oft=oft)
    model, llama = source.model, source.model.llama
    components: dict[str, list[Any]] = {}
    for leaf, (dtype, shape) in source.weights.leaves.items():
        row = components.setdefault(_component(leaf), [0, set()])
        row[0] += math.prod(shape)
        row[1].add(dtype.name)
    total = sum(row[0] for row in components.values())
    tensors = (
        f" in {len(source_shapes(source.weights.slots))} tensors" if isinstance(source.weights, TorchWeights) else ""
    )
    lines = [
        _title(source) + (f", {source.quantized} kernels" if source.quantized else ""),
        *(
            f"tower {t.name}: {t.image_size} px, patch {t.patch_size}, width {t.width}, depth {t.depth}, "
            f"heads {t.heads}, mlp {t.mlp_dim}, {t.activation}, mean {list(t.mean)}, std {list(t.std)}"
            for t in model.towers
        ),
        f"projector: {model.projector.kind}",
        f"language model: width {llama.width}, depth {llama.depth}, heads {llama.heads} ({llama.kv_heads} kv), "
        f"mlp {llama.mlp_dim}, vocabulary {llama.vocab_size} ({model.base_vocab_size} + padding), "
        f"rms eps {llama.norm_eps:g}, rope theta {llama.rope_theta:g}",
        f"prompt: {model.prompt_family}; images: {model.resize}; {dataclasses.asdict(source.preprocessing)}",
        f"cameras: {', '.join(source.observation.cameras)}; state: {', '.join(source.observation.state) or 'none'}",
        f"actions: {dataclasses.asdict(source.action)}",
        *(f"{name}: {count:,} parameters, {', '.join(sorted(dtypes))}" for name, (count, dtypes) in components.items()),
        f"total: {total:,} parameters{tensors}, {source.nbytes:,} bytes",
        f"statistics: {', '.join(source.statistics) or 'none: actions cannot be unnormalised'}",
        f"tokenizer: {source.tokenizer or 'missing'}",
        *(f"note: {note}" for note in source.notes),
    ]
    if not any(name.startswith("unused/") for name in components):
        lines.append("note: no tensors of the reference that a policy never runs; an export writes zeros for them")
    return "\n".join(lines)


def _title(source: Source) -> str:
    kinds = {
        "hf": "HuggingFace OpenVLA folder",
        "native": "Prismatic checkpoint",
        "orbax": "Orbax checkpoint",
        "parts": "base weights",
    }
    return f"{source.path}: {kinds[source.kind]}, model {source.model.name}"
