"""Judge conditioning by videos: does a LoRA for the shapes model reach both ends, go on, follow a control, and keep its
first frames?

    python benchmarks/conditions.py outputs/conditions
    python benchmarks/conditions.py outputs/conditions --table      # the table of what is there

Half of the clips show shapes that drift in a straight line between two random places, with a caption that does not say
where: only the conditions tell. The others show the base model's own motions. None is mirrored: the base model's
circles turn one way, which no caption tells. The LoRA `mixed` trains with the modes `first`, `first_last` and `prefix`.
`first` trains with that mode alone, on as many of its samples. `more` starts from `mixed` and trains with `last`,
`suffix` and `keyframes` for as many steps as `first`. These adapt all linear layers: half of the weights with which the
patch embedding reads conditions have never been used by the base model. `control` trains for as many steps as `first`
with control videos: clips of shapes on a curve, whose controls show only a dot on that curve. Videos are generated from
scenes that no clip shows, with each LoRA and with the base model. Results that are there already are kept.
"""

import argparse
import functools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

from cogds.data.video.media import write_video  # noqa: E402
from cogds.files import whole_folder  # noqa: E402
from cogds.model.conditioned_pipeline import ConditionedPipeline  # noqa: E402
from cogds.model.control import control_of  # noqa: E402
from cogds.model.load import SHAPES_MODEL, find_model  # noqa: E402
from cogds.model.lora.adapter import load_control  # noqa: E402
from cogds.shapes.clips import SCALE, to_uint8  # noqa: E402
from cogds.shapes.generation import generate  # noqa: E402
from cogds.shapes.judge import Estimate, follow, name_motion, psnr  # noqa: E402
from cogds.shapes.world import FPS, MOTIONS, SIZES, Numbers, Scene, Track, cover_of, random_scene  # noqa: E402
from cogds.videos.image_grid import make_grid  # noqa: E402

CONTEXT = 9  # frames of a prefix: 3 latent frames
SEAM = 4  # frames after the prefix, or before the suffix, whose speed is measured
KEYFRAMES = (0, 8, 16)
FIRST_SHARE = 0.6  # of the samples of `mixed`
ALL_LAYERS = ("lora.target_modules=[all-linear]", "lora.rank=64", "lora.alpha=64", "optimizer.lr=1e-3")
LORAS: Mapping[str, Sequence[str]] = {
    "first": ALL_LAYERS,
    "mixed": (
        *ALL_LAYERS,
        f"conditioning.modes={{first: {FIRST_SHARE}, first_last: 0.15, prefix: 0.25}}",
        "conditioning.context_latents=3",
    ),
    "more": (
        *ALL_LAYERS,
        "conditioning.modes={last: 0.3, suffix: 0.4, keyframes: 0.3}",
        "conditioning.context_latents=3",
        f"conditioning.keyframe_times=[{', '.join(str(frame / FPS) for frame in KEYFRAMES)}]",
    ),
    "control": ["conditioning.control=true"],
}
DOT_RADIUS = 4.0  # of a control video's dot [px]
FIGURES = {
    "first": ("motion_seen", "path_error", "first_frame_psnr", "clip_psnr"),
    "first_last": ("first_frame_psnr", "last_frame_psnr", "path_error", "clip_psnr"),
    "prefix": ("seam_velocity_error", "path_error", "clip_psnr"),
    "last": ("last_frame_psnr", "motion_seen", "clip_psnr"),
    "suffix": ("seam_velocity_error", "path_error", "clip_psnr"),
    "keyframes": ("middle_frame_psnr", "last_frame_psnr", "path_error", "clip_psnr"),
    "control": ("path_error", "first_frame_psnr", "clip_psnr"),
}
JUDGED = {
    "first": ("first", "first_last", "prefix"),
    "mixed": ("first", "first_last", "prefix"),
    "more": ("last", "suffix", "keyframes"),
    "control": ("control",),
}
UNITS = {
    "motion_seen": "motion seen",
    "path_error": "path error [px]",
    "first_frame_psnr": "first frame [dB]",
    "middle_frame_psnr": "middle frame [dB]",
    "last_frame_psnr": "last frame [dB]",
    "clip_psnr": "clip [dB]",
    "seam_velocity_error": "velocity error at the seam [px/frame]",
}
RUN_TIMEOUT_S = 5400


