"""Measure the scan of a table of many clips: time, and the memory of each rank.

    python benchmarks/scan.py [--rows 1000000] [--films 2000] [--ranks 1,2] [--in-tars]

Writes a table whose rows are scenes of `films` small videos (in tar files with --in-tars), and scans it, then assigns
the clips to buckets as a run does. Memory is the growth of the peak resident size of a rank, for rank 0 also per clip.
Prints a table, then one line of JSON.
"""

import argparse
import json
import os
import resource
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from measuring import join_process_group, machine, print_json, print_machine, table

from cogds.config.loading import load_config
from cogds.config.schema import RunConfig
from cogds.core.geometry import ClipShape
from cogds.data.video.media import write_video
from cogds.distributed.collectives import barrier
from cogds.distributed.process_group import disconnect
from cogds.distributed.world import World, read_world
from cogds.encode.clip_set import load_clip_set
from cogds.encode.scan_data import scan_data

FRAMES, FPS = 34, 16.0
FILMS_PER_TAR = 100
BUCKET = ClipShape(17, 64, 96)


def write_dataset(folder: Path, num_rows: int, num_films: int, in_tars: bool) -> str:
    """Create the videos and the table, and return the dataset's path."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    video = folder / "one.mp4"
    shades = np.linspace(0, 255, FRAMES, dtype=np.uint8)[:, None, None, None]
    write_video(video, np.broadcast_to(shades, (FRAMES, 64, 96, 3)).copy(), FPS)
    content = video.read_bytes()
    if in_tars:
        for start in range(0, num_films, FILMS_PER_TAR):
            with tarfile.open(folder / f"films-{start // FILMS_PER_TAR:06d}.tar", "w") as tar:
                for film in range(start, min(start + FILMS_PER_TAR, num_films)):
                    for name, size in ((f"{film:07d}.mp4", video), (f"{film:07d}.txt", None)):
                        caption = folder / "caption.txt"
                        caption.write_text(f"film {film}")
                        tar.add(size or caption, name)
        (folder / "caption.txt").unlink()
        video.unlink()
        return str(folder)
    (folder / "films").mkdir()
    for film in range(num_films):
        (folder / f"films/{film:07d}.mp4").write_bytes(content)
    video.unlink()
    rows = np.arange(num_rows)
    starts = (rows // num_films % 16) / 16
    columns = {
        "file_name": [f"films/{row % num_films:07d}.mp4" for row in rows.tolist()],
        "text": [f"scene {row} of a film, with a caption of the usual length for such tables" for row in rows.tolist()],
        "start_s": starts,
        "end_s": starts + 1.1,
    }
    pq.write_table(pa.table(columns), folder / "clips.parquet")
    return str(folder / "clips.parquet")


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def scan(cfg: RunConfig, world: World) -> dict[str, Any]:
    """Scan twice and select, with the time and the growth of the peak memory of this rank after each."""
    before, result = _peak_bytes(), {}

    def measured(name: str, step: Callable[[], Any]) -> Any:
        barrier(world)
        start_s = time.perf_counter()
        value = step()
        barrier(world)
        result[f"{name}_s"] = round(time.perf_counter() - start_s, 1)
        result[f"{name}_bytes"] = _peak_bytes() - before
        return value

    manifest = measured("scan", lambda: scan_data(cfg, world))
    measured("rescan", lambda: scan_data(cfg, world))
    clips = measured("select", lambda: load_clip_set(cfg, manifest, (BUCKET,)) if world.rank == 0 else None)
    return result | {"clips": clips.num_clips if clips else None}


def run_ranks(data_path: str, cache_dir: str, num_ranks: int) -> list[dict[str, Any]]:
    """Scan with some ranks; returns the result of each."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ranks = []
    for rank in range(num_ranks):
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks,
                     "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}  # fmt: skip
        command = [sys.executable, __file__, "--worker", data_path, cache_dir]
        environment = os.environ | {name: str(value) for name, value in variables.items()}
        ranks.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    outputs = [rank.communicate(timeout=7200)[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise SystemExit("error: a rank failed; its error is above.")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--films", type=int, default=2_000)
    parser.add_argument("--ranks", default="1,2")
    parser.add_argument("--in-tars", action="store_true", help="films in tar files with a caption each, and no table")
    parser.add_argument("--worker", nargs=2, metavar=("DATA", "CACHE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    world = read_world()
    if args.worker:
        data_path, cache_dir = args.worker
        overrides = [f"data.path={data_path}", f"data.cache_dir={cache_dir}", "model.path=unused"]
        join_process_group(world)
        print(json.dumps(scan(load_config(None, overrides)[0], world)))
        disconnect()
        return
    info, rows = machine(world.device), []
    print_machine(info)
    for num_ranks in map(int, args.ranks.split(",")):
        with tempfile.TemporaryDirectory() as temporary:
            data, cache = Path(temporary, "data"), Path(temporary, "cache")
            data.mkdir()
            results = run_ranks(write_dataset(data, args.rows, args.films, args.in_tars), str(cache), num_ranks)
        first = results[0]
        row = {"ranks": num_ranks, "clips": first["clips"]} | {f"{step}_s": first[f"{step}_s"] for step in STEPS}
        for step in STEPS:
            row[f"{step}_bytes_per_clip"] = round(first[f"{step}_bytes"] / first["clips"])
        row["other_ranks_mb"] = max((round(other["select_bytes"] / 1e6) for other in results[1:]), default=None)
        rows.append(row)
    print(table(list(rows[0]), [list(row.values()) for row in rows]))
    print_json("scan", info, rows=rows)


STEPS = ("scan", "rescan", "select")

if __name__ == "__main__":
    main()
