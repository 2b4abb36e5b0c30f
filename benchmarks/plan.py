"""How long Plan.at(step) takes, and what it leaves behind: 10 million clips in 30 uneven buckets.

    python benchmarks/plan.py

Prints a table, then one line of JSON: construction, median and 99th percentile in microseconds for each world size
and step, one rank's clips, and the bytes that 10,000 steps leave allocated, per step.
"""

import gc
import json
import random
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cogds.core.plan import Plan

NUM_CLIPS, NUM_BUCKETS, BATCH_SIZE, ACCUMULATION = 10_000_000, 30, 2, 1
WORLD_SIZES = (1, 8, 64, 512)
STEPS = (0, 5_000, 5_000_000, 5_000_000_000)
CALLS = 500


def bucket_sizes() -> tuple[int, ...]:
    """Sizes over three decades, as real folders have them."""
    generator = random.Random(0)
    shares = [10 ** generator.uniform(-3, 0) for _ in range(NUM_BUCKETS)]
    sizes = [int(NUM_CLIPS * share / sum(shares)) for share in shares]
    sizes[-1] += NUM_CLIPS - sum(sizes)
    return tuple(sizes)


def quantiles_us(call: Callable[[int], object], first: int) -> dict[str, float]:
    """Median and 99th percentile of call(first), call(first + 1), ... in microseconds."""
    times = []
    for step in range(first, first + CALLS):
        start = time.perf_counter_ns()
        call(step)
        times.append((time.perf_counter_ns() - start) / 1000)
    return {"median_us": round(statistics.median(times), 1), "p99_us": round(statistics.quantiles(times, n=100)[98], 1)}


def growth_bytes_per_step(plan: Plan, num_steps: int = 10_000) -> float:
    """Bytes that remain allocated after plan.at over many steps, per step."""

    def traced(steps: range) -> int:
        for step in steps:
            plan.at(step)
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    before = traced(range(100))
    after = traced(range(100, 100 + num_steps))
    tracemalloc.stop()
    return (after - before) / num_steps


def main() -> None:
    sizes = bucket_sizes()
    rows = []
    print(f"{NUM_CLIPS:,} clips, {NUM_BUCKETS} buckets of {min(sizes):,} to {max(sizes):,}")
    print(f"{'world':>6} {'step':>14} {'at median':>12} {'at p99':>12} {'one rank, median':>18}   (us)")
    for world_size in WORLD_SIZES:
        start = time.perf_counter_ns()
        plan = Plan(sizes, (BATCH_SIZE,) * NUM_BUCKETS, world_size, ACCUMULATION, seed=0)
        plan.at(0)
        construction_us = (time.perf_counter_ns() - start) / 1000
        for step in STEPS:
            at = quantiles_us(plan.at, step)
            rank = quantiles_us(lambda s, plan=plan: plan.at(s)[0].clips_of(plan.world_size - 1), step)  # type: ignore[misc]
            rows.append({"world_size": world_size, "step": step, **at, "with_clips_median_us": rank["median_us"]})
            print(
                f"{world_size:>6} {step:>14,} {at['median_us']:>12} {at['p99_us']:>12} {rank['median_us']:>18}",
                flush=True,
            )
        rows[-1]["construction_and_first_step_us"] = round(construction_us, 1)
    growth = growth_bytes_per_step(plan)
    print(f"construction and first step: {construction_us:.0f} us; growth: {growth:.4f} bytes a step over 10,000 steps")
    slowest = max(row["p99_us"] for row in rows)
    print(json.dumps({"benchmark": "plan", "slowest_p99_us": slowest, "growth_bytes_per_step": growth, "rows": rows}))


if __name__ == "__main__":
    main()
