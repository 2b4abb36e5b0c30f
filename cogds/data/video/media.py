"""Files to frames and back: probe, decode by time, resize, crop, write. The only importer of PyAV and decord.

PyAV decodes, strictly and once: what is wanted is picked by the container's table of timestamps, scaled from the
decoded planes and cut to size as it comes. PyAV 18 and 19 are supported: what differs between them is commented. decord
is there for those who trust their files. What was measured with PyAV 18.1 and decord 0.6.0 (H.264, H.265, VP9, MPEG-4;
8 bits, 420 and 444):

- both give bit-identical RGB at the source's size, upright where the file carries a rotation, in either import order;
- decord on 200 damaged copies of real clips: 190 wrong results, 10 errors, whatever `fault_tol` is: it only counts
  frames that are missing at the end. PyAV's corrupt flag and errors name about 9 in 10 of the damaged copies, the
  same with `explode` and with FFmpeg's error log added. The rest are streams that are valid to any decoder: MP4
  carries no checksum;
- decord shifts every frame of a file whose edit list hides its first ones (what `ffmpeg -ss -c copy` writes), shifts
  MPEG-TS too, cannot read AV1 and takes every file for BT.601. Where that shows, it is refused;
- scaling to planar RGB and interleaving after it: 52 to 56 dB from an accurate conversion with an antialiased bicubic
  filter in floating point, 2 to 4 ms for 1366x768. Straight to packed RGB: 39 to 44 dB, darker by 1.5 of 255 levels,
  8 to 10 ms, since FFmpeg has vector code for the planar layout and fills in chroma at full resolution there.

PyAV, decord and PIL are imported where they are used: training from a cache needs no decoder.
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
    from PIL.Image import Image

# Containers round timestamps to 1 ms at worst (mkv): a frame due at 62.5 ms may say 63, so half of that and a little.
TIME_TOLERANCE_S = 0.0006
# Mean difference, in 8-bit levels, that decord's and PyAV's first frame may show. Measured: 0; scaled, up to 2.4.
PIXEL_TOLERANCE = 8.0
# A container's frame rate that is further from its packets than this is not believed.
RATE_TOLERANCE = 0.1

DECODERS = ("pyav", "decord")

_FASTSTART = {"movflags": "+faststart"}


class DecodeError(Exception):
    """A file that cannot be used; the message is one sentence that says why."""


@dataclass(frozen=True)
class VideoInfo:
    """What a file holds. width, height: pixels as displayed (rotation and pixel aspect applied).

    duration_s: from the start of the first frame to the end of the last. An image: 1 frame, fps and duration 0.
    rotation: degrees (0, 90, 180, 270) that a video's stored frames are turned clockwise to be displayed.
    """

    num_frames: int
    fps: float
    width: int
    height: int
    duration_s: float
    rotation: int = 0


@dataclass(frozen=True)
class _Timeline:
    """When the frames of a stream are shown: from its packets, without decoding."""

    pts: list[int]  # of the frames that are shown, rising, in units of time_base
    keys: list[int]  # indices of those that can be decoded without any before them
    time_base: Fraction
    end: int  # end of the last frame
    num_hidden: int  # packets that an edit list hides
    fps: float
    pixel_aspect: Fraction  # width of a pixel over its height

    def seconds(self, index: int) -> float:
        return float((self.pts[index] - self.pts[0]) * self.time_base)

    def key_before(self, index: int) -> int:
        """The last keyframe at or before this frame; 0 where there is none (a stream that was cut between two)."""
        position = bisect.bisect_right(self.keys, index)
        return self.keys[position - 1] if position else 0

    @property
    def duration_s(self) -> float:
        return float((self.end - self.pts[0]) * self.time_base)


def probe_video(path: str | Path) -> VideoInfo:
    """Read the container's table of frames and decode the first one. Raises DecodeError for whatever is wrong."""
    with _open(path) as container:
        timeline, frame = _survey(container, decode_first=True)
    height, width = _displayed_size(frame, timeline.pixel_aspect)
    rotation = -90 * _turns(frame) % 360
    return VideoInfo(len(timeline.pts), timeline.fps, width, height, timeline.duration_s, rotation)


def probe_image(path: str | Path) -> VideoInfo:
    """Decode a picture; its size is as displayed (EXIF orientation applied). Raises DecodeError."""
    width, height = _load_image(path).size
    return VideoInfo(1, 0.0, width, height, 0.0)


