"""Interlaced video: whether a stream really is, and deinterlacing.

A stream that is marked interlaced often holds progressive pictures (25p in 50i: broadcast cameras, editors). Only
moving pictures tell: the lines of a field fit the neighboring frame on one side better than the one on the other.
FFmpeg's idet filter compares that. It is run on a few frames at several places of the file, so that a whole film is
judged once, all its windows alike, and a still or noisy place does not decide. If the pictures do not move, both
readings are the same, and frames are kept whole.

bwdif deinterlaces: 46 and 42 dB of the frames at the time of the first fields of two real clips that were made
interlaced, 45 and 39 dB with yadif. The frame rate stays; the second field of each frame is only used to interpolate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from cogds.data.video.errors import DecodeError

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.filter import Graph
    from av.video.stream import VideoStream

_FIELD_ORDERS = {2, 3, 4, 5}  # AVFieldOrder: top or bottom field first, coded or displayed
_NUM_PLACES, _FRAMES_PER_PLACE = 5, 8
# Of the frames with visible motion. In film for NTSC (3:2 pulldown), two of five frames are interlaced.
_MIN_INTERLACED_SHARE = 0.2


def is_marked_interlaced(stream: VideoStream, first: VideoFrame) -> bool:
    """Whether the container or the first frame says so. Raises DecodeError if fields are stored one by one."""
    if first.interlaced_frame and stream.codec_context.name == "hevc":
        raise DecodeError("its fields are stored as separate pictures (interlaced H.265): deinterlace and re-encode it")
    return first.interlaced_frame or stream.codec_context.field_order in _FIELD_ORDERS


def choose_deinterlacing(container: InputContainer, stream: VideoStream, seek_targets: Sequence[int]) -> str:
    """Arguments of the deinterlacing filter, "" if both fields of all frames show the same time.

    Moves the container's position. seek_targets: of the stream's keyframes.
    """
    import av

    counts = {"tff": 0, "bff": 0, "progressive": 0, "undetermined": 0}
    is_marked = False
    step = max(1, len(seek_targets) // _NUM_PLACES)
    for target in seek_targets[::step][:_NUM_PLACES]:
        frames = []
        try:
            container.seek(target, stream=stream)
            for frame in container.decode(stream):
                frames.append(frame)
                if len(frames) == _FRAMES_PER_PLACE:
                    break
        except MemoryError:
            raise
        except av.error.FFmpegError:
            pass  # reading the clip names the damage
        is_marked |= any(frame.interlaced_frame for frame in frames)
        for frame in _filtered(iter(frames), "idet"):
            counts[frame.metadata["lavfi.idet.single.current_frame"]] += 1
    num_interlaced = counts["tff"] + counts["bff"]
    if num_interlaced <= _MIN_INTERLACED_SHARE * (num_interlaced + counts["progressive"]):
        return ""
    # Marks of fields' order are often wrong, and motion JPEG has no marks in its frames.
    parity = max("tff", "bff", key=counts.__getitem__)
    return f"mode=send_frame:parity={parity}:deint={'interlaced' if is_marked else 'all'}"


def deinterlaced(frames: Iterator[tuple[int, VideoFrame]], arguments: str) -> Iterator[tuple[int, VideoFrame]]:
    """Deinterlace frames by `choose_deinterlacing`, one for each. Each is computed from itself and its neighbors."""
    indices: list[int] = []

    def plain() -> Iterator[VideoFrame]:
        for index, frame in frames:
            indices.append(index)
            yield frame

    for position, frame in enumerate(_filtered(plain(), "bwdif", arguments)):
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
