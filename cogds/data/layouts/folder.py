"""What the files and folders in a folder of clips are: clips, captions, posters, system folders, ..."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from cogds.data.layouts.captions import CAPTION_SUFFIXES, CaptionNames
from cogds.data.layouts.line_lists import CAPTION_LISTS, CONTROL_LISTS, IMAGE_LISTS, VIDEO_LISTS, main_list
from cogds.data.layouts.listing import Listing, add_names
from cogds.data.layouts.lists import TABLE_SUFFIXES, ListReader
from cogds.data.layouts.parquet_tables import is_manifest
from cogds.data.layouts.text_tables import opened_text
from cogds.data.storage.access import Item, list_folder
from cogds.data.storage.location import is_url, join, parent
from cogds.data.video.kinds import control_names, kind_of, suffix_of
from cogds.errors import UserError

# Folders that desktops, servers and tools make, in small letters: deleted files, snapshots, thumbnails.
_SYSTEM_FOLDERS = frozenset(
    {
        *("#recycle", "#snapshot", "@eadir", "@recycle", "@recently-snapshot", "@sharebin", "@tmp", "lost+found"),
        *("$recycle.bin", "recycler", "system volume information", "network trash folder", "temporary items"),
        *("__macosx", "__pycache__"),
    }
)
# What listings count as skipped.
HIDDEN_FOLDER, HIDDEN_FILE = "hidden or system folder", "hidden file"
POSTER, UNUSED_CONTROL = "poster image of a video", "further control of a clip"
_LABEL_FOLDERS = ("labels", "captions")  # of CogVideo: videos/a.mp4 and labels/a.txt
_TRAIN_SPLITS = ("train", "training")
_OTHER_SPLITS = frozenset({"val", "valid", "validation", "dev", "test", "testing", "eval", "evaluation"})
_TABLE_NAMES = tuple(f"metadata{suffix}" for suffix in TABLE_SUFFIXES)
_CAPTIONS_TABLE = "captions.json"


class ClipFile(NamedTuple):
    """A clip in a folder, its caption file, and its control video."""

    path: str
    kind: str
    caption_file: str | None
    control: str | None = None


class ListFile(NamedTuple):
    """A list or table of clips.

    is_only: whether it is the only one of a folder that was searched.
    """

    path: str
    is_only: bool = False


class TarFile(NamedTuple):
    """A tar file with clips."""

    path: str


class Folder(NamedTuple):
    """A folder to search.

    Attributes:
        path: its location.
        parents: real paths of its parent folders, starting with the dataset's, to recognize links to them.
        labels: folder with the captions of its clips, as in CogVideo's `labels`; None if they are beside the clips.
    """

    path: str
    parents: tuple[str, ...] = ()
    labels: str | None = None


def search_folder(
    folder: Folder, lists: ListReader, listing: Listing
) -> Iterator[ClipFile | ListFile | TarFile | Folder]:
    """Yield what a folder holds, without the content of subfolders, in the order of a sorted list of paths.

    A folder with a list of clips yields only the list. What is skipped is counted. Raises UserError.
    """
    real = folder.path if is_url(folder.path) else os.path.realpath(folder.path)
    if real in folder.parents:
        listing.skip("link to a parent folder")
        return
    if folder.parents and os.path.islink(folder.path) and real.startswith(f"{folder.parents[0]}/"):
        listing.skip("link to a folder of the dataset")
        return
    items = _visible(folder, listing)
    files, folders = ([item.name for item in items if item.is_folder is kind] for kind in (False, True))
    kinds = {item.name: kind for item in items if (kind := kind_of(item.name))}
    clips = _Clips(folder, kinds, files, bool(folders))
    if found := _lists_in(folder, files, clips, lists, listing):
        yield from (ListFile(file, len(found) == 1) for file in found)
        return
    labels = _labels_of("videos", folder.path, folders)
    other_splits = set() if clips.kinds else _other_splits(folders, str.lower)
    other_tars = _other_splits([name for name in files if suffix_of(name) == ".tar"], _split_of)
    for item in items:
        name, path = item.name, f"{folder.path.rstrip('/')}/{item.name}"
        if kind := clips.kinds.get(name):  # or a folder with such a name, which the scan reports as unusable
            if clips.is_poster(name):
                listing.skip(POSTER)
            else:
                control = join(folder.path, clips.controls[name]) if name in clips.controls else None
                yield ClipFile(path, kind, clips.caption_file(name), control)
        elif name in clips.control_files:
            listing.skip(UNUSED_CONTROL, name in clips.unused_controls)
        elif name in other_splits:
            listing.skip("folder of another split than train")
        elif item.is_folder and path != labels:
            inner = join(folder.labels, name) if folder.labels is not None else None
            yield Folder(path, (*folder.parents, real), labels if labels and name == "videos" else inner)
        elif name in other_tars:
            listing.skip("tar file of another split than train")
        elif not item.is_folder and suffix_of(name) == ".tar":
            yield TarFile(path)
        elif not item.is_folder and not clips.has_beside(name):
            suffix = suffix_of(name)
            listing.skip_file(suffix)
            if suffix in TABLE_SUFFIXES:
                add_names(listing.tables, [path])


class _Clips:
    """The clips in a folder, and the files that belong to them.

    Attributes:
        kinds: name of a clip -> "video" or "image".
        stems: names without suffixes.
        controls: name of a clip -> name of its control.
        unused_controls: names of controls that no clip uses.
        control_files: names of all controls.
        has_subfolders: whether there may be more clips in subfolders.
    """

    def __init__(self, folder: Folder, kinds: dict[str, str], files: Sequence[str], has_subfolders: bool) -> None:
        """kinds: of the clips and their controls. files: names of all files in the folder."""
        self.controls, self.unused_controls = control_names(kinds)
        self.control_files = {*self.controls.values(), *self.unused_controls}
        kinds = {name: kind for name, kind in kinds.items() if name not in self.control_files}
        self.kinds, self.has_subfolders = kinds, has_subfolders
        self.stems = {os.path.splitext(name)[0] for name in kinds}
        self._captions = [CaptionNames(folder.path, files)]
        if folder.labels is not None and kinds:
            self._captions.append(CaptionNames(folder.labels, _names_in(folder.labels)))
        videos = [name for name, kind in kinds.items() if kind == "video"]
        has_images = len(videos) < len(kinds)
        self._shown = {*videos, *(os.path.splitext(name)[0] for name in videos)} if has_images else set()

    def caption_file(self, name: str) -> str | None:
        """Location of a clip's captions; None if there are none."""
        return next(filter(None, (captions.find(name) for captions in self._captions)), None)

    @property
    def have_captions(self) -> bool:
        """Whether any clip has captions."""
        return any(map(self.caption_file, self.kinds))

    def is_poster(self, name: str) -> bool:
        """Whether an image only shows a video: `a.jpg` or `a.mp4.jpg` beside `a.mp4`, without its own caption."""
        is_shown = self.kinds[name] == "image" and os.path.splitext(name)[0] in self._shown
        return is_shown and not self._captions[0].has_own(name)

    def has_beside(self, name: str) -> bool:
        """Whether a file belongs to a clip: its caption, or what a program wrote about it."""
        stem, suffix = os.path.splitext(name)
        return suffix.lower() in CAPTION_SUFFIXES and (stem in self.stems or stem in self.kinds)


