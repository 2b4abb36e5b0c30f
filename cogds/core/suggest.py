"""Buckets for the clips that are there: how well some fit, and which would fit better.

Clips are counted by size (`ClipSizes`), so that twenty million cost as little as their distinct sizes do. Lengths and
areas are chosen by simple rules, aspect ratios by an exact search.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cogds.core.buckets import assign_all
from cogds.core.geometry import ClipShape, ModelGeometry, check_shape
from cogds.errors import UserError

# Sides are counted in steps of this: what it shifts a crop share by is below one part in a hundred from 800 pixels on.
SIZE_STEP = 8
# CogVideoX was trained with 16N+1 frames: lengths that are suggested keep to it where it allows any.
TRAINED_LENGTH_STEP = 16
# More aspect ratios are suggested only while each lowers the misfit by this.
LEAST_GAIN = 0.01
# A second area is suggested where it is smaller than the first by at least this.
LARGEST_STEP = 0.7


@dataclass(frozen=True)
class ClipSizes:
    """Distinct sizes: frames at the target rate, height and width in pixels, int64 [N] each, and counts, int64 [N]."""

    frames: np.ndarray
    height: np.ndarray
    width: np.ndarray
    counts: np.ndarray

    def __len__(self) -> int:
        return int(self.counts.sum())


@dataclass(frozen=True)
class Fit:
    """How buckets suit clips, as shares of all clips.

    misfit: the mean of 1 - (share of the picture that is kept) x (share of the trained pixels that were filmed, and
    not made by enlarging); 1 for a clip without a bucket. crop: the mean share cut away of those that have one.
    upscaled, too_short: shares of clips.
    """

    misfit: float
    crop: float
    upscaled: float
    too_short: float


@dataclass(frozen=True)
class Suggestion:
    """Other buckets as `FRAMESxHEIGHTxWIDTH` texts, and how well the given ones (before) and these (after) fit."""

    buckets: tuple[str, ...]
    before: Fit
    after: Fit


def count_sizes(num_frames: np.ndarray, height: np.ndarray, width: np.ndarray, max_frames: int) -> ClipSizes:
    """Clips counted by size. Lengths beyond max_frames count as that; sides are rounded to SIZE_STEP pixels.

    num_frames, height, width: integers [N].
    """
    frames = np.clip(np.asarray(num_frames, np.int64), 0, max_frames)
    steps = [np.maximum(1, (np.asarray(side, np.int64) + SIZE_STEP // 2) // SIZE_STEP) for side in (height, width)]
    # One number for each size: a sort of numbers is ten times as fast as one of rows.
    code = (frames << 40) | (steps[0] << 20) | steps[1]
    distinct, counts = np.unique(code, return_counts=True)
    mask = (1 << 20) - 1
    return ClipSizes(distinct >> 40, (distinct >> 20 & mask) * SIZE_STEP, (distinct & mask) * SIZE_STEP, counts)


def merge_sizes(parts: Sequence[ClipSizes]) -> ClipSizes:
    """The counts of several parts of a dataset as one."""
    columns = [np.concatenate([getattr(part, name) for part in parts]) for name in ("frames", "height", "width")]
    counts = np.concatenate([part.counts for part in parts])
    distinct, inverse = np.unique(np.stack(columns), axis=1, return_inverse=True)
    total = np.bincount(inverse.reshape(-1), weights=counts, minlength=distinct.shape[1]).astype(np.int64)
    return ClipSizes(distinct[0], distinct[1], distinct[2], total)


def crop_shares(height: np.ndarray, width: np.ndarray, to_height: np.ndarray, to_width: np.ndarray) -> np.ndarray:
    """`buckets.crop_share` of many clips, each with the size that it is brought to: float64 [N] in [0, 1)."""
    ours, theirs = width * np.asarray(to_height, np.float64), to_width * np.asarray(height, np.float64)
    return 1.0 - np.minimum(ours, theirs) / np.maximum(ours, theirs)


def fit(sizes: ClipSizes, buckets: Sequence[ClipShape]) -> Fit:
    """How well these buckets suit the clips, each in the bucket that `buckets.assign` gives it."""
    if not len(sizes):
        return Fit(0.0, 0.0, 0.0, 0.0)
    chosen = assign_all(sizes.frames, sizes.height, sizes.width, buckets).astype(np.int64)
    has = chosen >= 0
    to = np.array([(shape.height, shape.width) for shape in buckets])[np.maximum(chosen, 0)]
    crop = crop_shares(sizes.height, sizes.width, to[:, 0], to[:, 1])
    filmed = np.minimum(1, 1 / np.maximum(to[:, 0] / sizes.height, to[:, 1] / sizes.width) ** 2)
    misfit = np.where(has, 1 - (1 - crop) * filmed, 1.0)
    upscaled = has & ((to[:, 0] > sizes.height) | (to[:, 1] > sizes.width))
    total, trained = len(sizes), max(1, int(sizes.counts[has].sum()))
    return Fit(
        misfit=float((misfit * sizes.counts).sum() / total),
        crop=float((crop * sizes.counts)[has].sum() / trained),
        upscaled=float(sizes.counts[upscaled].sum() / total),
        too_short=float(sizes.counts[~has].sum() / total),
    )


def suggest_lengths(sizes: ClipSizes, lengths: Sequence[int], geometry: ModelGeometry, too_short: float) -> list[int]:
    """Lengths for the buckets: those given, and a shorter one where more than this share of clips fits none.

    The shorter one is the longest that the model takes and that leaves no more than `too_short` of all clips out.
    """
    lengths = sorted(set(lengths))
    allowed = too_short * len(sizes)
    moving = sizes.frames > 1
    order = np.argsort(sizes.frames[moving], kind="stable")
    frames, below = sizes.frames[moving][order], np.cumsum(sizes.counts[moving][order])
    # The first size that may not be left out any more.
    place = int(np.searchsorted(below, allowed, side="right"))
    if place == len(frames) or frames[place] >= lengths[0]:
        return lengths
    for step in (TRAINED_LENGTH_STEP, geometry.vae_temporal):
        length = int(frames[place] - 1) // step * step + 1
        if length > 1:
            return [length, *lengths]
    return lengths


def suggest_areas(sizes: ClipSizes, areas: Sequence[int], upscaled: float) -> list[int]:
    """Areas in pixels: those given, and a smaller one where more than this share of clips is smaller than all.

    The smaller one is the median area of the clips that are, unless it is so near that it would change little.
    """
    areas = sorted(set(areas))
    area = sizes.height * sizes.width
    small = area < areas[0]
    if sizes.counts[small].sum() <= upscaled * len(sizes):
        return areas
    order = np.argsort(area[small], kind="stable")
    middle = np.searchsorted(np.cumsum(sizes.counts[small][order]), sizes.counts[small].sum() / 2)
    median = int(area[small][order][middle])
    return [median, *areas] if median < LARGEST_STEP * areas[0] else areas


def suggest_buckets(
    sizes: ClipSizes,
    given: Sequence[ClipShape],
    areas: Sequence[int],
    lengths: Sequence[int],
    geometry: ModelGeometry,
    max_buckets: int,
) -> Suggestion:
    """Buckets that lose least of the clips' pictures: every length in every chosen size, at most max_buckets.

    areas: pixels (heights times widths); lengths: frames. The sizes are on the model's grid and valid by
    `check_shape`. Where nothing that is found fits better than the given buckets, those are returned: the measure,
    `Fit.misfit`, never rises.

    Aspect ratios are a one-dimensional problem: each clip is cropped by 1 - exp(-|its log ratio - the bucket's|), so
    that clips between two neighbouring sizes go to the nearer one, and the best k of all sizes on the grid follow from
    dynamic programming over neighbours. k grows while it saves LEAST_GAIN.
    """
    before = fit(sizes, given)
    nothing = Suggestion(tuple(map(str, given)), before, before)
    per_size = max(1, len(set(lengths)) * len(set(areas)))
    ratio = np.log(sizes.width / sizes.height)
    best = nothing
    for num_ratios in range(1, max(0, max_buckets // per_size) + 1):
        chosen = _best_ratios(ratio, sizes.counts, max(areas), geometry, num_ratios)
        found = sorted(
            {
                shape
                for frames in lengths
                for area in areas
                for log_ratio in chosen
                for shape in _on_grid(frames, area, log_ratio, geometry)
            }
        )
        if not found:
            break
        after = fit(sizes, found)
        if after.misfit < best.after.misfit - (LEAST_GAIN if best is not nothing else 0):
            best = Suggestion(tuple(map(str, found)), before, after)
        if len(chosen) < num_ratios:
            break
    return best


def _best_ratios(
    ratio: np.ndarray, counts: np.ndarray, area: int, geometry: ModelGeometry, num_ratios: int
) -> list[float]:
    """The log ratios of `num_ratios` sizes on the grid that crop the clips least."""
    step = geometry.pixel_multiple
    heights = np.arange(step, int(np.sqrt(area) * 4) + step, step)
    widths = np.maximum(step, np.round(area / heights / step).astype(np.int64) * step)
    candidates = sorted({float(np.log(w / h)) for h, w in zip(heights, widths) if 1 / 4.5 <= w / h <= 4.5})
    low, high = ratio.min(), ratio.max()
    inside = [c for c in candidates if low - 0.2 <= c <= high + 0.2] or candidates
    grid = np.array(inside)
    num_ratios = min(num_ratios, len(grid))
    order = np.argsort(ratio, kind="stable")
    # Clips between one candidate and the next, as sums of what either of them crops.
    ratio, weight = ratio[order], counts[order].astype(np.float64)
    # cost[i, j]: of the clips between candidates i - 1 and j - 1, each cropped to the nearer; 0 and m + 1 are ends.
    m = len(grid)
    cost = np.zeros((m + 1, m + 2))
    lost = 1 - np.exp(-np.abs(ratio[None] - grid[:, None]))
    sums = np.concatenate([np.zeros((m, 1)), np.cumsum(lost * weight, axis=1)], axis=1)
    for j in range(m):
        cost[0, j + 1] = sums[j, np.searchsorted(ratio, grid[j])]
        for i in range(j):
            start, middle, end = np.searchsorted(ratio, [grid[i], (grid[i] + grid[j]) / 2, grid[j]])
            cost[i + 1, j + 1] = sums[i, middle] - sums[i, start] + sums[j, end] - sums[j, middle]
        cost[j + 1, m + 1] = sums[j, -1] - sums[j, np.searchsorted(ratio, grid[j])]
    best, back = cost[0, 1 : m + 1].copy(), []
    for _ in range(num_ratios - 1):
        through = best[:, None] + np.where(np.tri(m, dtype=bool), np.inf, cost[1:, 1 : m + 1])
        back.append(through.argmin(axis=0))
        best = through.min(axis=0)
    at = int((best + cost[1:, m + 1]).argmin())
    chosen = [at]
    for previous in reversed(back):
        at = int(previous[at])
        chosen.append(at)
    return sorted(float(grid[i]) for i in chosen)


def _on_grid(frames: int, area: int, log_ratio: float, geometry: ModelGeometry) -> list[ClipShape]:
    """The size nearest to an area and a ratio that the model takes, or none."""
    step, ratio = geometry.pixel_multiple, float(np.exp(log_ratio))
    height, width = np.sqrt(area / ratio), np.sqrt(area * ratio)
    if geometry.rope and geometry.patch_size_t:
        tallest = geometry.sample_height * geometry.vae_spatial // step * step
        widest = geometry.sample_width * geometry.vae_spatial // step * step
        scale = min(1.0, tallest / height, widest / width)
        height, width = height * scale, width * scale
    shape = ClipShape(frames, *(max(step, round(float(side) / step) * step) for side in (height, width)))
    try:
        check_shape(shape, geometry)
    except UserError:
        return []
    return [shape]
