"""The clips and folders beside a list that it does not name."""

import os

from cogds.data.layouts.entry import Entry
from cogds.data.layouts.folder import is_hidden
from cogds.data.layouts.listing import Listing
from cogds.data.storage.access import Item, list_folder
from cogds.data.storage.location import is_url, parent
from cogds.data.video.kinds import kind_of

UNLISTED_CLIP, UNLISTED_FOLDER = "clip that its list does not name", "folder that its list does not name"
MAX_NAMES = 200_000  # in the folders of a larger list, nothing is counted


class Unlisted:
    """The clips in the folder of a list and in its subfolders that hold files of the list, without those that it names.

    Only the names of clips that are left are in memory.
    """

    def __init__(self, list_file: str) -> None:
        self._real: dict[str, str] = {}
        self._root = self._real_path(parent(list_file))
        self._left: dict[str, set[str] | None] = {}  # None for a folder outside
        self._num_names = 0
        self._folder(self._root)

    def see(self, entry: Entry) -> None:
        """Remove the files of an entry."""
        for path in filter(None, (entry.path, entry.image_path, entry.control_path)):
            folder, _, name = path.rpartition("/")
            if self._num_names <= MAX_NAMES and (left := self._folder(folder)) is not None:
                left.discard(name)

    def count(self, listing: Listing) -> None:
        """Count the clips and folders that are left as skipped."""
        if self._num_names > MAX_NAMES:
            return
        listing.skip(UNLISTED_CLIP, sum(len(left) for left in self._left.values() if left))
        used = {folder.removeprefix(f"{self._root}/").split("/")[0] for folder in self._left}
        folders = [item for item in _items(self._root) if item.is_folder and item.name not in used]
        listing.skip(UNLISTED_FOLDER, sum(_holds_clips(f"{self._root}/{item.name}") for item in folders))

    def _folder(self, folder: str) -> set[str] | None:
        """The names left in a folder; None if it is not in the list's folder."""
        real = self._real_path(folder)
        if real not in self._left:
            inside = f"{real}/".startswith(f"{self._root}/")
            names = (
                {item.name for item in _items(real) if not item.is_folder and kind_of(item.name)} if inside else None
            )
            self._left[real] = names
            self._num_names += len(names or ())
        return self._left[real]

    def _real_path(self, folder: str) -> str:
        if folder not in self._real:
            self._real[folder] = folder if is_url(folder) else os.path.realpath(folder)
        return self._real[folder]


def _items(folder: str) -> list[Item]:
    """The items of a folder that are not hidden; [] if it cannot be read."""
    try:
        return [item for item in list_folder(folder) if not is_hidden(item.name, item.is_folder)]
    except OSError:
        return []


def _holds_clips(folder: str) -> bool:
    return any(not item.is_folder and kind_of(item.name) for item in _items(folder))
