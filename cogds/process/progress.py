"""Progress bars, which move on a terminal. Elsewhere (a file, SLURM), they log a line at intervals.

An item that takes longer than the interval is reported by `activity`.
"""

import logging
import sys
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm import tqdm

from cogds.process.activity import reporter
from cogds.process.environment import environment_variables

LOG_INTERVAL_S = 10.0
LOG_FORMAT = "{desc}: {n_fmt}/{total_fmt}, {elapsed} elapsed, {remaining} left, {rate_fmt}"
# For bars whose description has the numbers.
SHORT_FORMAT, SHORT_LOG_FORMAT = "{desc} |{bar}| {remaining} left", "{desc}, {elapsed} elapsed, {remaining} left"

logger = logging.getLogger(__name__)


def is_terminal(stream: TextIO) -> bool:
    """Whether the stream is a terminal. Under SLURM it counts as a log file, even if srun makes it a tty."""
    return stream.isatty() and not environment_variables("SLURM_JOB_ID")


class Bar(tqdm):
    """A bar that counts as output (`activity`)."""

    def display(self, *args: Any, **kwargs: Any) -> Any:
        """Draw the bar."""
        reporter.note_output()
        return super().display(*args, **kwargs)


def progress_bar(
    description: str,
    unit: str,
    total: int,
    show: bool = True,
    *,
    initial: int = 0,
    items: Iterable[Any] | None = None,
    leave: bool = True,
    has_numbers: bool = True,
) -> Bar:
    """Return a bar with rate and time left, around `items` or moved by `update`.

    leave: keep it on a terminal. has_numbers: show the number of items; otherwise the description has it.

    It is shown if INFO is logged, that is on rank 0 without --quiet. In a log file, a bar that takes less than
    LOG_INTERVAL_S writes nothing.
    """
    options: dict[str, Any] = {"file": sys.stderr, "dynamic_ncols": True}
    if not has_numbers:
        options["bar_format"] = SHORT_FORMAT
    if not is_terminal(sys.stderr):
        bar_format = LOG_FORMAT if has_numbers else SHORT_LOG_FORMAT
        options = log_options(LOG_INTERVAL_S) | {"bar_format": bar_format, "delay": LOG_INTERVAL_S}
    hidden = not (show and logger.isEnabledFor(logging.INFO))
    return Bar(items, desc=description, total=total, initial=initial, unit=unit, disable=hidden, leave=leave, **options)


def log_options(interval_s: float) -> dict[str, Any]:
    """Options of a tqdm bar that writes a line to the log every `interval_s`."""
    return {"file": _LogFile(), "position": 0, "mininterval": interval_s, "miniters": 1}


class _LogFile:
    """A stream for tqdm that logs its lines. tqdm may draw a line several times in a row, which is logged once."""

    def __init__(self) -> None:
        self._last_line = ""

    def write(self, text: str) -> None:
        line = text.strip()
        if line and line != self._last_line:
            self._last_line = line
            logger.info(line)

    def flush(self) -> None:
        """Nothing is buffered."""
