"""Frames of videos one after the other, with the times at which they are displayed, for analysis of whole films."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cogds.data.video.media import (
    DecodeError,
    _cached_timeline,
    _decode_strict,
    _displayed_frames,
    _displayed_size,
    _end_s,
    _Fitter,
    _open,
    _Timeline,
    probe_image,
    read_image,
)

if TYPE_CHECKING:
    from av import VideoFrame


class ShownFrame:
    """A decoded frame of a video. start_s, end_s: when it is displayed, in seconds after the file's first frame."""

    def __init__(self, frame: VideoFrame, times_s: tuple[float, float], scalers: _Scalers) -> None:
        self.start_s, self.end_s = times_s
        self._frame, self._scalers = frame, scalers

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels as displayed."""
        return _displayed_size(self._frame, self._scalers.pixel_aspect)

    def pixels(self, side: int) -> np.ndarray:
        """The frame, upright and scaled: uint8 [H, W, 3] in RGB. side: the longer of H and W."""
        out = np.empty((*_size_with_side(self.size, side), 3), np.uint8)
        self._scalers[side].fit(self._frame, out)
        return out


def iter_frames(path: str | Path, start_s: float = 0.0, end_s: float | None = None) -> Iterator[ShownFrame]:
    """Decode the frames of a video in order, each once.

    start_s, end_s: the first frame is the one displayed at start_s, and the last one starts before end_s. Raises
    DecodeError, also after some frames, if the file is damaged.
    """
    with _open(path) as container:
        timeline = _cached_timeline(path, container)
        scalers, position = _Scalers(timeline.pixel_aspect), _displayed_frames(timeline, [start_s], end_s)[0]
        end = _end_s(timeline.duration_s, end_s)
        last = max(position, bisect.bisect_left(range(len(timeline.pts)), end, key=timeline.seconds) - 1)
        if position and not timeline.num_hidden:
            try:
                for index, frame in _decode_strict(container, timeline, timeline.key_before(position), last):
                    if index >= position:
                        yield ShownFrame(frame, _interval_s(timeline, index), scalers)
                        position = index + 1
                return
            except DecodeError:
                pass  # maybe only the seek went wrong; decoding from the start succeeds or names the problem
    with _open(path) as container:
        for index, frame in _decode_strict(container, timeline, 0, last, seek=False):
            if index >= position:
                yield ShownFrame(frame, _interval_s(timeline, index), scalers)


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


def _interval_s(timeline: _Timeline, index: int) -> tuple[float, float]:
    """When a frame is displayed: its own time, and that of the next frame or the end of the file."""
    is_last = index == len(timeline.pts) - 1
    return timeline.seconds(index), timeline.duration_s if is_last else timeline.seconds(index + 1)


class _Scalers(dict[int, _Fitter]):
    """A fitter for each size (longer side in pixels), because a fitter computes its filters again for a new size."""

    def __init__(self, pixel_aspect: Fraction) -> None:
        super().__init__()
        self.pixel_aspect = pixel_aspect

    def __missing__(self, side: int) -> _Fitter:
        self[side] = _Fitter(self.pixel_aspect)
        return self[side]
