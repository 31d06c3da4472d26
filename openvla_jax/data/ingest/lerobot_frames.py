"""Frames of LeRobot datasets: from videos, by their time, and from parquet files, by their row."""

import io
from collections.abc import Iterator, Sequence

import av
import numpy as np
import pyarrow
from PIL import Image

from openvla_jax.data import DataError
from openvla_jax.data.ingest.lerobot_meta import FIX, Video
from openvla_jax.errors import reading

TOLERANCE = 1e-4  # seconds between the time asked for and a frame's; LeRobot's `tolerance_s`
_LEAVE_OUT = "leave the camera out with --leave_out"


def video_frames(video: Video, times: np.ndarray, tolerance: float, rows: Sequence[str]) -> Iterator[np.ndarray]:
    """Yields a frame, uint8 [H, W, 3], for each time, float64 [T] in seconds from the start of the episode.

    It is the nearest frame of the episode's part of the video, as in LeRobot. times: increasing. rows: what errors
    call each. Raises DataError if the nearest frame is further off than `tolerance` seconds.
    """
    asked = video.start + times
    # Timestamps are stored in float32, whose spacing passes the tolerance in the course of an hour.
    allowed = tolerance + np.spacing(asked.astype(np.float32)).astype(np.float64)
    done = 0
    with reading(video.path, FIX, DataError):
        before: av.VideoFrame | None = None
        for frame in _decoded(video, float(asked[0])):
            while done < len(asked) and asked[done] <= frame.time:
                early = before is not None and asked[done] - before.time < frame.time - asked[done]
                yield _pixels(before if early else frame, asked[done], allowed[done], rows[done], video)
                done += 1
            if done == len(asked):
                return
            before = frame
        for t in range(done, len(asked)):
            yield _pixels(before, asked[t], allowed[t], rows[t], video)


def _decoded(video: Video, first: float) -> Iterator[av.VideoFrame]:
    """Yields the frames of the episode's part, in order, from the one before second `first` or earlier."""
    with av.open(str(video.path)) as container:
        if not container.streams.video:
            raise DataError.of(video.path, "has no video in it", FIX)
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        if first > 1 and stream.time_base:
            # A key frame is found by its decoding time, which is some frames before it is shown.
            container.seek(int((first - 1) / stream.time_base), stream=stream, backward=True)
        for frame in container.decode(stream):
            if frame.time is None or frame.time < video.start - TOLERANCE:
                continue
            if frame.time >= video.end - TOLERANCE:
                return  # the next episode begins
            yield frame


def _pixels(frame: av.VideoFrame | None, asked: float, allowed: float, row: str, video: Video) -> np.ndarray:
    if frame is None or not abs(frame.time - asked) <= allowed:
        nearest = "there is none" if frame is None else f"the nearest is at {frame.time:.4f} s"
        raise DataError.of(
            row,
            f"no frame of {video.path} is within {allowed:.6f} s of {asked:.4f} s; {nearest}",
            "leave the episode out, or allow more with --tolerance",
        )
    if len(frame.format.components) == 1:
        raise DataError.of(row, f"{video.path} has one channel ({frame.format.name}), as depth has", _LEAVE_OUT)
    return frame.to_ndarray(format="rgb24")


def stored_frames(cells: pyarrow.ChunkedArray, depth: bool, rows: Sequence[str]) -> Iterator[np.ndarray]:
    """Yields the images that are stored in the rows: uint8 [H, W, 3], or uint16 [H, W] in the stored unit for depth.

    rows: what errors call each. Raises DataError for an image that cannot be decoded, or that has one channel and is
    not depth or the reverse: PIL's conversion of 16 bits to colours would clip them.
    """
    for cell, row in zip(cells, rows, strict=True):
        with reading(row, FIX, DataError):
            value = cell.as_py()
            encoded = value.get("bytes") if isinstance(value, dict) else value
            if not encoded:
                raise DataError.of(row, "has no image in it", FIX)
            with Image.open(io.BytesIO(encoded)) as image:
                yield _depth(image, row) if depth else _colours(image, row)


def _colours(image: Image.Image, row: str) -> np.ndarray:
    if image.mode != "P" and len([band for band in image.getbands() if band != "A"]) == 1:
        raise DataError.of(row, f"the image has one channel (mode {image.mode}), as depth has", _LEAVE_OUT)
    return np.asarray(image.convert("RGB"))


def _depth(image: Image.Image, row: str) -> np.ndarray:
    if image.mode not in ("1", "L", "I") and not image.mode.startswith("I;16"):
        raise DataError.of(row, f"the image (mode {image.mode}) is no depth in whole numbers", _LEAVE_OUT)
    values = np.asarray(image)
    if values.min() < 0 or values.max() > np.iinfo(np.uint16).max:
        raise DataError.of(row, f"depths from {values.min()} to {values.max()} do not fit 16 bits", _LEAVE_OUT)
    return values.astype(np.uint16)
