"""The numbers of a run for the monitors that a DeepSpeed config switches on: Weights & Biases, Comet, CSV, TensorBoard.

DeepSpeed has the writers, and gives them the learning rate alone, over samples. Here they get what stands in
`metrics.jsonl`, over steps.
"""

import importlib.util
import json
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from cogds.errors import UserError, brief
from cogds.runtime.outlet import WARN_EVERY_S, warn

# Section of a DeepSpeed config -> the package that DeepSpeed imports for it.
PACKAGES = {"wandb": "wandb", "comet": "comet_ml"}


class Relay:
    """Takes lines of `metrics.jsonl` and hands their scalars on, in the order of their steps; never raises.

    A note of what was done after a step may come before that step's own line, or long after it. Weights & Biases drops
    what goes back in steps: the first is held until its step has come, the second stands at the newest step.
    """

    path = "DeepSpeed's monitor"  # for what is said of it

    def __init__(self, monitor: Any) -> None:
        """monitor: a DeepSpeed engine's, which has `write_events([(name, value, step), ...])`."""
        self._monitor = monitor
        self._held: list[dict[str, Any]] = []
        self._newest = self._last = -math.inf
        self._warned_at = -math.inf

    def write(self, records: Sequence[bytes] = ()) -> None:
        """Hand on these lines, and those held before whose step has come."""
        lines = [json.loads(line) for line in records]
        self._newest = max([self._newest, *(line["step"] for line in lines if "train/loss" in line)])
        self._held = sorted(self._held + lines, key=lambda line: line["step"])
        ready = [line for line in self._held if line["step"] <= self._newest]
        self._held = self._held[len(ready) :]
        self._hand_on(ready)

    def close(self) -> None:
        """Hand on what is left."""
        lines, self._held = self._held, []
        self._hand_on(lines)

    def _hand_on(self, lines: list[dict[str, Any]]) -> None:
        events = []
        for line in lines:
            self._last = max(self._last, line["step"])
            events += [
                (name, math.nan if value is None else value, int(self._last))
                for name, value in line.items()
                if name != "step"
            ]
        if not events:
            return
        try:
            self._monitor.write_events(events)
        except Exception as error:  # a service that cannot be reached is not worth a run
            if time.monotonic() - self._warned_at >= WARN_EVERY_S:
                self._warned_at = time.monotonic()
                warn(
                    f"{self.path} failed ({brief(error)}): training goes on, and what it lacks stands in "
                    "metrics.jsonl and tensorboard/",
                    error,
                )


def relay_of(engine: Any) -> Relay | None:
    """The monitors that this engine's config switches on, None for none; the engine itself writes to them no more."""
    if not engine.monitor.enabled:
        return None
    engine.monitor.enabled = False
    return Relay(engine.monitor)


def check_monitors(ds_config: Mapping[str, Any]) -> None:
    """Raise UserError where a monitor is switched on whose package is not installed."""
    for section, package in PACKAGES.items():
        if ds_config.get(section, {}).get("enabled") is True and importlib.util.find_spec(package) is None:
            raise UserError(
                f"{section}.enabled is true in the DeepSpeed config, but the package {package} is not installed: "
                f"pip install {package}, or delete the section"
            )
