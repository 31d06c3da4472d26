"""Frames of a mixture as numpy batches: shuffled while encoded, decoded, resized, tokenised.

All but the tokens happens in one tf.data pipeline per host, with its own prefetching and no Python in it, so the state
of the stream (shuffle buffer included) can be written beside a checkpoint and taken up again exactly.
"""

import functools
import json
import logging
import os
import resource
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from etils import epath

from openvla_jax.data import BadImageError, DataError, images
from openvla_jax.data.episodes import clear_errors
from openvla_jax.data.mixture import Memory, Mixture, nominal_length, open_phases, table
from openvla_jax.data.statistics import check_finite
from openvla_jax.tokens.actions import ActionTokenizer
from openvla_jax.tokens.prompts import encode_example
from openvla_jax.types import ActionSpec, Batch

_PREFETCHED_BATCHES = 2
_BROKEN_IN_A_ROW = 1000  # broken frames that are skipped before a good one must come
_DECODED_TOGETHER = 16  # frames
_LOGGED = 20  # skipped frames that are logged one by one


# ---------------------------------------------------------------------------------------------------------------------
# Frames -> rows
# ---------------------------------------------------------------------------------------------------------------------


def _rows(
    stream: tf.data.Dataset,
    buffer: int,
    *,
    seed: int,
    image_size: int,
    image_sizes: Sequence[tuple[int, int]],
    batch_size: int,
    skip_broken: bool = False,
) -> tf.data.Dataset:
    """Frames -> batches of rows: shuffled while encoded, then decoded and resized in parallel, in a fixed order.

    "broken" holds the encoded image where it cannot be decoded, and is empty elsewhere. skip_broken: such frames are
    left out, and "skipped" of the next row has a line "<dataset> <step> <episode>" for each. image_sizes: those to be
    fast with.
    """

    @tf.autograph.experimental.do_not_convert
    def decode(frames: dict) -> dict:
        pixels, decoded = images.load(frames["image"], image_size, image_sizes)
        return frames | {"image": pixels, "broken": tf.where(decoded, "", frames["image"])}

    stream = stream.shuffle(buffer, seed=seed).batch(_DECODED_TOGETHER)
    stream = stream.map(decode, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True).unbatch()
    if skip_broken:
        stream = _without_broken(stream)
    stream = stream.batch(batch_size, drop_remainder=True).prefetch(_PREFETCHED_BATCHES)
    options = tf.data.Options()
    options.deterministic = True
    # Decoding counts as stateful for TensorFlow, because it catches its own errors. It is not, and `episodes.trace` has
    # refused what is, so the state of the iterator is complete.
    options.experimental_external_state_policy = tf.data.experimental.ExternalStatePolicy.IGNORE
    return stream.with_options(options)


def _without_broken(stream: tf.data.Dataset) -> tf.data.Dataset:
    """Drops frames with a broken image and hands their places on to the next good one. Where too many follow each
    other the last passes as it is, so that somebody notices."""

    def note(state: tuple[tf.Tensor, tf.Tensor], frame: dict):
        places, count = state
        broken = tf.logical_and(frame["broken"] != "", count < _BROKEN_IN_A_ROW)
        numbers = [tf.strings.as_string(frame[key]) for key in ("dataset", "step")]
        place = tf.strings.join([*numbers, frame["episode"]], separator=" ")
        noted = tf.cond(broken, lambda: (tf.strings.join([places, place, "\n"]), count + 1), lambda: ("", 0))
        return noted, (frame | {"skipped": places}, broken)

    # A lambda's parameters would be taken apart; autograph is not needed, and cannot convert code without a file.
    noted = stream.scan((tf.constant(""), tf.constant(0)), tf.autograph.experimental.do_not_convert(note))
    kept = noted.filter(tf.autograph.experimental.do_not_convert(lambda frame, broken: tf.logical_not(broken)))
    return kept.map(tf.autograph.experimental.do_not_convert(lambda frame, broken: frame))


