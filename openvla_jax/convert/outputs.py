"""What checkpoints compute on seeded inputs, logits and action tokens or chunks of actions, and how far two differ."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from openvla_jax.convert.names import is_stacked
from openvla_jax.convert.source import Source
from openvla_jax.models import heads
from openvla_jax.models.heads.chunks import DiffusionHead, ParallelTokenHead, chunk_text, see
from openvla_jax.models.openvla import OpenVLA, abstract_model
from openvla_jax.parallel.execution import PLAIN
from openvla_jax.tokens.actions import normalize_actions, unnormalize_actions
from openvla_jax.tokens.prompts import prompt_ids

INSTRUCTIONS = ("pick up the red cube", "put the carrot on the plate and close the drawer")
# Else XLA converts the stacked layers to float32 ahead of the scan over them: 30 GB beside the 15 GB of openvla-7b.
FROM_STORED_DTYPE = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}
MAX_KEYS = 8  # statistics keys whose actions are compared


@dataclasses.dataclass(frozen=True)
class Inputs:
    images: np.ndarray  # uint8 [B, C, S, S, 3]
    ids: np.ndarray  # int32 [B, T], right-padded
    lengths: np.ndarray  # int32 [B]
    state: np.ndarray | None = None  # float64 [B, columns], in raw units; None if the policy sees none


@dataclasses.dataclass(frozen=True)
class Outputs:
    numbers: np.ndarray  # float32, what one pass gives: see `head_outputs`
    tokens: np.ndarray | None  # int [B, N], greedy; None of a policy that predicts numbers
    chunks: np.ndarray  # float64 [B, K, A], normalised
    actions: Mapping[str, np.ndarray]  # float64 [B, K, A] in physical units, by statistics key


def make_inputs(source: Source, seed: int) -> Inputs:
    """Seeded images and states, and instructions in the model's prompt (random ids where there is no tokenizer)."""
    model, random = source.model, np.random.default_rng(seed)
    shape = (len(INSTRUCTIONS), model.cameras, model.image_size, model.image_size, 3)
    images = random.integers(0, 256, shape, np.uint8)
    tokenizer = source.contract().tokenizer
    if tokenizer is None:
        rows = [[1, *random.integers(3, model.base_vocab_size, size).tolist()] for size in (14, 19)]
    else:
        rows = [prompt_ids(tokenizer, text, model.prompt_family) for text in INSTRUCTIONS]
    ids = np.full((len(rows), max(map(len, rows))), model.pad_token, np.int32)
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens)] = tokens
    state = None
    if source.observation.state:
        low, high = map(np.asarray, list(_state_rows(source).values())[:2])
        state = random.uniform(low, high, (len(rows), len(low)))
    return Inputs(images, ids, np.array([len(row) for row in rows], np.int32), state)


def _state_rows(source: Source) -> Mapping[str, Any]:
    return source.contract().state_statistics(next(iter(source.statistics)))


def model_inputs(source: Source, inputs: Inputs) -> heads.Inputs:
    """The inputs as a model takes them, with the state normalised by the source's own statistics."""
    state = inputs.state
    if state is not None:
        normalized = normalize_actions(state, _state_rows(source), source.action.normalization)
        state = normalized.astype(np.float32)
    return heads.Inputs(inputs.images, inputs.ids, inputs.lengths, state)


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


# ---------------------------------------------------------------------------------------------------------------------
# Computing
# ---------------------------------------------------------------------------------------------------------------------


def head_outputs(graph: Any, state: Any, source: Source, inputs: Inputs) -> np.ndarray:
    """What one pass of a model of `build_model` gives: float32 logits [all text tokens of all rows, V].

    Of a policy that predicts chunks at once: logits [B, N, V] of all slots; the chunk [B, K, A]; or, with a diffusion
    head, the noise [B, K, A] that it sees in a chunk of zeros.
    """
    head = heads.make_head(source.model, source.action)
    found = _run(graph, functools.partial(_one_pass, head, _dim(source)), state, model_inputs(source, inputs))
    return _real(head, found, inputs)


def compute(source: Source, inputs: Inputs) -> Outputs:
    """What the policy of a source computes on `inputs`, in float32 from the stored weights."""
    graph, state = build_model(source)
    head, dim = heads.make_head(source.model, source.action), _dim(source)

    def both(model: OpenVLA, given: heads.Inputs) -> tuple[jax.Array, heads.Prediction]:
        return _one_pass(head, dim, model, given), head.predict(model, given, dim, constrained=False)

    found, predicted = _run(graph, both, state, model_inputs(source, inputs))
    chunks = head.decode(predicted.actions if predicted.tokens is None else predicted.tokens, dim)
    kind = source.action.normalization
    actions = {
        key: unnormalize_actions(chunks[..., : len(entry["action"]["q01"])], entry["action"], kind)
        for key, entry in list(source.statistics.items())[:MAX_KEYS]
    }
    return Outputs(_real(head, found, inputs), predicted.tokens, chunks, actions)


