"""The state of a preparation: a folder beside the table with the sources and what is known about them so far.

A rank writes its results as small complete files, so that a killed run loses little, and later runs use the results of
all runs. They are kept after the table is written: another caption model does not cut the sources again. One run at a
time uses the folder (`run_lock`).
"""

import json
import re
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cogds.data.layouts.entry import ENTRY_COLUMNS
from cogds.errors import UserError
from cogds.files import is_abandoned, is_temporary, process_tag, whole_file

# The sources, one row each. file_key: of the file as it is now. key: of the source and of how it is cut. reason: why
# the file cannot be opened. rank: which one prepares the source in this run, or -1 if its result is known.
SOURCE_SCHEMA = pa.schema(
    [
        *ENTRY_COLUMNS,
        ("size", pa.int64()),
        ("file_key", pa.binary(16)),
        ("key", pa.binary(16)),
        ("reason", pa.string()),
        ("rank", pa.int32()),
    ]
)
_SCENE = pa.struct(
    [
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("fps", pa.float64()),
        ("motion", pa.float64()),
        ("sharpness", pa.float64()),
        ("text_share", pa.float64()),
        ("hashes", pa.binary()),
    ]
)
# What a source holds (`scene.SourceResult`).
SCENES = pa.schema(
    [
        ("key", pa.binary(16)),
        ("scenes", pa.list_(_SCENE)),
        ("num_short", pa.int32()),
        ("duration_s", pa.float64()),
        ("reason", pa.string()),
    ],
    metadata={"kind": "scenes"},
)
# A caption. key: of the scene and of how it is captioned.
CAPTIONS = pa.schema([("key", pa.binary(16)), ("caption", pa.string())], metadata={"kind": "captions"})

# The scenes to caption. times_s: of the frames to send. rank: which one asks for the caption.
TASK_SCHEMA = pa.schema(
    [("key", pa.binary(16)), ("path", pa.string()), ("times_s", pa.list_(pa.float64())), ("rank", pa.int32())]
)

# Results are written after this time, and later less often, so that a kill loses at most 1% of a run's time.
MIN_FLUSH_S, FLUSH_SHARE = 2.0, 0.01


@dataclass(frozen=True)
class WorkFolder:
    """The folder of a table's state."""

    path: Path

    @property
    def sources(self) -> Path:
        return self.path / "sources.arrow"

    @property
    def extras(self) -> Path:
        """The other columns of the dataset's table, one row for each source."""
        return self.path / "extras.arrow"

    @property
    def tasks(self) -> Path:
        return self.path / "tasks.arrow"

    @property
    def unusable(self) -> Path:
        return self.path / "unusable.jsonl"

    def remove_temporary(self) -> None:
        """Remove what killed processes left."""
        for file in self.path.iterdir():
            if is_temporary(file) and is_abandoned(file):
                file.unlink(missing_ok=True)

    def result_files(self, schema: pa.Schema) -> list[Path]:
        """The files of results of one kind, in the order in which they were written."""
        return sorted(file for file in self.path.glob(f"{_kind(schema)}-*.arrow") if not is_temporary(file))

    def read_results(self, schema: pa.Schema) -> dict[bytes, dict[str, Any]]:
        """The results of all runs by key."""
        results: dict[bytes, dict[str, Any]] = {}
        for file in self.result_files(schema):
            table = read_table(file)
            if table is not None and table.schema.equals(schema):  # else of another version
                results |= {row["key"]: row for row in table.to_pylist()}
        return results

    def known_keys(self, schema: pa.Schema) -> set[bytes]:
        """The keys of the results of all runs."""
        tables = map(read_table, self.result_files(schema))
        return {
            key for table in tables if table and table.schema.equals(schema) for key in table.column("key").to_pylist()
        }

    def merge_results(self, schema: pa.Schema) -> None:
        """Join the files of results of one kind, so that their number stays small."""
        files = self.result_files(schema)
        if len(files) > 1:
            merged = self._new_file(schema, 0)
            write_table(merged, schema, list(self.read_results(schema).values()))
            for file in files:
                file.unlink(missing_ok=True)

    def _new_file(self, schema: pa.Schema, rank: int) -> Path:
        unique = f"{time.time_ns():020d}-{rank:05d}-{process_tag()}-{uuid.uuid4().hex[:4]}"
        return self.path / f"{_kind(schema)}-{unique}.arrow"


def _kind(schema: pa.Schema) -> str:
    return schema.metadata[b"kind"].decode()


def write_table(file: Path, schema: pa.Schema, rows: list[dict[str, Any]] | pa.Table) -> None:
    """Write a table of the work folder. Raises UserError if it cannot be written."""
    table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows, schema)
    try:
        with whole_file(file) as partial, pa.ipc.new_file(str(partial), schema) as writer:
            writer.write_table(table)
    except OSError as error:
        reason = error.strerror or str(error).splitlines()[0]
        raise UserError(
            f"--output: cannot write {file} ({reason}). Free some space there, or choose another folder."
        ) from None


def write_extras(folder: WorkFolder, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the other columns of the sources. Values that do not fit into one column type become text."""
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: _column([row.get(name) for row in rows]) for name in names}
    table = pa.table(columns) if columns else pa.table({"": pa.nulls(len(rows))}).select([])
    write_table(folder.extras, table.schema, table)


def _column(values: list[Any]) -> pa.Array:
    if all(isinstance(value, str | None) for value in values) and any(values):
        numbers = [_number(value) for value in values]
        if all((number is None) == (not value) for number, value in zip(numbers, values)):
            return pa.array(numbers)  # of a CSV file, whose cells are all texts
    try:
        return pa.array(values)
    except (pa.ArrowException, UnicodeEncodeError):
        return pa.array([None if value is None else json.dumps(value, default=str) for value in values])


def _number(text: str | None) -> float | int | None:
    """The number that a text is; None for other texts, also for 007, which may be a name."""
    if text is None or not re.fullmatch(r"-?(0|[1-9]\d{0,14})(\.\d+)?([eE][+-]?\d{1,2})?", text):
        return None
    return int(text) if re.fullmatch(r"-?\d+", text) else float(text)


def read_table(file: Path) -> pa.Table | None:
    """Read a table of the work folder; None if another run has just merged it into another file."""
    try:
        with pa.OSFile(str(file)) as opened:
            return pa.ipc.open_file(opened).read_all()
    except FileNotFoundError:
        return None


def read_share(file: Path, rank: int) -> list[dict[str, Any]]:
    """The rows of a table of the work folder that are of one rank."""
    table = read_table(file)
    assert table is not None
    return table.filter(pc.equal(table.column("rank"), rank)).to_pylist()


class ResultWriter:
    """Writes a rank's results of one kind: complete files with the rows since the last one."""

    def __init__(self, folder: WorkFolder, schema: pa.Schema, rank: int) -> None:
        self._folder, self._schema, self._rank = folder, schema, rank
        self._rows: list[dict[str, Any]] = []
        self._started_s = self._flushed_s = time.monotonic()

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Add rows; columns that they lack are null."""
        self._rows += rows
        now_s = time.monotonic()
        if now_s - self._flushed_s >= max(MIN_FLUSH_S, FLUSH_SHARE * (now_s - self._started_s)):
            self.flush()

    def flush(self) -> None:
        """Write the rows added since the last flush."""
        if self._rows:
            write_table(self._folder._new_file(self._schema, self._rank), self._schema, self._rows)
        self._rows, self._flushed_s = [], time.monotonic()

    def __enter__(self) -> "ResultWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.flush()  # after an error or Ctrl-C, too
