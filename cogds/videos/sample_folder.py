"""The folder of the videos that a run made: `samples/`.

prompts.json              file stem -> prompt, size, seed
first_frames/STEM.png     what the video starts from, in image-to-video
base/STEM.mp4             of the base model
step-000500/STEM.mp4      after that number of steps
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from cogds.files import whole_file

BASE, FIRST_FRAMES, PROMPTS = "base", "first_frames", "prompts.json"
_STEP = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Prompt:
    """What a video is made from. size: FRAMESxHEIGHTxWIDTH. Unknown fields are None."""

    text: str
    size: str | None = None
    seed: int | None = None


@dataclass(frozen=True)
class PromptVideos:
    """The videos of one prompt: that of the base model, and by step. first_frame: an image file."""

    prompt: Prompt
    first_frame: Path | None
    base: Path | None
    by_step: Mapping[int, Path]


def write_prompts(folder: Path, prompts: Mapping[str, Prompt], first_frames: Mapping[str, np.ndarray]) -> None:
    """Record what the videos are made from, by file stem. Does nothing if it is recorded already.

    Prompts that are not given are kept. first_frames: uint8 [H, W, 3]; none in text-to-video.
    """
    for stem, pixels in first_frames.items():
        file = folder / FIRST_FRAMES / f"{stem}.png"
        if not file.is_file():  # a stem stands for these pixels, too
            with whole_file(file) as partial:
                Image.fromarray(pixels).save(partial, "PNG")
    recorded = _read_prompts(folder)
    if recorded == {**recorded, **prompts}:
        return
    merged = {stem: asdict(prompt) for stem, prompt in {**recorded, **prompts}.items()}
    with whole_file(folder / PROMPTS) as partial:
        partial.write_text(json.dumps(merged, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_videos(folder: Path) -> list[PromptVideos]:
    """Return the videos of a folder, in the order of the prompts, and then those whose prompt is not recorded."""
    prompts = _read_prompts(folder)
    steps = {int(match[1]): path for path in folder.glob("step-*") if (match := _STEP.fullmatch(path.name))}
    stems = dict.fromkeys([*prompts, *(file.stem for file in sorted(folder.glob("*/*.mp4")))])
    videos = []
    for stem in stems:
        by_step = {step: file for step in sorted(steps) if (file := steps[step] / f"{stem}.mp4").is_file()}
        base, first_frame = folder / BASE / f"{stem}.mp4", folder / FIRST_FRAMES / f"{stem}.png"
        # The name of a file is the prompt's first words and a digest.
        prompt = prompts.get(stem, Prompt(stem.rpartition("-")[0].replace("-", " ") or stem))
        if by_step or base.is_file():
            videos.append(
                PromptVideos(
                    prompt,
                    first_frame if first_frame.is_file() else None,
                    base if base.is_file() else None,
                    by_step,
                )
            )
    return videos


def _read_prompts(folder: Path) -> dict[str, Prompt]:
    """Return the recorded prompts by file stem; none if the file is missing or damaged."""
    try:
        return {stem: Prompt(**fields) for stem, fields in json.loads((folder / PROMPTS).read_text("utf-8")).items()}
    except (FileNotFoundError, ValueError, TypeError, AttributeError):
        return {}
