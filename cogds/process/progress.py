"""Progress bars, on a terminal and in a log."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

LOG_EVERY_S = 30.0  # where there is no terminal, every update is a line of its own

_hushed = False


def hush() -> None:
    """No bar is shown from here on."""
    global _hushed
    _hushed = True


def progress(
    what: str, unit: str, total: int, shown: bool = True, initial: int = 0, items: Iterable[Any] | None = None
) -> tqdm:
    """A bar with rate and time left, around `items` or moved by `update`. shown: False says nothing at all.

    On a terminal it moves; elsewhere (a file, SLURM) it is one line now and then.
    """
    interval_s = 0.1 if sys.stderr.isatty() else LOG_EVERY_S
    return tqdm(
        items, desc=what, total=total, initial=initial, unit=unit, disable=_hushed or not shown, dynamic_ncols=True,
        mininterval=interval_s, maxinterval=max(10.0, interval_s),
    )  # fmt: skip