def num_frames_at(info: VideoInfo, fps: float, start_s: float = 0.0, end_s: float | None = None) -> int:
    """Frames that the range has at another rate: those k for which start_s + k / fps lies before its end.

    start_s, end_s: seconds after the first frame; without end_s the range goes to the end of the last frame. What is
    counted is what `read_clip` gives. A picture, and a clip of one frame, has one at 0 s.
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
    """Decode, resample by time, resize to cover and crop the centre: uint8 [F, H, W, 3], C-contiguous.

    Frame k is the source frame on display `start_s + k / fps` seconds after the first one, so slow sources repeat
    frames and variable frame rates come out right. end_s: end of the range that may be used, in the same seconds.
    decoder: "pyav" starts at the keyframe before the first frame that is wanted, where the timestamps of what comes
    prove it right, else at the beginning; "decord" starts at the beginning, and sees no damage.

    Colours follow the stream's matrix and range; unspecified means BT.601, limited, as FFmpeg has it. Memory: the
    result and a few frames of the source. Raises DecodeError where the file is damaged or ends too early, and where
    decord cannot be relied on for it.
    """
    if fps <= 0 or start_s < 0 or decoder not in DECODERS:
        raise ValueError(
            f"fps must be above 0, start_s at least 0, decoder one of {DECODERS}: got {fps}, {start_s} and {decoder!r}"
        )
    with _open(path) as container:
        timeline = _timeline(path, container)
        indices = _frames_on_display(timeline, [start_s + k / fps for k in range(shape.frames)], end_s)
        if decoder == "pyav" and not timeline.num_hidden:
            frames = _decode_strict(container, timeline, timeline.key_before(indices[0]), indices[-1])
            try:
                return _read_pyav(frames, timeline, indices, shape)
            except DecodeError:
                pass  # the seek may have gone astray, or the keyframe be none: opened anew, what is wrong has a name
    with _open(path) as container:
        frames = _decode_strict(container, timeline, 0, indices[-1], seek=False)
        if decoder == "pyav":
            return _read_pyav(frames, timeline, indices, shape)
        try:
            return _read_decord(path, frames, timeline, indices, shape)
        except _DecordUnfitError as error:
            raise DecodeError(f"decord cannot be relied on for it ({error}): set data.decoder=pyav") from None


def read_image(path: str | Path, height: int, width: int) -> np.ndarray:
    """A picture, EXIF orientation applied, resized to cover and cropped at the centre: uint8 [H, W, 3].

    Antialiased bicubic; pixels that need no resizing are not touched. Transparency is dropped as diffusers'
    `load_image` drops it. Raises DecodeError.
    """
    from PIL import Image

    image = _load_image(path)
    (tall, wide), (top, left) = _cover((image.height, image.width), height, width)
    if (tall, wide) == (image.height, image.width):
        image = image.crop((left, top, left + width, top + height))
    else:
        # PIL scales no more than what is kept, and takes the neighbours outside of it into account.
        across, down = image.width / wide, image.height / tall
        box = (left * across, top * down, (left + width) * across, (top + height) * down)
        image = image.resize((width, height), Image.Resampling.BICUBIC, box)
    return np.array(image)


def write_video(
    path: str | Path, frames: np.ndarray | torch.Tensor, fps: float, crf: int = 18, num_threads: int = 0
) -> None:
    """Encode uint8 [F, H, W, 3] as H.264 (yuv420p), readable while it loads, under its name only when complete.

    num_threads: 0 lets x264 choose; with 1 the same frames give the same file on any machine. Raises UserError for
    odd sizes, which yuv420p cannot hold, and ValueError for any other kind of array.
    """
    import av

    pixels = np.asarray(frames)
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3 or not len(pixels):
        raise ValueError(f"frames must be uint8 [F, H, W, 3] with F > 0: got {pixels.dtype} {list(pixels.shape)}")
    height, width = pixels.shape[1:3]
    if height % 2 or width % 2:
        raise UserError(f"cannot write {path}: H.264 needs an even height and width, the frames are {height}x{width}")
    with whole_file(path) as partial, av.open(str(partial), "w", format="mp4", options=_FASTSTART) as container:
        # A rate of 29.97 is 30000/1001: the nearest fraction that timestamps can be counted in.
        rate = Fraction(fps).limit_denominator(1001)
        options = {"crf": str(crf)}
        if num_threads == 1:
            options["x264-params"] = "asm=0"  # its AVX-512 code gives other bits from one run to the next
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.codec_context.thread_count = num_threads
        for image in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
        container.mux(stream.encode())


# ---------------------------------------------------------------------------------------------- when frames stand


def _open(path: str | Path) -> Any:
    """An open PyAV container with at least one video stream, the first of which is decoded strictly."""
    import av

    path = Path(path)
    # PyAV 18 raises UnicodeDecodeError for a title that is not UTF-8 unless told otherwise; PyAV 19 never does.
    lenient: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
    try:
        num_bytes = path.stat().st_size
        if path.is_dir():
            raise DecodeError("it is a folder, not a file")
        if not num_bytes:
            raise DecodeError("the file is empty (0 bytes)")
        container = av.open(str(path), **lenient)
    except FileNotFoundError:
        raise DecodeError("the file does not exist") from None
    except MemoryError:
        raise
    except (OSError, av.error.FFmpegError) as error:
        raise DecodeError(f"it cannot be opened as a video: {_brief(error)}") from None
    if not container.streams.video:
        container.close()
        raise DecodeError("it holds no video stream (audio only, or cut short?)")
    if container.streams.video[0].codec_context is None:
        container.close()
        raise DecodeError("its codec is one that the decoder does not know: re-encode it")
    # One thread: of 16 damaged copies 1 passes unseen, with FFmpeg's slice threads 6; with frame threads a run over
    # such copies did not end.
    stream = container.streams.video[0]
    stream.thread_type = "NONE"
    stream.codec_context.options = {"err_detect": "crccheck+bitstream+buffer+explode"}
    return container


# Of the files read last: the windows of a long film come one after the other, and its table is all of its packets.
_recent: dict[tuple[str, int, int], _Timeline] = {}
_NUM_RECENT = 8


def _timeline(path: str | Path, container: Any) -> _Timeline:
    """The file's table of frames, read once for as long as the file stays the same."""
    stat = os.stat(path)
    key = (str(path), stat.st_size, stat.st_mtime_ns)
    if key not in _recent:
        while len(_recent) >= _NUM_RECENT:
            del _recent[next(iter(_recent))]
        _recent[key], _ = _survey(container)
    return _recent[key]


