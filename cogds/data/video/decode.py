"""Strict decoding: the frames of a video, or an error."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from cogds.data.video.container import video_stream
from cogds.data.video.errors import DecodeError, brief
from cogds.data.video.interlacing import deinterlaced
from cogds.data.video.timeline import FrameCheck, Timeline

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer


def decode_range(
    container: InputContainer, timeline: Timeline, indices: Sequence[int], from_start: bool
) -> Iterator[tuple[int, VideoFrame]]:
    """Yield the frames from a keyframe before the first index to the last index, deinterlaced if necessary.

    The same frames come from any start. Raises DecodeError.

    Args:
        indices: ascending.
        from_start: decode from the start instead of seeking, with a container that was just opened.
    """
    if not timeline.deinterlacing:
        first = 0 if from_start else timeline.key_before(indices[0])
        yield from _decode_strict(container, timeline, first, indices[-1], seek=not from_start)
        return
    # A deinterlaced frame is computed from its neighbors.
    first = 0 if from_start else timeline.key_before(max(0, indices[0] - 1))
    last = min(indices[-1] + 1, len(timeline.pts) - 1)
    frames = _decode_strict(container, timeline, first, last, seek=not from_start)
    for index, frame in deinterlaced(frames, timeline.deinterlacing):
        if index <= indices[-1]:
            yield index, frame


def _decode_strict(
    container: InputContainer, timeline: Timeline, first: int, last: int, seek: bool
) -> Iterator[tuple[int, VideoFrame]]:
    """Yield the frames first to last (indices and PyAV frames). Raises DecodeError if one is damaged or missing.

    Frames before `first` are dropped, because they may depend on frames before the keyframe.

    Args:
        first: 0 or a keyframe.
        seek: seek to `first`. Not needed for a container that was just opened, if first is 0.
    """
    import av

    stream = video_stream(container)
    index, size, start, check = first - 1, None, timeline.pts[first], FrameCheck(timeline)
    try:
        if seek:
            container.seek(timeline.seek_target(first), stream=stream)
        for number, packet in enumerate(container.demux(stream)):
            try:
                frames = packet.decode()
            except av.error.InvalidDataError:
                # The decoder may report an error together with the next packet.
                is_leading = first == 0 and 0 < timeline.num_leading >= number
                if not is_leading and (not seek or packet.pts is None or packet.pts >= start):
                    raise
                frames = []
            for frame in frames:
                if index < first and not timeline.is_reordered and frame.pts is not None and frame.pts < start:
                    continue
                index += 1
                check.check(frame, index)
                size = size or (frame.width, frame.height)
                if (frame.width, frame.height) != size:
                    raise DecodeError(f"its size changes at {timeline.seconds(index):.3f} s")
                yield index, frame
                if index == last:
                    return
    except MemoryError:
        raise
    except av.error.FFmpegError as error:
        time_s = timeline.seconds(min(index + 1, last))
        raise DecodeError(f"decoding fails near {time_s:.3f} s: {brief(error)}") from None
    raise DecodeError(f"only {index + 1} of its {len(timeline.pts)} frames can be decoded")


def repeat(clip: np.ndarray, indices: Sequence[int], k: int) -> int:
    """Copy frame k to the following frames that show the same source frame. Returns the next k with a different one."""
    end = bisect.bisect_right(indices, indices[k])
    clip[k + 1 : end] = clip[k]
    return end