# ---------------------------------------------------------------------------------------------------------------------
# Rows -> Batch
# ---------------------------------------------------------------------------------------------------------------------


class _Encoder:
    """Adds tokens to the rows that tf.data delivers, and refuses rows that cannot be trained on."""

    def __init__(self, mixture: Mixture, tokenizer: Any, text_length: int, prompt_family: str, bins: int):
        self.mixture = mixture
        self.names = tuple(source.name for source in mixture.sources)
        self.action_dims = mixture.action_dims
        self.action_tokenizer = ActionTokenizer(tokenizer.vocab_size, bins)
        self.truncated_instructions = 0
        self.skipped_images = 0

        @functools.lru_cache(maxsize=65536)  # robots are told the same things over and over
        def template(instruction: str, action_dim: int) -> tuple[np.ndarray, np.ndarray, bool]:
            blank = np.zeros(action_dim)
            text, places, cut = encode_example(
                tokenizer, self.action_tokenizer, instruction, blank, text_length, prompt_family
            )
            return text, np.pad(places, (0, self.action_dims.max() + 1 - len(places)), mode="edge"), cut

        self._template = template

    def __call__(self, rows: Mapping[str, np.ndarray]) -> Batch:
        self._check(rows)
        dims = self.action_dims[rows["dataset"]]
        texts, places = [], []
        for row, dim in enumerate(dims):
            try:
                text, where, cut = self._template(rows["language"][row].decode(), int(dim))
            except ValueError as error:  # an instruction that is empty or not text
                raise DataError(f"{self._where(rows, row)}: {error}") from error
            texts.append(text)
            places.append(where)
            if cut and not self.truncated_instructions:
                logging.warning(
                    "%s: the instruction is too long and is cut: raise data.text_length", self._where(rows, row)
                )
            self.truncated_instructions += cut
        tokens, positions = np.stack(texts), np.stack(places)
        there = np.nonzero(np.arange(self.action_dims.max()) < dims[:, None])  # actions of all rows, without padding
        tokens[there[0], positions[there]] = self.action_tokenizer.encode(rows["action"])[there]
        return Batch(
            images=rows["image"][:, None],
            image_mask=np.ones((len(dims), 1), bool),
            state=None,
            tokens=tokens,
            target_positions=positions,
            target_mask=np.arange(positions.shape[1]) <= dims[:, None],
            actions=rows["action"][:, None],
            action_mask=(np.arange(self.action_dims.max()) < dims[:, None])[:, None],
            dataset=rows["dataset"],
        )

    def _where(self, rows: Mapping[str, np.ndarray], row: int) -> str:
        name, episode = self.names[rows["dataset"][row]], rows["episode"][row].decode()
        return f"dataset {name!r}, episode {episode}, step {rows['step'][row]}"

    def _note_skipped(self, texts: np.ndarray) -> None:
        for place in "".join(text.decode() for text in texts.tolist()).splitlines():
            dataset, step, episode = place.split(" ", 2)
            self.skipped_images += 1
            if self.skipped_images <= _LOGGED:
                logging.warning(
                    "dataset %r, episode %s, step %s: the image cannot be decoded; the frame is skipped (%d so far%s)",
                    self.names[int(dataset)], episode, step, self.skipped_images,
                    "; further ones are only counted" if self.skipped_images == _LOGGED else "",
                )  # fmt: skip

    def _check(self, rows: Mapping[str, np.ndarray]) -> None:
        if "skipped" in rows:
            self._note_skipped(rows["skipped"])
        for row in np.flatnonzero(rows["step"] < 0)[:1].tolist():
            raise DataError(
                f"dataset {self.names[rows['dataset'][row]]!r}: not one frame of the episodes that this process reads "
                f"has an instruction and passes the dataset's filter: label them, or leave the dataset out"
            )
        for row in np.flatnonzero(rows["broken"] != b"")[:1].tolist():
            reason = images.reason(rows["broken"][row])
            raise BadImageError(f"{self._where(rows, row)}: the image cannot be decoded ({reason})")
        for row in np.flatnonzero(~np.isfinite(rows["action"]).all(axis=1))[:1].tolist():
            name, one = self.names[rows["dataset"][row]], slice(row, row + 1)
            check_finite(rows["action"][one], "action", name, rows["episode"][one], rows["step"][one])


