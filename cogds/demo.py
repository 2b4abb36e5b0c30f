"""The demo verb: train a LoRA that teaches the shapes model a motion it has never seen, and show it in one picture."""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from cogds.config.loading import load_config
from cogds.config.schema import RunConfig
from cogds.distributed.world import read_world
from cogds.errors import refuse_to_run
from cogds.files import whole_file
from cogds.model.load import SHAPES_MODEL, find_model
from cogds.model.pipelines import load_whole_pipeline
from cogds.process.logs import RESULT
from cogds.shapes.clips import DEMO_MOTION, to_uint8, unseen_scenes
from cogds.shapes.generation import generate, judge_all
from cogds.shapes.judge import summarize
from cogds.shapes.world import PHRASES, SIZES, Scene
from cogds.train.main import main as train
from cogds.videos.image_grid import BACKGROUND, add_label, evenly_spaced_frames, make_grid

logger = logging.getLogger(__name__)

NUM_VIDEOS = 18  # before and after
SHOWN = (0, 1, 2, 6)  # videos in the picture: one of each aspect ratio, and one more
FRAMES, ENLARGED = 5, 2  # the frames at which the shape is highest and lowest
LONG_SIDE = max(max(size[1:]) for size in SIZES)


def main(args: argparse.Namespace) -> None:
    """Train. If the model and the clips are the demo's own, rank 0 then makes videos with and without the LoRA."""
    train(args)
    cfg, _ = load_config(args.config, args.overrides)
    if read_world().rank == 0 and not args.dry_run and cfg.model.path == SHAPES_MODEL and cfg.data.draw_demo_clips:
        show(cfg)


def show(cfg: RunConfig) -> None:
    """Judge videos of unseen scenes without and with the newest LoRA, and write before-after.png."""
    output_dir = Path(cfg.output_dir)
    lora = max(path for path in (output_dir / "lora").iterdir() if "." not in path.name)  # none that is being written
    logger.info("making %d videos before and after training", NUM_VIDEOS)
    torch.set_num_threads(max(torch.get_num_threads(), 2))
    scenes = unseen_scenes(NUM_VIDEOS, SIZES[:3], [DEMO_MOTION])
    pipeline = load_whole_pipeline(find_model(cfg.model.path))
    before = generate(pipeline, scenes)
    pipeline.load_lora_weights(lora, use_safetensors=True)
    after = generate(pipeline, scenes)
    first, last = (summarize(judge_all(videos, scenes)) for videos in (before, after))
    picture = output_dir / "before-after.png"
    draw_picture(picture, [(scenes[index], before[index], after[index]) for index in SHOWN])
    seen, errors = ([summary[name].mean for summary in (first, last)] for name in ("motion_seen", "path_error"))
    logger.log(
        RESULT,
        f'"{PHRASES[DEMO_MOTION]}": seen in {seen[0]:.0%} of {NUM_VIDEOS} new videos before training, {seen[1]:.0%} '
        f"after; {errors[0]:.1f} and {errors[1]:.1f} pixels off the path",
    )
    logger.log(RESULT, f"look: {picture}")


def draw_picture(path: Path, rows: Sequence[tuple[Scene, torch.Tensor, torch.Tensor]]) -> None:
    """Write a picture: for each scene its first frame, and frames of the real clip, without and with the LoRA."""
    lines: list[list[np.ndarray]] = []
    for scene, before, after in rows:
        real = scene.draw()
        strips = [_strip(real[:1]), _strip(real), _strip(before), _strip(after)]
        if not lines:
            titles = ("first frame", "real clip", "before training", "with the LoRA")
            strips = [add_label(strip, title) for strip, title in zip(strips, titles)]
        lines.append([add_label(make_grid([strips]), scene.caption)])
    with whole_file(path) as partial:
        Image.fromarray(make_grid(lines)[0]).save(partial)


def _strip(video: torch.Tensor) -> np.ndarray:
    """Return frames of a video side by side, each enlarged and in a square of the same size: uint8 [1, H, W, 3]."""
    frames = []
    for frame in evenly_spaced_frames(to_uint8(video), FRAMES):
        image = Image.fromarray(frame)
        large = image.resize((ENLARGED * image.width, ENLARGED * image.height), Image.Resampling.BICUBIC)
        square = Image.new("RGB", (ENLARGED * LONG_SIDE,) * 2, (BACKGROUND,) * 3)
        square.paste(large, ((square.width - large.width) // 2, (square.height - large.height) // 2))
        frames.append(np.asarray(square)[None])
    return make_grid([frames])


if __name__ == "__main__":
    refuse_to_run("cogds.demo", "demo")
