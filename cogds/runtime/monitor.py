"""What the run says of itself: TensorBoard, `metrics.jsonl` and a progress bar, all from the same scalars.

A step hands over its losses as tensors and is not waited for: once every few steps they are summed over the ranks and
read.
"""

import json
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from cogds.core.geometry import ClipShape
from cogds.files import whole_file
from cogds.runtime.world import World, all_reduce_sum

NUM_QUARTERS = 4


def rewind_metrics(file: Path, step: int) -> None:
    """Drop the lines past `step` (and one that a kill cut short), so that a resumed run writes each step once."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    with whole_file(file) as partial:
        partial.write_text("".join(kept))


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
        """first_step: steps already trained; metrics past it are rewound. every: steps between two flushes."""
        self.world, self.buckets, self.every = world, buckets, every
        self.pending: list[tuple[dict[str, Any], torch.Tensor]] = []
        self.writes = world.rank == 0
        if self.writes:
            rewind_metrics(output_dir / "metrics.jsonl", first_step)
            self.file = (output_dir / "metrics.jsonl").open("a")
            self.board = SummaryWriter(
                str(output_dir / "tensorboard"), purge_step=first_step + 1 if first_step else None
            )
            # disable=None: no bar where there is no terminal; `_say` writes lines there.
            hidden = None if progress_bar else True
            self.bar = tqdm(total=num_steps, initial=first_step, unit="step", disable=hidden, dynamic_ncols=True)
            self.num_steps, self.said_at = num_steps, 0.0

    def record(self, step: int, scalars: dict[str, Any], losses: StepLosses) -> None:
        """Hand over optimizer step `step` (1 is the first). Collective every `every` steps."""
        self.pending.append(({"step": step, **scalars}, losses.vector))
        if step % self.every == 0:
            self.flush()

    def flush(self) -> None:
        """Sum the pending losses over the ranks and write them. Collective."""
        if not self.pending:
            return
        # A host sync: everything up to here was only queued on the device.
        sums = all_reduce_sum(self.world, torch.stack([vector for _, vector in self.pending])).tolist()
        records, self.pending = self.pending, []
        if not self.writes:
            return
        for (scalars, _), vector in zip(records, sums):
            step = scalars.pop("step")
            named = {"train/loss": vector[0]}
            labels = [f"bucket={bucket}" for bucket in self.buckets] + [f"t_q{q + 1}" for q in range(NUM_QUARTERS)]
            for label, total, count in zip(labels, vector[1::2], vector[2::2]):
                if count:
                    named[f"train/loss/{label}"] = total / count
            named |= {name: float(value) for name, value in scalars.items() if value is not None}
            self.file.write(json.dumps({"step": step, **named}) + "\n")
            for name, value in named.items():
                self.board.add_scalar(name, value, step)
            self._say(step, named)
        self.file.flush()
        self.board.flush()

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
            self.board.add_text(name, "    " + text.replace("\n", "\n    "))

    def close(self) -> None:
        """Flush and close. Collective."""
        self.flush()
        if self.writes:
            self.bar.close()
            self.board.close()
            self.file.close()


class Stopwatch:
    """Seconds since the last reading."""

    def __init__(self) -> None:
        self.last = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        elapsed, self.last = now - self.last, now
        return elapsed
