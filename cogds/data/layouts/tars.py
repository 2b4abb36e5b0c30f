"""Clips in tar files, as WebDataset and video2dataset write them: `a.mp4` with `a.txt` or `a.json`.

The files of a clip have the same name up to the first dot, and are in the same tar file, in any order.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from cogds.data.layouts.captions import CAPTION_SUFFIXES, captions_of
from cogds.data.layouts.entry import Entry
from cogds.data.layouts.listing import Listing, add_names
from cogds.data.storage.location import Member
from cogds.data.storage.tars import TarError, list_members
from cogds.data.video.kinds import kind_of, suffix_of
from cogds.errors import UserError


@dataclass
class _Sample:
    """Files with the same name. captions: contents by suffix."""

    clips: list[Member] = field(default_factory=list)
    captions: dict[str, bytes] = field(default_factory=dict)


def read_tar(tar: str, columns: Mapping[str, str | None], listing: Listing) -> Iterator[Entry]:
    """Yield the clips in a tar file, in its order, and count what is left out.

    The names of the files in one tar file are in memory. columns: our column names -> the keys in `.json` files.

    Raises:
        UserError: the tar file cannot be read.
    """
    add_names(listing.lists, [tar])
    samples: dict[str, _Sample] = {}
    try:
        for member, content in list_members(tar, _is_caption):
            folder, name = os.path.split(member.name)
            if name.startswith("."):
                listing.skip("hidden file")
                continue
            sample = samples.setdefault(os.path.join(folder, name.partition(".")[0]), _Sample())
            if content is not None:
                sample.captions[suffix_of(name)] = content
            elif kind_of(name):
                sample.clips.append(member)
            else:
                listing.skip(f"{suffix_of(name)} file" if suffix_of(name) else "file without a suffix")
    except TarError as error:
        raise UserError(f"{tar}: {error}") from None
    except OSError as error:
        raise UserError(f"{tar}: cannot be read ({error.strerror or error}). Check the file and the server.") from None
    for sample in samples.values():
        videos = [clip for clip in sample.clips if kind_of(clip.name) == "video"]
        listing.skip("image with the name of a video beside it", len(sample.clips) - len(videos) if videos else 0)
        for clip in videos or sample.clips:
            yield _entry(clip, sample.captions, columns)


def _is_caption(name: str) -> bool:
    return suffix_of(name) in CAPTION_SUFFIXES


def _entry(clip: Member, contents: Mapping[str, bytes], columns: Mapping[str, str | None]) -> Entry:
    kind = str(kind_of(clip.name))
    suffix = next((suffix for suffix in CAPTION_SUFFIXES if suffix in contents), None)
    if suffix is None:
        return Entry(clip.location, None, kind)
    try:
        caption, *more = captions_of(contents[suffix], suffix, columns)
    except ValueError as error:
        return Entry(clip.location, None, kind, None, f"its {suffix} in the tar file cannot be read as UTF-8: {error}")
    return Entry(clip.location, caption, kind, more_captions=tuple(text for text in more if text))
