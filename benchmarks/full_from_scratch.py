"""Train the shapes model's transformer from random weights by `train.method=full`, and judge it beside the recipe's.

    python benchmarks/full_from_scratch.py outputs/scratch                         # as many steps as the recipe
    python benchmarks/full_from_scratch.py outputs/scratch --run lr8e-3 --steps 60 --constant-steps 60 --videos 0 \\
        optimizer.lr=8e-3                                                           # any keys of the run config

The start is that of the recipe (`examples/shapes/`): its VAE and text encoder, the random weights with which it begins,
and the clips that it draws, written without loss. Then `cogds encode` and `cogds train` do what the recipe does with
code of its own, on 2 ranks with ZeRO-2. The optimizer is AdamW instead of Muon, and timesteps are drawn evenly, while
the recipe draws more of the noisy ones. The judge is that of `tests/shapes/test_model.py`: 96 clips that no training
has seen.

A run that was stopped continues, and what is there already is kept. Prints a table and one line of JSON.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from measuring import ROOT, machine, print_json, print_machine, table

sys.path.insert(0, str(ROOT / "examples/shapes"))

import av
import numpy as np
import transformer as recipe

from cogds.core.geometry import ClipShape
from cogds.distributed.world import read_world
from cogds.files import whole_file, whole_folder
from cogds.model.load import PARTS, SHAPES_MODEL, find_model
from cogds.model.pipelines import load_whole_pipeline
from cogds.shapes.clips import to_uint8, unseen_scenes
from cogds.shapes.generation import generate, judge_all
from cogds.shapes.judge import Estimate, summarize
from cogds.shapes.world import FPS, MOTIONS, SIZES, Numbers, Scene, random_scene

RANKS = 2
SEED = 0  # of the recipe
EVALUATED_SEED = 900_000  # of clips for the evaluation loss, which neither the recipe nor the judge draws
TIMEOUT_S = 6 * 3600
COLUMNS = {
    "motion_seen": "motion seen",
    "color_seen": "color seen",
    "shape_seen": "shape seen",
    "path_error": "path error [px]",
    "first_frame_psnr": "first frame [dB]",
    "clip_psnr": "clip [dB]",
}


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="clips, cache, run and results")
    parser.add_argument("--clips", type=int, default=recipe.CLIPS, help="of each size, per rank, as in the recipe")
    parser.add_argument("--steps", type=int, default=recipe.STEPS)
    parser.add_argument("--constant-steps", type=int, help="steps before the learning rate falls; null: 40%%")
    parser.add_argument("--batch-size", type=int, default=recipe.BATCH_SIZE, help="per rank")
    parser.add_argument("--run", default="run", help="name of the run, in the folder: several share clips and cache")
    parser.add_argument("--saves", type=int, default=4, help="number of checkpoints")
    parser.add_argument("--videos", type=int, default=96, help="to judge; 0: none")
    parser.add_argument("--judge-steps", type=int, nargs="+", default=[], help="earlier steps to judge too, if saved")
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="keys of the run config")
    args = parser.parse_args(arguments)
    folder = args.folder.absolute()
    info = machine(read_world().device)
    print_machine(info)
    write_model(folder / "model")
    write_clips(folder / "clips", recipe_scenes(args.clips))
    numbers = Numbers(EVALUATED_SEED)
    write_clips(folder / "held-out", [random_scene(numbers, size) for size in SIZES for _ in range(4)])
    words = config_words(folder, args)
    runs = schedule_words(args.steps, args.constant_steps)
    runs = {step: own for step, own in runs.items() if not model_folder(folder / args.run, step).exists()}
    if runs:
        call_cogds("encode", words, folder / "encode.log")
    for own in runs.values():
        call_cogds("train", [*words, *own], folder / f"{args.run}.log")
    rows = judge_models(folder, args) if args.videos else {}
    print("\n".join(summary_lines(rows)))
    records = map(json.loads, (folder / args.run / "metrics.jsonl").read_text().splitlines())
    print_json("full_from_scratch", info, steps=args.steps, words=args.words, curve=list(curve(records)), models=rows)


# --- what the training starts from


def write_model(folder: Path) -> None:
    """Write the shapes model with the random weights from which its recipe trains the transformer."""
    if folder.exists():
        return
    source = find_model(SHAPES_MODEL).path
    with whole_folder(folder) as partial:
        (partial / "model_index.json").write_bytes((source / "model_index.json").read_bytes())
        for part in PARTS:
            if part != "transformer":
                (partial / part).symlink_to(source / part)
        recipe.create(SEED).save_pretrained(partial / "transformer")


def recipe_scenes(num_clips: int) -> Iterator[Scene]:
    """Yield the clips of the recipe: those of each of its ranks, `num_clips` of each size."""
    for rank in range(RANKS):
        numbers = Numbers(SEED * 1000 + 2 + rank)
        for size in SIZES:
            yield from (random_scene(numbers, size) for _ in range(num_clips))


def write_clips(folder: Path, scenes: Iterator[Scene] | Sequence[Scene]) -> None:
    """Write captioned videos into a new folder, without loss and in the size in which they are trained."""
    if folder.exists():
        return
    with whole_folder(folder) as partial:
        for number, scene in enumerate(scenes):
            write_lossless(partial / f"clip_{number:05d}.mkv", to_uint8(scene.draw()))
            (partial / f"clip_{number:05d}.txt").write_text(scene.caption + "\n", encoding="utf-8")


def write_lossless(path: Path, frames: np.ndarray) -> None:
    """Write uint8 [F, H, W, 3] with FFV1."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=FPS)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "bgr0"
        stream.codec_context.thread_count = 1
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


