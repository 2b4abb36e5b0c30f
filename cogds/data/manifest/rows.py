"""What stands in a manifest's row: made of a clip's entry and the facts of its files, and read back as facts.

Every function takes and gives arrow tables and keeps nothing; on rank 0 there are 350 to 660 bytes a clip.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cogds.data.manifest import scan_state as journal
from cogds.data.manifest import table as manifest
from cogds.data.manifest.file_keys import conditions, keys_of, look_up
from cogds.data.manifest.scan_state import FACTS, FILES, Found
from cogds.data.manifest.table import SCHEMA

RANGE_SLACK_S = 0.5  # lists of scenes round their ends

_CAPTION_MISSING = "caption missing: add a same-named .txt file, or fill its line in the list of captions"
_CAPTION_EMPTY = "caption empty: write one into the same-named .txt file, or its line in the list of captions"
_IMAGE = "conditioning image unusable: "
_NAME = "file name not UTF-8: no table can hold it; rename the file"
_NOT_SURVEYED = "not surveyed: start again"


# --------------------------------------------------------------------------------------------------- entries and facts


def entry_keys(entries: Path) -> list[pa.Array]:
    """Of a run's entries, batch by batch: the clips' keys, then those of their conditioning images."""
    return [batch.column(name) for batch in journal.read_batches(entries) for name in ("key", "image_key")]


def rows_of(entries: Path, facts: Found, default_caption: str | None) -> Iterator[pa.RecordBatch]:
    """The manifest's rows (SCHEMA) for the entries of a run."""
    keys = entry_keys(entries)
    found, gone = look_up(facts.rows, keys), look_up(facts.failed.select(["key", "reason"]), keys)
    for batch in journal.read_batches(entries):
        clip = _file_columns(batch.column("key"), next(found), next(gone)["reason"])
        image = _file_columns(batch.column("image_key"), next(found), next(gone)["reason"])
        yield _row_batch(batch, clip, image, default_caption)


def _file_columns(keys: pa.Array, found: dict[str, pa.Array], gone: pa.Array) -> dict[str, pa.Array]:
    """What the rows say of their files. found: their facts; gone: why they could not be looked at, else null."""
    # Facts of a file that is gone stay, so that a disk that comes back is not surveyed anew; not a failure, which its
    # row has no place for beside this one.
    forgotten = pc.and_(pc.is_valid(gone), pc.is_null(found["frames"]))
    never = pc.and_(pc.is_valid(keys), pc.is_null(found["key"]))
    return found | {
        "size": pc.if_else(forgotten, None, found["size"]),
        "mtime_ns": pc.if_else(forgotten, None, found["mtime_ns"]),
        "reason": pc.coalesce(gone, found["reason"], pc.if_else(never, _NOT_SURVEYED, None)),
    }


def _row_batch(
    entries: pa.RecordBatch, clip: Mapping[str, pa.Array], image: Mapping[str, pa.Array], default_caption: str | None
) -> pa.RecordBatch:
    caption = entries.column("caption")
    if default_caption is not None:
        empty = pc.or_kleene(pc.is_null(caption), pc.equal(caption, ""))
        unread = pc.is_valid(entries.column("caption_error"))
        caption = pc.if_else(pc.and_not(empty, unread), default_caption, caption)
    reason = pc.coalesce(
        pc.if_else(pc.is_null(entries.column("key")), _NAME, None),
        clip["reason"],
        _image_reasons(entries, image["reason"]),
        pc.binary_join_element_wise("caption unreadable: ", entries.column("caption_error"), ""),
        pc.if_else(pc.is_null(caption), _CAPTION_MISSING, None),
        pc.if_else(pc.equal(caption, ""), _CAPTION_EMPTY, None),
        _range_reasons(entries, clip["duration_s"]),
    )
    made = {
        **{name: clip[name] for name in FACTS.names},
        **{name: entries.column(name) for name in ("path", "kind", "image_path", "start_s", "end_s", "set")},
        "caption": caption,
        "reason": reason,
        "status": _status(reason),
        "image_digest": image["digest"],
        "image_size": image["size"],
        "image_mtime_ns": image["mtime_ns"],
    }
    return pa.RecordBatch.from_pydict(made, SCHEMA)


def _status(reasons: pa.Array) -> pa.Array:
    return pc.if_else(pc.is_null(reasons), "ok", "unusable")


def _image_reasons(entries: pa.RecordBatch, reasons: pa.Array) -> pa.Array:
    there = pc.is_valid(entries.column("image_path"))
    unnamed = pc.and_(there, pc.is_null(entries.column("image_key")))
    return pc.binary_join_element_wise(_IMAGE, pc.if_else(unnamed, _NAME, pc.if_else(there, reasons, None)), "")


