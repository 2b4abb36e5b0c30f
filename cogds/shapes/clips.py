"""Clips of the shapes world as a dataset: videos with captions, from which a LoRA can learn a new motion."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from cogds.data.video.media import write_video
from cogds.files import whole_folder
from cogds.shapes.world import FPS, SIZES, Numbers, Scene, random_scene

DEMO_MOTION = "bounce"
SCALE = 4  # the files are larger than what is trained, as real clips are
# How many clips of each size in `SIZES`: square, landscape and portrait, of 2 s and of 1 s.
DEMO_CLIPS = (4, 3, 3, 2, 0, 0)


def demo_scenes() -> list[Scene]:
    """The scenes of the demo's clips: twelve, all with a motion that the base model has never seen."""
    numbers = Numbers(0)
    sizes = [size for size, num_clips in zip(SIZES, DEMO_CLIPS) for _ in range(num_clips)]
    return [random_scene(numbers, size, [DEMO_MOTION]) for size in sizes]


def draw_demo_clips(folder: str | Path) -> None:
    """Write the demo's clips into a new folder. An existing folder is not changed.

    Several ranks may call this at once, since they all draw the same clips.
    """
    write_clips(folder, demo_scenes())


def unseen_scenes(num_scenes: int, sizes: Sequence[tuple[int, int, int]], motions: Sequence[str]) -> list[Scene]:
    """Return scenes that no clip shows, with sizes and motions in turn."""
    numbers = Numbers(1_000_000)
    return [
        random_scene(numbers, sizes[index % len(sizes)], [motions[index // len(sizes) % len(motions)]])
        for index in range(num_scenes)
    ]


def write_clips(folder: str | Path, scenes: Sequence[Scene]) -> None:
    """Write captioned videos into a new folder. An existing folder is not changed."""
    folder = Path(folder)
    if folder.exists():
        return
    with whole_folder(folder) as partial:
        for number, scene in enumerate(scenes):
            # One thread, because x264's output depends on the number of threads.
            write_video(partial / f"clip_{number:02d}.mp4", to_uint8(scene.draw(SCALE)), FPS, num_threads=1)
            (partial / f"clip_{number:02d}.txt").write_text(scene.caption + "\n", encoding="utf-8")


def to_uint8(video: torch.Tensor) -> np.ndarray:
    """Return frames [F, 3, H, W] from 0 to 1 as uint8 [F, H, W, 3]."""
    return (video.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
