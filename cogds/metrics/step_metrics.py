"""Metrics of one optimizer step on one rank, as a vector that a single sum over the ranks reduces."""

import math
import resource
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

NUM_TIMESTEP_QUARTERS = 4


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak of the device's allocator; on a CPU, of this process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_host_bytes()


def reset_peak_memory(device: torch.device) -> None:
    """Restart the peak of the device's allocator. That of a process's resident memory cannot be restarted."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_host_bytes() -> int:
    """Return the peak of this process's resident memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class StepLosses:
    """Losses of one optimizer step on this rank, in one float64 vector on the device.

    Layout: [loss, then sum and count per bucket, then sum and count per quarter of the timesteps].
    """

    def __init__(self, num_buckets: int, device: torch.device):
        self.num_buckets = num_buckets
        self.vector = torch.zeros(1 + 2 * (num_buckets + NUM_TIMESTEP_QUARTERS), dtype=torch.float64, device=device)

    def add(self, mean_loss: torch.Tensor, losses: torch.Tensor, bucket: int, quarters: torch.Tensor) -> None:
        """Add a micro-step: its share of the global mean loss, its losses [B] and their timestep quarters int64 [B]."""
        losses, first_quarter = losses.detach().double(), 1 + 2 * self.num_buckets
        self.vector[0] += mean_loss.detach()
        self.vector[1 + 2 * bucket] += losses.sum()
        self.vector[2 + 2 * bucket] += len(losses)
        self.vector.index_add_(0, first_quarter + 2 * quarters, losses)
        self.vector.index_add_(0, first_quarter + 2 * quarters + 1, torch.ones_like(losses))


@dataclass(frozen=True)
class SquaredNorms:
    """Squared norms of parts of the LoRA: the tags of the norms, and this rank's shares, float64 on the device."""

    names: Sequence[str]
    squares: torch.Tensor


@dataclass(frozen=True)
class RankValues:
    """Values that each rank measures by itself; NaN if unknown.

    busy_s: time in which the rank waited for its data and ran its forward pass. It is unknown if ranks wait for one
    another in that time too.
    """

    busy_s: float = math.nan
    device_bytes: float = math.nan
    host_bytes: float = math.nan


@dataclass(frozen=True)
class StepMetrics:
    """Metrics of one optimizer step on one rank.

    scalars: values that are the same on every rank, by tag. losses: `StepLosses.vector`.
    """

    step: int
    scalars: dict[str, Any]
    losses: torch.Tensor
    values: RankValues
    norms: SquaredNorms | None

    def to_vector(self, rank: int, num_ranks: int) -> torch.Tensor:
        """Return the float64 vector to sum over ranks: losses, squared norms, and each rank value once per rank."""
        by_rank = torch.zeros(3, num_ranks, dtype=torch.float64)
        values = [self.values.busy_s, self.values.device_bytes, self.values.host_bytes]
        by_rank[:, rank] = torch.tensor(values, dtype=torch.float64)
        norms = [self.norms.squares] if self.norms else []
        return torch.cat([self.losses, *norms, by_rank.flatten().to(self.losses.device)])

    def reduced(self, sums: Sequence[float], num_ranks: int, bucket_labels: Sequence[str]) -> dict[str, float]:
        """Return scalars by tag from the vector summed over ranks."""
        losses, rest = sums[: len(self.losses)], sums[len(self.losses) :]
        norm_names = self.norms.names if self.norms else ()
        squares, by_rank = rest[: len(norm_names)], rest[len(norm_names) :]
        scalars = {"train/loss": losses[0]}
        labels = [*bucket_labels, *(f"t_q{quarter + 1}" for quarter in range(NUM_TIMESTEP_QUARTERS))]
        for label, total, count in zip(labels, losses[1::2], losses[2::2]):
            if count:
                scalars[f"train/loss/{label}"] = total / count
        scalars |= {name: math.sqrt(max(square, 0.0)) for name, square in zip(norm_names, squares)}
        busy_s, device_bytes, host_bytes = (by_rank[n * num_ranks : (n + 1) * num_ranks] for n in range(3))
        return scalars | _reduce_rank_values(busy_s, device_bytes, host_bytes)


def _reduce_rank_values(
    busy_s: Sequence[float], device_bytes: Sequence[float], host_bytes: Sequence[float]
) -> dict[str, float]:
    scalars = {}
    if len(busy_s) > 1 and all(map(math.isfinite, busy_s)) and median(busy_s) > 0:
        scalars["perf/rank_skew"] = max(busy_s) / median(busy_s)
    for name, sizes in (("perf/peak_memory_gb", device_bytes), ("perf/peak_host_memory_gb", host_bytes)):
        if all(map(math.isfinite, sizes)):
            scalars[name] = max(sizes) / 1e9
    return scalars
