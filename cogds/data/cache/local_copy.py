"""Copies on this node of entries that a cache at a URL holds, in a folder of bounded size.

Each entry is a shard of its own, `<kind>/<key>.safetensors`, which is complete or absent. All ranks and runs of a node
share the folder. If it grows above its bound, the entries that were not used for the longest time are removed. It may
be deleted at any time.
"""

import fcntl
import logging
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError

from cogds.data.cache.shard import DamageError, entry_record, open_shard, write_file
from cogds.errors import brief
from cogds.files import is_temporary, remove_abandoned

logger = logging.getLogger(__name__)

# A process looks whether the folder is too large after it has written this share of the bound; then this share stays.
CHECKED_SHARE, KEPT_SHARE = 1 / 400, 0.9


def default_folder() -> str:
    """The folder of this user in the system's folder for temporary files."""
    return os.path.join(tempfile.gettempdir(), f"cogds-{os.getuid()}", "cache")


class LocalCopy:
    """A folder of entries. max_bytes: its bound, which may be exceeded by a few percent for a moment."""

    def __init__(self, folder: Path | str, max_bytes: int):
        self.folder, self.max_bytes = Path(folder), max_bytes
        self._num_unchecked, self._is_usable = 0, True

    def _path(self, kind: str, key: str) -> Path:
        return self.folder / kind / f"{key}.safetensors"

    def touch(self, kind: str, key: str) -> int:
        """Mark an entry as used. Returns the size of its file, 0 if there is none."""
        path = self._path(kind, key)
        try:
            os.utime(path)
            return path.stat().st_size
        except OSError:
            return 0

    def read(self, kind: str, key: str) -> dict[str, torch.Tensor] | None:
        """Read and check the tensors of an entry. Returns None if it is missing; removes it if it is damaged."""
        if not self.touch(kind, key):
            return None
        path = self._path(kind, key)
        try:
            return open_shard(path).read(key)
        except FileNotFoundError:  # removed since
            return None
        except DamageError as error:
            logger.warning(f"{path}: the local copy is damaged ({error}) and is removed; the original is read again")
            with suppress(OSError):
                path.unlink()
            return None

    def write(self, kind: str, key: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Add an entry. If that is not possible, log a warning and stop adding entries."""
        if not self._is_usable:
            return
        named = {f"{key}/{name}": tensor for name, tensor in tensors.items()}
        try:
            write_file(self._path(kind, key), named, {key: entry_record(key, tensors)}, is_synced=False)
            self._num_unchecked += sum(tensor.nbytes for tensor in tensors.values())
            if self._num_unchecked >= self.max_bytes * CHECKED_SHARE:
                self._num_unchecked = 0
                self.shrink()
        except (OSError, SafetensorError) as error:
            self._is_usable = False
            logger.warning(
                f"data.local_cache_dir: cannot write to {self.folder} ({brief(error)}); entries are read from "
                "data.cache_dir instead. Free some space, or lower data.local_cache_gb."
            )

    def shrink(self) -> None:
        """Remove the least recently used entries if the folder is above its bound. Raises OSError."""
        with open(self.folder / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # another process is at it
                return
            files = []
            for kind in (entry.path for entry in os.scandir(self.folder) if entry.is_dir()):
                remove_abandoned(kind)
                for entry in os.scandir(kind):
                    if not is_temporary(entry.name):
                        with suppress(FileNotFoundError):
                            files.append((entry.stat().st_mtime_ns, entry.stat().st_size, entry.path))
            num_bytes = sum(size for _, size, _ in files)
            if num_bytes <= self.max_bytes:
                return
            for _, size, path in sorted(files):
                with suppress(FileNotFoundError):
                    os.unlink(path)
                num_bytes -= size
                if num_bytes <= self.max_bytes * KEPT_SHARE:
                    return
