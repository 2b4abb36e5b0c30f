"""Interlaced video: whether a stream really is, and deinterlacing.

A stream that is marked interlaced often holds progressive pictures (25p in 50i: broadcast cameras, editors). Only
moving pictures tell: the lines of a field fit the neighboring frame on one side better than the one on the other.
FFmpeg's idet filter compares that. It is run on a few frames at several places of the file, so that a whole film is
judged once, all its windows alike, and a still or noisy place does not decide. If the pictures do not move, both
readings are the same, and frames are kept whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.filter import Graph
    from av.video.stream import VideoStream

_FIELD_ORDERS = {2, 3, 4, 5}  # AVFieldOrder: top or bottom field first, coded or displayed
_NUM_PLACES, _FRAMES_PER_PLACE = 5, 8
# Of the frames with visible motion. In film for NTSC (3:2 pulldown), two of five frames are interlaced.
_MIN_INTERLACED_SHARE = 0.2


def is_marked_interlaced(stream: VideoStream) -> bool:
    """Whether the stream's header says so."""
    return stream.codec_context.field_order in _FIELD_ORDERS


def is_interlaced(container: InputContainer, stream: VideoStream, key_pts: Sequence[int]) -> bool:
    """Whether the two fields of a stream's frames show different times. Moves the container's position.

    key_pts: timestamps of the stream's keyframes.
    """
    import av

    counts = {"tff": 0, "bff": 0, "progressive": 0, "undetermined": 0}
    step = max(1, len(key_pts) // _NUM_PLACES)
    for pts in key_pts[::step][:_NUM_PLACES]:
        frames = []
        try:
            container.seek(pts, stream=stream)
            for frame in container.decode(stream):
                frames.append(frame)
                if len(frames) == _FRAMES_PER_PLACE:
                    break
        except MemoryError:
            raise
        except av.error.FFmpegError:
            pass  # reading the clip names the damage
        for frame in _filtered(iter(frames), "idet"):
            counts[frame.metadata["lavfi.idet.single.current_frame"]] += 1
    num_interlaced = counts["tff"] + counts["bff"]
    return num_interlaced > _MIN_INTERLACED_SHARE * (num_interlaced + counts["progressive"])


def deinterlaced(frames: Iterator[tuple[int, VideoFrame]]) -> Iterator[tuple[int, VideoFrame]]:
    """Deinterlace frames that are marked interlaced, with one frame for each. Needs the neighbors of each frame."""
    indices: list[int] = []

    def plain() -> Iterator[VideoFrame]:
        for index, frame in frames:
            indices.append(index)
            yield frame

    for position, frame in enumerate(_filtered(plain(), "bwdif", "mode=send_frame:deint=interlaced")):
        yield indices[position], frame


class FieldJoiner:
    """Marks frames as progressive. Otherwise, the scaler would scale each field on its own."""

    def __init__(self) -> None:
        self._graph: Graph | None = None

    def join(self, frame: VideoFrame) -> VideoFrame:
        """The same picture, marked as progressive."""
        if not frame.interlaced_frame:
            return frame
        self._graph = self._graph or _graph(frame, "setfield", "prog")
        self._graph.vpush(frame)
        return self._graph.vpull()


def _filtered(frames: Iterator[VideoFrame], name: str, arguments: str | None = None) -> Iterator[VideoFrame]:
    """The frames that come out of one of FFmpeg's filters."""
    graph = None
    for frame in frames:
        graph = graph or _graph(frame, name, arguments)
        graph.vpush(frame)
        yield from _pulled(graph)
    if graph:
        graph.vpush(None)
        yield from _pulled(graph)


def _pulled(graph: Graph) -> Iterator[VideoFrame]:
    import av

    while True:
        try:
            frame = graph.vpull()
        except (av.error.BlockingIOError, av.error.EOFError):  # more input is needed, or all is out
            return
        yield frame


def _graph(frame: VideoFrame, name: str, arguments: str | None) -> Graph:
    from av.filter import Graph

    graph = Graph()
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base)
    graph.link_nodes(source, graph.add(name, arguments), graph.add("buffersink")).configure()
    return graph
