"""Readers of all dataset layouts, which yield one entry per clip.

`iter_entries` reads lists and folders, but no clips: `scan` opens those. An error in a list, such as invalid JSON or a
missing column, raises UserError. An error in a clip is recorded in the manifest.
"""

import csv
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from cogds.errors import UserError, did_you_mean

VIDEO_SUFFIXES = frozenset({".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v"})
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})
_IMAGE_ENDS = tuple(IMAGE_SUFFIXES)
# In the metadata of Parquet files that are manifests of cogds, not lists of clips.
MANIFEST_MARK = b"cogds.manifest"

_LAYOUTS = (
    "a folder of clips with same-named .txt captions; videos.txt + prompts.txt (+ images.txt); "
    "metadata.jsonl or metadata.csv with file_name and text; a .json list of {file_path, text, type}; "
    "or Parquet files with a row for each clip"
)
# Our column names -> names that a table may use, in order of preference, if data.columns does not give one.
_COLUMN_NAMES: dict[str, tuple[str, ...]] = {
    "path": ("file_name", "file_path", "path"),
    "caption": ("text", "caption"),
    "kind": ("type", "kind"),
    "image": ("image",),
    "start_s": ("start_s",),
    "end_s": ("end_s",),
    "motion": ("motion",),
    "duplicate_of": ("duplicate_of",),
}
# Scores that other tools may write in other forms. Such values are ignored.
_SCORES = ("motion", "duplicate_of")
_LIST_NAMES = ("metadata.jsonl", "metadata.csv", "videos.txt")
_CAPTIONS_PER_BATCH = 1024
_NUM_CAPTION_THREADS = 16  # a network file system is slow, but serves many small reads at once


class Entry(NamedTuple):
    """A clip of a dataset.

    Attributes:
        path: absolute path.
        caption: None if there is none, "" if it is blank.
        kind: "video", or "image" for a clip of one frame.
        image_path: absolute path of the conditioning image; None means the clip's first frame.
        caption_error: why the caption cannot be read.
        start_s, end_s: the clip's range in the file, in seconds after its first frame; None means the beginning and
            the end of the file.
        motion, duplicate_of: scores of `cogds prepare`.
        extras: the other columns of the clip's row in a table, if asked for.
    """

    path: str
    caption: str | None
    kind: str
    image_path: str | None = None
    caption_error: str | None = None
    start_s: float | None = None
    end_s: float | None = None
    motion: float | None = None
    duplicate_of: str | None = None
    extras: Mapping[str, Any] | None = None


def iter_entries(
    data_path: str | Path,
    columns: Mapping[str, str] | None = None,
    need_captions: bool = True,
    keep_extras: bool = False,
) -> Iterator[Entry]:
    """Yield the entries of a dataset, in the order of its list, or sorted by path for a folder of clips.

    Only a few entries are in memory at a time.

    Args:
        data_path: a folder, or a list (.json, .jsonl, .csv, .parquet, videos.txt). If a folder holds a list, that is
            used; it may hold several Parquet files, which are joined. A file with the same name as a clip beside it
            (a.json, a.mp4) belongs to the clip and is not a list. Relative paths are relative to the list's folder.
        columns: our column names (path, caption, kind, image, start_s, end_s) -> the table's. By default `file_name`,
            `file_path` or `path`; `text` or `caption`; `type` or `kind`; and our names for the rest.
        need_captions: whether a table without captions is an error.
        keep_extras: read the other columns of tables too.

    Raises:
        UserError: the path, the layout or a list is wrong.
    """
    path = Path(os.path.abspath(os.path.expanduser(data_path)))
    if not path.exists():
        raise UserError(f"data.path: no such file or folder: {path}. Check the spelling, or the mount.")
    lists = _lists_in(path) if path.is_dir() else [path]
    if len(lists) > 1 and not all(file.suffix.lower() == ".parquet" for file in lists):
        names = ", ".join(file.name for file in lists)
        raise UserError(f"data.path: {path} holds several lists of clips: {names}. Set data.path to the one to use.")
    if lists:
        yield from _read_lists(lists, _Columns(columns or {}, need_captions, keep_extras))
    else:
        yield from _read_folder(path)


def _lists_in(folder: Path) -> list[Path]:
    """The files of a folder that list clips."""
    names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    stems = {os.path.splitext(name)[0] for name in names if _is_clip(name)}
    files = [folder / name for name in names if os.path.splitext(name)[0] not in stems]
    named = [folder / name for name in _LIST_NAMES if folder / name in files and (folder / name).is_file()]
    # A .json that does not hold a list describes something else, such as the dataset.
    jsons = [file for file in files if file.suffix == ".json" and file.is_file() and _first_character(file) != "{"]
    tables = [file for file in files if file.suffix == ".parquet" and file.is_file() and not _is_manifest(file)]
    return named + jsons + tables