def _survey(container: Any, decode_first: bool = False) -> tuple[_Timeline, Any]:
    """The table of frames from the packets, and the first frame where that is asked for."""
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
                raise DecodeError("its frames carry no timestamps: remux it to mp4")
            if packet.is_discard:
                hidden += 1
                continue
            if packet.pts > newest:
                newest, length = packet.pts, packet.duration or 0
            shown.append(packet.pts)
            if packet.is_keyframe:
                keys.append(packet.pts)
    except MemoryError:
        raise  # says nothing about the file
    except av.error.FFmpegError as error:
        raise DecodeError(f"it cannot be read to its end: {_brief(error)}") from None
    if not shown:
        raise DecodeError("it holds no frames")
    # MP4 and AVI say in their header how many frames there must be.
    if stream.frames > len(shown) + hidden:
        raise DecodeError(f"it is truncated: {len(shown) + hidden} of {stream.frames} frames are there")
    shown.sort()
    if any(first_pts == second for first_pts, second in itertools.pairwise(shown)):
        raise DecodeError("two of its frames carry the same timestamp: remux it to mp4")
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


def _frames_on_display(timeline: _Timeline, times_s: Sequence[float], end_s: float | None) -> list[int]:
    """For each time the index of the last frame that starts at or before it."""
    end = math.inf if len(timeline.pts) == 1 and times_s[-1] == 0 else _end_s(timeline.duration_s, end_s)
    if times_s[-1] >= end:
        range_ends = f", of which {end_s:.3f} s may be used" if end_s is not None else ""
        raise DecodeError(
            f"it ends too early: a frame at {times_s[-1]:.3f} s is wanted of a clip of {timeline.duration_s:.3f} s"
            f"{range_ends}"
        )
    latest = [timeline.pts[0] + math.floor(Fraction(time + TIME_TOLERANCE_S) / timeline.time_base) for time in times_s]
    return [max(0, bisect.bisect_right(timeline.pts, pts) - 1) for pts in latest]


