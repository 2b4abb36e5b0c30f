"""The assignment of the manifest's rows to buckets, and the windows that are trained, in the order of the plan."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cogds.core.buckets import NO_IMAGE_BUCKET, TOO_SHORT, assign_all
from cogds.core.geometry import ClipShape
from cogds.core.windows import window_starts
from cogds.data.video.media import TIME_TOLERANCE_S


@dataclass(frozen=True)
class WindowRule:
    """Which windows of a clip are trained: see `core.windows.window_starts`. seed: of random windows."""

    fps: float
    mode: str = "first"
    num_windows: int = 0
    seed: int = 0


@dataclass(frozen=True)
class BucketAssignment:
    """The windows that are trained: by bucket, then dataset, then row of the manifest, mirror images last.

    Attributes:
        rows: int64 [N], the row of each window in the manifest.
        starts_s: float64 [N], start of each window in seconds after the file's first frame.
        sizes: number of windows of [bucket][dataset].
        row_buckets: int16 [num_rows], the bucket of each row, -1 if it has none.
        row_frames: int64 [num_rows], number of frames in each row's range at the target frame rate.
        mirrored: bool [N], whether each window is the mirror image of the one before.
    """

    rows: np.ndarray
    starts_s: np.ndarray
    sizes: tuple[tuple[int, ...], ...]
    row_buckets: np.ndarray
    row_frames: np.ndarray
    mirrored: np.ndarray

    @property
    def buckets(self) -> np.ndarray:
        """int16 [N]: the bucket of each window."""
        return self.row_buckets[self.rows]


def column_values(table: pa.Table, name: str, null_value: float = 0) -> np.ndarray:
    """A column of numbers as a NumPy array."""
    return pc.fill_null(table.column(name), pa.scalar(null_value, table.column(name).type)).to_numpy()


def num_frames_at(table: pa.Table, fps: float) -> np.ndarray:
    """int64 [num_rows]: `media.num_frames_at` for every row's range, with the same rounding."""
    start_s = column_values(table, "start_s")
    end_s = np.minimum(column_values(table, "duration_s"), column_values(table, "end_s", np.inf)) - TIME_TOLERANCE_S
    frames = np.maximum(0, np.ceil((end_s - start_s) * fps)) + 1
    for _ in range(2):  # rounding may have put one or two past the end
        frames = np.where((frames > 0) & (start_s + (frames - 1) / fps >= end_s), frames - 1, frames)
    return np.where(column_values(table, "frames") == 1, start_s == 0, frames).astype(np.int64)


def assign_rows(table: pa.Table, buckets: Sequence[ClipShape], rule: WindowRule, num_sets: int) -> BucketAssignment:
    """Assign every usable row of the manifest to its bucket and choose its windows."""
    is_usable = _is_usable(table)
    frames = num_frames_at(table, rule.fps)
    row_buckets = assign_all(frames, column_values(table, "height"), column_values(table, "width"), buckets)
    row_buckets = np.where(is_usable, row_buckets, -1).astype(np.int16)
    rows, starts_s = _choose_windows(table, row_buckets, frames, buckets, rule)
    sets = column_values(table, "set")[rows]
    order = np.lexsort((sets, row_buckets[rows]))  # stable, so equal windows keep the order of the manifest
    rows, starts_s = rows[order], starts_s[order]
    counts = np.zeros((len(buckets), num_sets), np.int64)
    np.add.at(counts, (row_buckets[rows], sets[order]), 1)
    mirrored = np.zeros(len(rows), bool)
    return BucketAssignment(rows, starts_s, tuple(map(tuple, counts.tolist())), row_buckets, frames, mirrored)


def too_short_reasons(
    assignment: BucketAssignment, table: pa.Table, buckets: Sequence[ClipShape], fps: float
) -> dict[int, str]:
    """Usable rows that have no bucket, with the reasons."""
    shortest = min(shape.frames for shape in buckets)
    reasons = {}
    for row in np.flatnonzero(_is_usable(table) & (assignment.row_buckets < 0)).tolist():
        num_frames = assignment.row_frames[row]
        if num_frames == 1:
            reasons[row] = f"{NO_IMAGE_BUCKET}: the shortest bucket has {shortest}"
        else:
            reasons[row] = f"{TOO_SHORT}: {num_frames} frames at {fps:g} fps, the shortest bucket has {shortest}"
    return reasons


def _is_usable(table: pa.Table) -> np.ndarray:
    return pc.equal(table.column("status"), "ok").to_numpy(zero_copy_only=False)


def _choose_windows(
    table: pa.Table, row_buckets: np.ndarray, frames: np.ndarray, buckets: Sequence[ClipShape], rule: WindowRule
) -> tuple[np.ndarray, np.ndarray]:
    """The row and the start in seconds of every window."""
    rows = np.flatnonzero(row_buckets >= 0)
    range_starts = column_values(table, "start_s")
    if rule.mode == "first":
        return rows, range_starts[rows]
    if rule.mode == "random":
        paths = table.column("path")
        starts = [
            window_starts(
                rule.mode,
                rule.num_windows,
                int(frames[row]),
                buckets[row_buckets[row]].frames,
                rule.fps,
                (rule.seed, zlib.crc32(paths[row].as_py().encode()), round(float(range_starts[row]) * 1000)),
            )[0]
            for row in rows.tolist()
        ]
        return rows, range_starts[rows] + np.array(starts, np.float64)
    # The other modes depend only on the numbers of frames, and there are few distinct pairs of them.
    lengths = np.array([shape.frames for shape in buckets])[row_buckets[rows]]
    pairs, inverse = np.unique(np.stack([frames[rows], lengths]), axis=1, return_inverse=True)
    starts_of_pairs = [
        np.array(window_starts(rule.mode, rule.num_windows, int(available), int(length), rule.fps, ()))
        for available, length in pairs.T
    ]
    inverse = inverse.reshape(-1)
    counts = np.array([len(starts) for starts in starts_of_pairs], np.int64)[inverse]
    offsets = np.concatenate([starts_of_pairs[pair] for pair in inverse]) if len(inverse) else np.zeros(0)
    repeated = np.repeat(rows, counts)
    return repeated, range_starts[repeated] + offsets
