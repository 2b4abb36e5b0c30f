"""Locks of the ops that torch builds for DeepSpeed at their first use.

While one process builds an op, a file `lock` stands beside it, and the others wait until it is gone. A process that is
killed meanwhile leaves it, and every later one would wait for ever. A build has ninja and compilers working in the op's
folder; and every process of ours holds a lock that the kernel takes back from the dead. Where neither is seen, what was
left is removed.
"""

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

logger = logging.getLogger(__name__)

NAME = "cogds.lock"
YOUNG_S = 60.0  # so long a lock of which nothing is known may be of a build on another node
BUILD_S = 900.0
_held: list[int] = []  # for as long as the process lives: ops are built at several moments


def clear_builds(root: Path) -> None:
    """Remove locks of builds that died below torch's folder of built ops. Every process calls it before an op may be
    built.

    Where another process of ours uses the folder too, which may build on another node, nothing is removed: locks of
    which nothing is known after a minute are named on stderr.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        _held.append(os.open(root / NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666))
    except OSError:  # a home that cannot be written: nothing is built there
        return
    try:
        fcntl.flock(_held[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        _await(lambda: not _unknown(root, YOUNG_S), YOUNG_S)
        for lock in _unknown(root):
            logger.warning(
                f"{lock} is there and nobody builds here: if no other machine builds this DeepSpeed op, a "
                "process was killed while it did, and this run will wait for ever: delete the file"
            )
    else:
        # Compilers may have outlived who started them: another build would write the same files.
        _await(lambda: not any(map(_is_built, _locks(root))), BUILD_S)
        for lock in _unknown(root):
            with contextlib.suppress(OSError):
                lock.unlink()
                logger.warning(f"removed {lock}, which a process left that was killed while it built a DeepSpeed op")
    with contextlib.suppress(OSError):  # a file system without such locks
        fcntl.flock(_held[-1], fcntl.LOCK_SH)


def announce_build(root: Path, op: str) -> None:
    """Say that this op will be built, where it has not been: nothing else says it, and it looks like a hang."""
    if not any(root.glob(f"{op}/*.so")) and not any(root.glob(f"*/{op}/*.so")):
        logger.info(f"building DeepSpeed's {op} in {root}, once: a minute, or some on a busy machine")


def _locks(root: Path) -> list[Path]:
    """Where torch puts them: empty files, one or two folders down."""
    found = [*root.glob("*/lock"), *root.glob("*/*/lock")]
    return [lock for lock in found if lock.is_file() and not lock.stat().st_size]


def _unknown(root: Path, younger_than_s: float | None = None) -> list[Path]:
    """Locks of ops that nobody builds on this machine."""
    found = []
    for lock in _locks(root):
        with contextlib.suppress(OSError):  # it has just gone
            young = younger_than_s is None or time.time() - lock.stat().st_mtime < younger_than_s
            if young and not _is_built(lock):
                found.append(lock)
    return found


def _is_built(lock: Path) -> bool:
    """Whether a process of this machine works in the op's folder."""
    folder = str(lock.parent.resolve())
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if os.readlink(process / "cwd") == folder:
                return True
    return False


def _await(condition: Callable[[], bool], bound_s: float) -> None:
    end = time.monotonic() + bound_s
    while not condition() and time.monotonic() < end:
        time.sleep(0.5)