def _labels_of(name: str, folder: str, folders: Sequence[str]) -> str | None:
    """The folder with the captions of the folder of this name; None if there is none.

    folders: names of the folders in `folder`.
    """
    if name != "videos" or name not in folders:
        return None
    labels = (join(folder, other) for other in _LABEL_FOLDERS if other in folders)
    return next((other for other in labels if not any(map(kind_of, _names_in(other)))), None)


def dataset_folder(path: str) -> Folder:
    """The folder of a dataset. The captions of a `videos` folder may be in a sibling folder `labels`."""
    name, above = os.path.basename(path.rstrip("/")), parent(path)
    return Folder(path, (), _labels_of(name, above, _names_in(above, folders=True)) if name == "videos" else None)


def _visible(folder: Folder, listing: Listing) -> list[Item]:
    """The items of a folder, without hidden ones and system folders."""
    try:
        items = list_folder(folder.path)
    except OSError as error:
        raise UserError(
            f"data.path: cannot read the folder {folder.path} ({error.strerror or error}). Allow access to it, or "
            "move it away."
        ) from None
    visible = []
    for item in items:
        if is_hidden(item.name, item.is_folder):
            listing.skip(HIDDEN_FOLDER if item.is_folder else HIDDEN_FILE)
        else:
            visible.append(item)
    return visible


