"""Display times of a video's frames, read from its packets."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from cogds.data.storage.access import stamp
from cogds.data.video.container import video_stream
from cogds.data.video.errors import DecodeError, brief
from cogds.data.video.interlacing import choose_deinterlacing, is_marked_interlaced

if TYPE_CHECKING:
    from av import Packet, VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

# Containers round timestamps to 1 ms at worst (mkv): a frame at 62.5 ms may say 63. This is half of that and a margin.
TIME_TOLERANCE_S = 0.0006
# If a container's frame rate differs from that of its packets by more than this share, the latter is used.
RATE_TOLERANCE = 0.1


@dataclass(frozen=True)
class VideoInfo:
    """Properties of a video or image file. An image has 1 frame, and its fps and duration are 0.

    Attributes:
        width, height: in pixels as displayed, with rotation and pixel aspect ratio applied.
        duration_s: from the start of the first frame to the end of the last.
        rotation: clockwise rotation from stored to displayed frames in degrees (0, 90, 180, 270).
        processing: what reading does to the pixels besides resizing: "deinterlaced", "tone-mapped from HDR", "converted
            from a wide gamut", joined by commas.
    """

    num_frames: int
    fps: float
    width: int
    height: int
    duration_s: float
    rotation: int = 0
    processing: str = ""


@dataclass(frozen=True)
class Timeline:
    """Display times of a stream's frames.

    Attributes:
        pts: of the displayed frames, ascending, in units of time_base. Equal ones are displayed for no time.
        keys: indices of the keyframes.
        seek_targets: timestamps with which the container finds the keyframes.
        end: end of the last frame, in units of time_base.
        fps: frames per second.
        pixel_aspect: width of a pixel divided by its height.
        num_hidden: number of packets hidden by an edit list.
        num_leading: number of packets at the start of a file cut from a longer one, up to the last of those that depend
            on frames before the cut.
        is_reordered: whether only the order of the decoded frames tells which is which: AVI with B-frames of H.264.
            The container has a constant rate and no display times, and FFmpeg does not compute them.
        deinterlacing: arguments of the filter, "" if the frames are not interlaced.
    """

    pts: Sequence[int]
    keys: Sequence[int]
    seek_targets: Sequence[int]
    time_base: Fraction
    end: int
    fps: float
    pixel_aspect: Fraction = Fraction(1)
    num_hidden: int = 0
    num_leading: int = 0
    is_reordered: bool = False
    deinterlacing: str = ""

    @property
    def is_seekable(self) -> bool:
        """Whether a frame can be identified after a seek. Hidden packets are decoded from the start."""
        return not self.num_hidden and not self.is_reordered

    def seconds(self, index: int) -> float:
        """Start of a frame in seconds after the first."""
        return float((self.pts[index] - self.pts[0]) * self.time_base)

    def key_before(self, index: int) -> int:
        """Index of the last keyframe at or before a frame. 0 if there is none, as in a stream cut between keyframes."""
        position = bisect.bisect_right(self.keys, index)
        return self.keys[position - 1] if position else 0

    def seek_target(self, index: int) -> int:
        """Timestamp with which the container finds a keyframe, or the start if the frame is not a keyframe."""
        position = bisect.bisect_right(self.keys, index)
        return self.seek_targets[position - 1] if position else self.pts[0]

    @property
    def duration_s(self) -> float:
        """Seconds from the start of the first frame to the end of the last."""
        return float((self.end - self.pts[0]) * self.time_base)

    def interval_s(self, index: int) -> tuple[float, float]:
        """When a frame is displayed: its own time, and that of the next frame or the end of the file."""
        is_last = index == len(self.pts) - 1
        return self.seconds(index), self.duration_s if is_last else self.seconds(index + 1)


def num_frames_at(info: VideoInfo, fps: float, start_s: float = 0.0, end_s: float | None = None) -> int:
    """Number of frames that `read_clip` can return at a frame rate: all k for which start_s + k / fps is in the range.

    start_s, end_s: range in seconds after the first frame. Without end_s, it extends to the end of the last frame. An
    image or a clip of one frame has one frame, at 0 s.
    """
    if info.num_frames == 1:
        return int(start_s == 0)
    end = _end_s(info.duration_s, end_s)
    num = max(0, math.ceil((end - start_s) * fps)) + 1
    while num and start_s + (num - 1) / fps >= end:
        num -= 1
    return num


def displayed_frames(
    timeline: Timeline, times_s: Sequence[float], end_s: float | None, *, is_padded: bool = False
) -> list[int]:
    """For each time, the index of the last frame that starts at or before it. Raises DecodeError if one is too late.

    is_padded: whether the last frame is displayed for one frame longer.
    """
    end = math.inf if len(timeline.pts) == 1 and times_s[-1] == 0 else _end_s(timeline.duration_s, end_s)
    if is_padded and timeline.fps:
        end += 1 / timeline.fps
    if times_s[-1] >= end:
        usable = f", usable up to {end_s:.3f} s" if end_s is not None else ""
        raise DecodeError(
            f"it ends too early: the clip needs a frame at {times_s[-1]:.3f} s, but the file has "
            f"{timeline.duration_s:.3f} s{usable}"
        )
    latest = [timeline.pts[0] + math.floor(Fraction(time + TIME_TOLERANCE_S) / timeline.time_base) for time in times_s]
    return [max(0, bisect.bisect_right(timeline.pts, pts) - 1) for pts in latest]


def frame_range(timeline: Timeline, start_s: float, end_s: float | None) -> range:
    """Indices from the frame displayed at start_s to the last that starts before end_s. Raises DecodeError."""
    first, end = displayed_frames(timeline, [start_s], end_s)[0], _end_s(timeline.duration_s, end_s)
    return range(first, max(first + 1, bisect.bisect_left(range(len(timeline.pts)), end, key=timeline.seconds)))


def _end_s(duration_s: float, end_s: float | None) -> float:
    return min(duration_s, math.inf if end_s is None else end_s) - TIME_TOLERANCE_S


# Timelines of recent files. Windows of a long video are read one after the other, and reading its timeline reads all of
# its packets.
_recent_timelines: dict[tuple[str, int, int], Timeline] = {}
_MAX_RECENT = 8


def cached_timeline(path: str | Path, container: InputContainer) -> Timeline:
    """The file's timeline, which is read again only if the file changes."""
    key = (str(path), *stamp(str(path)))
    if key not in _recent_timelines:
        while len(_recent_timelines) >= _MAX_RECENT:
            del _recent_timelines[next(iter(_recent_timelines))]
        _recent_timelines[key], _ = read_timeline(container)
    return _recent_timelines[key]


