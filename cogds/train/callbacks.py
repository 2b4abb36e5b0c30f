"""Callbacks: work that all ranks do together between optimizer steps, such as an evaluation or a checkpoint."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cogds.distributed.world import World
from cogds.engine.ema import Ema
from cogds.metrics.monitor import Monitor
from cogds.metrics.step_metrics import peak_memory_bytes, reset_peak_memory
from cogds.process.watchdog import Watchdog
from cogds.train.run import Run
from cogds.train.step import StepBuilder

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


@dataclass(frozen=True)
class TrainContext:
    """What the steps and callbacks of a run work with.

    watch: called with a description of each forward pass (`Watchdog.watch`). is_stopping: whether this rank was asked
    to stop, which ends a callback without a result. ema: the moving average of the weights, if the run has one.
    """

    run: Run
    engine: Any
    builder: StepBuilder
    monitor: Monitor
    watch: Callable[[Callable[[], str]], None] = lambda _: None
    is_stopping: Callable[[], bool] = lambda: False
    ema: Ema | None = None


def due_at_start(callbacks: Sequence[Callback], step: int) -> list[Callback]:
    """Return the callbacks to run before the first step, if the run starts after `step` steps."""
    return [callback for callback in callbacks if callback.at_start and step % callback.every == 0]


def due_after(callbacks: Sequence[Callback], step: int, *, is_last: bool, is_stopped: bool) -> list[Callback]:
    """Return the callbacks to run after `step` optimizer steps."""
    is_end = is_last or is_stopped
    return [
        callback
        for callback in callbacks
        if (is_end or step % callback.every == 0) and (callback.on_stop or not is_stopped)
    ]


def run_callbacks(callbacks: Sequence[Callback], step: int, watchdog: Watchdog, monitor: Monitor, world: World) -> None:
    """Run callbacks one after another, after `step` optimizer steps. Collective.

    On a GPU, the peak memory of the callbacks is recorded, and then the peak is reset for training (see `StepMeter`).
    The peak memory of the process on the host cannot be reset, so it includes the callbacks.
    """
    if not callbacks:
        return
    reset_peak_memory(world.device)
    for callback in callbacks:
        watchdog.watch(functools.partial("{} after step {}".format, callback.name, step))
        callback.run(step)
    if world.device.type == "cuda":
        monitor.add_scalars(step, {f"{TAG}/peak_memory_gb": peak_memory_bytes(world.device) / 1e9})
        reset_peak_memory(world.device)
