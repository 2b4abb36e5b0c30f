"""One run at a time writes into an output folder: two would mix their checkpoints and metrics."""

import contextlib
import errno
import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from cogds.distributed.world import World, on_rank0
from cogds.errors import UserError

LOCK_FILE = "run.lock"
# A run that was killed a moment ago, or has lost its node, still has it: SLURM is quick to start the next.
WAIT_S = 120.0
_HELD = (errno.EWOULDBLOCK, errno.EACCES)
_descriptors: set[int] = set()  # of the locks that this process has taken


def _let_go() -> None:
    """In a forked child, such as a loader's worker: it may outlive a killed run for a while, and must not hold on."""
    while _descriptors:
        os.close(_descriptors.pop())


os.register_at_fork(after_in_child=_let_go)


@contextlib.contextmanager
def only_run(world: World, folder: Path, wait_s: float = WAIT_S) -> Iterator[None]:
    """Inside the block no other run may write into the folder. Collective.

    Raises UserError where another one still does after `wait_s`. The lock goes with the process that holds it, however
    that ends. On a file system that has no locks the run goes on, and says so.
    """
    own: list[int] = []

    def take() -> None:
        descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        own.append(descriptor)
        _descriptors.add(descriptor)
        _wait_for(descriptor, folder, wait_s)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)

    try:
        on_rank0(world, take)
        yield
    finally:
        for descriptor in own:
            if descriptor in _descriptors:  # or this is a forked child, on its way out
                _descriptors.remove(descriptor)
                os.close(descriptor)


def _wait_for(descriptor: int, folder: Path, wait_s: float) -> None:
    start, said = time.monotonic(), False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in _HELD:
                print(f"warning: {folder} has no locks ({error}): see to it that no other run uses it", file=sys.stderr)
                return
        holder = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
        if time.monotonic() - start > wait_s:
            raise UserError(
                f"output_dir: another run is writing into {folder} ({holder}): wait for it, end it, or choose another "
                "output_dir"
            )
        if not said:
            print(f"another run is still writing into {folder} ({holder}): waiting for it", flush=True)
            said = True
        time.sleep(min(1.0, wait_s))
