"""Progress of a training run: a bar on a terminal, otherwise a log line every 10 s and every 5% of the steps."""

import logging
import sys
from collections.abc import Mapping
from typing import Any

from cogds.process.progress import LOG_INTERVAL_S, Bar, is_terminal, log_options

LINES_PER_RUN = 20  # at least, in a log
BAR_FORMAT = "{n_fmt}/{total_fmt} |{bar}| {desc}  {remaining} left"
LOG_FORMAT = "step {n_fmt}/{total_fmt}  {desc}  {remaining} left"

logger = logging.getLogger(__name__)


class TrainingProgress:
    """Shows how far a run has come, from the scalars of its steps. Hidden unless INFO is logged."""

    def __init__(self, first_step: int, num_steps: int, *, use_bar: bool) -> None:
        """first_step: number of steps already trained. use_bar: draw a bar if stderr is a terminal."""
        options: dict[str, Any] = {"file": sys.stderr, "dynamic_ncols": True, "bar_format": BAR_FORMAT}
        self._is_log = not (use_bar and is_terminal(sys.stderr))
        if self._is_log:
            options = log_options(LOG_INTERVAL_S) | {"bar_format": LOG_FORMAT}
        hidden = not logger.isEnabledFor(logging.INFO)
        # delay: nothing is drawn before the first step.
        self._bar = Bar(total=num_steps, initial=first_step, disable=hidden, delay=1e-9, **options)
        self._first_step = first_step
        self._log_every = max(1, num_steps // LINES_PER_RUN)

    def update(self, step: int, scalars: Mapping[str, float]) -> None:
        """Show that step `step` is trained, with its `train/loss`, `perf/step_s` and `perf/tokens_per_s`."""
        if self._bar.disable:
            return
        is_first = self._bar.n == self._first_step
        self._bar.set_description_str(scalars_text(scalars), refresh=False)
        last_step = self._bar.n
        if is_first:  # the time left must not count what came before, such as the base model's evaluation
            self._bar.unpause()
            first_s = scalars.get("perf/step_s", 0.0) * (step - last_step)
            self._bar.start_t -= first_s
            self._bar.last_print_t -= first_s
        self._bar.update(step - last_step)
        if is_first or (self._is_log and step // self._log_every > last_step // self._log_every):
            self._bar.refresh()

    def close(self) -> None:
        """Show the last step and leave the bar."""
        self._bar.close()


def scalars_text(scalars: Mapping[str, float]) -> str:
    """Format as `loss 0.1234  1.23 s/step  45,000 tokens/s`."""
    parts = [f"loss {scalars['train/loss']:.4f}"]
    if step_s := scalars.get("perf/step_s"):
        parts.append(f"{step_s:.2f} s/step" if step_s >= 0.1 else f"{1e3 * step_s:.0f} ms/step")
    if rate := scalars.get("perf/tokens_per_s"):
        parts.append(f"{rate:,.0f} tokens/s")
    return "  ".join(parts)
