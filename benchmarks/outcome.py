"""Judge training by its videos: train the shapes model or LoRAs for it in several ways, and judge what they generate.

    python benchmarks/outcome.py outputs/outcome                        # all recipes of recipes.py, three seeds each
    python benchmarks/outcome.py outputs/outcome --recipes base cogds   # only these
    python benchmarks/outcome.py outputs/outcome --table                # the table of what is there

Every recipe trains on the same clips, which show a motion that the base model has never seen. Videos are made by
diffusers' own pipeline with `load_lora_weights`, from first frames that no clip has: of the new motion, and of the old
ones, which the LoRA should not change. Results that are there already are kept.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from benchmarks.recipes import BUCKETS, RECIPES, Recipe  # noqa: E402
from cogds.cli import main as run_cogds  # noqa: E402
from cogds.distributed.world import read_world  # noqa: E402
from cogds.shapes.clips import DEMO_MOTION, demo_scenes, unseen_scenes, write_clips  # noqa: E402
from cogds.shapes.generation import generate, judge_all  # noqa: E402
from cogds.shapes.world import MOTIONS, SIZES  # noqa: E402

COLUMNS = {
    "motion_seen": "motion seen",
    "path_error": "path error [px]",
    "first_frame_psnr": "first frame [dB]",
    "clip_psnr": "clip [dB]",
    "color_error": "color error",
    "shape_seen": "shape seen",
    "old_motion_seen": "old motions seen",
}
RUN_TIMEOUT_S = 1800


def main() -> None:
    """Run the recipes of the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="results, and the runs")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of training and of the videos' noise")
    parser.add_argument("--videos", type=int, default=48, help="of the new motion, and as many of the old ones")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time")
    parser.add_argument("--table", action="store_true", help="only print the table")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.folder = args.folder.absolute()
    if args.worker:
        run(args.recipes[0], args.seeds[0], args)
        return
    if not args.table:
        start_all(args)
    print("\n".join(table(read_results(args.folder))))


def start_all(args: argparse.Namespace) -> None:
    """Run all recipes with all seeds, each in processes of its own."""
    args.folder.mkdir(parents=True, exist_ok=True)
    write_clips(args.folder / "clips", demo_scenes())
    settings = {"steps": args.steps, "videos": args.videos}
    file = args.folder / "settings.json"
    if file.exists() and json.loads(file.read_text()) != settings:
        sys.exit(f"{args.folder} has results with other --steps or --videos: {file.read_text()}. Use another folder.")
    file.write_text(json.dumps(settings))
    wanted = [
        (name, seed) for seed in args.seeds for name in args.recipes if not result_path(args, name, seed).exists()
    ]
    started = time.monotonic()

    def start(name: str, seed: int) -> None:
        begun = time.monotonic()
        worker = [__file__, args.folder, "--worker", "--recipes", name, "--seeds", seed]
        worker += ["--videos", args.videos, "--steps", args.steps]
        command = [sys.executable, *map(str, worker)]
        if (ranks := RECIPES[name].ranks) > 1:
            port = str(29700 + wanted.index((name, seed)))
            launcher = ["-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks), "--master_port", port]
            command = [sys.executable, *launcher, "--no_local_rank", *command[1:]]
        log = args.folder / f"{name}-{seed}.log"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        if torch.cuda.is_available():
            environment.pop("DS_ACCELERATOR")
        with log.open("w") as file:
            done = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment, timeout=RUN_TIMEOUT_S
            )
        if done.returncode:
            sys.exit(f"{name}, seed {seed}: exit code {done.returncode}; see {log}")
        print(f"{time.monotonic() - started:6.0f} s  {name}, seed {seed}: {time.monotonic() - begun:.0f} s", flush=True)

    for uses_another_run in (False, True):
        runs = [run for run in wanted if (RECIPES[run[0]].run_of is not None) == uses_another_run]
        with ThreadPoolExecutor(args.jobs) as pool:
            results = [pool.submit(start, *run) for run in runs]
            try:
                for result in results:
                    result.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def result_path(args: argparse.Namespace, name: str, seed: int) -> Path:
    """The file of a run's result."""
    return args.folder / f"{name}-{seed}.json"


def run(name: str, seed: int, args: argparse.Namespace) -> None:
    """Train one recipe with one seed, and judge its videos on rank 0."""
    recipe = RECIPES[name]
    folder = args.folder / f"{recipe.run_of or name}-{seed}"
    result = train(recipe, folder, seed, args) if recipe.is_trained else None
    if read_world().rank:
        return
    from cogds.model.load import SHAPES_MODEL, find_model
    from cogds.model.pipelines import load_whole_pipeline

    is_model = result is not None and not recipe.trains_lora
    pipeline = load_whole_pipeline(find_model(str(result) if is_model else SHAPES_MODEL))
    if result is not None and recipe.trains_lora:
        pipeline.load_lora_weights(result)
    rows = []
    for kind, motions in {"new": [DEMO_MOTION], "old": list(MOTIONS)}.items():
        scenes = unseen_scenes(args.videos, SIZES, motions)
        for number, judgement in enumerate(judge_all(generate(pipeline, scenes, seed), scenes)):
            scene = judgement.scene
            size = f"{scene.frames}x{scene.height}x{scene.width}"
            rows.append({"kind": kind, "number": number, "size": size, **judgement.values})
    temporary = result_path(args, name, seed).with_suffix(".partial")
    temporary.write_text(json.dumps({"recipe": name, "seed": seed, "steps": args.steps, "videos": rows}))
    temporary.rename(result_path(args, name, seed))


