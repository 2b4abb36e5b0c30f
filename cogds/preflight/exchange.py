"""All-reduces over all ranks: whether the sums are right, and how fast they come."""

import statistics
import time

import torch

from cogds.distributed.collectives import all_reduce_sum, any_rank, barrier
from cogds.distributed.world import World
from cogds.formatting import gigabytes
from cogds.preflight.finding import FAIL, OK, WARN, Facts, Finding, who

SIZES = (1, 1000, 1_000_003)  # numbers; none of them needs to be a multiple of anything
LARGE_BYTES = {"cuda": 256 << 20, "cpu": 8 << 20}
NUM_WARM_UP, NUM_TIMED = 3, 7
# Slower than a 10-gigabit network: something fell back to a management interface.
SLOW_BYTES_PER_S = 0.5e9


def wrong_sums(world: World) -> list[int]:
    """The sizes whose all-reduce is not the sum. Collective."""
    wrong = []
    for size in SIZES:
        pattern = torch.arange(size, device=world.device, dtype=torch.float32) % 1000
        total = all_reduce_sum(world, pattern + world.rank)
        # Whole numbers below 2^24: exact in float32, in whatever order they are added.
        expected = pattern * world.size + world.size * (world.size - 1) / 2
        if not torch.equal(total, expected):
            wrong.append(size)
    return wrong


def _seconds(world: World, num_bytes: int) -> float:
    """Of one all-reduce, the median of several."""
    tensor = torch.ones(num_bytes // 4, device=world.device)
    timings = []
    for _ in range(NUM_WARM_UP + NUM_TIMED):
        tensor.fill_(1.0)
        barrier(world)
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
        start = time.perf_counter()
        all_reduce_sum(world, tensor)
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
        timings.append(time.perf_counter() - start)
    return statistics.median(timings[NUM_WARM_UP:])


def look_exchange(world: World, gradient_bytes: int) -> Facts:
    """`exchange`: wrong sizes, seconds of a large and of a small all-reduce. Collective.

    gradient_bytes: what every step exchanges of the LoRA.
    """
    return {
        "exchange": {
            "wrong": wrong_sums(world),
            # What the run asks the others over the CPUs at every step, whatever carries the gradients.
            "heard": any_rank(world, world.rank == world.size - 1) == (True,),
            "large_bytes": LARGE_BYTES[world.device.type],
            "large_s": _seconds(world, LARGE_BYTES[world.device.type]),
            "small_s": _seconds(world, 4),
            "gradient_bytes": gradient_bytes,
            "device": world.device.type,
        }
    }


def bandwidths(num_bytes: float, seconds: float, num_ranks: int) -> tuple[float, float]:
    """Of an all-reduce, bytes per second: of its input, and on the bus, where every byte goes 2 (n - 1) / n times."""
    return num_bytes / seconds, num_bytes / seconds * 2 * (num_ranks - 1) / num_ranks


def judge_exchange(facts: list[Facts]) -> list[Finding]:
    """Sums are right on every rank, and not absurdly slow."""
    if len(facts) == 1:
        return [Finding("exchange", OK, "one rank exchanges nothing")]
    found = []
    if wrong := [one for one in facts if one["exchange"]["wrong"] or not one["exchange"]["heard"]]:
        sizes = sorted({size for one in wrong for size in one["exchange"]["wrong"]})
        numbers = f" of {', '.join(f'{size:,}' for size in sizes)} numbers" if sizes else " over the CPUs"
        found.append(Finding("exchange", FAIL, f"an all-reduce{numbers} gave a wrong result on {who(wrong)}"))
    slowest = max(facts, key=lambda one: one["exchange"]["large_s"])["exchange"]
    algorithm, bus = bandwidths(slowest["large_bytes"], slowest["large_s"], len(facts))
    large, gradients = slowest["large_bytes"], slowest["gradient_bytes"]
    text = (
        f"all-reduce of {gigabytes(large)}: {algorithm / 1e9:.2f} GB/s, {bus / 1e9:.2f} GB/s on the bus; "
        f"of one number: {slowest['small_s'] * 1e6:,.0f} us; the LoRA's gradients ({gigabytes(gradients)}) take about "
        f"{gradients / algorithm:.3f} s a step"
    )
    slow = slowest["device"] == "cuda" and bus < SLOW_BYTES_PER_S
    note = "; slow: look at network.interface and NCCL_DEBUG=INFO" if slow else ""
    return [*found, Finding("exchange", WARN if slow else OK, text + note)]
