"""What the run says of itself: TensorBoard, `metrics.jsonl` and a progress bar, all from the same scalars.

A step hands over its losses as tensors and is not waited for: once every few steps they are summed over the ranks and
read. No disk ends a run: what cannot be written is kept, said, and written later (`Outlet`).
"""

import contextlib
import io
import json
import math
import os
import resource
import socket
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import text as text_summary
from tqdm import tqdm

from cogds.core.geometry import ClipShape
from cogds.errors import UserError
from cogds.files import whole_file
from cogds.runtime.world import World, all_reduce_sum

NUM_QUARTERS = 4
MAX_KEPT = 10_000  # records that wait for a disk, about 10 MB
WARN_EVERY_S = 60.0


def rewind_metrics(file: Path, step: int) -> None:
    """Drop the lines past `step` (and what a kill or a power cut left half), so that a resumed run writes each step
    once. Raises UserError where the file is there and cannot be read or replaced: no run has begun that this ends."""
    try:
        with file.open("rb") as lines, whole_file(file) as partial, partial.open("wb") as kept:
            for line in lines:
                if _step_of(line) <= step:
                    kept.write(line.rstrip(b"\n") + b"\n")
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(
            f"{file}: the metrics of the steps before {step} cannot be taken over ({error.strerror or error}): mend "
            "that, or move the file away to begin a new one"
        ) from None


def _step_of(line: bytes) -> float:
    """The step of a line of metrics; infinite where it is none."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _warn(text: str) -> None:
    with contextlib.suppress(OSError):  # stderr may be a file on the same full disk, or a pipe whose reader is gone
        print(f"warning: {text}", file=sys.stderr, flush=True)


class Outlet:
    """Records on their way to the end of one file. What cannot be written is kept and goes before the next ones.

    It never raises. The file is opened for each writing: one that was held open would go on in a folder that is
    gone. TensorBoard's own writer is not used: its thread loses what it could not write, says so with the next call,
    and is dead from then on.
    """

    def __init__(self, path: Path, head: bytes = b"") -> None:
        """head: what the file begins with. Its folder is made where that folder's parent is there."""
        self.path, self.num_lost = path, 0
        self._head, self._kept = head, deque[bytes](maxlen=MAX_KEPT)
        self._torn_at: int | None = None  # what stands from this byte on was written in part
        self._warned_at = -math.inf

    def write(self, records: Sequence[bytes] = ()) -> None:
        """Append the records, after those that were kept."""
        self.num_lost += max(0, len(self._kept) + len(records) - MAX_KEPT)
        self._kept.extend(records)
        try:
            self._append(b"".join(self._kept))
        except OSError as error:
            if time.monotonic() - self._warned_at >= WARN_EVERY_S:
                self._warned_at = time.monotonic()
                _warn(
                    f"{self.path} cannot be written ({error.strerror or error}): training goes on; "
                    f"{len(self._kept)} records wait for the disk{self._losses()}"
                )
            return
        if self._warned_at > -math.inf:
            _warn(f"{self.path} is written again, {len(self._kept)} records with it{self._losses()}")
            self._warned_at = -math.inf
        self._kept.clear()

    def close(self) -> None:
        """Try a last time, and say what is left unwritten."""
        if self._kept:
            self.write()
        if num := len(self._kept):
            _warn(f"the last {num} records of {self.path} could not be written{self._losses()}")

    def _losses(self) -> str:
        return f"; {self.num_lost} older ones are lost" if self.num_lost else ""

    def _append(self, records: bytes) -> None:
        with contextlib.suppress(FileExistsError):
            self.path.parent.mkdir()
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            if self._torn_at is not None and self._torn_at < size:
                size = self._torn_at
                os.ftruncate(descriptor, size)
            rest = memoryview(records if size else self._head + records)
            self._torn_at, end = size, size
            try:
                while rest:
                    num = os.pwrite(descriptor, rest, end)
                    rest, end = rest[num:], end + num
            except OSError:
                with contextlib.suppress(OSError):  # else the next call, which knows where
                    os.ftruncate(descriptor, size)
                raise
        finally:
            os.close(descriptor)  # where a network disk says that it is full
        self._torn_at = None


def framed(event: Event) -> bytes:
    """An event as it stands in TensorBoard's files."""
    event.wall_time = time.time()
    buffer = io.BytesIO()
    RecordWriter(buffer).write(event.SerializeToString())
    return buffer.getvalue()


def framed_scalars(step: int, scalars: Mapping[str, float]) -> bytes:
    """Scalars of one step, as TensorBoard reads them."""
    values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
    return framed(Event(step=step, summary=Summary(value=values)))


def open_board(folder: Path, first_step: int) -> Outlet:
    """TensorBoard's file of a run that has trained `first_step` steps: later ones of earlier files are hidden."""
    head = framed(Event(file_version="brain.Event:2"))
    if first_step:
        head += framed(Event(step=first_step + 1, session_log=SessionLog(status=SessionLog.START)))
    # In the order of time, which is how TensorBoard reads a folder; no two of one host are alike.
    return Outlet(folder / f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}", head)