def _first_character(file: Path) -> str:
    with file.open("rb") as opened:
        return opened.read(64).decode("utf-8-sig", errors="replace").lstrip()[:1]


def _is_manifest(file: Path) -> bool:
    try:
        return MANIFEST_MARK in (pq.read_schema(file).metadata or {})
    except (OSError, pa.ArrowInvalid):
        return False  # reading it will raise an error that says more


class _BadRowError(Exception):
    """A row is wrong; the message says how. The reader adds the file and the line."""


@dataclass(frozen=True)
class _Columns:
    """The columns to read from a table. given: our column names -> the table's, from data.columns."""

    given: Mapping[str, str]
    need_captions: bool
    keep_extras: bool = False

    def find(self, available: Iterable[Any], path_name: str) -> dict[str, str]:
        """Map our column names to those of a table that has them. Raises _BadRowError if a needed one is missing.

        path_name: usual name of the column of paths in such a table, for the message.
        """
        names = list(available)
        listed = f"the columns are {', '.join(map(str, names)) or 'none'}"
        mapping = {}
        for ours, usual in _COLUMN_NAMES.items():
            if ours in self.given:
                if self.given[ours] not in names:
                    hint = did_you_mean(self.given[ours], map(str, names))
                    raise _BadRowError(
                        f"no column '{self.given[ours]}'{hint}, which data.columns names for {ours}: {listed}. Correct "
                        f"data.columns.{ours}."
                    )
                mapping[ours] = self.given[ours]
            elif theirs := next((name for name in usual if name in names), None):
                mapping[ours] = theirs
            elif ours == "path" or (ours == "caption" and self.need_captions):
                missing = path_name if ours == "path" else usual[0]
                raise _BadRowError(f"no column '{missing}': {listed}. Rename one, or set data.columns={{{ours}: ...}}.")
        return mapping

    def entry(self, folder: Path, row: Any, path_name: str) -> Entry:
        """The entry of a row that names its columns."""
        if not isinstance(row, dict):
            raise _BadRowError(f"a {type(row).__name__}. Write an object with {path_name} and text.")
        names = self.find(row, path_name)
        entry = _entry(folder, {ours: row[theirs] for ours, theirs in names.items()})
        return entry._replace(extras=_extras(row, names)) if self.keep_extras else entry


