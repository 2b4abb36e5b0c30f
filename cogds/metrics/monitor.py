"""Writes the metrics of a run to TensorBoard, `metrics.jsonl`, the trackers and the progress line.

A step hands over its losses as tensors, which are summed over the ranks and read once every few steps, so that no step
waits for the GPU. Rank 0 writes, in a background thread (`async_writer`).
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cogds.config.schema import MetricsConfig
from cogds.core.geometry import ClipShape
from cogds.distributed.collectives import all_reduce_sum
from cogds.distributed.world import World
from cogds.errors import brief
from cogds.metrics.async_writer import AppendFile, AsyncWriter, Sink
from cogds.metrics.jsonl import metrics_line
from cogds.metrics.step_metrics import RankValues, SquaredNorms, StepLosses, StepMetrics
from cogds.metrics.tensorboard import (
    event_file,
    gif_record,
    hparams_records,
    image_record,
    layout_record,
    scalars_record,
    text_record,
)
from cogds.metrics.training_progress import TrainingProgress
from cogds.process.logs import log_failure

logger = logging.getLogger(__name__)


class Monitor:
    """Collects one record per optimizer step on every rank; rank 0 writes them.

    `add_step`, `flush` and `close` are called on all ranks. The other methods are not collective and do nothing on
    ranks other than 0. No method raises if writing fails.
    """

    def __init__(
        self,
        world: World,
        output_dir: Path,
        buckets: Sequence[ClipShape],
        steps: range,
        config: MetricsConfig,
        trackers: Sink | None = None,
    ):
        """steps: range(number of steps already trained, number of steps of the whole run).

        trackers: also receives the lines of `metrics.jsonl`.
        """
        self.world, self.buckets, self.every = world, buckets, config.every
        self.pending: list[StepMetrics] = []
        self.is_writer = world.rank == 0
        if not self.is_writer:
            return
        self.metrics_file = AppendFile(output_dir / "metrics.jsonl")
        self.event_file = event_file(output_dir, steps.start)
        self.last_events: list[bytes] = []
        self.tags: set[str] = set()
        self.writer = AsyncWriter()
        self.writer.submit(self.metrics_file)
        self.writer.submit(self.event_file)
        self.writer.drain(1.0)  # so that a folder that cannot be written is reported before the run, not during it
        self.progress = TrainingProgress(steps.start, steps.stop, use_bar=config.progress_bar)
        self.trackers = trackers
        # A thread of its own: a service that does not answer must not hold up the files.
        self.tracker_writer = AsyncWriter() if trackers else None

    def add_step(
        self,
        step: int,
        scalars: dict[str, Any],
        losses: StepLosses,
        values: RankValues = RankValues(),  # noqa: B008 (frozen)
        norms: SquaredNorms | None = None,
    ) -> None:
        """Hand over optimizer step `step` (the first is 1). Collective every `every` steps.

        scalars: numbers, tensors (read at the flush), or None. norms: given on all ranks or on none.
        """
        self.pending.append(StepMetrics(step, scalars, losses.vector, values, norms))
        if step % self.every == 0:
            self.flush()

    def flush(self) -> None:
        """Sum the pending steps over the ranks and write them. Collective."""
        if not self.pending:
            return
        vectors = [metrics.to_vector(self.world.rank, self.world.size) for metrics in self.pending]
        # This waits for the GPU; everything before was only queued on it.
        sums = all_reduce_sum(self.world, torch.cat(vectors)).tolist()
        pending, self.pending = self.pending, []
        if not self.is_writer:
            return
        lines, events, start = [], [], 0
        labels = [f"bucket={bucket}" for bucket in self.buckets]
        for metrics, vector in zip(pending, vectors):
            step, end = metrics.step, start + len(vector)
            scalars = metrics.reduced(sums[start:end], self.world.size, labels)
            scalars |= {name: float(value) for name, value in metrics.scalars.items() if value is not None}
            lines.append(metrics_line(step, scalars))
            events += self._scalar_events(step, scalars)
            start = end
        self.progress.update(step, scalars)
        self._submit_lines(lines)
        self.writer.submit(self.event_file, events)

    def add_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write scalars that do not belong to an optimizer step, such as an evaluation's after `step` steps."""
        if self.is_writer and scalars:
            self._submit_lines([metrics_line(step, scalars)])
            self.writer.submit(self.event_file, self._scalar_events(step, scalars))

    def add_text(self, name: str, text: str) -> None:
        """Write a text to TensorBoard, such as the resolved config. It is shown verbatim."""
        self._submit_event(text_record, name, text)

    def add_image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Write an image, uint8 [H, W, 3], to TensorBoard. Large images are shrunk (`metrics.images`)."""
        self._submit_event(image_record, name, step, pixels)

    def add_video(self, step: int, name: str, frames: np.ndarray, fps: float) -> None:
        """Write a clip, uint8 [F, H, W, 3], to TensorBoard's images, as a GIF of at most 480 pixels and 8 fps."""
        self._submit_event(gif_record, name, step, frames, fps)

    def add_hparams(self, settings: Mapping[str, str | float | bool], metrics: Sequence[str]) -> None:
        """Write the settings and the tags of scalars by which TensorBoard's HParams tab compares runs."""
        if self.is_writer:
            start, end = hparams_records(settings, metrics)
            self.last_events = [end]
            self.writer.submit(self.event_file, start)

    def close(self) -> None:
        """Flush and close. Collective."""
        self.flush()
        if self.is_writer:
            self.progress.close()
            self.writer.submit(self.event_file, self.last_events)
            self.writer.close()
            if self.tracker_writer:
                self.tracker_writer.close()

    def _scalar_events(self, step: int, scalars: Mapping[str, float]) -> list[bytes]:
        """Return the records of a step's scalars, and of the layout of the charts if there are new tags."""
        records = [scalars_record(step, scalars)]
        if not self.tags.issuperset(scalars):
            self.tags.update(scalars)
            records.append(layout_record(self.tags))
        return records

    def _submit_lines(self, lines: list[bytes]) -> None:
        self.writer.submit(self.metrics_file, lines)
        if self.trackers and self.tracker_writer:
            self.tracker_writer.submit(self.trackers, lines)

    def _submit_event(self, make_record: Callable[..., bytes], name: str, *args: Any) -> None:
        if not self.is_writer:
            return
        try:
            record = make_record(name, *args)
        except Exception as error:  # an image must not end a run
            log_failure(logger, f"{name}: cannot be written for TensorBoard ({brief(error)}).", error)
            return
        self.writer.submit(self.event_file, [record])
