"""Video files for tests, encoded with PyAV."""

import os
import struct
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def encode(
    path: Path,
    frames: np.ndarray,
    pts_ms: Sequence[int] | None = None,
    codec: str = "libx264",
    *,
    options: Mapping[str, str] | None = None,
    pix_fmt: str = "yuv420p",
    aspect: Fraction | None = None,
    title: str | None = None,
) -> Path:
    """Encode frames at 25 fps or at the given times, with a keyframe every 12 frames and the codec's B-frames."""
    with av.open(str(path), "w") as container:
        if title is not None:
            container.metadata["title"] = title
        stream = container.add_stream(codec, rate=25, options=dict(options or {}))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.codec_context.gop_size = pix_fmt, 12
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        if pts_ms is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for k, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            if pts_ms is not None:
                frame.pts, frame.time_base = pts_ms[k], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    # As root, SVT-AV1 gives this process real-time priority, and all tests after it would starve the machine.
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    return path


def audio_only(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def patch(source: Path, target: Path, box: bytes, offset: int, form: str, *values: int) -> Path:
    """Copy a file and overwrite numbers in an MP4 box, as cameras and editors may write them."""
    data = bytearray(source.read_bytes())
    struct.pack_into(form, data, data.index(box) + offset, *values)
    target.write_bytes(data)
    return target


def rotate(source: Path, target: Path, a: int, b: int, c: int, d: int) -> Path:
    """Copy an MP4 file with another display matrix."""
    one = 1 << 16
    return patch(source, target, b"tkhd", 44, ">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)