def _range_reasons(entries: pa.RecordBatch, durations: pa.Array) -> pa.Array:
    """Why a clip's part of its file is none; null where it is one."""
    starts, ends = entries.column("start_s"), entries.column("end_s")
    reasons: list[str | None] = [None] * len(entries)
    if starts.null_count < len(entries) or ends.null_count < len(entries):
        start, end = (pc.fill_null(one, 0.0).to_numpy(zero_copy_only=False) for one in (starts, ends))
        duration = pc.fill_null(durations, np.inf).to_numpy(zero_copy_only=False)
        outside = ((start > 0) & (start >= duration)) | (end > duration + RANGE_SLACK_S)
        for row in np.flatnonzero(outside).tolist():
            until = f"{end[row]:g} s" if ends[row].is_valid else "its end"
            reasons[row] = f"range outside the clip: from {start[row]:g} s to {until}, of {duration[row]:g} s"
    return pa.array(reasons, pa.string())


# --------------------------------------------------------------------------------------------------------- read back


def facts_in(batch: pa.RecordBatch) -> Iterator[pa.Table]:
    """What a manifest's rows say (FACTS) of their files, and of their conditioning images."""
    clip_keys, image_keys = _keys_in(batch)
    usable, reason = pc.is_valid(batch.column("frames")), batch.column("reason")
    clips = {name: batch.column(name) for name in FACTS.names if name != "key"}
    # A row whose file is good has another reason to be unusable.
    yield _known(clips | {"key": clip_keys, "reason": pc.if_else(usable, None, reason)})
    failed = pc.fill_null(pc.starts_with(reason, _IMAGE), False)
    images = {name: pa.nulls(len(batch), FACTS.field(name).type) for name in FACTS.names}
    images |= {
        "key": image_keys,
        # Where the clip itself is bad, its row does not say whether the image is.
        "size": pc.if_else(usable, batch.column("image_size"), None),
        "mtime_ns": batch.column("image_mtime_ns"),
        "frames": pc.if_else(failed, None, pa.scalar(1, pa.int32())),
        "reason": pc.if_else(failed, pc.utf8_slice_codeunits(reason, len(_IMAGE)), None),
        "digest": batch.column("image_digest"),
    }
    yield _known(images)


def _known(columns: Mapping[str, pa.Array]) -> pa.Table:
    table = pa.Table.from_pydict(columns, FACTS)
    return table.filter(pc.and_(pc.is_valid(table["key"]), pc.is_valid(table["size"])))


def _keys_in(batch: pa.RecordBatch) -> tuple[pa.Array, pa.Array]:
    """The keys of the rows' files, and those of their conditioning images."""
    image_keys = keys_of(conditions(len(batch)), batch.column("image_path"))
    return keys_of(batch.column("kind"), batch.column("path")), image_keys


# ----------------------------------------------------------------------------------------------------------- digests


def same_digests(found: Mapping[str, pa.Array], sizes: pa.Array, times: pa.Array) -> pa.Array:
    """The digests that were found (DIGESTS), where they are of files of that size and time; else null."""
    same = pc.and_(pc.equal(found["size"], sizes), pc.equal(found["mtime_ns"], times))
    return pc.if_else(same, found["digest"], None)


def with_digests(file: Path, digests: Found) -> Iterator[pa.RecordBatch]:
    """A manifest's rows with the digests that they lack, as far as they were found."""
    batches = manifest.read_batches(file, ["kind", "path", "image_path"])
    keys = [one for batch in batches for one in _keys_in(batch)]
    found, failed = look_up(digests.rows, keys), look_up(digests.failed.select(["key", "reason"]), keys)
    for batch in manifest.read_batches(file):
        made = {name: batch.column(name) for name in SCHEMA.names}
        ok, reason = pc.equal(made["status"], "ok"), made["reason"]
        for prefix, words in (("", ""), ("image_", _IMAGE)):
            same = same_digests(next(found), made[f"{prefix}size"], made[f"{prefix}mtime_ns"])
            made[f"{prefix}digest"] = pc.coalesce(made[f"{prefix}digest"], same)
            unread = pc.if_else(ok, next(failed)["reason"], None)
            reason = pc.coalesce(reason, pc.binary_join_element_wise(words, unread, ""))
        yield pa.RecordBatch.from_pydict(made | {"reason": reason, "status": _status(reason)}, SCHEMA)


def without_digest(file: Path) -> Iterator[pa.RecordBatch]:
    """FILES of a manifest's usable rows that have no digest, as often as rows have them."""
    names = ["path", "kind", "size", "mtime_ns", "status", "digest"]
    images = ["image_path", "image_size", "image_mtime_ns", "image_digest"]
    for batch in manifest.read_batches(file, names + images):
        ok = pc.equal(batch.column("status"), "ok")
        kinds = (batch.column("kind"), conditions(len(batch)))
        for prefix, kind, keys in zip(("", "image_"), kinds, _keys_in(batch)):
            path, size, time, digest = (batch.column(prefix + name) for name in ("path", "size", "mtime_ns", "digest"))
            wanted = pc.and_(pc.and_(ok, pc.is_valid(path)), pc.is_null(digest))
            yield pa.record_batch([keys, kind, path, size, time], FILES).filter(wanted)
