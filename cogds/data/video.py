"""Files to frames and back: probe, decode by time, resize, crop, write. The only importer of decord and PyAV.

decord decodes; PyAV, whose FFmpeg is newer and reports damage, says when every frame stands and vouches for the
stream. What was measured with decord 0.6.0 and PyAV 18.1 (H.264, H.265, VP9, MPEG-4; 8 bits, 420 and 444):

- both give bit-identical RGB, upright where the file carries a rotation, in either import order;
- decord on 200 damaged copies of real clips: 190 wrong results, 10 errors, whatever `fault_tol` is: it only counts
  frames that are missing at the end. PyAV's corrupt flag and errors name about 9 in 10 of the damaged copies, the
  same with `explode` and with FFmpeg's error log added, so the strict pass below stands before decord. The rest are
  streams that are valid to any decoder: MP4 carries no checksum;
- decord shifts every frame of a file whose edit list hides its first ones (what `ffmpeg -ss -c copy` writes), shifts
  MPEG-TS too, and cannot read AV1. Where its table of frames or its last frame is not PyAV's, PyAV's are taken.

decord, PyAV and torch are imported where they are used: probing needs no torch, and training from a cache no decoder.
"""

from __future__ import annotations

import bisect
import collections
import itertools
import math
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
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

# Containers round timestamps to 1 ms at worst (mkv): a frame due at 62.5 ms may say 63, so half of that and a little.
TIME_TOLERANCE_S = 0.0006
# Mean difference, in 8-bit levels, that decord's and PyAV's conversion to RGB may show. Measured: 0.
PIXEL_TOLERANCE = 8.0

_FASTSTART = {"movflags": "+faststart"}


class DecodeError(Exception):
    """A file that cannot be used; the message is one sentence that says why."""


@dataclass(frozen=True)
class VideoInfo:
    """What a file holds. width, height: pixels as displayed (rotation and pixel aspect applied).

    duration_s: from the start of the first frame to the end of the last. An image: 1 frame, fps and duration 0.
    """

    num_frames: int
    fps: float
    width: int
    height: int
    duration_s: float


@dataclass(frozen=True)
class _Timeline:
    """When the frames of a stream are shown: from its packets, without decoding."""

    pts: list[int]  # of the frames that are shown, rising, in units of time_base
    time_base: Fraction
    end: int  # end of the last frame
    num_hidden: int  # packets that an edit list hides
    fps: float
    pixel_aspect: Fraction  # width of a pixel over its height

    def seconds(self, index: int) -> float:
        return float((self.pts[index] - self.pts[0]) * self.time_base)

    @property
    def duration_s(self) -> float:
        return float((self.end - self.pts[0]) * self.time_base)


def probe_video(path: str | Path) -> VideoInfo:
    """Read the container's table of frames and decode the first one. Raises DecodeError for whatever is wrong."""
    timeline = _timeline(path)
    _, frame = next(_decode_strict(path, timeline, 0))
    height, width = _displayed_size(frame, timeline.pixel_aspect)
    return VideoInfo(len(timeline.pts), timeline.fps, width, height, timeline.duration_s)


def probe_image(path: str | Path) -> VideoInfo:
    """Decode a picture; its size is as displayed (EXIF orientation applied). Raises DecodeError."""
    height, width, _ = _load_image(path).shape
    return VideoInfo(1, 0.0, width, height, 0.0)


def num_frames_at(info: VideoInfo, fps: float) -> int:
    """Frames that a clip has at another rate: those k for which k / fps lies before the end of its last frame."""
    if info.num_frames == 1:
        return 1
    return max(1, math.ceil((info.duration_s - TIME_TOLERANCE_S) * fps))


def read_clip(path: str | Path, shape: ClipShape, fps: float, start_s: float = 0.0) -> torch.Tensor:
    """Decode, resample by time, resize to cover and crop the centre: uint8 [F, 3, H, W].

    Frame k is the source frame on display `start_s + k / fps` seconds after the first one, so slow sources repeat
    frames and variable frame rates come out right. The file is read from its beginning: no seek can go astray.
    Raises DecodeError where the file is damaged, or ends too early.
    """
    import torch

    if fps <= 0 or start_s < 0:
        raise ValueError(f"fps must be above 0 and start_s at least 0: got {fps} and {start_s}")
    timeline = _timeline(path)
    indices = _frames_on_display(timeline, [start_s + k / fps for k in range(shape.frames)])
    wanted, last = set(indices), indices[-1]
    _, frame = collections.deque(_decode_strict(path, timeline, last), maxlen=1)[0]
    referee, size = _upright(frame), _displayed_size(frame, timeline.pixel_aspect)

    def fit(source: Iterable[tuple[int, np.ndarray]]) -> dict[int, torch.Tensor]:
        # Each frame is cut down as it comes: a 4K clip at its full size would take gigabytes.
        return {index: _fit(pixels, size, shape.height, shape.width) for index, pixels in source if index in wanted}

    try:
        fitted = fit(_decode_decord(path, timeline, last, referee))
    except _DecordUnfitError:
        fitted = fit((index, _upright(frame)) for index, frame in _decode_strict(path, timeline, last))
    return torch.stack([fitted[index] for index in indices])


