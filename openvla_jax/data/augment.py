"""Image augmentation on the accelerator: what the reference does with tf.image on the host, op by op, in JAX.

The single ops take one float32 image in [0, 1] and a factor; `augment` draws the factors and runs the reference's chain
(crop, brightness, contrast, saturation, hue) on a batch of uint8. All is pure and static in shape. The chain works on
planes, [3, H, W]: with three channels as the innermost axis most of a vector register lies idle.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, UInt8

Image = Float[Array, "H W 3"]
Planes = Float[Array, "3 H W"]
Scalar = float | Float[Array, ""]


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """Strengths of the augmentation; the defaults are OpenVLA's. Hashable, so it can be a static argument of jit.

    crop_scale, crop_ratio: ranges of the crop's share of the area and of its width / height (relative to the image's).
    diagonal_crop: the reference draws scale, ratio and both offsets from one number, so its window slides along
        the main diagonal only; False draws them independently, and the window goes anywhere.
    brightness, hue: largest shift either way (hue in turns); contrast, saturation: ranges of the factor.
    Raises ValueError for a strength out of range.
    """

    crop_scale: tuple[float, float] = (0.9, 0.9)
    crop_ratio: tuple[float, float] = (1.0, 1.0)
    diagonal_crop: bool = True
    brightness: float = 0.2
    contrast: tuple[float, float] = (0.8, 1.2)
    saturation: tuple[float, float] = (0.8, 1.2)
    hue: float = 0.05

    def __post_init__(self) -> None:
        limits = {"crop_scale": (1e-3, 1.0), "crop_ratio": (1e-3, 1e3), "contrast": (0, 10), "saturation": (0, 10)}
        for name, (least, most) in limits.items():
            low, high = getattr(self, name)
            if not least <= low <= high <= most:
                raise ValueError(f"augment.{name} is {(low, high)}: give (low, high) within [{least}, {most}]")
        for name, most in {"brightness": 1.0, "hue": 0.5}.items():
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"augment.{name} is {getattr(self, name)}: give a number within [0, {most}]")


class Factors(NamedTuple):
    """What was drawn for one image; every field float32."""

    box: Float[Array, "4"]  # top, left, bottom, right in shares of the image
    brightness: Float[Array, ""]
    contrast: Float[Array, ""]
    saturation: Float[Array, ""]
    hue: Float[Array, ""]


def augment(
    key: PRNGKeyArray, images: UInt8[Array, "B H W 3"], config: AugmentConfig = AugmentConfig()
) -> UInt8[Array, "B H W 3"]:
    """Augments each image with draws of its own; equal keys give equal draws, whatever the sharding of the batch.

    The random numbers come from JAX: distributed as the reference's, but not the same.
    """
    keys = jax.random.split(key, images.shape[0])
    return jax.vmap(lambda key, image: apply_factors(image, draw_factors(key, config)))(keys, images)


def draw_factors(key: PRNGKeyArray, config: AugmentConfig = AugmentConfig()) -> Factors:
    """The random part for one image: a crop box and four uniform factors."""
    box, *keys = jax.random.split(key, 5)
    ranges = [(-config.brightness, config.brightness), config.contrast, config.saturation, (-config.hue, config.hue)]
    draws = [jax.random.uniform(k, (), jnp.float32, low, high) for k, (low, high) in zip(keys, ranges, strict=True)]
    return Factors(random_crop_box(box, config), *draws)


def apply_factors(image: UInt8[Array, "H W 3"], factors: Factors) -> UInt8[Array, "H W 3"]:
    """The deterministic part: the reference's chain and its rounding, clipped to [0, 1] after every op.

    Back to uint8 it truncates x * 255.5, as `tf.image.convert_image_dtype(x, tf.uint8, saturate=True)`.
    """
    pixels = jnp.moveaxis(image, -1, 0).astype(jnp.float32) * jnp.float32(1 / 255)
    pixels = jnp.clip(_cropped(pixels, factors.box, *image.shape[:2]), 0.0, 1.0)
    pixels = jnp.clip(adjust_brightness(pixels, factors.brightness), 0.0, 1.0)
    pixels = jnp.clip(_contrast(pixels, factors.contrast), 0.0, 1.0)
    pixels = jnp.clip(_saturation(pixels, factors.saturation), 0.0, 1.0)
    pixels = jnp.clip(_hue(pixels, factors.hue), 0.0, 1.0)
    return jnp.moveaxis(jnp.minimum(pixels * 255.5, 255.0).astype(jnp.uint8), 0, -1)


def random_crop_box(key: PRNGKeyArray, config: AugmentConfig = AugmentConfig()) -> Float[Array, "4"]:
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
    return jnp.moveaxis(_cropped(jnp.moveaxis(image, -1, 0), box, height, width), 0, -1)


def adjust_brightness(image: Image | Planes, delta: Scalar) -> Image | Planes:
    """Adds delta (`tf.image.adjust_brightness`)."""
    return image + delta


def adjust_contrast(image: Image, factor: Scalar) -> Image:
    """Scales the distance from each channel's mean over the image (`tf.image.adjust_contrast`)."""
    return jnp.moveaxis(_contrast(jnp.moveaxis(image, -1, 0), factor), 0, -1)


