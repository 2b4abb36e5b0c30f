"""Every dataset layout -> a stream of entries.

`iter_entries` reads lists and folders and decides nothing about the clips themselves; `data.probe` opens them. What a
list says of itself wrongly (a line that is no JSON, a column that is not there) stops it; what is wrong with one clip
is for the manifest to tell.
"""

import csv
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from cogds.errors import UserError, did_you_mean

VIDEO_SUFFIXES = frozenset({".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v"})
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})
_IMAGE_ENDS = tuple(IMAGE_SUFFIXES)
# In the metadata of a Parquet file that the project wrote itself: it is no list of clips.
MANIFEST_MARK = b"cogds.manifest"

_LAYOUTS = (
    "a folder of clips with same-named .txt captions; videos.txt + prompts.txt (+ images.txt); "
    "metadata.jsonl or metadata.csv with file_name and text; a .json list of {file_path, text, type}; "
    "or Parquet files with a row for each clip"
)
# Ours -> what a table may call it where data.columns does not say, first come first served.
_COLUMN_NAMES: dict[str, tuple[str, ...]] = {
    "path": ("file_name", "file_path", "path"),
    "caption": ("text", "caption"),
    "kind": ("type", "kind"),
    "image": ("image",),
    "start_s": ("start_s",),
    "end_s": ("end_s",),
}
_LIST_NAMES = ("metadata.jsonl", "metadata.csv", "videos.txt")
_CAPTIONS_AT_ONCE = 1024
_CAPTION_THREADS = 16  # a shared file system answers many small reads at once, but none of them soon


class Entry(NamedTuple):
    """One line of a dataset: absolute paths; caption None where there is none, "" where it is there but blank.

    kind: "video" or "image" (a clip of one frame); image_path: a given conditioning image, else the first frame
    conditions. caption_error: why the caption could not be read, if so. start_s, end_s: the part of the file that is
    the clip, in seconds after its first frame; None: from its beginning, to its end.
    """

    path: str
    caption: str | None
    kind: str
    image_path: str | None = None
    caption_error: str | None = None
    start_s: float | None = None
    end_s: float | None = None


def iter_entries(
    data_path: str | Path, columns: Mapping[str, str] | None = None, need_captions: bool = True
) -> Iterator[Entry]:
    """The lines of a dataset, in the order of its list, or by path for a folder of clips. Holds few of them at a time.

    data_path: a folder, or a list (.json, .jsonl, .csv, .parquet, videos.txt). A folder's own list is used if it holds
    one; of Parquet files it may hold several, which are read one after the other. A file that shares its name with a
    clip beside it (a.json, a.mp4) belongs to that clip and is no list. Relative paths are relative to the folder that
    holds the list. columns: ours (path, caption, kind, image, start_s, end_s) -> a table's own; without it
    `file_name`, `file_path` or `path`; `text` or `caption`; `type` or `kind`; else our names. need_captions: a table
    without captions is a mistake. Raises UserError where the path, the layout or a list is wrong.
    """
    path, columns = Path(os.path.abspath(os.path.expanduser(data_path))), dict(columns or {})
    if not path.exists():
        raise UserError(f"data.path {path} does not exist: check the spelling, or the mount")
    lists = _lists_in(path) if path.is_dir() else [path]
    if len(lists) > 1 and not all(file.suffix.lower() == ".parquet" for file in lists):
        names = ", ".join(file.name for file in lists)
        raise UserError(f"{path} holds several lists of clips ({names}): point data.path at the one to use")
    if lists:
        yield from _read_lists(lists, columns, need_captions)
    else:
        yield from _read_folder(path)


def _lists_in(folder: Path) -> list[Path]:
    """The files of a folder that list clips."""
    with os.scandir(folder) as scan:
        names = sorted(one.name for one in scan if not one.name.startswith("."))
    stems = {os.path.splitext(name)[0] for name in names if _is_clip(name)}
    files = [folder / name for name in names if os.path.splitext(name)[0] not in stems]
    named = [folder / name for name in _LIST_NAMES if folder / name in files and (folder / name).is_file()]
    # A .json that holds no list describes something else, for example the dataset.
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
        return False  # its reader says what is wrong with it


