"""Locks of the ops that torch builds for DeepSpeed at their first use.

While one process builds an op, a file `lock` stands beside it, and the others wait until it is gone. A process that is
killed meanwhile leaves it, and every later one would wait for ever. So every process of ours says that it is there by a
lock that the kernel takes back from the dead: whoever finds nobody else there removes what was left.
"""

import contextlib
import fcntl
import os
import sys
import time
from pathlib import Path

NAME = "cogds.lock"
_held: list[int] = []  # for as long as the process lives: ops are built at several moments


def clear_builds(root: Path) -> None:
    """Remove locks of builds that died, where no other process of ours uses this folder of built ops. Every process
    calls it before an op may be built.

    Where others do, or where the folder cannot be locked, the locks that are there are named on stderr.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        _held.append(os.open(root / NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666))
    except OSError:  # a home that cannot be written: nothing is built there
        return
    try:
        fcntl.flock(_held[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        _tell(root)
    else:
        for lock in root.glob("**/lock"):
            with contextlib.suppress(OSError):
                lock.unlink()
                _say(f"removed {lock}, which a process left that was killed while it built a DeepSpeed op")
    with contextlib.suppress(OSError):  # a file system without such locks
        fcntl.flock(_held[-1], fcntl.LOCK_SH)


def _tell(root: Path) -> None:
    for lock in root.glob("**/lock"):
        with contextlib.suppress(OSError):
            minutes = (time.time() - lock.stat().st_mtime) / 60
            if minutes > 1:  # a build under way is younger
                _say(
                    f"warning: {lock} has been there for {minutes:.0f} minutes: if no other process is building a "
                    "DeepSpeed op, one was killed while it did, and this run will wait for ever: delete the file"
                )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
