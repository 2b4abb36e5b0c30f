"""Probing, decoding, resizing and writing of videos and images. The only module that imports PyAV and decord.

PyAV decodes strictly and in a single pass. Frames are chosen by the container's timestamps, scaled from the decoded
planes and cropped one by one. PyAV 18 and 19 are supported, and comments mark the differences. decord is an option for
files that are known to be intact. Measured with PyAV 18.1 and decord 0.6.0 (H.264, H.265, VP9, MPEG-4; 8 bits, 420 and
444):

- Both return bit-identical RGB at the source's size, upright if the file has a rotation, in either import order.
- Of 200 damaged copies of real clips, decord decoded 190 to wrong frames and failed on 10, for any `fault_tol`, which
  only counts frames missing at the end. PyAV's corrupt flag and errors detect about 9 in 10 of the copies, with or
  without `explode` and FFmpeg's error log. The others are valid streams for any decoder, since MP4 has no checksum.
- decord shifts all frames of a file with an edit list that hides the first ones (as `ffmpeg -ss -c copy` writes), also
  shifts MPEG-TS, cannot read AV1, and treats all colors as BT.601. Such files are refused if that can be detected.
- Scaling to planar RGB and interleaving afterwards is within 52 to 56 dB of an exact conversion with an antialiased
  bicubic filter in floating point, and takes 2 to 4 ms for 1366x768. Scaling directly to packed RGB is within 39 to 44
  dB, 1.5 of 255 levels darker, and takes 8 to 10 ms: FFmpeg has vector code only for the planar layout, for which it
  also interpolates chroma at full resolution.

PyAV, decord and PIL are imported inside functions, because training from a cache needs no decoder.
"""

from __future__ import annotations

import bisect
import itertools
import math
import os
import struct
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cogds.core.geometry import ClipShape
from cogds.errors import UserError
from cogds.files import whole_file

if TYPE_CHECKING:
    import torch
    from av import VideoFrame
    from av.container import InputContainer
    from PIL.Image import Image

# Containers round timestamps to 1 ms at worst (mkv): a frame at 62.5 ms may say 63. This is half of that and a margin.
TIME_TOLERANCE_S = 0.0006
# Largest mean difference between decord's and PyAV's first frame in 8-bit levels. Measured: 0, and up to 2.4 if scaled.
PIXEL_TOLERANCE = 8.0
# If a container's frame rate differs from that of its packets by more than this share, the latter is used.
RATE_TOLERANCE = 0.1

DECODERS = ("pyav", "decord")

_FASTSTART = {"movflags": "+faststart"}


class DecodeError(Exception):
    """A file cannot be used. The message is one sentence that completes `<path>: `."""


@dataclass(frozen=True)
class VideoInfo:
    """Properties of a video or image file. An image has 1 frame, and its fps and duration are 0.

    Attributes:
        width, height: in pixels as displayed, with rotation and pixel aspect ratio applied.
        duration_s: from the start of the first frame to the end of the last.
        rotation: clockwise rotation from stored to displayed frames in degrees (0, 90, 180, 270).
    """

    num_frames: int
    fps: float
    width: int
    height: int
    duration_s: float
    rotation: int = 0


@dataclass(frozen=True)
class _Timeline:
    """Display times of a stream's frames, read from its packets without decoding.

    Attributes:
        pts: of the displayed frames, ascending, in units of time_base.
        keys: indices of the keyframes.
        end: end of the last frame, in units of time_base.
        num_hidden: number of packets hidden by an edit list.
        pixel_aspect: width of a pixel divided by its height.
    """

    pts: list[int]
    keys: list[int]
    time_base: Fraction
    end: int
    num_hidden: int
    fps: float
    pixel_aspect: Fraction

    def seconds(self, index: int) -> float:
        return float((self.pts[index] - self.pts[0]) * self.time_base)

    def key_before(self, index: int) -> int:
        """Index of the last keyframe at or before a frame. 0 if there is none, as in a stream cut between keyframes."""
        position = bisect.bisect_right(self.keys, index)
        return self.keys[position - 1] if position else 0

    @property
    def duration_s(self) -> float:
        return float((self.end - self.pts[0]) * self.time_base)


