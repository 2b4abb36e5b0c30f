"""All-reduces over all ranks: whether the sums are right, and how long they take."""

import statistics
import time

import torch

from cogds.distributed.collectives import all_reduce_sum, any_rank, barrier
from cogds.distributed.world import World
from cogds.formatting import gigabytes
from cogds.preflight.findings import FAIL, OK, WARN, Finding, RankResult, describe_ranks

SIZES = (1, 1000, 1_000_003)  # numbers per all-reduce; the last is not a multiple of anything useful
LARGE_BYTES = {"cuda": 256 << 20, "cpu": 8 << 20}
SMALL_BYTES = 4
NUM_WARM_UP, NUM_TIMED = 3, 7
# Slower than a 10-gigabit network: the ranks probably use a management interface.
SLOW_BYTES_PER_S = 0.5e9


def find_wrong_sums(world: World) -> list[int]:
    """Return the sizes whose all-reduce gives a wrong sum. Collective."""
    wrong = []
    for size in SIZES:
        pattern = torch.arange(size, device=world.device, dtype=torch.float32) % 1000
        total = all_reduce_sum(world, pattern + world.rank)
        # Whole numbers below 2^24 are exact in float32, in any order of the additions.
        expected = pattern * world.size + world.size * (world.size - 1) / 2
        if not torch.equal(total, expected):
            wrong.append(size)
    return wrong


def time_all_reduce(world: World, num_bytes: int) -> float:
    """Return the median time of an all-reduce [s]. Collective."""
    tensor = torch.ones(num_bytes // 4, device=world.device)
    timings_s = []
    for _ in range(NUM_WARM_UP + NUM_TIMED):
        tensor.fill_(1.0)
        barrier(world)
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
        start = time.perf_counter()
        all_reduce_sum(world, tensor)
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
        timings_s.append(time.perf_counter() - start)
    return statistics.median(timings_s[NUM_WARM_UP:])


def measure_exchange(world: World, gradient_bytes: int) -> RankResult:
    """Return `exchange`: the sizes with wrong sums, and the times of a large and a small all-reduce. Collective.

    Args:
        gradient_bytes: size of the LoRA's gradients, which every step all-reduces.
    """
    large_bytes = LARGE_BYTES[world.device.type]
    return {
        "exchange": {
            "wrong_sizes": find_wrong_sums(world),
            # Training compares flags over gloo at every step, even if NCCL reduces the gradients.
            "is_flag_received": any_rank(world, world.rank == world.size - 1) == (True,),
            "large_bytes": large_bytes,
            "large_s": time_all_reduce(world, large_bytes),
            "small_s": time_all_reduce(world, SMALL_BYTES),
            "gradient_bytes": gradient_bytes,
            "device": world.device.type,
        }
    }


def bandwidths(num_bytes: float, seconds: float, num_ranks: int) -> tuple[float, float]:
    """Return the algorithm and bus bandwidth of an all-reduce [bytes/s], as nccl-tests defines them.

    The bus carries every byte 2 (n - 1) / n times.
    """
    return num_bytes / seconds, num_bytes / seconds * 2 * (num_ranks - 1) / num_ranks


def assess_exchange(results: list[RankResult]) -> list[Finding]:
    """The sums must be right on every rank. A very low bandwidth is a warning."""
    if len(results) == 1:
        return [Finding("exchange", OK, "not needed: there is only one rank")]
    findings = []
    failed = [
        result for result in results if result["exchange"]["wrong_sizes"] or not result["exchange"]["is_flag_received"]
    ]
    if failed:
        sizes = sorted({size for result in failed for size in result["exchange"]["wrong_sizes"]})
        operation = f" of {', '.join(f'{size:,}' for size in sizes)} numbers" if sizes else " of a flag over gloo"
        text = f"an all-reduce{operation} gave a wrong result on {describe_ranks(failed)}. Check their network."
        findings.append(Finding("exchange", FAIL, text))
    slowest = max(results, key=lambda result: result["exchange"]["large_s"])["exchange"]
    algorithm, bus = bandwidths(slowest["large_bytes"], slowest["large_s"], len(results))
    large, gradients = slowest["large_bytes"], slowest["gradient_bytes"]
    text = (
        f"all-reduce of {gigabytes(large)}: {algorithm / 1e9:.2f} GB/s, bus {bus / 1e9:.2f} GB/s; of {SMALL_BYTES} "
        f"bytes: {slowest['small_s'] * 1e6:,.0f} us; LoRA gradients ({gigabytes(gradients)}): about "
        f"{gradients / algorithm:.3f} s/step"
    )
    is_slow = slowest["device"] == "cuda" and bus < SLOW_BYTES_PER_S
    if is_slow:
        text += ". This is slow: check network.interface, and the log with NCCL_DEBUG=INFO."
    return [*findings, Finding("exchange", WARN if is_slow else OK, text)]
