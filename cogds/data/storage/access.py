"""Opening, listing, checking and writing files at any location (`location`).

Requests to servers are retried (`requests`): a read returns all bytes or raises an error. A local file is opened as
usual.
"""

import contextlib
import functools
import hashlib
import html
import io
import os
import stat
import tarfile
import tempfile
import uuid
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import quote, unquote

from cogds.data.storage.location import Member, is_url, parse_member, protocol
from cogds.data.storage.requests import HTTP, REQUEST_TIMEOUT_S, file_system, request

# Files up to this size are read at once; larger ones in blocks, because a clip may be a short part of a long film.
WHOLE_BYTES, BLOCK_BYTES = 64_000_000, 8_000_000
MIN_BYTES_PER_S = 1_000_000  # a slower upload fails
# Stores whose uploads are complete or absent.
OBJECT_STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "hf")

# Entries of fsspec's description of a file that change with its content, the best first.
_VERSION_FIELDS = (
    "ETag",
    "etag",
    "md5Hash",
    "content_md5",
    "blob_id",
    "LastModified",
    "last_modified",
    "mtime",
    "Last-Modified",
    "updated",
    "modified",
    "created",
)


class Stamp(NamedTuple):
    """Size in bytes, and a number that changes with the content: the modification time in ns, or a hash of the ETag."""

    size: int
    version: int


class Item(NamedTuple):
    """A file or folder in a listed folder."""

    name: str
    is_folder: bool


# --- reading


def open_binary(location: str, block_bytes: int = BLOCK_BYTES) -> BinaryIO:
    """Open a file for reading; it can seek. Raises OSError, or UserError as `file_system`.

    block_bytes: bytes per request for files of more than WHOLE_BYTES.
    """
    member = parse_member(location)
    if member is None and not is_url(location):
        return open(location, "rb")
    size, version = stamp(location)
    if size <= WHOLE_BYTES:
        return io.BytesIO(_read_whole(location, size, version, os.getpid()))
    if member:
        _check_header(member, read_range(member.tar, member.offset - tarfile.BLOCKSIZE, tarfile.BLOCKSIZE))
    return io.BufferedReader(_RangeReader(location, size), block_bytes)


@functools.lru_cache(maxsize=1)  # a file is probed, decoded and digested one after the other
def _read_whole(location: str, size: int, version: int, process_id: int) -> bytes:  # noqa: ARG001
    member = parse_member(location)
    if not member:
        return read_range(location, 0, size)
    data = read_range(member.tar, member.offset - tarfile.BLOCKSIZE, tarfile.BLOCKSIZE + size)
    _check_header(member, data[: tarfile.BLOCKSIZE])
    return data[tarfile.BLOCKSIZE :]


def _check_header(member: Member, header: bytes) -> None:
    """Raise OSError if the tar file has another member there now: a table may hold places in a former tar file."""
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        info = tarfile.TarInfo()
    # Names that do not fit into the header are in a block before it.
    names = [part.rsplit("/", 1)[-1] for part in (info.name, member.name)]
    if info.size != member.size or (len(member.name) < 100 and member.name.isascii() and names[0] != names[1]):
        raise OSError(
            f"the tar file has changed: {member.name} is not at byte {member.offset} any more. Make the list again"
        )


def read_bytes(location: str) -> bytes:
    """The content of a file. Raises OSError, or UserError as `file_system`."""
    with open_binary(location) as file:
        return file.read()


def read_range(location: str, start: int, size: int) -> bytes:
    """Some bytes of a file. Raises OSError if they cannot be read, also if the file is too short."""
    if size <= 0:
        return b""
    member = parse_member(location)
    if member:
        if start + size > member.size:
            raise OSError(f"bytes {start} to {start + size} are outside of {member.name}, of {member.size} bytes")
        return read_range(member.tar, member.offset + start, size)
    if not is_url(location):
        with open(location, "rb") as file:
            data = os.pread(file.fileno(), size, start)
        _check_size(data, size)
        return data
    pieces = []
    for first in range(start, start + size, BLOCK_BYTES):  # a piece that fails is read again, not the whole range
        end = min(start + size, first + BLOCK_BYTES)
        check = functools.partial(_check_size, size=end - first)
        pieces.append(request(location, "cat_file", start=first, end=end, check=check))
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


class _RangeReader(io.RawIOBase):
    """Reads a file by byte range, one request per read."""

    def __init__(self, location: str, size: int) -> None:
        self._location, self._size, self._position = location, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        size = max(0, min(len(buffer), self._size - self._position))
        buffer[:size] = read_range(self._location, self._position, size)
        self._position += size
        return size

    def readall(self) -> bytes:
        data = read_range(self._location, self._position, self._size - self._position)
        self._position += len(data)
        return data


def _check_size(data: bytes, size: int) -> None:
    if len(data) != size:
        raise OSError(f"{len(data)} bytes were read instead of {size}")