def probe_video(path: str | Path) -> VideoInfo:
    """Read the times of all frames and decode the first one. Raises DecodeError if the file cannot be used."""
    with _open(path) as container:
        timeline, frame = _read_timeline(container, decode_first=True)
    assert frame is not None
    height, width = _displayed_size(frame, timeline.pixel_aspect)
    rotation = -90 * _turns(frame) % 360
    return VideoInfo(len(timeline.pts), timeline.fps, width, height, timeline.duration_s, rotation)


def probe_image(path: str | Path) -> VideoInfo:
    """Decode an image. Its size is as displayed, with EXIF orientation applied. Raises DecodeError."""
    width, height = _load_image(path).size
    return VideoInfo(1, 0.0, width, height, 0.0)


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


def read_clip(
    path: str | Path,
    shape: ClipShape,
    fps: float,
    start_s: float = 0.0,
    end_s: float | None = None,
    decoder: str = "pyav",
) -> np.ndarray:
    """Decode, resample in time, resize to cover and crop the center: uint8 [F, H, W, 3], C-contiguous.

    Frame k is the source frame displayed `start_s + k / fps` seconds after the first one. Slow sources repeat frames,
    and variable frame rates are handled correctly. Colors follow the stream's matrix and range. As in FFmpeg, the
    default is BT.601 with limited range. Memory: the result and a few frames of the source.

    Args:
        end_s: end of the usable range, in seconds after the first frame.
        decoder: "pyav" seeks to the last keyframe before the clip, and decodes from the start if the timestamps after
            the seek are wrong. "decord" decodes from the start and does not detect damage.

    Raises:
        DecodeError: the file is damaged or too short, or decord is not reliable for it.
    """
    if fps <= 0 or start_s < 0 or decoder not in DECODERS:
        raise ValueError(
            f"fps must be above 0, start_s at least 0, decoder one of {DECODERS}: got {fps}, {start_s} and {decoder!r}"
        )
    with _open(path) as container:
        timeline = _cached_timeline(path, container)
        indices = _displayed_frames(timeline, [start_s + k / fps for k in range(shape.frames)], end_s)
        if decoder == "pyav" and not timeline.num_hidden:
            frames = _decode_strict(container, timeline, timeline.key_before(indices[0]), indices[-1])
            try:
                return _read_pyav(frames, timeline, indices, shape)
            except DecodeError:
                pass  # maybe only the seek went wrong; decoding from the start succeeds or names the problem
    with _open(path) as container:
        frames = _decode_strict(container, timeline, 0, indices[-1], seek=False)
        if decoder == "pyav":
            return _read_pyav(frames, timeline, indices, shape)
        try:
            return _read_decord(path, frames, timeline, indices, shape)
        except _DecordUnreliableError as error:
            raise DecodeError(f"decord is not reliable for this file ({error}). Set data.decoder=pyav") from None


def read_image(path: str | Path, height: int, width: int) -> np.ndarray:
    """Read an image, apply EXIF orientation, resize to cover and crop the center: uint8 [H, W, 3].

    Resizing is antialiased bicubic, and skipped if the size is right. Transparency is dropped as in diffusers'
    `load_image`. Raises DecodeError.
    """
    from PIL import Image

    image = _load_image(path)
    (tall, wide), (top, left) = _cover((image.height, image.width), height, width)
    if (tall, wide) == (image.height, image.width):
        image = image.crop((left, top, left + width, top + height))
    else:
        # PIL scales only the box, but takes neighboring pixels outside of it into account.
        across, down = image.width / wide, image.height / tall
        box = (left * across, top * down, (left + width) * across, (top + height) * down)
        image = image.resize((width, height), Image.Resampling.BICUBIC, box)
    return np.array(image)


def write_video(
    path: str | Path, frames: np.ndarray | torch.Tensor, fps: float, crf: int = 18, num_threads: int = 0
) -> None:
    """Encode uint8 [F, H, W, 3] as H.264 (yuv420p) with faststart. The file appears under its name when it is complete.

    num_threads: 0 lets x264 choose. With 1, the same frames give the same file on every machine. Raises UserError for
    odd sizes, which yuv420p does not support, and ValueError for any other kind of array.
    """
    import av

    pixels = np.asarray(frames)
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3 or not len(pixels):
        raise ValueError(f"frames must be uint8 [F, H, W, 3] with F > 0: got {pixels.dtype} {list(pixels.shape)}")
    height, width = pixels.shape[1:3]
    if height % 2 or width % 2:
        raise UserError(f"{path}: H.264 requires an even height and width, but the frames are {height}x{width}.")
    with whole_file(path) as partial, av.open(str(partial), "w", format="mp4", options=_FASTSTART) as container:
        # 29.97 becomes 30000/1001, a fraction in which timestamps can be counted exactly.
        rate = Fraction(fps).limit_denominator(1001)
        options = {"crf": str(crf)}
        if num_threads == 1:
            options["x264-params"] = "asm=0"  # output of the AVX-512 code differs from run to run
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.codec_context.thread_count = num_threads
        for image in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
        container.mux(stream.encode())