def _run(graph: Any, function: Callable[..., Any], state: Any, inputs: heads.Inputs) -> Any:
    @functools.partial(jax.jit, compiler_options=FROM_STORED_DTYPE)
    def compiled(state, inputs):
        return function(nnx.merge(graph, state), inputs)

    return jax.tree.map(np.asarray, compiled(state, inputs))


def _one_pass(head: Any, dim: int, model: OpenVLA, inputs: heads.Inputs) -> jax.Array:
    if head.sequential:
        return model.layout.of_text(model(model.normalize(inputs.images), inputs.input_ids, state=inputs.state))
    text, slots = chunk_text(model, inputs, head.horizon * dim)
    patches = see(model, inputs.images, text, slots, PLAIN)
    if isinstance(head, DiffusionHead):
        slots = slots._replace(
            noisy=jnp.zeros(slots.positions.shape), timestep=jnp.zeros(len(slots.positions), jnp.int32)
        )
    hidden = model.chunk_hidden(patches, text, slots, PLAIN, inputs.state)
    if isinstance(head, ParallelTokenHead):
        return model.target_logits(hidden, slots.positions)
    return head.read(model, hidden, slots.positions, PLAIN)


def _real(head: heads.ActionHead, found: np.ndarray, inputs: Inputs) -> np.ndarray:
    """The rows of real text tokens of what a sequential head gave."""
    return found[np.arange(inputs.ids.shape[1]) < inputs.lengths[:, None]] if head.sequential else found


def _dim(source: Source) -> int:
    """The largest action dimension of the datasets."""
    return max((len(entry["action"]["q01"]) for entry in source.statistics.values()), default=7)


# ---------------------------------------------------------------------------------------------------------------------
# Comparing
# ---------------------------------------------------------------------------------------------------------------------


def compare_outputs(a: Outputs, b: Outputs, threshold: float) -> tuple[float, list[str], list[str]]:
    """Returns the largest difference of what one pass gives, lines about all differences, and what failed."""
    difference = float(np.abs(a.numbers - b.numbers).max())
    lines, failures = (_compare_numbers if a.tokens is None else _compare_tokens)(a, b, difference, threshold)
    for key in a.actions.keys() & b.actions.keys():
        distance = float(np.abs(a.actions[key] - b.actions[key]).max())
        lines.append(f"actions with {key}: max |d| {distance:.3g}")
        allowed = 0.0 if a.tokens is not None else threshold * max(1.0, float(np.abs(a.actions[key]).max()))
        if not distance <= allowed:
            failures.append(f"actions with {key} differ by {distance:.3g}")
    return difference, lines, failures


def _compare_tokens(a: Outputs, b: Outputs, difference: float, threshold: float) -> tuple[list[str], list[str]]:
    assert a.tokens is not None and b.tokens is not None
    p, q = (_log_softmax(x.astype(np.float64)) for x in (a.numbers, b.numbers))
    divergence = float((np.exp(p) * (p - q)).sum(-1).mean())
    agreement = float((a.numbers.argmax(-1) == b.numbers.argmax(-1)).mean())
    places = a.numbers[..., 0].size
    lines = [
        f"logits at {places} {'text positions' if a.numbers.ndim == 2 else 'action slots'}: max |d| {difference:.3g} "
        f"(threshold {threshold:g}), mean KL {divergence:.3g}, argmax agreement {agreement:.2%}",
        f"greedy action tokens: {float((a.tokens == b.tokens).mean()):.2%} equal",
    ]
    failures = []
    if not difference <= threshold:
        failures.append(f"logits differ by {difference:.3g}, beyond {threshold:g}")
    if not np.array_equal(a.tokens, b.tokens):
        failures.append(f"greedy action tokens differ: {a.tokens.tolist()} and {b.tokens.tolist()}")
    return lines, failures


def _compare_numbers(a: Outputs, b: Outputs, difference: float, threshold: float) -> tuple[list[str], list[str]]:
    rows, horizon, dim = a.chunks.shape
    distance = float(np.abs(a.chunks - b.chunks).max())
    lines = [
        f"chunks of {horizon} actions of {dim} numbers, {rows} observations: max |d| {distance:.3g} normalised "
        f"(threshold {threshold:g}); of one pass {difference:.3g}"
    ]
    worst = max(distance, difference)
    return lines, [] if worst <= threshold else [f"action chunks differ by {worst:.3g}, beyond {threshold:g}"]


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))
