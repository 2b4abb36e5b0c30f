"""The clips of a dataset that are trained, and those that are only evaluated, before anything is encoded."""

import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cogds.config.schema import RunConfig
from cogds.core.geometry import ClipShape
from cogds.core.held_out import held_out_limit, min_held_out_share, name_hash, portable_name, spread
from cogds.core.mixture import repeats_from_weights
from cogds.data.manifest.assignment import (
    BucketAssignment,
    WindowRule,
    assign_rows,
    column_values,
    too_short_reasons,
)
from cogds.data.manifest.table import DataSet, read_manifest, read_skipped
from cogds.data.storage.access import is_folder
from cogds.data.storage.location import absolute, display_name, parent
from cogds.data.video.kinds import suffix_of
from cogds.encode.captions import join_lists, list_lengths, with_prefixes
from cogds.encode.scan_data import caption_prefixes, data_sets, evaluation_config
from cogds.errors import UserError
from cogds.files import whole_file
from cogds.formatting import counted

NUM_EXAMPLES = 5
# Clips to evaluate are chosen from about this many of each bucket (or eval.num_clips, if that is more), evenly spaced,
# because each candidate costs a hash.
MAX_CANDIDATES = 1 << 16
_CONTROL_MISSING = (
    "control video missing: add NAME.control.mp4 beside NAME.mp4, or write its path to the column control"
)
# Words by which a caption names a side, which its mirror image would contradict.
SIDES = r"\b(left|right|leftwards?|rightwards?|(counter|anti)?-?clockwise)\b|[左右]"


@dataclass(frozen=True)
class UnusableClips:
    """The clips that are left out of a dataset.

    Attributes:
        num: their number.
        num_rows: number of all clips of the manifest.
        by_reason: numbers by the first words of the reason.
        examples: some paths and reasons.
        file: JSON Lines file of all paths and reasons.
    """

    num: int
    num_rows: int
    by_reason: Mapping[str, int]
    examples: Sequence[tuple[str, str]]
    file: Path | None = None

    def check_share(self, max_share: float) -> None:
        """Raise UserError if more than this share of the clips is left out."""
        if self.num > max_share * self.num_rows:
            listed = f" All are listed in {self.file}." if self.file else ""
            raise UserError(
                f"data.max_unusable: {self.num:,} of {counted(self.num_rows, 'clip')} cannot be used, more than the "
                f"allowed share of {max_share:g}: {self.summary()}.{listed} Repair or remove the files, or increase "
                "data.max_unusable."
            )

    def summary(self) -> str:
        """The most common reasons and the first example."""
        counts = ", ".join(f"{count} x {reason}" for reason, count in Counter(self.by_reason).most_common(3))
        return f"{counts}; the first is {self.examples[0][0]}: {self.examples[0][1]}" if self.examples else counts


