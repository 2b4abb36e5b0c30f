"""Probing and reading of videos and images: the functions that the other packages use.

PyAV decodes strictly and in a single pass (`decode`). Frames are chosen by the container's timestamps (`timeline`),
scaled from the decoded planes and cropped one by one (`pixels`). PyAV 18 and 19 are supported, and comments mark the
differences. decord is an option for files that are known to be intact (`decord_reader`). Images and animated WebP are
read by Pillow (`images`).

PyAV, decord and PIL are imported inside functions, because training from a cache needs no decoder.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cogds.core.geometry import ClipShape
from cogds.data.video import images
from cogds.data.video.container import open_container
from cogds.data.video.decode import decode_range, repeat
from cogds.data.video.decord_reader import UnreliableError, read_decord
from cogds.data.video.errors import DecodeError
from cogds.data.video.images import read_image
from cogds.data.video.pixels import Fitter, colors_of, displayed_size, turns_of
from cogds.data.video.timeline import (
    TIME_TOLERANCE_S,
    Timeline,
    VideoInfo,
    cached_timeline,
    displayed_frames,
    num_frames_at,
    read_timeline,
)
from cogds.data.video.writer import write_video

if TYPE_CHECKING:
    from av import VideoFrame

__all__ = [
    "DECODERS",
    "PIXELS_VERSION",
    "TIME_TOLERANCE_S",
    "DecodeError",
    "VideoInfo",
    "num_frames_at",
    "probe_image",
    "probe_video",
    "read_clip",
    "read_image",
    "write_video",
]

DECODERS = ("pyav", "decord")
# Increase this if the same file would give other pixels, so that clips are encoded again. Captions are not.
PIXELS_VERSION = 3


def probe_video(path: str | Path) -> VideoInfo:
    """Read the times of all frames and decode the first one. Raises DecodeError if the file cannot be used."""
    if images.is_webp(path):
        return images.probe_animation(path)
    with open_container(path) as container:
        timeline, frame = read_timeline(container)
    height, width = displayed_size(frame, timeline.pixel_aspect)
    colors = colors_of(frame)
    steps = {
        "deinterlaced": bool(timeline.deinterlacing),
        "tone-mapped from HDR": colors.is_hdr,
        "converted from a wide gamut": colors.is_wide and not colors.is_hdr,
    }
    return VideoInfo(
        num_frames=len(timeline.pts),
        fps=timeline.fps,
        width=width,
        height=height,
        duration_s=timeline.duration_s,
        rotation=-90 * turns_of(frame) % 360,
        processing=", ".join(name for name, is_needed in steps.items() if is_needed),
    )


def probe_image(path: str | Path) -> VideoInfo:
    """Decode an image, or probe an animation. Raises DecodeError if the file cannot be used."""
    return probe_video(path) if images.is_animation(path) else images.probe_image(path)


def read_clip(
    path: str | Path,
    shape: ClipShape,
    fps: float,
    start_s: float = 0.0,
    end_s: float | None = None,
    decoder: str = "pyav",
    *,
    is_padded: bool = False,
) -> np.ndarray:
    """Decode, resample in time, resize to cover and crop the center: uint8 [F, H, W, 3], C-contiguous.

    Frame k is the source frame displayed `start_s + k / fps` seconds after the first one. Slow sources repeat frames,
    and variable frame rates are handled correctly. Colors follow the stream's matrix and range. As in FFmpeg, the
    default is BT.601 with limited range. Memory: the result and a few frames of the source.

    Args:
        end_s: end of the usable range, in seconds after the first frame.
        decoder: "pyav" seeks to the last keyframe before the clip, and decodes from the start if the timestamps after
            the seek are wrong. "decord" decodes from the start and does not detect damage.
        is_padded: whether the last frame is displayed for one frame longer, so that one may be missing.

    Raises:
        DecodeError: the file is damaged or too short, or decord is not reliable for it.
    """
    if fps <= 0 or start_s < 0 or decoder not in DECODERS:
        raise ValueError(
            f"fps must be above 0, start_s at least 0, decoder one of {DECODERS}: got {fps}, {start_s} and {decoder!r}"
        )
    times_s = [start_s + k / fps for k in range(shape.frames)]
    if images.is_webp(path):
        return images.read_animation(path, shape, times_s, end_s, is_padded=is_padded)
    with open_container(path) as container:
        timeline = cached_timeline(path, container)
        indices = displayed_frames(timeline, times_s, end_s, is_padded=is_padded)
        if decoder == "pyav" and timeline.is_seekable:
            try:
                return _read_frames(
                    decode_range(container, timeline, indices, from_start=False), timeline, indices, shape
                )
            except DecodeError:
                pass  # maybe only the seek went wrong; decoding from the start succeeds or names the problem
    with open_container(path) as container:
        frames = decode_range(container, timeline, indices if decoder == "pyav" else [0], from_start=True)
        if decoder == "pyav":
            return _read_frames(frames, timeline, indices, shape)
        try:
            return read_decord(path, frames, timeline, indices, shape)
        except UnreliableError as error:
            raise DecodeError(f"decord is not reliable for this file ({error}). Set data.decoder=pyav") from None


def _read_frames(
    frames: Iterator[tuple[int, VideoFrame]], timeline: Timeline, indices: Sequence[int], shape: ClipShape
) -> np.ndarray:
    clip = np.empty((shape.frames, shape.height, shape.width, 3), np.uint8)
    fitter, wanted = Fitter(timeline.pixel_aspect), 0
    for index, frame in frames:
        if index != indices[wanted]:
            continue
        fitter.fit(frame, clip[wanted])
        wanted = repeat(clip, indices, wanted)
    return clip