# --- training


def config_words(folder: Path, args: argparse.Namespace) -> list[str]:
    """The run config: the recipe's sizes, batch size, dropout and average, and what is usual for AdamW."""
    every = max(1, args.steps // args.saves)
    return [
        f"model.path={folder / 'model'}", f"output_dir={folder / args.run}",
        f"data.path={folder / 'clips'}", f"eval.path={folder / 'held-out'}", f"data.cache_dir={folder / 'cache'}",
        f"data.buckets=[{','.join(str(ClipShape(*size)) for size in SIZES)}]", f"data.fps={FPS}", "data.num_workers=1",
        "train.method=full", "train.precision=fp32", f"train.batch_size={args.batch_size}",
        f"full.ema_decay={recipe.AVERAGE}", "optimizer.lr=4e-3", "optimizer.betas=[0.9,0.98]",
        f"conditioning.image_dropout={recipe.IMAGE_DROPOUT}", f"conditioning.caption_dropout={recipe.CAPTION_DROPOUT}",
        f"checkpoint.every={every}", f"checkpoint.keep_last={args.saves + 1}", f"eval.every={every}",
        "eval.num_clips=24", "metrics.show_clips=0", *args.words,
    ]  # fmt: skip


def schedule_words(num_steps: int, num_constant: int | None) -> dict[int, list[str]]:
    """Split the recipe's schedule into two runs: a constant rate after the warmup, then a linear fall.

    Returns the keys of each run, by its last step.
    """
    first = round(0.4 * num_steps) if num_constant is None else min(num_constant, num_steps)
    runs = {first: ["optimizer.schedule=constant", "optimizer.warmup_steps=30"]} if first else {}
    if first < num_steps:
        # The rate falls from the end of the warmup, whose steps have been taken.
        runs[num_steps] = ["optimizer.schedule=linear", f"optimizer.warmup_steps={first}"]
    return {last: [f"train.num_steps={last}", *words] for last, words in runs.items()}


def model_folder(run: Path, step: int, kind: str = "model") -> Path:
    """The folder of a model that a run has exported. kind: "model" or "model_ema"."""
    return run / kind / f"step-{step:06d}"


def call_cogds(verb: str, words: Sequence[str], log: Path) -> None:
    """Run a verb on all ranks, and append what it prints to a file."""
    command = [sys.executable, "-m", "cogds", verb, "--num-gpus", str(RANKS), *words]
    started = time.monotonic()
    with log.open("a") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, timeout=TIMEOUT_S)
    if done.returncode:
        sys.exit(f"error: `cogds {verb}` ended with exit code {done.returncode}. See {log}.")
    print(f"cogds {verb}: {time.monotonic() - started:.0f} s", flush=True)


def curve(records: Iterable[dict[str, Any]]) -> Iterator[dict[str, float]]:
    """Yield what each evaluation found: losses of the live weights and of the average, by optimizer step."""
    for record in records:
        values = {name: record[name] for name in ("eval/loss", "eval_ema/loss", "eval/train_loss") if name in record}
        if values:
            yield {"step": record["step"], **values}


# --- the judge


def judge_models(folder: Path, args: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Judge the shipped model, and what was trained: mean and standard error of every figure, by model."""
    rows = {"recipe": judge_model(SHAPES_MODEL, folder / f"judged-{args.videos}.json", args.videos)}
    for step in [*args.judge_steps, args.steps]:
        for kind, name in (("model_ema", "average"), ("model", "live weights")):
            path = model_folder(folder / args.run, step, kind)
            if path.exists():
                file = folder / args.run / f"judged-{kind}-{step}-{args.videos}.json"
                rows[f"train.method=full, {step} steps, {name}"] = judge_model(str(path), file, args.videos)
    return rows


def judge_model(path: str, file: Path, num_videos: int) -> dict[str, list[float]]:
    """Return mean and standard error of every figure of a model's videos of unseen clips. file: keeps them."""
    if not file.exists():
        scenes = unseen_scenes(num_videos, SIZES, list(MOTIONS))
        pipeline = load_whole_pipeline(find_model(path))
        summary = summarize(judge_all(generate(pipeline, scenes), scenes))
        with whole_file(file) as partial:
            partial.write_text(json.dumps({key: [value.mean, value.error] for key, value in summary.items()}))
    return json.loads(file.read_text())


def summary_lines(rows: dict[str, dict[str, list[float]]]) -> list[str]:
    """A Markdown table of the models, with standard errors."""
    if not rows:
        return []
    cells = [[name, *(text_of(Estimate(*figures[key])) for key in COLUMNS)] for name, figures in rows.items()]
    return [table(["model", *COLUMNS.values()], cells)]


def text_of(estimate: Estimate) -> str:
    """A mean and its standard error."""
    return f"{estimate.mean:.2f} ± {estimate.error:.2f}"


if __name__ == "__main__":
    main()
