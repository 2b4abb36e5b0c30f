"""What a dataset holds before anything is encoded: its manifest, which clips go where, and which of them are trained
and which evaluated. The report shows it."""

import itertools
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cogds.config.schema import RunConfig
from cogds.core.geometry import ClipShape
from cogds.core.held_out import is_held_out, least_share, name_hash, portable_name, spread
from cogds.core.mixture import repeats_of_weights
from cogds.data.manifest.assignment import Placement, numbers, place, too_short
from cogds.data.manifest.file_digests import fill_digests_begin, fill_digests_finish, fill_digests_share
from cogds.data.manifest.scan import begin, finish, probe_share
from cogds.data.manifest.table import DataSet, manifest_file, read
from cogds.distributed.collectives import on_all_ranks, on_rank0
from cogds.distributed.world import World
from cogds.errors import UserError
from cogds.files import whole_file
from cogds.formatting import counted

NUM_EXAMPLES = 5
# Of a bucket with twice as many clips or more, about so many, evenly spaced, may be chosen to be evaluated: each costs
# a hash. Where more are wanted, as many as are wanted.
MAX_CANDIDATES = 1 << 16


@dataclass(frozen=True)
class Unusable:
    """What is left out of a dataset of `num_rows` clips: counts by reason, a few examples, and the file of all.

    The file has one line of JSON per clip: path and reason.
    """

    num: int
    num_rows: int
    by_reason: Mapping[str, int]
    examples: Sequence[tuple[str, str]]
    file: Path | None = None

    def check_share(self, most: float) -> None:
        """Raise UserError where more than the share `most` is left out."""
        if self.num > most * self.num_rows:
            where = f"; all of them are in {self.file}" if self.file else ""
            raise UserError(
                f"{self.num:,} of {counted(self.num_rows, 'clip')} cannot be used ({self.text()}), more than "
                f"data.max_unusable ({most:g}) allows{where}: mend or remove them, or raise data.max_unusable"
            )

    def text(self) -> str:
        """The commonest reasons and the first file."""
        common = Counter(self.by_reason).most_common(3)
        counts = ", ".join(f"{count} x {reason}" for reason, count in common)
        return f"{counts}; the first is {self.examples[0][0]}: {self.examples[0][1]}" if self.examples else counts


