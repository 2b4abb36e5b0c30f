"""Whether this process has been asked to stop: by a signal, or by the death of the launcher that started it.

A thread hears it: the main thread may wait in a collective for minutes, and no Python handler runs meanwhile. The
interpreter's own handler, in C, writes the signal's number to that thread at once.
"""

import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cogds.errors import EXIT_INTERRUPTED
from cogds.process.worker_pool import STOP_SIGNALS

LAUNCHER_DIED = "its launcher has died"
SAME_REQUEST_S = 3.0  # launchers send two signals in a row, and Ctrl-C comes from the terminal and from the launcher
LOOK_S = 1.0  # how often the launcher is looked at
SAY_S = 2.0  # a pipe that nobody reads holds up the end of a process no longer
# These come first and a signal that ends the job follows, while a save still has time: nobody is impatient.
_WARNINGS = ("SIGUSR1", LAUNCHER_DIED)
# How the command of a process that launches ranks looks: `python -u -m MODULE` or `python FILE`; what follows are the
# script's arguments. `deepspeed` starts a launcher on every node, and with one node it is that launcher's parent.
_LAUNCHERS = (
    "deepspeed.launcher.launch", "deepspeed/launcher/launch.py", "torch.distributed.run", "/torchrun",
    "deepspeed.launcher.runner", "deepspeed/launcher/runner.py", "/deepspeed",
)  # fmt: skip
_COMMAND_WORDS = 4


def find_launchers() -> tuple[int, ...]:
    """The processes above this one that launch ranks, the nearest first: SLURM's daemon of the job step, torchrun, or
    DeepSpeed's launcher on this node and the `deepspeed` that started it."""
    found: list[int] = []
    while (parent := _parent(found[-1] if found else os.getpid())) and _launches(parent):
        found.append(parent)
    return tuple(found)


def _parent(pid: int) -> int:
    """0 where there is none, or the process is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _launches(pid: int) -> bool:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return False
    # SLURM itself does not miss its daemon, and would never end the rank.
    return command.startswith("slurmstepd: ") or any(
        word.endswith(_LAUNCHERS) for word in command.split("\0")[:_COMMAND_WORDS]
    )


def run_bounded(function: Callable[[], Any], bound_s: float) -> None:
    """Run `function` in a thread and go on after `bound_s` at the latest. What it raises is not heard."""

    def run() -> None:
        with contextlib.suppress(BaseException):
            function()

    with contextlib.suppress(RuntimeError):  # no thread can be had
        thread = threading.Thread(target=run, daemon=True, name="bounded")
        thread.start()
        thread.join(bound_s)


def say(text: str) -> None:
    """A line on stderr, past Python's own buffers: whoever holds their locks may be stuck."""
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode())


class Interrupt:
    """Whether this process has been asked to stop.

    requested: "" or what asked, such as "SIGTERM" or LAUNCHER_DIED.
    """

    def __init__(self, launchers: Sequence[int] = ()) -> None:
        """launchers: of `find_launchers`, whose death is a request."""
        self.requested = ""
        self._launchers = tuple(launchers)
        self._asked_at, self._deferred = 0.0, False
        self._before: dict[signal.Signals, Any] = {}
        self._mouth, self._ear = socket.socketpair()
        self._mouth.setblocking(False)
        self._thread = threading.Thread(target=self._hear, daemon=True, name="interrupt")

    def listen(self) -> None:
        """From now on SIGTERM, SIGUSR1 and SIGINT are ours. Until `defer` the first one ends the process at once with
        EXIT_INTERRUPTED: while data is prepared there is nothing to save. Once, in the main thread."""
        self._fd_before = signal.set_wakeup_fd(self._mouth.fileno(), warn_on_full_buffer=False)
        # A forked child would speak with its parent's mouth.
        os.register_at_fork(after_in_child=self._fall_silent)
        for number in STOP_SIGNALS:
            self._before[number] = signal.signal(number, _nothing)
            # A library's call that waits is restarted by the kernel, not broken off.
            signal.siginterrupt(number, False)
        self._thread.start()

    def defer(self) -> None:
        """From now on the first request only sets `requested`; one that comes later ends the process at once."""
        self._deferred = True

    def ignore(self) -> None:
        """From now on nothing is heard: what was asked for is done. Python gives its handlers up while it ends, and a
        signal that comes late, of a launcher that ends all ranks, would make another exit code."""
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def close(self) -> None:
        """Give the signals back. May be called twice."""
        if not self._before:
            return
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}
        signal.set_wakeup_fd(self._fd_before)
        self._mouth.close()
        self._thread.join()
        self._ear.close()

    def _fall_silent(self) -> None:
        if self._before:
            signal.set_wakeup_fd(-1)

    def _hear(self) -> None:
        poll = select.poll()
        poll.register(self._ear, select.POLLIN)
        while True:
            if poll.poll(LOOK_S * 1000):
                numbers = self._ear.recv(4096)
                if not numbers:
                    return
                for number in numbers:
                    if number in STOP_SIGNALS:
                        self._ask(signal.Signals(number).name)
            if not self.requested and self._launchers != self._ancestors():
                self._ask(LAUNCHER_DIED)

    def _ancestors(self) -> tuple[int, ...]:
        """As many of the processes above this one as there were launchers: an orphan's are others."""
        found = [os.getpid()]
        for _ in self._launchers:
            found.append(_parent(found[-1]))
        return tuple(found[1:])

    def _ask(self, what: str) -> None:
        if not self._deferred:
            _end(f"{what}: stopping at once, nothing needs saving yet")
        if not self.requested or (self.requested in _WARNINGS and what != self.requested):
            self._asked_at, self.requested = time.monotonic(), what
            say(f"{what}: saving at the end of this step (again to stop at once)")
        elif time.monotonic() - self._asked_at > SAME_REQUEST_S:
            _end(f"{what} again: stopping at once")


def _nothing(number: int, frame: Any) -> None:
    """The thread does what is to be done; without a handler the process would end."""


def _end(text: str) -> None:
    def speak() -> None:
        say(text)
        sys.stdout.flush()

    try:
        run_bounded(speak, SAY_S)
    finally:
        os._exit(EXIT_INTERRUPTED)
