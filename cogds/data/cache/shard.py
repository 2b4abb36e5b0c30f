"""The format of a shard: one safetensors file that holds many cache entries.

Tensors are named `<key>/<name>`. The file's `__metadata__` maps each key to a record: the CRC-32 of the entry, or the
reason why the entry could not be made. A shard is written once and never changes.
"""

import errno
import json
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save_file

from cogds.data.storage import access
from cogds.data.storage.access import read_range, stamp, upload
from cogds.data.storage.location import is_url, join
from cogds.errors import UserError
from cogds.files import apply_umask, remove_abandoned, temporary_name

SHARD_BYTES = 1 << 30
SHARD_ENTRIES = 4096
FIRST_BYTES = 1 << 16  # of a shard at a URL, which hold most headers
KEY = re.compile("[0-9a-f]{32}")
SHARD_FILE = re.compile(r"[0-9a-f]{32}\.safetensors")
# cogds 0.1 kept each new entry in a file `staging-<uuid>/<key>.safetensors` until a shard was full. A killed run left
# them there; each is a shard with one entry.
STAGING_FOLDER = re.compile("staging-.*")
_GONE = (errno.ENOENT, errno.ESTALE)  # ESTALE: removed by another client of a network file system


class DamageError(Exception):
    """A shard or an entry is damaged; the message is a clause that says how."""


# --- records


def entry_record(key: str, tensors: Mapping[str, torch.Tensor]) -> str:
    """An entry's record: a CRC-32 of its key and each tensor's name, dtype, shape and data (dense, on the CPU)."""
    crc = zlib.crc32(key.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        crc = zlib.crc32(f"\n{name}\n{tensor.dtype}\n{tuple(tensor.shape)}\n".encode(), crc)
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, crc)
    return json.dumps({"crc32": crc})


def failure_record(key: str, reason: str) -> str:
    """The record of an entry that could not be made."""
    return json.dumps({"failed": reason, "crc32": zlib.crc32(f"{key}\n{json.dumps(reason)}".encode())})


def _failure_reason(key: str, record: str) -> str:
    try:
        reason = json.loads(record)["failed"]
    except (ValueError, TypeError, KeyError):
        raise DamageError("it has neither tensors nor a reason why not") from None
    if failure_record(key, reason) != record:
        raise DamageError("the record of its failure does not match its checksum")
    return reason


# --- reading


@dataclass(frozen=True)
class ShardListing:
    """What the header of a shard lists.

    Attributes:
        key_bytes: keys of the entries with tensors, 16 bytes each.
        failures: keys of the entries that could not be made, with the reasons.
        damaged: keys of the damaged records, with what is wrong.
        error: why the header cannot be read; the rest is empty then.
    """

    key_bytes: bytes = b""
    failures: dict[str, str] = field(default_factory=dict)
    damaged: dict[str, str] = field(default_factory=dict)
    error: str = ""

    @property
    def keys(self) -> list[str]:
        return [self.key_bytes[at : at + 16].hex() for at in range(0, len(self.key_bytes), 16)]


@dataclass(frozen=True)
class Shard:
    """An open shard: the names of each key's tensors, and each key's record."""

    handle: Any
    names: dict[str, list[str]]
    records: dict[str, str]

    def read(self, key: str) -> dict[str, torch.Tensor]:
        """Read and check the tensors of an entry; {} if the entry is a failure.

        Raises:
            DamageError: the entry is damaged or missing.
            FileNotFoundError: the file was removed.
        """
        record = self.records.get(key)
        if record is None:
            raise DamageError("the file holds no checksum for it")
        if key not in self.names:
            _failure_reason(key, record)
            return {}
        try:
            tensors = {name: self.handle.get_tensor(f"{key}/{name}") for name in self.names[key]}
        except FileNotFoundError:
            raise
        except (SafetensorError, OSError) as error:
            if _errno(error) in _GONE:
                raise FileNotFoundError(key) from None
            raise DamageError(f"reading failed: {error}") from None
        if record != entry_record(key, tensors):
            raise DamageError("its bytes do not match their checksum")
        return tensors

    def list(self) -> ShardListing:
        """List the entries by the header alone; no tensor is read."""
        keys, failures, damaged = [], {}, {}
        for key, record in self.records.items():
            if not KEY.fullmatch(key):
                damaged[key] = "it is not a valid key"
            elif key in self.names:
                keys.append(key)
            else:
                try:
                    failures[key] = _failure_reason(key, record)
                except DamageError as error:
                    damaged[key] = str(error)
        damaged |= {key: "it has tensors but no checksum" for key in self.names if key not in self.records}
        return ShardListing(bytes.fromhex("".join(keys)), failures, damaged)