# Before the cut of a file that was cut from a longer one, times would be negative, which some containers cannot hold.
_NO_TIME = -(1 << 63)


class _Packet(NamedTuple):
    pts: int
    seek_target: int
    duration: int
    is_key: bool
    is_hidden: bool


def read_timeline(container: InputContainer) -> tuple[Timeline, VideoFrame]:
    """Read the timeline from the packets, and decode the first frame. Moves the container's position."""
    import av

    stream = video_stream(container)
    # Only MP4 and AVI have a number of frames in their headers, and an index of all of them.
    num_indexed = sum(entry.size > 0 for entry in stream.index_entries) if stream.frames else 0
    packets: list[_Packet] = []
    first, failure = None, None
    context = stream.codec_context
    is_reordered = container.format.name == "avi" and context.name in ("h264", "hevc") and context.has_b_frames
    has_index = "mpeg" not in container.format.name
    try:
        for packet in container.demux(stream):
            if first is None:
                try:
                    first = next((frame for frame in packet.decode() if not frame.is_corrupt), None)
                except MemoryError:
                    raise
                except av.error.FFmpegError as error:
                    failure = len(packets), brief(error)
            if packet.size:  # else it is the flush packet at the end
                # Without an index, in MPEG-TS and MPEG-PS, FFmpeg searches for decoding times.
                target = packet.pts if has_index or packet.dts is None else packet.dts
                packets.append(_read_packet(packet, packet.dts if is_reordered else packet.pts, target))
    except MemoryError:
        raise  # not a problem of the file
    except av.error.FFmpegError as error:
        raise DecodeError(f"it cannot be read to its end: {brief(error)}") from None
    num_leading = _num_leading(packets)
    if any(packet.pts == _NO_TIME for packet in packets[num_leading:]):
        raise DecodeError("its frames have no timestamps: re-encode it, for example as H.264 in mp4")
    if all(packet.is_hidden for packet in packets):
        raise DecodeError("it has no frames")
    # A smaller index than in the header is that of an edit list, or of an AVI with dropped frames.
    if stream.frames > len(packets) != num_indexed:
        raise DecodeError(f"it is truncated: only {len(packets)} of {stream.frames} frames are left")
    if failure and (not num_leading or failure[0] > num_leading):
        raise DecodeError(f"its first frame cannot be decoded: {failure[1]}")
    timeline = replace(_build_timeline(stream, packets, num_leading, first), is_reordered=is_reordered)
    FrameCheck(timeline).check(first, 0)
    assert first is not None
    if is_marked_interlaced(stream, first):
        timeline = replace(timeline, deinterlacing=choose_deinterlacing(container, stream, timeline.seek_targets))
    return timeline, first


