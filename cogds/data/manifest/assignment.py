"""Which parts of which clips are trained in which bucket: the manifest's rows, in the order of the plan."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cogds.core.buckets import assign_all
from cogds.core.geometry import ClipShape
from cogds.core.windows import window_starts
from cogds.data.video.media import TIME_TOLERANCE_S


@dataclass(frozen=True)
class Placement:
    """Windows in the order of the plan: by bucket, then data set, then the manifest's order.

    rows int64 [N]: the window's row in the manifest; starts_s float64 [N]: seconds after the file's first frame;
    sizes: windows of [bucket][data set]. row_buckets int16 [rows]: each row's bucket, -1 where it is not trained;
    row_frames int64 [rows]: frames that its range has at the target rate.
    """

    rows: np.ndarray
    starts_s: np.ndarray
    sizes: tuple[tuple[int, ...], ...]
    row_buckets: np.ndarray
    row_frames: np.ndarray

    @property
    def buckets(self) -> np.ndarray:
        """int16 [N]: each window's bucket."""
        return self.row_buckets[self.rows]


def numbers(table: pa.Table, name: str, missing: float = 0) -> np.ndarray:
    """A column as numpy, with `missing` for nulls."""
    return pc.fill_null(table.column(name), pa.scalar(missing, table.column(name).type)).to_numpy()


def frames_at(table: pa.Table, fps: float) -> np.ndarray:
    """`video.num_frames_at` of every row, within its range: int64, in the same floating-point steps."""
    start_s = numbers(table, "start_s")
    end_s = np.minimum(numbers(table, "duration_s"), numbers(table, "end_s", np.inf)) - TIME_TOLERANCE_S
    frames = np.maximum(0, np.ceil((end_s - start_s) * fps)) + 1
    for _ in range(2):  # what rounding put past the end
        frames = np.where((frames > 0) & (start_s + (frames - 1) / fps >= end_s), frames - 1, frames)
    return np.where(numbers(table, "frames") == 1, start_s == 0, frames).astype(np.int64)


def place(
    table: pa.Table, buckets: Sequence[ClipShape], fps: float, windows: str, num_windows: int, seed: int, num_sets: int
) -> Placement:
    """Assign every usable row of the manifest to its bucket, and take its windows.

    windows, num_windows: see `core.windows`; seed: of random windows.
    """
    usable = pc.equal(table.column("status"), "ok").to_numpy(zero_copy_only=False)
    frames = frames_at(table, fps)
    assigned = assign_all(frames, numbers(table, "height"), numbers(table, "width"), buckets)
    row_buckets = np.where(usable, assigned, -1).astype(np.int16)
    rows = np.flatnonzero(row_buckets >= 0)
    rows, starts_s = _windows(table, rows, row_buckets, frames, buckets, fps, windows, num_windows, seed)
    sets = numbers(table, "set")[rows]
    order = np.lexsort((sets, row_buckets[rows]))  # stable: equal ones keep the manifest's order
    rows, starts_s = rows[order], starts_s[order]
    counts = np.zeros((len(buckets), num_sets), np.int64)
    np.add.at(counts, (row_buckets[rows], sets[order]), 1)
    return Placement(rows, starts_s, tuple(map(tuple, counts.tolist())), row_buckets, frames)


def too_short(placement: Placement, table: pa.Table, buckets: Sequence[ClipShape], fps: float) -> dict[int, str]:
    """Rows that are usable but have no bucket -> why."""
    usable = pc.equal(table.column("status"), "ok").to_numpy(zero_copy_only=False)
    shortest = min(shape.frames for shape in buckets)

    def why(num_frames: int) -> str:
        if num_frames == 1:
            return f"too short: a picture, and no bucket has one frame: the shortest has {shortest}"
        return f"too short: {num_frames} frames at {fps:g} fps, the shortest bucket has {shortest}"

    return {int(row): why(placement.row_frames[row]) for row in np.flatnonzero(usable & (placement.row_buckets < 0))}


def _windows(
    table: pa.Table,
    rows: np.ndarray,
    row_buckets: np.ndarray,
    frames: np.ndarray,
    buckets: Sequence[ClipShape],
    fps: float,
    mode: str,
    num_windows: int,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """(row, start) of every window. All modes but `random` depend only on the number of frames and the bucket."""
    range_starts = numbers(table, "start_s")
    if mode == "first":
        return rows, range_starts[rows]
    if mode == "random":
        paths = table.column("path")
        starts = [
            window_starts(
                mode,
                num_windows,
                int(frames[row]),
                buckets[row_buckets[row]].frames,
                fps,
                (seed, zlib.crc32(paths[row].as_py().encode()), round(float(range_starts[row]) * 1000)),
            )[0]
            for row in rows.tolist()
        ]
        return rows, range_starts[rows] + np.array(starts, np.float64)
    lengths = np.array([shape.frames for shape in buckets])[row_buckets[rows]]
    pairs, inverse = np.unique(np.stack([frames[rows], lengths]), axis=1, return_inverse=True)
    starts_of = [
        np.array(window_starts(mode, num_windows, int(available), int(length), fps, ()))
        for available, length in pairs.T
    ]
    inverse = inverse.reshape(-1)
    counts = np.array([len(starts) for starts in starts_of], np.int64)[inverse]
    begins = np.concatenate([starts_of[i] for i in inverse]) if len(inverse) else np.zeros(0)
    repeated = np.repeat(rows, counts)
    return repeated, range_starts[repeated] + begins
