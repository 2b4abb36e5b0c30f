"""Filters for messages of libraries that appear at every start and that no user can act on.

Each message is listed. No log level is raised and no stream is closed, so errors are always shown.
"""

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator

# Logger -> regular expression for the start of a message.
LOGGED = {
    "torchao": r"Failed to load .*\.so",  # kernels for other GPUs
    "torch.utils._pytree": r".* is an Enum subclass",
    "diffusers.quantizers.torchao.torchao_quantizer": r"Unable to import `torchao` Tensor objects",
    "DeepSpeed": r"Setting accelerator to CPU",  # the startup summary names the device
}
# Category, message and module, as in `warnings.filterwarnings`.
WARNED: tuple[tuple[type[Warning], str, str], ...] = (
    (FutureWarning, "", r"torch\.distributed"),  # DeepSpeed calls functions that torch has renamed
)
# Whole lines on stdout.
PRINTED = r"DeepSpeed \S+ built successfully"


class _MessageFilter(logging.Filter):
    def __init__(self, pattern: str) -> None:
        super().__init__()
        self._pattern = re.compile(pattern)

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or not self._pattern.match(record.getMessage())


def install_log_filters() -> None:
    """Install the filters. Call it before the libraries are imported, because importing them logs some messages."""
    for name, pattern in LOGGED.items():
        logger = logging.getLogger(name)
        if not any(isinstance(installed, _MessageFilter) for installed in logger.filters):
            logger.addFilter(_MessageFilter(pattern))
    for category, message, module in WARNED:
        warnings.filterwarnings("ignore", message, category, module)


@contextlib.contextmanager
def filter_stdout(pattern: str = PRINTED) -> Iterator[None]:
    """Hold back the output of the block, and print it at the end without the lines that match."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            yield
    finally:
        for line in printed.getvalue().splitlines():
            if not re.fullmatch(pattern, line):
                print(line, flush=True)