def _build_timeline(
    stream: VideoStream, packets: Sequence[_Packet], num_leading: int, first: VideoFrame | None
) -> Timeline:
    shown = sorted(packet.pts for packet in packets if not packet.is_hidden)
    if num_leading and first is not None and first.pts is not None:
        first_key_pts = next(packet.pts for packet in packets if packet.is_key)
        complete = shown[bisect.bisect_left(shown, first_key_pts) :]
        shown = [pts for pts in shown if pts >= min(first.pts, complete[0])] if complete else shown
    keys = sorted(packet for packet in packets if packet.is_key and not packet.is_hidden and packet.pts >= shown[0])
    time_base, rate = Fraction(stream.time_base or 0), stream.average_rate
    span = float((shown[-1] - shown[0]) * time_base)
    measured = (len(shown) - 1) / span if span > 0 else 0.0
    fps = float(rate) if rate and len(shown) == len(packets) else measured
    if measured and abs(fps / measured - 1) > RATE_TOLERANCE:
        fps = measured
    if len(shown) > 1 and (fps <= 0 or span <= 0):
        raise DecodeError("its frame rate is 0")
    length = next(packet.duration for packet in reversed(packets) if packet.pts == shown[-1])
    if not length and fps:
        length = max(1, round(1 / (fps * time_base)))
    return Timeline(
        pts=shown,
        keys=[bisect.bisect_left(shown, packet.pts) for packet in keys],
        seek_targets=[packet.seek_target for packet in keys],
        time_base=time_base,
        end=shown[-1] + length,
        fps=fps,
        pixel_aspect=Fraction(stream.sample_aspect_ratio or 1),
        num_hidden=sum(packet.is_hidden and packet.pts != _NO_TIME for packet in packets),
        num_leading=num_leading,
    )


class FrameCheck:
    """Checks that decoded frames are those of a timeline, in order."""

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
        self._delay: int | None = None  # of the decoder, in frames, if frames are reordered

    def check(self, frame: VideoFrame | None, index: int) -> None:
        """Raise DecodeError if a frame is not the one with this index, or is damaged."""
        if frame is not None and frame.is_corrupt:
            raise DecodeError(f"the frame at {self._timeline.seconds(index):.3f} s is damaged")
        if frame is None or not self._is_at(frame, index):
            raise DecodeError(f"the frame at {self._timeline.seconds(index):.3f} s cannot be decoded")

    def _is_at(self, frame: VideoFrame, index: int) -> bool:
        pts = self._timeline.pts
        if not self._timeline.is_reordered:
            return frame.pts == pts[index]
        # A frame has the decoding time of the packet with which it came out. A lost frame leaves a gap.
        if frame.dts is None:  # after the last packet
            return True
        if self._delay is None:
            self._delay = bisect.bisect_left(pts, frame.dts) - index
        return index + self._delay < len(pts) and pts[index + self._delay] == frame.dts


def _read_packet(packet: Packet, time: int | None, seek_target: int | None) -> _Packet:
    if packet.is_corrupt:
        raise DecodeError("the container marks a packet as corrupt (a truncated file?)")
    if time is None or seek_target is None:
        return _Packet(_NO_TIME, 0, 0, packet.is_keyframe, is_hidden=True)
    return _Packet(time, seek_target, packet.duration or 0, packet.is_keyframe, packet.is_discard)


def _num_leading(packets: Sequence[_Packet]) -> int:
    """`Timeline.num_leading`: of the packets before the second keyframe, those displayed before the first."""
    keys = [number for number, packet in enumerate(packets) if packet.is_key][:2]
    if not keys:
        return 0
    leading = [packet.pts < packets[keys[0]].pts for packet in packets[: keys[1] if len(keys) == 2 else None]]
    return len(leading) - leading[::-1].index(True) if any(leading) else 0
