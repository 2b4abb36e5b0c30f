"""What the run says of itself: TensorBoard, `metrics.jsonl` and a line on the terminal, all from the same scalars.

A step hands over its losses as tensors and is not waited for: once every few steps they are summed over the ranks and
read. Rank 0 writes, on a thread (`runtime.outlet`): neither a full disk nor a slow one ends a run or holds it up.
"""

import atexit
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cogds.core.geometry import ClipShape
from cogds.errors import brief
from cogds.runtime.board import (
    LAYOUT,
    animation_record,
    hparams_records,
    layout_record,
    open_board,
    picture_record,
    scalars_record,
    text_record,
)
from cogds.runtime.metrics import metrics_line
from cogds.runtime.outlet import Courier, Outlet, Sink, warn
from cogds.runtime.tally import Norms, OwnValues, StepLosses, Tally
from cogds.runtime.ticker import LINES, Ticker
from cogds.runtime.world import World, all_reduce_sum

LEAVE_S = 5.0  # how long an error that ends a run waits for what is being written


class Monitor:
    """Collects one record per optimizer step on every rank; rank 0 writes them.

    What is written beside the steps (`note`, `text`, `picture`, `animation`, `hparams`) may be called on every rank or
    on rank 0 alone: nothing of it is collective, the other ranks do nothing, and none of it raises for a disk.
    """

    def __init__(
        self,
        world: World,
        output_dir: Path,
        buckets: Sequence[ClipShape],
        first_step: int,
        num_steps: int,
        every: int,
        style: str = LINES,
        also: Sink | None = None,
    ):
        """first_step: steps already trained, to which `rewind_metrics` has been. every: steps between two flushes.

        style: of the Ticker. also: takes the lines of `metrics.jsonl` too.
        """
        self.world, self.buckets, self.every = world, buckets, every
        self.pending: list[Tally] = []
        self.writes = world.rank == 0
        self._at_end: list[bytes] = []
        if self.writes:
            self.metrics = Outlet(output_dir / "metrics.jsonl")
            self.board = open_board(output_dir / "tensorboard", first_step)
            self.courier = Courier()
            atexit.register(self.courier.settle, LEAVE_S)  # where an error ends the run before `close`
            self.courier.hand(self.metrics)
            self.courier.hand(self.board, [layout_record(LAYOUT)])
            self.courier.settle(1.0)  # what is wrong with the folder is said before the run, where that is quick
            self.ticker = Ticker(first_step, num_steps, style)
            self.also = also
            self.errands = Courier() if also else None  # its own: a service that does not answer holds up no file
            if self.errands:
                atexit.register(self.errands.settle, LEAVE_S)

    def record(
        self,
        step: int,
        scalars: dict[str, Any],
        losses: StepLosses,
        own: OwnValues = OwnValues(),  # noqa: B008 (frozen)
        norms: Norms | None = None,
    ) -> None:
        """Hand over optimizer step `step` (1 is the first). Collective every `every` steps.

        scalars: numbers, tensors that are read when all are, or None. norms: on all ranks or on none.
        """
        self.pending.append(Tally({"step": step, **scalars}, losses.vector, own, norms))
        if step % self.every == 0:
            self.flush()

    def flush(self) -> None:
        """Sum the pending steps over the ranks and write them. Collective."""
        if not self.pending:
            return
        vectors = [tally.vector(self.world.rank, self.world.size) for tally in self.pending]
        # A host sync: everything up to here was only queued on the device.
        sums = all_reduce_sum(self.world, torch.cat(vectors)).tolist()
        tallies, self.pending = self.pending, []
        if not self.writes:
            return
        lines, events, labels, start = [], [], [f"bucket={bucket}" for bucket in self.buckets], 0
        for tally, vector in zip(tallies, vectors):
            scalars, end = tally.scalars, start + len(vector)
            step = scalars.pop("step")
            named = tally.named(sums[start:end], self.world.size, labels)
            named |= {name: float(value) for name, value in scalars.items() if value is not None}
            lines.append(metrics_line(step, named))
            events.append(scalars_record(step, named))
            self.ticker.step(step, named)
            start = end
        self._hand_lines(lines)
        self.courier.hand(self.board, events)

    def note(self, step: int, scalars: Mapping[str, float]) -> None:
        """Scalars of what happens beside the steps, such as a save or an evaluation, when `step` steps were trained."""
        if self.writes and scalars:
            self._hand_lines([metrics_line(step, scalars)])
            self.courier.hand(self.board, [scalars_record(step, scalars)])

    def text(self, name: str, text: str) -> None:
        """A text for TensorBoard, such as the resolved config, shown as it is."""
        self._hand(name, lambda: text_record(name, text))

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        """A picture for TensorBoard, uint8 [H, W, 3]; a large one is shrunk (`runtime.pictures`)."""
        self._hand(name, lambda: picture_record(step, name, pixels))

    def animation(self, step: int, name: str, frames: np.ndarray, fps: float) -> None:
        """A clip that plays among TensorBoard's images, uint8 [F, H, W, 3]: a GIF of at most 480 pixels and 8 fps."""
        self._hand(name, lambda: animation_record(step, name, frames, fps))

    def hparams(self, settings: Mapping[str, str | float | bool], metrics: Sequence[str]) -> None:
        """What TensorBoard's HParams tab compares this run by: settings, and the tags of scalars."""
        if self.writes:
            start, end = hparams_records(settings, metrics)
            self._at_end = [end]
            self.courier.hand(self.board, start)

    def close(self) -> None:
        """Flush and close. Collective."""
        self.flush()
        if self.writes:
            self.ticker.close()
            self.courier.hand(self.board, self._at_end)
            self.courier.close()
            if self.errands:
                self.errands.close()
                atexit.unregister(self.errands.settle)
            atexit.unregister(self.courier.settle)

    def _hand_lines(self, lines: list[bytes]) -> None:
        self.courier.hand(self.metrics, lines)
        if self.also and self.errands:
            self.errands.hand(self.also, lines)

    def _hand(self, name: str, record: Callable[[], bytes]) -> None:
        if not self.writes:
            return
        try:
            records = [record()]
        except Exception as error:  # a picture is not worth a run
            warn(f"{name} was not written for TensorBoard ({brief(error)}): training goes on", error)
            return
        self.courier.hand(self.board, records)
