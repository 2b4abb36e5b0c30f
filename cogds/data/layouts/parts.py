"""The entries of a dataset, and the parts that its listing can be divided into."""

import itertools
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from cogds.data.layouts.captions import captioned_entry
from cogds.data.layouts.data_set import DataSet
from cogds.data.layouts.entry import Entry
from cogds.data.layouts.folder import ClipFile, Folder, ListFile, TarFile, dataset_folder, search_folder
from cogds.data.layouts.listing import Listing
from cogds.data.layouts.lists import ListReader
from cogds.data.layouts.tars import read_tar
from cogds.data.layouts.unlisted import Unlisted
from cogds.data.storage.access import is_file, is_folder
from cogds.data.storage.location import absolute
from cogds.data.video.kinds import suffix_of
from cogds.errors import UserError
from cogds.formatting import counts

logger = logging.getLogger(__name__)

CLIPS_PER_PART = 1024
_NUM_CAPTION_THREADS = 16  # a network file system is slow, but serves many small reads at once

# A list, a tar file, a folder with its subfolders, or at most CLIPS_PER_PART clips of a folder.
Part = ListFile | TarFile | Folder | tuple[ClipFile, ...]

LAYOUTS = (
    "a folder of clips with same-named .txt captions; videos.txt + prompts.txt (+ images.txt); "
    "metadata.jsonl or metadata.csv with file_name and text; a .json list of {file_path, text, type}; "
    "or Parquet files with a row for each clip"
)


