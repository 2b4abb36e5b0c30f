"""What the ranks find out in one optimizer step, laid out so that one sum over the ranks brings it together."""

import math
import resource
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

NUM_QUARTERS = 4


def peak_memory_bytes(device: torch.device) -> int:
    """Peak of the device's allocator, or of this process's resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_host_bytes()


def restart_peak(device: torch.device) -> None:
    """The peak of the device's allocator counts from here on. A CPU's, which is the process's, cannot be restarted."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_host_bytes() -> int:
    """Peak of this process's resident memory."""
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


@dataclass(frozen=True)
class Norms:
    """Norms of parts of the LoRA: names of scalars, and this rank's shares of their squares, float64 on the device."""

    names: Sequence[str]
    squares: torch.Tensor


@dataclass(frozen=True)
class OwnValues:
    """What one rank knows of itself; NaN: unknown. busy_s: of a step, waiting for its data and in its forward pass;
    unknown too where ranks wait for one another within that."""

    busy_s: float = math.nan
    device_bytes: float = math.nan
    host_bytes: float = math.nan


@dataclass(frozen=True)
class Tally:
    """One optimizer step on one rank. scalars: what every rank knows by itself, by name, `step` among them."""

    scalars: dict[str, Any]
    losses: torch.Tensor
    own: OwnValues
    norms: Norms | None

    def vector(self, rank: int, num_ranks: int) -> torch.Tensor:
        """float64, to be summed: losses, squares of norms, then of each own value one place for every rank."""
        own = torch.zeros(3, num_ranks, dtype=torch.float64)
        mine = [self.own.busy_s, self.own.device_bytes, self.own.host_bytes]
        own[:, rank] = torch.tensor(mine, dtype=torch.float64)
        parts = [self.losses, *([self.norms.squares] if self.norms else []), own.flatten().to(self.losses.device)]
        return torch.cat(parts)

    def named(self, sums: Sequence[float], num_ranks: int, labels: Sequence[str]) -> dict[str, float]:
        """Scalars out of the vector summed over the ranks. labels: of the buckets."""
        losses, rest = sums[: len(self.losses)], sums[len(self.losses) :]
        norms = self.norms.names if self.norms else ()
        squares, own = rest[: len(norms)], rest[len(norms) :]
        named = {"train/loss": losses[0]}
        labels = [*labels, *(f"t_q{quarter + 1}" for quarter in range(NUM_QUARTERS))]
        for label, total, count in zip(labels, losses[1::2], losses[2::2]):
            if count:
                named[f"train/loss/{label}"] = total / count
        named |= {name: math.sqrt(max(square, 0.0)) for name, square in zip(norms, squares)}
        busy, device, host = (own[n * num_ranks : (n + 1) * num_ranks] for n in range(3))
        return named | _of_all_ranks(busy, device, host)


def _of_all_ranks(busy: Sequence[float], device: Sequence[float], host: Sequence[float]) -> dict[str, float]:
    found = {}
    if len(busy) > 1 and all(map(math.isfinite, busy)) and median(busy) > 0:
        found["perf/rank_skew"] = max(busy) / median(busy)
    for name, sizes in (("perf/peak_memory_gb", device), ("perf/peak_host_memory_gb", host)):
        if all(map(math.isfinite, sizes)):
            found[name] = max(sizes) / 1e9
    return found
