"""Says what this process is doing if it has printed nothing for a while.

    with activity("loading the transformer"):
        ...

A line is logged every `QUIET_S`, until there is other output. Progress bars are output, too.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator

from cogds.formatting import duration

QUIET_S = 10.0
TICK_S = 0.5

logger = logging.getLogger(__name__)


class ActivityReporter:
    """A thread that logs the innermost activity of the main thread."""

    def __init__(self) -> None:
        self.activities: list[tuple[Callable[[], str], float]] = []  # with the time at which each began
        self._last_output_s = time.monotonic()
        self._thread: threading.Thread | None = None
        self._is_stopping = threading.Event()

    def start(self, quiet_s: float = QUIET_S, tick_s: float = TICK_S) -> None:
        """Start the thread. It ends with the process, or with `stop`."""
        self.note_output()
        self._is_stopping.clear()
        self._thread = threading.Thread(target=self._run, args=(quiet_s, tick_s), daemon=True, name="activity")
        self._thread.start()

    def stop(self) -> None:
        """End the thread, if it runs."""
        self._is_stopping.set()
        if self._thread:
            self._thread.join()

    def note_output(self) -> None:
        """Restart the clock, because something else was printed."""
        if threading.current_thread() is not self._thread:
            self._last_output_s = time.monotonic()

    def _run(self, quiet_s: float, tick_s: float) -> None:
        last_report_s = 0.0
        while not self._is_stopping.wait(tick_s):
            now, last_output_s, activities = time.monotonic(), self._last_output_s, self.activities[-1:]
            if activities and now - max(last_output_s, last_report_s) >= quiet_s:
                last_report_s = now
                describe, start_s = activities[0]
                logger.info("%s, %s so far", describe(), duration(now - start_s))


reporter = ActivityReporter()


@contextlib.contextmanager
def activity(description: str | Callable[[], str]) -> Iterator[None]:
    """Describe what the block does. In the main thread only. description: if a function, called for each report."""
    describe = description if callable(description) else lambda: description
    reporter.activities.append((describe, time.monotonic()))
    try:
        yield
    finally:
        reporter.activities.pop()
