"""The table of clips: its rows, and the Parquet file that `data.path` trains from."""

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cogds.arguments import SCORES
from cogds.data.layouts.columns import Columns
from cogds.data.storage.location import display_name
from cogds.errors import UserError
from cogds.files import whole_file
from cogds.prepare.duplicates import find_duplicates
from cogds.prepare.state import SCENES, WorkFolder, read_table

# In the metadata of tables that this module wrote, which it may replace.
MARK = b"cogds.prepared"
_COLUMNS = {
    "file_name": pa.string(),
    "type": pa.string(),
    "image": pa.string(),
    "control": pa.string(),
    "start_s": pa.float64(),
    "end_s": pa.float64(),
    "text": pa.string(),
    "captions": pa.list_(pa.string()),
    "width": pa.int32(),
    "height": pa.int32(),
    "fps": pa.float64(),
    "motion": pa.float64(),
    "sharpness": pa.float64(),
    "text_share": pa.float64(),
    "duplicate_of": pa.string(),
}
_ROWS_PER_BATCH = 8192
_NOT_PREPARED = "it was not prepared: start again"
# Column -> the score without which the table does not have it.
_SCORE_OF = dict(zip(("motion", "sharpness", "text_share", "duplicate_of"), SCORES))


def is_prepared(file: Path) -> bool:
    """Whether a file is a table that `write_clips` wrote."""
    try:
        return MARK in (pq.read_schema(file).metadata or {})
    except (OSError, pa.ArrowInvalid):
        return False


@dataclass(frozen=True)
class PreparedScene:
    """A scene and its source.

    Attributes:
        row: number of the source in the dataset.
        source: its columns (state.SOURCE_SCHEMA).
        scene: columns of the scene (state.SCENES).
    """

    row: int
    source: Mapping[str, Any]
    scene: Mapping[str, Any]

    @property
    def path(self) -> str:
        return self.source["path"]

    @property
    def file_key(self) -> bytes:
        return self.source["file_key"]

    @property
    def start_s(self) -> float | None:
        return self.scene["start_s"]

    @property
    def end_s(self) -> float | None:
        return self.scene["end_s"]

    @property
    def length_s(self) -> float | None:
        return None if self.start_s is None or self.end_s is None else self.end_s - self.start_s


@dataclass
class Prepared:
    """What is known about all sources, in the order of the dataset.

    Attributes:
        unusable: paths of sources that are not in the table, or only in part, and why.
    """

    scenes: list[PreparedScene]
    num_sources: int
    num_short: int
    source_s: float
    unusable: list[tuple[str, str]]


def collect(folder: WorkFolder, failures: Mapping[bytes, str] = MappingProxyType({})) -> Prepared:
    """Read the results of all runs. failures: source key -> why this run could not prepare the source."""
    table, known = read_table(folder.sources), folder.read_results(SCENES)
    assert table is not None
    prepared = Prepared([], len(table), 0, 0.0, [])
    for row, source in enumerate(table.to_pylist()):
        unknown = source["reason"] or failures.get(source["key"]) or _NOT_PREPARED
        result = known.get(source["key"], {"scenes": [], "reason": unknown})
        prepared.scenes += [PreparedScene(row, source, scene) for scene in result["scenes"]]
        prepared.num_short += result.get("num_short") or 0
        prepared.source_s += result.get("duration_s") or 0.0
        reasons = (result["reason"], source["caption_error"] and f"its caption is left out: {source['caption_error']}")
        prepared.unusable += [(source["path"], reason) for reason in reasons if reason]
    return prepared


def write_clips(
    output: Path, prepared: Prepared, captions: Sequence[Sequence[str]], scores: Sequence[str], extras: pa.Table
) -> int:
    """Write the table and return the number of near duplicates.

    captions: of each scene. extras: other columns of the sources, which are kept unless this table has its own, or
    training would read them as something that they were not read as before.
    """
    scenes = prepared.scenes
    batches, schema = _batched(_rows(output, scenes, captions)), pa.schema(_COLUMNS)
    table = pa.Table.from_batches((pa.RecordBatch.from_pylist(rows, schema) for rows in batches), schema)
    num_duplicates = 0
    if "duplicates" in scores:
        originals = find_duplicates([scene.scene["hashes"] for scene in scenes], [scene.length_s for scene in scenes])
        names = [None if row is None else _name(output, scenes[row]) for row in originals]
        num_duplicates = len(names) - names.count(None)
        table = table.set_column(table.column_names.index("duplicate_of"), "duplicate_of", pa.array(names, pa.string()))
    optional = ["captions", "control", *(name for name, score in _SCORE_OF.items() if score not in scores)]
    table = table.drop_columns([name for name in optional if table.column(name).null_count == len(table)])
    kept = extras.take(pa.array([scene.row for scene in scenes], pa.int64()))
    read = Columns({}, None, need_captions=False)
    for name in kept.column_names:
        if name not in table.column_names and name not in read.match([*table.column_names, name]).values():
            table = table.append_column(name, kept.column(name))
    try:
        with whole_file(output) as partial:
            pq.write_table(table.replace_schema_metadata({MARK: b"1"}), partial, compression="zstd")
    except OSError as error:
        raise UserError(
            f"--output: cannot write {output} ({error.strerror or error}). Free some space there, or choose another "
            "folder."
        ) from None
    return num_duplicates


def _batched(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    while batch := list(itertools.islice(rows, _ROWS_PER_BATCH)):
        yield batch


def _rows(output: Path, scenes: Sequence[PreparedScene], captions: Sequence[Sequence[str]]) -> Iterator[dict[str, Any]]:
    for scene, texts in zip(scenes, captions):
        source = scene.source
        # A conditioning image is the first frame of the whole source.
        has_image = source["image_path"] and (scene.start_s or 0.0) <= (source["start_s"] or 0.0)
        yield {
            **{name: source[name] for name in ("motion", "duplicate_of")},
            **{name: value for name, value in scene.scene.items() if name in _COLUMNS and value is not None},
            "start_s": scene.start_s,
            "file_name": _relative(scene.path, output.parent),
            "type": source["kind"],
            "image": _relative(source["image_path"], output.parent) if has_image else None,
            # It shows the same times as the whole source, so the times of a scene apply to it, too.
            "control": source["control_path"] and _relative(source["control_path"], output.parent),
            "text": texts[0] if texts else None,
            "captions": texts[1:] or None,
        }


def _relative(path: str, folder: Path) -> str:
    """A path relative to the table's folder if it is below it, so that both can be moved together."""
    return os.path.relpath(path, folder) if path.startswith(f"{folder}{os.sep}") else path


def _name(output: Path, scene: PreparedScene) -> str:
    name = display_name(_relative(scene.path, output.parent))
    return name if scene.start_s is None else f"{name} at {scene.start_s:.3f} s"