# -------------------------------------------------------------------------------------------------------- decoding


def _decode_strict(
    container: Any, timeline: _Timeline, first: int, last: int, seek: bool = True
) -> Iterator[tuple[int, Any]]:
    """PyAV's frames first..last, none of them damaged, missing or out of place; else DecodeError.

    first: 0, or a keyframe. It is sought, since the container has been read for its table; seek=False: it was not.
    What comes before it is dropped: a decoder that starts there gives frames that were made of others.
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


def _check_frame(frame: Any, timeline: _Timeline, index: int) -> None:
    if frame is not None and frame.is_corrupt:
        raise DecodeError(f"the frame at {timeline.seconds(index):.3f} s is damaged")
    if frame is None or frame.pts != timeline.pts[index]:
        raise DecodeError(f"the frame at {timeline.seconds(index):.3f} s cannot be decoded")


def _read_pyav(
    frames: Iterator[tuple[int, Any]], timeline: _Timeline, indices: Sequence[int], shape: ClipShape
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
    """Copy frame k to those after it that show the same source frame; the first k that shows another."""
    end = bisect.bisect_right(indices, indices[k])
    clip[k + 1 : end] = clip[k]
    return end


class _DecordUnfitError(Exception):
    """decord cannot decode this file, or not frame for frame; PyAV can."""


# AVColorSpace and AVColorRange: unspecified, BT.470BG and SMPTE 170M (both BT.601), RGB has no matrix; not full range.
_DECORD_SPACES, _FULL_RANGE = {0, 2, 5, 6}, 2


def _read_decord(
    path: str | Path, frames: Iterator[tuple[int, Any]], timeline: _Timeline, indices: Sequence[int], shape: ClipShape
) -> np.ndarray:
    """decord's frames, in order and without a seek. frames: PyAV's, the first of which decord's is held against.

    Raises _DecordUnfitError where decord fails, substitutes frames at the end, has another table of them or another
    first one, or would take the colours for what they are not. Damage in between goes unseen.
    """
    # decord reads this when it is loaded. Its default, 10240 attempts to get the last frames of a broken file,
    # takes minutes; the frames that a decoder holds back are a few dozen.
    os.environ.setdefault("DECORD_EOF_RETRY_MAX", "256")
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    _, frame = next(frames)
    if frame.colorspace not in _DECORD_SPACES or frame.color_range == _FULL_RANGE:
        raise _DecordUnfitError("its colours are not tagged as BT.601 of limited range")
    clip = np.empty((shape.frames, shape.height, shape.width, 3), np.uint8)
    referee = np.empty_like(clip[0])
    _Fitter(timeline.pixel_aspect).fit(frame, referee)
    size, (top, left) = _cover(_displayed_size(frame, timeline.pixel_aspect), shape.height, shape.width)
    stored = (frame.width, frame.height) if _turns(frame) % 2 else (frame.height, frame.width)
    scaled = {} if size == stored else {"height": size[0], "width": size[1]}
    ours = np.array([timeline.seconds(index) for index in range(len(timeline.pts))])
    try:
        # fault_tol is compared with the number of substituted frames: 1 lets one pass, 0 switches the check off,
        # and a fraction is multiplied by the length. This is below one frame for any length.
        reader = decord.VideoReader(str(path), num_threads=1, fault_tol=1e-9, **scaled)
        starts = reader.get_frame_timestamp(range(len(reader)))[:, 0].astype(np.float64)
        tolerance = TIME_TOLERANCE_S + 2 * np.finfo(np.float32).eps * np.abs(starts).max()  # its seconds are float32
        if timeline.num_hidden or len(starts) != len(ours) or np.abs(starts - starts[0] - ours).max() > tolerance:
            raise _DecordUnfitError("it has another table of frames")
        wanted = 0
        for index in range(indices[-1] + 1):
            if index and index != indices[wanted]:
                reader.skip_frames(1)
                continue
            pixels = reader.next().asnumpy()[top : top + shape.height, left : left + shape.width]
            if not index and (
                pixels.shape != referee.shape or np.abs(pixels.astype(np.int16) - referee).mean() > PIXEL_TOLERANCE
            ):
                raise _DecordUnfitError("its first frame is another one")
            if index == indices[wanted]:
                clip[wanted] = pixels
                wanted = _repeat(clip, indices, wanted)
    except (decord.DECORDError, decord.DECORDLimitReachedError, RuntimeError, AssertionError, StopIteration) as error:
        raise _DecordUnfitError(_brief(error)) from None
    return clip


def _turns(frame: Any) -> int:
    """Quarter turns, counter-clockwise, that bring a stored frame upright."""
    from av.sidedata.sidedata import SideDataContainer

    try:
        # Not frame.side_data: in PyAV 18 frame and container then hold each other, and no frame is ever freed.
        matrix = SideDataContainer(frame).get("DISPLAYMATRIX")  # type: ignore[call-arg]
    except ValueError as error:  # of PyAV 18, such as the EXIF of a camera's motion JPEG
        raise DecodeError(
            f"its frames carry side data that is not supported by PyAV 18 ({error}): re-encode it, or install av>=19"
        ) from None
    if matrix is not None:
        a, b, _, c, d, *_ = struct.unpack("=9i", bytes(matrix)[:36])
        if a * d - b * c < 0:
            raise DecodeError("it is shown mirrored (display matrix), which is not supported: re-encode it")
    if frame.rotation % 90:
        raise DecodeError(f"it is shown turned by {frame.rotation} degrees, which is not supported: re-encode it")
    return frame.rotation // 90 % 4


def _displayed_size(frame: Any, pixel_aspect: Fraction) -> tuple[int, int]:
    """Height and width of a PyAV frame on a display with square pixels."""
    width, height = max(1, round(frame.width * pixel_aspect)), frame.height
    return (width, height) if _turns(frame) % 2 else (height, width)


def _brief(error: BaseException) -> str:
    """The last line of an error's text, without the C++ stack that decord adds."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.strip().splitlines()[0]


