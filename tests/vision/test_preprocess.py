"""Image preparation: the Hugging Face processor's output, TensorFlow's, and refusals."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import golden
from PIL import Image

from openvla_jax.config import preset, tiny
from openvla_jax.settings import AugmentConfig
from openvla_jax.types import Preprocessing
from openvla_jax.vision import preprocess
from openvla_jax.vision.augment import Factors, apply_factors
from openvla_jax.vision.preprocess import (
    center_crop,
    jpeg_round_trip,
    prepare_image,
    resize_bicubic,
    resize_lanczos3,
)

BICUBIC = Preprocessing(resize_kernel="bicubic")
RECIPES = {
    "dinosiglip_naive": ("openvla-7b", "resize-naive"),
    "dinosiglip_crop": ("openvla-7b", "resize-crop"),
    "siglip_letterbox": ("openvla-v01-7b", "letterbox"),
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("size", ["0_640x480", "1_256x256", "2_224x224", "3_100x50", "4_321x457", "5_1280x720"])
def test_pixels_are_the_hugging_face_processor_s(recipe, size):
    path = golden(f"images/{size}.png")
    with np.load(golden("images/expected.npz"), allow_pickle=False) as arrays:
        expected = arrays[f"{recipe}/{size[0]}"]
    name, resize = RECIPES[recipe]
    config = dataclasses.replace(preset(name), resize=resize)
    prepared = prepare_image(np.asarray(Image.open(path)), config, BICUBIC)
    pixels = [(prepared / np.float32(255) - np.float32(t.mean)) / np.float32(t.std) for t in config.towers]
    got = np.concatenate(pixels, axis=-1).transpose(2, 0, 1)[:, ::5, ::5]
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


def test_odd_differences_crop_and_pad_as_torchvision_does():
    image = np.random.default_rng(0).integers(0, 256, (11, 8, 3), dtype=np.uint8)
    # (11 - 8) // 2 = 1 pixel on each side: 11 x 10, short side to 20 gives 22 rows, of which 1..20 stay.
    padded = np.full((11, 10, 3), (1, 2, 3), np.uint8)
    padded[:, 1:9] = image
    wide = np.asarray(Image.fromarray(padded).resize((20, 22), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(resize_bicubic(image, 20, "letterbox", (1, 2, 3)), wide[1:21])
    # The short side, 8, to 20: int(20 * 11 / 8) = 27 rows; (27 - 20) / 2 = 3.5 rounds to even, 4.
    tall = np.asarray(Image.fromarray(image).resize((20, 27), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(resize_bicubic(image, 20, "resize-crop", (0, 0, 0)), tall[4:24])


@pytest.mark.parametrize("size", [(100, 50), (56, 56), (30, 41), (480, 640)])
def test_resize_equals_tensorflow(size):
    tf = pytest.importorskip("tensorflow")
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    theirs = tf.image.resize(image, (56, 56), method="lanczos3", antialias=True)
    theirs = tf.cast(tf.clip_by_value(tf.round(theirs), 0, 255), tf.uint8).numpy()
    difference = np.abs(resize_lanczos3(image, 56, 56).astype(int) - theirs)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3


@pytest.mark.parametrize("area", [0.9, 0.7, 0.8100001, 0.9999999, 1.0])
@pytest.mark.parametrize("size", [224, 64])
def test_center_crop_equals_tensorflow(area, size):
    """The reference's `crop_and_resize` with its box, bit for bit."""
    tf = pytest.importorskip("tensorflow")
    image = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    share = tf.clip_by_value(tf.sqrt(tf.constant(area, tf.float32)), 0, 1)
    low = (1 - share) / 2
    box = [[low, low, low + share, low + share]]
    theirs = tf.image.crop_and_resize(tf.image.convert_image_dtype(image, tf.float32)[None], box, [0], (size, size))[0]
    theirs = tf.image.convert_image_dtype(tf.clip_by_value(theirs, 0, 1), tf.uint8, saturate=True).numpy()
    np.testing.assert_array_equal(center_crop(image, area), theirs)


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 9, 3), (2, 300, 3)])
def test_center_crop_keeps_the_shape_of_any_image(shape):
    image = np.full(shape, 200, np.uint8)
    assert center_crop(image, 0.9).shape == shape and (np.abs(center_crop(image, 0.9) - 200.0) <= 1).all()


def smooth_image():
    rng = np.random.default_rng(0)
    return np.asarray(Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((256, 192)))


