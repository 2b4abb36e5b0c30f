"""Reading images, and animations that FFmpeg does not read.

Pillow opens them; pillow-heif (an extra) adds HEIC. Colors are converted to sRGB by the image's profile.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import struct
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cogds.core.geometry import ClipShape
from cogds.data.video.colors import Colors, to_bt709
from cogds.data.video.container import open_source
from cogds.data.video.decode import repeat
from cogds.data.video.errors import DecodeError, brief, is_bug
from cogds.data.video.kinds import kind_of
from cogds.data.video.pixels import cover
from cogds.data.video.timeline import Timeline, VideoInfo, displayed_frames, frame_range

if TYPE_CHECKING:
    from PIL.Image import Image

# Formats in which several frames are an animation. In others (TIFF, MPO, HEIF), they are pages, previews or photos.
_ANIMATIONS = {"APNG", "AVIF", "GIF", "PNG", "WEBP"}
_PHOTO_BRANDS = {b"avif", b"avis", b"heic", b"heix", b"heim", b"heis", b"mif1"}
_HEADER_BYTES = 1 << 16


@contextlib.contextmanager
def open_image(path: str | Path) -> Iterator[Image]:
    """Open an image, without decoding it. Raises DecodeError, also for what Pillow raises in the body."""
    from PIL import Image, UnidentifiedImageError

    source = open_source(path)
    if not isinstance(source, str):
        source = io.BytesIO(source.read())  # now: a server that fails while Pillow reads would look like damage
    try:
        with contextlib.suppress(ImportError):
            import pillow_heif

            pillow_heif.register_heif_opener()
        with Image.open(source) as image:
            yield image
    except (DecodeError, MemoryError):
        raise
    except Exception as error:
        # On damaged bytes Pillow's parsers raise errors of any type: OSError, SyntaxError, struct.error, TypeError, ...
        if is_bug(error):
            raise
        reason = _missing_package(path) if isinstance(error, UnidentifiedImageError) else None
        raise DecodeError(reason or f"it cannot be read as an image: {brief(error)}") from None


def probe_image(path: str | Path) -> VideoInfo:
    """Decode an image. Its size is as displayed, with EXIF orientation applied. Raises DecodeError."""
    width, height = _load_image(path).size
    return VideoInfo(1, 0.0, width, height, 0.0)


def read_image(path: str | Path, height: int, width: int) -> np.ndarray:
    """Read an image, apply EXIF orientation, resize to cover and crop the center: uint8 [H, W, 3].

    Resizing is antialiased bicubic, and skipped if the size is right. Transparency is dropped as in diffusers'
    `load_image`. Of an animation, this is the first frame. Raises DecodeError.
    """
    return fit_image(_load_image(path), height, width)


def is_animation(path: str | Path) -> bool:
    """Whether an image file holds an animation. Raises DecodeError."""
    with open_image(path) as image:
        return _num_frames(image) > 1


def is_webp(path: str | Path) -> bool:
    """Whether a file is a WebP, by its content. FFmpeg does not read its animations."""
    if kind_of(str(path)) == "video":
        return False
    head = _read_head(path)
    return head[:4] == b"RIFF" and head[8:] == b"WEBP"


def probe_animation(path: str | Path) -> VideoInfo:
    """Decode an animation by Pillow. Raises DecodeError."""
    with open_image(path) as image:
        timeline = _read_times(image)
        num_frames = len(timeline.pts)
        return VideoInfo(num_frames, timeline.fps, image.width, image.height, timeline.duration_s)


def read_animation(
    path: str | Path,
    shape: ClipShape,
    times_s: Sequence[float],
    end_s: float | None = None,
    *,
    is_padded: bool = False,
) -> np.ndarray:
    """Read the frames displayed at these times in an animation by Pillow: uint8 [F, H, W, 3]. Raises DecodeError.

    is_padded: see `media.read_clip`.
    """
    clip = np.empty((shape.frames, shape.height, shape.width, 3), np.uint8)
    with open_image(path) as image:
        indices, k = displayed_frames(_read_times(image), times_s, end_s, is_padded=is_padded), 0
        while k < len(indices):
            image.seek(indices[k])
            clip[k] = fit_image(_to_srgb(image), shape.height, shape.width)
            k = repeat(clip, indices, k)
    return clip


def animation_frames(path: str | Path, start_s: float, end_s: float | None) -> Iterator[tuple[Timeline, int, Image]]:
    """Yield the frames of a range of an animation (`frame_range`) by Pillow, in sRGB. Raises DecodeError."""
    with open_image(path) as image:
        timeline = _read_times(image)
        for index in frame_range(timeline, start_s, end_s):
            image.seek(index)
            yield timeline, index, _to_srgb(image)


def _num_frames(image: Image) -> int:
    return getattr(image, "n_frames", 1) if image.format in _ANIMATIONS else 1


def _read_times(image: Image) -> Timeline:
    """The display times of an animation's frames, from their durations in ms. Decodes all frames."""
    durations = []
    for index in range(_num_frames(image)):
        image.seek(index)
        image.load()  # only then are durations known
        durations.append(round(image.info.get("duration") or 0))
    ends = list(itertools.accumulate(durations))
    if len(ends) > 1 and not ends[-1]:
        raise DecodeError("its frame rate is 0")
    fps = 1000 * len(ends) / ends[-1] if len(ends) > 1 else 0.0
    return Timeline([0, *ends[:-1]], [0], [0], Fraction(1, 1000), ends[-1], fps)


