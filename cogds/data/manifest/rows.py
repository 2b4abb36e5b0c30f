"""The manifest's rows, computed from the entries and the scan's results; and the results, read back from the rows.

All functions work on Arrow tables and hold nothing else: rank 0 needs 350 to 660 bytes per clip.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cogds.data.manifest.file_keys import CONDITION, CONTROL, file_keys, kinds_of, look_up
from cogds.data.manifest.scan_state import RESULT_SCHEMA, Results, Scan, read_entries
from cogds.data.manifest.table import SCHEMA

# Columns of entries with keys of files: of the clips, of their images, of their control videos.
KEYS = ("key", "image_key", "control_key")
RANGE_TOLERANCE_S = 0.5  # lists of scenes have rounded ends

_CAPTION_MISSING = "caption missing: add a .txt file with the same name, or fill in its line in the list of captions"
_CAPTION_EMPTY = "caption empty: write one into the .txt file with the same name, or its line in the list of captions"
_IMAGE = "conditioning image unusable: "
_CONTROL = "control video unusable: "
_STAMP, _CONTROL_PROPERTIES = ("digest", "size", "mtime_ns"), ("frames", "fps", "duration_s")  # kept of a control
_NAME = "file name not UTF-8: the manifest cannot hold it; rename the file"
_NOT_SCANNED = "not scanned: start again"


# --- from entries and results to rows


def entry_keys(scan: Scan, names: Sequence[str] = KEYS) -> list[pa.Array]:
    """Keys of the entries of a scan, batch by batch. names: those of KEYS that are wanted."""
    return [batch.column(name) for batch in read_entries(scan) for name in names]


def build_rows(scan: Scan, results: Results) -> Iterator[pa.RecordBatch]:
    """The manifest's rows (SCHEMA) of the entries of a scan."""
    keys = entry_keys(scan)
    known, failed = look_up(results.rows, keys), look_up(results.failed.select(["key", "reason"]), keys)
    for batch in read_entries(scan):
        clip, image, control = (_file_columns(batch.column(name), next(known), next(failed)["reason"]) for name in KEYS)
        yield _row_batch(batch, clip, image, control, scan.default_caption)


def _file_columns(keys: pa.Array, result: dict[str, pa.Array], failure: pa.Array) -> dict[str, pa.Array]:
    """The results of the rows' files. failure: why this scan could not open them, else null."""
    # The properties of a missing file stay, so that it is not scanned again when its disk is back. An old failure is
    # dropped, because its row has only one reason.
    is_dropped = pc.and_(pc.is_valid(failure), pc.is_null(result["frames"]))
    is_missing = pc.and_(pc.is_valid(keys), pc.is_null(result["key"]))
    return result | {
        "size": pc.if_else(is_dropped, None, result["size"]),
        "mtime_ns": pc.if_else(is_dropped, None, result["mtime_ns"]),
        "reason": pc.coalesce(failure, result["reason"], pc.if_else(is_missing, _NOT_SCANNED, None)),
    }


def _row_batch(
    entries: pa.RecordBatch,
    clip: Mapping[str, pa.Array],
    image: Mapping[str, pa.Array],
    control: Mapping[str, pa.Array],
    default_caption: str | None,
) -> pa.RecordBatch:
    caption = entries.column("caption")
    if default_caption is not None:
        is_empty = pc.or_kleene(pc.is_null(caption), pc.equal(caption, ""))
        is_unreadable = pc.is_valid(entries.column("caption_error"))
        caption = pc.if_else(pc.and_not(is_empty, is_unreadable), default_caption, caption)
    reason = pc.coalesce(
        pc.if_else(pc.is_null(entries.column("key")), _NAME, None),
        clip["reason"],
        _reasons_beside(entries, "image", image["reason"], _IMAGE),
        pc.binary_join_element_wise("caption unreadable: ", entries.column("caption_error"), ""),
        pc.if_else(pc.is_null(caption), _CAPTION_MISSING, None),
        pc.if_else(pc.equal(caption, ""), _CAPTION_EMPTY, None),
        _range_reasons(entries, clip["duration_s"]),
    )
    own = (
        *("path", "kind", "more_captions", "image_path", "control_path", "start_s", "end_s", "motion"),
        *("duplicate_of", "set"),
    )
    columns = {
        **{name: clip[name] for name in RESULT_SCHEMA.names},
        **{name: entries.column(name) for name in own},
        "caption": caption,
        "reason": reason,
        "status": pc.if_else(pc.is_null(reason), "ok", "unusable"),
        "image_digest": image["digest"],
        "image_size": image["size"],
        "image_mtime_ns": image["mtime_ns"],
        **{f"control_{name}": control[name] for name in (*_STAMP, *_CONTROL_PROPERTIES)},
        "control_reason": pc.coalesce(
            _reasons_beside(entries, "control", control["reason"], _CONTROL),
            _length_reasons(entries, clip, control),
        ),
    }
    return pa.RecordBatch.from_pydict(columns, SCHEMA)