# ---------------------------------------------------------------------------------------------------- frame times


def _open(path: str | Path) -> InputContainer:
    """Open a PyAV container with at least one video stream, and set up the first for strict decoding."""
    import av

    path = Path(path)
    # By default, PyAV 18 raises UnicodeDecodeError for a title that is not UTF-8. PyAV 19 does not.
    options: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
    try:
        num_bytes = path.stat().st_size
        if path.is_dir():
            raise DecodeError("it is a folder, not a file")
        if not num_bytes:
            raise DecodeError("the file is empty (0 bytes)")
        container = av.open(str(path), **options)
    except FileNotFoundError:
        raise DecodeError("the file does not exist") from None
    except MemoryError:
        raise
    except (OSError, av.error.FFmpegError) as error:
        raise DecodeError(f"it cannot be opened as a video: {_brief(error)}") from None
    if not container.streams.video:
        container.close()
        raise DecodeError("it has no video stream (audio only, or cut short?)")
    if container.streams.video[0].codec_context is None:
        container.close()
        raise DecodeError("its codec is not supported by the decoder: re-encode it")
    # One thread misses damage in 1 of 16 damaged copies, slice threads in 6, and frame threads may hang.
    stream = container.streams.video[0]
    stream.thread_type = "NONE"
    stream.codec_context.options = {"err_detect": "crccheck+bitstream+buffer+explode"}
    return container


# Timelines of recent files. Windows of a long video are read one after the other, and reading its timeline reads all of
# its packets.
_recent_timelines: dict[tuple[str, int, int], _Timeline] = {}
_MAX_RECENT = 8


def _cached_timeline(path: str | Path, container: InputContainer) -> _Timeline:
    """The file's timeline, which is read again only if the file changes."""
    stat = os.stat(path)
    key = (str(path), stat.st_size, stat.st_mtime_ns)
    if key not in _recent_timelines:
        while len(_recent_timelines) >= _MAX_RECENT:
            del _recent_timelines[next(iter(_recent_timelines))]
        _recent_timelines[key], _ = _read_timeline(container)
    return _recent_timelines[key]


def _read_timeline(container: InputContainer, decode_first: bool = False) -> tuple[_Timeline, VideoFrame | None]:
    """Read the timeline from the packets, and decode the first frame if decode_first is set (otherwise None)."""
    import av

    stream = container.streams.video[0]
    shown: list[int] = []
    keys: list[int] = []
    hidden, newest, length, first = 0, -math.inf, 0, None
    try:
        for packet in container.demux(stream):
            if decode_first and first is None:
                first = next(iter(packet.decode()), None)
            if packet.size == 0:  # the flush packet at the end
                continue
            if packet.is_corrupt:
                raise DecodeError("the container marks a packet as corrupt (a truncated file?)")
            if packet.pts is None:
                raise DecodeError("its frames have no timestamps: remux it to mp4")
            if packet.is_discard:
                hidden += 1
                continue
            if packet.pts > newest:
                newest, length = packet.pts, packet.duration or 0
            shown.append(packet.pts)
            if packet.is_keyframe:
                keys.append(packet.pts)
    except MemoryError:
        raise  # not a problem of the file
    except av.error.FFmpegError as error:
        raise DecodeError(f"it cannot be read to its end: {_brief(error)}") from None
    if not shown:
        raise DecodeError("it has no frames")
    # MP4 and AVI headers contain the number of frames.
    if stream.frames > len(shown) + hidden:
        raise DecodeError(f"it is truncated: only {len(shown) + hidden} of {stream.frames} frames are left")
    shown.sort()
    if any(first_pts == second for first_pts, second in itertools.pairwise(shown)):
        raise DecodeError("two of its frames have the same timestamp: remux it to mp4")
    time_base, rate = Fraction(stream.time_base or 0), stream.average_rate
    span = float((shown[-1] - shown[0]) * time_base)
    measured = (len(shown) - 1) / span if span > 0 else 0.0
    fps = float(rate) if rate else measured
    if measured and abs(fps / measured - 1) > RATE_TOLERANCE:
        fps = measured
    if len(shown) > 1 and (fps <= 0 or span <= 0):
        raise DecodeError("its frame rate is 0")
    if not length and fps:
        length = max(1, round(1 / (fps * time_base)))
    aspect = Fraction(stream.sample_aspect_ratio or 1)
    indices = [bisect.bisect_left(shown, pts) for pts in sorted(keys)]
    timeline = _Timeline(shown, indices, time_base, shown[-1] + length, hidden, fps, aspect)
    if decode_first:
        _check_frame(first, timeline, 0)
    return timeline, first


