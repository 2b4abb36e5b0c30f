"""Entries of tar files, as WebDataset and video2dataset write them: `a.mp4` with `a.txt` or `a.json` beside it.

Files of one clip have the same name up to the first dot, and are in the same tar file, in any order.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from cogds.data.manifest.layouts import Entry, kind_of
from cogds.data.storage.location import Member
from cogds.data.storage.tars import TarError, list_members
from cogds.errors import UserError

# Larger text files are not captions.
_CAPTION_ENDS = (".txt", ".json")


def read_tar(tar: str, caption_names: Sequence[str]) -> Iterator[Entry]:
    """Yield the clips in a tar file, in its order. caption_names: keys of captions in .json files.

    Raises UserError if the file cannot be read.
    """
    clips: dict[str, list[Member]] = {}
    texts: dict[str, dict[str, bytes]] = {}
    try:
        for member, content in list_members(tar, lambda name: name.lower().endswith(_CAPTION_ENDS)):
            key, suffix = _split(member.name)
            if content is not None:
                texts.setdefault(key, {})[suffix] = content
            elif kind_of(member.name):
                clips.setdefault(key, []).append(member)
    except TarError as error:
        raise UserError(f"{tar}: {error}") from None
    except OSError as error:
        raise UserError(f"{tar}: cannot be read ({error.strerror or error}). Check the file and the connection.") from None
