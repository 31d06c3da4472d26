"""The augmentation against tf.image, op by op and as the whole chain, and the distribution of what it draws."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from openvla_jax.settings import AugmentConfig
from openvla_jax.vision import augment as augmentation
from openvla_jax.vision.augment import (
    Factors,
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    apply_factors,
    augment,
    crop_and_resize,
    draw_factors,
)

NOTHING = AugmentConfig((1.0, 1.0), (1.0, 1.0), True, 0.0, (1.0, 1.0), (1.0, 1.0), 0.0)


@pytest.fixture(scope="module")
def tf():
    tf = pytest.importorskip("tensorflow")
    tf.config.set_visible_devices([], "GPU")
    return tf


def levels(name: str, height: int = 37, width: int = 53) -> np.ndarray:
    """uint8 images that are hard in their own ways: ties between channels, greys, saturated and black pixels."""
    rng = np.random.default_rng(0)
    shape = (height, width, 3)
    return {
        "noise": lambda: rng.integers(0, 256, shape),
        "grey": lambda: np.broadcast_to(rng.integers(0, 256, (height, width, 1)), shape),
        "corners": lambda: 255 * rng.integers(0, 2, shape),
        "ties": lambda: 60 * rng.integers(0, 3, shape) + 50,
        "black": lambda: np.zeros(shape),
        "nearly black": lambda: rng.integers(0, 3, shape),
        "smooth": lambda: 127 + 120 * np.sin(np.indices((height, width)).sum(0)[..., None] / 9 + np.arange(3)),
    }[name]().astype(np.uint8)


IMAGES = ["noise", "grey", "corners", "ties", "black", "nearly black", "smooth"]


@pytest.fixture(params=IMAGES)
def image(request):
    return levels(request.param).astype(np.float32) / np.float32(255)


@pytest.mark.parametrize(
    ("ours", "name", "factors"),
    [
        (adjust_brightness, "adjust_brightness", (-0.2, 0.0, 0.13)),
        (adjust_contrast, "adjust_contrast", (0.0, 0.8, 1.0, 1.2, 2.0)),
        (adjust_saturation, "adjust_saturation", (0.0, 0.8, 1.0, 1.2, 3.0)),
        (adjust_hue, "adjust_hue", (-0.5, -0.05, 0.0, 0.02, 0.05, 0.31, 0.5)),
    ],
)
def test_op_equals_tensorflow(tf, image, ours, name, factors):
    for factor in factors:
        expected = getattr(tf.image, name)(image, factor).numpy()
        np.testing.assert_allclose(ours(jnp.asarray(image), factor), expected, atol=2e-6)


BOXES = [[0, 0, 1, 1], [0.02, 0.02, 0.9686833, 0.9686833], [0.1, 0.3, 0.5, 0.9], [0.7, 0.05, 0.75, 1.0]]


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("size", [(37, 53), (64, 20), (1, 7)])
def test_crop_equals_tensorflow(tf, image, box, size):
    expected = tf.image.crop_and_resize(image[None], np.array([box], np.float32), [0], size)[0].numpy()
    ours = crop_and_resize(jnp.asarray(image), jnp.asarray(box, jnp.float32), *size)
    np.testing.assert_allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("seed", range(3))
def test_chain_equals_tensorflow(tf, name, seed):
    """The reference's augment_image with the factors that were drawn here."""
    image = levels(name, 224, 224)
    config = AugmentConfig((0.5, 1.0), (0.8, 1.2), False, 0.3, (0.5, 1.5), (0.5, 1.5), 0.2) if seed else AugmentConfig()
    factors = draw_factors(jax.random.key(seed), config)
    drawn = Factors(*(np.asarray(factor) for factor in factors))
    x = tf.image.convert_image_dtype(image, tf.float32)
    x = tf.clip_by_value(tf.image.crop_and_resize(x[None], [drawn.box], [0], (224, 224))[0], 0, 1)
    x = tf.clip_by_value(tf.image.adjust_brightness(x, drawn.brightness), 0, 1)
    x = tf.clip_by_value(tf.image.adjust_contrast(x, drawn.contrast), 0, 1)
    x = tf.clip_by_value(tf.image.adjust_saturation(x, drawn.saturation), 0, 1)
    x = tf.clip_by_value(tf.image.adjust_hue(x, drawn.hue), 0, 1)
    expected = tf.image.convert_image_dtype(x, tf.uint8, saturate=True).numpy().astype(int)

    ours = np.asarray(jax.jit(apply_factors)(image, factors))

    assert ours.dtype == np.uint8
    difference = np.abs(ours - expected)
    # Where x * 255.5 comes close to an integer, the order of float32 operations decides between two levels.
    assert difference.max() <= 1
    assert (difference > 0).mean() < 5e-3


@pytest.mark.parametrize("size", [(224, 224), (30, 100), (100, 33), (5, 1)])
def test_a_cpu_resamples_and_joins_as_other_devices_do(size):
    """The programs of accelerators, run here too: `platform_dependent` would never choose them."""
    image = jnp.asarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))
    rows, columns = (jnp.linspace(3.2, last, n) for last, n in zip((59, 79), size, strict=True))
    whole = augmentation._resampled(image, rows, columns)
    blocks = augmentation._resampled_in_blocks(image, rows, columns)
    np.testing.assert_allclose(blocks, whole, atol=1e-6)
    assert np.std(whole) > 0.1
    np.testing.assert_array_equal(augmentation._joined_packed(*whole), augmentation._joined(*whole))


def test_default_strengths_are_the_references():
    assert AugmentConfig() == AugmentConfig((0.9, 0.9), (1.0, 1.0), True, 0.2, (0.8, 1.2), (0.8, 1.2), 0.05)