def _end_s(duration_s: float, end_s: float | None) -> float:
    return min(duration_s, math.inf if end_s is None else end_s) - TIME_TOLERANCE_S


def _displayed_frames(timeline: _Timeline, times_s: Sequence[float], end_s: float | None) -> list[int]:
    """For each time, the index of the last frame that starts at or before it."""
    end = math.inf if len(timeline.pts) == 1 and times_s[-1] == 0 else _end_s(timeline.duration_s, end_s)
    if times_s[-1] >= end:
        usable = f", usable up to {end_s:.3f} s" if end_s is not None else ""
        raise DecodeError(
            f"it ends too early: the clip needs a frame at {times_s[-1]:.3f} s, but the file has "
            f"{timeline.duration_s:.3f} s{usable}"
        )
    latest = [timeline.pts[0] + math.floor(Fraction(time + TIME_TOLERANCE_S) / timeline.time_base) for time in times_s]
    return [max(0, bisect.bisect_right(timeline.pts, pts) - 1) for pts in latest]


# -------------------------------------------------------------------------------------------------------- decoding


def _decode_strict(
    container: InputContainer, timeline: _Timeline, first: int, last: int, seek: bool = True
) -> Iterator[tuple[int, VideoFrame]]:
    """Yield the frames first to last (indices and PyAV frames). Raises DecodeError if one is damaged or missing.

    Frames before `first` are dropped, because they may depend on frames before the keyframe.

    Args:
        first: 0 or a keyframe.
        seek: seek to `first`. Not needed for a container that was just opened, if first is 0.
    """
    import av

    stream = container.streams.video[0]
    index, size = first - 1, None
    try:
        if seek:
            container.seek(timeline.pts[first], stream=stream)
        for frame in container.decode(stream):
            if index < first and first and frame.pts is not None and frame.pts < timeline.pts[first]:
                continue
            index += 1
            _check_frame(frame, timeline, index)
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
        raise DecodeError(f"decoding fails near {time_s:.3f} s: {_brief(error)}") from None
    raise DecodeError(f"only {index + 1} of its {len(timeline.pts)} frames can be decoded")


def _check_frame(frame: VideoFrame | None, timeline: _Timeline, index: int) -> None:
    if frame is not None and frame.is_corrupt:
        raise DecodeError(f"the frame at {timeline.seconds(index):.3f} s is damaged")
    if frame is None or frame.pts != timeline.pts[index]:
        raise DecodeError(f"the frame at {timeline.seconds(index):.3f} s cannot be decoded")


def _read_pyav(
    frames: Iterator[tuple[int, VideoFrame]], timeline: _Timeline, indices: Sequence[int], shape: ClipShape
) -> np.ndarray:
    clip = np.empty((shape.frames, shape.height, shape.width, 3), np.uint8)
    fitter, wanted = _Fitter(timeline.pixel_aspect), 0
    for index, frame in frames:
        if index != indices[wanted]:
            continue
        fitter.fit(frame, clip[wanted])
        wanted = _repeat(clip, indices, wanted)
    return clip


def _repeat(clip: np.ndarray, indices: Sequence[int], k: int) -> int:
    """Copy frame k to the following frames that show the same source frame. Returns the next k with a different one."""
    end = bisect.bisect_right(indices, indices[k])
    clip[k + 1 : end] = clip[k]
    return end


