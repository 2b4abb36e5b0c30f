"""What libraries say of themselves while they start, and nobody who trains can act on: left out, by its own words.

Nothing else of theirs is touched: no level is raised and no stream is closed, so an error always comes through.
"""

import contextlib
import io
import logging
import re
import sys
import warnings
from collections.abc import Iterator

# Logger -> the beginning of what it need not say, as a regular expression.
LOGGED = {
    "torchao": r"Failed to load .*\.so",  # kernels for GPUs of another kind
    "torch.utils._pytree": r".* is an Enum subclass",
    "diffusers.quantizers.torchao.torchao_quantizer": r"Unable to import `torchao` Tensor objects",
    "DeepSpeed": r"Setting accelerator to CPU",  # the panel says on what a run trains
}
# Category, message, module; as `warnings.filterwarnings` takes them.
WARNED: tuple[tuple[type[Warning], str, str], ...] = (
    (FutureWarning, "", r"torch\.distributed"),  # DeepSpeed calls what torch has renamed
)
# Whole lines that are printed.
PRINTED = r"DeepSpeed \S+ built successfully"


class _Without(logging.Filter):
    def __init__(self, pattern: str) -> None:
        super().__init__()
        self._pattern = re.compile(pattern)

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or not self._pattern.match(record.getMessage())


def leave_out() -> None:
    """From here on. To be called before the libraries are imported: some of it is said then."""
    for name, pattern in LOGGED.items():
        logger = logging.getLogger(name)
        if not any(isinstance(one, _Without) for one in logger.filters):
            logger.addFilter(_Without(pattern))
    for category, message, module in WARNED:
        warnings.filterwarnings("ignore", message, category, module)


@contextlib.contextmanager
def without_printed(pattern: str = PRINTED) -> Iterator[None]:
    """Inside, what is printed on stdout waits; after it all is printed but the lines that match."""
    kept = io.StringIO()
    try:
        with contextlib.redirect_stdout(kept):
            yield
    finally:
        for line in kept.getvalue().splitlines():
            if not re.fullmatch(pattern, line):
                print(line, file=sys.stdout, flush=True)
