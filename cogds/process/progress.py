"""Progress bars: on a terminal they move, elsewhere (a file, SLURM) they are a log line now and then."""

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
    """Whether a person watches the stream as it is written. Under SLURM it is a log, even if srun makes it a tty."""
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

    It is shown if INFO is logged, that is on rank 0 without --quiet. In a log, what takes less than LOG_INTERVAL_S
    writes nothing.
    """
    options: dict[str, Any] = {"file": sys.stderr, "dynamic_ncols": True}
    if not is_terminal(sys.stderr):
        options = log_options(LOG_INTERVAL_S) | {"bar_format": LOG_FORMAT, "delay": LOG_INTERVAL_S}
    hidden = not (show and logger.isEnabledFor(logging.INFO))
    return tqdm(items, desc=description, total=total, initial=initial, unit=unit, disable=hidden, **options)


def log_options(interval_s: float) -> dict[str, Any]:
    """Options of a tqdm bar that writes a line to the log every `interval_s`."""
    return {"file": _LogFile(), "mininterval": interval_s, "maxinterval": 2 * interval_s}


class _LogFile:
    """What tqdm draws, as lines of the log; it draws some of them twice."""

    def __init__(self) -> None:
        self._last_line = ""

    def write(self, text: str) -> None:
        line = text.strip()
        if line and line != self._last_line:
            self._last_line = line
            logger.info(line)

    def flush(self) -> None:
        """Nothing is buffered."""
