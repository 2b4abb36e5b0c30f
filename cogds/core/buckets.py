"""Buckets: the sizes that are trained, and the bucket that a clip is assigned to."""

import math
import re
from collections.abc import Iterable, Sequence

import numpy as np

from cogds.core.geometry import ClipShape, ModelGeometry, check_shape
from cogds.errors import UserError

# Shares of the picture kept that differ by less than this count as equal. Length and size then decide.
SHARE_SLACK = 0.05
# Why a usable clip has no bucket.
TOO_SHORT, NO_IMAGE_BUCKET = "too short", "image without a 1-frame bucket"


def parse_buckets(texts: Iterable[str], geometry: ModelGeometry) -> tuple[ClipShape, ...]:
    """Parse buckets from `FRAMESxHEIGHTxWIDTH` texts, in the given order.

    Raises UserError for a text that is not a size, a size that the model does not support, or a duplicate.
    """
    buckets: list[ClipShape] = []
    for text in texts:
        shape = ClipShape.parse(text)
        check_shape(shape, geometry)
        if shape in buckets:
            raise UserError(f"data.buckets: {shape} is listed twice. Remove one of them.")
        buckets.append(shape)
    return tuple(buckets)


def generate_buckets(
    sizes: Iterable[str], aspect_ratios: Iterable[str], frames: Iterable[int], geometry: ModelGeometry
) -> tuple[ClipShape, ...]:
    """Return every combination of size, aspect ratio and length as a bucket, sorted and without duplicates.

    Sides are rounded to the geometry's `pixel_multiple`. A size beyond the rotary axes is scaled down until both fit.

    Args:
        sizes: `768p`, the pixels of the short side, or `HEIGHTxWIDTH`, which sets only the area.
        aspect_ratios: `W/H`, width over height, as written: list `9/16` as well for portrait clips.
        frames: numbers of video frames.

    Raises:
        UserError: a text cannot be parsed, or the model does not support a number of frames.
    """
    ratios = [_parse_ratio(text) for text in aspect_ratios]
    pictures = {nearest_size(*_sides(text, ratio), geometry) for text in sizes for ratio in ratios}
    buckets = sorted({ClipShape(num_frames, *picture) for num_frames in frames for picture in pictures})
    for shape in buckets:
        check_shape(shape, geometry)
    return tuple(buckets)


def assign(num_frames: int, height: int, width: int, buckets: Sequence[ClipShape]) -> int | None:
    """Return the index of a clip's bucket, or None if all buckets are longer than the clip.

    Candidates are the buckets that are no longer than the clip (single-frame buckets only if there are no others) and
    that keep a share of the picture within SHARE_SLACK of the best. Among them, the longest wins, then the largest
    without upscaling, otherwise the smallest, then the first.

    Args:
        num_frames: frames of the clip at the target frame rate.
        height, width: of the clip in pixels, as displayed.
    """
    fitting = [index for index, shape in enumerate(buckets) if shape.frames <= num_frames]
    if not fitting:
        return None
    # An image bucket may crop less, but a video is trained as a video if any video bucket fits.
    fitting = [index for index in fitting if buckets[index].frames > 1] or fitting
    kept = {index: _kept_share(height, width, buckets[index]) for index in fitting}
    best = max(kept.values())

    def rank(index: int) -> tuple[int, bool, int, int]:
        shape = buckets[index]
        upscaled = shape.height > height or shape.width > width
        area = shape.height * shape.width
        return (-shape.frames, upscaled, area if upscaled else -area, index)

    return min((index for index in fitting if kept[index] >= best - SHARE_SLACK), key=rank)


def assign_all(
    num_frames: np.ndarray, height: np.ndarray, width: np.ndarray, buckets: Sequence[ClipShape]
) -> np.ndarray:
    """Apply `assign` to many clips: int16 [N], -1 for None. The cost grows with the number of distinct sizes."""
    lengths = np.unique([shape.frames for shape in buckets])
    # Number of bucket lengths that are short enough. Nothing else about a clip's length matters.
    level = np.searchsorted(lengths, num_frames, side="right")
    # One integer per size: sorting rows of three takes ten times as long.
    packed = (level.astype(np.int64) << 50) | (height.astype(np.int64) << 25) | width.astype(np.int64)
    sizes, inverse = np.unique(packed, return_inverse=True)
    chosen = np.full(len(sizes), -1, np.int16)
    for number, size in enumerate(sizes.tolist()):
        size_level, h, w = size >> 50, (size >> 25) & 0x1FFFFFF, size & 0x1FFFFFF
        bucket = assign(int(lengths[size_level - 1]), h, w, buckets) if size_level and h and w else None
        chosen[number] = -1 if bucket is None else bucket
    return chosen[inverse.reshape(-1)]


def crop_share(height: int, width: int, shape: ClipShape) -> float:
    """Share of the source's pixels, in [0, 1), that resizing to cover and center cropping remove."""
    return 1.0 - _kept_share(height, width, shape)


def _kept_share(height: int, width: int, shape: ClipShape) -> float:
    source, target = width * shape.height, shape.width * height
    return min(source, target) / max(source, target)


def _sides(size: str, ratio: float) -> tuple[float, float]:
    """Height and width of a size text at an aspect ratio (width over height)."""
    if match := re.fullmatch(r"\s*([1-9]\d*)p\s*", str(size)):
        short = int(match[1])
        return short / min(1.0, ratio), short * max(1.0, ratio)
    match = re.fullmatch(r"\s*(\d+)x(\d+)\s*", str(size))
    pixels = math.prod(map(int, match.groups())) if match else 0
    if not pixels:
        raise UserError(
            f"bucket size '{size}' is neither a short side nor HEIGHTxWIDTH. Write, for example, 768p or 768x1360."
        )
    return math.sqrt(pixels / ratio), math.sqrt(pixels * ratio)


def _parse_ratio(text: str) -> float:
    match = re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*", str(text))
    if not match or not all(int(n) for n in match.groups()):
        raise UserError(f"aspect ratio '{text}' is not WIDTH/HEIGHT. Write, for example, 16/9.")
    return int(match[1]) / int(match[2])


def nearest_size(height: float, width: float, geometry: ModelGeometry) -> tuple[int, int]:
    """The nearest height and width on the model's pixel grid and within its rotary axes."""
    step = geometry.pixel_multiple
    if geometry.family.positions == "rope_slice":
        # The 1.5 rotary grid ends at the sample size (see check_shape). Shrink both sides to keep the ratio.
        tallest = geometry.sample_height * geometry.vae_spatial // step * step
        widest = geometry.sample_width * geometry.vae_spatial // step * step
        scale = min(1.0, tallest / height, widest / width)
        height, width = height * scale, width * scale
    return max(step, round(height / step) * step), max(step, round(width / step) * step)
