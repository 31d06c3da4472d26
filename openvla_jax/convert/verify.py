"""Are two checkpoints the same policy? Compared tensor by tensor, and by what they compute on seeded inputs.

Also `inspect`: what a checkpoint is, without converting it.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from openvla_jax.checkpoint import checksums
from openvla_jax.checkpoint.reading import open_checkpoint
from openvla_jax.config import VLAConfig
from openvla_jax.convert.names import is_stacked, source_shapes
from openvla_jax.convert.source import Source, TorchWeights
from openvla_jax.convert.sources import open_source
from openvla_jax.models.openvla import OpenVLA, abstract_model
from openvla_jax.tokens.actions import ActionTokenizer, unnormalize_actions
from openvla_jax.tokens.prompts import prompt_ids

# Relative rounding of a dtype: two dtypes of one value differ by no more than the coarser one's.
ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
INSTRUCTIONS = ("pick up the red cube", "put the carrot on the plate and close the drawer")
# Else XLA converts the stacked layers to float32 ahead of the scan over them: 30 GB beside the 15 GB of openvla-7b.
FROM_STORED_DTYPE = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}
MAX_KEYS = 8  # statistics keys whose actions are compared


@dataclasses.dataclass(frozen=True)
class Report:
    """The outcome of a comparison: human-readable lines, and what exceeded its threshold (nothing if they agree)."""

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
) -> Report:
    """Compares any two of HF, native and Orbax weights.

    Tensors must be equal bit for bit where their dtypes are, within rounding where not. Logits (float32 computation),
    greedy action tokens and actions are computed on seeded images and instructions; they may differ by `threshold` at
    most, tokens and actions not at all. One model is in memory at a time.
    """
    sources = [open_source(path, model_config=model_config) for path in (a, b)]
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
        difference, *found = _compare_outputs(outputs, threshold)
        lines, failures = lines + found[0], failures + found[1]
    return Report(tuple(lines), tuple(failures), difference)


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
# What they compute
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Inputs:
    images: np.ndarray  # uint8 [B, S, S, 3]
    ids: np.ndarray  # int32 [B, T], right-padded
    lengths: np.ndarray  # int32 [B]


@dataclasses.dataclass(frozen=True)
class Outputs:
    logits: np.ndarray  # float32 [all text tokens of all rows, V]
    tokens: np.ndarray  # int [B, A], greedy
    actions: Mapping[str, np.ndarray]  # float64 [B, A] by statistics key


def make_inputs(source: Source, seed: int) -> Inputs:
    """Seeded images, and instructions in the model's prompt (random ids where there is no tokenizer)."""
    model, random = source.model, np.random.default_rng(seed)
    images = random.integers(0, 256, (len(INSTRUCTIONS), model.image_size, model.image_size, 3), np.uint8)
    tokenizer = source.contract().tokenizer
    if tokenizer is None:
        rows = [[1, *random.integers(3, model.base_vocab_size, size).tolist()] for size in (14, 19)]
    else:
        rows = [prompt_ids(tokenizer, text, model.prompt_family) for text in INSTRUCTIONS]
    ids = np.full((len(rows), max(map(len, rows))), model.pad_token, np.int32)
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens)] = tokens
    return Inputs(images, ids, np.array([len(row) for row in rows], np.int32))


def build_model(source: Source) -> tuple[Any, Any]:
    """(graphdef, state) of the model with the source's weights in their stored dtypes, computing in float32."""
    graph, state = nnx.split(abstract_model(source.model))
    tree: dict[str, Any] = {}
    for leaf, (dtype, shape) in source.weights.leaves.items():
        item, *path = leaf.split("/")
        if item != "params":
            continue
        value = np.empty(shape, dtype)
        if is_stacked(leaf):
            for first in range(0, shape[0], source.weights.step(leaf)):
                value[first : first + source.weights.step(leaf)] = source.weights.read(
                    leaf, first, source.weights.step(leaf)
                )
        else:
            value[...] = source.weights.read(leaf)
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = jnp.asarray(value)
    nnx.replace_by_pure_dict(state, tree)
    return graph, state


