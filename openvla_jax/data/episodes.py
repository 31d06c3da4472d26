"""Reading the episodes of RLDS record files, and TensorFlow's errors while doing so.

This replaces dlimp, whose few operations are native here. Only the features that a result depends on are parsed: the
function that standardises an episode is traced once, and what its outputs do not reach is never taken out of the
record. Cameras that nobody asked for cost nothing, and a pass over the actions never touches an image.
"""

import contextlib
import hashlib
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import tensorflow as tf
import tensorflow_datasets as tfds
from etils import epath

from openvla_jax.data import CorruptRecordError, DataError, DatasetNotFoundError
from openvla_jax.data.source import EpisodeRange, Source

READ_BYTES = 1 << 20  # per reader; remote files are read in pieces of this size

# (raw trajectory, episode id) -> whatever the caller wants to know of it
Function = Callable[[dict, tf.Tensor], dict]


@dataclass(frozen=True)
class Traced:
    """A function of raw trajectories, with the features that it needs and a key of what it computes."""

    function: Function
    features: tfds.features.FeaturesDict
    raw_spec: dict
    key: str


def trace(source: Source, function: Function) -> Traced:
    """Finds out which raw features the outputs of `function` depend on.

    The key is a hash of the computation itself (its TensorFlow graph), so it changes with a transform and everything
    that the transform calls, and not with formatting. Raises DataError for a function that fails on the dataset's
    schema, and for one that draws random numbers: such a stream could be neither repeated nor resumed.
    """

    @tf.autograph.experimental.do_not_convert
    def raw(record: tf.Tensor) -> dict:
        return _raw(_parse(source.info.features, record))

    raw_spec = tf.data.Dataset.from_tensors("").map(raw).element_spec
    signature = (raw_spec, tf.TensorSpec([], tf.string))
    try:
        concrete = tf.function(function, autograph=False).get_concrete_function(*signature)
    except Exception as error:  # a transform may be the user's own
        if isinstance(error, DataError) or (isinstance(error, ValueError) and repr(source.name) in str(error)):
            raise
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        raise DataError(f"dataset {source.name!r}: its transform fails on the schema of the data ({reason})") from error
    graph, reached = concrete.graph, set()
    stack = [output.op for output in graph.outputs] + list(graph.control_outputs)
    while stack:
        op = stack.pop()
        if op.name not in reached:
            reached.add(op.name)
            stack += [tensor.op for tensor in op.inputs] + list(op.control_inputs)
    inputs = iter(graph.inputs)
    needed = set()
    for path, spec in _leaves(raw_spec):
        parts = [next(inputs).op.name in reached for _ in tf.nest.flatten(spec, expand_composites=True)]
        if any(parts) or len(parts) > 1:  # ragged tensors have several parts and no stand-in
            needed.add(path)
    text = _program(graph, reached)
    random = re.search(r'op: "((?:Random|Multinomial|TruncatedNormal|Rng)\w*)"', text)
    if random:
        raise DataError(
            f"dataset {source.name!r}: its transform draws random numbers ({random[1]}), so no run could be repeated: "
            f"use tf.random.stateless_* with a seed made from the trajectory"
        )
    key = hashlib.sha256(text.encode()).hexdigest()
    return Traced(concrete, _subset(source.info.features, needed), raw_spec, key)


def _program(graph: tf.Graph, reached: set[str]) -> str:
    """The reached part of a graph as text, with the functions that it calls, free of names that count up."""
    definition = graph.as_graph_def()
    functions = {function.signature.name: function for function in definition.library.function}
    names = re.compile("|".join(map(re.escape, sorted(functions, key=len, reverse=True))) or "$^")
    called: list[str] = []
    texts = ["\n".join(str(node) for node in definition.node if node.name in reached)]
    for text in texts:  # grows on the way
        for name in names.findall(text):
            if name not in called:
                called.append(name)
                texts.append(str(functions[name]))
    text = names.sub(lambda match: f"function_{called.index(match[0])}", "\n".join(texts))
    return re.sub(r"PartitionedCall-\d+", "PartitionedCall", text)


def read_episodes(
    traced: Traced,
    files: Sequence[EpisodeRange],
    *,
    seed: int | None = None,
    keep: Callable[[dict], tf.Tensor] | None = None,
    readers: int = 4,
) -> tf.data.Dataset:
    """One pass over episodes: the results of the traced function, in parallel over `readers` files.

    seed: shuffles the order of files, anew in each repetition; None reads one file after the other. keep: result ->
    bool, drops those that are False. The order depends on the arguments alone.
    """

    @tf.autograph.experimental.do_not_convert
    def result(number: tf.Tensor, record: tf.Tensor, name: tf.Tensor) -> dict:
        raw = _with_stand_ins(_raw(_parse(traced.features, record), number), traced.raw_spec)
        return traced.function(raw, tf.strings.join([name, "#", tf.strings.as_string(number)]))

    @tf.autograph.experimental.do_not_convert
    def read(path: tf.Tensor, name: tf.Tensor, skip: tf.Tensor, take: tf.Tensor) -> tf.data.Dataset:
        records = tf.data.TFRecordDataset(path, buffer_size=READ_BYTES).skip(skip).take(take).enumerate(skip)
        results = records.map(lambda number, record: result(number, record, name))
        return results if keep is None else results.filter(keep)

    columns = [(share.path, epath.Path(share.path).name, share.skip, share.take) for share in files]
    path, name, skip, take = (tf.constant(column) for column in zip(*columns, strict=True))
    dataset = tf.data.Dataset.from_tensor_slices((path, name, tf.cast(skip, tf.int64), tf.cast(take, tf.int64)))
    if seed is None:
        return dataset.flat_map(read)
    dataset = dataset.shuffle(len(files), seed=seed, reshuffle_each_iteration=True)
    readers = min(readers, len(files))
    return dataset.interleave(read, cycle_length=readers, num_parallel_calls=readers, deterministic=True)