# ---------------------------------------------------------------------------------------------------------------------
# Training and evaluation
# ---------------------------------------------------------------------------------------------------------------------


class TrainIterator(Iterator[Batch]):
    """The endless training stream of one process. The same arguments give the same batches.

    dataset_names: what Batch.dataset indexes. statistics: {name: statistics with mask}. num_examples: frames of a
    nominal epoch (see `mixture.nominal_length`). truncated_instructions: rows so far whose instruction was cut to fit.
    skipped_images: frames left out because their image is broken (data.bad_images = "skip"). step: batches so far,
    those before a resume included. state_bytes: about how much memory the shuffle buffer, the prefetched batches and
    the readers take, and at most what `save` writes. summary: the datasets and that estimate, to be printed.
    """

    def __init__(
        self,
        phases: Sequence[tuple[float, Callable[[], tf.data.Dataset]]],
        encoder: _Encoder,
        *,
        step: int,
        num_examples: int,
        memory: Memory,
        state_bytes: int,
        summary: str,
        identity: dict[str, Any],
    ):
        self.dataset_names = encoder.names
        self.statistics = dict(encoder.mixture.statistics)
        self.num_examples = num_examples
        self.memory = memory
        self.state_bytes = state_bytes
        self.summary = summary
        self.step = step
        self._phases, self._encoder, self._identity = phases, encoder, identity
        self._open(step + 1)
        self._started = False

    def _open(self, step: int) -> None:
        """Begins the stream that the batch of this step comes from."""
        self._until, rows = next((until, rows) for until, rows in self._phases if step <= until)
        self._iterator = iter(rows())

    @property
    def identity(self) -> dict[str, Any]:
        """What makes the stream: datasets and their versions, weights, seed, shares. JSON values."""
        return self._identity

    @property
    def truncated_instructions(self) -> int:
        return self._encoder.truncated_instructions

    @property
    def skipped_images(self) -> int:
        return self._encoder.skipped_images

    def __next__(self) -> Batch:
        if self.step >= self._until:
            logging.info("step %d: the next mixture of data.schedule begins", self.step)
            self._open(self.step + 1)
        self._started = True
        with clear_errors(self._encoder.mixture.sources):
            rows = next(self._iterator)
        batch = self._encoder({key: value.numpy() for key, value in rows.items()})
        self.step += 1
        return batch

    def save(self, directory: str) -> None:
        """Writes the state of the stream, shuffle buffer and prefetched batches included, one file set per process.

        The JSON file comes last: without it the set is not complete, and `restore` refuses it.
        """
        prefix = self._prefix(directory)
        path = prefix.with_name(prefix.name + ".json")
        prefix.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        tf.train.Checkpoint(iterator=self._iterator).write(str(prefix))
        counts = {"truncated_instructions": self.truncated_instructions, "skipped_images": self.skipped_images}
        notes = {"identity": self._identity, "step": self.step, **counts}
        aside = path.with_name(path.name + ".part")
        aside.write_text(json.dumps(notes, indent=2) + "\n")
        aside.replace(path)

    def restore(self, directory: str) -> None:
        """Takes the stream up where `save` wrote it: the next batch is the one that would have followed.

        Raises DataError where there is no complete state for this process, or one of another data configuration, and
        RuntimeError after the first batch: tf.data restores all of a stream's state only before that.
        """
        if self._started:
            raise RuntimeError("the stream has begun: restore it before its first batch is drawn")
        prefix = self._prefix(directory)
        path = prefix.with_name(prefix.name + ".json")
        if not path.exists():
            raise DataError(f"{path} is missing: the stream cannot go on exactly there; use data.resume='reseed'")
        notes = json.loads(path.read_text())
        for key in sorted(self._identity.keys() | notes["identity"].keys()):
            was, now = notes["identity"].get(key), self._identity.get(key)
            if was != now:
                raise DataError(f"{path}: {key} was {was!r}, now is {now!r}: set it back, or use data.resume='reseed'")
        self.step = notes["step"]
        self._open(max(self.step, 1))
        try:
            tf.train.Checkpoint(iterator=self._iterator).read(str(prefix)).assert_consumed()
        except Exception as error:  # TensorFlow's reader has no error of its own for files that are cut off
            reason = str(error).splitlines()[0]
            raise DataError(f"{prefix}.* cannot be read ({reason}): use data.resume='reseed'") from error
        self._encoder.truncated_instructions = notes["truncated_instructions"]
        self._encoder.skipped_images = notes["skipped_images"]

    def _prefix(self, directory: str) -> epath.Path:
        index, count = self._identity["process_index"], self._identity["process_count"]
        return epath.Path(directory) / f"stream_{index:05d}-of-{count:05d}"


