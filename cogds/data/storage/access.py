"""Opening, listing and checking files at any location (`location`). The only module that imports fsspec.

Reads by URL are retried, because servers fail, slow down and cut connections: a read returns all bytes or raises an
error. A local file is opened as usual.

Credentials and options are fsspec's own: environment variables (`AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`,
`FSSPEC_S3_ANON=true`, `HF_TOKEN`, ...) or `~/.config/fsspec/*.json`.
"""

import hashlib
import io
import os
import random
import stat
import time
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple, TypeVar

from cogds.data.storage.location import is_url, parse_member, protocol
from cogds.errors import BUGS, UserError, brief

T = TypeVar("T")

NUM_ATTEMPTS = 6
FIRST_DELAY_S = 0.5  # doubled after each attempt: 15 s in total
CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 15, 60
# Files up to this size are read at once; larger ones in blocks, because a clip may be a short part of a long film.
WHOLE_BYTES, BLOCK_BYTES = 64_000_000, 8_000_000

# Options of the client libraries, some of which wait for minutes by default.
_OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {"config_kwargs": {"connect_timeout": CONNECT_TIMEOUT_S, "read_timeout": READ_TIMEOUT_S}},
}
# Extras of cogds with the client library of a protocol.
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}
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
    size = stamp(location).size
    if size <= WHOLE_BYTES:
        return io.BytesIO(read_range(location, 0, size))
    return io.BufferedReader(_RangeReader(location, size), block_bytes)


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
            return _checked(os.pread(file.fileno(), size, start), size)
    system, path = file_system(location)
    return _retried(lambda: _checked(system.cat_file(path, start=start, end=start + size), size))


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


def _checked(data: bytes, size: int) -> bytes:
    """The data if it has the right size. A server that ignores the range sends the whole file."""
    if len(data) > size:
        raise _NoRangesError("the server ignores byte ranges: copy the data to a server that supports them")
    if len(data) < size:
        raise OSError(f"only {len(data)} of {size} bytes were read")
    return data


class _NoRangesError(OSError):
    """The server ignores byte ranges."""


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
    system, path = file_system(url)
    info = _retried(lambda: system.info(path))
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
    if not is_url(location):
        return os.path.isdir(location)
    system, path = file_system(location)
    return _retried(lambda: system.isdir(path))


def is_file(location: str) -> bool:
    """Whether a location is a file. Raises OSError if a server does not answer."""
    if not is_url(location):
        return os.path.isfile(location)
    system, path = file_system(location)
    return _retried(lambda: system.isfile(path))


def list_folder(folder: str) -> list[Item]:
    """The files and folders in a folder. Raises OSError.

    The order is that of a sorted list of paths: a subfolder is at the place of its name with a slash.
    """
    if not is_url(folder):
        with os.scandir(folder) as entries:
            items = [Item(entry.name, entry.is_dir()) for entry in entries]
    else:
        system, path = file_system(folder)
        infos = _retried(lambda: system.ls(path, detail=True))
        items = [Item(info["name"].rstrip("/").rsplit("/", 1)[-1], info["type"] == "directory") for info in infos]
    return sorted(items, key=lambda item: item.name + "/" * item.is_folder)


# --- fsspec


def file_system(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it.

    A forked process gets a file system of its own. Raises UserError if the protocol is unknown or its client library is
    not installed.
    """
    import fsspec

    name = protocol(url)
    options = {"use_listings_cache": False} if name in ("s3", "s3a", "http", "https", "gs", "gcs") else {}
    try:
        system, path = fsspec.core.url_to_fs(url, **options, **_OPTIONS.get(name, {}))
    except ImportError:
        extra = _EXTRAS.get(name)
        advice = f"pip install 'cogds[{extra}]'" if extra else "pip install the fsspec library for it"
        raise UserError(f"{url}: the library that reads {name}:// is not installed. Run `{advice}`.") from None
    except ValueError as error:
        raise UserError(
            f"{url}: {error}. Use a protocol that fsspec supports, such as s3://, gs:// or https://."
        ) from None
    return system, path


def _retried(read: Callable[[], T]) -> T:
    """The result of a request, which is repeated with growing delays if it fails.

    Raises OSError. FileNotFoundError and PermissionError, which would not go away, are raised at once.
    """
    for attempt in range(NUM_ATTEMPTS):
        try:
            return read()
        except (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, _NoRangesError):
            raise
        except BUGS:
            raise
        except Exception as error:  # client libraries raise errors of their own: aiohttp, botocore, ...
            if attempt == NUM_ATTEMPTS - 1:
                raise OSError(f"{brief(error)} ({NUM_ATTEMPTS} attempts)") from None
            time.sleep(FIRST_DELAY_S * 2**attempt * random.uniform(0.5, 1.0))
    raise AssertionError("unreachable")
