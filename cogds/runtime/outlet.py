"""Records on their way to the end of a file, so that no disk ends a run or holds up a step.

`Outlet` appends and never raises: what cannot be written is kept, said, and written later. `Courier` is the thread
that does it while training goes on.
"""

import contextlib
import math
import os
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from cogds.errors import UserError, brief

MAX_KEPT = 10_000  # records that wait for a disk, about 10 MB of scalars
MAX_KEPT_BYTES = 256 << 20  # and of pictures
WARN_EVERY_S = 60.0
CLOSE_S = 60.0  # how long the end of a run waits for a disk that does not answer


def warn(text: str, error: BaseException | None = None) -> None:
    """Say it on stderr, which may be a file on the same full disk, or a pipe whose reader is gone.

    error: what was caught although it may be a bug, since it must not end the run: its traceback comes with it, but for
    a UserError and an OSError, which are none.
    """
    lines = [] if error is None or isinstance(error, UserError | OSError) else traceback.format_exception(error)
    with contextlib.suppress(OSError, ValueError):
        print(f"{''.join(lines)}warning: {text}", file=sys.stderr, flush=True)


class Outlet:
    """Records on their way to the end of one file. What cannot be written is kept and goes before the next ones.

    It never raises. The file is opened for each writing: one that was held open would go on in a folder that is
    gone. TensorBoard's own writer is not used: its thread loses what it could not write, says so with the next call,
    and is dead from then on.
    """

    def __init__(self, path: Path, head: bytes = b"") -> None:
        """head: what the file begins with. Its folder is made where that folder's parent is there."""
        self.path, self.num_lost = path, 0
        self._head, self._kept, self._kept_bytes = head, deque[bytes](), 0
        self._torn_at: int | None = None  # what stands from this byte on was written in part
        self._warned_at = -math.inf

    def write(self, records: Sequence[bytes] = ()) -> None:
        """Append the records, after those that were kept."""
        self._kept.extend(records)
        self._kept_bytes += sum(map(len, records))
        while len(self._kept) > MAX_KEPT or (self._kept_bytes > MAX_KEPT_BYTES and len(self._kept) > 1):
            self._kept_bytes -= len(self._kept.popleft())
            self.num_lost += 1
        try:
            self._append(b"".join(self._kept))
        except OSError as error:
            if time.monotonic() - self._warned_at >= WARN_EVERY_S:
                self._warned_at = time.monotonic()
                warn(
                    f"{self.path} cannot be written ({error.strerror or error}): training goes on; "
                    f"{len(self._kept)} records wait for the disk{self._losses()}"
                )
            return
        if self._warned_at > -math.inf:
            warn(f"{self.path} is written again, {len(self._kept)} records with it{self._losses()}")
            self._warned_at = -math.inf
        self._kept.clear()
        self._kept_bytes = 0

    def close(self) -> None:
        """Try a last time, and say what is left unwritten."""
        if self._kept:
            self.write()
        if num := len(self._kept):
            warn(f"the last {num} records of {self.path} could not be written{self._losses()}")

    def _losses(self) -> str:
        return f"; {self.num_lost} older ones are lost" if self.num_lost else ""

    def _append(self, records: bytes) -> None:
        with contextlib.suppress(FileExistsError):
            self.path.parent.mkdir()
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            if self._torn_at is not None and self._torn_at < size:
                size = self._torn_at
                os.ftruncate(descriptor, size)
            rest = memoryview(records if size else self._head + records)
            self._torn_at, end = size, size
            try:
                while rest:
                    num = os.pwrite(descriptor, rest, end)
                    rest, end = rest[num:], end + num
            except OSError:
                with contextlib.suppress(OSError):  # else the next call, which knows where
                    os.ftruncate(descriptor, size)
                raise
        finally:
            os.close(descriptor)  # where a network disk says that it is full
        self._torn_at = None


class Sink(Protocol):
    """What a Courier hands records to."""

    @property
    def path(self) -> Path | str:
        """Where they go, for people."""

    def write(self, records: Sequence[bytes] = ()) -> None:
        """Take the records. Never raises for the place they go to."""

    def close(self) -> None:
        """Try a last time what was kept."""


class Courier:
    """One thread that hands records to outlets: a disk that takes a minute holds up nobody but it.

    What waits for it is bounded; past that the newest records are dropped and counted.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[tuple[Sink, Sequence[bytes]]] = deque()
        self._waiting_bytes = self._num_dropped = 0
        self._outlets: list[Sink] = []
        self._busy = self._ended = False
        # A daemon: a disk that never answers again must not keep the process.
        threading.Thread(target=self._work, name="cogds-monitor", daemon=True).start()

    def hand(self, outlet: Sink, records: Sequence[bytes] = ()) -> None:
        """Have the records written. Returns at once."""
        size = sum(map(len, records))
        with self._changed:
            if self._waiting and (self._waiting_bytes + size > MAX_KEPT_BYTES or len(self._waiting) >= MAX_KEPT):
                self._num_dropped += len(records)
                return
            if outlet not in self._outlets:
                self._outlets.append(outlet)
            self._waiting.append((outlet, records))
            self._waiting_bytes += size
            self._changed.notify_all()

    def settle(self, timeout_s: float = CLOSE_S) -> bool:
        """Wait until all of it has been tried; False where the disk took longer than this."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting and not self._busy, timeout_s)

    def close(self, timeout_s: float = CLOSE_S) -> None:
        """Wait for what is under way, have what was refused tried a last time, and say what is lost."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
            in_time = self._changed.wait_for(lambda: not self._waiting and not self._busy, timeout_s)
            num_left = sum(len(records) for _, records in self._waiting) + self._num_dropped
        if in_time:
            for outlet in self._outlets:
                outlet.close()
        if num_left or not in_time:
            places = " and ".join(str(outlet.path) for outlet in self._outlets)
            warn(f"{places}: too slow; {num_left} records or more were not written")

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._ended)
                if not self._waiting:
                    return
                outlet, records = self._waiting.popleft()
                self._waiting_bytes -= sum(map(len, records))
                self._busy = True
            try:
                outlet.write(records)
            except Exception as error:  # a bug here must not stop what comes after
                warn(f"{outlet.path}: {brief(error)}", error)
            with self._changed:
                self._busy = False
                self._changed.notify_all()
