"""Who is told what: a terminal or a log, everything or only what matters."""

import contextlib
import os
import sys
from typing import TextIO

from cogds.process import progress
from cogds.process.environment import environment_variables

_spoken: TextIO | None = None  # stdout, where the rest of it is hushed


def is_terminal(stream: TextIO) -> bool:
    """Whether somebody watches this stream as it is written. Under SLURM it is a log, whatever srun says."""
    return stream.isatty() and not environment_variables("SLURM_JOB_ID")


def hush() -> None:
    """From here on only errors, warnings and `last_words` are said."""
    global _spoken
    if _spoken is None:
        _spoken = sys.stdout
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for as long as the process lives)
        progress.hush()


def last_words(text: str) -> None:
    """Say it even where the rest is hushed."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=_spoken or sys.stdout, flush=True)
