"""Frames of a mixture as numpy batches: shuffled while encoded, decoded, resized, tokenised.

All but the tokens happens in one tf.data pipeline per host, with its own prefetching and no Python in it, so the state
of the stream (shuffle buffer included) can be written beside a checkpoint and taken up again exactly.
"""

import functools
import os
from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from openvla_jax.data import DataError, images
from openvla_jax.data.encoder import Encoder
from openvla_jax.data.episodes import explain_errors
from openvla_jax.data.faults import drop_faulty
from openvla_jax.data.memory import estimate, fit_buffer, resident_memory_gb
from openvla_jax.data.mixture import (
    DEFAULT_ACTION,
    DEFAULT_OBSERVATION,
    Mixture,
    nominal_length,
    open_phases,
    table,
)
from openvla_jax.data.stream import TrainIterator
from openvla_jax.types import ActionSpec, Batch, ObservationSpec

_PREFETCHED_BATCHES = 2
_DECODED_TOGETHER = 16  # frames


def _rows(
    stream: tf.data.Dataset,
    mixture: Mixture,
    buffer: int,
    *,
    seed: int,
    image_size: int,
    batch_size: int,
    skip_broken: bool = False,
) -> tf.data.Dataset:
    """Frames -> batches of rows: shuffled while encoded, then decoded and resized in parallel, in a fixed order.

    image_<camera> becomes uint8 [B, image_size, image_size, 3]. Frames with a broken image are marked (see `faults`),
    and left out if `skip_broken`; episodes that are shorter than a chunk are always left out.
    """
    cameras, image_sizes = mixture.observation.cameras, mixture.image_sizes

    @tf.autograph.experimental.do_not_convert
    def decode(frames: dict) -> dict:
        encoded = [frames[f"image_{camera}"] for camera in cameras]
        pixels, decoded = images.decode_and_resize(tf.concat(encoded, axis=0), image_size, image_sizes)
        parts = zip(cameras, encoded, tf.split(pixels, len(cameras)), tf.split(decoded, len(cameras)), strict=True)
        for camera, image, camera_pixels, good in parts:
            frames = frames | {f"image_{camera}": camera_pixels, f"broken_{camera}": tf.where(good, "", image)}
        return frames

    stream = stream.shuffle(buffer, seed=seed).batch(_DECODED_TOGETHER)
    stream = stream.map(decode, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True).unbatch()
    if skip_broken or mixture.action.horizon > 1:
        stream = drop_faulty(stream, skip_broken)
    stream = stream.batch(batch_size, drop_remainder=True).prefetch(_PREFETCHED_BATCHES)
    options = tf.data.Options()
    options.deterministic = True
    # Decoding counts as stateful for TensorFlow, because it catches its own errors. It is not, and `episodes.trace` has
    # refused what is, so the state of the iterator is complete.
    options.experimental_external_state_policy = tf.data.experimental.ExternalStatePolicy.IGNORE
    return stream.with_options(options)


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
    observation: ObservationSpec = DEFAULT_OBSERVATION,
    action: ActionSpec = DEFAULT_ACTION,
) -> TrainIterator:
    """Opens the training stream of one process. Processes read disjoint episodes; none decodes another's frames.

    Args:
      data: ConfigDict (or dict) with dataset (name, mixture or pairs), data_dir, shuffle_buffer (frames), text_length,
        and, or their defaults, module, schedule, statistics, statistics_dir, num_parallel_reads, skip_unlabeled,
        max_action, max_proprio, bad_images ("stop" or "skip"), max_host_ram_gb (None: no limit; the buffer shrinks to
        fit).
      tokenizer: of the language model (see `tokens.load_tokenizer`).
      batch_size: rows of this process.
      image_size: pixels of a side.
      seed: decides the order of the frames.
      step: how many steps are done; it decides on the mixture of a schedule.
      process_index, process_count: which share of the episodes is read.
      prompt_family: the template of the language model.
      observation: cameras and state columns of a batch. Statistics of the state come with it.
      action: horizon, bins and normalisation of a batch's actions. Its `dim` is not read: the datasets decide.

    Raises:
      DataError: whatever is wrong with the data; before anything is read, if that can be known.
      ValueError: an unknown dataset or mixture.
    """
    bad_images = data.get("bad_images", "stop")
    if bad_images not in ("stop", "skip"):
        raise DataError(f"data.bad_images is {bad_images!r}: stop or skip")
    phases = open_phases(data, observation, action)
    mixture = phases[-1].mixture
    for index, camera in enumerate(observation.cameras):
        if not mixture.camera_mask[:, index].any():
            raise DataError(f"observation.cameras has {camera!r}, of which no dataset has images: leave it out")
    readers = data.get("num_parallel_reads") or 4
    num_examples = nominal_length(mixture.weights, mixture.sizes)
    shuffle_buffer = min(data["shuffle_buffer"], max(num_examples // process_count, batch_size))  # one epoch is enough
    memory = estimate([phase.mixture for phase in phases if phase.last_step > step], readers)
    in_groups = (os.cpu_count() or 1) * _DECODED_TOGETHER  # at most, that each core has its group
    decoded_frames = (_PREFETCHED_BATCHES + 1) * batch_size + in_groups
    decoded = decoded_frames * image_size**2 * 3 * len(observation.cameras)
    shuffle_buffer = fit_buffer(data, shuffle_buffer, memory.frame_bytes, memory.reader_bytes + decoded, batch_size)
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
            mixture,
            shuffle_buffer,
            seed=seed + process_index,
            image_size=image_size,
            batch_size=batch_size,
            skip_broken=bad_images == "skip",
        )

    for phase in phases:
        phase.mixture.datasets_with_split("train")  # a dataset without any is reported now, not when its phase begins
    identity = {
        **shard,
        "datasets": [[s.name, str(s.info.version)] for s in mixture.sources],
        "weights": [phase.mixture.probabilities.tolist() for phase in phases],
        "schedule": [phase.last_step for phase in phases[:-1]],
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
        **_changed_specs(observation, action),
    }
    return TrainIterator(
        [(phase.last_step, functools.partial(rows, phase.mixture)) for phase in phases],
        Encoder(mixture, tokenizer, data["text_length"], prompt_family),
        dataset_names=mixture.names,
        statistics=mixture.statistics,
        step=step,
        num_examples=num_examples,
        state_bytes=state_bytes,
        summary=summary,
        identity=identity,
        explain_errors=functools.partial(explain_errors, mixture.sources),
    )


def _changed_specs(observation: ObservationSpec, action: ActionSpec) -> dict[str, Any]:
    """What of the specs makes the stream, if it is not the default: streams saved before there were specs resume."""
    specs = {
        "cameras": (list(observation.cameras), list(DEFAULT_OBSERVATION.cameras)),
        "state": (list(observation.state), list(DEFAULT_OBSERVATION.state)),
        "horizon": (action.horizon, DEFAULT_ACTION.horizon),
        "bins": (action.bins, DEFAULT_ACTION.bins),
        "normalization": (action.normalization, DEFAULT_ACTION.normalization),
    }
    return {key: value for key, (value, default) in specs.items() if value != default}


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
    observation: ObservationSpec = DEFAULT_OBSERVATION,
    action: ActionSpec = DEFAULT_ACTION,
) -> list[Batch]:
    """Reads the same batches every time, from held-out episodes.

    These are split "val", or the last 5 % of "train" of a dataset without one. Datasets are drawn as in training; those
    without held-out episodes are left out. If there are fewer held-out frames than asked for, they come again. With a
    schedule, its last mixture counts.

    Args:
      data, tokenizer, image_size, prompt_family, observation, action: as in `make_train_iterator`.
      batch_size: rows of this process.
      num_batches: how many to read.
      statistics: those that the policy was trained with (`TrainIterator.statistics`).
      seed: decides which frames are drawn.
      process_index, process_count: which share of the episodes is read.

    Raises:
      SplitNotFoundError: no dataset has held-out episodes.
      DataError: a frame cannot be trained on, broken images included; or as in `make_train_iterator`.
    """
    mixture = open_phases(data, observation, action, statistics)[-1].mixture
    shard = {"process_index": process_index, "process_count": process_count}
    stream = mixture.stream("val", seed=seed, skip_unlabeled=data.get("skip_unlabeled", True), **shard)
    # Out of many more frames than are kept, so that these are not neighbours, but of not much more than one pass.
    buffer = min(16 * num_batches * batch_size, data["shuffle_buffer"], mixture.expected_frames("val") // process_count)
    rows = _rows(stream, mixture, max(buffer, 1), seed=seed, image_size=image_size, batch_size=batch_size)
    encoder = Encoder(mixture, tokenizer, data["text_length"], prompt_family)
    with explain_errors([mixture.sources[index] for index in mixture.datasets_with_split("val")]):
        return [encoder(batch) for batch in rows.take(num_batches).as_numpy_iterator()]