def _parse(features: tfds.features.FeaturesDict, record: tf.Tensor) -> dict:
    return features.deserialize_example(record, decoders={"steps": tfds.decode.SkipDecoding()})


def _raw(example: dict, number: tf.Tensor | int = 0) -> dict:
    """The episode as transforms expect it: steps on top, the rest repeated per step under "traj_metadata"."""
    example = _sorted(example)
    steps = example.pop("steps")
    length = tf.shape(_first(steps))[0]
    return {
        **steps,
        "traj_metadata": tf.nest.map_structure(lambda x: tf.repeat(x[None], length, axis=0), example),
        "_len": tf.fill([length], length),
        "_traj_index": tf.fill([length], tf.cast(number, tf.int64)),
        "_frame_index": tf.range(length),
    }


def _sorted(tree: dict) -> dict:
    # TFDS's order of keys changes from run to run; graphs, and the keys made of them, must not.
    return {key: _sorted(tree[key]) if isinstance(tree[key], dict) else tree[key] for key in sorted(tree)}


def _first(steps: dict) -> tf.Tensor:
    return next(leaf for _, leaf in _leaves(steps) if isinstance(leaf, tf.Tensor))


def _with_stand_ins(tree: dict, spec: dict) -> dict:
    """Zeros of the right type where features were not parsed. Nothing depends on them; transforms may rename them."""
    length = tf.shape(tree["_frame_index"])[0]

    def fill(present, wanted):
        if isinstance(wanted, dict):
            return {key: fill((present or {}).get(key), value) for key, value in wanted.items()}
        if present is not None:
            return present
        zero = tf.zeros([length] + [size or 0 for size in wanted.shape[1:]], wanted.dtype)
        return tf.ensure_shape(zero, [None, *[size or 0 for size in wanted.shape[1:]]])

    return fill(tree, spec)


def _leaves(tree: dict, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], object]]:
    for key in sorted(tree):
        if isinstance(tree[key], dict):
            yield from _leaves(tree[key], (*path, key))
        else:
            yield (*path, key), tree[key]


def _subset(features: tfds.features.FeaturesDict, needed: set[tuple[str, ...]]) -> tfds.features.FeaturesDict:
    def pick(node: tfds.features.FeaturesDict, path: tuple[str, ...]) -> dict:
        kept = {}
        for key, feature in node.items():
            here = (*path, key)
            if isinstance(feature, tfds.features.FeaturesDict):
                inner = pick(feature, here)
                kept |= {key: tfds.features.FeaturesDict(inner)} if inner else {}
            elif any(wanted[: len(here)] == here for wanted in needed):
                kept[key] = feature
        return kept

    steps = pick(features["steps"].feature, ())
    if not steps:  # the number of steps is always needed
        steps = {key: feature for key, feature in features["steps"].feature.items() if key == "is_first"}
    rest = pick(tfds.features.FeaturesDict({k: v for k, v in features.items() if k != "steps"}), ("traj_metadata",))
    return tfds.features.FeaturesDict({"steps": tfds.features.Dataset(steps), **rest})


# ---------------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def explain_errors(sources: Sequence[Source]) -> Iterator[None]:
    """Turns TensorFlow's errors while reading these datasets into one line that names the dataset or file."""
    try:
        yield
    except tf.errors.DataLossError as error:
        raise CorruptRecordError(_find_corrupt(sources, _gist(error))) from error
    except tf.errors.NotFoundError as error:
        raise DatasetNotFoundError(f"a record file has gone: {_gist(error)}: is the download complete?") from error
    except tf.errors.InvalidArgumentError as error:
        index = re.search(r"DirectedInterleave\[(\d+)\]", error.message)
        named = sources if index is None else [sources[int(index[1])]]
        names = " or ".join(f"{source.name!r} ({source.directory})" for source in named)
        raise CorruptRecordError(f"dataset {names}: an episode does not fit features.json: {_gist(error)}") from error
    except UnicodeDecodeError as error:  # TensorFlow's message quotes bytes of the record
        names = " or ".join(f"{source.name!r} ({source.directory})" for source in sources)
        raise CorruptRecordError(f"dataset {names}: an episode is damaged or does not fit features.json") from error
    except tf.errors.OpError as error:  # a disk, permissions, a bucket
        names = " or ".join(f"{source.name!r} ({source.directory})" for source in sources)
        raise DataError(f"dataset {names} cannot be read: {_gist(error)}") from error


def _gist(error: tf.errors.OpError) -> str:
    text = " ".join(error.message.splitlines()[:1]).split("}} ")[-1].split(" [Op:")[0]
    return re.sub(r"Error in user-defined function.*Iterator::\S+: ", "", text)


def _find_corrupt(sources: Sequence[Source], message: str) -> str:
    """TensorFlow does not say which file is damaged, so all are read once more, one by one."""
    logging.warning("a record file is damaged (%s): reading all files to find which", message)
    for source in sources:
        for file in source.info.splits["all"].file_instructions:
            try:
                for _ in tf.data.TFRecordDataset(str(file.filename), buffer_size=READ_BYTES).batch(64):
                    pass
            except tf.errors.DataLossError as error:
                gist = _gist(error)
                return f"dataset {source.name!r}: record file {file.filename} is damaged ({gist}): fetch it again"
    names = ", ".join(repr(source.name) for source in sources)
    return f"a record file of {names} was damaged when read ({message}), and is not any more: check the disk"
