"""Videos of the shapes world from a diffusers pipeline."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch

from cogds.shapes.judge import Judgement, judge
from cogds.shapes.world import Scene

STEPS, GUIDANCE = 25, 1.0  # the model was trained to need no guidance
BATCH_SIZE = 16


class Drawable(Protocol):
    """A `Scene`, or another clip that can be drawn."""

    @property
    def frames(self) -> int: ...
    @property
    def height(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def caption(self) -> str: ...
    def draw(self) -> torch.Tensor: ...


def first_images(scenes: Sequence[Drawable]) -> dict[str, Any]:
    """Return the argument of diffusers' pipeline for the scenes' first frames."""
    return {"image": torch.stack([scene.draw()[0] for scene in scenes])}


@torch.no_grad()
def generate(
    pipeline: Any,
    scenes: Sequence[Drawable],
    seed: int = 0,
    on_step: Callable[[int], object] = lambda _: None,
    conditions: Callable[[Sequence[Any]], dict[str, Any]] = first_images,
) -> list[torch.Tensor]:
    """Generate a video from each scene's first frame and caption. Returns float32 [F, 3, H, W] from 0 to 1 each.

    pipeline: diffusers' CogVideoXImageToVideoPipeline with all parts. A video does not depend on the rest of its batch:
    its noise follows from the seed and its number. on_step: called after each denoising step with the number of videos.
    conditions: returns the pipeline's arguments for a batch of scenes.
    """
    by_size: dict[tuple[int, int, int], list[int]] = defaultdict(list)
    for number, scene in enumerate(scenes):
        by_size[scene.frames, scene.height, scene.width].append(number)
    videos: dict[int, torch.Tensor] = {}
    for (frames, height, width), numbers in by_size.items():
        for batch in _batches(numbers):

            def report(_pipeline: Any, _step: int, _time: int, tensors: dict, num_videos: int = len(batch)) -> dict:
                on_step(num_videos)
                return tensors

            output = pipeline(
                **conditions([scenes[number] for number in batch]),
                prompt=[scenes[number].caption for number in batch],
                num_frames=frames,
                height=height,
                width=width,
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE,
                max_sequence_length=pipeline.transformer.config.max_text_seq_length,
                generator=[torch.Generator().manual_seed(seed * 1_000_003 + number) for number in batch],
                output_type="pt",
                callback_on_step_end=report,
            ).frames
            videos.update(zip(batch, output.float().cpu()))
    return [videos[number] for number in range(len(scenes))]


def _batches(numbers: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(numbers), BATCH_SIZE):
        yield numbers[start : start + BATCH_SIZE]


def judge_all(videos: Sequence[torch.Tensor], scenes: Sequence[Scene]) -> list[Judgement]:
    """Judge one generated video per scene."""
    return [judge(video, scene) for video, scene in zip(videos, scenes, strict=True)]