def test_jpeg_round_trip_is_tensorflow_s():
    tf = pytest.importorskip("tensorflow")
    pytest.importorskip("simplejpeg")
    image = smooth_image()
    decoded = tf.io.decode_image(tf.io.encode_jpeg(image, quality=95), expand_animations=False).numpy()
    np.testing.assert_array_equal(jpeg_round_trip(image), decoded)


def test_jpeg_round_trip_without_simplejpeg_warns_once(monkeypatch, caplog):
    monkeypatch.setattr(preprocess, "simplejpeg", None)
    preprocess.warn_of_pillow.cache_clear()
    image = smooth_image()
    difference = np.abs(jpeg_round_trip(image).astype(int) - image)
    jpeg_round_trip(image)
    assert 0 < difference.mean() < 3
    assert [record.message for record in caplog.records if "pip install simplejpeg" in record.message] != []
    assert len(caplog.records) == 1
    preprocess.warn_of_pillow.cache_clear()


@pytest.mark.parametrize("name", ["0_640x480", "1_256x256", "2_224x224"])
def test_prepare_image_is_the_reference_s_serving_path(name):
    """OpenVLA-OFT's `resize_image_for_policy` and `center_crop_image`."""
    pytest.importorskip("simplejpeg")
    with np.load(golden("oft_tiny/preprocess.npz"), allow_pickle=False) as arrays:
        expected = {step: arrays[f"{name}/{step}"] for step in ("resized", "cropped") if f"{name}/{step}" in arrays}
    image = np.asarray(Image.open(golden(f"images/{name}.png")))
    for step, area in (("resized", None), ("cropped", 0.9)):
        if step in expected:
            settings = Preprocessing("lanczos3", crop_area=area, jpeg=True)
            got = prepare_image(image, preset("openvla-7b"), settings).astype(int)
            assert np.abs(got - expected[step]).max() <= 1 and (got != expected[step]).mean() < 1e-3


def test_the_steps_come_in_the_order_of_the_reference_s_evaluation():
    image = np.random.default_rng(1).integers(0, 256, (90, 70, 3), dtype=np.uint8)
    config = tiny()
    settings = Preprocessing(crop_area=0.8, jpeg=True)
    expected = center_crop(resize_lanczos3(jpeg_round_trip(image), 56, 56), 0.8)
    np.testing.assert_array_equal(prepare_image(image, config, settings), expected)
    # Training resizes to a square first, in the reference too, so that letterboxing afterwards does nothing.
    plain = prepare_image(image, dataclasses.replace(config, resize="letterbox"), Preprocessing())
    np.testing.assert_array_equal(plain, resize_lanczos3(image, 56, 56))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resize_kernel": "lanczos"}, "did you mean 'lanczos3'"),
        ({"crop_area": 0.0}, "crop_area is 0.0: give a share"),
        ({"crop_area": 1.5}, "crop_area is 1.5"),
        ({"text_length": 0}, "text_length is 0"),
        ({"center_crop": True}, "unknown key 'center_crop'"),
    ],
)
def test_preprocessing_names_a_wrong_setting(change, message):
    with pytest.raises(ValueError, match=message):
        Preprocessing.from_dict(change)


@pytest.mark.parametrize("area", [(1.0, 1.0), (0.8, 0.8), (0.9, 0.9), (0.7, 0.9)])
def test_a_policy_sees_the_centre_of_what_training_augments(area):
    """Training's own crop, put in the middle and with neutral colours, against what a policy prepares."""
    image = np.random.default_rng(2).integers(0, 256, (56, 56, 3), dtype=np.uint8)
    crop_area = AugmentConfig(crop_scale=area, enabled=True).policy_crop_area
    assert crop_area == (None if area == (1.0, 1.0) else pytest.approx(sum(area) / 2))
    low, high = 0.5 - (crop_area or 1) ** 0.5 / 2, 0.5 + (crop_area or 1) ** 0.5 / 2
    box, zero, one = jnp.float32([low, low, high, high]), jnp.float32(0), jnp.float32(1)
    trained = np.asarray(apply_factors(jnp.asarray(image), Factors(box, zero, one, one, zero)))
    served = prepare_image(image, tiny(), Preprocessing(crop_area=crop_area))
    assert np.abs(trained.astype(int) - served).max() <= 1
    other = prepare_image(image, tiny(), Preprocessing(crop_area=0.6))
    assert np.abs(trained.astype(int) - other).max() > 30, "the crop matters for such an image"
