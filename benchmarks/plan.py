"""Measure the speed of the plan, and simulate how much time it saves over other ways of assigning clips to GPUs.

    python benchmarks/plan.py [--clips N] [--index --folder DIR]

Speed: Plan.at(step) for N clips (100 million) in 30 uneven buckets, in both modes. With --index also an index file of N
rows, written into DIR (about 110 bytes per row, removed afterwards) and opened by a new process: time to the first
batch, and resident memory.

Simulation: 4,915 clips with sizes from the web and phones and log-uniform lengths in 30 buckets, batch size 1, three
epochs, on 8 and 64 ranks, and 300 clips on 64 ranks. The time of a clip is `core.flops.forward_flops`. The plan's two
modes are compared with three other methods, written from their descriptions: every rank shuffles on its own, so that a
step takes as long as its most expensive clip; all clips are stretched to one shape; every bucket is truncated to whole
global batches.

Prints tables, then one line of JSON.
"""

import argparse
import gc
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cogds.core.buckets import assign, crop_share, generate_buckets
from cogds.core.family import Family
from cogds.core.flops import forward_flops
from cogds.core.geometry import ClipShape, ModelGeometry, num_tokens
from cogds.core.mixture import Mixture
from cogds.core.plan import Plan
from cogds.data.loading.index import SCHEMA, ClipIndex, write_index

NUM_CLIPS, NUM_BUCKETS, BATCH_SIZE, ACCUMULATION = 100_000_000, 30, 2, 1
WORLD_SIZES = (1, 8, 64, 512)
STEPS = (0, 5_000, 5_000_000, 5_000_000_000)
CALLS = 300

# The geometry of CogVideoX-1.5, for the simulation: 42 layers of width 3072.
NUM_LAYERS, HIDDEN_SIZE, NUM_EPOCHS = 42, 3072, 3
GEOMETRY = ModelGeometry(
    vae_spatial=8,
    vae_temporal=4,
    latent_channels=16,
    patch_size=2,
    sample_height=300,
    sample_width=300,
    sample_frames=81,
    text_tokens=226,
    head_dim=64,
    family=Family(
        takes_image=True,
        patch_size_t=2,
        positions="rope_slice",
        has_ofs=True,
        scaling_factor=0.7,
        invert_scale_latents=True,
        scheduler="CogVideoXDPMScheduler",
    ),
)
AREAS, FRAMES = ("432x768",), (17, 33, 49, 65, 81)
ASPECT_RATIOS = ("21/9", "16/9", "4/3", "1/1", "3/4", "9/16")
ONE_SHAPE = ClipShape(49, 432, 768)


def bucket_sizes(num_clips: int) -> tuple[int, ...]:
    """Bucket sizes that span three orders of magnitude, as in real datasets."""
    generator = random.Random(0)
    shares = [10 ** generator.uniform(-3, 0) for _ in range(NUM_BUCKETS)]
    sizes = [int(num_clips * share / sum(shares)) for share in shares]
    sizes[-1] += num_clips - sum(sizes)
    return tuple(sizes)


def quantiles_us(call: Callable[[int], object], first: int) -> dict[str, float]:
    """Return median and 99th percentile of call(first), call(first + 1), ... in microseconds of CPU time."""
    times = []
    for step in range(first, first + CALLS):
        start = time.thread_time_ns()
        call(step)
        times.append((time.thread_time_ns() - start) / 1000)
    return {"median_us": round(statistics.median(times), 1), "p99_us": round(statistics.quantiles(times, n=100)[98], 1)}


def growth_bytes_per_step(plan: Plan, num_steps: int = 10_000) -> float:
    """Return the bytes per step that stay allocated after many calls of plan.at."""

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


