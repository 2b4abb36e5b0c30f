"""Logging of the `cogds` loggers, configured once per process by the command line.

    logger = logging.getLogger(__name__)
    logger.info("...")           # stdout, rank 0 only, not with --quiet
    logger.log(RESULT, "...")    # stdout, rank 0 only, also with --quiet: where the results are
    logger.warning("...")        # stderr as `warning: ...`; other ranks than 0 add their name

Loggers of libraries are left alone (see `log_filters`). Progress bars are shown if INFO is (see `progress`).
"""

import logging
import socket
import sys

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
    logger.propagate = False  # libraries add handlers to the root logger, and every line would come twice


class ConsoleHandler(logging.Handler):
    """Write records below WARNING to stdout and the others to stderr, above progress bars if there are any."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record. Never raises: a reader that is gone, or a full disk, must not end a run."""
        stream = sys.stdout if record.levelno < logging.WARNING else sys.stderr
        try:
            text = self.format(record)
            if stream.isatty():
                from tqdm import tqdm  # slow to import, and only a terminal shows bars that a line would tear

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