@dataclass(frozen=True)
class Clip:
    """A scene with its own track, caption and drawing. scene: shape, colors, size and start."""

    scene: Scene
    track: Track
    caption: str

    @property
    def frames(self) -> int:
        return self.scene.frames

    @property
    def height(self) -> int:
        return self.scene.height

    @property
    def width(self) -> int:
        return self.scene.width

    def draw(self, scale: int = 1) -> torch.Tensor:
        """Draw the clip, float32 [F, 3, H, W] from 0 to 1."""
        scene, color = self.scene, torch.tensor(self.scene.color)[None, :, None, None]
        cover = cover_of(scene.shape, self.track, scene.height, scene.width, scale)[:, None]
        return scene.draw_background(scale)[None] * (1 - cover) + color * cover


def drifting(numbers: Numbers, size: tuple[int, int, int]) -> Clip:
    """A shape that moves in a straight line, at a constant speed, between two random places."""
    scene = random_scene(numbers, size, ["still"])
    places = []
    for side in (scene.width, scene.height):
        margin = scene.radius + 2
        places.append([numbers.between(margin, side - margin) for _ in range(2)])
    share = torch.linspace(0, 1, scene.frames)
    x, y = (first + (last - first) * share for first, last in places)
    track = Track(x, y, torch.full((scene.frames,), scene.radius))
    return Clip(scene, track, f"a {scene.color_name} {scene.shape} moves")


def curved(numbers: Numbers, size: tuple[int, int, int]) -> Clip:
    """A shape that moves on a curve through three random places."""
    scene = random_scene(numbers, size, ["still"])
    share = torch.linspace(0, 1, scene.frames)
    margin = scene.radius + 2
    x, y = (
        sum(
            place * weight
            for place, weight in zip(
                [numbers.between(margin, side - margin) for _ in range(3)],
                ((1 - share) ** 2, 2 * share * (1 - share), share**2),
            )
        )
        for side in (scene.width, scene.height)
    )
    return Clip(
        scene, Track(x, y, torch.full((scene.frames,), scene.radius)), f"a {scene.color_name} {scene.shape} moves"
    )


def draw_control(clip: Clip, scale: int = 1) -> torch.Tensor:
    """Draw the control video of a clip, a white dot on its path, float32 [F, 3, H, W]."""
    track = Track(clip.track.x, clip.track.y, torch.full_like(clip.track.radius, DOT_RADIUS))
    cover = cover_of("disc", track, clip.scene.height, clip.scene.width, scale)
    return cover[:, None].expand(-1, 3, -1, -1)


def captioned(numbers: Numbers, size: tuple[int, int, int], motion: str) -> Clip:
    """A clip of the base model's own motions."""
    scene = random_scene(numbers, size, [motion])
    return Clip(scene, scene.track(), scene.caption)


def write_clips(folder: Path, clips: Sequence[Clip], has_control: bool = False) -> None:
    """Write captioned videos into a new folder, with control videos. An existing folder is not changed."""
    if folder.exists():
        return
    with whole_folder(folder) as partial:
        for number, clip in enumerate(clips):
            write_video(partial / f"clip_{number:03d}.mp4", to_uint8(clip.draw(SCALE)), FPS, num_threads=1)
            if has_control:
                video = to_uint8(draw_control(clip, SCALE))
                write_video(partial / f"clip_{number:03d}.control.mp4", video, FPS, num_threads=1)
            (partial / f"clip_{number:03d}.txt").write_text(clip.caption + "\n", encoding="utf-8")