def _extras(row: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The columns of a row that are none of ours. names: our column names -> the table's."""
    used = set(names.values())
    return {str(name): value for name, value in row.items() if name not in used}


def _read_lists(paths: Sequence[Path], columns: _Columns) -> Iterator[Entry]:
    readers: dict[str, Callable[[Path, _Columns], Iterator[Entry]]] = {
        ".json": _read_json,
        ".jsonl": _read_jsonl,
        ".csv": _read_csv,
        ".parquet": _read_parquet,
        ".txt": _read_lines,
    }
    num_entries = 0
    for path in paths:
        if path.suffix.lower() not in readers:
            raise UserError(
                f"data.path: {path} is not a list of clips. Give a folder, or a file of type {', '.join(readers)}."
            )
        for entry in readers[path.suffix.lower()](path, columns):
            num_entries += 1
            yield entry
    if not num_entries:
        names = ", ".join(map(str, paths[:3]))
        raise UserError(f"data.path: {names} lists no clips. Fill it in, or set data.path to another list.")


# --- a folder of clips


def _read_folder(folder: Path) -> Iterator[Entry]:
    files = _walk(str(folder), set())
    num_entries = 0
    with ThreadPoolExecutor(_NUM_CAPTION_THREADS) as threads:
        while chunk := list(itertools.islice(files, _CAPTIONS_PER_BATCH)):
            num_entries += len(chunk)
            yield from threads.map(_folder_entry, chunk)
    if not num_entries:
        dicts = sorted(file.name for file in folder.glob("*.json") if _first_character(file) == "{")
        if dicts:
            raise UserError(
                f"data.path: {folder} holds no clips, and {dicts[0]} holds an object, not a list. Write "
                '[{"file_path": ..., "text": ...}, ...] into it.'
            )
        raise UserError(f"data.path: {folder} holds no clips. Expected {_LAYOUTS}.")


def _walk(folder: str, seen: set[str]) -> Iterator[str]:
    """Yield the paths of the clips below a folder in sorted order, with the names of one folder in memory per level."""
    real = os.path.realpath(folder)
    if real in seen:  # a link to a parent folder
        return
    seen.add(real)
    try:
        with os.scandir(folder) as items:
            # As in a sorted list of paths, a folder's files are at the place of its name with a slash.
            names = sorted(item.name + "/" if item.is_dir() else item.name for item in items)
    except OSError as error:
        raise UserError(
            f"data.path: cannot read the folder {folder} ({error.strerror}). Allow access to it, or move it away."
        ) from None
    for name in names:
        plain = name.rstrip("/")
        if _is_clip(plain):
            yield os.path.join(folder, plain)  # or a folder with such a name, which the scan reports as unusable
        elif name.endswith("/"):
            yield from _walk(os.path.join(folder, plain), seen)


def _folder_entry(file: str) -> Entry:
    caption, caption_error = None, None
    caption_path = os.path.splitext(file)[0] + ".txt"
    try:
        with open(caption_path, encoding="utf-8-sig") as opened:
            caption = opened.read().strip()
    except FileNotFoundError:
        pass
    except (OSError, UnicodeDecodeError) as error:
        caption_error = f"caption file {os.path.basename(caption_path)} cannot be read as UTF-8: {error}"
    return Entry(file, caption, _kind(file), None, caption_error)


def _is_clip(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES | IMAGE_SUFFIXES and not name.startswith(".")


# --- lists of lines


def _read_lines(path: Path, _columns: _Columns) -> Iterator[Entry]:
    """videos.txt with prompts.txt (or prompt.txt), and images.txt if it exists: one line per clip."""
    folder = path.parent
    captions = [folder / name for name in ("prompts.txt", "prompt.txt") if (folder / name).is_file()]
    if path.name in ("prompts.txt", "prompt.txt", "images.txt"):
        raise UserError(f"data.path: {path} is not the list of clips. Set data.path to {folder / 'videos.txt'}.")
    if len(captions) != 1:
        problem = "both prompts.txt and prompt.txt. Keep one" if captions else "no prompts.txt. Add it"
        raise UserError(f"data.path: {folder} holds {path.name} and {problem}, with one caption per line.")
    images_path = folder / "images.txt"
    files = [path, captions[0], *([images_path] if images_path.is_file() else [])]
    counts = {file: sum(1 for _ in _lines(file)) for file in files}
    if len(set(counts.values())) > 1:
        lengths = ", ".join(f"{file.name} has {count}" for file, count in counts.items())
        raise UserError(
            f"data.path: the lists in {folder} have different numbers of lines: {lengths}. Line N of each must be of "
            "clip N."
        )
    for number, (name, caption, *image) in enumerate(zip(*map(_lines, files)), 1):
        for file, line in ((path, name), *((images_path, line) for line in image)):
            if not line.strip():
                raise UserError(f"{file}:{number}: empty line. Remove it here and in the other lists.")
        yield _entry(folder, {"path": name.strip(), "caption": caption, "image": image[0] if image else None})


def _lines(path: Path) -> Iterator[str]:
    """Yield lines without their ends; split at line feeds only, because captions may hold other separators."""
    num_blank = 0
    with _opened(path, "\n") as file:
        for line in file:
            text = line.removesuffix("\n").removesuffix("\r")
            if not text.strip():
                num_blank += 1  # blank lines at the end of a file are ignored
                continue
            yield from [""] * num_blank
            num_blank = 0
            yield text


# --- tables


def _read_json(path: Path, columns: _Columns) -> Iterator[Entry]:
    with _opened(path, None) as file:
        try:
            rows = json.load(file)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}:{error.lineno}: invalid JSON: {error.msg} (column {error.colno}). Fix it."
            ) from None
    if not isinstance(rows, list):
        raise UserError(
            f'{path}: holds a {type(rows).__name__}, not a list. Write [{{"file_path": ..., "text": ...}}, ...].'
        )
    folder, number = path.parent, 0
    try:
        for row in rows:
            number += 1
            yield columns.entry(folder, row, "file_path")
    except _BadRowError as error:
        raise UserError(f"{path}: row {number}: {error}") from None


def _read_jsonl(path: Path, columns: _Columns) -> Iterator[Entry]:
    folder, number = path.parent, 0
    with _opened(path, "\n") as file:
        try:
            for line in file:
                number += 1
                if line.strip():
                    yield columns.entry(folder, json.loads(line), "file_name")
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: invalid JSON: {error.msg} (column {error.colno}). Fix it.") from None
        except _BadRowError as error:
            raise UserError(f"{path}:{number}: {error}") from None


