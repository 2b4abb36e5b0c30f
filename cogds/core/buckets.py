"""The bucket grid: which sizes are trained, and which of them a clip belongs to."""

import math
import re
from collections.abc import Iterable, Sequence

import numpy as np

from cogds.core.geometry import ClipShape, ModelGeometry, check_shape
from cogds.errors import UserError

# Kept shares that differ by less than this look alike; length and size decide between them.
SHARE_SLACK = 0.05


def parse_buckets(texts: Iterable[str], geometry: ModelGeometry) -> tuple[ClipShape, ...]:
    """Buckets from `FRAMESxHEIGHTxWIDTH` texts, in the order given.

    Raises UserError for a text that is no size, a size that the model cannot take, or one that is listed twice.
    """
    buckets: list[ClipShape] = []
    for text in texts:
        shape = ClipShape.parse(text)
        check_shape(shape, geometry)
        if shape in buckets:
            raise UserError(f"bucket {shape} is listed twice: remove one of them")
        buckets.append(shape)
    return tuple(buckets)


def generate_buckets(
    sizes: Iterable[str], aspect_ratios: Iterable[str], frames: Iterable[int], geometry: ModelGeometry
) -> tuple[ClipShape, ...]:
    """Every size x aspect ratio x length as a bucket that the model can take, sorted, without duplicates.

    sizes: `768p`, the pixels of the short side, or `HEIGHTxWIDTH`, of which only the product counts; aspect_ratios:
    `W/H`, width over height, used as given (list `9/16` for portrait); frames: video frames. Sides are rounded to the
    geometry's `pixel_multiple`; a size beyond the rotary axes is scaled down until both axes fit. Raises UserError
    for texts that are not such, and for frames that the model cannot take.
    """
    ratios = [_parse_ratio(text) for text in aspect_ratios]
    pictures = {nearest_size(*_sides(text, ratio), geometry) for text in sizes for ratio in ratios}
    buckets = sorted({ClipShape(num_frames, *picture) for num_frames in frames for picture in pictures})
    for shape in buckets:
        check_shape(shape, geometry)
    return tuple(buckets)


def assign(num_frames: int, height: int, width: int, buckets: Sequence[ClipShape]) -> int | None:
    """Index of the bucket that a clip belongs to, or None where all of them are longer than the clip.

    num_frames: frames that the clip has at the target frame rate; height, width: its pixels as displayed. Of the
    buckets that are no longer than the clip (those of one frame only if there is no other), the ones that keep
    within 0.05 of the best share of the picture stay; of these the longest win, then the largest that needs no
    upscaling, else the smallest; then the first.
    """
    fitting = [index for index, shape in enumerate(buckets) if shape.frames <= num_frames]
    if not fitting:
        return None
    # A picture's bucket may crop less, but what moves is trained as a video if any video bucket takes it.
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
    """`assign` of many clips at once: int16, -1 where it says None; as dear as the clips have distinct sizes."""
    lengths = np.unique([shape.frames for shape in buckets])
    level = np.searchsorted(lengths, num_frames, side="right")  # only which buckets are short enough matters
    # One number for each size: rows of three take ten times as long to sort.
    packed = (level.astype(np.int64) << 50) | (height.astype(np.int64) << 25) | width.astype(np.int64)
    sizes, inverse = np.unique(packed, return_inverse=True)
    chosen = np.full(len(sizes), -1, np.int16)
    for number, size in enumerate(sizes.tolist()):
        lv, h, w = size >> 50, (size >> 25) & 0x1FFFFFF, size & 0x1FFFFFF
        bucket = assign(int(lengths[lv - 1]), h, w, buckets) if lv and h and w else None
        chosen[number] = -1 if bucket is None else bucket
    return chosen[inverse.reshape(-1)]


def crop_share(height: int, width: int, shape: ClipShape) -> float:
    """Share of the source's pixels, in [0, 1), that resize-to-cover and centre crop cut away."""
    return 1.0 - _kept_share(height, width, shape)


def _kept_share(height: int, width: int, shape: ClipShape) -> float:
    ours, theirs = width * shape.height, shape.width * height
    return min(ours, theirs) / max(ours, theirs)


def _sides(size: str, ratio: float) -> tuple[float, float]:
    """Height and width of a size in an aspect ratio."""
    if match := re.fullmatch(r"\s*([1-9]\d*)p\s*", str(size)):
        short = int(match[1])
        return short / min(1.0, ratio), short * max(1.0, ratio)
    match = re.fullmatch(r"\s*(\d+)x(\d+)\s*", str(size))
    pixels = math.prod(map(int, match.groups())) if match else 0
    if not pixels:
        raise UserError(
            f"bucket size '{size}' is neither a short side nor HEIGHTxWIDTH: write for example 768p or 768x1360"
        )
    return math.sqrt(pixels / ratio), math.sqrt(pixels * ratio)


def _parse_ratio(text: str) -> float:
    match = re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*", str(text))
    if not match or not all(int(n) for n in match.groups()):
        raise UserError(f"aspect ratio '{text}' is not WIDTH/HEIGHT: write for example 16/9")
    return int(match[1]) / int(match[2])


def nearest_size(height: float, width: float, geometry: ModelGeometry) -> tuple[int, int]:
    """Height and width nearest to these, on the model's grid and within its rotary axes."""
    step = geometry.pixel_multiple
    if geometry.rope and geometry.patch_size_t:
        # The 1.5 rotary grid ends at the sample size (see check_shape); both sides shrink, the ratio stays.
        tallest = geometry.sample_height * geometry.vae_spatial // step * step
        widest = geometry.sample_width * geometry.vae_spatial // step * step
        scale = min(1.0, tallest / height, widest / width)
        height, width = height * scale, width * scale
    return max(step, round(height / step) * step), max(step, round(width / step) * step)
