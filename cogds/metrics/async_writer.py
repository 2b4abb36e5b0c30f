"""Writes metrics in a background thread, so that a full, slow or hung disk neither ends a run nor delays a step.

    writer, file = AsyncWriter(), AppendFile(path)
    writer.submit(file, [b"..."])
    writer.close()

TensorBoard's own writer is not used: its thread loses what it could not write, raises on the next call, and then
writes nothing more.
"""

import atexit
import contextlib
import logging
import math
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from cogds.errors import brief
from cogds.process.logs import log_failure

logger = logging.getLogger(__name__)

MAX_PENDING_BYTES = 256 << 20  # records kept while the disk refuses them
MAX_QUEUED = 1000  # submissions kept while the disk does not answer
WARN_INTERVAL_S = 60.0
CLOSE_TIMEOUT_S = 60.0
EXIT_TIMEOUT_S = 5.0  # if an error ends the run before `close`


class Sink(Protocol):
    """Where an AsyncWriter writes records."""

    @property
    def path(self) -> Path | str:
        """Name used in messages."""

    def write(self, records: Sequence[bytes] = ()) -> None:
        """Write the records after those that could not be written before. Never raises because of a failing disk."""

    def close(self) -> None:
        """Try once more to write the records that could not be written before."""


class AppendFile:
    """Appends whole records to a file. What the disk refuses is kept, reported, and written with the next records.

    The file is opened for each write: a file that was kept open would be written in a folder that is gone.
    """

    def __init__(self, path: Path, header: bytes = b"", num_folders: int = 1) -> None:
        """header: first bytes of the file. num_folders: how many of its folders may be created, from the innermost."""
        self.path, self.num_lost = path, 0
        self._folders = list(path.parents)[:num_folders][::-1]
        self._header = header
        self._pending, self._pending_bytes = deque[bytes](), 0
        self._whole_bytes: int | None = None  # after a failed write: size of the file's complete records
        self._warned_at = -math.inf

    def write(self, records: Sequence[bytes] = ()) -> None:
        """Append the records, after those that are pending. Never raises OSError."""
        self._pending.extend(records)
        self._pending_bytes += sum(map(len, records))
        while self._pending_bytes > MAX_PENDING_BYTES and len(self._pending) > 1:
            self._pending_bytes -= len(self._pending.popleft())
            self.num_lost += 1
        try:
            self._append(b"".join(self._pending))
        except OSError as error:
            if time.monotonic() - self._warned_at >= WARN_INTERVAL_S:
                self._warned_at = time.monotonic()
                logger.warning(
                    f"{self.path}: cannot be written ({error.strerror or error}); {len(self._pending)} records wait"
                    f"{self._losses()}. Training continues. Make room or correct the permissions."
                )
            return
        if self._warned_at > -math.inf:
            logger.warning(f"{self.path}: is written again, with {len(self._pending)} records{self._losses()}.")
            self._warned_at = -math.inf
        self._pending.clear()
        self._pending_bytes = 0

    def close(self) -> None:
        """Try once more, and report what is left."""
        if self._pending:
            self.write()
        if self._pending:
            logger.warning(f"{self.path}: the last {len(self._pending)} records are not written{self._losses()}.")

    def _losses(self) -> str:
        return f", {self.num_lost} older ones are lost" if self.num_lost else ""

    def _append(self, records: bytes) -> None:
        for folder in self._folders:
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
        try:
            with self.path.open("ab") as file:  # a network disk may say that it is full only when the file is closed
                size = file.seek(0, os.SEEK_END)
                if self._whole_bytes is not None and self._whole_bytes < size:
                    size = file.truncate(self._whole_bytes)
                self._whole_bytes = size
                file.write(records if size else self._header + records)
        except OSError:
            if self._whole_bytes is not None:
                with contextlib.suppress(OSError):  # else the next call does it
                    os.truncate(self.path, self._whole_bytes)
            raise
        self._whole_bytes = None


class AsyncWriter:
    """A thread that writes records to sinks, in order. A disk that hangs holds up only this thread."""

    def __init__(self) -> None:
        self._queue: queue.Queue[tuple[Sink, Sequence[bytes]] | None] = queue.Queue(MAX_QUEUED)
        self._sinks: list[Sink] = []
        self._num_dropped = 0
        atexit.register(self.drain, EXIT_TIMEOUT_S)
        # A daemon, so that a disk that never answers does not keep the process alive.
        threading.Thread(target=self._run, name="async-writer", daemon=True).start()

    def submit(self, sink: Sink, records: Sequence[bytes] = ()) -> None:
        """Have the records written and return at once. Records are dropped and counted while the queue is full."""
        if sink not in self._sinks:
            self._sinks.append(sink)
        try:
            self._queue.put_nowait((sink, records))
        except queue.Full:
            self._num_dropped += len(records)

    def drain(self, timeout_s: float) -> bool:
        """Wait until everything submitted has been tried; return False if that takes longer than `timeout_s`."""
        with self._queue.all_tasks_done:
            return self._queue.all_tasks_done.wait_for(lambda: not self._queue.unfinished_tasks, timeout_s)

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Wait for the thread, have the sinks try once more, and report what is lost."""
        atexit.unregister(self.drain)
        in_time = self.drain(timeout_s)
        if in_time:
            for sink in self._sinks:
                sink.close()
            self._queue.put(None)
        if self._num_dropped or not in_time:
            num_queued = sum(len(item[1]) for item in list(self._queue.queue) if item)
            logger.warning(
                f"{', '.join(str(sink.path) for sink in self._sinks)}: too slow; at least "
                f"{self._num_dropped + num_queued} records are not written."
            )

    def _run(self) -> None:
        while item := self._queue.get():
            sink, records = item
            try:
                sink.write(records)
            except Exception as error:  # a bug in one sink must not stop the others
                log_failure(logger, f"{sink.path}: {brief(error)}", error)
            finally:
                self._queue.task_done()
