"""Runs DeepSpeed's launcher as a child process, so that Ctrl-C lets the ranks save and ends without a traceback.

By itself, the launcher ends at once with a traceback when Ctrl-C reaches it, and kills the ranks after 30 seconds. It
runs in a session of its own, which Ctrl-C does not reach, and requests to stop are passed on to the ranks.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from cogds.errors import EXIT_INTERRUPTED
from cogds.process.signals import STOP_SIGNALS, child_processes, command_of

LAUNCH = ("deepspeed.launcher.launch", "deepspeed/launcher/launch.py")  # on each node, the parent of the ranks
PR_SET_PDEATHSIG = 1  # of prctl(2)
_LIBC = ctypes.CDLL(None)


class LauncherProcess:
    """The running launcher. Signals to this process are passed on."""

    def __init__(self, command: Sequence[str]) -> None:
        self.is_stopping = False
        self._process = subprocess.Popen(
            command,
            start_new_session=True,
            close_fds=False,  # a hostfile may be in memory (`hostfile.in_memory`)
            # If this process is killed, the launcher ends too, which the ranks notice.
            preexec_fn=lambda: _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM),
        )
        for number in (*STOP_SIGNALS, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP, and the ranks inherit that
                signal.signal(number, self._pass_on)

    def wait(self) -> int:
        """Wait for the end and return the exit code."""
        code = self._process.wait()
        if code < 0:
            return EXIT_INTERRUPTED if self.is_stopping else 128 - code
        if 128 < code < 255 and not self.is_stopping:  # 255: ssh has failed, and says why
            number = 256 - code if code > 192 else code - 128  # of launchers and of shells
            reason = signal.strsignal(number) or f"signal {number}"
            print(f"error: a rank was ended by signal {number} ({reason}).", file=sys.stderr)
        return code

    def _pass_on(self, number: int, _: Any) -> None:
        """Pass a signal on to the ranks of this node; if there are none yet, or with a hostfile, end the launcher."""
        self.is_stopping = True
        for rank in (ranks := find_ranks(self._process.pid)):
            _send(rank, signal.SIGTERM if number == signal.SIGHUP else number)
        if not ranks:
            _send(-self._process.pid, signal.SIGTERM)


def find_ranks(launcher: int) -> list[int]:
    """Return the process ids of the ranks that a launcher has started on this node, [] if there are none yet."""
    return [
        rank
        for child in child_processes(launcher)
        if any(word.endswith(LAUNCH) for word in command_of(child))
        for rank in child_processes(child)
    ]


def _send(pid: int, number: int) -> None:
    """Send a signal to a process, or to a group if the id is negative, unless it has ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