# --- checking and listing


def stamp(location: str) -> Stamp:
    """The size and version of a file. Raises OSError if it is missing, or not a regular file."""
    member = parse_member(location)
    if member:
        return Stamp(member.size, stamp(member.tar).version)
    if is_url(location):
        return _remote_stamp(location)
    status = os.stat(location)
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError("it is a folder, not a file")
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait forever
        raise OSError("it is a device, a pipe or a socket, not a file")
    return Stamp(status.st_size, status.st_mtime_ns)


def _remote_stamp(url: str) -> Stamp:
    info = request(url, "info")
    if info.get("type") == "directory":
        raise IsADirectoryError("it is a folder, not a file")
    if info.get("size") is None:
        raise OSError("the server does not tell the size of the file")
    return Stamp(int(info["size"]), _version(info))


def _version(info: dict[str, Any]) -> int:
    """A number of 62 bits that changes with what the server tells about the version of a file."""
    version = next((str(info[name]) for name in _VERSION_FIELDS if info.get(name)), "")
    return int.from_bytes(hashlib.blake2b(version.encode(), digest_size=8).digest(), "little") >> 2


def is_folder(location: str) -> bool:
    """Whether a location is a folder. Raises OSError if a server does not answer."""
    return _kind(location) == "directory" if is_url(location) else os.path.isdir(location)


def is_file(location: str) -> bool:
    """Whether a location is a file. Raises OSError if a server does not answer."""
    return _kind(location) == "file" if is_url(location) else os.path.isfile(location)


def _kind(url: str) -> str:
    """`file`, `directory`, or "" if there is neither. fsspec's isfile and isdir are False if the server fails."""
    try:
        info = request(url, "info")
    except FileNotFoundError:
        return ""
    # An HTTP server has no folders, but a page that lists files in place of each.
    return "directory" if protocol(url) in HTTP and info.get("mimetype") == "text/html" else info["type"]


def list_folder(folder: str) -> list[Item]:
    """The files and folders in a folder. Raises OSError.

    The order is that of a sorted list of paths: a subfolder is at the place of its name with a slash.
    """
    if is_url(folder):
        items = _list_page(folder) if protocol(folder) in HTTP else _list_remote(folder)
    else:
        with os.scandir(folder) as entries:
            items = [Item(entry.name, entry.is_dir()) for entry in entries]
    return sorted(items, key=lambda item: item.name + "/" * item.is_folder)


def _list_remote(folder: str) -> list[Item]:
    infos = request(folder, "ls", detail=True)
    if len(infos) == 1 and infos[0]["type"] == "file" and _kind(folder) == "file":
        raise NotADirectoryError("it is a file, not a folder")
    own_path = file_system(folder)[1].strip("/")
    paths = [(info["name"].strip("/"), info["type"] == "directory") for info in infos]
    # Some tools keep an empty object for the folder itself.
    return [Item(path.rsplit("/", 1)[-1], is_folder) for path, is_folder in paths if path != own_path]


def _list_page(folder: str) -> list[Item]:
    """The links of a page that lists files, without those that sort it."""
    # fsspec only knows links that begin with the address as it is given, and they are quoted.
    page = quote(folder.rstrip("/"), safe="/%:?=&@!$'()*+,;~[]") + "/"
    items = set()
    for info in request(page, "ls", detail=True):
        link = html.unescape(info["name"]).replace("/./", "/")
        parent, _, name = link.rstrip("/").rpartition("/")
        if unquote(parent) == unquote(page.rstrip("/")) and name.strip(".") and not name.startswith("?"):
            readable = unquote(name)
            for reserved in "%?#":  # not part of a name in a URL unless they are quoted
                readable = readable.replace(reserved, quote(reserved))
            items.add(Item(readable, link.endswith("/")))
    return list(items)


# --- writing


def upload(path: Path, url: str) -> None:
    """Copy a local file to a URL, where it is complete or absent. Raises OSError."""
    timeout_s = REQUEST_TIMEOUT_S + path.stat().st_size / MIN_BYTES_PER_S
    if protocol(url) in OBJECT_STORES:
        request(url, "put_file", str(path), timeout_s=timeout_s)
        return
    partial = f"{url}.{uuid.uuid4().hex[:8]}.tmp"
    request(partial, "put_file", str(path), timeout_s=timeout_s)
    _, source = file_system(partial)
    request(url, "mv", source)


def write_bytes(location: str, data: bytes) -> None:
    """Write a small file. Raises OSError."""
    if is_url(location):
        with tempfile.NamedTemporaryFile() as file:
            file.write(data)
            file.flush()
            upload(Path(file.name), location)
    else:
        Path(location).write_bytes(data)


def remove(location: str) -> None:
    """Remove a file if it exists. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        if is_url(location):
            request(location, "rm_file")
        else:
            Path(location).unlink()
