"""What ends a process that is stuck, and says where: a job that hangs costs as much as one that trains.

A thread counts the time that this process runs without a sign of progress. Where stuck C code holds the interpreter's
lock that thread stands still too: a small process of its own sees its beats stop. (faulthandler's timer would not do:
it takes the time that a process was suspended for time that it hung.)
"""

import contextlib
import faulthandler
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
from cogds.process.signals import run_bounded, say
from cogds.process.worker_pool import deaf_children

TICK_S = 5.0  # at most: a short limit ticks faster
NAME_S = 5.0  # how long what() may take
REPORT_S = 20.0  # how long the report may: a disk that hangs may be why
DUMP_SIGNAL = signal.SIGRTMIN + 7  # prints all stacks, also where the interpreter's lock is held
_WATCHING, _RESTING = b"w", b"r"
_BOOTSTRAP = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from cogds.process.watchdog import _guard; "
    "_guard(*json.loads(sys.argv[2]))"
)


class Watchdog:
    """Ends a process that is stuck, and says where.

    limit_s: of time in which this process itself ran; while it is suspended nothing counts. What is stuck ends with
    EXIT_HUNG, the stacks of all threads on stderr and in `folder`/hung-rank-N.txt. Where the interpreter's lock is
    held it ends by SIGKILL half a minute later, with the stacks on stderr only. One in a process.
    """

    def __init__(self, rank: int, limit_s: float, folder: Path) -> None:
        self._rank, self._limit_s, self._folder = rank, limit_s, folder
        self._tick_s = min(TICK_S, limit_s / 8)
        # A fresh list for each watch: its identity is the sign of progress.
        self._watched: list[Callable[[], str]] | None = None
        self._closing = threading.Event()
        faulthandler.register(DUMP_SIGNAL, file=2, all_threads=True)
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        arguments = json.dumps([os.getpid(), rank, limit_s, self._tick_s])
        with theirs, deaf_children():
            self._guard = subprocess.Popen(
                [sys.executable, "-c", _BOOTSTRAP, json.dumps(sys.path), arguments], stdin=theirs.fileno()
            )
        self._socket = ours
        self._thread = threading.Thread(target=self._run, daemon=True, name="watchdog")
        self._thread.start()

    def watch(self, what: Callable[[], str]) -> None:
        """A new thing is being done: the clock starts anew. what() names it when that is needed."""
        resting, self._watched = self._watched is None, [what]
        if resting:
            self._beat(_WATCHING)

    def rest(self) -> None:
        """Nothing is watched from here on."""
        self._watched = None
        self._beat(_RESTING)

    def close(self) -> None:
        """End the thread and the process beside this one. May be called twice."""
        self._closing.set()
        self._thread.join()
        self._guard.kill()
        self._guard.wait()
        self._socket.close()
        faulthandler.unregister(DUMP_SIGNAL)

    def _beat(self, sign: bytes) -> None:
        with contextlib.suppress(OSError):  # the guard is gone, or stopped: the thread does without
            self._socket.send(sign)

    def _run(self) -> None:
        seen: list[Callable[[], str]] | None = None
        ran_s, before = 0.0, time.monotonic()
        while not self._closing.wait(self._tick_s):
            now = time.monotonic()
            watched = self._watched
            if watched is not seen:
                seen, ran_s = watched, 0.0
            else:
                ran_s += time_run(now - before, self._tick_s)
            before = now
            self._beat(_RESTING if watched is None else _WATCHING)
            if watched is not None and ran_s >= self._limit_s:
                self._end(watched[0], ran_s)

    def _end(self, what: Callable[[], str], ran_s: float) -> None:
        try:
            names: list[str] = []
            run_bounded(lambda: names.append(what()), NAME_S)
            name = names[0] if names else "what it does cannot say what it is"
            run_bounded(lambda: self._report(name, ran_s), REPORT_S)
        finally:
            os._exit(EXIT_HUNG)

    def _report(self, name: str, ran_s: float) -> None:
        file = self._folder / f"hung-rank-{self._rank}.txt"
        text = (
            f"{_who(self._rank)} is stuck: {name}, for {ran_s:.0f} s (train.step_timeout_s is {self._limit_s:g}). It "
            f"ends here with code {EXIT_HUNG}; where it stood is below and in {file}. The same command goes on from "
            "the last checkpoint; look for the rank whose stack differs from the others', and for its node"
        )
        say(text)
        faulthandler.dump_traceback(2)
        with whole_file(file) as partial, partial.open("w") as opened:
            print(text, file=opened, flush=True)
            faulthandler.dump_traceback(opened)


def time_run(elapsed_s: float, tick_s: float) -> float:
    """Of the seconds between two ticks, those that count: after more than two ticks the process did not run."""
    return min(elapsed_s, 2 * tick_s)


def _who(rank: int) -> str:
    return f"rank {rank} ({socket.gethostname()}, process {os.getpid()})"


# ------------------------------------------------------------------------------------------ in the process beside


def _guard(parent: int, rank: int, limit_s: float, tick_s: float) -> None:
    """Its life: until the parent is gone, or has not beaten for so long that it has to go."""
    poll = select.poll()
    poll.register(0, select.POLLIN)
    patience_s = limit_s + min(30.0, 4 * limit_s)  # the thread's own report comes first
    look_s = min(1.0, tick_s)
    watching, silent_s, before = False, 0.0, time.monotonic()
    while os.getppid() == parent:
        if poll.poll(look_s * 1000):
            signs = os.read(0, 4096)
            if not signs:
                return
            watching, silent_s = signs.endswith(_WATCHING), 0.0
        elif not _is_stopped(parent):
            silent_s += time_run(time.monotonic() - before, look_s)
        before = time.monotonic()
        if watching and silent_s >= patience_s:
            say(
                f"rank {rank} ({socket.gethostname()}, process {parent}) is stuck for {silent_s:.0f} s in a library "
                "that holds Python's lock (train.step_timeout_s); it is killed, and where it stood is below. The same "
                "command goes on from the last checkpoint"
            )
            with contextlib.suppress(ProcessLookupError):
                os.kill(parent, DUMP_SIGNAL)
                time.sleep(2.0)
                os.kill(parent, signal.SIGKILL)


def _is_stopped(pid: int) -> bool:
    """Whether a process is suspended, or held by a debugger."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return True
    return state in "Tt"