def is_hidden(name: str, is_folder: bool) -> bool:
    """Whether a file or folder of this name is hidden, or a folder that a system has made."""
    return name.startswith(".") or (is_folder and name.lower() in _SYSTEM_FOLDERS)


def _names_in(folder: str, folders: bool = False) -> list[str]:
    """Names of the files (or folders) in a folder; [] if it cannot be read."""
    try:
        return [item.name for item in list_folder(folder) if item.is_folder is folders]
    except OSError:
        return []


def _other_splits(names: Sequence[str], split_of: Callable[[str], str]) -> set[str]:
    """The names of other splits than train, if there is a name of train. split_of: the split that a name tells."""
    if not any(split_of(name) in _TRAIN_SPLITS for name in names):
        return set()
    return {name for name in names if split_of(name) in _OTHER_SPLITS}


# --- lists in a folder


def _lists_in(folder: Folder, files: Sequence[str], clips: _Clips, lists: ListReader, listing: Listing) -> list[str]:
    """The lists in a folder, which replace its clips. Raises UserError if it is not clear which to use."""
    lists_of_lines = {*VIDEO_LISTS, *IMAGE_LISTS, *CAPTION_LISTS, *CONTROL_LISTS}
    free = [name for name in files if name in lists_of_lines or name.lower().endswith(TABLE_SUFFIXES)]
    free = [name for name in free if os.path.splitext(name)[0] not in clips.stems]  # a.json belongs to the clip a.mp4
    named, unnamed = _tables(folder, free), []
    if not folder.parents:  # of the dataset, not of a part of it
        unnamed = [name for name in free if _may_list_clips(folder, name) and name not in named]
    fitting = [name for name in (*named, *unnamed) if lists.is_list(join(folder.path, name), if_damaged=name in named)]
    lines = main_list(free, need_captions=bool(clips.kinds))
    names = fitting + ([lines] if lines else [])
    if not names and not clips.have_captions:  # reading them raises an error that says what they lack
        names = named or ([] if clips.kinds or clips.has_subfolders else unnamed)
    others = _other_splits(names, _split_of)
    listing.skip("table of another split than train", len(others))
    names = [name for name in names if name not in others]
    if len(names) > 1 and not all(suffix_of(name) == ".parquet" for name in names):
        raise UserError(
            f"data.path: {folder.path} holds several lists of clips: {', '.join(names)}. Set data.path to the one to "
            "use."
        )
    if names:
        for name in set(files) - {*names, *others, *lists_of_lines, *clips.kinds, *clips.control_files}:
            listing.skip(f"{suffix_of(name) or 'other'} file beside a list")
    return [join(folder.path, name) for name in names]


def _tables(folder: Folder, names: Sequence[str]) -> list[str]:
    """The tables of clips by their names."""
    tables = [name for name in _TABLE_NAMES if name in names and not _is_about_dataset(folder, name)]
    return tables + [name for name in (_CAPTIONS_TABLE,) if name in names]


def _may_list_clips(folder: Folder, name: str) -> bool:
    """Whether a file of any name may be a table of clips that is used without being named in data.path."""
    suffix = suffix_of(name)
    if suffix == ".parquet":
        return not is_manifest(join(folder.path, name))
    return suffix == ".json" and not _is_about_dataset(folder, name)


def _is_about_dataset(folder: Folder, name: str) -> bool:
    """Whether a JSON file holds an object that describes the dataset, rather than a list of clips."""
    if suffix_of(name) != ".json":
        return False
    try:
        with opened_text(join(folder.path, name)) as text:
            start = text.read(200).lstrip()
    except UserError:
        return False  # reading it will raise an error that says more
    return start.startswith("{") and not re.match(r'\{\s*"data"\s*:\s*\[', start)


def _split_of(name: str) -> str:
    """`train` for train-00000-of-00002.parquet."""
    return re.split(r"[-_.]", name.lower())[0]