# ------------------------------------------------------------------------------------------------- pictures and size


def _load_image(path: str | Path) -> Image:
    """A PIL image in RGB, EXIF orientation applied."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise DecodeError(f"its pixels are of mode {image.mode}, not 8 bits: convert it")
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
    """Whether this module raised the error, not a library that it calls: a bug, such as an argument that is gone."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_code.co_filename == __file__


def _cover(displayed: tuple[int, int], height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The size at which a picture covers height x width, its displayed aspect kept, and where the centre starts."""
    scale = max(height / displayed[0], width / displayed[1])
    size = (max(height, round(displayed[0] * scale)), max(width, round(displayed[1] * scale)))
    return size, ((size[0] - height) // 2, (size[1] - width) // 2)


class _Fitter:
    """Frames of one stream to RGB that covers a size, upright. Keeps the scaler's filters between frames."""

    def __init__(self, pixel_aspect: Fraction) -> None:
        from av.video.reformatter import VideoReformatter

        self._pixel_aspect = pixel_aspect
        self._scaler, self._packer = VideoReformatter(), VideoReformatter()

    def fit(self, frame: Any, out: np.ndarray) -> None:
        """Write a PyAV frame, scaled and cropped at the centre, to out [H, W, 3]. One pass from the decoded planes.

        Where nothing is to be scaled or turned, this is FFmpeg's plain conversion.
        """
        import av
        from av.video.reformatter import Interpolation

        turns, (height, width, _) = _turns(frame), out.shape
        size, (top, left) = _cover(_displayed_size(frame, self._pixel_aspect), height, width)
        tall, wide = size[::-1] if turns % 2 else size
        flags = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
        try:
            if (tall, wide) != (frame.height, frame.width):
                # One thread each: the children of a pool share the cores.
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


def _plane(frame: Any, plane: int, num_channels: int = 1) -> np.ndarray:
    """The bytes of a plane without padding: a view [height, width * num_channels]."""
    rows = np.frombuffer(frame.planes[plane], np.uint8).reshape(frame.height, -1)
    return rows[:, : frame.width * num_channels]


def _turned(frame: Any, turns: int) -> Any:
    """A gbrp frame, turned counter-clockwise by quarters. Per plane: twice as fast as turning packed pixels."""
    import av

    size = (frame.height, frame.width) if turns % 2 else (frame.width, frame.height)
    turned = av.VideoFrame(*size, "gbrp")
    for plane in range(3):
        _plane(turned, plane)[:] = np.rot90(_plane(frame, plane), turns)
    return turned