class _DecordUnreliableError(Exception):
    """decord cannot decode this file, or returns different frames than PyAV."""


# Values of AVColorSpace and AVColorRange. decord handles RGB (no matrix), unspecified, BT.470BG and SMPTE 170M (both
# BT.601), and no full range.
_DECORD_SPACES, _FULL_RANGE = {0, 2, 5, 6}, 2


def _read_decord(
    path: str | Path,
    frames: Iterator[tuple[int, VideoFrame]],
    timeline: _Timeline,
    indices: Sequence[int],
    shape: ClipShape,
) -> np.ndarray:
    """Read a clip with decord, in order and without seeking. frames: PyAV's; only the first is compared.

    Raises _DecordUnreliableError if decord fails, substitutes frames at the end, reports different times or a
    different first frame, or would misinterpret the colors. Damage in between is not detected.
    """
    # decord reads this variable when it is loaded. With the default of 10240 attempts, reading the last frames of a
    # broken file takes minutes. A decoder only holds back a few dozen frames.
    os.environ.setdefault("DECORD_EOF_RETRY_MAX", "256")
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    _, frame = next(frames)
    if frame.colorspace not in _DECORD_SPACES or frame.color_range == _FULL_RANGE:
        raise _DecordUnreliableError("its colors are not tagged as BT.601 with limited range")
    clip = np.empty((shape.frames, shape.height, shape.width, 3), np.uint8)
    reference = np.empty_like(clip[0])
    _Fitter(timeline.pixel_aspect).fit(frame, reference)
    size, (top, left) = _cover(_displayed_size(frame, timeline.pixel_aspect), shape.height, shape.width)
    stored = (frame.width, frame.height) if _turns(frame) % 2 else (frame.height, frame.width)
    scaled = {} if size == stored else {"height": size[0], "width": size[1]}
    times_s = np.array([timeline.seconds(index) for index in range(len(timeline.pts))])
    try:
        # fault_tol is compared with the number of substituted frames: 1 allows one, 0 disables the check, and a
        # fraction is multiplied by the number of frames. This is less than one frame for any length.
        reader = decord.VideoReader(str(path), num_threads=1, fault_tol=1e-9, **scaled)
        starts = reader.get_frame_timestamp(range(len(reader)))[:, 0].astype(np.float64)
        tolerance = TIME_TOLERANCE_S + 2 * np.finfo(np.float32).eps * np.abs(starts).max()  # decord's are float32
        if timeline.num_hidden or len(starts) != len(times_s) or np.abs(starts - starts[0] - times_s).max() > tolerance:
            raise _DecordUnreliableError("it reports different frame times")
        wanted = 0
        for index in range(indices[-1] + 1):
            if index and index != indices[wanted]:
                reader.skip_frames(1)
                continue
            pixels = reader.next().asnumpy()[top : top + shape.height, left : left + shape.width]
            if not index and (
                pixels.shape != reference.shape or np.abs(pixels.astype(np.int16) - reference).mean() > PIXEL_TOLERANCE
            ):
                raise _DecordUnreliableError("it returns a different first frame")
            if index == indices[wanted]:
                clip[wanted] = pixels
                wanted = _repeat(clip, indices, wanted)
    except (decord.DECORDError, decord.DECORDLimitReachedError, RuntimeError, AssertionError, StopIteration) as error:
        raise _DecordUnreliableError(_brief(error)) from None
    return clip


def _turns(frame: VideoFrame) -> int:
    """Number of counterclockwise quarter turns that make a stored frame upright."""
    from av.sidedata.sidedata import SideDataContainer

    try:
        # With frame.side_data, PyAV 18 creates a reference cycle, and frames are never freed.
        matrix = SideDataContainer(frame).get("DISPLAYMATRIX")  # type: ignore[call-arg]
    except ValueError as error:  # in PyAV 18, for example for the EXIF data of a camera's motion JPEG
        raise DecodeError(
            f"its frames have side data that is not supported by PyAV 18 ({error}): re-encode it, or install av>=19"
        ) from None
    if matrix is not None:
        a, b, _, c, d, *_ = struct.unpack("=9i", bytes(matrix)[:36])
        if a * d - b * c < 0:
            raise DecodeError("its display matrix mirrors the picture, which is not supported: re-encode it")
    if frame.rotation % 90:
        raise DecodeError(f"its rotation of {frame.rotation} degrees is not supported: re-encode it")
    return frame.rotation // 90 % 4