def open_shard(location: Path | str) -> Shard:
    """Open a shard for reading.

    Raises:
        DamageError: the header is damaged.
        FileNotFoundError: the file was removed.
        UserError: the file may not be read, or its server does not answer.
    """
    try:
        # pread, not mmap: another process may remove the file, and a page fault that fails kills the process.
        handle = _RemoteHandle(location) if is_url(str(location)) else safe_open(location, "pt", backend="pread")
        tensor_names, records = handle.offset_keys(), handle.metadata() or {}
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError) as error:
        code = _errno(error)
        if code in _GONE:
            raise FileNotFoundError(location) from None
        if code not in (None, errno.EIO):  # not damage: `verify` must not remove the file
            raise _unreadable(location, str(error)) from None
        raise DamageError(f"the file is truncated or damaged: {error}") from None
    names: dict[str, list[str]] = {}
    for tensor_name in tensor_names:
        key, _, name = tensor_name.partition("/")
        names.setdefault(key, []).append(name)
    return Shard(handle, names, records)


class _RemoteHandle:
    """Reads a shard at a URL by byte range: what `safe_open` does for a local file."""

    def __init__(self, url: Path | str):
        self._url = str(url)
        with read_errors(self._url):
            size = stamp(self._url).size
        head = self._read(0, min(size, FIRST_BYTES))
        self._start = 8 + int.from_bytes(head[:8], "little")
        if self._start > size:
            raise DamageError("the file is truncated or damaged: it ends within its header")
        head = head[: self._start] + self._read(len(head), self._start - len(head))
        try:
            self._tensors: dict[str, dict[str, Any]] = json.loads(head[8:])
            self._metadata = self._tensors.pop("__metadata__", {})
            end = max((info["data_offsets"][1] for info in self._tensors.values()), default=0)
        except (ValueError, TypeError, LookupError, AttributeError):
            raise DamageError("the file is truncated or damaged: its header cannot be read") from None
        if self._start + end != size:
            raise DamageError(f"the file is truncated or damaged: it has {size} bytes instead of {self._start + end}")

    def _read(self, start: int, size: int) -> bytes:
        with read_errors(self._url):
            return read_range(self._url, start, size)

    def offset_keys(self) -> list[str]:
        return list(self._tensors)

    def metadata(self) -> dict[str, str]:
        return self._metadata

    def get_tensor(self, name: str) -> torch.Tensor:
        info = self._tensors[name]
        start, end = info["data_offsets"]
        data = self._read(self._start + start, end - start)
        header = json.dumps({name: info | {"data_offsets": [0, len(data)]}}).encode()
        return load(len(header).to_bytes(8, "little") + header + data)[name]


@contextmanager
def read_errors(location: Path | str) -> Iterator[None]:
    """Turn errors of the file system or the server into UserErrors, except FileNotFoundError."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _unreadable(location, error.strerror or str(error)) from None


def _unreadable(location: Path | str, reason: str) -> UserError:
    advice = "Allow access to it, or set data.cache_dir to another folder."
    if is_url(str(location)):
        advice = "Check the server and the credentials, and start again."
    return UserError(f"data.cache_dir: cannot read {location} ({reason}). {advice}")


def list_shard(location: Path | str) -> ShardListing | None:
    """List a shard's entries; None if the file was removed. Raises UserError as `open_shard`."""
    try:
        return open_shard(location).list()
    except FileNotFoundError:
        return None
    except DamageError as error:
        return ShardListing(error=str(error))