def _read_lists(paths: Sequence[Path], columns: dict[str, str], need_captions: bool) -> Iterator[Entry]:
    readers: dict[str, Callable[[Path, dict[str, str], bool], Iterator[Entry]]] = {
        ".json": _read_json,
        ".jsonl": _read_jsonl,
        ".csv": _read_csv,
        ".parquet": _read_parquet,
        ".txt": _read_lines,
    }
    num_entries = 0
    for path in paths:
        if path.suffix.lower() not in readers:
            raise UserError(f"data.path {path} is no list of clips: give a folder or one of {', '.join(readers)}")
        for entry in readers[path.suffix.lower()](path, columns, need_captions):
            num_entries += 1
            yield entry
    if not num_entries:
        where = ", ".join(map(str, paths[:3]))
        raise UserError(f"{where} lists no clips: fill it, or point data.path at another list")


# ------------------------------------------------------------------------------------------------ a folder of clips


def _read_folder(folder: Path) -> Iterator[Entry]:
    files = _walk(str(folder), set())
    num_entries = 0
    with ThreadPoolExecutor(_CAPTION_THREADS) as threads:
        while chunk := list(itertools.islice(files, _CAPTIONS_AT_ONCE)):
            num_entries += len(chunk)
            yield from threads.map(_folder_entry, chunk)
    if not num_entries:
        dicts = sorted(file.name for file in folder.glob("*.json") if _first_character(file) == "{")
        if dicts:
            raise UserError(
                f'{folder / dicts[0]} holds a dict, not a list: write [{{"file_path", "text"}}, ...]; and {folder} '
                "holds no clips"
            )
        raise UserError(f"{folder} holds no clips: expected {_LAYOUTS}")


def _walk(folder: str, seen: set[str]) -> Iterator[str]:
    """Paths of the clips below a folder in the order of their text, a folder's names held at a time."""
    real = os.path.realpath(folder)
    if real in seen:  # a link that leads back
        return
    seen.add(real)
    try:
        with os.scandir(folder) as scan:
            # As text, a folder's files are sorted by its name and a slash.
            names = sorted(one.name + "/" if one.is_dir() else one.name for one in scan)
    except OSError as error:
        raise UserError(f"folder {folder} cannot be read ({error.strerror}): give access, or leave it out") from None
    for name in names:
        plain = name.rstrip("/")
        if _is_clip(plain):
            yield os.path.join(folder, plain)  # a folder with a clip's name too: it is told as unusable
        elif name.endswith("/"):
            yield from _walk(os.path.join(folder, plain), seen)


def _folder_entry(file: str) -> Entry:
    caption, problem = None, None
    caption_path = os.path.splitext(file)[0] + ".txt"
    try:
        with open(caption_path, encoding="utf-8-sig") as opened:
            caption = opened.read().strip()
    except FileNotFoundError:
        pass
    except (OSError, UnicodeDecodeError) as error:
        problem = f"caption file {os.path.basename(caption_path)} cannot be read as UTF-8: {error}"
    return Entry(file, caption, _kind(file), None, problem)


