"""Camera frames: decode and resize, as the reference does it in TensorFlow."""

import numpy as np
import tensorflow as tf


def decode(encoded: tf.Tensor | bytes) -> tf.Tensor:
    """JPEG, PNG, BMP or the first frame of a GIF, scalar string -> uint8 [H, W, 3].

    JPEGs go through the integer-fast DCT, TensorFlow's choice in `decode_image`, which the reference trained with.
    """
    image = tf.io.decode_image(encoded, channels=3, expand_animations=False)
    return tf.ensure_shape(image, [None, None, 3])


def resize(image: tf.Tensor | np.ndarray, size: int) -> tf.Tensor:
    """uint8 [H, W, 3] -> uint8 [size, size, 3]: Lanczos-3 with antialiasing, aspect ignored, rounded half to even."""

    def lanczos() -> tf.Tensor:
        resized = tf.image.resize(image, (size, size), method="lanczos3", antialias=True)
        return tf.cast(tf.clip_by_value(tf.round(resized), 0, 255), tf.uint8)

    # At its own size every image is its own result; finding that out by computation would take most of the time.
    return tf.cond(tf.reduce_all(tf.shape(image)[:2] == size), lambda: tf.convert_to_tensor(image), lanczos)


def load(encoded: tf.Tensor, size: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Decodes and resizes without ever failing: (uint8 [size, size, 3], whether it could be decoded).

    An empty string, which stands for a camera that a dataset lacks, is black, as is an image that cannot be decoded.
    For graphs: an exception inside tf.data would lose the frame's name, so the caller gets a flag instead.
    """
    black = tf.zeros([size, size, 3], tf.uint8)

    def attempt():
        image = tf.data.Dataset.from_tensors(encoded).map(lambda x: (resize(decode(x), size), True)).ignore_errors()
        return image.concatenate(tf.data.Dataset.from_tensors((black, False))).take(1).get_single_element()

    return tf.cond(encoded == "", lambda: (black, True), attempt)


def reason(encoded: bytes) -> str:
    """Why an encoded image cannot be decoded, in a few words."""
    try:
        decode(tf.constant(encoded))
    except tf.errors.InvalidArgumentError as error:
        text = error.message.splitlines()[0].split("}} ")[-1].split(" [Op:")[0]
        return f"{len(encoded)} bytes starting {encoded[:4]!r}: {text}"
    return "it does decode when tried again: check memory and disk"
