"""Opening a video file, and the choice of its stream."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from cogds.data.storage.access import open_binary, stamp
from cogds.data.storage.location import is_local_file, is_url
from cogds.data.video.errors import DecodeError, brief

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

# Codec tags of Dolby Vision. Without tags of HDR10 or HLG (profile 5), only a Dolby Vision decoder knows the colors.
_DOLBY_TAGS = frozenset({"dvh1", "dvhe", "dvav", "dva1", "dav1"})
_UNSPECIFIED_TRANSFER = 2
# Brands of ISO files that hold photos. Sequences, such as animated AVIF (avis), are videos.
_PHOTO_BRANDS = frozenset({"heic", "heix", "heim", "heis", "mif1", "avif"})


def open_container(path: str | Path) -> InputContainer:
    """Open a PyAV container whose chosen stream is set up for strict decoding. Raises DecodeError."""
    import av

    # By default, PyAV 18 raises UnicodeDecodeError for a title that is not UTF-8. PyAV 19 does not.
    options: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
    source = open_source(path)
    try:
        container = av.open(source, **options)
    except MemoryError:
        raise
    except av.error.FFmpegError as error:
        raise DecodeError(f"it cannot be opened as a video: {brief(error)}") from None
    try:
        stream = video_stream(container)
        _check_stream(container, stream)
    except BaseException:
        container.close()
        raise
    # One thread misses damage in 1 of 16 damaged copies, slice threads in 6, and frame threads may hang.
    stream.thread_type = "NONE"
    stream.codec_context.options = {"err_detect": "crccheck+bitstream+buffer+explode"}
    return container


def open_source(path: str | Path) -> str | BinaryIO:
    """What a library opens for a location: the path of a local file, or a file object for others.

    Raises DecodeError if the file is missing, not a file or empty, and OSError if a server fails.
    """
    location = str(path)
    try:
        size = stamp(location).size
        source = location if is_local_file(location) else open_binary(location)
    except FileNotFoundError:
        raise DecodeError("the file does not exist") from None
    except IsADirectoryError:
        raise DecodeError("it is a folder, not a file") from None
    except OSError as error:
        if is_url(location):
            raise  # another time, the server may not fail
        raise DecodeError(f"it cannot be opened: {brief(error)}") from None
    if not size:
        raise DecodeError("the file is empty (0 bytes)")
    return source


def video_stream(container: InputContainer) -> VideoStream:
    """The stream that players show: no cover art, by default flag, then the largest. Raises DecodeError."""
    from av.stream import Disposition

    pictures = Disposition.attached_pic | Disposition.timed_thumbnails
    streams = [stream for stream in container.streams.video if not stream.disposition & pictures]
    if not streams:
        what = "only a cover picture" if container.streams.video else "no video stream"
        raise DecodeError(f"it has {what} (audio only, or cut short?)")

    def rank(stream: VideoStream) -> tuple[bool, bool, int]:
        context = stream.codec_context
        size = context.width * context.height if context else 0
        # An animated AVIF has its first frame as a stream of its own.
        return stream.frames != 1, bool(stream.disposition & Disposition.default), size

    return max(streams, key=rank)  # the first, if several are equal


def _check_stream(container: InputContainer, stream: VideoStream) -> None:
    from av.stream import Disposition

    if stream.codec_context is None:
        raise DecodeError("its codec is not supported by the decoder: re-encode it")
    if stream.codec_tag in _DOLBY_TAGS and stream.codec_context.color_trc == _UNSPECIFIED_TRANSFER:
        raise DecodeError("its colors are those of Dolby Vision (profile 5), which is not supported: re-encode it")
    brand = container.metadata.get("major_brand", "")
    if brand in _PHOTO_BRANDS or stream.disposition & Disposition.dependent:
        raise DecodeError(f"it is a photo ({brand or 'made of tiles'}), not a video: set its type to image")
