"""Trackers that the DeepSpeed config enables: Weights & Biases, Comet, CSV.

DeepSpeed has the writers, but gives them only the learning rate, over samples. cogds gives them the scalars of
`metrics.jsonl`, over steps.
"""

import importlib.util
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from cogds.errors import UserError, brief
from cogds.metrics.async_writer import WARN_INTERVAL_S
from cogds.process.logs import log_failure

logger = logging.getLogger(__name__)

# Section of the DeepSpeed config -> the package that DeepSpeed imports for it.
PACKAGES = {"wandb": "wandb", "comet": "comet_ml"}


class Trackers:
    """Receives lines of `metrics.jsonl` and passes their scalars on in the order of their steps. Never raises.

    A note may come before the line of its step, or long after it, and Weights & Biases drops values whose step is lower
    than one it already has. So an early note is held until its step comes, and a late one is given the newest step.
    """

    path = "trackers of the DeepSpeed config"  # for messages, see `Sink`

    def __init__(self, monitor: Any) -> None:
        """monitor: that of a DeepSpeed engine, with a method `write_events([(name, value, step), ...])`."""
        self._monitor = monitor
        self._held: list[dict[str, Any]] = []
        self._newest_step = self._last_written = -math.inf
        self._warned_at = -math.inf

    def write(self, records: Sequence[bytes] = ()) -> None:
        """Pass on these lines and the held ones, except for those whose step has not come yet."""
        lines = [json.loads(line) for line in records]
        self._newest_step = max([self._newest_step, *(line["step"] for line in lines if "train/loss" in line)])
        self._held = sorted(self._held + lines, key=lambda line: line["step"])
        ready = [line for line in self._held if line["step"] <= self._newest_step]
        self._held = self._held[len(ready) :]
        self._write_events(ready)

    def close(self) -> None:
        """Pass on the held lines."""
        lines, self._held = self._held, []
        self._write_events(lines)

    def _write_events(self, lines: list[dict[str, Any]]) -> None:
        events = []
        for line in lines:
            self._last_written = max(self._last_written, line["step"])
            events += [
                (name, math.nan if value is None else value, int(self._last_written))
                for name, value in line.items()
                if name != "step"
            ]
        if not events:
            return
        try:
            self._monitor.write_events(events)
        except Exception as error:  # a service that cannot be reached must not end a run
            if time.monotonic() - self._warned_at >= WARN_INTERVAL_S:
                self._warned_at = time.monotonic()
                log_failure(
                    logger,
                    f"{self.path}: {brief(error)}. Training continues; metrics.jsonl and tensorboard/ have the values "
                    "that are missing there.",
                    error,
                )


def check_tracker_packages(ds_config: Mapping[str, Any]) -> None:
    """Raise UserError if the package of an enabled tracker is not installed."""
    for section, package in PACKAGES.items():
        if ds_config.get(section, {}).get("enabled") is True and importlib.util.find_spec(package) is None:
            raise UserError(
                f"{section}.enabled: is true in the DeepSpeed config, but the package {package} is not installed. "
                f"Run pip install {package}, or delete the section."
            )