def read_image(path: str | Path, height: int, width: int) -> torch.Tensor:
    """A picture, EXIF orientation applied, resized to cover and cropped at the centre: uint8 [3, H, W].

    Transparency is dropped as diffusers' `load_image` drops it. Raises DecodeError.
    """
    pixels = _load_image(path)
    return _fit(pixels, pixels.shape[:2], height, width)


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
        stream = container.add_stream("libx264", rate=rate, options={"crf": str(crf)})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.codec_context.thread_count = num_threads
        for image in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
        container.mux(stream.encode())


# ---------------------------------------------------------------------------------------------- when frames stand


def _open(path: str | Path) -> Any:
    """An open PyAV container with at least one video stream."""
    import av

    path = Path(path)
    try:
        num_bytes = path.stat().st_size
        if path.is_dir():
            raise DecodeError("it is a folder, not a file")
        if not num_bytes:
            raise DecodeError("the file is empty (0 bytes)")
        container = av.open(str(path), metadata_errors="replace")
    except FileNotFoundError:
        raise DecodeError("the file does not exist") from None
    except (OSError, ValueError) as error:
        # What FFmpeg says of files that are missing, forbidden or no video derives from these two.
        raise DecodeError(f"it cannot be opened as a video: {_brief(error)}") from None
    if not container.streams.video:
        container.close()
        raise DecodeError("it holds no video stream (audio only, or cut short?)")
    return container


def _timeline(path: str | Path) -> _Timeline:
    with _open(path) as container:
        stream = container.streams.video[0]
        shown: list[int] = []
        hidden, newest, length = 0, -math.inf, 0
        try:
            for packet in container.demux(stream):
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
        except (OSError, ValueError) as error:
            raise DecodeError(f"it cannot be read to its end: {_brief(error)}") from None
        if not shown:
            raise DecodeError("it holds no frames")
        # MP4 and AVI say in their header how many frames there must be.
        if stream.frames > len(shown) + hidden:
            raise DecodeError(f"it is truncated: {len(shown) + hidden} of {stream.frames} frames are there")
        shown.sort()
        if any(first == second for first, second in itertools.pairwise(shown)):
            raise DecodeError("two of its frames carry the same timestamp: remux it to mp4")
        time_base, rate = Fraction(stream.time_base or 0), stream.average_rate
        span = float((shown[-1] - shown[0]) * time_base)
        fps = float(rate) if rate else (len(shown) - 1) / span if span > 0 else 0.0
        if len(shown) > 1 and (fps <= 0 or span <= 0):
            raise DecodeError("its frame rate is 0")
        if not length and fps:
            length = max(1, round(1 / (fps * time_base)))
        aspect = Fraction(stream.sample_aspect_ratio or 1)
        return _Timeline(shown, time_base, shown[-1] + length, hidden, fps, aspect)


def _frames_on_display(timeline: _Timeline, times_s: Sequence[float]) -> list[int]:
    """For each time the index of the last frame that starts at or before it."""
    starts = [timeline.seconds(index) for index in range(len(timeline.pts))]
    end = math.inf if len(starts) == 1 and len(times_s) == 1 and times_s[0] == 0 else timeline.duration_s
    if times_s[-1] >= end - TIME_TOLERANCE_S:
        raise DecodeError(
            f"it ends too early: a frame at {times_s[-1]:.3f} s is wanted of a clip of {timeline.duration_s:.3f} s"
        )
    return [max(0, bisect.bisect_right(starts, time + TIME_TOLERANCE_S) - 1) for time in times_s]


# -------------------------------------------------------------------------------------------------------- decoding


def _decode_strict(path: str | Path, timeline: _Timeline, last: int) -> Iterator[tuple[int, Any]]:
    """PyAV's frames 0..last, none of them damaged, missing or out of place; else DecodeError."""
    with _open(path) as container:
        stream = container.streams.video[0]
        # One thread: of 16 damaged copies 1 passes unseen, with FFmpeg's slice threads 6; with frame threads a run
        # over such copies did not end.
        stream.thread_type = "NONE"
        stream.codec_context.options = {"err_detect": "crccheck+bitstream+buffer+explode"}
        index = -1
        size = None
        try:
            for index, frame in enumerate(container.decode(stream)):
                if frame.is_corrupt:
                    raise DecodeError(f"the frame at {timeline.seconds(index):.3f} s is damaged")
                if frame.pts != timeline.pts[index]:
                    raise DecodeError(f"the frame at {timeline.seconds(index):.3f} s cannot be decoded")
                size = size or (frame.width, frame.height)
                if (frame.width, frame.height) != size:
                    raise DecodeError(f"its size changes at {timeline.seconds(index):.3f} s")
                yield index, frame
                if index == last:
                    return
        except (OSError, ValueError) as error:
            time_s = timeline.seconds(min(index + 1, last))
            raise DecodeError(f"decoding fails near {time_s:.3f} s: {_brief(error)}") from None
        raise DecodeError(f"only {index + 1} of its {len(timeline.pts)} frames can be decoded")


