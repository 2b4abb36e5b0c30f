"""Every dataset layout -> one list of clips.

`read_entries` reads lists and folders and decides nothing about the files themselves; `data.probe` opens them.
"""

import csv
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogds.data.video import VideoInfo
from cogds.errors import UserError

VIDEO_SUFFIXES = frozenset({".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v"})
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})

_LAYOUTS = (
    "a folder of clips with same-named .txt captions; videos.txt + prompts.txt (+ images.txt); "
    "metadata.jsonl or metadata.csv with file_name and text; a .json list of {file_path, text, type}"
)


@dataclass(frozen=True)
class Entry:
    """One line of a dataset: absolute paths; caption None where it is missing.

    kind: "video" or "image" (a clip of one frame); image_path: a given conditioning image, else the first frame
    conditions. caption_error: why the caption could not be read, if so.
    """

    path: str
    caption: str | None
    kind: str
    image_path: str | None = None
    caption_error: str | None = None


@dataclass(frozen=True)
class Clip:
    """A usable entry with what its file holds (see `video.VideoInfo`)."""

    path: str
    caption: str
    kind: str
    image_path: str | None
    num_frames: int
    fps: float
    width: int
    height: int
    duration_s: float

    @property
    def info(self) -> VideoInfo:
        """What the file holds."""
        return VideoInfo(self.num_frames, self.fps, self.width, self.height, self.duration_s)


@dataclass(frozen=True)
class Rejected:
    """An unusable entry; reason is one sentence."""

    path: str
    reason: str


def read_entries(data_path: str | Path) -> list[Entry]:
    """The lines of a dataset, in the order of its list file, or sorted by path for a folder of clips.

    data_path: a folder, or a list file in it (.json, .jsonl, .csv, videos.txt). Relative paths are relative to the
    folder that holds the list. Raises UserError where the path, the layout or a list file is wrong.
    """
    path = Path(os.path.abspath(os.path.expanduser(data_path)))
    if not path.exists():
        raise UserError(f"data.path {path} does not exist: check the spelling, or the mount")
    if path.is_file():
        return _read_list(path)
    lists = [path / name for name in ("metadata.jsonl", "metadata.csv", "videos.txt") if (path / name).is_file()]
    jsons = [file for file in sorted(path.glob("*.json")) if file.is_file()]
    if len(lists) + len(jsons) > 1:
        names = ", ".join(file.name for file in lists + jsons)
        raise UserError(f"{path} holds several lists of clips ({names}): point data.path at the one to use")
    if lists or jsons:
        return _read_list((lists + jsons)[0])
    return _read_folder(path)


def _read_list(path: Path) -> list[Entry]:
    readers: dict[str, Callable[[Path], list[Entry]]] = {
        ".json": _read_json,
        ".jsonl": _read_jsonl,
        ".csv": _read_csv,
        ".txt": _read_lines,
    }
    if path.suffix.lower() not in readers:
        raise UserError(f"data.path {path} is no list of clips: give a folder or one of {', '.join(readers)}")
    entries = readers[path.suffix.lower()](path)
    if not entries:
        raise UserError(f"{path} lists no clips: fill it, or point data.path at another list")
    return entries


def _read_folder(folder: Path) -> list[Entry]:
    found, seen = [], set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(real)
        for name in names:
            if Path(name).suffix.lower() in VIDEO_SUFFIXES | IMAGE_SUFFIXES and not name.startswith("."):
                found.append(os.path.join(parent, name))
    found.sort()
    if not found:
        raise UserError(f"{folder} holds no clips: expected {_LAYOUTS}")
    entries = []
    for file in found:
        caption, problem = None, None
        caption_path = Path(file).with_suffix(".txt")
        try:
            caption = _clean(caption_path.read_text(encoding="utf-8-sig"))
        except FileNotFoundError:
            pass
        except (OSError, UnicodeDecodeError) as error:
            problem = f"caption file {caption_path.name} cannot be read as UTF-8: {error}"
        entries.append(Entry(file, caption, _kind(file), None, problem))
    return entries


