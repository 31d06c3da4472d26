"""Image augmentation on the accelerator: what the reference does with tf.image on the host, op by op, in JAX.

The single ops take one float32 image in [0, 1] and a factor; `augment` draws the factors and runs the reference's chain
(crop, brightness, contrast, saturation, hue) on a batch of uint8. All is pure and static in shape. The chain works on
planes, one [H, W] for each colour: with three channels as the innermost axis most of a vector register lies idle.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, UInt8

from openvla_jax.settings import AugmentConfig

OPENVLA = AugmentConfig()  # its strengths are the defaults
Image = Float[Array, "H W 3"]
Plane = Float[Array, "H W"]
Planes = Sequence[Plane]  # red, green, blue
Scalar = float | Float[Array, ""]

_BLOCK = 16  # columns that a CPU resizes at once


class Factors(NamedTuple):
    """What was drawn for one image; every field float32."""

    box: Float[Array, "4"]  # top, left, bottom, right in shares of the image
    brightness: Float[Array, ""]
    contrast: Float[Array, ""]
    saturation: Float[Array, ""]
    hue: Float[Array, ""]


def augment(
    key: PRNGKeyArray, images: UInt8[Array, "B H W 3"], config: AugmentConfig = OPENVLA
) -> UInt8[Array, "B H W 3"]:
    """Augments each image with its own draws; equal keys give equal draws, whatever the sharding of the batch.

    The random numbers come from JAX: distributed as the reference's, but not the same.
    """
    draw = lambda key: draw_factors(key, config)
    factors = jax.vmap(draw)(jax.random.split(key, images.shape[0]))
    # A CPU does one image after the other, which then stays in its cache; other devices do all at once.
    in_turn = lambda images, factors: jax.lax.map(lambda one: apply_factors(*one), (images, factors))
    return jax.lax.platform_dependent(images, factors, cpu=in_turn, default=jax.vmap(apply_factors))


def draw_factors(key: PRNGKeyArray, config: AugmentConfig = OPENVLA) -> Factors:
    """The random part for one image: a crop box and four uniform factors."""
    box, *keys = jax.random.split(key, 5)
    ranges = [(-config.brightness, config.brightness), config.contrast, config.saturation, (-config.hue, config.hue)]
    draws = [jax.random.uniform(k, (), jnp.float32, low, high) for k, (low, high) in zip(keys, ranges, strict=True)]
    return Factors(random_crop_box(box, config), *draws)


def apply_factors(image: UInt8[Array, "H W 3"], factors: Factors) -> UInt8[Array, "H W 3"]:
    """The deterministic part: the reference's chain and its rounding, clipped to [0, 1] after every op.

    Back to uint8 it truncates x * 255.5, as `tf.image.convert_image_dtype(x, tf.uint8, saturate=True)`.
    """
    planes = _clipped(_cropped(image, factors.box, *image.shape[:2]))
    planes = _clipped(adjust_brightness(plane, factors.brightness) for plane in planes)
    planes = _clipped(_contrast(planes, factors.contrast))
    planes = _clipped(_in_hsv(planes, factors.saturation, factors.hue))
    return _to_uint8(planes)


def random_crop_box(key: PRNGKeyArray, config: AugmentConfig = OPENVLA) -> Float[Array, "4"]:
    """A random box (top, left, bottom, right) in shares of the image, drawn as the reference's random_resized_crop."""
    unit = jax.random.uniform(key, () if config.diagonal_crop else (4,), jnp.float32)
    for_scale, for_ratio, for_top, for_left = jnp.broadcast_to(unit, (4,))
    scale = _between(for_scale, *config.crop_scale)
    ratio = jnp.exp(_between(for_ratio, *jnp.log(jnp.asarray(config.crop_ratio, jnp.float32))))
    height = jnp.clip(jnp.sqrt(scale / ratio), 0.0, 1.0)
    width = jnp.clip(jnp.sqrt(scale * ratio), 0.0, 1.0)
    top, left = for_top * (1 - height), for_left * (1 - width)
    return jnp.stack([top, left, top + height, left + width])


