"""Remove stale locks of the C++ extensions that torch compiles when DeepSpeed first uses them.

While a process compiles an extension, a file `lock` is in the extension's folder, and other processes wait until it is
gone. A killed process leaves the file behind, and every later process would wait forever. Two things distinguish the
lock of a running build: ninja and the compilers run in the extension's folder, and every cogds process holds a file
lock that the kernel releases when the process ends.
"""

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

logger = logging.getLogger(__name__)

LOCK_FILE = "cogds.lock"
# A younger lock may belong to a build on another node.
MIN_STALE_AGE_S = 60.0
BUILD_TIMEOUT_S = 900.0
_descriptors: list[int] = []  # file locks, held until the process ends, because it may build an extension at any time


def remove_stale_locks(root: Path) -> None:
    """Remove stale locks from torch's folder of extensions. Call it in every process before an extension may be built.

    If another cogds process uses the folder, perhaps on another node, nothing is removed. Locks of extensions that no
    process of this machine builds are then reported after MIN_STALE_AGE_S.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        _descriptors.append(os.open(root / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666))
    except OSError:  # the folder cannot be written, so nothing is built there
        return
    try:
        fcntl.flock(_descriptors[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        _wait_until(lambda: not _stale_locks(root, MIN_STALE_AGE_S), MIN_STALE_AGE_S)
        for lock in _stale_locks(root):
            logger.warning(
                f"{lock}: no process of this machine builds this DeepSpeed extension. If none on another machine does "
                "either, a killed process left the file and this run will wait forever. Delete the file."
            )
    else:
        # Compilers may outlive the process that started them, and a second build would write the same files.
        _wait_until(lambda: not any(map(_is_being_built, find_locks(root))), BUILD_TIMEOUT_S)
        for lock in _stale_locks(root):
            with contextlib.suppress(OSError):
                lock.unlink()
                logger.warning(f"{lock}: removed. A process was killed while it built this DeepSpeed extension.")
    with contextlib.suppress(OSError):  # the file system has no locks
        fcntl.flock(_descriptors[-1], fcntl.LOCK_SH)


def find_locks(root: Path) -> list[Path]:
    """Return torch's lock files: empty files, one or two folders down."""
    files = [*root.glob("*/lock"), *root.glob("*/*/lock")]
    return [file for file in files if file.is_file() and not file.stat().st_size]


def _stale_locks(root: Path, max_age_s: float = float("inf")) -> list[Path]:
    """Return locks, up to this age, of extensions that no process of this machine builds."""
    locks = []
    for lock in find_locks(root):
        with contextlib.suppress(OSError):  # it has just been removed
            if time.time() - lock.stat().st_mtime < max_age_s and not _is_being_built(lock):
                locks.append(lock)
    return locks


def _is_being_built(lock: Path) -> bool:
    """Whether a process of this machine has the extension's folder as its working directory."""
    folder = str(lock.parent.resolve())
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or belongs to another user
            if os.readlink(process / "cwd") == folder:
                return True
    return False


def _wait_until(condition: Callable[[], bool], timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < end:
        time.sleep(0.5)
