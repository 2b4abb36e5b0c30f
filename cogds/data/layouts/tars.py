"""Clips in tar files, as WebDataset and video2dataset write them: `a.mp4` with `a.txt` or `a.json`.

The files of a clip are in the same tar file, in any order. A caption belongs to the clip with its name (`1.0.txt` to
`1.0.mp4`), or, as in WebDataset, to the clips that have the same name up to the first dot.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from cogds.data.layouts.captions import CAPTION_SUFFIXES, captions_of
from cogds.data.layouts.entry import Entry
from cogds.data.layouts.folder import HIDDEN_FILE, HIDDEN_FOLDER, POSTER, UNUSED_CONTROL, is_hidden
from cogds.data.layouts.listing import Listing, add_names
from cogds.data.storage.location import Member
from cogds.data.storage.tars import TarError, list_members
from cogds.data.video.kinds import control_names, kind_of, suffix_of
from cogds.errors import UserError


@dataclass
class _Sample:
    """Files with the same name up to the first dot.

    Attributes:
        clips: by name.
        captions: contents by name, with the suffix in small letters.
    """

    name: str
    clips: dict[str, Member] = field(default_factory=dict)
    captions: dict[str, bytes] = field(default_factory=dict)

    @cached_property
    def _videos(self) -> set[str]:
        """Names of the videos, with and without their suffixes."""
        return {part for name in self.clips if kind_of(name) == "video" for part in (name, _stem(name))}

    @cached_property
    def _shared_captions(self) -> list[str]:
        """The caption files that belong to all clips rather than to one."""
        owners = {part for name in self.clips for part in (name, _stem(name))}
        free = [name for name in self.captions if _stem(name) not in owners]
        by_suffix = [[name for name in free if suffix_of(name) == suffix] for suffix in CAPTION_SUFFIXES]
        names = next(filter(None, by_suffix), [])
        return names if len(names) <= 1 else [name for name in names if _stem(name) == self.name] or names

    def is_poster(self, clip: str) -> bool:
        """Whether an image only shows a video of the sample: it has its name, or the video has the sample's."""
        if kind_of(clip) != "image" or any(clip + suffix in self.captions for suffix in CAPTION_SUFFIXES):
            return False
        return _stem(clip) in self._videos or self.name in self._videos

    def captions_of(self, clip: str) -> list[str]:
        """Names of the caption files that may be a clip's: the one with its name, or else the shared ones."""
        names = (stem + suffix for suffix in CAPTION_SUFFIXES for stem in (clip, _stem(clip)))
        own = next((name for name in names if name in self.captions), None)
        return [own] if own else self._shared_captions


def read_tar(tar: str, columns: Mapping[str, str | None], listing: Listing) -> Iterator[Entry]:
    """Yield the clips in a tar file, in its order, and count what is left out.

    The names of the files in one tar file are in memory. columns: our column names -> the keys in `.json` files.

    Raises:
        UserError: the tar file cannot be read.
    """
    add_names(listing.tars, [tar])
    samples: dict[str, _Sample] = {}
    try:
        for member, content in list_members(tar, _is_caption, lambda _: listing.skip("link in a tar file")):
            folder, name = os.path.split(member.name)
            if any(is_hidden(part, is_folder=True) for part in folder.split("/")):
                listing.skip(f"file in a {HIDDEN_FOLDER}")
                continue
            if is_hidden(name, is_folder=False):
                listing.skip(HIDDEN_FILE)
                continue
            key = os.path.join(folder, name.partition(".")[0])
            sample = samples.setdefault(key, _Sample(key))
            if content is not None:
                sample.captions[_stem(member.name) + suffix_of(name)] = content
            elif kind_of(name):
                listing.skip("older file of the same name in a tar file", member.name in sample.clips)
                sample.clips[member.name] = member
            else:
                listing.skip_file(suffix_of(name))
    except TarError as error:
        raise UserError(f"{tar}: {error}") from None
    except OSError as error:
        raise UserError(f"{tar}: cannot be read ({error.strerror or error}). Check the file and the server.") from None
    for sample in samples.values():
        control_of, unused = control_names(sample.clips)
        listing.skip(UNUSED_CONTROL, len(unused))
        controls = {name: sample.clips.pop(name) for name in {*control_of.values(), *unused}}
        for clip in sample.clips.values():
            if sample.is_poster(clip.name):
                listing.skip(POSTER)
            else:
                control = controls[control_of[clip.name]].location if clip.name in control_of else None
                yield _entry(clip, sample, columns)._replace(control_path=control)


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]


def _is_caption(name: str) -> bool:
    return suffix_of(name) in CAPTION_SUFFIXES


def _entry(clip: Member, sample: _Sample, columns: Mapping[str, str | None]) -> Entry:
    kind, names = str(kind_of(clip.name)), sample.captions_of(clip.name)
    if not names:
        return Entry(clip.location, None, kind)
    if len(names) > 1:
        return Entry(clip.location, None, kind, None, f"several files may hold it: {', '.join(sorted(names)[:3])}")
    try:
        caption, *more = captions_of(sample.captions[names[0]], names[0], columns)
    except UnicodeDecodeError as error:
        return Entry(clip.location, None, kind, None, f"{names[0]} in the tar file cannot be read as UTF-8: {error}")
    except ValueError as error:
        return Entry(clip.location, None, kind, None, f"{names[0]} in the tar file: {error}")
    return Entry(clip.location, caption, kind, more_captions=tuple(text for text in more if text))
