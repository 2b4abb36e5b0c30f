"""Callbacks: work that all ranks do together between optimizer steps, such as an evaluation or a checkpoint."""

import functools
from collections.abc import Sequence
from typing import Protocol

from cogds.distributed.world import World
from cogds.metrics.monitor import Monitor
from cogds.metrics.step_metrics import peak_memory_bytes, restart_peak
from cogds.process.watchdog import Watchdog

# Prefix of the tags that describe the callbacks themselves.
TAG = "callbacks"


class Callback(Protocol):
    """Runs every `every` optimizer steps and after the last step.

    name: a participle for messages, such as "evaluating". at_start: also runs before the first step, and when a run
    resumes at a multiple of `every`. on_stop: also runs when the run is asked to stop.
    """

    @property
    def name(self) -> str: ...
    @property
    def every(self) -> int: ...
    @property
    def at_start(self) -> bool: ...
    @property
    def on_stop(self) -> bool: ...

    def run(self, step: int) -> None:
        """Run after `step` optimizer steps. Collective."""


def run_callbacks(callbacks: Sequence[Callback], step: int, watchdog: Watchdog, monitor: Monitor, world: World) -> None:
    """Run callbacks one after another, after `step` optimizer steps. Collective.

    On a GPU their own peak memory is recorded and the peak of training restarts (see `Meter`). The peak memory of the
    process on the host cannot be restarted, so it includes theirs.
    """
    if not callbacks:
        return
    restart_peak(world.device)
    for callback in callbacks:
        watchdog.watch(functools.partial("{} after step {}".format, callback.name, step))
        callback.run(step)
    if world.device.type == "cuda":
        monitor.note(step, {f"{TAG}/peak_memory_gb": peak_memory_bytes(world.device) / 1e9})
        restart_peak(world.device)