def time_plan(num_clips: int) -> tuple[list[dict], float]:
    """Time Plan.at in both modes for several world sizes and steps. Also returns the growth in bytes per step."""
    sizes, rows = bucket_sizes(num_clips), []
    # Six groups of five buckets with similar costs, as different aspect ratios have.
    costs = tuple(1.5 ** (bucket // 5) * (1 + bucket % 5 / 200) for bucket in range(NUM_BUCKETS))
    print(f"{num_clips:,} clips, {NUM_BUCKETS} buckets of {min(sizes):,} to {max(sizes):,}")
    print(f"{'sync':>6} {'ranks':>6} {'step':>14} {'at median':>12} {'at p99':>12} {'one rank, median':>18}   (CPU us)")
    for sync in ("bucket", "cost"):
        for world_size in WORLD_SIZES:
            start = time.thread_time_ns()
            plan_costs = costs if sync == "cost" else ()
            plan = Plan(sizes, (BATCH_SIZE,) * NUM_BUCKETS, world_size, ACCUMULATION, seed=0, costs=plan_costs)
            plan.at(0)
            construction_us = (time.thread_time_ns() - start) / 1000
            for step in STEPS:
                at = quantiles_us(plan.at, step)
                rank = quantiles_us(lambda s, plan=plan: plan.at(s)[0].clips_of(plan.world_size - 1), step)  # type: ignore[misc]
                row = {"sync": sync, "world_size": world_size, "step": step, **at}
                rows.append(row | {"with_clips_median_us": rank["median_us"]})
                print(
                    f"{sync:>6} {world_size:>6} {step:>14,} {at['median_us']:>12} {at['p99_us']:>12} "
                    f"{rank['median_us']:>18}",
                    flush=True,
                )
            rows[-1]["construction_and_first_step_us"] = round(construction_us, 1)
    growth = growth_bytes_per_step(plan, 2_000)
    print(
        f"construction and first step: {construction_us:.0f} us, growth: {growth:.4f} bytes per step over 2,000 steps"
    )
    return rows, growth


def in_lists(values: pa.Array) -> pa.ListArray:
    """Put each value into a list of its own."""
    return pa.ListArray.from_arrays(np.arange(len(values) + 1, dtype=np.int32), values)


def index_tables(num_clips: int, rows_per_table: int = 1 << 20) -> Iterator[pa.Table]:
    """Yield rows of an index of synthetic clips, a million at a time."""
    generator = np.random.default_rng(0)
    for first in range(0, num_clips, rows_per_table):
        n = min(rows_per_table, num_clips - first)
        numbers = pa.array(np.arange(first, first + n)).cast(pa.string())
        keys = [pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), n, [None, pa.py_buffer(generator.bytes(16 * n))])]
        columns = {
            "path": pc.binary_join_element_wise("/clips/", numbers, ".mp4", ""),
            "kind": pa.repeat("video", n),
            "image_path": pa.nulls(n, pa.string()),
            "captions": in_lists(pa.repeat("a clip of something", n)),
            "start_s": pa.repeat(0.0, n),
            "clip_key": keys[0],
            "caption_keys": in_lists(keys[0]),
            "clip_place": pa.repeat(pa.scalar(0, pa.int32()), n),
            "caption_places": in_lists(pa.repeat(pa.scalar(0, pa.int32()), n)),
        }
        yield pa.table(columns, SCHEMA)


def time_index(num_clips: int, folder: Path) -> dict:
    """Write an index with num_clips rows into a temporary folder, and open it in a new process."""
    sizes = [[n] for n in bucket_sizes(num_clips)]
    shapes = generate_buckets(AREAS, ASPECT_RATIOS, FRAMES, GEOMETRY)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        start = time.perf_counter()
        index = write_index(
            Path(temporary), index_tables(num_clips), shapes, sizes, {"clips": ["a"], "captions": ["a"]}
        )
        write_s = time.perf_counter() - start
        done = subprocess.run(
            [sys.executable, __file__, "--open", str(index.path)],
            check=True,
            capture_output=True,
            text=True,
            timeout=600,
        )
        measured = json.loads(done.stdout)
        size_bytes = index.path.stat().st_size
    result = {"num_clips": num_clips, "index_bytes": size_bytes, "write_s": round(write_s, 1), **measured}
    print(f"\nindex of {num_clips:,} rows, {size_bytes / 1e9:.2f} GB, written in {write_s:.0f} s. In a new process:")
    for name, value in measured.items():
        print(f"  {name:<32} {value:,}")
    return result


