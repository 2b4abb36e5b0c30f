"""What the report page says about single clips: caption, bucket, crop, and flags for what may be wrong."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from cogds.core.buckets import NO_IMAGE_BUCKET, TOO_SHORT, crop_share
from cogds.core.geometry import ClipShape
from cogds.data.storage.location import display_name
from cogds.formatting import percent
from cogds.report.quality import HARDLY_MOVES

# Above these shares, a crop and unused frames are flags.
MUCH_CROPPED, MUCH_UNUSED = 0.15, 0.75


@dataclass(frozen=True)
class ClipList:
    """All clips of the manifest, one per row, also those that are held out or not trained.

    Attributes:
        table: columns as in `analysis.ClipTable`, and more_captions.
        buckets: int [N], -1 for a clip without a bucket.
        frames: int [N], at the target frame rate, within the clip's time range.
        num_windows: int [N], samples of each clip.
        is_held_out: bool [N].
        is_cut_off: for each caption of a list, whether it is longer than the model's limit.
    """

    table: pa.Table
    buckets: np.ndarray
    frames: np.ndarray
    num_windows: np.ndarray
    is_held_out: np.ndarray
    shapes: tuple[ClipShape, ...]
    is_cut_off: Callable[[Sequence[str]], Sequence[bool]]


class FrameRequest(NamedTuple):
    """A frame to read: that shown at start_s, at this size, which has the clip's proportions."""

    path: str
    kind: str
    start_s: float
    height: int
    width: int


@dataclass(frozen=True)
class Clip:
    """One clip.

    Attributes:
        name: of the file, with the range of a part.
        captions: at least one, unless there is none.
        shape: its bucket, None if it is not trained.
        size: (height, width), (0, 0) if unknown.
        reason: why it is not trained, else "".
        facts: about its size, crop and frames.
        flags: what may be wrong or is unusual.
        request: its first frame, without a size; None if it cannot be read.
    """

    name: str
    captions: tuple[str, ...]
    shape: ClipShape | None
    size: tuple[int, int]
    reason: str
    facts: str
    flags: tuple[str, ...]
    request: FrameRequest | None

    @property
    def rank(self) -> int:
        """0 for a clip that is not trained, 1 for one with flags, 2 for others."""
        return 0 if self.reason else 1 if self.flags else 2


def list_clips(clips: ClipList, max_clips: int) -> list[Clip]:
    """Return all clips, or `max_clips` evenly spaced ones: first those not trained, then those with flags."""
    num = len(clips.table)
    rows = np.arange(num) if num <= max_clips else np.linspace(0, num - 1, max_clips).astype(np.int64)
    records = clips.table.take(pa.array(rows)).to_pylist()
    are_cut_off = clips.is_cut_off([record["caption"] or "" for record in records])
    made, first_names = [], dict[Any, str]()
    for row, record, is_cut_off in zip(rows.tolist(), records, are_cut_off):
        clip = _make_clip(clips, row, record, is_cut_off, first_names)
        made.append(clip)
    return sorted(made, key=lambda clip: clip.rank)


def _make_clip(
    clips: ClipList, row: int, record: dict[str, Any], is_cut_off: bool, first_names: dict[Any, str]
) -> Clip:
    """first_names: name of the first clip with each content; is extended."""
    bucket, height, width = int(clips.buckets[row]), record["height"] or 0, record["width"] or 0
    name = display_name(record["path"])
    if record["start_s"] or record["end_s"]:
        name += f" from {record['start_s'] or 0:g} s" + (f" to {record['end_s']:g} s" if record["end_s"] else "")
    is_usable = record["status"] == "ok" and height and width
    shape = clips.shapes[bucket] if is_usable and bucket >= 0 else None
    reason = (
        ""
        if shape
        else record["reason"] or (NO_IMAGE_BUCKET if clips.frames[row] == 1 else f"{TOO_SHORT} for every bucket")
    )
    facts, flags = [f"{width} x {height}"] if width else [], []
    if clips.is_held_out[row]:
        flags.append("held out for evaluation")
    if shape:
        cropped, scale = crop_share(height, width, shape), max(shape.height / height, shape.width / width)
        facts.append(f"{percent(cropped)} cropped away")
        num_frames, num_used = int(clips.frames[row]), int(max(1, clips.num_windows[row])) * shape.frames
        if shape.frames > 1:
            facts.append(f"{min(num_used, num_frames):,} of {num_frames:,} frames used")
        if cropped > MUCH_CROPPED:
            flags.append(f"{percent(cropped)} cropped away")
        if scale > 1:
            flags.append(f"upscaled {scale:.1f} times")
        if 1 - num_used / max(1, num_frames) > MUCH_UNUSED:
            flags.append(f"{percent(1 - num_used / num_frames)} of the frames unused")
        if record["motion"] is not None and record["motion"] < HARDLY_MOVES:
            flags.append("hardly moves")
    flags += filter(None, (record["processing"] or "").split(", "))
    if record["duplicate_of"]:
        flags.append(f"near duplicate of {display_name(record['duplicate_of'])}")
    if record["digest"] is not None:
        first = first_names.setdefault((record["digest"], record["start_s"], record["end_s"]), name)
        if first is not name:
            flags.append(f"same content as {first}")
    if is_cut_off:
        flags.append("caption cut off")
    captions = tuple(filter(None, [record["caption"], *(record["more_captions"] or [])]))
    request = FrameRequest(record["path"], record["kind"], record["start_s"] or 0.0, 0, 0) if width and height else None
    return Clip(name, captions, shape, (height, width), reason, ", ".join(facts), tuple(flags), request)