def _is_clip(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES | IMAGE_SUFFIXES and not name.startswith(".")


# ---------------------------------------------------------------------------------------------------- lists of lines


def _read_lines(path: Path, _columns: dict[str, str], _need_captions: bool) -> Iterator[Entry]:
    """videos.txt with prompts.txt (or prompt.txt), and images.txt if there is one: line by line."""
    folder = path.parent
    captions = [folder / name for name in ("prompts.txt", "prompt.txt") if (folder / name).is_file()]
    if path.name in ("prompts.txt", "prompt.txt", "images.txt"):
        raise UserError(f"data.path {path} is not the list of clips: point it at {folder / 'videos.txt'}")
    if len(captions) != 1:
        problem = "holds both prompts.txt and prompt.txt: keep one" if captions else "lacks prompts.txt: add it"
        raise UserError(f"{folder} holds {path.name} and {problem}, one caption a line")
    images_path = folder / "images.txt"
    files = [path, captions[0], *([images_path] if images_path.is_file() else [])]
    counts = {file: sum(1 for _ in _lines(file)) for file in files}
    if len(set(counts.values())) > 1:
        texts = ", ".join(f"{file.name} has {count}" for file, count in counts.items())
        raise UserError(f"the lists in {folder} differ in length: {texts} lines; line N of each is clip N")
    prefix = _prefix(path)
    for number, (name, caption, *image) in enumerate(zip(*map(_lines, files)), 1):
        for file, line in ((path, name), *((images_path, one) for one in image)):
            if not line.strip():
                raise UserError(f"{file}:{number} is empty: remove the line here and in the other lists")
        yield _entry(prefix, name.strip(), caption, None, image[0] if image else None, None, None)


def _lines(path: Path) -> Iterator[str]:
    """Lines without their ends; split at line feeds only, for captions may hold any other separator."""
    num_blank = 0
    with _opened(path, "\n") as file:
        for line in file:
            text = line.removesuffix("\n").removesuffix("\r")
            if not text.strip():
                num_blank += 1  # blank lines at the end of a file are no clips
                continue
            yield from [""] * num_blank
            num_blank = 0
            yield text


# ------------------------------------------------------------------------------------------------------------ tables


def _read_json(path: Path, columns: dict[str, str], need_captions: bool) -> Iterator[Entry]:
    with _opened(path, None) as file:
        try:
            rows = json.load(file)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{error.lineno} is not valid JSON: {error.msg} (column {error.colno})") from None
    if not isinstance(rows, list):
        raise UserError(f'{path} holds a {type(rows).__name__}, not a list: write [{{"file_path", "text"}}, ...]')
    prefix, number = _prefix(path), 0
    try:
        for row in rows:
            number += 1
            yield _row_entry(prefix, row, columns, need_captions, "file_path")
    except _BadRowError as error:
        raise UserError(f"{path} row {number}{error}") from None


def _read_jsonl(path: Path, columns: dict[str, str], need_captions: bool) -> Iterator[Entry]:
    prefix, number = _prefix(path), 0
    with _opened(path, "\n") as file:
        try:
            for line in file:
                number += 1
                if line.strip():
                    yield _row_entry(prefix, json.loads(line), columns, need_captions, "file_name")
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number} is not valid JSON: {error.msg} (column {error.colno})") from None
        except _BadRowError as error:
            raise UserError(f"{path}:{number}{error}") from None


def _read_csv(path: Path, columns: dict[str, str], need_captions: bool) -> Iterator[Entry]:
    prefix = _prefix(path)
    with _opened(path, "") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                if None in row:
                    raise _BadRowError(" has more cells than the first line: put quotes around text with commas")
                # A short row gives None for the columns that it lacks: they are missing, not empty.
                there = {name: value for name, value in row.items() if value is not None}
                yield _row_entry(prefix, there, columns, need_captions, "file_name")
        except csv.Error as error:
            raise UserError(f"{path}:{reader.line_num} is not valid CSV: {error}") from None
        except _BadRowError as error:
            raise UserError(f"{path}:{reader.line_num}{error}") from None


def _read_parquet(path: Path, columns: dict[str, str], need_captions: bool) -> Iterator[Entry]:
    prefix, number = _prefix(path), 0
    try:
        with pq.ParquetFile(path) as table:
            schema = table.schema_arrow
            found = _find_columns(schema.names, columns, need_captions, "file_name")
            for ours, theirs in found.items():
                _check_type(schema.field(theirs).type, ours, theirs)
            for batch in table.iter_batches(8192, columns=list(found.values())):
                lists = [
                    batch.column(found[ours]).to_pylist() if ours in found else itertools.repeat(None)
                    for ours in _COLUMN_NAMES
                ]
                for values in zip(range(len(batch)), *lists):
                    number += 1
                    yield _entry(prefix, *values[1:])
    except _BadRowError as error:
        raise UserError(f"{path}{f' row {number}' if number else ''}{error}") from None
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read as Parquet ({str(error).splitlines()[0]}): write it anew") from None