# ---------------------------------------------------------------------------------------------------------------------
# The ops of tf.image, on images [H, W, 3]; none is clipped
# ---------------------------------------------------------------------------------------------------------------------


def crop_and_resize(image: Image, box: Float[Array, "4"], height: int, width: int) -> Float[Array, "height width 3"]:
    """A box (top, left, bottom, right, all in [0, 1]) of an image, resized to [height, width, 3].

    `tf.image.crop_and_resize`: bilinear without antialiasing; the result's corners sample the corners of the box.
    """
    return jnp.stack(_cropped(image, box, height, width), axis=-1)


def adjust_brightness(image: Image | Plane, delta: Scalar) -> Image | Plane:
    """Adds delta (`tf.image.adjust_brightness`)."""
    return image + delta


def adjust_contrast(image: Image, factor: Scalar) -> Image:
    """Scales the distance from each channel's mean over the image (`tf.image.adjust_contrast`)."""
    return _on_planes(_contrast, image, factor)


def adjust_saturation(image: Image, factor: Scalar) -> Image:
    """Scales the saturation in HSV and caps it at 1 (`tf.image.adjust_saturation`)."""
    return _on_planes(_in_hsv, image, factor, 0.0)


def adjust_hue(image: Image, delta: Scalar) -> Image:
    """Turns the hue by delta, in turns (`tf.image.adjust_hue`)."""
    return _on_planes(_in_hsv, image, 1.0, delta)


def _on_planes(function: Callable[..., Planes], image: Image, *factors: Scalar) -> Image:
    return jnp.stack(function([image[..., channel] for channel in range(3)], *factors), axis=-1)


# ---------------------------------------------------------------------------------------------------------------------
# The same on planes
# ---------------------------------------------------------------------------------------------------------------------


def _clipped(planes: Iterable[Plane]) -> Planes:
    return [jnp.clip(plane, 0.0, 1.0) for plane in planes]


def _to_uint8(planes: Planes) -> UInt8[Array, "H W 3"]:
    return jax.lax.platform_dependent(*planes, cpu=_joined_packed, default=_joined)


def _joined(*planes: Plane) -> UInt8[Array, "H W 3"]:
    return jnp.stack([jnp.minimum(plane * 255.5, 255.0).astype(jnp.uint8) for plane in planes], axis=-1)


def _joined_packed(*planes: Plane) -> UInt8[Array, "H W 3"]:
    """The same on a CPU, where the planes would be computed again for each channel; one integer asks for them once."""
    red, green, blue = (jnp.minimum(plane * 255.5, 255.0).astype(jnp.int32) for plane in planes)
    return jax.lax.bitcast_convert_type(red + (green << 8) + (blue << 16), jnp.uint8)[..., :3]


def _cropped(image: Array, box: Float[Array, "4"], height: int, width: int) -> Planes:
    """Planes of a box of an image [H, W, 3]: float32, or uint8, which is scaled to [0, 1]."""
    rows = _sample_points(box[0], box[2], image.shape[0], height)
    columns = _sample_points(box[1], box[3], image.shape[1], width)
    return list(jax.lax.platform_dependent(image, rows, columns, cpu=_resampled_in_blocks, default=_resampled))


def _resampled(image: Array, rows: Float[Array, "height"], columns: Float[Array, "width"]) -> Planes:
    """Products are what accelerators are fast at; float32 ones need to be asked for."""
    by_row, by_column = _bilinear_weights(rows, image.shape[0]), _bilinear_weights(columns, image.shape[1])
    planes = jnp.moveaxis(_unit(image), -1, 0)
    return list(jnp.einsum("hH,cHW,wW->chw", by_row, planes, by_column, precision=jax.lax.Precision.HIGHEST))


