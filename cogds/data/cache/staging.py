"""Folders of entries that are not in a shard yet, each with one owner.

A writer owns one folder, `<root>/<kind>/staging-<uuid>`, where each entry is first a whole file of its own, readable at
once, so that a kill loses only the entry in flight. Full folders are packed into a shard. A lock in the folder tells
whether its owner lives; the next writer packs what the dead left. Entries may so be there twice: both are right.
"""

import errno
import fcntl
import os
import uuid
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path

import torch

from cogds.data.cache.shard import Contents, Damage, list_shard, names_in, open_shard, shards_in, storing, write_shard

_STAGING, _LOCK = "staging-", "lock"
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


def is_staged(place: str) -> bool:
    """Whether a name in a kind's folder is a staging folder, or a path in one."""
    return place.startswith(_STAGING)


def staging_folders(folder: Path) -> list[Path]:
    """The staging folders in a kind's folder. Raises UserError where it may not be read."""
    return [folder / name for name in names_in(folder) if is_staged(name)]


def staged_files(folder: Path) -> list[Path]:
    """All staged entries in a kind's folder: each a shard of one. Raises UserError where it may not be read."""
    return [path for staging in staging_folders(folder) for path in shards_in(staging)]


class Staging:
    """A folder of entries not yet packed, and the lock in it, held as long as its owner lives.

    All temporaries are made in it, so that whoever takes the lock over may remove all that is not an entry.
    """

    def __init__(self, path: Path, lock: int):
        self.path = path
        self._lock: int | None = lock

    def is_there(self) -> bool:
        """False once somebody else has removed it."""
        return self._lock is not None and _is_same_file(self._lock, self.path / _LOCK)

    def save(self, tensors: dict[str, torch.Tensor], texts: dict[str, str], name: str) -> Path:
        """Write a whole file into the folder. Raises OSError, SafetensorError."""
        path = self.path / f"{name}.safetensors"
        # The lock has what the umask allows.
        mode = None if self._lock is None else os.fstat(self._lock).st_mode & 0o777
        write_shard(path, tensors, texts, mode)
        return path

    def pack(self, sources: Mapping[Path, Collection[str] | None]) -> tuple[Path | None, dict[str, str]]:
        """Copy entries, {file: keys, or None for all}, into one new shard: (shard, what was damaged: key -> reason).

        Files that are gone are passed over; what one file has as a failure and another has made is taken as made.
        Tensors are mapped, not read: memory holds no more than the system wants. Raises OSError, SafetensorError.
        """
        tensors: dict[str, torch.Tensor] = {}
        texts: dict[str, str] = {}
        damaged: dict[str, str] = {}
        for path, keys in sources.items():
            try:
                file = open_shard(path, "mmap")
            except FileNotFoundError:
                continue
            except Damage as damage:
                damaged[path.stem] = str(damage)
                continue
            for key in file.texts if keys is None else keys:
                if key in texts and key not in file.names:
                    continue
                try:
                    entry = file.read(key)
                except FileNotFoundError:
                    continue
                except Damage as damage:
                    damaged[key] = str(damage)
                    continue
                tensors |= {f"{key}/{name}": tensor for name, tensor in entry.items()}
                texts[key] = file.texts[key]
        if not texts:
            return None, damaged
        packed = self.save(tensors, texts, "packed")
        with open(packed, "rb") as file_on_disk:
            os.fsync(file_on_disk)  # what it was made of is removed next
        shard = self.path.parent / f"{uuid.uuid4().hex}.safetensors"
        os.rename(packed, shard)
        return shard, damaged

    def clear(self) -> None:
        """Remove all that is in the folder but the lock."""
        for name in names_in(self.path):
            if name != _LOCK:
                (self.path / name).unlink(missing_ok=True)

    def remove(self) -> None:
        """Clear and remove the folder, and let go of the lock."""
        self.clear()
        self.release()  # before it is removed: NFS keeps a file that is open, and with it the folder
        (self.path / _LOCK).unlink(missing_ok=True)
        with suppress(OSError):  # an adopter was quicker, or about to
            self.path.rmdir()

    def release(self) -> None:
        """Let go of the lock; the next writer may adopt the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def new_staging(folder: Path) -> Staging:
    """A folder of one's own. Raises OSError."""
    while True:
        path = folder / f"{_STAGING}{uuid.uuid4().hex}"
        path.mkdir(parents=True)
        if (lock := _take_lock(path)) is not None:  # else an adopter was quicker, and has removed it
            return Staging(path, lock[0])


def _adopted_staging(path: Path) -> Staging | None:
    """The folder of a dead writer; None where the writer lives, or where that cannot be told. Raises OSError."""
    lock = _take_lock(path)
    if lock is None:
        return None
    descriptor, is_locked = lock
    if not is_locked:
        os.close(descriptor)
        return None
    return Staging(path, descriptor)


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _take_lock(staging: Path) -> tuple[int, bool] | None:
    """(descriptor, is it locked: False where the file system has no locks); None where another has it or removed it."""
    try:
        descriptor = os.open(staging / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_locked = True
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            os.close(descriptor)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return None
            raise
        is_locked = False
    if not _is_same_file(descriptor, staging / _LOCK):  # removed between open and lock
        os.close(descriptor)
        return None
    return descriptor, is_locked


def adopt(root: Path | str, kind: str) -> dict[str, str]:
    """Pack what writers that are dead have left, and clear their temporaries. Returns the damaged: key -> reason.

    Where the file system has no locks, nobody can be told to be dead: all stays, and is read from there. Raises
    UserError where the folder cannot be written.
    """
    folder = Path(root) / kind
    damaged: dict[str, str] = {}
    packed: set[str] | None = None
    for path in staging_folders(folder):
        with storing(folder):
            staging = _adopted_staging(path)
        if staging is None:
            continue
        try:
            files = shards_in(path)
            if files and packed is None:  # a kill between packing and clearing left entries twice
                packed = {key for shard in shards_in(folder) for key in _made_in(shard)}
            wanted = [file for file in files if file.stem not in (packed or ())]
            with storing(folder, sum(file.stat().st_size for file in wanted)):
                damaged |= staging.pack(dict.fromkeys(wanted))[1]
                staging.remove()
        finally:
            staging.release()
    return damaged


def _made_in(shard: Path) -> list[str]:
    # Not the failures: what one writer could not make, another may have staged.
    contents = list_shard(shard)
    return contents.keys if isinstance(contents, Contents) else []
