"""How fast frames come: stage by stage, and beside the order in which the reference does the same work.

CPU time per frame is what other programs on the machine disturb least; frames/s are of wall time. All is measured in
turns, so that a machine that gets slower or faster meanwhile changes all numbers alike.
"""

import dataclasses
import functools
import itertools
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from openvla_jax.config import preset
from openvla_jax.data import images, pipeline
from openvla_jax.data import trajectory as traj
from openvla_jax.data.batches import make_train_iterator
from openvla_jax.data.episodes import read_episodes
from openvla_jax.data.ingest.writer import FLAGS, encode, flags, write_dataset
from openvla_jax.data.memory import estimate
from openvla_jax.data.mixture import open_phases
from openvla_jax.data.source import episode_ranges
from openvla_jax.tokens.actions import ActionTokenizer
from openvla_jax.tokens.prompts import encode_example

NAME = "bench_two_cameras"
MODULE = f"""
from openvla_jax.data.custom import Columns, describe

DATASETS = [
    describe(
        "{NAME}",
        cameras={{"primary": "image", "wrist": "wrist_image"}},
        action=[Columns("action", 0, 6), Columns("action", 6, gripper="1 is open")],
    )
]
"""


@dataclasses.dataclass
class Stage:
    """One stage, with all stages before it, and what was measured of it."""

    name: str
    draw: Callable[[], Any]  # makes a batch
    frames: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    @property
    def rate(self) -> float:
        return self.frames / self.seconds

    @property
    def cpu_ms(self) -> float:
        return 1e3 * self.cpu_seconds / self.frames