def resident_bytes() -> dict[str, int]:
    """This process's resident memory. own: anonymous memory; mapped: files, shared with other ranks."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(fields[key].split()[0]) * 1024 for name, key in (("own", "RssAnon"), ("mapped", "RssFile"))}


def open_index(path: str) -> dict:
    """Measure opening an index and reading the rows of the first batch, then of 1,000 more, for one rank of 64."""
    imported = resident_bytes()
    start = time.perf_counter()
    index = ClipIndex(path)
    mixture = Mixture(index.sizes, (1.0,) * len(index.sizes[0]), seed=0)
    plan = Plan(mixture.virtual_sizes, (BATCH_SIZE,) * len(mixture.sizes), 64, ACCUMULATION, seed=0)

    def rows(step: int) -> list:
        return [
            index[index.row(part.bucket, mixture.visit(part.bucket, k).clip)]
            for micro in plan.at(step)
            for part in [micro.batch_of(63)[0]]
            for k in micro.positions_of(63)
        ]

    first = rows(0)
    first_batch_s = time.perf_counter() - start
    assert len(first) == BATCH_SIZE
    after_first = resident_bytes()
    start = time.perf_counter()
    for step in range(1, 1001):
        rows(step)
    per_step_us = (time.perf_counter() - start) * 1000
    after_many = resident_bytes()
    return {
        "first_batch_ms": round(first_batch_s * 1000, 2),
        "later_batch_us": round(per_step_us, 1),
        "imports_own_bytes": imported["own"],
        "imports_mapped_bytes": imported["mapped"],
        "first_batch_own_bytes": after_first["own"],
        "first_batch_mapped_bytes": after_first["mapped"],
        "1000_steps_own_bytes": after_many["own"],
        "1000_steps_mapped_bytes": after_many["mapped"],
    }


@dataclass(frozen=True)
class Clips:
    """Synthetic clips in buckets. heights, widths: in pixels; bucket_of: bucket index of each clip."""

    heights: np.ndarray
    widths: np.ndarray
    bucket_of: np.ndarray
    buckets: tuple[ClipShape, ...]

    def members(self, bucket: int) -> np.ndarray:
        """Indices of the bucket's clips."""
        return np.flatnonzero(self.bucket_of == bucket)

    def costs(self) -> np.ndarray:
        """Operations for one clip of each bucket."""
        return np.array([forward_flops(num_tokens(shape, GEOMETRY), NUM_LAYERS, HIDDEN_SIZE) for shape in self.buckets])


def draw_clips(num_clips: int, seed: int = 0) -> Clips:
    """Draw clips with typical web and phone sizes, mostly 16:9 or 9:16, and 17 to 1,000 frames, log-uniform."""
    generator = np.random.default_rng(seed)
    buckets = generate_buckets(AREAS, ASPECT_RATIOS, FRAMES, GEOMETRY)
    ratios = generator.choice([16 / 9, 9 / 16, 4 / 3, 1.0, 3 / 4, 2.35, 19.5 / 9, 9 / 19.5], num_clips, p=[
        0.45, 0.22, 0.09, 0.07, 0.03, 0.05, 0.04, 0.05
    ])  # fmt: skip
    # One in five clips was cropped manually to a slightly different ratio.
    ratios = ratios * np.where(generator.random(num_clips) < 0.2, np.exp(generator.normal(0, 0.08, num_clips)), 1.0)
    short_sides = generator.choice([480, 720, 1080, 2160], num_clips, p=[0.15, 0.35, 0.4, 0.1])
    heights = np.round(np.where(ratios >= 1, short_sides, short_sides / ratios)).astype(int)
    widths = np.round(heights * ratios).astype(int)
    frames = np.exp(generator.uniform(math.log(17), math.log(1000), num_clips)).astype(int)
    assigned = [assign(int(f), int(h), int(w), buckets) for f, h, w in zip(frames, heights, widths)]
    return Clips(heights, widths, np.array(assigned), buckets)