@dataclass(frozen=True)
class Survey:
    """The manifest's table and the placement of its clips. Rank 0's: it grows with the dataset.

    repeats: of each data set; reasons: rows that the manifest calls usable but are left out -> why; roots: folders of
    the data sets, from which on a file's name counts. held_out: what of the same table is not placed here, because it
    is only evaluated; None where nothing is.
    """

    table: pa.Table
    placement: Placement
    buckets: tuple[ClipShape, ...]
    repeats: tuple[float, ...]
    fps: float
    data_path: str
    reasons: Mapping[int, str] = field(default_factory=dict)
    roots: tuple[str, ...] = ()
    held_out: "Survey | None" = None

    @property
    def num_windows(self) -> int:
        return len(self.placement.rows)

    def column(self, name: str, windows: slice | np.ndarray = slice(None)) -> pa.ChunkedArray:
        """A column of the manifest for these windows, by default all in the order of the plan."""
        return self.table.column(name).take(pa.array(self.placement.rows[windows]))

    def costs(self) -> np.ndarray:
        """What encoding every window costs, in pixels: those that the VAE takes and those that are decoded for them.

        A pixel decoded and one encoded are taken to cost the same; both grow with the clip. Decoding begins at the
        keyframe before the window, so where the window stands does not matter.
        """
        buckets, rows = self.placement.buckets, self.placement.rows
        lengths = np.array([shape.frames for shape in self.buckets])[buckets]
        areas = np.array([shape.height * shape.width for shape in self.buckets], np.float64)[buckets]
        wanted = np.ceil(lengths / self.fps * numbers(self.table, "fps")[rows])
        frames = np.minimum(numbers(self.table, "frames")[rows], wanted)
        return lengths * areas + frames * numbers(self.table, "width")[rows] * numbers(self.table, "height")[rows]

    def only(self, windows: np.ndarray) -> "Survey":
        """The survey with these windows (numbers, ascending) and no others."""
        rows = self.placement.rows[windows]
        sizes = np.zeros((len(self.buckets), len(self.repeats)), np.int64)
        np.add.at(sizes, (self.placement.buckets[windows], numbers(self.table, "set")[rows]), 1)
        starts_s = self.placement.starts_s[windows]
        placement = replace(self.placement, rows=rows, starts_s=starts_s, sizes=tuple(map(tuple, sizes.tolist())))
        return replace(self, placement=placement)

    def without(self, keys: pa.Array, failed: Mapping[bytes, str]) -> tuple["Survey", np.ndarray]:
        """The survey less the windows whose key failed, and the numbers of those that stay."""
        if not failed:
            return self, np.arange(self.num_windows)
        bad = pc.is_in(keys, pa.array(list(failed), pa.binary(16))).to_numpy(zero_copy_only=False)
        lost = {int(self.placement.rows[window]): failed[keys[window].as_py()] for window in np.flatnonzero(bad)}
        kept = np.flatnonzero(~bad)
        return replace(self.only(kept), reasons={**self.reasons, **lost}), kept

    def chosen(self, num: int) -> "Survey":
        """Up to `num` windows, spread over the buckets, in a table of their own: which, their files' names decide."""
        candidates = []
        for start, count in zip(itertools.accumulate(map(sum, self.placement.sizes), initial=0), self.placement.sizes):
            candidates.append(np.arange(start, start + sum(count), max(1, sum(count) // max(MAX_CANDIDATES, num))))
        windows = np.concatenate(candidates)
        paths, starts_s = self.column("path", windows).to_pylist(), self.placement.starts_s[windows].tolist()
        hashes = [name_hash(portable_name(path, self.roots), repr(start)) for path, start in zip(paths, starts_s)]
        found = self.only(windows[spread(self.placement.buckets[windows], np.array(hashes, np.uint64), num)])
        rows, places = np.unique(found.placement.rows, return_inverse=True)
        placement = replace(
            found.placement,
            rows=places.astype(np.int64),
            row_buckets=found.placement.row_buckets[rows],
            row_frames=found.placement.row_frames[rows],
        )
        return replace(found, table=self.table.take(pa.array(rows)), placement=placement, reasons={}, held_out=None)

    def unusable(self, file: Path | None = None, lost: Mapping[str, str] | None = None) -> Unusable:
        """What is left out, and of what is held out the lost, path -> why; with a file, all of it is listed there."""
        unusable = pc.not_equal(self.table.column("status"), "ok").to_numpy(zero_copy_only=False)
        listed = self.table.filter(pa.array(unusable)).select(["path", "reason"])
        paths = self.table.column("path")
        pairs = [(paths[row].as_py(), reason) for row, reason in self.reasons.items()] + list((lost or {}).items())
        more = pa.table(
            {"path": [path for path, _ in pairs], "reason": [reason for _, reason in pairs]},
            listed.schema,
        )
        every = pa.concat_tables([listed, more])
        if file:
            with whole_file(file) as partial, partial.open("w") as out:
                for batch in every.to_batches(max_chunksize=10_000):
                    out.writelines(json.dumps(row) + "\n" for row in batch.to_pylist())
        phrases = pc.value_counts(pc.list_element(pc.split_pattern(every.column("reason"), ":", max_splits=1), 0))
        return Unusable(
            num=len(every),
            num_rows=len(self.table),
            by_reason={one["values"]: one["counts"] for one in phrases.to_pylist()},
            examples=[(row["path"], row["reason"]) for row in every.slice(0, NUM_EXAMPLES).to_pylist()],
            file=file,
        )

    def check_any_left(self) -> None:
        """Raise UserError with the commonest reasons where every clip is left out."""
        if not self.num_windows:
            unusable = self.unusable()
            parts = [unusable.text()] if unusable.num or self.held_out is None else []
            if self.held_out is not None:
                parts.append(f"eval.held_out holds out {len(np.unique(self.held_out.placement.rows))}: lower it")
            raise UserError(
                f"data.path: 0 of {counted(unusable.num_rows, 'clip')} of {self.data_path} can be trained "
                f"({'; '.join(parts)})"
            )


def data_sets(cfg: RunConfig) -> list[DataSet]:
    """The run's data sets, in the order of their numbers."""
    given = cfg.data.sets or (cfg.data,)
    return [DataSet(one.path, {str(name): column for name, column in one.columns.items()}) for one in given]


def update_manifest(cfg: RunConfig, world: World, digests: bool, retry: bool = False) -> Path:
    """Bring the manifest up to date, the files shared over the ranks, and give its place. Collective.

    digests: read every usable file that has none yet, for the name of its encoding. retry: open files again that
    failed before.
    """
    file = manifest_file(data_sets(cfg), cfg.data.cache_dir, cfg.data.manifest)
    share = (world.rank, world.size)
    job = on_rank0(world, lambda: begin(data_sets(cfg), file, cfg.data.default_caption, retry))
    memory_bytes = int(cfg.data.decode_memory_gb * 1e9)
    on_all_ranks(world, lambda: probe_share(job, share, cfg.data.num_workers, cfg.data.decode_timeout_s, memory_bytes))
    on_rank0(world, lambda: finish(job))
    if digests:
        job = on_rank0(world, lambda: fill_digests_begin(file))
        on_all_ranks(world, lambda: fill_digests_share(job, share))
        on_rank0(world, lambda: fill_digests_finish(job))
    return file


def other_manifest(cfg: RunConfig, world: World, retry: bool = False) -> Path | None:
    """The same for the data set of eval.path; None where there is none. Collective."""
    if cfg.eval.path is None:
        return None
    try:
        return update_manifest(evaluated_data(cfg), world, digests=False, retry=retry)
    except UserError as error:
        error.args = (str(error).replace("data.path", "eval.path"),)
        raise


def survey(cfg: RunConfig, manifest: Path, buckets: tuple[ClipShape, ...]) -> Survey:
    """Place the clips of an up-to-date manifest, apart from those that eval.held_out holds out."""
    table = read(manifest)
    for name in ("path", "caption", "image_path"):  # together they may be longer than the 2 GB of plain strings
        table = table.set_column(table.column_names.index(name), name, table.column(name).cast(pa.large_string()))
    sets = data_sets(cfg)
    placement = place(
        table, buckets, cfg.data.fps, cfg.data.windows, cfg.data.num_windows, cfg.seed, num_sets=len(sets)
    )
    where = ", ".join(one.path for one in sets)
    reasons = too_short(placement, table, buckets, cfg.data.fps)
    roots = tuple(map(_root, sets))
    found = Survey(table, placement, buckets, (1.0,) * len(sets), cfg.data.fps, where, reasons, roots)
    if cfg.eval.held_out:
        held = _held_out(table, roots, cfg.eval.held_out)[placement.rows]
        apart = found.only(np.flatnonzero(held))
        found = replace(found.only(np.flatnonzero(~held)), held_out=apart if apart.num_windows else None)
    return replace(found, repeats=_repeats(cfg, found))


def _repeats(cfg: RunConfig, found: Survey) -> tuple[float, ...]:
    """Of each data set, given or from its weight."""
    given = cfg.data.sets
    if not given:
        return (cfg.data.repeats,)
    if given[0].weight is None:
        return tuple(one.repeats for one in given)
    return repeats_of_weights([one.weight or 0.0 for one in given], np.sum(found.placement.sizes, axis=0).tolist())


def _root(one: DataSet) -> str:
    """The folder that relative paths of a data set are relative to."""
    path = os.path.abspath(os.path.expanduser(one.path))
    return path if os.path.isdir(path) else os.path.dirname(path)


def _held_out(table: pa.Table, roots: Sequence[str], share: float) -> np.ndarray:
    """bool [rows]: whether each row's file is held out."""
    parts = [
        np.fromiter((is_held_out(portable_name(path, roots), share) for path in batch.to_pylist()), bool, len(batch))
        for batch in table.column("path").chunks
    ]
    return np.concatenate(parts) if parts else np.zeros(0, bool)


def evaluated_survey(
    cfg: RunConfig, found: Survey, other: Path | None
) -> tuple[Survey | None, Survey | None, list[str]]:
    """What is evaluated: of the clips that are not trained, and of those that are; and warnings, for people. Nothing is
    where eval.every and sample.every are null.

    other: the manifest of eval.path. Raises UserError where that holds nothing that can be used.
    """
    warnings = []
    held_out = found.held_out
    if other is not None:
        held_out = survey(evaluated_data(cfg), other, found.buckets)
        if not held_out.num_windows:
            unusable = held_out.unusable()
            raise UserError(
                f"eval.path: 0 of {counted(unusable.num_rows, 'clip')} of {held_out.data_path} can be evaluated "
                f"({unusable.text()})"
            )
        if (unusable := held_out.unusable()).num:
            warnings.append(
                f"{unusable.num:,} of {counted(unusable.num_rows, 'clip')} of eval.path cannot be evaluated: "
                f"{unusable.text()}"
            )
    elif cfg.eval.held_out and held_out is None:
        names = {
            portable_name(path, found.roots) for path in found.column("path", slice(0, MAX_CANDIDATES)).to_pylist()
        }
        first = min(names, key=name_hash)
        warnings.append(
            f"eval.held_out={cfg.eval.held_out:g} holds out none of {counted(len(names), 'file')} to be trained: "
            f"only the loss of trained clips is evaluated, which does not show overfitting; raise it (from "
            f"{least_share(first):g} on {first} is held out), or give eval.path"
        )
    elif held_out is not None:
        num, left = (len(np.unique(one.placement.rows)) for one in (held_out, found))
        if num > 2 * max(1.0, cfg.eval.held_out * (num + left)):
            warnings.append(
                f"eval.held_out={cfg.eval.held_out:g} holds out {num:,} of {counted(num + left, 'clip')}, which are "
                "not trained: they are chosen by a hash of their names, and of few clips that may be many; lower it, "
                "or name those that are to be evaluated by eval.path"
            )
    wanted = cfg.eval.every is not None or cfg.sample.every is not None
    return (
        held_out.chosen(cfg.eval.num_clips) if wanted and held_out is not None else None,
        found.chosen(cfg.eval.num_clips) if wanted else None,
        warnings,
    )


def evaluated_data(cfg: RunConfig) -> RunConfig:
    """The config of the data set that eval.path names, as if it were trained."""
    data = cfg.data.model_copy(update={"path": cfg.eval.path, "sets": (), "repeats": 1.0, "manifest": None})
    evaluation = cfg.eval.model_copy(update={"path": None, "held_out": 0.0})
    return cfg.model_copy(update={"data": data, "eval": evaluation})
