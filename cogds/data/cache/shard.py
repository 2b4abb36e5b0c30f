"""A shard: one file of encoded entries. What is in it, how it is checked, and what can go wrong with it.

It is a safetensors file. Its tensors are named `<key>/<name>`; its `__metadata__` holds for each key a checksum of the
entry's bytes, or why the entry could not be made. It never changes once it is there.
"""

import errno
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cogds.errors import UserError
from cogds.files import whole_file

SHARD_BYTES = 1 << 30
SHARD_ENTRIES = 4096
KEY = re.compile("[0-9a-f]{32}")
SHARD_FILE = re.compile(r"[0-9a-f]{32}\.safetensors")
_GONE = (errno.ENOENT, errno.ESTALE)  # stale: removed by another client of a network file system


class Damage(Exception):
    """What is wrong with a file or an entry, to be put into a sentence."""


def checksum_text(key: str, tensors: Mapping[str, torch.Tensor]) -> str:
    """What the metadata says of an entry that has tensors (dense ones, on the CPU)."""
    return json.dumps({"crc32": _checksum(key, tensors)})


def _checksum(key: str, tensors: Mapping[str, torch.Tensor]) -> int:
    """CRC-32 over the key and every tensor's name, dtype, shape and bytes: what the header says is covered too."""
    crc = zlib.crc32(key.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        crc = zlib.crc32(f"\n{name}\n{tensor.dtype}\n{tuple(tensor.shape)}\n".encode(), crc)
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, crc)
    return crc


def failure_text(key: str, reason: str) -> str:
    """What the metadata says of an entry that could not be made."""
    return json.dumps({"failed": reason, "crc32": zlib.crc32(f"{key}\n{json.dumps(reason)}".encode())})


def _failure_reason(key: str, text: str) -> str:
    try:
        reason = json.loads(text)["failed"]
    except (ValueError, TypeError, KeyError):
        raise Damage("it has neither tensors nor a reason why not") from None
    if failure_text(key, reason) != text:
        raise Damage("the record of its failure does not match its checksum")
    return reason


@dataclass(frozen=True)
class Shard:
    """An open file. names: key -> its tensors' names; texts: key -> its part of the metadata."""

    handle: Any
    names: dict[str, list[str]]
    texts: dict[str, str]

    def read(self, key: str) -> dict[str, torch.Tensor]:
        """The verified tensors of an entry, {} for a failure. Raises Damage, FileNotFoundError."""
        text = self.texts.get(key)
        if text is None:
            raise Damage("the file holds no checksum for it")
        if key not in self.names:
            _failure_reason(key, text)
            return {}
        try:
            tensors = {name: self.handle.get_tensor(f"{key}/{name}") for name in self.names[key]}
        except (SafetensorError, OSError) as error:
            if errno_of(error) in _GONE:
                raise FileNotFoundError(key) from None
            raise Damage(f"reading failed: {error}") from None
        if text != checksum_text(key, tensors):
            raise Damage("its bytes do not match their checksum")
        return tensors

    def contents(self) -> "Contents":
        """What the header promises; no tensor is read."""
        found, failures, damaged = [], {}, {}
        for key, text in self.texts.items():
            if not KEY.fullmatch(key):
                damaged[key] = "no such key can be"
            elif key in self.names:
                found.append(key)
            else:
                try:
                    failures[key] = _failure_reason(key, text)
                except Damage as damage:
                    damaged[key] = str(damage)
        damaged |= {key: "it has tensors and no checksum" for key in self.names if key not in self.texts}
        return Contents(bytes.fromhex("".join(found)), failures, damaged)


@dataclass(frozen=True)
class Contents:
    """Keys in a file: those with tensors (16 bytes each), failures with their reason, those that are damaged."""

    found: bytes = b""
    failures: dict[str, str] = field(default_factory=dict)
    damaged: dict[str, str] = field(default_factory=dict)

    @property
    def keys(self) -> list[str]:
        return [self.found[at : at + 16].hex() for at in range(0, len(self.found), 16)]


def open_shard(path: Path, backend: str = "pread") -> Shard:
    """Open a shard. Raises FileNotFoundError, Damage, and UserError where reading is not allowed.

    pread for what others may remove: a page that cannot be brought in kills a process that reads through a mapping.
    """
    try:
        handle = safe_open(path, "pt", backend=backend)
        full_names, texts = handle.offset_keys(), handle.metadata() or {}
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError) as error:
        code = errno_of(error)
        if code in _GONE:
            raise FileNotFoundError(path) from None
        if code not in (None, errno.EIO):  # not the file's fault: `verify` must not remove it for this
            raise UserError(
                f"the cache file {path} cannot be read ({error}): mend that, or set data.cache_dir elsewhere"
            ) from None
        raise Damage(f"the file is torn or damaged: {error}") from None
    names: dict[str, list[str]] = {}
    for full_name in full_names:
        key, _, name = full_name.partition("/")
        names.setdefault(key, []).append(name)
    return Shard(handle, names, texts)


def list_shard(path: Path) -> Contents | str | None:
    """What a file holds; a text where it cannot be told; None where the file is gone."""
    try:
        return open_shard(path).contents()
    except FileNotFoundError:
        return None
    except Damage as damage:
        return str(damage)


def names_in(folder: Path) -> list[str]:
    """Sorted names in a folder, none where it is not there. Raises UserError where it may not be read."""
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(
            f"the cache folder {folder} cannot be read ({error.strerror}): mend that, or set data.cache_dir elsewhere"
        ) from None


def shards_in(folder: Path) -> list[Path]:
    """The shards that lie directly in a folder, none where it is not there. Raises UserError as `names_in`."""
    return [folder / name for name in names_in(folder) if SHARD_FILE.fullmatch(name)]


def errno_of(error: Exception) -> int | None:
    """The system's error number; safetensors has it only in its text."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else None


def write_shard(path: Path, tensors: dict[str, torch.Tensor], texts: dict[str, str], mode: int | None = None) -> None:
    """Write a whole file: tensors by `<key>/<name>`, texts by key. Raises OSError, SafetensorError.

    mode: the file's permissions; without it nobody but the user may read it, as the library has it.
    """
    with whole_file(path) as partial:
        save_file(tensors, partial, texts)
        if mode is not None:
            os.chmod(partial, mode)


@contextmanager
def storing(folder: Path, num_bytes: int = 0) -> Iterator[None]:
    """Errors of the file system while shards are written become UserErrors. num_bytes: what is to be written."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        code = errno_of(error)
        if code is None:
            raise
        why = os.strerror(code)
        if code in (errno.ENOSPC, errno.EDQUOT):
            there = next(path for path in (folder, *folder.parents) if path.is_dir())
            free_bytes = shutil.disk_usage(there).free
            raise UserError(
                f"the cache is out of space: writing {num_bytes / 1e6:.1f} MB into {folder} failed with "
                f"{free_bytes / 1e6:.1f} MB free ({why}); free some space or set data.cache_dir to a larger disk, and "
                "start again: what is encoded so far is kept"
            ) from None
        if code in (errno.ENOTDIR, errno.EEXIST):
            raise UserError(
                f"the cache folder {folder} cannot be made, a file is in its place: "
                "move it away, or set data.cache_dir elsewhere"
            ) from None
        raise UserError(
            f"the cache folder {folder} cannot be written ({why}): set data.cache_dir to a folder that can"
        ) from None