@dataclass(frozen=True)
class Outcome:
    """Result of one method over NUM_EPOCHS epochs.

    Attributes:
        idle_share: share of the ranks' time spent waiting for the slowest rank.
        copies_share: share of the slots with a clip that is also in another slot of the step.
        deviation: largest |number of times trained - NUM_EPOCHS| of a clip.
        flop_per_clip: of all ranks, including idle time, per clip of a step that is not a copy.
        cropped_share: mean share of pixels cropped away.
        mean_distortion: mean |ln| of the change of the aspect ratio.
        distorted_share: share of clips whose aspect ratio changes by more than 10%.
    """

    way: str
    num_ranks: int
    num_clips: int
    num_steps: int
    idle_share: float
    copies_share: float
    never_seen: int
    deviation: int
    flop_per_clip: float
    cropped_share: float
    mean_distortion: float
    distorted_share: float


def outcome(
    way: str,
    num_ranks: int,
    clips: Clips,
    steps: Sequence[tuple[np.ndarray, np.ndarray]],
    costs: np.ndarray,
    stretched: bool = False,
) -> Outcome:
    """Evaluate one method.

    Args:
        steps: for each step, the clip of every rank (batch size 1), and the clips that count as trained: ranks that
            train copies of a clip share its weight, so it counts once.
        costs: operations for each clip.
        stretched: all clips are stretched to ONE_SHAPE.
    """
    seen = np.zeros(len(clips.bucket_of), int)
    used = spent = 0.0
    slots = distinct = 0
    for step, drawn in steps:
        np.add.at(seen, drawn, 1)
        slots, distinct = slots + len(step), distinct + len(np.unique(step))
        used, spent = used + costs[step].sum(), spent + costs[step].max() * num_ranks
    pairs = list(zip(clips.heights.tolist(), clips.widths.tolist(), clips.bucket_of.tolist()))
    cropped = 0.0 if stretched else float(np.mean([crop_share(h, w, clips.buckets[b]) for h, w, b in pairs]))
    target = ONE_SHAPE.width / ONE_SHAPE.height
    changes = np.abs(np.log(clips.widths / clips.heights / target)) if stretched else np.zeros(len(seen))
    return Outcome(
        way=way,
        num_ranks=num_ranks,
        num_clips=len(seen),
        num_steps=len(steps),
        idle_share=float(1 - used / spent) if spent else 0.0,
        copies_share=1 - distinct / slots if slots else 0.0,
        never_seen=int((seen == 0).sum()),
        deviation=int(np.abs(seen - NUM_EPOCHS).max()),
        flop_per_clip=float(spent / distinct) if distinct else 0.0,
        cropped_share=cropped,
        mean_distortion=float(changes.mean()),
        distorted_share=float((changes > math.log(1.1)).mean()),
    )


def by_plan(clips: Clips, num_ranks: int, costs: Sequence[float]) -> list[tuple[np.ndarray, np.ndarray]]:
    """cogds' plan: all ranks train one bucket, or with costs buckets of the same cost."""
    members = [clips.members(bucket) for bucket in range(len(clips.buckets))]
    plan = Plan(tuple(map(len, members)), (1,) * len(members), num_ranks, 1, seed=0, costs=tuple(costs))
    steps = []
    for step in range(plan.step_of_epoch(NUM_EPOCHS)):
        (micro,) = plan.at(step)
        step_clips = np.array([members[micro.bucket_of(r)][micro.clips_of(r)[0]] for r in range(num_ranks)])
        steps.append((step_clips, step_clips[: micro.num_batches]))
    return steps