def peak_memory_bytes(device: torch.device) -> int:
    """Peak of the device's allocator, or of this process's resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class StepLosses:
    """The losses of one optimizer step on this rank, in one float64 vector on the device.

    Layout: [loss, then sum and count per bucket, then sum and count per quarter of the timesteps].
    """

    def __init__(self, num_buckets: int, device: torch.device):
        self.num_buckets = num_buckets
        self.vector = torch.zeros(1 + 2 * (num_buckets + NUM_QUARTERS), dtype=torch.float64, device=device)

    def add(self, mean_loss: torch.Tensor, losses: torch.Tensor, bucket: int, quarters: torch.Tensor) -> None:
        """mean_loss: this micro-step's share of the global mean; losses [B] and their timestep quarters int64 [B]."""
        losses, by_quarter = losses.detach().double(), 1 + 2 * self.num_buckets
        self.vector[0] += mean_loss.detach()
        self.vector[1 + 2 * bucket] += losses.sum()
        self.vector[2 + 2 * bucket] += len(losses)
        self.vector.index_add_(0, by_quarter + 2 * quarters, losses)
        self.vector.index_add_(0, by_quarter + 2 * quarters + 1, torch.ones_like(losses))


class Monitor:
    """Collects one record per optimizer step on every rank; rank 0 writes them."""

    def __init__(
        self,
        world: World,
        output_dir: Path,
        buckets: Sequence[ClipShape],
        first_step: int,
        num_steps: int,
        every: int,
        progress_bar: bool,
    ):
        """first_step: steps already trained, to which `rewind_metrics` has been. every: steps between two flushes."""
        self.world, self.buckets, self.every = world, buckets, every
        self.pending: list[tuple[dict[str, Any], torch.Tensor]] = []
        self.writes = world.rank == 0
        if self.writes:
            self.metrics = Outlet(output_dir / "metrics.jsonl")
            self.board = open_board(output_dir / "tensorboard", first_step)
            for outlet in (self.metrics, self.board):
                outlet.write()
            # disable=None: no bar where there is no terminal; `_say` writes lines there.
            hidden = None if progress_bar else True
            self.bar = tqdm(total=num_steps, initial=first_step, unit="step", disable=hidden, dynamic_ncols=True)
            self.num_steps, self.said_at = num_steps, 0.0

    def record(self, step: int, scalars: dict[str, Any], losses: StepLosses) -> None:
        """Hand over optimizer step `step` (1 is the first). Collective every `every` steps."""
        self.pending.append(({"step": step, **scalars}, losses.vector))
        if step % self.every == 0:
            self.flush()

    def note(self, step: int, scalars: dict[str, float]) -> None:
        """Scalars of what happens beside the steps, such as a save: TensorBoard only."""
        if self.writes:
            self.board.write([framed_scalars(step, scalars)])

    def flush(self) -> None:
        """Sum the pending losses over the ranks and write them. Collective."""
        if not self.pending:
            return
        # A host sync: everything up to here was only queued on the device.
        sums = all_reduce_sum(self.world, torch.stack([vector for _, vector in self.pending])).tolist()
        records, self.pending = self.pending, []
        if not self.writes:
            return
        lines, events = [], []
        for (scalars, _), vector in zip(records, sums):
            step = scalars.pop("step")
            named = {"train/loss": vector[0]}
            labels = [f"bucket={bucket}" for bucket in self.buckets] + [f"t_q{q + 1}" for q in range(NUM_QUARTERS)]
            for label, total, count in zip(labels, vector[1::2], vector[2::2]):
                if count:
                    named[f"train/loss/{label}"] = total / count
            named |= {name: float(value) for name, value in scalars.items() if value is not None}
            # JSON knows no infinity, TensorBoard does.
            finite = {name: value if math.isfinite(value) else None for name, value in named.items()}
            lines.append(json.dumps({"step": step, **finite}, allow_nan=False).encode() + b"\n")
            events.append(framed_scalars(step, named))
            with contextlib.suppress(OSError):  # the terminal, or whoever read our output, is gone
                self._say(step, named)
        self.metrics.write(lines)
        self.board.write(events)

    def _say(self, step: int, scalars: dict[str, float]) -> None:
        """Move the bar; where there is none, a line every ten seconds and at the end."""
        text = f"loss {scalars['train/loss']:.4f} lr {scalars['train/lr']:.2e}"
        self.bar.update(1)
        self.bar.set_postfix_str(text, refresh=False)
        if self.bar.disable and (step == self.num_steps or time.monotonic() - self.said_at > 10):
            self.said_at = time.monotonic()
            print(f"step {step}/{self.num_steps} {text} {scalars.get('perf/step_s', 0):.2f} s", flush=True)

    def text(self, name: str, text: str) -> None:
        """A text for TensorBoard, such as the resolved config."""
        if self.writes:
            self.board.write([framed(Event(summary=text_summary(name, "    " + text.replace("\n", "\n    "))))])

    def close(self) -> None:
        """Flush and close. Collective."""
        self.flush()
        if self.writes:
            with contextlib.suppress(OSError):
                self.bar.close()
            self.metrics.close()
            self.board.close()


class Stopwatch:
    """Seconds since the last reading."""

    def __init__(self) -> None:
        self.last = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        elapsed, self.last = now - self.last, now
        return elapsed