def write_episodes(folder: Path, episodes: int = 24, steps: int = 60, size: int = 256) -> str:
    """Writes a dataset of smooth, noisy JPEG frames of two cameras, and its description; returns the latter's path."""
    rng = np.random.default_rng(0)
    scenes = [_scene(rng, size) for _ in range(16)]  # drawing them takes longer than reading them

    def generate() -> Iterator[dict]:
        for episode in range(episodes):
            walk = rng.normal(0, 0.3, (steps, 7)).clip([-1] * 6 + [0], 1).astype(np.float32)
            picks = rng.integers(len(scenes), size=(steps, 2))
            yield {
                "steps": [
                    {
                        "observation": {"image": encode(scenes[a], "JPEG"), "wrist_image": encode(scenes[b], "JPEG")},
                        "action": walk[t],
                        "language_instruction": f"put object {episode} into the drawer",
                        **flags(t, steps),
                    }
                    for t, (a, b) in enumerate(picks)
                ]
            }

    camera = tfds.features.Image(shape=(size, size, 3), encoding_format="jpeg")
    step = {
        "observation": {"image": camera, "wrist_image": camera},
        "action": tfds.features.Tensor(shape=(7,), dtype=np.float32),
        "language_instruction": tfds.features.Text(),
        **FLAGS,
    }
    write_dataset(
        folder / NAME / "1.0.0",
        {"steps": tfds.features.Dataset(step)},
        {"train": generate()},
        description="Frames to measure reading with.",
        episodes_per_file=max(episodes // 8, 1),
    )
    module = folder / "bench_data.py"
    module.write_text(MODULE)
    return str(module)


def _scene(rng: np.random.Generator, size: int) -> np.ndarray:
    from PIL import Image

    coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
    return (np.asarray(coarse) + rng.normal(0, 6, (size, size, 3))).clip(0, 255).astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# This pipeline
# ---------------------------------------------------------------------------------------------------------------------


def stages(data: dict[str, Any], tokenizer: Any, *, image_size: int, batch_size: int) -> list[Stage]:
    """Reading, then reading and decoding, and so on, to a normalised batch on the device."""
    (phase,) = open_phases(data)[-1:]
    stream = phase.mixture.stream("train", seed=0, readers=data["num_parallel_reads"]).shuffle(512, seed=0)
    decoded = stream.map(lambda frame: images.decode(frame["image_primary"])[0, 0], num_parallel_calls=tf.data.AUTOTUNE)

    def batches(dataset: tf.data.Dataset) -> Callable[[], Any]:
        return functools.partial(next, dataset.batch(batch_size, drop_remainder=True).prefetch(2).as_numpy_iterator())

    def whole(then: Callable[[Any], Any]) -> Callable[[], Any]:
        iterator = make_train_iterator(data, tokenizer, batch_size=batch_size, image_size=image_size, seed=0)

        def draw() -> None:
            pixels = next(iterator).images
            then(pixels.reshape(-1, *pixels.shape[2:]))  # cameras are images of their own

        return draw

    return [
        Stage("read, standardise, normalise, shuffle", batches(stream.map(lambda frame: frame["action"]))),
        Stage("+ decode", batches(decoded)),
        Stage("+ resize, tokens, batch", whole(lambda pixels: None)),
        Stage("+ to the device, augmented", whole(_on_device(normalised=False))),
        Stage("+ normalised", whole(_on_device(normalised=True))),
    ]


def _on_device(normalised: bool) -> Callable[[np.ndarray], None]:
    """Puts images on the device, where they are augmented and, if asked, normalised for each tower, as a training step
    does; one batch is in flight while the host makes the next, and its memory serves the one after that."""
    import jax
    import jax.numpy as jnp

    from openvla_jax.vision.augment import augment

    @functools.partial(jax.jit, donate_argnums=2, keep_unused=True)
    def run(key: jax.Array, images: jax.Array, spent: list[jax.Array]) -> list[jax.Array]:
        images = augment(key, images)
        unit = images.astype(jnp.float32) / 255
        return [(unit - jnp.asarray(mean)) / jnp.asarray(std) for mean, std in _TOWERS] if normalised else [images]

    keys = map(jax.random.key, itertools.count())
    flying: list[jax.Array] = []

    def step(pixels: np.ndarray) -> None:
        if not flying:
            kinds = [jnp.float32] * len(_TOWERS) if normalised else [jnp.uint8]
            flying[:] = [jnp.zeros(pixels.shape, kind) for kind in kinds]
        jax.block_until_ready(flying)
        flying[:] = run(next(keys), jax.device_put(pixels), flying)

    return step


# ---------------------------------------------------------------------------------------------------------------------
# The reference's order
# ---------------------------------------------------------------------------------------------------------------------


def reference(data: dict[str, Any], tokenizer: Any, *, image_size: int, batch_size: int) -> Stage:
    """The same frames in the order of the reference: one reader per dataset, a goal image relabelled, carried through
    the shuffle buffer, decoded, resized and augmented beside each frame's own (which is a window of one), all on the
    host; then frame by frame normalised for each tower, to tokens and a batch."""
    (phase,) = open_phases(data)[-1:]
    mixture = phase.mixture

    def frames(index: int) -> tf.data.Dataset:
        source = mixture.sources[index]
        views = tuple(view for view, key in source.config.image_keys.items() if key)  # parsed, whether used or not

        def columns(full: traj.Trajectory, _: tf.Tensor) -> dict:
            full = traj.relabel_goal(traj.add_pad_masks(full), 0)
            return {
                "image": full["observation"]["image_primary"],
                "goal": full["task"]["image_primary"],
                "action": full["action"],
                "language": full["task"]["language_instruction"],
            }

        statistics = mixture.statistics[source.name]
        traced = pipeline.compose(source, views=views, statistics=statistics, then=columns)
        episodes = read_episodes(traced, episode_ranges(source, "train"), seed=0, readers=1).repeat()
        return episodes.interleave(tf.data.Dataset.from_tensor_slices, cycle_length=1)

    indices = mixture.datasets_with_split("train")
    stream = tf.data.Dataset.sample_from_datasets([frames(i) for i in indices], mixture.probabilities[indices].tolist())

    def on_both(function: Callable[[tf.Tensor], tf.Tensor], frame: dict) -> dict:
        window = tf.map_fn(function, frame["image"], fn_output_signature=tf.uint8)
        return frame | {"image": window, "goal": function(frame["goal"])}

    def decode(frame: dict) -> dict:
        return on_both(
            lambda image: _tf_resize(images.decode(image), image_size), frame | {"image": frame["image"][None]}
        )

    def augment(frame: dict) -> dict:
        seed = tf.random.uniform([2], maxval=2**31 - 1, dtype=tf.int32)
        return on_both(lambda image: _tf_augment(image, seed), frame)

    stream = stream.shuffle(512).map(decode, num_parallel_calls=16).map(augment, num_parallel_calls=16)
    source = stream.prefetch(16).as_numpy_iterator()
    actions = ActionTokenizer(tokenizer.vocab_size, mixture.action.bins)

    def batch() -> None:
        import jax

        rows = [next(source) for _ in range(batch_size)]
        for row in rows:
            encode_example(tokenizer, actions, row["language"].decode(), row["action"], data["text_length"], "pure")
        jax.device_put(np.stack([_for_towers(row["image"][0]) for row in rows])).block_until_ready()

    return Stage("the reference's order", batch)


_TOWERS = [(np.array(tower.mean, np.float32), np.array(tower.std, np.float32)) for tower in preset("openvla-7b").towers]


def _for_towers(image: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] -> float32 [6, H, W]: torchvision's ToTensor and Normalize, once for each tower."""
    pixels = []
    for mean, std in _TOWERS:
        unit = np.ascontiguousarray(image.transpose(2, 0, 1)).astype(np.float32) / np.float32(255)
        pixels.append((unit - mean[:, None, None]) / std[:, None, None])
    return np.concatenate(pixels)


def _tf_resize(image: tf.Tensor, size: int) -> tf.Tensor:
    """The reference's call, which `images.resize` equals."""
    resized = tf.image.resize(image, (size, size), method="lanczos3", antialias=True)
    return tf.cast(tf.clip_by_value(tf.round(resized), 0, 255), tf.uint8)


def _tf_augment(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """The reference's chain of tf.image ops."""
    x = tf.image.convert_image_dtype(image, tf.float32)
    side = tf.sqrt(0.9)
    start = tf.random.stateless_uniform([], seed) * (1 - side)
    box = tf.stack([start, start, start + side, start + side])[None]
    x = tf.clip_by_value(tf.image.crop_and_resize(x[None], box, [0], tf.shape(image)[:2])[0], 0, 1)
    x = tf.clip_by_value(tf.image.stateless_random_brightness(x, 0.2, seed), 0, 1)
    x = tf.clip_by_value(tf.image.stateless_random_contrast(x, 0.8, 1.2, seed), 0, 1)
    x = tf.clip_by_value(tf.image.stateless_random_saturation(x, 0.8, 1.2, seed), 0, 1)
    x = tf.clip_by_value(tf.image.stateless_random_hue(x, 0.05, seed), 0, 1)
    return tf.image.convert_image_dtype(x, tf.uint8, saturate=True)


# ---------------------------------------------------------------------------------------------------------------------
# Measuring and telling
# ---------------------------------------------------------------------------------------------------------------------


def measure(stages: Sequence[Stage], batch_size: int, seconds: float, turns: int = 4) -> None:
    """Runs each stage for about `seconds`, in turns, and adds to its counts."""
    for stage in stages:
        for _ in range(2 + 512 // batch_size):  # the shuffle buffer fills, functions are compiled
            stage.draw()
    for turn in range(turns):
        for stage in stages:
            time.sleep(0.5)  # the stage before fills its buffers, which shall not count here
            for _ in range(2 + 64 // batch_size):  # what was ready before this turn
                stage.draw()
            began, cpu = time.perf_counter(), time.process_time()
            while time.perf_counter() - began < seconds / turns:
                stage.draw()
                stage.frames += batch_size
            stage.seconds += time.perf_counter() - began
            stage.cpu_seconds += time.process_time() - cpu
            logging.info("turn %d of %d, %s: %.0f frames/s", turn + 1, turns, stage.name, stage.rate)


def frame_bytes(data: dict[str, Any]) -> float:
    """Mean bytes of a frame's record."""
    return estimate([open_phases(data)[-1].mixture], 1).frame_bytes


def report(ours: list[Stage], theirs: Stage | None, read_bytes: float, host_cores: int) -> str:
    """A table of the stages, where the time goes, and what a host with so many cores would do at the same CPU cost."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    rows = [*ours, *([theirs] if theirs else [])]
    width = max(len(stage.name) for stage in rows)
    lines = [f"{'stage (each with those above it)':<{width}}  frames/s  CPU ms/frame"]
    lines += [f"{stage.name:<{width}}  {stage.rate:8.0f}  {stage.cpu_ms:12.2f}" for stage in rows]
    whole = ours[-1]
    shares = [after.cpu_ms - before.cpu_ms for before, after in itertools.pairwise(ours)]
    parts = zip(("decode", "resize, tokens and batch", "augmentation", "normalisation"), shares, strict=True)
    told = ", ".join(f"{name} {max(share, 0) / whole.cpu_ms:.0%}" for name, share in parts)
    host, augmented = ours[-3:-1]
    lines += [
        f"CPU time goes to: {told}; the last two are an accelerator's where there is one",
        f"{whole.rate * read_bytes / 1e6:.1f} MB/s of records; {cores} cores here",
        f"projected, at this CPU cost per frame, for a host of {host_cores} cores that feeds an accelerator: "
        f"{host_cores * 1e3 / host.cpu_ms:,.0f} frames/s",
    ]
    if theirs:
        lines.append(
            f"against the reference's order: {theirs.cpu_ms / host.cpu_ms:.1f}x less CPU on the host; where this CPU "
            f"does the device's part too, {theirs.cpu_ms / augmented.cpu_ms:.1f}x less to an augmented batch and "
            f"{theirs.cpu_ms / whole.cpu_ms:.1f}x less to a normalised one; {host.rate / theirs.rate:.1f}x, "
            f"{augmented.rate / theirs.rate:.1f}x and {whole.rate / theirs.rate:.1f}x the frames/s"
        )
    return "\n".join(lines)
