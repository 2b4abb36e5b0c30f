"""The plan: how long it takes at any size, and what it saves next to other ways of dealing clips to GPUs.

    python benchmarks/plan.py [--clips N] [--index --folder DIR]

Speed: Plan.at(step) over N clips (100 million) in 30 uneven buckets, in both modes; with --index also an index file of
N rows, written into DIR (about 110 bytes a row; removed afterwards) and opened by a fresh process: time to the first
batch's rows, and resident memory.

Simulation: 4,915 clips of web and phone sizes and log-uniform lengths in 30 buckets, batch size 1, three epochs, on 8
and 64 ranks; and 300 of them on 64. Time is `core.flops.forward_flops`. Beside the plan's two modes, three other ways,
written from their description: each rank shuffles for itself, so a step lasts as long as its dearest clip; all
clips stretched to one shape; and every bucket floored to whole global batches, the rest dropped.

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
from cogds.core.flops import forward_flops
from cogds.core.geometry import ClipShape, ModelGeometry, num_tokens
from cogds.core.mixture import Mixture
from cogds.core.plan import Plan
from cogds.data.loading.index import SCHEMA, ClipIndex, write_index

NUM_CLIPS, NUM_BUCKETS, BATCH_SIZE, ACCUMULATION = 100_000_000, 30, 2, 1
WORLD_SIZES = (1, 8, 64, 512)
STEPS = (0, 5_000, 5_000_000, 5_000_000_000)
CALLS = 300

# CogVideoX-1.5's, for the simulation: 42 layers of 3072.
NUM_LAYERS, HIDDEN_SIZE, NUM_EPOCHS = 42, 3072, 3
GEOMETRY = ModelGeometry(
    vae_spatial=8,
    vae_temporal=4,
    latent_channels=16,
    patch_size=2,
    patch_size_t=2,
    sample_height=300,
    sample_width=300,
    sample_frames=81,
    text_tokens=226,
    head_dim=64,
    rope=True,
    learned_positions=False,
    ofs=True,
)
AREAS, FRAMES = ("432x768",), (17, 33, 49, 65, 81)
ASPECT_RATIOS = ("21/9", "16/9", "4/3", "1/1", "3/4", "9/16")
ONE_SHAPE = ClipShape(49, 432, 768)


def bucket_sizes(num_clips: int) -> tuple[int, ...]:
    """Sizes over three decades, as real folders have them."""
    generator = random.Random(0)
    shares = [10 ** generator.uniform(-3, 0) for _ in range(NUM_BUCKETS)]
    sizes = [int(num_clips * share / sum(shares)) for share in shares]
    sizes[-1] += num_clips - sum(sizes)
    return tuple(sizes)


def quantiles_us(call: Callable[[int], object], first: int) -> dict[str, float]:
    """Median and 99th percentile of call(first), call(first + 1), ... in microseconds of CPU time."""
    times = []
    for step in range(first, first + CALLS):
        start = time.thread_time_ns()
        call(step)
        times.append((time.thread_time_ns() - start) / 1000)
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


def time_plan(num_clips: int) -> tuple[list[dict], float]:
    """Plan.at in both modes, over worlds and steps; and the growth of memory in bytes a step."""
    sizes, rows = bucket_sizes(num_clips), []
    # Six costs of five buckets each, so that a group is as wide as aspect ratios make it.
    costs = tuple(1.5 ** (bucket // 5) * (1 + bucket % 5 / 200) for bucket in range(NUM_BUCKETS))
    print(f"{num_clips:,} clips, {NUM_BUCKETS} buckets of {min(sizes):,} to {max(sizes):,}")
    print(f"{'sync':>6} {'world':>6} {'step':>14} {'at median':>12} {'at p99':>12} {'one rank, median':>18}   (CPU us)")
    for sync in ("bucket", "cost"):
        for world_size in WORLD_SIZES:
            start = time.thread_time_ns()
            of_sync = costs if sync == "cost" else ()
            plan = Plan(sizes, (BATCH_SIZE,) * NUM_BUCKETS, world_size, ACCUMULATION, seed=0, costs=of_sync)
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
    print(f"construction and first step: {construction_us:.0f} us; growth: {growth:.4f} bytes a step over 2,000 steps")
    return rows, growth


def index_tables(num_clips: int, rows_per_table: int = 1 << 20) -> Iterator[pa.Table]:
    """Rows of an index of made-up clips, a million at a time."""
    generator = np.random.default_rng(0)
    for first in range(0, num_clips, rows_per_table):
        n = min(rows_per_table, num_clips - first)
        numbers = pa.array(np.arange(first, first + n)).cast(pa.string())
        keys = [pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), n, [None, pa.py_buffer(generator.bytes(16 * n))])]
        columns = {
            "path": pc.binary_join_element_wise("/clips/", numbers, ".mp4", ""),
            "kind": pa.repeat("video", n),
            "image_path": pa.nulls(n, pa.string()),
            "caption": pa.repeat("a clip of something", n),
            "start_s": pa.repeat(0.0, n),
            "clip_key": keys[0],
            "caption_key": keys[0],
            "clip_place": pa.repeat(pa.scalar(0, pa.int32()), n),
            "caption_place": pa.repeat(pa.scalar(0, pa.int32()), n),
        }
        yield pa.table(columns, SCHEMA)


def time_index(num_clips: int, folder: Path) -> dict:
    """Write an index of that many rows into a temporary folder, and open it in a fresh process."""
    sizes = [[n] for n in bucket_sizes(num_clips)]
    shapes = generate_buckets(AREAS, ASPECT_RATIOS, FRAMES, GEOMETRY)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        start = time.perf_counter()
        index = write_index(
            Path(temporary), index_tables(num_clips), shapes, sizes, {"clips": ["a"], "captions": ["a"]}
        )
        write_s = time.perf_counter() - start
        found = subprocess.run(
            [sys.executable, __file__, "--open", str(index.path)],
            check=True,
            capture_output=True,
            text=True,
            timeout=600,
        )
        opened = json.loads(found.stdout)
        size_bytes = index.path.stat().st_size
    result = {"num_clips": num_clips, "index_bytes": size_bytes, "write_s": round(write_s, 1), **opened}
    print(f"\nindex of {num_clips:,} rows, {size_bytes / 1e9:.2f} GB, written in {write_s:.0f} s; a fresh process:")
    for name, value in opened.items():
        print(f"  {name:<32} {value:,}")
    return result


def resident_bytes() -> dict[str, int]:
    """This process's resident memory: anonymous is its own, file is mapped and shared with other ranks."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(fields[key].split()[0]) * 1024 for name, key in (("own", "RssAnon"), ("mapped", "RssFile"))}