def _displayed_size(frame: VideoFrame, pixel_aspect: Fraction) -> tuple[int, int]:
    """Height and width of a PyAV frame on a display with square pixels."""
    width, height = max(1, round(frame.width * pixel_aspect)), frame.height
    return (width, height) if _turns(frame) % 2 else (height, width)


def _brief(error: BaseException) -> str:
    """The first line of an error's message, without the C++ stack trace that decord adds."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.strip().splitlines()[0]


# -------------------------------------------------------------------------------------------- images and resizing


def _load_image(path: str | Path) -> Image:
    """Load a PIL image in RGB with EXIF orientation applied."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise DecodeError(f"its pixels are of mode {image.mode}, not 8 bits: convert it to 8 bits")
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise DecodeError("the file does not exist") from None
    except IsADirectoryError:
        raise DecodeError("it is a folder, not a file") from None
    except (DecodeError, MemoryError):
        raise
    except Exception as error:
        # On damaged bytes Pillow's parsers raise errors of any type: OSError, SyntaxError, struct.error, TypeError, ...
        if _is_raised_here(error):
            raise
        raise DecodeError(f"it cannot be read as an image: {_brief(error)}") from None


def _is_raised_here(error: BaseException) -> bool:
    """Whether the error was raised in this module, which is a bug, and not in a library that it calls."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_code.co_filename == __file__


def _cover(displayed: tuple[int, int], height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Size (height, width) at which a picture covers height x width, and the (top, left) offset of the center crop."""
    scale = max(height / displayed[0], width / displayed[1])
    size = (max(height, round(displayed[0] * scale)), max(width, round(displayed[1] * scale)))
    return size, ((size[0] - height) // 2, (size[1] - width) // 2)


class _Fitter:
    """Converts frames of one stream to upright RGB that covers a size. Reuses the scaler's filters between frames."""

    def __init__(self, pixel_aspect: Fraction) -> None:
        from av.video.reformatter import VideoReformatter

        self._pixel_aspect = pixel_aspect
        self._scaler, self._packer = VideoReformatter(), VideoReformatter()

    def fit(self, frame: VideoFrame, out: np.ndarray) -> None:
        """Write a PyAV frame, scaled and center-cropped, to out [H, W, 3] in one pass from the decoded planes.

        If no scaling or rotation is needed, this is FFmpeg's plain conversion.
        """
        import av
        from av.video.reformatter import Interpolation

        turns, (height, width, _) = _turns(frame), out.shape
        size, (top, left) = _cover(_displayed_size(frame, self._pixel_aspect), height, width)
        tall, wide = size[::-1] if turns % 2 else size
        flags = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
        try:
            if (tall, wide) != (frame.height, frame.width):
                # One thread, because several worker processes share the cores.
                frame = self._scaler.reformat(frame, wide, tall, "gbrp", interpolation=flags, threads=1)
            if turns:
                frame = _turned(self._scaler.reformat(frame, format="gbrp", threads=1), turns)
            frame = self._packer.reformat(frame, format="rgb24", threads=1)
        except MemoryError:
            raise
        except av.error.FFmpegError as error:
            raise DecodeError(f"its pixels ({frame.format.name}) cannot be converted: {_brief(error)}") from None
        rows = _plane(frame, 0, 3)
        out.reshape(height, 3 * width)[:] = rows[top : top + height, 3 * left : 3 * (left + width)]


def _plane(frame: VideoFrame, plane: int, num_channels: int = 1) -> np.ndarray:
    """A view of a plane's bytes without padding: [height, width * num_channels]."""
    rows = np.frombuffer(memoryview(frame.planes[plane]), np.uint8).reshape(frame.height, -1)
    return rows[:, : frame.width * num_channels]


def _turned(frame: VideoFrame, turns: int) -> VideoFrame:
    """Rotate a gbrp frame counterclockwise by quarter turns. Rotating planes is twice as fast as packed pixels."""
    import av

    size = (frame.height, frame.width) if turns % 2 else (frame.width, frame.height)
    turned = av.VideoFrame(*size, "gbrp")
    for plane in range(3):
        _plane(turned, plane)[:] = np.rot90(_plane(frame, plane), turns)
    return turned
