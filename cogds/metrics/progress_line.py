"""The line that moves while a run trains: a bar on a terminal, a line of text now and then elsewhere."""

import contextlib
import sys
import time
from collections import deque
from collections.abc import Mapping
from statistics import median

from tqdm import tqdm

LINE_EVERY_S = 10.0
NUM_RECENT = 50  # steps that the time left is reckoned from

QUIET, LINES, BAR = "quiet", "lines", "bar"


class Ticker:
    """Says how far a run has come. It never raises: whoever reads may be gone."""

    def __init__(self, first_step: int, num_steps: int, style: str) -> None:
        """style: QUIET, LINES or BAR."""
        self._num_steps, self._style, self._said_at = num_steps, style, 0.0
        self._recent = deque[float](maxlen=NUM_RECENT)
        self._bar = tqdm(
            total=num_steps, initial=first_step, disable=style != BAR, dynamic_ncols=True, file=sys.stderr,
            bar_format="{n_fmt}/{total_fmt} |{bar}| {desc}",
        )  # fmt: skip

    def step(self, step: int, scalars: Mapping[str, float]) -> None:
        """A step was trained: `train/loss`, `perf/step_s` and `perf/tokens_per_s` are looked at."""
        if self._style == QUIET:
            return
        self._recent.append(scalars.get("perf/step_s", 0.0))
        text = progress_text(scalars, (self._num_steps - step) * median(self._recent))
        with contextlib.suppress(OSError, ValueError):
            self._bar.set_description_str(text, refresh=False)
            self._bar.update(1)
            if self._style == LINES and (step == self._num_steps or time.monotonic() - self._said_at > LINE_EVERY_S):
                self._said_at = time.monotonic()
                print(f"step {step}/{self._num_steps}  {text}", flush=True)

    def close(self) -> None:
        """Leave the bar as it is."""
        with contextlib.suppress(OSError, ValueError):
            self._bar.close()


def progress_text(scalars: Mapping[str, float], left_s: float) -> str:
    """`loss 0.1234  1.23 s/step  45,000 tokens/s  1:02:03 left`."""
    parts = [f"loss {scalars['train/loss']:.4f}"]
    if step_s := scalars.get("perf/step_s"):
        parts.append(f"{step_s:.2f} s/step" if step_s >= 0.1 else f"{1e3 * step_s:.0f} ms/step")
    if rate := scalars.get("perf/tokens_per_s"):
        parts.append(f"{rate:,.0f} tokens/s")
    if left_s > 0:
        minutes, seconds = divmod(round(left_s), 60)
        hours, minutes = divmod(minutes, 60)
        parts.append(f"{hours}:{minutes:02}:{seconds:02} left")
    return "  ".join(parts)