class _DecordUnfitError(Exception):
    """decord cannot decode this file, or not frame for frame; PyAV can."""


def _decode_decord(
    path: str | Path, timeline: _Timeline, last: int, referee: np.ndarray
) -> Iterator[tuple[int, np.ndarray]]:
    """decord's frames 0..last as [H, W, 3], in order, without a seek.

    referee: frame `last` by PyAV. decord counts frames, so once shifted it stays shifted: the last one tells.
    Raises _DecordUnfitError where decord fails, substitutes or shifts frames, or has another table of them.
    """
    # decord reads this when it is loaded. Its default, 10240 attempts to get the last frames of a broken file,
    # takes minutes; the frames that a decoder holds back are a few dozen.
    os.environ.setdefault("DECORD_EOF_RETRY_MAX", "256")
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    ours = np.array([timeline.seconds(index) for index in range(len(timeline.pts))])
    try:
        # fault_tol is compared with the number of substituted frames: 1 lets one pass, 0 switches the check off,
        # and a fraction is multiplied by the length. This is below one frame for any length.
        reader = decord.VideoReader(str(path), num_threads=1, fault_tol=1e-9)
        starts = reader.get_frame_timestamp(range(len(reader)))[:, 0].astype(np.float64)
        tolerance = TIME_TOLERANCE_S + 2 * np.finfo(np.float32).eps * np.abs(starts).max()  # its seconds are float32
        if timeline.num_hidden or len(starts) != len(ours) or np.abs(starts - starts[0] - ours).max() > tolerance:
            raise _DecordUnfitError("another table of frames")
        for index in range(last + 1):
            pixels = reader.next().asnumpy()
            if index == last and (
                pixels.shape != referee.shape or np.abs(pixels.astype(np.int16) - referee).mean() > PIXEL_TOLERANCE
            ):
                raise _DecordUnfitError(f"frame {index} is another one")
            yield index, pixels
    except Exception as error:
        # DECORDError, DECORDLimitReachedError, RuntimeError, AssertionError, StopIteration: without a common base.
        raise _DecordUnfitError(_brief(error)) from None


def _turns(frame: Any) -> int:
    """Quarter turns, counter-clockwise, that bring a stored frame upright."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is not None:
        a, b, _, c, d, *_ = struct.unpack("=9i", bytes(matrix)[:36])
        if a * d - b * c < 0:
            raise DecodeError("it is shown mirrored (display matrix), which is not supported: re-encode it")
    if frame.rotation % 90:
        raise DecodeError(f"it is shown turned by {frame.rotation} degrees, which is not supported: re-encode it")
    return frame.rotation // 90 % 4


def _upright(frame: Any) -> np.ndarray:
    """A PyAV frame as RGB [H, W, 3], turned as displayed."""
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), _turns(frame)))


def _displayed_size(frame: Any, pixel_aspect: Fraction) -> tuple[int, int]:
    """Height and width of a PyAV frame on a display with square pixels."""
    width, height = max(1, round(frame.width * pixel_aspect)), frame.height
    return (width, height) if _turns(frame) % 2 else (height, width)


def _brief(error: BaseException) -> str:
    """The last line of an error's text, without the C++ stack that decord adds."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.strip().splitlines()[0]


# ------------------------------------------------------------------------------------------------- pictures and size


def _load_image(path: str | Path) -> np.ndarray:
    """RGB [H, W, 3], EXIF orientation applied."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise DecodeError(f"its pixels are of mode {image.mode}, not 8 bits: convert it")
            return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except FileNotFoundError:
        raise DecodeError("the file does not exist") from None
    except IsADirectoryError:
        raise DecodeError("it is a folder, not a file") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DecodeError(f"it cannot be read as an image: {_brief(error)}") from None


def _fit(pixels: np.ndarray, displayed: tuple[int, ...], height: int, width: int) -> torch.Tensor:
    """Resize so that the picture covers height x width, its displayed aspect kept, and crop the centre.

    pixels: uint8 [h, w, 3]; displayed: height and width with square pixels. Returns uint8 [3, H, W]. Antialiased
    bicubic; pixels that need no resizing are not touched.
    """
    import torch

    image = torch.from_numpy(pixels).permute(2, 0, 1)
    scale = max(height / displayed[0], width / displayed[1])
    size = (max(height, round(displayed[0] * scale)), max(width, round(displayed[1] * scale)))
    if size != tuple(image.shape[1:]):
        resized = torch.nn.functional.interpolate(
            image[None].float(), size=size, mode="bicubic", align_corners=False, antialias=True
        )
        image = resized[0].round_().clamp_(0, 255).to(torch.uint8)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return image[:, top : top + height, left : left + width].clone(memory_format=torch.contiguous_format)
