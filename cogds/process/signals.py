"""Requests to stop this process, which are signals and the death of its launcher.

A thread handles them, because the main thread may wait in a collective for minutes, and Python signal handlers do not
run meanwhile. The interpreter's C handler sends the number of the signal to that thread at once.
"""

import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from cogds.errors import EXIT_INTERRUPTED

T = TypeVar("T")

# Signals that ask a run to stop. A terminal sends Ctrl-C to a whole process group; a launcher or SLURM signals a whole
# process tree. A run that saves first still needs its child processes, and ends them itself (`block_stop_signals`).
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
LAUNCHER_DIED = "its launcher has died"
# Requests within this time count as one: launchers send two signals in a row, and Ctrl-C comes from the terminal and
# from the launcher.
SAME_REQUEST_S = 3.0
LAUNCHER_POLL_S = 1.0
# The longest time that writing to a pipe that nobody reads may delay the end of a process.
MESSAGE_TIMEOUT_S = 2.0
# After one of these, a second signal does not mean "at once": the signal that ends the job follows while there is still
# time to save.
_ADVANCE_WARNINGS = ("SIGUSR1", LAUNCHER_DIED)
# Commands that launch ranks: `python -u -m MODULE` or `python FILE`, then the script's arguments. `deepspeed` starts a
# launcher on every node; on a single node it is that launcher's parent.
_LAUNCHERS = (
    "deepspeed.launcher.launch", "deepspeed/launcher/launch.py", "torch.distributed.run", "/torchrun",
    "deepspeed.launcher.runner", "deepspeed/launcher/runner.py", "/deepspeed",
)  # fmt: skip
_NUM_COMMAND_WORDS = 4


@contextlib.contextmanager
def block_stop_signals() -> Iterator[None]:
    """Block STOP_SIGNALS in this thread, so that child processes started meanwhile never receive them.

    Child processes inherit the thread's signal mask. The other threads of this process still receive its signals.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def find_launchers() -> tuple[int, ...]:
    """Return the process ids of the launchers above this process, nearest first.

    They are SLURM's daemon of the job step, torchrun, or DeepSpeed's launcher on this node and the `deepspeed` that
    started it.
    """
    launchers: list[int] = []
    while (parent := _parent(launchers[-1] if launchers else os.getpid())) and _is_launcher(parent):
        launchers.append(parent)
    return tuple(launchers)


def _parent(pid: int) -> int:
    """Return the parent's process id, or 0 if there is none or the process is gone."""
    try:
        # Bytes: the kernel cuts the process's name anywhere, also within a character.
        return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[1])
    except OSError:
        return 0


def child_processes(pid: int) -> list[int]:
    """Return the ids of a process's children."""
    processes = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    return [process for process in processes if _parent(process) == pid]


def command_of(pid: int) -> list[str]:
    """Return the first words of a process's command, [] if it is gone."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return []
    return command.split("\0")[:_NUM_COMMAND_WORDS]


def _is_launcher(pid: int) -> bool:
    words = command_of(pid)
    # SLURM does not notice that its daemon has died, and would never end the rank.
    is_slurm = any(word.startswith("slurmstepd: ") for word in words[:1])
    return is_slurm or any(word.endswith(_LAUNCHERS) for word in words)


def run_with_timeout(function: Callable[[], T], timeout_s: float, default: T) -> T:
    """Run `function` in a thread and return its result, or `default` if it raises or takes longer than `timeout_s`."""
    results = [default]

    def run() -> None:
        with contextlib.suppress(BaseException):
            results[0] = function()

    with contextlib.suppress(RuntimeError):  # no thread can be started
        thread = threading.Thread(target=run, daemon=True, name="with-timeout")
        thread.start()
        thread.join(timeout_s)
    return results[0]


def write_stderr(text: str) -> None:
    """Write a line to stderr, bypassing Python's buffers and logging, whose locks a stuck thread may hold."""
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode())


class StopRequest:
    """Whether this process has been asked to stop.

    requested: "" or the reason, such as "SIGTERM" or LAUNCHER_DIED.
    """

    def __init__(self, launchers: Sequence[int] = ()) -> None:
        """launchers: process ids from `find_launchers`, whose death is a request."""
        self.requested = ""
        self._launchers = tuple(launchers)
        self._requested_at, self._is_deferred = 0.0, False
        self._previous_handlers: dict[signal.Signals, Any] = {}
        self._write_end, self._read_end = socket.socketpair()
        self._write_end.setblocking(False)
        self._thread = threading.Thread(target=self._run, daemon=True, name="stop-request")

    def listen(self) -> None:
        """Handle STOP_SIGNALS. Call it once, in the main thread.

        Until `defer`, when there is nothing to save yet, the first signal ends the process with EXIT_INTERRUPTED.
        """
        self._previous_fd = signal.set_wakeup_fd(self._write_end.fileno(), warn_on_full_buffer=False)
        # A forked child would write to its parent's socket.
        os.register_at_fork(after_in_child=self._reset_in_child)
        for number in STOP_SIGNALS:
            self._previous_handlers[number] = signal.signal(number, _do_nothing)
            # The kernel restarts the system call that a library waits in, instead of interrupting it.
            signal.siginterrupt(number, False)
        self._thread.start()

    def defer(self) -> None:
        """From now on the first request only sets `requested`, and a later one ends the process at once."""
        self._is_deferred = True

    def ignore(self) -> None:
        """Ignore signals from now on, because the request has been carried out.

        Python removes its handlers when it exits. A signal that arrives then, from a launcher that ends all ranks,
        would change the exit code.
        """
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def close(self) -> None:
        """Restore the previous handlers. May be called twice."""
        if not self._previous_handlers:
            return
        for number, handler in self._previous_handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous_handlers = {}
        signal.set_wakeup_fd(self._previous_fd)
        self._write_end.close()
        self._thread.join()
        self._read_end.close()

    def _reset_in_child(self) -> None:
        if self._previous_handlers:
            signal.set_wakeup_fd(-1)

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._read_end, select.POLLIN)
        while True:
            if poll.poll(LAUNCHER_POLL_S * 1000):
                numbers = self._read_end.recv(4096)
                if not numbers:
                    return
                for number in numbers:
                    if number in STOP_SIGNALS:
                        self._request(signal.Signals(number).name)
            if not self.requested and self._launchers != self._ancestors():
                self._request(LAUNCHER_DIED)

    def _ancestors(self) -> tuple[int, ...]:
        """Return as many ancestors of this process as it had launchers. They change if a launcher dies."""
        pids = [os.getpid()]
        for _ in self._launchers:
            pids.append(_parent(pids[-1]))
        return tuple(pids[1:])

    def _request(self, reason: str) -> None:
        if not self._is_deferred:
            _exit_now(f"{reason}: stopping at once; there is nothing to save yet")
        if not self.requested or (self.requested in _ADVANCE_WARNINGS and reason != self.requested):
            self._requested_at, self.requested = time.monotonic(), reason
            write_stderr(f"{reason}: saving at the end of this step (send it again to stop at once)")
        elif time.monotonic() - self._requested_at > SAME_REQUEST_S:
            _exit_now(f"{reason} again: stopping at once")


def _do_nothing(number: int, frame: Any) -> None:
    """Keep a signal from ending the process. The thread acts on it."""


def _exit_now(text: str) -> None:
    def report() -> None:
        write_stderr(text)
        sys.stdout.flush()

    try:
        run_with_timeout(report, MESSAGE_TIMEOUT_S, None)
    finally:
        os._exit(EXIT_INTERRUPTED)