class _BadRowError(Exception):
    """What is wrong with a row, as it goes on after the row's place. The reader knows that; each row need not."""


def _check_type(kind: pa.DataType, ours: str, theirs: str) -> None:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if ours in ("start_s", "end_s"):
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind)):
            raise _BadRowError(f": column '{theirs}' holds {kind}, not numbers of seconds")
    elif not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)):
        raise _BadRowError(f": column '{theirs}' holds {kind}, not texts")


def _find_columns(
    there: Iterable[Any], columns: Mapping[str, str], need_captions: bool, name_key: str
) -> dict[str, str]:
    """Ours -> a table's column, for those that it has. Raises _BadRowError where it lacks one that is needed."""
    names = list(there)
    keys = f"its keys are {', '.join(map(str, names)) or 'none'}"
    found = {}
    for ours, usual in _COLUMN_NAMES.items():
        if ours in columns:
            if columns[ours] not in names:
                hint = did_you_mean(columns[ours], map(str, names))
                raise _BadRowError(f" lacks '{columns[ours]}', which data.columns names for {ours}{hint}: {keys}")
            found[ours] = columns[ours]
        elif theirs := next((one for one in usual if one in names), None):
            found[ours] = theirs
        elif ours == "path" or (ours == "caption" and need_captions):
            lacking = name_key if ours == "path" else usual[0]
            raise _BadRowError(f" lacks '{lacking}': {keys}; rename one, or set data.columns={{{ours}: ...}}")
    return found


def _row_entry(prefix: str, row: Any, columns: dict[str, str], need_captions: bool, name_key: str) -> Entry:
    if not isinstance(row, dict):
        raise _BadRowError(f" is a {type(row).__name__}, not an object with {name_key} and text")
    found = _find_columns(row, columns, need_captions, name_key)
    return _entry(prefix, *(row[found[ours]] if ours in found else None for ours in _COLUMN_NAMES))


def _prefix(path: Path) -> str:
    """What stands before a relative path of a list."""
    return os.path.join(path.parent, "")


def _entry(prefix: str, path: Any, caption: Any, kind: Any, image: Any, start: Any, end: Any) -> Entry:
    """One row, checked. Raises _BadRowError."""
    if not isinstance(path, str) or not path.strip():
        raise _BadRowError(f": the path is {path!r}, not a path")
    if not isinstance(caption, str | None):
        raise _BadRowError(f": the caption is {caption!r}, not a text")
    if kind not in (None, "", "video", "image"):
        raise _BadRowError(f": type {kind!r} is unknown: write video or image")
    if not isinstance(image, str | None):
        raise _BadRowError(f": the image is {image!r}, not a path")
    start_s = None if start is None else _seconds(start, "start_s")
    end_s = None if end is None else _seconds(end, "end_s")
    if start_s is not None and end_s is not None and start_s >= end_s:
        raise _BadRowError(f": the clip ends at {end_s:g} s, before or when it starts at {start_s:g} s")
    return Entry(
        path if path.startswith("/") else prefix + path,
        caption if caption is None else caption.strip(),
        kind or _kind(path),
        os.path.join(prefix, image.strip()) if image and image.strip() else None,
        None,
        start_s,
        end_s,
    )


def _seconds(value: Any, name: str) -> float | None:
    """A cell's seconds, None where it is empty."""
    if isinstance(value, str) and not value.strip():
        return None
    try:
        seconds = math.inf if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        seconds = math.inf
    if math.isnan(seconds):  # what a table of numbers holds where there is none
        return None
    if not 0 <= seconds < math.inf:
        raise _BadRowError(f": {name} is {value!r}, not a number of seconds from 0 on")
    return seconds


def _kind(path: str) -> str:
    return "image" if path[-5:].lower().endswith(_IMAGE_ENDS) else "video"


@contextmanager
def _opened(path: Path, newline: str | None) -> Iterator[TextIO]:
    """An open text file; what it holds that is not UTF-8 is the user's to mend."""
    try:
        with open(path, encoding="utf-8-sig", newline=newline) as file:
            yield file
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error}): save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give access to it") from None
