"""Logging of the `cogds` loggers, configured once per process by the command line.

    logger = logging.getLogger(__name__)
    logger.info("...")           # stdout, rank 0 only, not with --quiet
    logger.log(RESULT, "...")    # stdout, rank 0 only, also with --quiet: the paths of results
    logger.warning("...")        # stderr as `warning: ...`; ranks other than 0 add their rank and host

Loggers of libraries are not changed (see `log_filters`). Progress bars are shown if INFO is (see `progress`).
"""

import logging
import socket
import sys

from cogds.errors import UserError
from cogds.process.activity import reporter

RESULT = 25  # between INFO and WARNING
logging.addLevelName(RESULT, "RESULT")


def configure_logging(rank: int = 0, level: int = logging.INFO) -> None:
    """Send the records of all `cogds` loggers to stdout and stderr. May be called again to change the level.

    level: logging.DEBUG (--verbose), logging.INFO, or RESULT (--quiet). Ranks other than 0 log from WARNING up.
    """
    handler = ConsoleHandler()
    handler.setFormatter(_Formatter(rank))
    logger = logging.getLogger("cogds")
    logger.handlers = [handler]
    logger.setLevel(level if rank == 0 else max(level, logging.WARNING))
    logger.propagate = False  # libraries add handlers to the root logger, which would print every line again


def log_failure(logger: logging.Logger, message: str, error: BaseException) -> None:
    """Log a warning about an exception that must not end the run, with its traceback if it may be a bug."""
    logger.warning(message, exc_info=None if isinstance(error, (UserError, OSError)) else error)


class ConsoleHandler(logging.Handler):
    """Write records below WARNING to stdout and the others to stderr, above progress bars if there are any."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record. Never raises: a closed pipe or a full disk must not end a run."""
        reporter.note_output()
        stream = sys.stdout if record.levelno < logging.WARNING else sys.stderr
        try:
            text = self.format(record)
            if stream.isatty():
                from tqdm import tqdm  # slow to import, and needed only on a terminal, where lines would break bars

                tqdm.write(text, file=stream)
            else:
                stream.write(f"{text}\n")
            stream.flush()
        except (OSError, ValueError):  # ValueError: the stream is closed
            pass


class _Formatter(logging.Formatter):
    """`warning on rank 3 (node2): text` from WARNING up; the text alone below."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._place = f" on rank {rank} ({socket.gethostname()})" if rank else ""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.levelno < logging.WARNING:
            return text
        return f"{record.levelname.lower()}{self._place}: {text}"
