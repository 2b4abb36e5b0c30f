"""A lock on the output folder, because two runs in one folder would mix their checkpoints and metrics."""

import contextlib
import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from cogds.distributed.collectives import rank0_only
from cogds.distributed.world import World
from cogds.errors import UserError

logger = logging.getLogger(__name__)

LOCK_FILE = "run.lock"
# A run that was just killed or has lost its node may still hold the lock, and SLURM starts the next one quickly.
WAIT_S = 120.0
_HELD = (errno.EWOULDBLOCK, errno.EACCES)
_descriptors: set[int] = set()  # of the locks that this process holds


def _close_all() -> None:
    """Close the locks in a forked child, such as a data loader's worker, which may outlive a killed run."""
    while _descriptors:
        os.close(_descriptors.pop())


os.register_at_fork(after_in_child=_close_all)


@contextlib.contextmanager
def hold_run_lock(world: World, folder: Path, wait_s: float = WAIT_S, key: str = "output_dir") -> Iterator[None]:
    """Keep every other run from writing into the folder while the block runs. Collective.

    key: the setting that names the folder, for the error.

    The kernel releases the lock when the process that holds it ends for any reason. On a file system without locks,
    the run continues with a warning.

    Raises:
        UserError: Another run still holds the lock after `wait_s`.
    """
    descriptor = rank0_only(world, lambda: _acquire(folder, wait_s, key))
    try:
        yield
    finally:
        if descriptor is not None:
            _release(descriptor)


def _acquire(folder: Path, wait_s: float, key: str) -> int:
    descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    _descriptors.add(descriptor)
    try:
        _wait_for(descriptor, folder, wait_s, key)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    except BaseException:
        _release(descriptor)
        raise
    return descriptor


def _release(descriptor: int) -> None:
    if descriptor in _descriptors:  # else this is a forked child that is about to end
        _descriptors.remove(descriptor)
        os.close(descriptor)


def _wait_for(descriptor: int, folder: Path, wait_s: float, key: str) -> None:
    start, has_logged = time.monotonic(), False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in _HELD:
                logger.warning(
                    f"{folder}: the file system has no locks ({error}). Make sure that no other run uses the folder."
                )
                return
        holder = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
        if time.monotonic() - start > wait_s:
            raise UserError(
                f"{key}: another run ({holder}) is writing into {folder}. Wait for it, end it, or choose another {key}."
            )
        if not has_logged:
            logger.info(f"{folder}: another run ({holder}) is still writing into it; waiting")
            has_logged = True
        time.sleep(min(1.0, wait_s))
