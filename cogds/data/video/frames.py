"""Frames of videos one after the other, with the times at which they are displayed, for analysis of whole films."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cogds.data.video.container import open_container
from cogds.data.video.decode import decode_range
from cogds.data.video.errors import DecodeError
from cogds.data.video.images import animation_frames, fit_image, is_webp, probe_image, read_image
from cogds.data.video.pixels import Fitter, displayed_size
from cogds.data.video.timeline import Timeline, cached_timeline, frame_range

if TYPE_CHECKING:
    from av import VideoFrame


class ShownFrame(NamedTuple):
    """A decoded frame of a video, upright and in the colors that training reads.

    Attributes:
        start_s, end_s: when it is displayed, in seconds after the file's first frame.
        size: height and width in pixels as displayed.
        pixels: side -> the frame scaled to this longer side, uint8 [H, W, 3] in RGB. Raises DecodeError.
    """

    start_s: float
    end_s: float
    size: tuple[int, int]
    pixels: Callable[[int], np.ndarray]


def iter_frames(path: str | Path, start_s: float = 0.0, end_s: float | None = None) -> Iterator[ShownFrame]:
    """Decode the frames of a video in order, each once.

    start_s, end_s: the first frame is the one displayed at start_s, and the last one starts before end_s. Raises
    DecodeError, also after some frames, if the file is damaged.
    """
    if is_webp(path):
        for timeline, index, image in animation_frames(path, start_s, end_s):
            size = image.height, image.width
            yield ShownFrame(
                *timeline.interval_s(index),
                size,
                lambda side, image=image, size=size: fit_image(image, *_size_with_side(size, side)),  # type: ignore[misc]
            )
        return
    with open_container(path) as container:
        timeline = cached_timeline(path, container)
        indices, scalers = frame_range(timeline, start_s, end_s), _Scalers(timeline.pixel_aspect)
        position = indices[0]
        if position and timeline.is_seekable:
            try:
                for index, frame in decode_range(container, timeline, indices, from_start=False):
                    if index >= position:
                        yield _shown(timeline, index, frame, scalers)
                        position = index + 1
                return
            except DecodeError:
                pass  # maybe only the seek went wrong; decoding from the start succeeds or names the problem
    with open_container(path) as container:
        for index, frame in decode_range(container, timeline, indices, from_start=True):
            if index >= position:
                yield _shown(timeline, index, frame, scalers)


def read_frame(path: str | Path, time_s: float, side: int) -> np.ndarray:
    """The frame of a video displayed at a time, in seconds after the first frame: uint8 [H, W, 3].

    side: the longer of H and W. Raises DecodeError.
    """
    return next(iter_frames(path, time_s)).pixels(side)


def read_whole_image(path: str | Path, side: int) -> np.ndarray:
    """Read an image and scale it: uint8 [H, W, 3]. side: the longer of H and W. Raises DecodeError."""
    info = probe_image(path)
    return read_image(path, *_size_with_side((info.height, info.width), side))


def _size_with_side(size: tuple[int, int], side: int) -> tuple[int, int]:
    scale = side / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _shown(timeline: Timeline, index: int, frame: VideoFrame, scalers: _Scalers) -> ShownFrame:
    size = displayed_size(frame, timeline.pixel_aspect)
    return ShownFrame(*timeline.interval_s(index), size, partial(_scaled, frame, size, scalers))


def _scaled(frame: VideoFrame, size: tuple[int, int], scalers: _Scalers, side: int) -> np.ndarray:
    out = np.empty((*_size_with_side(size, side), 3), np.uint8)
    scalers[side].fit(frame, out)
    return out


class _Scalers(dict[int, Fitter]):
    """A fitter for each size (longer side in pixels), because a fitter computes its filters again for a new size."""

    def __init__(self, pixel_aspect: Fraction) -> None:
        super().__init__()
        self._pixel_aspect = pixel_aspect

    def __missing__(self, side: int) -> Fitter:
        self[side] = Fitter(self._pixel_aspect)
        return self[side]
