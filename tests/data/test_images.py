"""Images: decoding and resizing as the reference, and what cannot be decoded."""

import numpy as np
import pytest
import tensorflow as tf
from conftest import golden

from openvla_jax.data import images


def test_resize_equals_the_reference():
    with np.load(golden("pipeline/bridge.npz")) as file:
        arrays = dict(file)
    for number in range(5):
        image = arrays[f"traj{number}/image/decoded"]
        np.testing.assert_array_equal(images.resize(image, 224), arrays[f"traj{number}/image/resized224"])


def test_decoding_a_jpeg_is_within_what_decoders_differ_by():
    with np.load(golden("pipeline/bridge.npz")) as file:
        arrays = dict(file)
    for number in range(5):
        decoded = images.decode(arrays[f"traj{number}/image/jpeg"].tobytes()).numpy()
        difference = np.abs(decoded.astype(int) - arrays[f"traj{number}/image/decoded"].astype(int))
        assert difference.max() <= 14
        assert difference.mean() < 1


def _lanczos(size_in, size_out):
    """Rows of weights [out, in] of Lanczos-3, stretched when shrinking."""
    scale = size_in / size_out
    width = max(scale, 1.0)
    places = (np.arange(size_out) + 0.5) * scale - 0.5
    x = (np.arange(size_in)[None] - places[:, None]) / width
    weights = np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0)
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize(("height", "width"), [(256, 256), (480, 640), (100, 50), (224, 224), (7, 300)])
def test_resize_equals_lanczos_in_numpy(height, width):
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    rows = np.einsum("yh,hwc->ywc", _lanczos(height, 56), image.astype(np.float64))
    exact = np.einsum("xw,ywc->yxc", _lanczos(width, 56), rows)
    result = images.resize(image, 56).numpy().astype(int)
    assert np.abs(result - np.clip(np.round(exact), 0, 255)).max() <= 1
    assert (result == np.clip(np.round(exact), 0, 255)).mean() > 0.99


@pytest.mark.parametrize(("height", "width"), [(256, 256), (480, 640), (100, 50), (7, 300)])
def test_resize_is_bit_equal_to_tensorflow_s_own_call(height, width):
    image = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    resized = tf.image.resize(image, (224, 224), method="lanczos3", antialias=True)
    resized = np.clip(np.round(resized), 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(images.resize(image, 224), resized)
    # With weights in the graph sums are taken in another order.
    expected = images.resize(image, 224, [(224, 224), (9, 9), (height, width)]).numpy().astype(int)
    assert np.abs(expected - resized).max() <= 1 and (expected == resized).mean() > 0.998


def test_one_graph_resizes_images_of_expected_and_of_other_sizes():
    encoded = [tf.io.encode_png(np.full((height, 20, 3), height, np.uint8)) for height in (30, 16, 40, 8)]
    load = tf.function(lambda encoded: images.decode_and_resize(encoded, 16, [(30, 20), (40, 20)]))
    pixels, decoded = load(tf.stack([*encoded, b"", b"broken"]))
    assert decoded.numpy().tolist() == [True] * 5 + [False]
    assert [np.unique(image).tolist() for image in pixels.numpy()] == [[30], [16], [40], [8], [0], [0]]


def test_images_of_all_kinds_become_rgb():
    rng = np.random.default_rng(0)
    for channels, expected in ((1, lambda x: np.repeat(x, 3, 2)), (3, lambda x: x), (4, lambda x: x[..., :3])):
        image = rng.integers(0, 256, (9, 5, channels), dtype=np.uint8)
        image[..., 3:] = 255
        np.testing.assert_array_equal(images.decode(tf.io.encode_png(image)), expected(image))


def test_loading_never_fails_and_says_so():
    image = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    png, jpeg = tf.io.encode_png(image).numpy(), tf.io.encode_jpeg(image).numpy()
    texts = [png, jpeg, b"", b"no image", jpeg[:100], png[:-40]]
    dataset = tf.data.Dataset.from_tensor_slices(texts).batch(4).map(lambda x: images.decode_and_resize(x, 224))
    loaded, decoded = (np.concatenate(parts) for parts in zip(*dataset.as_numpy_iterator(), strict=True))
    assert decoded.tolist() == [True, True, True, False, False, False]  # the second batch has no good one
    np.testing.assert_array_equal(loaded[0], image)  # of the right size already
    assert all(not loaded[i].any() for i in (2, 3, 4, 5))
    assert images.reason(texts[3]).startswith("8 bytes starting b'no i': ")
    assert images.reason(jpeg[:100]).startswith(r"100 bytes starting b'\xff\xd8\xff\xe0': ")
    assert all("\n" not in images.reason(text) and "node" not in images.reason(text) for text in texts[3:])
