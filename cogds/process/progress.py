"""Progress bars, which move on a terminal. Elsewhere (a file, SLURM), they log a line at intervals."""

import logging
import sys
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm import tqdm

from cogds.process.environment import environment_variables

LOG_INTERVAL_S = 30.0
LOG_FORMAT = "{desc}: {n_fmt}/{total_fmt}, {elapsed} elapsed, {remaining} left, {rate_fmt}"

logger = logging.getLogger(__name__)


def is_terminal(stream: TextIO) -> bool:
    """Whether the stream is a terminal. Under SLURM it counts as a log file, even if srun makes it a tty."""
    return stream.isatty() and not environment_variables("SLURM_JOB_ID")


def progress_bar(
    description: str,
    unit: str,
    total: int,
    show: bool = True,
    *,
    initial: int = 0,
    items: Iterable[Any] | None = None,
) -> tqdm:
    """Return a bar with rate and time left, around `items` or moved by `update`.

    It is shown if INFO is logged, that is on rank 0 without --quiet. In a log file, a bar that takes less than
    LOG_INTERVAL_S writes nothing.
    """
    options: dict[str, Any] = {"file": sys.stderr, "dynamic_ncols": True}
    if not is_terminal(sys.stderr):
        options = log_options(LOG_INTERVAL_S) | {"bar_format": LOG_FORMAT, "delay": LOG_INTERVAL_S}
    hidden = not (show and logger.isEnabledFor(logging.INFO))
    return tqdm(items, desc=description, total=total, initial=initial, unit=unit, disable=hidden, **options)


def log_options(interval_s: float) -> dict[str, Any]:
    """Options of a tqdm bar that writes a line to the log every `interval_s`."""
    return {"file": _LogFile(), "position": 0, "mininterval": interval_s, "maxinterval": 2 * interval_s}


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