def open_index(path: str) -> dict:
    """From the file to the first batch's rows of one rank of 64, and then 1,000 steps more: times and memory."""
    imported = resident_bytes()
    start = time.perf_counter()
    index = ClipIndex(path)
    mixture = Mixture(index.sizes, (1.0,) * len(index.sizes[0]), seed=0)
    plan = Plan(mixture.virtual_sizes, (BATCH_SIZE,) * len(mixture.sizes), 64, ACCUMULATION, seed=0)

    def rows(step: int) -> list:
        return [
            index[index.row(part.bucket, mixture.clip(part.bucket, k))]
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
    """Made-up clips in buckets: heights, widths in pixels, and each clip's bucket."""

    heights: np.ndarray
    widths: np.ndarray
    bucket_of: np.ndarray
    buckets: tuple[ClipShape, ...]

    def members(self, bucket: int) -> np.ndarray:
        """The bucket's clips."""
        return np.flatnonzero(self.bucket_of == bucket)

    def costs(self) -> np.ndarray:
        """FLOP of one clip of each bucket."""
        return np.array([forward_flops(num_tokens(shape, GEOMETRY), NUM_LAYERS, HIDDEN_SIZE) for shape in self.buckets])


def draw_clips(num_clips: int, seed: int = 0) -> Clips:
    """Clips as web and phones make them: most 16:9 or 9:16, some odd; 17 to 1,000 frames, log-uniform."""
    generator = np.random.default_rng(seed)
    buckets = generate_buckets(AREAS, ASPECT_RATIOS, FRAMES, GEOMETRY)
    ratios = generator.choice([16 / 9, 9 / 16, 4 / 3, 1.0, 3 / 4, 2.35, 19.5 / 9, 9 / 19.5], num_clips, p=[
        0.45, 0.22, 0.09, 0.07, 0.03, 0.05, 0.04, 0.05
    ])  # fmt: skip
    # One in five was cropped by hand to something near.
    ratios = ratios * np.where(generator.random(num_clips) < 0.2, np.exp(generator.normal(0, 0.08, num_clips)), 1.0)
    short_sides = generator.choice([480, 720, 1080, 2160], num_clips, p=[0.15, 0.35, 0.4, 0.1])
    heights = np.round(np.where(ratios >= 1, short_sides, short_sides / ratios)).astype(int)
    widths = np.round(heights * ratios).astype(int)
    frames = np.exp(generator.uniform(math.log(17), math.log(1000), num_clips)).astype(int)
    placed = [assign(int(f), int(h), int(w), buckets) for f, h, w in zip(frames, heights, widths)]
    return Clips(heights, widths, np.array(placed), buckets)


@dataclass(frozen=True)
class Outcome:
    """What one way of dealing the clips came to over NUM_EPOCHS epochs.

    idle_share: of the ranks' time, spent waiting for the slowest; copies_share: of the slots, a clip that the same
    step has already; deviation: the largest |times trained - NUM_EPOCHS|; flop_per_clip: of all ranks, idle time
    included, for each clip of a step that is not a copy; cropped_share, mean_distortion (|ln| of the aspect ratio's
    change) and distorted_share (by more than 10%): of pixels, clips and clips, in the mean.
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
    """steps: at each, every rank's clip (batch size 1), and how many times which clips count; costs: FLOP of each clip.

    Ranks that train a copy share one clip's weight, which counts once.
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
    """This project's plan: all ranks in one bucket, or with costs in buckets that cost the same."""
    members = [clips.members(bucket) for bucket in range(len(clips.buckets))]
    plan = Plan(tuple(map(len, members)), (1,) * len(members), num_ranks, 1, seed=0, costs=tuple(costs))
    steps = []
    for step in range(plan.step_of_epoch(NUM_EPOCHS)):
        (micro,) = plan.at(step)
        step_clips = np.array([members[micro.bucket_of(r)][micro.clips_of(r)[0]] for r in range(num_ranks)])
        steps.append((step_clips, step_clips[: micro.num_batches]))
    return steps


def each_for_itself(clips: Clips, num_ranks: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Every epoch all clips are shuffled and dealt out, filled up with the first ones to a whole number of steps."""
    generator, num_clips, steps = np.random.default_rng(1), len(clips.bucket_of), []
    for _ in range(NUM_EPOCHS):
        order = np.resize(generator.permutation(num_clips), -(-num_clips // num_ranks) * num_ranks)
        steps += [(step, step) for step in order.reshape(-1, num_ranks)]
    return steps


def floored(clips: Clips, num_ranks: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Every bucket's first clips, as many as fill whole steps; those are shuffled every epoch, the rest never seen."""
    generator, steps = np.random.default_rng(2), []
    for _ in range(NUM_EPOCHS):
        for bucket in range(len(clips.buckets)):
            members = clips.members(bucket)
            kept = generator.permutation(members[: len(members) // num_ranks * num_ranks])
            steps += [(step, step) for step in kept.reshape(-1, num_ranks)]
    return steps


def simulate(num_clips: int, num_ranks: int, seed: int = 0) -> list[Outcome]:
    """Five ways to train the same clips."""
    clips = draw_clips(num_clips, seed)
    by_bucket = clips.costs()
    costs = by_bucket[clips.bucket_of]
    own = each_for_itself(clips, num_ranks)
    one_cost = np.full(num_clips, forward_flops(num_tokens(ONE_SHAPE, GEOMETRY), NUM_LAYERS, HIDDEN_SIZE))
    return [
        outcome("plan, bucket", num_ranks, clips, by_plan(clips, num_ranks, ()), costs),
        outcome("plan, cost", num_ranks, clips, by_plan(clips, num_ranks, by_bucket.tolist()), costs),
        outcome("each for itself", num_ranks, clips, own, costs),
        outcome("one shape", num_ranks, clips, own, one_cost, stretched=True),
        outcome("floored buckets", num_ranks, clips, floored(clips, num_ranks), costs),
    ]


def run_simulation() -> list[dict]:
    """All layouts, as a table and as plain values."""
    print(
        f"\n{'way':<16} {'ranks':>5} {'clips':>6} {'steps':>6} {'idle':>7} {'copies':>7} {'never':>6} {'|n-3|':>5} "
        f"{'PFLOP/clip':>10} {'cropped':>8} {'distorted':>9} {'mean':>6}"
    )
    rows = []
    for num_clips, num_ranks in ((4915, 8), (4915, 64), (300, 64)):
        for one in simulate(num_clips, num_ranks):
            rows.append(asdict(one))
            print(
                f"{one.way:<16} {one.num_ranks:>5} {one.num_clips:>6} {one.num_steps:>6} {one.idle_share:>7.1%} "
                f"{one.copies_share:>7.1%} {one.never_seen:>6} {one.deviation:>5} {one.flop_per_clip / 1e15:>10.3f} "
                f"{one.cropped_share:>8.1%} {one.distorted_share:>9.1%} {one.mean_distortion:>6.3f}",
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