def _load_image(path: str | Path) -> Image:
    """Load a PIL image in sRGB with EXIF orientation applied."""
    from PIL import ImageOps

    with open_image(path) as image:
        if image.mode.startswith(("I", "F")):
            raise DecodeError(f"its pixels are of mode {image.mode}, not 8 bits: convert it to 8 bits")
        colors = _colors_of(image)  # before the pixels are loaded, which closes the file
        return _to_srgb(ImageOps.exif_transpose(image), colors)


def _colors_of(image: Image) -> Colors | None:
    """The color tags of a HEIC or AVIF, None if it has none. Raises DecodeError for HDR."""
    file = getattr(image, "fp", None)
    if image.format not in ("AVIF", "HEIF") or file is None:
        return None
    file.seek(0)
    header = file.read(_HEADER_BYTES)
    at = header.find(b"colrnclx")
    if at < 0:
        return None
    colors = Colors(*struct.unpack_from(">3H", header, at + 8))
    if colors.is_hdr:
        raise DecodeError("it is an HDR photo (PQ or HLG), which is not supported: convert it to SDR")
    return colors


def _to_srgb(image: Image, colors: Colors | None = None) -> Image:
    """The image in RGB, with the colors of its profile or tags converted to sRGB."""
    from PIL import Image, ImageCms

    icc = image.info.get("icc_profile")
    if icc:
        # Browsers ignore a profile that is broken or of another kind than the pixels.
        with contextlib.suppress(ImageCms.PyCMSError, OSError):
            profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
            if "srgb" in ImageCms.getProfileDescription(profile).lower():
                return image.convert("RGB")
            opaque = image if image.mode in ("L", "RGB", "CMYK") else image.convert("RGB")
            srgb = ImageCms.createProfile("sRGB")
            intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
            converted = ImageCms.profileToProfile(opaque, profile, srgb, intent, "RGB")
            assert converted is not None  # only None if it converts in place
            return converted
    image = image.convert("RGB")
    if colors and colors.is_wide and not icc:
        return Image.fromarray(to_bt709(np.asarray(image, np.uint16) * 257, colors))
    return image


def fit_image(image: Image, height: int, width: int) -> np.ndarray:
    """Resize a PIL image to cover and crop the center: uint8 [H, W, 3]."""
    from PIL import Image

    (tall, wide), (top, left) = cover((image.height, image.width), height, width)
    if (tall, wide) == (image.height, image.width):
        image = image.crop((left, top, left + width, top + height))
    else:
        # PIL scales only the box, but takes neighboring pixels outside of it into account.
        across, down = image.width / wide, image.height / tall
        box = (left * across, top * down, (left + width) * across, (top + height) * down)
        image = image.resize((width, height), Image.Resampling.BICUBIC, box)
    return np.array(image)


def _read_head(path: str | Path) -> bytes:
    """The first bytes of a file. Raises DecodeError or OSError as `open_source`."""
    source = open_source(path)
    with open(source, "rb") if isinstance(source, str) else source as file:
        return file.read(12)


def _missing_package(path: str | Path) -> str | None:
    """What to install for a file that Pillow does not know, if that is the reason."""
    head = _read_head(path)
    if head[4:8] != b"ftyp" or head[8:] not in _PHOTO_BRANDS:
        return None
    brand = head[8:].decode()
    return (
        f"it is a photo of type {brand}, which needs a package: run pip install --upgrade pillow pillow-heif, then "
        "cogds encode --retry"
    )