def _resampled_in_blocks(image: Array, rows: Float[Array, "height"], columns: Float[Array, "width"]) -> Planes:
    """The same on a CPU, which gathers rows, as they are contiguous, and multiplies columns only by what has weight."""
    height, width, (size_y, size_x) = len(rows), len(columns), image.shape[:2]
    above = jnp.floor(rows).astype(jnp.int32)
    below = jnp.minimum(above + 1, size_y - 1)
    share = (rows - above)[:, None]
    pixels = image.reshape(size_y, -1)
    mixed = _unit(pixels[above]) * (1 - share) + _unit(pixels[below]) * share
    lines = jnp.moveaxis(mixed.reshape(height, -1, 3), -1, 0).reshape(3 * height, -1)
    # A block of output columns lies between the first input column that it needs and its last one.
    points = jnp.pad(columns, (0, -width % _BLOCK), mode="edge").reshape(-1, _BLOCK)
    reach = min(math.ceil(_BLOCK * max(size_x / width, 1)) + 1, size_x)
    first = jnp.minimum(jnp.floor(points[:, 0]).astype(jnp.int32), size_x - reach)

    def block(i: Array, result: Array) -> Array:
        near = jax.lax.dynamic_slice_in_dim(lines, first[i], reach, axis=1)
        weights = _bilinear_weights(points[i] - first[i], reach)
        columns = jnp.matmul(near, weights.T, precision=jax.lax.Precision.HIGHEST)
        return jax.lax.dynamic_update_slice_in_dim(result, columns, i * _BLOCK, axis=1)

    result = jax.lax.fori_loop(0, len(points), block, jnp.zeros((3 * height, points.size)))
    return list(result.reshape(3, height, -1)[..., :width])


def _unit(pixels: Array) -> Array:
    return pixels.astype(jnp.float32) * jnp.float32(1 / 255) if pixels.dtype == jnp.uint8 else pixels


def _sample_points(low: Scalar, high: Scalar, size: int, samples: int) -> Float[Array, "samples"]:
    """Points on an axis of `size` pixels, evenly from `low` to `high` (shares of size - 1), ends included."""
    if samples == 1:
        points = jnp.full((1,), 0.5 * (low + high) * (size - 1))
    else:
        points = low * (size - 1) + jnp.arange(samples) * ((high - low) * (size - 1) / (samples - 1))
    return jnp.clip(points, 0, size - 1)  # rounding must not step over the last pixel


def _bilinear_weights(points: Float[Array, "samples"], size: int) -> Float[Array, "samples size"]:
    """Weights of `size` pixels in each point."""
    return jnp.maximum(1 - jnp.abs(points[:, None] - jnp.arange(size)), 0.0)


def _contrast(planes: Planes, factor: Scalar) -> Planes:
    means = [plane.mean(axis=0).mean() for plane in planes]  # a CPU adds rows in vectors, all pixels one by one
    return [(plane - mean) * factor + mean for plane, mean in zip(planes, means, strict=True)]


def _in_hsv(planes: Planes, saturation: Scalar, hue: Scalar) -> Planes:
    """Scales the saturation, capped at 1, and turns the hue; the value stays. One conversion serves both."""
    red, green, blue = planes
    value = jnp.maximum(jnp.maximum(red, green), blue)
    chroma = value - jnp.minimum(jnp.minimum(red, green), blue)
    inverse = 1 / jnp.where(chroma > 0, chroma, 1.0)
    # Not `value == red`: a compiler may compute both again, and round them differently.
    sextant = jnp.where(
        (red >= green) & (red >= blue),
        (green - blue) * inverse,
        jnp.where(green >= blue, (blue - red) * inverse + 2, (red - green) * inverse + 4),
    )
    sextant += 6 * hue
    sextant -= 6 * jnp.floor(sextant * (1 / 6))
    chroma = jnp.minimum(chroma * saturation, value)  # chroma / value is the saturation
    # Around the circle of six sextants each channel rises from value - chroma to value and falls back, a third apart.
    shares = [jnp.abs(sextant - 3) - 1, 2 - jnp.abs(sextant - 2), 2 - jnp.abs(sextant - 4)]
    return [value - chroma * (1 - jnp.clip(share, 0.0, 1.0)) for share in shares]


def _between(unit: Float[Array, ""], low: Scalar, high: Scalar) -> Float[Array, ""]:
    return low + unit * (high - low)