@dataclass(frozen=True)
class ClipSet:
    """Clips of a manifest with their buckets, in the order of the plan. Only rank 0's memory grows with their number.

    Attributes:
        table: the manifest, with `data.caption_prefix` before the captions.
        assignment: the bucket and the time range of each clip.
        repeats: how often an epoch repeats each dataset.
        data_path: the datasets, for messages.
        reasons: rows of the manifest that are usable but left out, with the reasons.
        roots: folders of the datasets, to which file names are relative.
        held_out: the clips of the same manifest that are only evaluated; None if there are none.
        held_out_limit: the largest hash of a held-out file (`core.held_out`); None if there are none.
        skipped: what the listing of the datasets skipped: reason -> number.
        has_controls: whether every clip has a control video.
    """

    table: pa.Table
    assignment: BucketAssignment
    buckets: tuple[ClipShape, ...]
    repeats: tuple[float, ...]
    fps: float
    data_path: str
    reasons: Mapping[int, str] = field(default_factory=dict)
    roots: tuple[str, ...] = ()
    held_out: "ClipSet | None" = None
    held_out_limit: int | None = None
    skipped: Mapping[str, int] = field(default_factory=dict)
    has_controls: bool = False

    @property
    def num_clips(self) -> int:
        return len(self.assignment.rows)

    @property
    def num_files(self) -> int:
        """Number of distinct files that clips are taken from."""
        return len(np.unique(_name_hashes(self.table, self.roots)[self.assignment.rows]))

    def column(self, name: str, clips: slice | np.ndarray = slice(None)) -> pa.ChunkedArray:
        """A column of the manifest for these clips."""
        return self.table.column(name).take(pa.array(self.assignment.rows[clips]))

    def captions(self) -> pa.LargeListArray:
        """The captions of each clip, at least one."""
        first, more = (self.column(name).combine_chunks() for name in ("caption", "more_captions"))
        return join_lists(first, more)

    def costs(self) -> np.ndarray:
        """float64 [num_clips]: cost of encoding each clip, in pixels that are decoded and encoded.

        Decoding and encoding a pixel are taken to cost the same, which is enough to share the work evenly.
        """
        buckets, rows = self.assignment.buckets, self.assignment.rows
        lengths = np.array([shape.frames for shape in self.buckets])[buckets]
        areas = np.array([shape.height * shape.width for shape in self.buckets], np.float64)[buckets]
        width, height, fps, num_frames = (
            column_values(self.table, name)[rows] for name in ("width", "height", "fps", "frames")
        )
        num_decoded = np.minimum(num_frames, np.ceil(lengths / self.fps * fps))
        return lengths * areas + num_decoded * width * height

    def select(self, clips: np.ndarray, mirrored: np.ndarray | None = None) -> "ClipSet":
        """The set of only these clips. clips: their numbers, ascending. mirrored: bool for each; by default as now."""
        rows = self.assignment.rows[clips]
        sizes = np.zeros((len(self.buckets), len(self.repeats)), np.int64)
        np.add.at(sizes, (self.assignment.buckets[clips], column_values(self.table, "set")[rows]), 1)
        assignment = replace(
            self.assignment,
            rows=rows,
            starts_s=self.assignment.starts_s[clips],
            sizes=tuple(map(tuple, sizes.tolist())),
            mirrored=self.assignment.mirrored[clips] if mirrored is None else mirrored,
        )
        return replace(self, assignment=assignment)

    def with_mirror_images(self) -> "ClipSet":
        """The set with the mirror image of each clip after it, except for captions that name a side."""
        lists = self.captions()
        names_side = pc.match_substring_regex(lists.flatten(), SIDES, ignore_case=True)
        lengths = list_lengths(lists)
        num_named = np.add.reduceat(names_side.to_numpy(zero_copy_only=False).astype(np.int64), _starts(lengths))
        copies = np.where(num_named > 0, 1, 2)
        mirrored = np.zeros(copies.sum(), bool)
        mirrored[np.cumsum(copies)[copies == 2] - 1] = True
        return self.select(np.repeat(np.arange(self.num_clips), copies), mirrored)

    def without(self, keys: pa.Array, failures: Mapping[bytes, str]) -> tuple["ClipSet", np.ndarray]:
        """The set without the clips whose key failed, and the numbers of the clips that it keeps."""
        if not failures:
            return self, np.arange(self.num_clips)
        has_failed = pc.is_in(keys, pa.array(list(failures), pa.binary(16))).to_numpy(zero_copy_only=False)
        reasons = {int(self.assignment.rows[clip]): failures[keys[clip].as_py()] for clip in np.flatnonzero(has_failed)}
        kept = np.flatnonzero(~has_failed)
        return replace(self.select(kept), reasons={**self.reasons, **reasons}), kept

    def sample(self, num_clips: int) -> "ClipSet":
        """Up to `num_clips` clips, spread over the buckets, with a table of their own.

        A hash of the file name chooses them, so that the choice stays the same as clips are added. Each keeps only its
        first caption.
        """
        candidates = []
        sizes = [sum(set_sizes) for set_sizes in self.assignment.sizes]
        for start, size in zip(itertools.accumulate(sizes, initial=0), sizes):
            candidates.append(np.arange(start, start + size, max(1, size // max(MAX_CANDIDATES, num_clips))))
        clips = np.concatenate(candidates)
        clips = clips[~self.assignment.mirrored[clips]]
        paths, starts_s = self.column("path", clips).to_pylist(), self.assignment.starts_s[clips].tolist()
        hashes = [name_hash(_name(path, self.roots), repr(start)) for path, start in zip(paths, starts_s)]
        chosen = spread(self.assignment.buckets[clips], np.array(hashes, np.uint64), num_clips)
        sampled = self.select(clips[chosen])
        rows, new_rows = np.unique(sampled.assignment.rows, return_inverse=True)
        assignment = replace(
            sampled.assignment,
            rows=new_rows.astype(np.int64),
            row_buckets=sampled.assignment.row_buckets[rows],
            row_frames=sampled.assignment.row_frames[rows],
        )
        table = self.table.take(pa.array(rows))
        no_captions = pa.nulls(len(table), table.schema.field("more_captions").type)
        table = table.set_column(table.column_names.index("more_captions"), "more_captions", no_captions)
        return replace(sampled, table=table, assignment=assignment, reasons={}, held_out=None)

    def unusable(self, file: Path | None = None, more: Mapping[str, str] | None = None) -> UnusableClips:
        """The clips that are left out. more: other paths to list, with reasons; file: where to list them all."""
        is_unusable = pc.not_equal(self.table.column("status"), "ok").to_numpy(zero_copy_only=False)
        unusable = self.table.filter(pa.array(is_unusable)).select(["path", "reason"])
        paths = self.table.column("path")
        pairs = [(paths[row].as_py(), reason) for row, reason in self.reasons.items()] + list((more or {}).items())
        columns = {"path": [path for path, _ in pairs], "reason": [reason for _, reason in pairs]}
        unusable = pa.concat_tables([unusable, pa.table(columns, unusable.schema)])
        if file:
            with whole_file(file) as partial, partial.open("w") as out:
                for batch in unusable.to_batches(max_chunksize=10_000):
                    rows = ({**row, "path": display_name(row["path"])} for row in batch.to_pylist())
                    out.writelines(json.dumps(row) + "\n" for row in rows)
        phrases = pc.list_element(pc.split_pattern(unusable.column("reason"), ":", max_splits=1), 0)
        return UnusableClips(
            num=len(unusable),
            num_rows=len(self.table),
            by_reason={count["values"]: count["counts"] for count in pc.value_counts(phrases).to_pylist()},
            examples=[
                (display_name(row["path"]), row["reason"]) for row in unusable.slice(0, NUM_EXAMPLES).to_pylist()
            ],
            file=file,
        )

    def check_not_empty(self) -> None:
        """Raise UserError with the most common reasons if no clip is left."""
        if not self.num_clips:
            unusable = self.unusable()
            parts = [unusable.summary()] if unusable.num or self.held_out is None else []
            if self.held_out is not None:
                parts.append(f"eval.held_out holds out {self.held_out.num_files}, so decrease it")
            raise UserError(
                f"data.path: none of the {counted(unusable.num_rows, 'clip')} of {self.data_path} can be trained: "
                f"{'; '.join(parts)}."
            )


def load_clip_set(cfg: RunConfig, manifest: Path, buckets: tuple[ClipShape, ...], limit: int | None = None) -> ClipSet:
    """Assign the clips of a manifest to buckets, and set apart those that eval.held_out holds out.

    limit: `held_out_limit` of the run that is resumed, so that no trained file is held out, nor the reverse.
    """
    table = _with_controls(read_manifest(manifest), cfg.conditioning.control)
    large = dict.fromkeys(("path", "caption", "image_path", "control_path"), pa.large_string())
    large["more_captions"] = pa.large_list(pa.large_string())
    for name, kind in large.items():  # a column of plain strings holds at most 2 GB
        table = table.set_column(table.column_names.index(name), name, table.column(name).cast(kind))
    table = with_prefixes(table, caption_prefixes(cfg))
    sets = data_sets(cfg)
    rule = WindowRule(cfg.data.fps, cfg.data.windows, cfg.data.num_windows, cfg.seed)
    assignment = assign_rows(table, buckets, rule, len(sets))
    clips = ClipSet(
        table,
        assignment,
        buckets,
        repeats=(1.0,) * len(sets),
        fps=cfg.data.fps,
        data_path=", ".join(data_set.path for data_set in sets),
        reasons=too_short_reasons(assignment, table, buckets, cfg.data.fps),
        roots=tuple(map(_root, sets)),
        skipped=read_skipped(manifest),
        has_controls=cfg.conditioning.control,
    )
    if cfg.eval.held_out:
        hashes = _name_hashes(table, clips.roots)[assignment.rows]
        limit = held_out_limit(hashes, cfg.eval.held_out) if limit is None else limit
        is_held = hashes <= np.uint64(limit) if limit is not None else np.zeros(len(hashes), bool)
        held_out = clips.select(np.flatnonzero(is_held))
        clips = replace(
            clips.select(np.flatnonzero(~is_held)),
            held_out=held_out if held_out.num_clips else None,
            held_out_limit=limit,
        )
    if cfg.data.mirror and clips.num_clips:
        clips = clips.with_mirror_images()
    return replace(clips, repeats=_repeats(cfg, clips))


def _with_controls(table: pa.Table, is_used: bool) -> pa.Table:
    """The manifest without control videos, or if they are used, with the clips that lack one as unusable."""
    if not is_used:
        for name in ("control_path", "control_digest"):
            empty = pa.nulls(len(table), table.schema.field(name).type)
            table = table.set_column(table.column_names.index(name), name, empty)
        return table
    missing = pc.if_else(pc.is_null(table.column("control_path")), _CONTROL_MISSING, None)
    reason = pc.coalesce(table.column("reason"), table.column("control_reason"), missing)
    columns = {"reason": reason, "status": pc.if_else(pc.is_null(reason), "ok", "unusable")}
    for name, values in columns.items():
        table = table.set_column(table.column_names.index(name), name, values)
    return table


def _starts(lengths: np.ndarray) -> np.ndarray:
    """The position at which each of several lists starts, if they follow each other."""
    return np.cumsum(lengths) - lengths


def _repeats(cfg: RunConfig, clips: ClipSet) -> tuple[float, ...]:
    """The repeats of each dataset, given or computed from the weights."""
    sets = cfg.data.sets
    if not sets:
        return (cfg.data.repeats,)
    if sets[0].weight is None:
        return tuple(data_set.repeats for data_set in sets)
    sizes = np.sum(clips.assignment.sizes, axis=0).tolist()
    return repeats_from_weights([data_set.weight or 0.0 for data_set in sets], sizes)


def _name(path: str, roots: Sequence[str]) -> str:
    """The name by which a file is held out or not: the same on every machine, and in a tar file packed again."""
    return portable_name(display_name(path), roots)


def _root(data_set: DataSet) -> str:
    """The folder to which the paths in a dataset are relative."""
    if data_set.root is not None:
        return absolute(data_set.root)
    path = absolute(data_set.path)
    return path if suffix_of(path) == ".tar" or is_folder(path) else parent(path)


def _name_hashes(table: pa.Table, roots: Sequence[str]) -> np.ndarray:
    """uint64 [num_rows]: the hash of the name of each row's file."""
    parts = [
        np.fromiter((name_hash(_name(path, roots)) for path in chunk.to_pylist()), np.uint64, len(chunk))
        for chunk in table.column("path").chunks
    ]
    return np.concatenate(parts) if parts else np.zeros(0, np.uint64)


def evaluation_clips(
    cfg: RunConfig, clips: ClipSet, eval_manifest: Path | None
) -> tuple[ClipSet | None, ClipSet | None, list[str]]:
    """Choose the clips to evaluate: held-out clips, and some that are trained.

    Both are None if eval.every and sample.every are null.

    Args:
        clips: the clips to train.
        eval_manifest: manifest of the dataset in eval.path.

    Returns:
        The clips to evaluate that are not trained, those that are trained, and warnings.

    Raises:
        UserError: no clip of eval.path can be used.
    """
    held_out, warnings = _held_out_clips(cfg, clips, eval_manifest)
    if cfg.eval.every is None and cfg.sample.every is None:
        return None, None, warnings
    trained = clips.sample(cfg.eval.num_clips)
    return held_out and held_out.sample(cfg.eval.num_clips), trained, warnings


def _held_out_clips(cfg: RunConfig, clips: ClipSet, eval_manifest: Path | None) -> tuple[ClipSet | None, list[str]]:
    """All clips of eval.path or eval.held_out, and warnings."""
    if eval_manifest is not None:
        held_out = load_clip_set(evaluation_config(cfg), eval_manifest, clips.buckets)
        unusable = held_out.unusable()
        if not held_out.num_clips:
            raise UserError(
                f"eval.path: none of the {counted(unusable.num_rows, 'clip')} of {held_out.data_path} can be "
                f"evaluated: {unusable.summary()}."
            )
        if not unusable.num:
            return held_out, []
        return held_out, [
            f"eval.path: {unusable.num:,} of {counted(unusable.num_rows, 'clip')} cannot be evaluated: "
            f"{unusable.summary()}"
        ]
    if not cfg.eval.held_out:
        return None, []
    if clips.held_out is None:
        return None, [
            f"eval.held_out: {cfg.eval.held_out:g} holds out none of {counted(clips.num_files, 'file')}, so only the "
            "loss of trained clips is evaluated, which does not show overfitting. Increase it "
            f"({min_held_out_share(clips.num_files):g} or more holds out a file), or set eval.path."
        ]
    return clips.held_out, []