@dataclass(frozen=True)
class DatasetReader:
    """Reads a dataset, whole or part by part. The entries of all parts in order are the entries of the dataset.

    need_captions: whether a table without captions is an error. keep_extras: whether entries have the other columns of
    their rows.
    """

    data_set: DataSet
    need_captions: bool = True
    keep_extras: bool = False

    @cached_property
    def _lists(self) -> ListReader:
        return ListReader(self.data_set, self.need_captions, self.keep_extras)

    def parts(self, listing: Listing) -> Iterator[Part]:
        """Yield the parts of the dataset in order; only the names of one folder are in memory.

        Raises UserError if the dataset does not exist or cannot be read.
        """
        path = absolute(self.data_set.path)
        self._lists  # noqa: B018  # raise errors in the settings first
        try:
            if is_folder(path):
                yield from self.split(dataset_folder(path), listing)
                return
            exists = is_file(path)
        except OSError as error:
            raise UserError(f"data.path: {path}: cannot be read ({error}). Check the address and the access.") from None
        if not exists:
            raise UserError(f"data.path: no such file or folder: {path}. Check the spelling, or the mount.")
        yield TarFile(path) if suffix_of(path) == ".tar" else ListFile(path)

    def split(self, folder: Folder, listing: Listing) -> Iterator[Part]:
        """Yield the parts of a folder in order: its lists, groups of its clips, and its subfolders."""
        found = search_folder(folder, self._lists, listing)
        for is_clip, group in itertools.groupby(found, key=lambda item: isinstance(item, ClipFile)):
            if is_clip:
                while chunk := tuple(itertools.islice(group, CLIPS_PER_PART)):
                    yield chunk  # type: ignore[misc]
            else:
                yield from group  # type: ignore[misc]

    def read(self, part: Part, listing: Listing) -> Iterator[Entry]:
        """Yield the entries of a part, and count them and what is skipped. Raises UserError."""
        for entry in self._entries(part, listing):
            listing.num_entries += 1
            listing.num_captioned += entry.caption is not None
            yield entry

    def _entries(self, part: Part, listing: Listing) -> Iterator[Entry]:
        files: Iterator[ClipFile | ListFile | TarFile]
        if isinstance(part, Folder):
            files = self._files(part, listing)
        else:
            files = iter((part,) if isinstance(part, ListFile | TarFile) else part)
        with ThreadPoolExecutor(_NUM_CAPTION_THREADS) as threads:
            for is_clip, group in itertools.groupby(files, key=lambda file: isinstance(file, ClipFile)):
                if is_clip:  # across folders, which may have few clips each
                    while chunk := list(itertools.islice(group, CLIPS_PER_PART)):
                        yield from threads.map(self._captioned, chunk)
                else:
                    for file in group:
                        if isinstance(file, TarFile):
                            yield from read_tar(file.path, self.data_set.columns, listing)
                        elif isinstance(file, ListFile):
                            yield from self._listed(file, listing)

    def _listed(self, file: ListFile, listing: Listing) -> Iterator[Entry]:
        entries = self._lists.entries(file.path, listing)
        if not file.is_only or self.data_set.where is not None:  # a file may be in another list, or a removed row
            yield from entries
            return
        unlisted = Unlisted(file.path)
        for entry in entries:
            unlisted.see(entry)
            yield entry
        unlisted.count(listing)

    def _files(self, folder: Folder, listing: Listing) -> Iterator[ClipFile | ListFile | TarFile]:
        for item in search_folder(folder, self._lists, listing):
            if isinstance(item, Folder):
                yield from self._files(item, listing)
            else:
                yield item

    def _captioned(self, clip: ClipFile) -> Entry:
        entry = captioned_entry(clip.path, clip.kind, clip.caption_file, self.data_set.columns)
        return entry._replace(control_path=clip.control)

    def check(self, listing: Listing) -> None:
        """Raise UserError if a dataset with these counts, of all parts, is empty or read in the wrong way."""
        path, tables = self.data_set.path, ", ".join(listing.tables)
        advice = (
            "If a table lists the clips, set data.path to it, data.columns to its columns for the path and the caption "
            "if they have unusual names, and data.root to the folder of its paths if it is another one."
        )
        if not listing.num_entries:
            removed = listing.skipped["row removed by data.where"]
            if removed:
                raise UserError(f"data.where: removes all {removed:,} rows of {path}. Relax it.")
            if listing.lists:
                raise UserError(
                    f"data.path: {', '.join(listing.lists[:3])} lists no clips. Fill it in, or set data.path to "
                    "another list."
                )
            skipped = f" It skipped {counts(listing.skipped)}." if listing.skipped else ""
            if tables:
                raise UserError(f"data.path: {path} holds no clips, but tables: {tables}. {advice}")
            raise UserError(f"data.path: {path} holds no clips.{skipped} Expected {LAYOUTS}.")
        if tables and self.need_captions and not listing.num_captioned:
            raise UserError(
                f"data.path: the clips in {path} have no captions, and there are tables: {tables}. {advice}"
            )
        for key, value in (("root", self.data_set.root), ("path_template", self.data_set.path_template)):
            if value is not None and not listing.lists:
                logger.warning(f"data.{key}: {path} holds no list of paths, so {value} is not used")
        if self.data_set.where is not None and not listing.lists:
            raise UserError(f"data.where: {path} holds no table to filter. Remove data.where, or write a table.")


_KINDS: dict[str, Any] = {kind.__name__: kind for kind in (ListFile, TarFile, Folder)}


def part_to_json(part: Part) -> list[Any]:
    """A part as values for JSON, which `part_from_json` reads."""
    kind = type(part).__name__
    return [kind, *part] if kind in _KINDS else ["clips", *part]


def part_from_json(kind: str, *fields: Any) -> Part:
    """The part that `part_to_json` has written."""
    if kind == "clips":
        return tuple(ClipFile(*clip) for clip in fields)
    return _KINDS[kind](*(tuple(value) if isinstance(value, list) else value for value in fields))


def iter_entries(
    data_set: DataSet, need_captions: bool = True, listing: Listing | None = None, keep_extras: bool = False
) -> Iterator[Entry]:
    """Yield the entries of a dataset, in the order of its list, or sorted by path for a folder of clips.

    Only a few entries are in memory at a time. A folder in which a list is found is read by that list.

    Args:
        need_captions: whether a table without captions is an error.
        listing: to fill with counts.
        keep_extras: whether entries have the other columns of their rows.

    Raises:
        UserError: the path, the layout or a list is wrong.
    """
    reader = DatasetReader(data_set, need_captions, keep_extras)
    listing = listing if listing is not None else Listing()
    for part in reader.parts(listing):
        yield from reader.read(part, listing)
    reader.check(listing)