def _reasons_beside(entries: pa.RecordBatch, name: str, reasons: pa.Array, start: str) -> pa.Array:
    """Why the file beside a clip cannot be used, else null. name: of its columns; start: of the reasons."""
    is_given = pc.is_valid(entries.column(f"{name}_path"))
    has_bad_name = pc.and_(is_given, pc.is_null(entries.column(f"{name}_key")))
    reasons = pc.if_else(has_bad_name, _NAME, pc.if_else(is_given, reasons, None))
    return pc.binary_join_element_wise(start, reasons, "")


def _length_reasons(entries: pa.RecordBatch, clip: Mapping[str, pa.Array], control: Mapping[str, pa.Array]) -> pa.Array:
    """Why a control video is shorter than its clip's range, else null.

    One frame of its own may be missing, which `decode_task.decode` adds. 1% of a frame is for rounded times.
    """
    reasons: list[str | None] = [None] * len(entries)
    if control["duration_s"].null_count == len(entries):
        return pa.array(reasons, pa.string())
    ends, durations, lengths, fps = (
        pc.fill_null(values, np.nan).to_numpy(zero_copy_only=False)
        for values in (entries.column("end_s"), clip["duration_s"], control["duration_s"], control["fps"])
    )
    needed = np.fmin(ends, durations)
    with np.errstate(divide="ignore", invalid="ignore"):
        frame_s = np.nan_to_num(1 / fps, nan=0.0, posinf=0.0)
    for row in np.flatnonzero(lengths + 1.01 * frame_s < needed).tolist():
        reasons[row] = f"control video too short: {lengths[row]:g} s, and the clip ends at {needed[row]:g} s"
    return pa.array(reasons, pa.string())


def _range_reasons(entries: pa.RecordBatch, durations: pa.Array) -> pa.Array:
    """Why a clip's range is not within its file, else null."""
    starts, ends = entries.column("start_s"), entries.column("end_s")
    reasons: list[str | None] = [None] * len(entries)
    if starts.null_count < len(entries) or ends.null_count < len(entries):
        start, end = (pc.fill_null(times, 0.0).to_numpy(zero_copy_only=False) for times in (starts, ends))
        duration = pc.fill_null(durations, np.inf).to_numpy(zero_copy_only=False)
        outside = ((start > 0) & (start >= duration)) | (end > duration + RANGE_TOLERANCE_S)
        for row in np.flatnonzero(outside).tolist():
            until = f"{end[row]:g} s" if ends[row].is_valid else "the end"
            reasons[row] = f"range outside the clip: from {start[row]:g} s to {until}, of {duration[row]:g} s"
    return pa.array(reasons, pa.string())


# --- from rows to results


def results_in(batch: pa.RecordBatch) -> Iterator[pa.Table]:
    """The results (RESULT_SCHEMA) in rows of a manifest: of the clips, of their images and controls."""
    is_usable, reason = pc.is_valid(batch.column("frames")), batch.column("reason")
    clips = {name: batch.column(name) for name in RESULT_SCHEMA.names if name != "key"}
    clips |= {
        "key": file_keys(batch.column("kind"), batch.column("path")),
        "reason": pc.if_else(is_usable, None, reason),  # the reason is not about the file if the file is usable
    }
    yield _complete_results(clips)
    has_failed = pc.fill_null(pc.starts_with(reason, _IMAGE), False)
    images = {name: pa.nulls(len(batch), RESULT_SCHEMA.field(name).type) for name in RESULT_SCHEMA.names}
    images |= {
        "key": file_keys(kinds_of(CONDITION, len(batch)), batch.column("image_path")),
        # If the clip itself is unusable, its row does not tell whether the image is.
        "size": pc.if_else(is_usable, batch.column("image_size"), None),
        "mtime_ns": batch.column("image_mtime_ns"),
        "frames": pc.if_else(has_failed, None, pa.scalar(1, pa.int32())),
        "reason": pc.if_else(has_failed, pc.utf8_slice_codeunits(reason, len(_IMAGE)), None),
        "digest": batch.column("image_digest"),
    }
    yield _complete_results(images)
    control_reason = batch.column("control_reason")
    has_failed = pc.fill_null(pc.starts_with(control_reason, _CONTROL), False)
    controls = {name: pa.nulls(len(batch), RESULT_SCHEMA.field(name).type) for name in RESULT_SCHEMA.names}
    controls |= {name: batch.column(f"control_{name}") for name in (*_STAMP, *_CONTROL_PROPERTIES)}
    controls |= {
        "key": file_keys(kinds_of(CONTROL, len(batch)), batch.column("control_path")),
        "reason": pc.if_else(has_failed, pc.utf8_slice_codeunits(control_reason, len(_CONTROL)), None),
    }
    yield _complete_results(controls)


def _complete_results(columns: Mapping[str, pa.Array]) -> pa.Table:
    table = pa.Table.from_pydict(columns, RESULT_SCHEMA)
    return table.filter(pc.and_(pc.is_valid(table["key"]), pc.is_valid(table["size"])))