def _read_csv(path: Path, columns: _Columns) -> Iterator[Entry]:
    folder = path.parent
    with _opened(path, "") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                if None in row:
                    raise _BadRowError("more cells than in the first line. Put text with commas in quotes.")
                # DictReader fills a short row with None: those cells are missing, not empty.
                cells = {name: value for name, value in row.items() if value is not None}
                yield columns.entry(folder, cells, "file_name")
        except csv.Error as error:
            raise UserError(f"{path}:{reader.line_num}: invalid CSV: {error}. Fix it.") from None
        except _BadRowError as error:
            raise UserError(f"{path}:{reader.line_num}: {error}") from None


def _read_parquet(path: Path, columns: _Columns) -> Iterator[Entry]:
    folder, number = path.parent, 0
    try:
        with pq.ParquetFile(path) as table:
            schema = table.schema_arrow
            names = columns.find(schema.names, "file_name")
            for ours, theirs in names.items():
                _check_type(schema.field(theirs).type, ours, theirs)
            for batch in table.iter_batches(8192, columns=None if columns.keep_extras else list(names.values())):
                rows = batch.to_pylist() if columns.keep_extras else itertools.repeat(None)
                for row, *values in zip(rows, *(batch.column(theirs).to_pylist() for theirs in names.values())):
                    number += 1
                    entry = _entry(folder, dict(zip(names, values)))
                    yield entry if row is None else entry._replace(extras=_extras(row, names))
    except _BadRowError as error:
        raise UserError(f"{path}: {f'row {number}: ' if number else ''}{error}") from None
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: cannot be read as Parquet ({reason}). Write it again.") from None


def _check_type(kind: pa.DataType, ours: str, theirs: str) -> None:
    if ours in _SCORES:
        return
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if ours in ("start_s", "end_s"):
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind)):
            raise _BadRowError(f"column '{theirs}' holds {kind}. Write numbers of seconds.")
    elif not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)):
        raise _BadRowError(f"column '{theirs}' holds {kind}. Write strings.")


def _entry(folder: Path, row: Mapping[str, Any]) -> Entry:
    """Check a row, by our column names. Raises _BadRowError. folder: relative paths are relative to it."""
    path, caption, kind, image = (row.get(name) for name in ("path", "caption", "kind", "image"))
    if not isinstance(path, str) or not path.strip():
        raise _BadRowError(f"the path is {path!r}. Write a path.")
    if not isinstance(caption, str | None):
        raise _BadRowError(f"the caption is {caption!r}. Write a string.")
    if kind not in (None, "", "video", "image"):
        raise _BadRowError(f"unknown type {kind!r}. Write video or image.")
    if not isinstance(image, str | None):
        raise _BadRowError(f"the image is {image!r}. Write a path.")
    start_s, end_s = (_seconds(row.get(name), name) for name in ("start_s", "end_s"))
    if start_s is not None and end_s is not None and start_s >= end_s:
        raise _BadRowError(f"the range ends at {end_s:g} s, not after its start at {start_s:g} s. Correct one of them.")
    return Entry(
        path=os.path.join(folder, path),
        caption=caption if caption is None else caption.strip(),
        kind=kind or _kind(path),
        image_path=os.path.join(folder, image.strip()) if image and image.strip() else None,
        start_s=start_s,
        end_s=end_s,
        motion=_score(row.get("motion")),
        duplicate_of=duplicate if isinstance(duplicate := row.get("duplicate_of"), str) and duplicate else None,
    )


def _score(value: Any) -> float | None:
    """The number in a cell, None if there is none."""
    try:
        score = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None
    return score if math.isfinite(score) else None


def _seconds(value: Any, name: str) -> float | None:
    """The seconds in a cell, None if it is empty."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        seconds = math.inf if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        seconds = math.inf
    if math.isnan(seconds):  # a missing value in a table of numbers
        return None
    if not 0 <= seconds < math.inf:
        raise _BadRowError(f"{name} is {value!r}. Write a number of seconds, 0 or more.")
    return seconds


def _kind(path: str) -> str:
    return "image" if path[-5:].lower().endswith(_IMAGE_ENDS) else "video"


@contextmanager
def _opened(path: Path, newline: str | None) -> Iterator[TextIO]:
    """Open a text file. Raises UserError if it cannot be read or is not UTF-8."""
    try:
        with open(path, encoding="utf-8-sig", newline=newline) as file:
            yield file
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error}). Save it as UTF-8.") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Allow access to it.") from None