def make_train_iterator(
    data: Any,
    tokenizer: Any,
    *,
    batch_size: int,
    image_size: int,
    seed: int,
    step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    prompt_family: str = "pure",
    bins: int = ActionSpec.bins,
) -> TrainIterator:
    """The training stream of process process_index of process_count; batch_size is that of this process.

    data: ConfigDict (or dict) with dataset (name, mixture or pairs), data_dir, shuffle_buffer (frames), text_length,
    and, or their defaults, module, schedule, statistics, statistics_dir, num_parallel_reads, skip_unlabeled,
    max_action, max_proprio, bad_images ("stop" or "skip"), max_host_ram_gb (None: no limit; the buffer shrinks to fit).
    step: how many steps are done; it decides on the mixture of a schedule. Processes read disjoint episodes; none
    decodes another's frames. Raises DataError for whatever is wrong with the data, before anything is read where that
    can be known.
    """
    bad_images = data.get("bad_images", "stop")
    if bad_images not in ("stop", "skip"):
        raise DataError(f"data.bad_images is {bad_images!r}: stop or skip")
    phases = open_phases(data)
    mixture = phases[-1].mixture
    readers = data.get("num_parallel_reads") or 4
    num_examples = nominal_length(mixture.weights, mixture.sizes)
    shuffle_buffer = min(data["shuffle_buffer"], max(num_examples // process_count, batch_size))  # one epoch is enough
    memories = [phase.mixture.memory(readers) for phase in phases if phase.until > step]
    memory = Memory(max(m.frame_bytes for m in memories), max(m.reader_bytes for m in memories))
    in_groups = (os.cpu_count() or 1) * _DECODED_TOGETHER  # at most, that each core has its group
    decoded = ((_PREFETCHED_BATCHES + 1) * batch_size + in_groups) * image_size**2 * 3
    shuffle_buffer = _fit(data, shuffle_buffer, memory.frame_bytes, memory.reader_bytes + decoded, batch_size)
    state_bytes = int(shuffle_buffer * memory.frame_bytes + memory.reader_bytes) + decoded
    summary = (
        f"{table(phases)}\nmemory: {resident_memory_gb():.2f} GB in this process now, and for the data, estimated, "
        f"{state_bytes / 1e9:.2f} GB = "
        f"shuffle buffer {shuffle_buffer:,} frames x {memory.frame_bytes / 1e3:.1f} kB + "
        f"readers {memory.reader_bytes / 1e9:.2f} GB + "
        f"{_PREFETCHED_BATCHES + 1} batches and images in work {decoded / 1e9:.2f} GB"
    )
    shard = {"process_index": process_index, "process_count": process_count}
    skip_unlabeled = data.get("skip_unlabeled", True)

    def rows(mixture: Mixture) -> tf.data.Dataset:
        stream = mixture.stream("train", seed=seed, readers=readers, skip_unlabeled=skip_unlabeled, **shard)
        return _rows(
            stream,
            shuffle_buffer,
            seed=seed + process_index,
            image_size=image_size,
            image_sizes=mixture.image_sizes,
            batch_size=batch_size,
            skip_broken=bad_images == "skip",
        )

    for phase in phases:
        phase.mixture.having("train")  # a dataset without training episodes is told now, not when its phase begins
    identity = {
        **shard,
        "datasets": [[s.name, str(s.info.version)] for s in mixture.sources],
        "weights": [phase.mixture.probabilities.tolist() for phase in phases],
        "schedule": [phase.until for phase in phases[:-1]],
        "seed": seed,
        "batch_size": batch_size,
        "image_size": image_size,
        "decoded_together": _DECODED_TOGETHER,
        "shuffle_buffer": shuffle_buffer,
        "num_parallel_reads": readers,
        "skip_unlabeled": skip_unlabeled,
        "max_action": mixture.max_action,
        "max_proprio": mixture.max_proprio,
        "bad_images": bad_images,
        "tensorflow": tf.__version__,
    }
    return TrainIterator(
        [(phase.until, functools.partial(rows, phase.mixture)) for phase in phases],
        _Encoder(mixture, tokenizer, data["text_length"], prompt_family, bins),
        step=step,
        num_examples=num_examples,
        memory=memory,
        state_bytes=state_bytes,
        summary=summary,
        identity=identity,
    )


def _fit(data: Any, buffer: int, frame_bytes: float, fixed_bytes: float, batch_size: int) -> int:
    """The shuffle buffer, in frames, cut so that it and the rest fit data.max_host_ram_gb."""
    limit = data.get("max_host_ram_gb")
    if limit is None or buffer * frame_bytes + fixed_bytes <= limit * 1e9:
        return buffer
    fitting = int((limit * 1e9 - fixed_bytes) / frame_bytes)
    if fitting < batch_size:
        raise DataError(
            f"data.max_host_ram_gb={limit} holds not even one batch of {batch_size} frames beside "
            f"{fixed_bytes / 1e9:.2f} GB of readers and prefetched batches: raise it, or lower data.num_parallel_reads"
        )
    logging.warning("shuffle buffer cut from %d to %d frames by data.max_host_ram_gb=%s", buffer, fitting, limit)
    return fitting


def resident_memory_gb() -> float:
    """Resident memory of this process in GB; where the system does not say, the most that it ever was."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize() / 1e9
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def make_eval_batches(
    data: Any,
    tokenizer: Any,
    *,
    batch_size: int,
    image_size: int,
    num_batches: int,
    statistics: Mapping[str, Mapping],
    seed: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    prompt_family: str = "pure",
    bins: int = ActionSpec.bins,
) -> list[Batch]:
    """Always the same batches from held-out episodes: split "val", or the last 5 % of "train" where there is none.

    statistics: those that the policy was trained with (`TrainIterator.statistics`). Datasets are drawn as in training;
    where there are fewer held-out frames than asked for, they come again. Raises SplitNotFoundError where no dataset
    has any. Datasets without held-out episodes are left out. With a schedule, its last mixture counts.
    """
    mixture = open_phases(data, statistics)[-1].mixture
    shard = {"process_index": process_index, "process_count": process_count}
    stream = mixture.stream("val", seed=seed, skip_unlabeled=data.get("skip_unlabeled", True), **shard)
    # Out of many more frames than are kept, so that these are not neighbours, but of not much more than one pass.
    buffer = min(16 * num_batches * batch_size, data["shuffle_buffer"], mixture.expected_frames("val") // process_count)
    rows = _rows(
        stream,
        max(buffer, 1),
        seed=seed,
        image_size=image_size,
        image_sizes=mixture.image_sizes,
        batch_size=batch_size,
    )
    encoder = _Encoder(mixture, tokenizer, data["text_length"], prompt_family, bins)
    with clear_errors([mixture.sources[index] for index in mixture.having("val")]):
        return [encoder(batch) for batch in rows.take(num_batches).as_numpy_iterator()]