def list_folder(folder: Path | str) -> list[access.Item]:
    """What is in a folder, sorted; [] if it does not exist. Raises UserError if it may not be read."""
    try:
        with read_errors(folder):
            return access.list_folder(str(folder))
    except FileNotFoundError:
        return []


def shards_in(folder: Path | str) -> list[str]:
    """The places of a folder's shards, relative to it.

    Includes entries that killed runs of cogds 0.1 left in its staging folders. Raises UserError if the folder may not
    be read.
    """
    names = [item.name for item in list_folder(folder)]
    places = [name for name in names if SHARD_FILE.fullmatch(name)]
    for staging in (name for name in names if STAGING_FOLDER.fullmatch(name)):
        files = [item.name for item in list_folder(join(str(folder), staging))]
        places += [f"{staging}/{name}" for name in files if SHARD_FILE.fullmatch(name)]
    return places


def _errno(error: Exception) -> int | None:
    """The system's error number, which safetensors gives only in its message."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    match = re.search(r"os error (\d+)", str(error))
    return int(match[1]) if match else None


# --- writing


def write_shard(location: Path | str, tensors: dict[str, torch.Tensor], records: dict[str, str]) -> None:
    """Write a shard from tensors by `<key>/<name>` and records by key.

    It is on the disk, or on the server, when this returns. Raises OSError or SafetensorError; see `storage_errors`.
    """
    if not is_url(str(location)):
        write_file(Path(location), tensors, records)
        return
    upload_folder().mkdir(parents=True, exist_ok=True)
    remove_abandoned(upload_folder())
    path = temporary_name(upload_folder() / str(location).rpartition("/")[2])
    try:
        save_file(tensors, path, records)
        upload(path, str(location))
    finally:
        path.unlink(missing_ok=True)


def write_file(
    path: Path, tensors: dict[str, torch.Tensor], records: dict[str, str], *, is_synced: bool = True
) -> None:
    """Write a shard to a local file, which is complete or absent. is_synced: it is on the disk when this returns."""
    folder = temporary_name(path)  # a folder, because safetensors writes to a temporary file of its own in it
    folder.mkdir(parents=True)
    try:
        partial = folder / path.name
        save_file(tensors, partial, records)
        apply_umask(partial)
        if is_synced:
            with partial.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def upload_folder() -> Path:
    """Folder of shards that are being uploaded, each in a temporary file."""
    return Path(tempfile.gettempdir(), f"cogds-{os.getuid()}", "uploads")


@contextmanager
def storage_errors(folder: Path | str, num_bytes: int = 0) -> Iterator[None]:
    """Turn errors of the file system or the server into UserErrors. num_bytes: how much is written, for the message."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if is_url(str(folder)):
            raise UserError(
                f"data.cache_dir: writing {num_bytes / 1e6:.1f} MB into {folder} failed ({error}). Check the server, "
                "the credentials and the space for temporary files, and start again: shards that are complete are kept."
            ) from None
        code = _errno(error)
        if code is None:
            raise
        reason = os.strerror(code)
        if code in (errno.ENOSPC, errno.EDQUOT):
            existing = next(path for path in (Path(folder), *Path(folder).parents) if path.is_dir())
            free_bytes = shutil.disk_usage(existing).free
            raise UserError(
                f"data.cache_dir: {reason}: writing {num_bytes / 1e6:.1f} MB into {folder} failed with "
                f"{free_bytes / 1e6:.1f} MB free. Free some space, or set data.cache_dir to a larger disk, and start "
                "again: shards that are complete are kept."
            ) from None
        if code in (errno.ENOTDIR, errno.EEXIST):
            raise UserError(
                f"data.cache_dir: cannot make the folder {folder}, because a file is in its place. Move the file, or "
                "set data.cache_dir to another folder."
            ) from None
        raise UserError(
            f"data.cache_dir: cannot write into {folder} ({reason}). Set data.cache_dir to a folder that you can write."
        ) from None