def adjust_saturation(image: Image, factor: Scalar) -> Image:
    """Scales the saturation in HSV and caps it at 1 (`tf.image.adjust_saturation`)."""
    return jnp.moveaxis(_saturation(jnp.moveaxis(image, -1, 0), factor), 0, -1)


def adjust_hue(image: Image, delta: Scalar) -> Image:
    """Turns the hue by delta, in turns (`tf.image.adjust_hue`)."""
    return jnp.moveaxis(_hue(jnp.moveaxis(image, -1, 0), delta), 0, -1)


# ---------------------------------------------------------------------------------------------------------------------
# The same on planes
# ---------------------------------------------------------------------------------------------------------------------


def _cropped(planes: Planes, box: Float[Array, "4"], height: int, width: int) -> Float[Array, "3 height width"]:
    rows = _sample_points(box[0], box[2], planes.shape[1], height)
    columns = _bilinear_weights(_sample_points(box[1], box[3], planes.shape[2], width), planes.shape[2])

    def by_product(planes: Planes) -> Float[Array, "3 height W"]:
        weights = _bilinear_weights(rows, planes.shape[1])
        return jnp.einsum("hH,cHW->chW", weights, planes, precision=jax.lax.Precision.HIGHEST)

    def by_gather(planes: Planes) -> Float[Array, "3 height W"]:
        above = jnp.floor(rows).astype(jnp.int32)
        below = jnp.minimum(above + 1, planes.shape[1] - 1)
        share = (rows - above)[:, None]
        return planes[:, above] * (1 - share) + planes[:, below] * share

    # A TPU multiplies faster than it gathers, and float32 products need to be asked for there.
    resized = jax.lax.platform_dependent(planes, tpu=by_product, default=by_gather)
    return jnp.einsum("chW,wW->chw", resized, columns, precision=jax.lax.Precision.HIGHEST)


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
    mean = planes.mean(axis=(1, 2), keepdims=True)
    return (planes - mean) * factor + mean


def _saturation(planes: Planes, factor: Scalar) -> Planes:
    # Hue and value stay, so every channel's distance from the largest scales alike; at saturation 1 the smallest is 0.
    value, chroma = _value_and_chroma(planes)
    scale = jnp.minimum(factor, value / jnp.where(chroma > 0, chroma, 1.0))
    return value - (value - planes) * scale


def _hue(planes: Planes, delta: Scalar) -> Planes:
    value, chroma = _value_and_chroma(planes)
    red, green, blue = planes
    inverse = 1 / jnp.where(chroma > 0, chroma, 1.0)
    sextant = jnp.where(
        value == red,
        (green - blue) * inverse,
        jnp.where(value == green, (blue - red) * inverse + 2, (red - green) * inverse + 4),
    )
    # Each channel falls from `value` to `value - chroma` and back over the circle of six sextants, a third apart.
    turned = sextant + 6 * delta + jnp.asarray([5.0, 3.0, 1.0])[:, None, None]
    turned -= 6 * jnp.floor(turned / 6)
    return value - chroma * jnp.clip(jnp.minimum(turned, 4 - turned), 0.0, 1.0)


def _value_and_chroma(planes: Planes) -> tuple[Float[Array, "H W"], Float[Array, "H W"]]:
    value = planes.max(axis=0)
    return value, value - planes.min(axis=0)


def _between(unit: Float[Array, ""], low: Scalar, high: Scalar) -> Float[Array, ""]:
    return low + unit * (high - low)
