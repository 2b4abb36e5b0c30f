"""Captions in a file of their own: `a.txt`, `a.mp4.txt`, `a.TXT`, `a.caption` or `a.json` for the clip `a.mp4`."""

import json
import os
from collections.abc import Iterable, Mapping

from cogds.data.layouts.cells import BadRowError, captions_in
from cogds.data.layouts.columns import Columns
from cogds.data.layouts.entry import Entry
from cogds.data.storage.access import read_bytes

CAPTION_SUFFIXES = (".txt", ".caption", ".json")


class CaptionNames:
    """The caption files in a folder."""

    def __init__(self, folder: str, names: Iterable[str]) -> None:
        """names: of all files in the folder."""
        self._folder = folder
        self._names: dict[str, str] = {}
        for name in sorted(names):  # small letters come last, so a.txt is preferred to a.TXT
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in CAPTION_SUFFIXES:
                self._names[stem + suffix.lower()] = name

    def find(self, clip: str) -> str | None:
        """Location of the caption file of a clip's name; None if there is none."""
        stems = (clip, os.path.splitext(clip)[0])
        for suffix in CAPTION_SUFFIXES:
            for stem in stems:
                if name := self._names.get(stem + suffix):
                    return f"{self._folder.rstrip('/')}/{name}"
        return None

    def has_own(self, clip: str) -> bool:
        """Whether there is a caption file for this suffix of a clip alone: `a.jpg.txt`."""
        return any(clip + suffix in self._names for suffix in CAPTION_SUFFIXES)


def captioned_entry(path: str, kind: str, caption_file: str | None, columns: Mapping[str, str | None]) -> Entry:
    """The entry of a clip in a folder, with the captions in its caption file.

    columns: our column names -> the keys in a `.json` file, as for tables.
    """
    if caption_file is None:
        return Entry(path, None, kind)
    name = os.path.basename(caption_file)
    try:
        caption, *more = captions_of(read_bytes(caption_file), name, columns)
    except FileNotFoundError:
        return Entry(path, None, kind)
    except OSError as error:
        return Entry(path, None, kind, None, f"caption file {name} cannot be read: {error.strerror or error}")
    except UnicodeDecodeError as error:
        return Entry(path, None, kind, None, f"caption file {name} is not UTF-8: {error}")
    except ValueError as error:
        return Entry(path, None, kind, None, f"caption file {name}: {error}")
    return Entry(path, caption, kind, more_captions=tuple(text for text in more if text))


def captions_of(content: bytes, name: str, columns: Mapping[str, str | None]) -> list[str | None]:
    """The captions in the content of a caption file: [None] for a .json file without one. Raises ValueError.

    columns: our column names -> the keys in a .json file; usual names if the file has no such key.
    """
    text = content.decode("utf-8-sig")
    if not name.lower().endswith(".json"):
        return [text.strip()]
    try:
        row = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(row, dict):  # about something else
        return [None]
    given = {ours: theirs for ours, theirs in columns.items() if theirs in row}
    mapping = Columns(given, None, need_captions=False).match(row)
    try:
        return captions_in(*(row.get(mapping.get(ours, "")) for ours in ("caption", "captions")))
    except BadRowError as error:
        raise ValueError(str(error)) from None