def _read_lines(path: Path) -> list[Entry]:
    """videos.txt with prompts.txt (or prompt.txt), and images.txt if there is one: line by line."""
    folder = path.parent
    captions = [folder / name for name in ("prompts.txt", "prompt.txt") if (folder / name).is_file()]
    if path.name in ("prompts.txt", "prompt.txt", "images.txt"):
        raise UserError(f"data.path {path} is not the list of clips: point it at {folder / 'videos.txt'}")
    if len(captions) != 1:
        problem = "holds both prompts.txt and prompt.txt: keep one" if captions else "lacks prompts.txt: add it"
        raise UserError(f"{folder} holds {path.name} and {problem}, one caption a line")
    columns = {path: _lines(path), captions[0]: _lines(captions[0])}
    images_path = folder / "images.txt"
    if images_path.is_file():
        columns[images_path] = _lines(images_path)
    if len({len(lines) for lines in columns.values()}) > 1:
        counts = ", ".join(f"{file.name} has {len(lines)}" for file, lines in columns.items())
        raise UserError(f"the lists in {folder} differ in length: {counts} lines; line N of each is clip N")
    for file in (path, images_path):
        for number, line in enumerate(columns.get(file, []), 1):
            if not line.strip():
                raise UserError(f"{file}:{number} is empty: remove the line here and in the other lists")
    images = columns.get(images_path, [None] * len(columns[path]))
    return [
        _entry(folder, name.strip(), caption, None, image, f"{path}:{number}")
        for number, (name, caption, image) in enumerate(zip(columns[path], columns[captions[0]], images), 1)
    ]


def _read_json(path: Path) -> list[Entry]:
    try:
        rows = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno} is not valid JSON: {error.msg} (column {error.colno})") from None
    if not isinstance(rows, list):
        raise UserError(f'{path} holds a {type(rows).__name__}, not a list: write [{{"file_path", "text"}}, ...]')
    return [_row_entry(path, row, f"{path} row {number}", "file_path") for number, row in enumerate(rows, 1)]


def _read_jsonl(path: Path) -> list[Entry]:
    entries = []
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number} is not valid JSON: {error.msg} (column {error.colno})") from None
        entries.append(_row_entry(path, row, f"{path}:{number}", "file_name"))
    return entries


def _read_csv(path: Path) -> list[Entry]:
    text = _text(path)
    try:
        reader = csv.DictReader(text.splitlines(keepends=True), strict=True)
        return [
            # A short row gives None for the columns that it lacks: they are missing, not empty.
            _row_entry(path, {k: v for k, v in row.items() if v is not None}, f"{path}:{reader.line_num}", "file_name")
            for row in reader
        ]
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num} is not valid CSV: {error}") from None


def _row_entry(path: Path, row: Any, where: str, name_key: str) -> Entry:
    if not isinstance(row, dict):
        raise UserError(f"{where} is a {type(row).__name__}, not an object with {name_key} and text")
    for key in (name_key, "text"):
        if key not in row:
            raise UserError(f"{where} lacks '{key}': its keys are {', '.join(map(str, row)) or 'none'}")
    name, caption = row[name_key], row["text"]
    if not isinstance(name, str) or not name.strip():
        raise UserError(f"{where}: '{name_key}' is {name!r}, not a path")
    if not isinstance(caption, str | None):
        raise UserError(f"{where}: 'text' is {caption!r}, not a text")
    return _entry(path.parent, name, caption, row.get("type"), None, where)


def _entry(folder: Path, name: str, caption: str | None, kind: Any, image: str | None, where: str) -> Entry:
    if kind not in (None, "", "video", "image"):
        raise UserError(f"{where}: type {kind!r} is unknown: write video or image")
    path = os.path.join(folder, name)
    image_path = os.path.join(folder, image.strip()) if image is not None else None
    return Entry(path, _clean(caption), kind or _kind(path), image_path)


def _kind(path: str) -> str:
    return "image" if Path(path).suffix.lower() in IMAGE_SUFFIXES else "video"


def _clean(caption: str | None) -> str | None:
    return (caption or "").strip() or None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error}): save it as UTF-8") from None


def _lines(path: Path) -> list[str]:
    """Lines without their ends; split at line feeds only, for captions may hold any other separator."""
    lines = _text(path).split("\n")
    # Blank lines at the end of a file are no clips.
    while lines and not lines[-1].strip():
        lines.pop()
    return [line.removesuffix("\r") for line in lines]