def text_logits(graph: Any, state: Any, inputs: Inputs) -> np.ndarray:
    """float32 [all text tokens of all rows, V]: what a model of `build_model` says at them."""

    @functools.partial(jax.jit, compiler_options=FROM_STORED_DTYPE)
    def run(state, images, ids):
        model: OpenVLA = nnx.merge(graph, state)
        return model.layout.of_text(model(model.normalize(images), ids))

    logits = np.asarray(run(state, inputs.images, inputs.ids))
    return logits[np.arange(inputs.ids.shape[1]) < inputs.lengths[:, None]]


def compute(source: Source, inputs: Inputs) -> Outputs:
    graph, state = build_model(source)
    sizes = [len(entry["action"]["q01"]) for entry in source.statistics.values()]
    steps = max(sizes, default=7)

    @functools.partial(jax.jit, compiler_options=FROM_STORED_DTYPE)
    def run(state, images, ids, lengths):
        model: OpenVLA = nnx.merge(graph, state)
        pixels = model.normalize(images)
        logits = model.layout.of_text(model(pixels, ids))
        first, cache = model.prefill(pixels, ids, lengths, steps)

        def step(carry, _):
            token, position, cache = carry
            following, cache = model.decode_step(token, position, cache)
            return (jnp.argmax(following, -1).astype(jnp.int32), position + 1, cache), token

        start = (jnp.argmax(first, -1).astype(jnp.int32), lengths, cache)
        _, tokens = jax.lax.scan(step, start, None, length=steps)
        return logits, tokens.T

    logits, tokens = map(np.asarray, run(state, inputs.images, inputs.ids, inputs.lengths))
    real = np.arange(inputs.ids.shape[1]) < inputs.lengths[:, None]
    values = ActionTokenizer(source.model.base_vocab_size, source.action.bins).decode(tokens)
    kind = source.action.normalization
    actions = {
        key: unnormalize_actions(values[:, : len(entry["action"]["q01"])], entry["action"], kind)
        for key, entry in list(source.statistics.items())[:MAX_KEYS]
    }
    return Outputs(logits[real], tokens, actions)


def _compare_outputs(outputs: list[Outputs], threshold: float) -> tuple[float, list[str], list[str]]:
    a, b = outputs
    difference = float(np.abs(a.logits - b.logits).max())
    p, q = (_log_softmax(x.astype(np.float64)) for x in (a.logits, b.logits))
    divergence = float((np.exp(p) * (p - q)).sum(-1).mean())
    agreement = float((a.logits.argmax(-1) == b.logits.argmax(-1)).mean())
    lines = [
        f"logits at {len(a.logits)} text positions: max |d| {difference:.3g} (threshold {threshold:g}), "
        f"mean KL {divergence:.3g}, argmax agreement {agreement:.2%}",
        f"greedy action tokens: {float((a.tokens == b.tokens).mean()):.2%} equal",
    ]
    failures = []
    if not difference <= threshold:
        failures.append(f"logits differ by {difference:.3g}, beyond {threshold:g}")
    if not np.array_equal(a.tokens, b.tokens):
        failures.append(f"greedy action tokens differ: {a.tokens.tolist()} and {b.tokens.tolist()}")
    for key in a.actions.keys() & b.actions.keys():
        distance = float(np.abs(a.actions[key] - b.actions[key]).max())
        lines.append(f"actions with {key}: max |d| {distance:.3g}")
        if distance > 0:
            failures.append(f"actions with {key} differ by {distance:.3g}")
    return difference, lines, failures


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


# ---------------------------------------------------------------------------------------------------------------------
# Inspect
# ---------------------------------------------------------------------------------------------------------------------


def inspect_weights(src: str | Path, *, model_config: str | Mapping[str, Any] | None = None) -> str:
    """What `src` is: model, parameters and dtypes by component, statistics keys, and what is missing."""
    source = open_source(src, model_config=model_config)
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
