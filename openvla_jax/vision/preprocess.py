"""A camera image to the pixels that the model was trained on, as the checkpoint's preprocessing says.

`prepare_image` is the one function that does it: for the policy, the server and the evaluator. The trainer's data
pipeline resizes in TensorFlow, which `resize_lanczos3` repeats, and crops its validation frames with `center_crop`.
"""

import io
import logging
from functools import lru_cache

import numpy as np
from PIL import Image

try:
    import simplejpeg
except ModuleNotFoundError:  # a platform without a wheel of it: see `jpeg_round_trip`
    simplejpeg = None

from openvla_jax.config import VLAConfig
from openvla_jax.errors import InputError
from openvla_jax.types import Preprocessing

JPEG_QUALITY = 95  # what the reference's evaluations encode with


def prepare_image(image: np.ndarray, model: VLAConfig, preprocessing: Preprocessing) -> np.ndarray:
    """uint8 RGB [height, width, 3] of any size to uint8 [S, S, 3].

    `jpeg` encodes and decodes first, as the reference's LIBERO and Bridge evaluations do to meet the artefacts of
    their training data; images of the model's size are left alone, as by OpenVLA-OFT. `resize_kernel` "lanczos3"
    resizes as this project's training does (aspect ratio ignored),
    "bicubic" as the Hugging Face processor does, by the model's `resize` strategy. A centre crop of `crop_area` comes
    last. Raises InputError for anything but a uint8 RGB image.
    """
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or 0 in image.shape:
        raise InputError(f"image has dtype {image.dtype} and shape {image.shape}; give uint8 RGB [height, width, 3]")
    if preprocessing.jpeg and image.shape[:2] != (model.image_size, model.image_size):
        image = jpeg_round_trip(image)
    if preprocessing.resize_kernel == "lanczos3":
        image = resize_lanczos3(image, model.image_size, model.image_size)
    else:
        fill = tuple(int(255 * value) for value in model.towers[-1].mean)
        image = resize_bicubic(image, model.image_size, model.resize, fill)
    return image if preprocessing.crop_area is None else center_crop(image, preprocessing.crop_area)


def jpeg_round_trip(image: np.ndarray) -> np.ndarray:
    """The image as it comes back from JPEG, as TensorFlow encodes and decodes by default: quality 95, colour at half
    resolution, decoded with the fast transform.

    Pillow knows only the accurate transform. If simplejpeg is missing, it decodes all the same, with one warning.
    """
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling="4:2:0")
    if simplejpeg is None:
        warn_of_pillow()
        return np.asarray(Image.open(buffer))
    return simplejpeg.decode_jpeg(buffer.getvalue(), fastdct=True, fastupsample=False)


@lru_cache(maxsize=1)  # once
def warn_of_pillow() -> None:
    logging.warning(
        "simplejpeg is missing: Pillow decodes JPEG otherwise than in training, pixels differ by up to 6 of 255; "
        "pip install simplejpeg"
    )


def center_crop(image: np.ndarray, area: float) -> np.ndarray:
    """Returns the middle `area` (a share) of the image at its original size, for policies trained with random crops.

    As the reference evaluates, operation by operation in float32, because truncation to uint8 shows the last bit:
    `tf.image.crop_and_resize` (bilinear between the corners of the box), then `tf.image.convert_image_dtype`.
    """
    share = np.sqrt(np.float32(area))
    low = (1 - share) / 2
    (top, bottom, down), (left, right, across) = (_corners(size, low, low + share) for size in image.shape[:2])
    unit = image.astype(np.float32) * np.float32(1 / 255)
    rows = unit[:, left] + (unit[:, right] - unit[:, left]) * across[:, None]
    cropped = rows[top] + (rows[bottom] - rows[top]) * down[:, None, None]
    return (np.clip(cropped, 0, 1) * np.float32(255.5)).astype(np.uint8)


def _corners(size: int, low: np.float32, high: np.float32) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels before and after `size` points, evenly spaced from `low` to `high` of the way between first and last
    pixel, and how far each point is from the one before.
    """
    last = np.float32(size - 1)
    step = (high - low) * last / max(last, np.float32(1))
    points = low * last + np.arange(size, dtype=np.float32) * step
    before = np.floor(points)
    after = np.minimum(np.ceil(points), last)
    return before.astype(np.int64), after.astype(np.int64), points - before


# ---------------------------------------------------------------------------------------------------------------------
# As the Hugging Face processor: PIL
# ---------------------------------------------------------------------------------------------------------------------


def resize_bicubic(image: np.ndarray, size: int, strategy: str, fill: tuple[int, ...]) -> np.ndarray:
    """uint8 [size, size, 3] as the reference's processor makes it (torchvision's resize and centre crop on PIL images).

    `strategy` "resize-naive" ignores the aspect ratio; "resize-crop" brings the short side to `size` and crops the
    middle; "letterbox" first pads to a square with `fill`, the same number of pixels on both sides.
    """
    picture = Image.fromarray(image)
    if strategy == "resize-naive":
        return np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC))
    if strategy == "letterbox":
        longer = max(picture.size)
        # Half the difference, rounded down: an odd one leaves the picture a pixel short of square.
        left, top = ((longer - side) // 2 for side in picture.size)
        square = Image.new("RGB", (picture.width + 2 * left, picture.height + 2 * top), fill)
        square.paste(picture, (left, top))
        picture = square
    shorter = min(picture.size)
    width, height = (size if side == shorter else int(size * side / shorter) for side in picture.size)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return np.asarray(picture.crop((left, top, left + size, top + size)))


# ---------------------------------------------------------------------------------------------------------------------
# As training: TensorFlow's Lanczos
# ---------------------------------------------------------------------------------------------------------------------


def resize_lanczos3(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """`tf.image.resize(method="lanczos3", antialias=True)`, rounded and clipped to uint8, without TensorFlow."""
    if image.shape[:2] == (height, width):
        return image
    rows, columns = _lanczos3_weights(image.shape[0], height), _lanczos3_weights(image.shape[1], width)
    resized = np.einsum("yh,xw,hwc->yxc", rows, columns, image.astype(np.float32), optimize=True)
    return np.clip(np.rint(resized), 0, 255).astype(np.uint8)


@lru_cache(maxsize=16)  # cameras are few; anybody may send any size
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
