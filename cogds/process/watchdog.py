"""End a process that hangs, because a job that hangs costs as much as one that trains, and report where it hangs.

A thread counts the time in which this process runs without progress. If C code hangs and holds Python's global
interpreter lock (GIL), that thread hangs too, and a small guard process notices that its heartbeats stop.
`faulthandler.dump_traceback_later` cannot replace the guard: it also counts time in which a process is suspended (SLURM
suspends jobs, debuggers stop processes), and would end the process when it continues, with exit code 1.
"""

import contextlib
import faulthandler
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from cogds.errors import EXIT_HUNG
from cogds.files import whole_file
from cogds.process.signals import block_stop_signals, run_with_timeout, write_stderr

MAX_TICK_S = 5.0  # with a short limit, ticks are shorter
DESCRIBE_TIMEOUT_S = 5.0
REPORT_TIMEOUT_S = 20.0  # the report itself may hang, for example on the disk that caused the hang
DUMP_SIGNAL = signal.SIGRTMIN + 7  # prints the stacks of all threads, even if the GIL is held
_WATCHING, _RESTING = b"w", b"r"
_GUARD_CODE = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from cogds.process.watchdog import _guard; "
    "_guard(*json.loads(sys.argv[2]))"
)


class Watchdog:
    """Ends this process if it makes no progress for `limit_s`, and reports where it hangs. One per process.

    Only time in which the process runs counts, not time in which it is suspended. A hung process exits with EXIT_HUNG,
    after writing the stacks of all threads to stderr and to `folder`/hung-rank-N.txt. If the GIL is held, SIGKILL ends
    it up to 30 s later, and the stacks are only on stderr.
    """

    def __init__(self, rank: int, limit_s: float, folder: Path) -> None:
        self._rank, self._limit_s, self._folder = rank, limit_s, folder
        self._tick_s = min(MAX_TICK_S, limit_s / 8)
        # A new list for each activity. Another list means progress.
        self._activity: list[Callable[[], str]] | None = None
        self._is_closing = threading.Event()
        faulthandler.register(DUMP_SIGNAL, file=2, all_threads=True)
        self._socket, guard_socket = socket.socketpair()
        self._socket.setblocking(False)
        arguments = json.dumps([os.getpid(), rank, limit_s, self._tick_s])
        with guard_socket, block_stop_signals():
            self._guard = subprocess.Popen(
                [sys.executable, "-c", _GUARD_CODE, json.dumps(sys.path), arguments], stdin=guard_socket.fileno()
            )
        self._thread = threading.Thread(target=self._run, daemon=True, name="watchdog")
        self._thread.start()

    def watch(self, describe: Callable[[], str]) -> None:
        """Restart the clock for a new activity. `describe` returns its description and is called only for a report."""
        is_first, self._activity = self._activity is None, [describe]
        if is_first:
            self._send_heartbeat(_WATCHING)

    def describe(self) -> str:
        """Describe the current activity."""
        activity = self._activity
        return activity[0]() if activity else "finishing"

    def rest(self) -> None:
        """Stop the clock until the next `watch`."""
        self._activity = None
        self._send_heartbeat(_RESTING)

    def close(self) -> None:
        """End the thread and the guard process. May be called twice."""
        self._is_closing.set()
        self._thread.join()
        self._guard.kill()
        self._guard.wait()
        self._socket.close()
        faulthandler.unregister(DUMP_SIGNAL)

    def _send_heartbeat(self, heartbeat: bytes) -> None:
        with contextlib.suppress(OSError):  # the guard is gone or suspended; the thread works without it
            self._socket.send(heartbeat)

    def _run(self) -> None:
        last_activity: list[Callable[[], str]] | None = None
        hung_s, last_tick = 0.0, time.monotonic()
        while not self._is_closing.wait(self._tick_s):
            now = time.monotonic()
            activity = self._activity
            if activity is not last_activity:
                last_activity, hung_s = activity, 0.0
            else:
                hung_s += running_time(now - last_tick, self._tick_s)
            last_tick = now
            self._send_heartbeat(_RESTING if activity is None else _WATCHING)
            if activity is not None and hung_s >= self._limit_s:
                self._exit(activity[0], hung_s)

    def _exit(self, describe: Callable[[], str], hung_s: float) -> None:
        try:
            activity = run_with_timeout(describe, DESCRIBE_TIMEOUT_S, "an activity that cannot be described")
            run_with_timeout(functools.partial(self._report, activity, hung_s), REPORT_TIMEOUT_S, None)
        finally:
            os._exit(EXIT_HUNG)

    def _report(self, activity: str, hung_s: float) -> None:
        file = self._folder / f"hung-rank-{self._rank}.txt"
        text = (
            f"rank {self._rank} ({socket.gethostname()}, process {os.getpid()}) hangs: {activity}, for {hung_s:.0f} s "
            f"(train.step_timeout_s is {self._limit_s:g}). It ends with exit code {EXIT_HUNG}; its stacks are below "
            f"and in {file}. Run the same command again to continue from the last checkpoint. To find the cause, look "
            "for the rank whose stack differs from the others, and check its node."
        )
        write_stderr(text)
        faulthandler.dump_traceback(2)
        with whole_file(file) as partial, partial.open("w") as opened:
            print(text, file=opened, flush=True)
            faulthandler.dump_traceback(opened)


def running_time(elapsed_s: float, tick_s: float) -> float:
    """Return how much of the time between two ticks counts. More than two ticks means that the process did not run."""
    return min(elapsed_s, 2 * tick_s)


# ------------------------------------------------------------------------------------------------ the guard process


def _guard(parent: int, rank: int, limit_s: float, tick_s: float) -> None:
    """Run until the parent ends. Kill it if its heartbeats stop for too long."""
    poll = select.poll()
    poll.register(0, select.POLLIN)
    patience_s = limit_s + min(30.0, 4 * limit_s)  # the thread's own report comes first
    poll_s = min(1.0, tick_s)
    is_watching, silent_s, last_poll = False, 0.0, time.monotonic()
    while os.getppid() == parent:
        if poll.poll(poll_s * 1000):
            heartbeats = os.read(0, 4096)
            if not heartbeats:
                return
            is_watching, silent_s = heartbeats.endswith(_WATCHING), 0.0
        elif not _is_suspended(parent):
            silent_s += running_time(time.monotonic() - last_poll, poll_s)
        last_poll = time.monotonic()
        if is_watching and silent_s >= patience_s:
            write_stderr(
                f"rank {rank} ({socket.gethostname()}, process {parent}) hangs for {silent_s:.0f} s in a library that "
                "holds Python's GIL (train.step_timeout_s). It is killed; its stacks are below. Run the same command "
                "again to continue from the last checkpoint."
            )
            with contextlib.suppress(ProcessLookupError):
                os.kill(parent, DUMP_SIGNAL)
                time.sleep(2.0)
                os.kill(parent, signal.SIGKILL)


def _is_suspended(pid: int) -> bool:
    """Whether a process is suspended, or stopped by a debugger."""
    try:
        state = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0]  # bytes: see signals._parent
    except OSError:
        return True
    return state in b"Tt"