def train(recipe: Recipe, folder: Path, seed: int, args: argparse.Namespace) -> Path:
    """Train, unless the run is there already, and return the folder of the LoRA or the model."""
    exports = folder / "run" / ("lora" if recipe.trains_lora else recipe.exported)
    if not (exports / f"step-{args.steps:06d}").exists():
        run_training(RECIPES[recipe.run_of] if recipe.run_of else recipe, folder, seed, args)
    loras = [lora for lora in sorted(exports.iterdir()) if "." not in lora.name]
    return average(loras[-recipe.averaged :], folder / "averaged") if recipe.averaged > 1 else loras[-1]


def run_training(recipe: Recipe, folder: Path, seed: int, args: argparse.Namespace) -> None:
    """Run the train verb in this process."""
    data = recipe.data(folder / "data") if recipe.data else [f"data.path={args.folder / 'clips'}"]
    if recipe.patch:
        recipe.patch()
    words = [
        "train", "--config", str(ROOT / "launch/configs/demo.yaml"),
        "--deepspeed", str(ROOT / f"ds_configs/{recipe.deepspeed}.json"),
        "data.draw_demo_clips=false", f"data.buckets=[{BUCKETS}]", f"data.cache_dir={folder / 'cache'}",
        f"output_dir={folder / 'run'}", f"seed={seed}", f"train.num_steps={args.steps}", "train.batch_size=4",
        f"train.gradient_accumulation_steps={1 if recipe.ranks > 1 else 2}", "eval.every=null",
        f"checkpoint.every={max(1, args.steps // 15)}", "metrics.show_clips=0", "data.num_workers=0",
        *data, *recipe.words,
    ]  # fmt: skip
    code = run_cogds(words)
    if code:
        sys.exit(code)


def average(loras: Sequence[Path], folder: Path) -> Path:
    """Write a LoRA with the mean of the weights of several that one run has saved."""
    name = "pytorch_lora_weights.safetensors"
    files = [load_file(lora / name) for lora in loras]
    with safe_open(loras[-1] / name, "pt") as file:
        metadata = file.metadata()
    folder.mkdir(exist_ok=True)
    means = {key: torch.stack([file[key].float() for file in files]).mean(0) for key in files[0]}
    save_file(means, folder / name, metadata)
    return folder


# --- the table


def read_results(folder: Path) -> Mapping[str, Sequence[Mapping]]:
    """Return the results by recipe, in the order of RECIPES."""
    results = defaultdict(list)
    for path in sorted(folder.glob("*-[0-9]*.json")):
        result = json.loads(path.read_text())
        results[result["recipe"]].append(result)
    return {name: results[name] for name in RECIPES if name in results}


def table(results: Mapping[str, Sequence[Mapping]]) -> list[str]:
    """Return Markdown tables: means with standard errors, differences to cogds by default, and cogds by size."""
    columns = list(COLUMNS.values())
    lines = header(["recipe", "runs", *columns])
    for name, runs in results.items():
        cells = [cell(*estimate(values(runs, column))) for column in COLUMNS]
        lines.append(row(f"{RECIPES[name].about} (`{name}`)", len(runs), *cells))
    if "cogds" not in results:
        return lines
    lines += ["", "Differences to `cogds`, video by video; bold: more than two standard errors.", ""]
    lines += header(["recipe", *columns])
    for name, runs in results.items():
        if name != "cogds" and {run["seed"] for run in runs} <= {run["seed"] for run in results["cogds"]}:
            differences = [estimate(paired(runs, results["cogds"], column)) for column in COLUMNS]
            lines.append(row(f"`{name}`", *(marked(*difference) for difference in differences)))
    lines += ["", *header(["size, with `cogds`", *columns[:-1]])]
    for frames, height, width in SIZES:
        size = f"{frames}x{height}x{width}"
        cells = [cell(*estimate(values(results["cogds"], column, size))) for column in list(COLUMNS)[:-1]]
        lines.append(row(size, *cells))
    return lines


def header(names: Sequence[str]) -> list[str]:
    """The first two lines of a Markdown table."""
    return [row(*names), "|" + "---|" * len(names)]


def row(*cells: object) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def paired(runs: Sequence[Mapping], others: Sequence[Mapping], column: str) -> list[list[float]]:
    """Return the difference of a figure to the run of the same seed, by seed and video."""
    same_seed = {run["seed"]: run for run in others}
    others = [same_seed[run["seed"]] for run in runs]
    return [
        [a - b for a, b in zip(first, second, strict=True)]
        for first, second in zip(values(runs, column), values(others, column), strict=True)
    ]


def values(runs: Sequence[Mapping], column: str, size: str | None = None) -> list[list[float]]:
    """Return a figure by seed and video."""
    kind, name = ("old", "motion_seen") if column == "old_motion_seen" else ("new", column)
    return [
        [video[name] for video in run["videos"] if video["kind"] == kind and size in (None, video["size"])]
        for run in runs
    ]


def estimate(by_seed: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Return the mean and its standard error, in which videos and seeds both count as samples.

    The same videos are made with every seed, so the errors of both add up: that of the videos' means over the seeds,
    and that of the seeds' means over the videos.
    """
    of_videos = [statistics.fmean(column) for column in zip(*by_seed)]
    of_seeds = [statistics.fmean(row) for row in by_seed]
    errors = [statistics.variance(means) / len(means) for means in (of_videos, of_seeds) if len(means) > 1]
    return statistics.fmean(of_videos), math.sqrt(sum(errors))


def cell(mean: float, error: float) -> str:
    """A mean and its standard error."""
    return f"{mean:.2f} ± {error:.2f}"


def marked(mean: float, error: float) -> str:
    """A difference and its standard error, bold above two of them."""
    text = f"{mean:+.2f} ± {error:.2f}"
    return f"**{text}**" if abs(mean) > 2 * error else text


if __name__ == "__main__":
    main()
