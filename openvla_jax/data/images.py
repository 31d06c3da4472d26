"""Camera frames: decode and resize, as the reference does it in TensorFlow."""

import functools
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf


def decode(encoded: tf.Tensor | bytes) -> tf.Tensor:
    """JPEG, PNG, BMP or the first frame of a GIF, scalar string -> uint8 [H, W, 3].

    JPEGs go through the integer-fast DCT, TensorFlow's choice in `decode_image`, which the reference trained with.
    """
    image = tf.io.decode_image(encoded, channels=3, expand_animations=False)
    return tf.ensure_shape(image, [None, None, 3])


def resize(image: tf.Tensor | np.ndarray, size: int, expected: Sequence[tuple[int, int]] = ()) -> tf.Tensor:
    """uint8 [H, W, 3] -> uint8 [size, size, 3]: Lanczos-3 with antialiasing, aspect ignored, rounded half to even.

    Images of `expected` (height, width) take about half the time, as their weights are part of the graph. Others give
    what `tf.image.resize` gives, bit for bit; one value in a thousand may differ by one between the two ways.
    """
    image = tf.convert_to_tensor(image)
    shape = tf.shape(image)[:2]
    # At its own size every image is its own result; finding that out by computation would take most of the time.
    ways = {(size, size): lambda: image}
    ways |= {pair: functools.partial(_by_products, image, *pair, size) for pair in expected if pair not in ways}
    matches = [tf.reduce_all(shape == pair) for pair in ways]
    way = tf.argmax(tf.cast(tf.stack([*matches, True]), tf.int32), output_type=tf.int32)
    result = tf.switch_case(way, [*ways.values(), lambda: _by_tensorflow(image, shape, size)])
    return tf.ensure_shape(result, [size, size, 3])


def _by_tensorflow(image: tf.Tensor, shape: tf.Tensor, size: int) -> tf.Tensor:
    height, width = shape[0], shape[1]
    rows = tf.reshape(_along_first(image, height, size), [size, width, 3])
    resized = _along_first(tf.transpose(rows, [1, 0, 2]), width, size)
    return tf.transpose(tf.reshape(_rounded(resized), [size, size, 3]), [1, 0, 2])


def _along_first(pixels: tf.Tensor, length: tf.Tensor, size: int) -> tf.Tensor:
    # As channels of an image one pixel wide, all that shares a row is summed in vectors; with three channels the
    # kernel's inner loop is three long, which takes most of its time.
    column = tf.reshape(pixels, [1, length, 1, -1])
    return tf.image.resize(column, (size, 1), method="lanczos3", antialias=True)


def _by_products(image: tf.Tensor, height: int, width: int, size: int) -> tf.Tensor:
    pixels = tf.reshape(tf.cast(image, tf.float32), [height, width * 3])
    rows = tf.concat([tf.matmul(weights, pixels[low:high]) for low, high, weights in _bands(height, size, 28)], axis=0)
    columns = [
        tf.matmul(rows[:, 3 * low : 3 * high], np.kron(weights.T, np.eye(3, dtype=np.float32)))
        for low, high, weights in _bands(width, size, 14)
    ]
    return tf.reshape(_rounded(tf.concat(columns, axis=1)), [size, size, 3])


def _bands(length: int, size: int, block: int) -> list[tuple[int, int, np.ndarray]]:
    """Weights of `size` samples among `length` pixels, `block` samples at a time: (first pixel that they need, the one
    after the last, weights [samples, pixels])."""
    with tf.init_scope():  # now, also while a graph is being made
        weights = _along_first(tf.eye(length), tf.constant(length), size).numpy().reshape(size, length)
    parts = np.split(weights, range(block, size, block))
    bands = []
    for part in parts:
        needed = np.flatnonzero(part.any(axis=0)).tolist()
        low, high = needed[0], needed[-1] + 1
        bands.append((low, high, part[:, low:high]))
    return bands


def _rounded(pixels: tf.Tensor) -> tf.Tensor:
    return tf.cast(tf.clip_by_value(tf.round(pixels), 0, 255), tf.uint8)


def decode_and_resize(
    encoded: tf.Tensor, size: int, expected: Sequence[tuple[int, int]] = ()
) -> tuple[tf.Tensor, tf.Tensor]:
    """Decodes and resizes N images without ever failing: (uint8 [N, size, size, 3], which could be decoded, bool [N]).

    An empty string, which stands for a camera that a dataset lacks, is black, as is an image that cannot be decoded.
    For graphs: an exception inside tf.data would lose the frame's name, so the caller gets a flag instead.
    """
    black = tf.zeros([size, size, 3], tf.uint8)
    return _each(encoded, lambda image: resize(decode(image), size, expected), black)


def decodable(encoded: tf.Tensor) -> tf.Tensor:
    """Whether training can decode each of N images, bool [N]; an empty string counts as black, as above."""
    return _each(encoded, lambda image: decode(image)[:1, :1], tf.zeros([1, 1, 3], tf.uint8))[1]


def _each(encoded: tf.Tensor, work: Callable[[tf.Tensor], tf.Tensor], black: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Applies `work` to N encoded images; returns the results, black for those that fail, and which did not, bool [N].

    What catches an error takes longer to set up than an image to decode, so it is set up for many at once.
    """
    count = tf.shape(encoded)[0]

    def one(number: tf.Tensor, encoded: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return number, tf.cond(encoded == "", lambda: black, lambda: work(encoded))

    numbered = tf.data.Dataset.from_tensor_slices((tf.range(count), encoded))
    good = numbered.map(one).ignore_errors().concatenate(tf.data.Dataset.from_tensors((count, black)))
    numbers, images = good.batch(tf.cast(count, tf.int64) + 1).get_single_element()
    last = tf.size(numbers) - 1
    places = tf.tensor_scatter_nd_update(tf.fill([count + 1], last), numbers[:, None], tf.range(last + 1))[:count]
    return tf.gather(images, places), places < last


def reason(encoded: bytes) -> str:
    """Why an encoded image cannot be decoded, in a few words."""
    try:
        decode(tf.constant(encoded))
    except tf.errors.InvalidArgumentError as error:
        text = error.message.splitlines()[0].split("}} ")[-1].split(" [Op:")[0]
        return f"{len(encoded)} bytes starting {encoded[:4]!r}: {text}"
    return "it does decode when tried again: check memory and disk"
