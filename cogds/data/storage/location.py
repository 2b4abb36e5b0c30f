"""Locations: texts that name a file. Pure functions; nothing is opened.

A location is one of:

- an absolute path, `/data/a.mp4`
- a URL of a protocol that fsspec supports, `s3://bucket/a.mp4`
- a member of a tar file at one of the above, `/data/shard-000.tar#a.mp4@1536+20480`: its name, its first byte, and its
  length. So a member is read like a file of its own, by byte range, and no index of the tar file is needed.
"""

import os
import posixpath
import re
from typing import NamedTuple

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_MEMBER = re.compile(r"(?P<tar>.*\.(?i:tar))#(?P<name>.+)@(?P<offset>\d+)\+(?P<size>\d+)", re.DOTALL)


class Member(NamedTuple):
    """A member of a tar file. tar: location of the tar file; offset, size: of the member's data in it, in bytes."""

    tar: str
    name: str
    offset: int
    size: int

    @property
    def location(self) -> str:
        """The location that `parse_member` reads."""
        return f"{self.tar}#{self.name}@{self.offset}+{self.size}"


def parse_member(location: str) -> Member | None:
    """The parts of a location of a tar member; None for other locations."""
    match = _MEMBER.fullmatch(location)
    return Member(match["tar"], match["name"], int(match["offset"]), int(match["size"])) if match else None


def is_url(location: str) -> bool:
    """Whether a location, or the tar file that it is in, is a URL."""
    return _URL.match(location) is not None


def is_local_file(location: str) -> bool:
    """Whether a location is the path of a file of its own, which any library can open."""
    return not is_url(location) and parse_member(location) is None


def protocol(url: str) -> str:
    """The protocol of a URL: `s3` for `s3://bucket/a.mp4`."""
    return url.split("://", 1)[0].lower()


def absolute(text: str) -> str:
    """A URL as it is (`file://` becomes a path), and a path as an absolute path, with `~` replaced."""
    if is_url(text):
        if protocol(text) not in ("file", "local"):
            return text
        text = text.split("://", 1)[1]
    return os.path.abspath(os.path.expanduser(text))


def join(folder: str, relative: str) -> str:
    """The location of a path that is relative to a folder; absolute paths and URLs stay as they are."""
    if is_url(relative):
        return absolute(relative)
    if not is_url(folder):
        return os.path.join(folder, relative)
    if relative.startswith("/"):
        return relative
    scheme, path = folder.split("://", 1)
    return f"{scheme}://{posixpath.normpath(posixpath.join(path, relative))}"


def parent(location: str) -> str:
    """The folder that holds a file; for a tar member, the folder of its tar file."""
    member = parse_member(location)
    return os.path.dirname((member.tar if member else location).rstrip("/"))


def display_name(location: str) -> str:
    """A location as people read it: without the byte range of a tar member."""
    member = parse_member(location)
    return f"{member.tar}/{member.name}" if member else location
