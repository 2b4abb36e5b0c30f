"""Decoding of one clip for the VAE, run in a worker process: a crash, hang or memory leak loses only that clip."""

from dataclasses import dataclass

import numpy as np

from cogds.core.geometry import ClipShape
from cogds.data.video.media import read_clip, read_image


@dataclass(frozen=True)
class DecodeTask:
    """A clip to decode. See `index.IndexedClip` and `media.read_clip` for the fields."""

    path: str
    kind: str
    image_path: str | None
    start_s: float
    shape: ClipShape
    fps: float
    decoder: str
    mirrored: bool = False


@dataclass(frozen=True)
class DecodedClip:
    """A decoded clip.

    Attributes:
        pixels: uint8 [F, H, W, 3].
        first_frame: uint8 [H, W, 3], the conditioning image if the dataset has one, otherwise frame 0.
    """

    pixels: np.ndarray
    first_frame: np.ndarray


def decode(task: DecodeTask) -> DecodedClip:
    """Decode, resample in time, resize, crop and mirror. Raises media.DecodeError."""
    height, width = task.shape.height, task.shape.width
    if task.kind == "image" and task.shape.frames == 1 and not task.start_s:
        pixels = read_image(task.path, height, width)[None]
    else:
        pixels = read_clip(task.path, task.shape, task.fps, task.start_s, decoder=task.decoder)
    first = read_image(task.image_path, height, width) if task.image_path else pixels[0]
    if task.mirrored:
        pixels, first = (np.ascontiguousarray(picture[..., ::-1, :]) for picture in (pixels, first))
    return DecodedClip(pixels, first)
