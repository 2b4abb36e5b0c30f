"""Train on clips in tar files behind an S3 server that is killed and restarted, and on the same clips as files.

    python benchmarks/remote_data.py [--clips 1000] [--steps 12] [--encode cached] [--no-restarts]

For cached and for on-the-fly encoding, each dataset is trained by 2 ranks for half of the steps, and resumed by 1 rank.
The losses must be the same. Meanwhile, the S3 server is out of reach for 3 of every 10 s. Also prints the data wait of
the 2 ranks, without the first step, which waits for the loader processes. Prints a table, then one line of JSON.

Needs moto (`pip install -e .[test]`). The server holds the data in the memory of a process; a proxy before it refuses
and cuts connections while it is down.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tarfile
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from measuring import ROOT, machine, print_json, print_machine, table

from cogds.data.storage.access import upload
from cogds.data.video.media import write_video
from cogds.distributed.world import read_world
from cogds.metrics.jsonl import step_lines
from tests.servers import S3Server
from tests.tiny import create_tiny_model

CLIPS_PER_TAR = 100
UP_S, DOWN_S = 7.0, 3.0
ENCODE = ("cached", "on_the_fly")
# Landscape, portrait and square: [height, width].
SIZES = ((64, 96), (96, 64), (64, 64))
BUCKETS = "[17x64x96, 17x96x64, 17x64x64]"


def write_clips(folder: Path, num_clips: int) -> None:
    """Write captioned clips of three shapes and different content."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(num_clips):
        height, width = SIZES[number % len(SIZES)]
        first = rng.integers(0, 256, (1, height // 8, width // 8, 3)).repeat(8, 1).repeat(8, 2)
        frames = (first + 4 * np.arange(20)[:, None, None, None]).astype(np.uint8)
        write_video(folder / f"{number:06d}.mp4", frames, 16, num_threads=1)
        (folder / f"{number:06d}.txt").write_text(f"clip {number % 50}")


def pack(clips: Path, tars: Path) -> None:
    """Pack the clips into tar files, in order, with captions as .txt or .json."""
    tars.mkdir()
    videos = sorted(clips.glob("*.mp4"))
    for start in range(0, len(videos), CLIPS_PER_TAR):
        with tarfile.open(tars / f"shard-{start // CLIPS_PER_TAR:05d}.tar", "w") as tar:
            for video in videos[start : start + CLIPS_PER_TAR]:
                tar.add(video, video.name)
                tar.add(video.with_suffix(".txt"), f"{video.stem}.txt")


@contextlib.contextmanager
def restarts(server: S3Server, is_on: bool) -> Iterator[list[int]]:
    """Kill and restart the server again and again in this block. Yields a list that grows with each restart."""
    counts: list[int] = []
    is_over = threading.Event()

    def repeat() -> None:
        while not is_over.wait(UP_S):
            server.proxy.stop()
            is_over.wait(DOWN_S)
            server.proxy.start()
            counts.append(len(counts))

    thread = threading.Thread(target=repeat if is_on else lambda: None)
    thread.start()
    try:
        yield counts
    finally:
        is_over.set()
        thread.join()


def train(arguments: list[str], num_ranks: int, run: Path, env: dict[str, str]) -> list[dict[str, Any]]:
    """Run launch/train.py and return the metrics of each step of all runs in this folder."""
    launcher = Path(sys.executable).parent / "deepspeed"
    command = [str(launcher), "--num_gpus", str(num_ranks), str(ROOT / "launch/train.py"), "--deepspeed",
               str(ROOT / "ds_configs/zero2.json"), *arguments, f"output_dir={run}"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600, env=os.environ | env)
    if done.returncode:
        raise SystemExit(done.stdout[-3000:] + done.stderr[-3000:])
    return step_lines((run / "metrics.jsonl").read_text())


def measure(arguments: list[str], num_steps: int, run: Path, env: dict[str, str]) -> tuple[list[float], float]:
    """Losses of all steps, and the share of data wait in the time of the steps with 2 ranks."""
    half = num_steps // 2
    first = train([*arguments, f"train.num_steps={half}"], 2, run, env)
    every = train([*arguments, f"train.num_steps={num_steps}", "checkpoint.resume=auto"], 1, run, env)
    wait_s, step_s = (sum(record[f"perf/{name}"] for record in first[1:]) for name in ("data_wait_s", "step_s"))
    return [record["train/loss"] for record in every], wait_s / step_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--encode", nargs="+", choices=ENCODE, default=ENCODE, help="values of data.encode (both)")
    parser.add_argument("--no-restarts", action="store_true", help="the server stays up, for undisturbed times")
    args = parser.parse_args()
    info, rows = machine(read_world().device), []
    print_machine(info)
    with tempfile.TemporaryDirectory() as temporary, contextlib.closing(S3Server()) as server:
        folder, bucket = Path(temporary), server.new_bucket()
        os.environ.update(server.env)
        create_tiny_model(folder / "model")
        write_clips(folder / "clips", args.clips)
        pack(folder / "clips", folder / "tars")
        for tar in sorted((folder / "tars").iterdir()):
            upload(tar, f"{bucket}/tars/{tar.name}")
        common = [
            f"model.path={folder / 'model'}", f"data.buckets={BUCKETS}", "data.num_workers=2", "train.precision=fp32",
            "lora.rank=8", "eval.every=null", "sample.every=null", "checkpoint.every=1000",
        ]  # fmt: skip
        for encode in args.encode:
            losses = {}
            for where, data_path in (("files", str(folder / "clips")), ("tars on S3", f"{bucket}/tars")):
                own = [*common, f"data.path={data_path}", f"data.encode={encode}", f"data.cache_dir={folder / where}"]
                with restarts(server, where != "files" and not args.no_restarts) as counts:
                    losses[where], wait = measure(own, args.steps, folder / f"{encode} {where}", {})
                rows.append({"encode": encode, "data": where, "restarts": len(counts), "steps": len(losses[where]),
                             "last_loss": losses[where][-1], "wait_share": round(wait, 4)})  # fmt: skip
            rows[-1]["same_losses"] = losses["files"] == losses["tars on S3"]
    names = ("encode", "data", "restarts", "steps", "last_loss", "wait_share", "same_losses")
    print(table(names, [[row.get(name) for name in names] for row in rows]))
    print_json("remote_data", info, clips=args.clips, rows=rows)
    if not all(row.get("same_losses", True) for row in rows):
        raise SystemExit("error: the losses differ.")


if __name__ == "__main__":
    main()