def training_clips(num_clips: int) -> list[Clip]:
    """Clips of 2 s: for each of the base model's motions, a drifting shape."""
    numbers, motions = Numbers(5), list(MOTIONS)
    return [
        drifting(numbers, SIZES[index % 3])
        if index // 3 % 2
        else captioned(numbers, SIZES[index % 3], motions[index // 6 % 8])
        for index in range(num_clips)
    ]


def unseen_clips(mode: str, num_clips: int) -> list[Clip]:
    """Clips that are not trained: of the base model's motions for `first` and `last`, else drifting shapes."""
    numbers, motions = Numbers(2_000_000), list(MOTIONS)
    if mode in ("first", "last"):
        return [captioned(numbers, SIZES[index % 3], motions[index // 3 % 8]) for index in range(num_clips)]
    make = curved if mode == "control" else drifting
    return [make(numbers, SIZES[index % 3]) for index in range(num_clips)]


def conditions(mode: str, clips: Sequence[Clip], has_control: bool) -> dict[str, Any]:
    """The arguments of the pipeline for a batch of clips. has_control: whether the model takes control videos."""
    videos = [clip.draw() for clip in clips]
    firsts, lasts = (torch.stack([video[frame] for video in videos]) for frame in (0, -1))
    if mode == "prefix":
        return {"video": [video[:CONTEXT] for video in videos]}
    if mode == "suffix":
        return {"video": [video[-CONTEXT:] for video in videos], "video_at": "end"}
    if mode == "keyframes":
        return {"keyframes": {frame: torch.stack([video[frame] for video in videos]) for frame in KEYFRAMES}}
    if mode == "last":
        return {"last_image": lasts}
    if mode == "control" and has_control:
        return {"image": firsts, "control_video": [draw_control(clip) for clip in clips]}
    return {"image": firsts, "last_image": lasts} if mode == "first_last" else {"image": firsts}


def judge(video: torch.Tensor, clip: Clip, mode: str) -> dict[str, float]:
    """The figures of one generated video beside the real clip. Both are followed, so the judge's own errors cancel."""
    real = clip.draw()
    seen, expected = follow(video, clip.scene), follow(real, clip.scene)
    distance = torch.hypot(seen.track.x - expected.track.x, seen.track.y - expected.track.y)
    num = len(video)
    frames = slice(num - CONTEXT - SEAM, num - CONTEXT + 1) if mode == "suffix" else slice(CONTEXT - 1, CONTEXT + SEAM)
    speeds = [(track.x[frames].diff().mean(), track.y[frames].diff().mean()) for track in (seen.track, expected.track)]
    return {
        "motion_seen": float(name_motion(seen, clip.scene) == clip.scene.motion),
        "path_error": distance.mean().item(),
        "first_frame_psnr": psnr(video[0], real[0]),
        "middle_frame_psnr": psnr(video[num // 2], real[num // 2]),
        "last_frame_psnr": psnr(video[-1], real[-1]),
        "clip_psnr": psnr(video, real),
        "seam_velocity_error": math.dist(*speeds),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, generate, judge, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="results, and the runs")
    parser.add_argument("--loras", nargs="+", choices=LORAS, default=list(LORAS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="of training and of the videos' noise")
    parser.add_argument("--clips", type=int, default=2400, help="to train")
    parser.add_argument("--videos", type=int, default=48, help="to generate for each mode")
    parser.add_argument("--steps", type=int, default=6000, help="of `mixed`, of 8 clips")
    parser.add_argument("--table", action="store_true", help="only print the table")
    args = parser.parse_args(arguments)
    args.folder = args.folder.absolute()
    if not args.table:
        write_clips(args.folder / "clips", training_clips(args.clips))
        if "control" in args.loras:
            numbers = Numbers(6)
            controlled = [curved(numbers, SIZES[index % 3]) for index in range(args.clips)]
            write_clips(args.folder / "controlled", controlled, has_control=True)
        for seed in args.seeds:
            for name in (None, *args.loras):
                measure(name, seed, args)
    print("\n".join(table(args.folder)))


def measure(name: str | None, seed: int, args: argparse.Namespace) -> None:
    """Train one LoRA, unless it is there or it is the base model, and judge its videos of every mode."""
    file = args.folder / f"{name or 'base'}-{seed}.json"
    if file.exists():
        return
    pipeline = ConditionedPipeline.from_pretrained(find_model(SHAPES_MODEL).path, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if name is not None:
        lora = train(name, seed, args)
        pipeline.load_lora_weights(lora)
        if name == "control":
            load_control(pipeline.transformer, lora)
    results = {}
    judged = {mode: None for lora_name in ([name] if name else args.loras) for mode in JUDGED[lora_name]}
    for mode in judged:
        clips = unseen_clips(mode, args.videos)
        has_control = control_of(pipeline.transformer) is not None
        given = functools.partial(conditions, mode, has_control=has_control)
        videos = generate(pipeline, clips, seed, conditions=given)
        results[mode] = [judge(video, clip, mode) for video, clip in zip(videos, clips, strict=True)]
        save_sheet(args.folder / f"{mode}-{name or 'base'}-{seed}.png", clips[:3], videos[:3])
        print(f"{name or 'base'}, seed {seed}, {mode}: {len(videos)} videos", flush=True)
    file.with_suffix(".partial").write_text(json.dumps(results))
    file.with_suffix(".partial").rename(file)


def train(name: str, seed: int, args: argparse.Namespace) -> Path:
    """Train a LoRA with the main command and return its folder."""
    run = args.folder / f"run-{name}-{seed}"
    steps = args.steps if name == "mixed" else round(args.steps * FIRST_SHARE)
    lora = run / f"lora/step-{steps:06d}"
    clips = args.folder / ("controlled" if name == "control" else "clips")
    if not lora.exists():
        words = [
            "--config", ROOT / "launch/configs/demo.yaml", "--deepspeed", ROOT / "ds_configs/zero2.json",
            "--num-gpus", "1", f"data.path={clips}", "data.draw_demo_clips=false",
            "data.buckets=[17x48x48, 17x48x64, 17x64x48]", f"data.cache_dir={args.folder / f'cache-{name}'}",
            f"output_dir={run}", f"seed={seed}", f"train.num_steps={steps}", "eval.every=null", "train.batch_size=8",
            f"checkpoint.every={steps}", "metrics.show_clips=0", *LORAS[name],
        ]  # fmt: skip
        if name == "more":
            words.append(f"lora.init_from={args.folder / f'run-mixed-{seed}' / f'lora/step-{args.steps:06d}'}")
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "cogds", "train", *map(str, words)]
        with (args.folder / f"{name}-{seed}.log").open("w") as log:
            done = subprocess.run(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=ROOT, timeout=RUN_TIMEOUT_S
            )
        if done.returncode:
            sys.exit(f"{name}, seed {seed}: exit code {done.returncode}; see {log.name}")
    return lora


def save_sheet(file: Path, clips: Sequence[Clip], videos: Sequence[torch.Tensor]) -> None:
    """Save a contact sheet: six frames of each real clip, and below it of the generated one."""
    rows = []
    for clip, video in zip(clips, videos):
        for frames in (clip.draw(), video):
            chosen = frames[torch.linspace(0, len(frames) - 1, 6).round().long()]
            square = torch.nn.functional.interpolate(chosen, (128, 128), mode="bilinear")
            rows.append([frame[None] for frame in to_uint8(square)])
    Image.fromarray(np.asarray(make_grid(rows)[0])).save(file)


def table(folder: Path) -> list[str]:
    """Return a Markdown table for each mode: means with standard errors over the videos of all seeds."""
    results: dict[str, list[Mapping]] = {}
    for path in sorted(folder.glob("*-[0-9].json")):
        results.setdefault(path.stem.rpartition("-")[0], []).append(json.loads(path.read_text()))
    lines: list[str] = []
    for mode, figures in FIGURES.items():
        if not any(mode in runs[0] for runs in results.values()):
            continue
        lines += ["", row(f"`{mode}`", "seeds", *(UNITS[figure] for figure in figures))]
        lines.append("|" + "---|" * (len(figures) + 2))
        for name in ("base", *LORAS):
            if (runs := results.get(name)) and mode in runs[0]:
                cells = (estimate(runs, mode, figure) for figure in figures)
                lines.append(row(name, len(runs), *(f"{cell.mean:.2f} ± {cell.error:.2f}" for cell in cells)))
    if {"first", "mixed"} <= results.keys():
        cells = (difference(results["mixed"], results["first"], figure) for figure in FIGURES["first"])
        texts = [f"{cell.mean:+.2f} ± {cell.error:.2f}" for cell in cells]
        lines += ["", f"`first`, mixed minus first, video by video: {', '.join(texts)}"]
    return lines


def estimate(runs: Sequence[Mapping], mode: str, figure: str) -> Estimate:
    """The mean over seeds and videos. Its standard error is that of the videos' means over the seeds."""
    return Estimate.of([float(np.mean(column)) for column in zip(*(figures(run, mode, figure) for run in runs))])


def difference(runs: Sequence[Mapping], others: Sequence[Mapping], figure: str) -> Estimate:
    """The mean difference in mode `first` between two LoRAs, over the videos' means over the seeds."""
    means: Callable[[Sequence[Mapping]], list[float]] = lambda some: [  # noqa: E731
        float(np.mean(column)) for column in zip(*(figures(run, "first", figure) for run in some))
    ]
    return Estimate.of([a - b for a, b in zip(means(runs), means(others), strict=True)])


def figures(run: Mapping, mode: str, figure: str) -> list[float]:
    """One figure of all videos of a run."""
    return [video[figure] for video in run[mode]]


def row(*cells: object) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    main()
