"""Decoding of one clip for the VAE, run in a worker process: a crash, hang or memory leak loses only that clip."""

from dataclasses import dataclass

import numpy as np

from cogds.core.geometry import ClipShape
from cogds.data.video.kinds import kind_of
from cogds.data.video.media import DecodeError, read_clip, read_image


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
    control_path: str | None = None


@dataclass(frozen=True)
class DecodedClip:
    """A decoded clip.

    Attributes:
        pixels: uint8 [F, H, W, 3].
        first_frame: uint8 [H, W, 3], the conditioning image if the dataset has one, otherwise frame 0.
        control: uint8 [F, H, W, 3], the same times of the control video, None without one.
    """

    pixels: np.ndarray
    first_frame: np.ndarray
    control: np.ndarray | None = None


def decode(task: DecodeTask) -> DecodedClip:
    """Decode, resample in time, resize, crop and mirror. Raises media.DecodeError.

    The control may lack its last frame, as optical flow between frames does. The frame before it is then repeated.
    """
    height, width = task.shape.height, task.shape.width
    pixels = _read(task, task.path, task.kind)
    first = read_image(task.image_path, height, width) if task.image_path else pixels[0]
    control = None
    if task.control_path:
        try:
            control = _read(task, task.control_path, kind_of(task.control_path), is_padded=True)
        except DecodeError as error:
            raise DecodeError(f"control video unusable: {error}") from None
    if task.mirrored:
        pixels, first = (_mirror(picture) for picture in (pixels, first))
        control = None if control is None else _mirror(control)
    return DecodedClip(pixels, first, control)


def _read(task: DecodeTask, path: str, kind: str | None, *, is_padded: bool = False) -> np.ndarray:
    """Read the task's range of a file: uint8 [F, H, W, 3]."""
    shape = task.shape
    if kind == "image" and shape.frames == 1 and not task.start_s:
        return read_image(path, shape.height, shape.width)[None]
    return read_clip(path, shape, task.fps, task.start_s, decoder=task.decoder, is_padded=is_padded)


def _mirror(picture: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(picture[..., ::-1, :])
