"""A camera image to the pixels that the model was trained on, as the checkpoint's preprocessing says."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from openvla_jax.config import VLAConfig


def prepare_image(image: np.ndarray, model: VLAConfig, preprocessing: Mapping[str, Any]) -> np.ndarray:
    """uint8 RGB [height, width, 3] of any size to uint8 [S, S, 3].

    Aspect ratio is ignored, as by the training pipeline. Raises ValueError for anything but a uint8 RGB image.
    """
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or 0 in image.shape:
        raise ValueError(f"image has dtype {image.dtype} and shape {image.shape}; give uint8 RGB [height, width, 3]")
    if preprocessing["resize_kernel"] != "lanczos3":
        raise ValueError(f"unknown preprocessing resize_kernel {preprocessing['resize_kernel']!r} in the checkpoint")
    image = resize_lanczos3(image, model.image_size, model.image_size)
    return center_crop(image) if preprocessing["center_crop"] else image


def center_crop(image: np.ndarray, area: float = 0.9) -> np.ndarray:
    """The middle of the image at its original size, for policies trained with random crops of that area.

    As the reference evaluates: `tf.image.crop_and_resize` (bilinear between the corners of the box), then uint8.
    """
    low, high = 0.5 - area**0.5 / 2, 0.5 + area**0.5 / 2
    rows, columns = (_bilinear_weights(size, low, high) for size in image.shape[:2])
    cropped = np.einsum("yh,xw,hwc->yxc", rows, columns, image.astype(np.float32) / 255, optimize=True)
    return (np.clip(cropped, 0, 1) * 255.5).astype(np.uint8)


@lru_cache(maxsize=64)
def _bilinear_weights(size: int, low: float, high: float) -> np.ndarray:
    """float32 [size, size]: samples evenly spaced from `low` to `high` of the way between first and last pixel."""
    position = np.linspace(low, high, size) * (size - 1)
    return np.maximum(0.0, 1 - np.abs(position[:, None] - np.arange(size))).astype(np.float32)


def resize_lanczos3(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """`tf.image.resize(method="lanczos3", antialias=True)`, rounded and clipped to uint8, without TensorFlow."""
    if image.shape[:2] == (height, width):
        return image
    rows, columns = _lanczos3_weights(image.shape[0], height), _lanczos3_weights(image.shape[1], width)
    resized = np.einsum("yh,xw,hwc->yxc", rows, columns, image.astype(np.float32), optimize=True)
    return np.clip(np.rint(resized), 0, 255).astype(np.uint8)


@lru_cache(maxsize=64)
def _lanczos3_weights(size: int, samples: int) -> np.ndarray:
    """float32 [samples, size]: Lanczos window of radius 3, widened when shrinking, half-pixel centres, rows sum to
    one.
    """
    scale = samples / size
    widen = max(1.0, 1.0 / scale)
    centres = (np.arange(samples) + 0.5) / scale
    distance = (np.arange(size) + 0.5 - centres[:, None]) / widen
    weights = np.where(np.abs(distance) < 3, np.sinc(distance) * np.sinc(distance / 3), 0.0)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