def test_no_strength_changes_nothing():
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=-1)
    images = np.concatenate([images, levels("noise", 16, 16)[None]])
    run = jax.jit(augment, static_argnames="config")
    np.testing.assert_array_equal(run(jax.random.key(0), jnp.asarray(images), NOTHING), images)


def test_draws_belong_to_key_and_image():
    images = jnp.asarray(levels("smooth"))[None].repeat(4, axis=0)
    run = jax.jit(augment)
    first = np.asarray(run(jax.random.key(3), images))
    np.testing.assert_array_equal(first, run(jax.random.key(3), images))
    assert len({row.tobytes() for row in [*first, *np.asarray(run(jax.random.key(4), images))]}) == 8


def test_draws_do_not_depend_on_sharding():
    """A batch spread over eight devices is augmented as on one."""
    images = jnp.asarray(levels("smooth"))[None].repeat(16, axis=0)
    sharding = NamedSharding(Mesh(np.array(jax.devices()).reshape(-1), ("data",)), PartitionSpec("data"))
    spread = jax.jit(augment, out_shardings=sharding)(jax.random.key(5), jax.device_put(images, sharding))
    assert len(spread.sharding.device_set) == 8
    difference = np.abs(np.asarray(spread, int) - np.asarray(jax.jit(augment)(jax.random.key(5), images), int))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3


def draws(config: AugmentConfig, count: int = 4000) -> Factors:
    factors = jax.jit(jax.vmap(lambda key: draw_factors(key, config)))(jax.random.split(jax.random.key(0), count))
    return Factors(*(np.asarray(factor, np.float64) for factor in factors))


def test_factors_are_uniform_and_independent():
    drawn = draws(AugmentConfig(brightness=0.3, contrast=(0.5, 1.1), saturation=(0.7, 1.6), hue=0.1))
    ranges = {"brightness": (-0.3, 0.3), "contrast": (0.5, 1.1), "saturation": (0.7, 1.6), "hue": (-0.1, 0.1)}
    for name, (low, high) in ranges.items():
        unit = (getattr(drawn, name) - low) / (high - low)
        assert -1e-6 <= unit.min() < 0.01 < 0.99 < unit.max() <= 1 + 1e-6, name
        assert abs(unit.mean() - 0.5) < 0.03, name
        assert abs(unit.var() - 1 / 12) < 0.005, name
    table = np.stack([drawn.box[:, 0], *(getattr(drawn, name) for name in ranges)])
    assert np.abs(np.corrcoef(table) - np.eye(5)).max() < 0.06


def test_the_references_crop_slides_along_the_diagonal():
    top, left, bottom, right = draws(AugmentConfig()).box.T
    side = np.sqrt(0.9)
    np.testing.assert_allclose(bottom - top, side, atol=1e-6)
    np.testing.assert_allclose(right - left, side, atol=1e-6)
    np.testing.assert_array_equal(top, left)
    unit = top / (1 - side)
    assert 0 <= unit.min() < 0.01 < 0.99 < unit.max() <= 1
    assert abs(unit.mean() - 0.5) < 0.03


def test_the_two_dimensional_crop_goes_anywhere():
    top, left, bottom, right = draws(AugmentConfig(diagonal_crop=False)).box.T
    np.testing.assert_allclose(bottom - top, np.sqrt(0.9), atol=1e-6)
    np.testing.assert_allclose(right - left, np.sqrt(0.9), atol=1e-6)
    assert abs(np.corrcoef(top, left)[0, 1]) < 0.06
    room = 1 - np.sqrt(0.9)
    counts = np.histogram2d(top, left, bins=4, range=[[0, room]] * 2)[0]
    assert counts.min() > 4000 / 16 * 0.7


def test_one_number_makes_the_references_box():
    """With ranges of scale and ratio the reference uses one uniform number four times."""
    config = AugmentConfig(crop_scale=(0.3, 0.7), crop_ratio=(0.75, 4 / 3))
    top, left, bottom, right = draws(config, 100).box.T
    unit = top / (1 - (bottom - top))
    scale = 0.3 + 0.4 * unit
    ratio = np.exp(np.log(0.75) + unit * (np.log(4 / 3) - np.log(0.75)))
    np.testing.assert_allclose(bottom - top, np.sqrt(scale / ratio), atol=1e-5)
    np.testing.assert_allclose(right - left, np.sqrt(scale * ratio), atol=1e-5)
    np.testing.assert_allclose(left, unit * (1 - (right - left)), atol=1e-5)
    assert unit.std() > 0.2


def test_a_wide_crop_stays_inside():
    config = AugmentConfig((0.9, 1.0), (0.5, 2.0), diagonal_crop=False)
    box = draws(config).box
    assert box.min() >= 0
    assert box.max() <= 1 + 1e-6


@pytest.mark.parametrize(
    ("strength", "message"),
    [
        ({"crop_scale": (0.9, 1.1)}, r"crop_scale is \(0.9, 1.1\)"),
        ({"crop_scale": (0.0, 0.9)}, "crop_scale"),
        ({"crop_ratio": (2.0, 1.0)}, "crop_ratio"),
        ({"contrast": (1.2, 0.8)}, "contrast"),
        ({"saturation": (-0.1, 1.0)}, "saturation"),
        ({"brightness": -0.2}, "brightness is -0.2"),
        ({"hue": 0.6}, "hue is 0.6"),
        ({"hue": float("nan")}, "hue is nan"),
    ],
)
def test_strengths_out_of_range(strength, message):
    with pytest.raises(ValueError, match=message):
        AugmentConfig(**strength)


def test_needs_no_tensorflow():
    code = "import sys, openvla_jax.vision.augment; sys.exit('tensorflow' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