def shuffled(clips: Clips, num_ranks: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Shuffle all clips in every epoch and assign them to ranks. The last step is filled up with the first clips."""
    generator, num_clips, steps = np.random.default_rng(1), len(clips.bucket_of), []
    for _ in range(NUM_EPOCHS):
        order = np.resize(generator.permutation(num_clips), -(-num_clips // num_ranks) * num_ranks)
        steps += [(step, step) for step in order.reshape(-1, num_ranks)]
    return steps


def truncated(clips: Clips, num_ranks: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Train only the first clips of each bucket that fill whole steps, shuffled in every epoch."""
    generator, steps = np.random.default_rng(2), []
    for _ in range(NUM_EPOCHS):
        for bucket in range(len(clips.buckets)):
            members = clips.members(bucket)
            kept = generator.permutation(members[: len(members) // num_ranks * num_ranks])
            steps += [(step, step) for step in kept.reshape(-1, num_ranks)]
    return steps


def simulate(num_clips: int, num_ranks: int, seed: int = 0) -> list[Outcome]:
    """Evaluate five methods on the same clips."""
    clips = draw_clips(num_clips, seed)
    by_bucket = clips.costs()
    costs = by_bucket[clips.bucket_of]
    steps = shuffled(clips, num_ranks)
    one_cost = np.full(num_clips, forward_flops(num_tokens(ONE_SHAPE, GEOMETRY), NUM_LAYERS, HIDDEN_SIZE))
    return [
        outcome("plan, bucket", num_ranks, clips, by_plan(clips, num_ranks, ()), costs),
        outcome("plan, cost", num_ranks, clips, by_plan(clips, num_ranks, by_bucket.tolist()), costs),
        outcome("independent ranks", num_ranks, clips, steps, costs),
        outcome("one shape", num_ranks, clips, steps, one_cost, stretched=True),
        outcome("truncated buckets", num_ranks, clips, truncated(clips, num_ranks), costs),
    ]


def run_simulation() -> list[dict]:
    """Simulate all layouts and print a table."""
    print(
        f"\n{'method':<18} {'ranks':>5} {'clips':>6} {'steps':>6} {'idle':>7} {'copies':>7} {'never':>6} {'|n-3|':>5} "
        f"{'PFLOP/clip':>10} {'cropped':>8} {'distorted':>9} {'mean':>6}"
    )
    rows = []
    for num_clips, num_ranks in ((4915, 8), (4915, 64), (300, 64)):
        for result in simulate(num_clips, num_ranks):
            rows.append(asdict(result))
            print(
                f"{result.way:<18} {result.num_ranks:>5} {result.num_clips:>6} {result.num_steps:>6} "
                f"{result.idle_share:>7.1%} "
                f"{result.copies_share:>7.1%} {result.never_seen:>6} {result.deviation:>5} "
                f"{result.flop_per_clip / 1e15:>10.3f} "
                f"{result.cropped_share:>8.1%} {result.distorted_share:>9.1%} {result.mean_distortion:>6.3f}",
                flush=True,
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--clips", type=int, default=NUM_CLIPS)
    parser.add_argument("--index", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--open", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.open:
        print(json.dumps(open_index(args.open)))
        return
    rows, growth = time_plan(args.clips)
    simulation = run_simulation()
    index = time_index(args.clips, args.folder) if args.index else None
    slowest = max(row["p99_us"] for row in rows)
    result = {"slowest_p99_us": slowest, "growth_bytes_per_step": growth, "simulation": simulation, "index": index}
    print(json.dumps({"benchmark": "plan", **result, "rows": rows}))


if __name__ == "__main__":
    main()
