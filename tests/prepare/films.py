"""Films whose scenes and frame numbers are known, because both are drawn into the pixels."""

import subprocess
from collections.abc import Sequence
from pathlib import Path

import imageio_ffmpeg
import numpy as np
from PIL import Image

from tests.data.video.clips import encode

HEIGHT, WIDTH = 96, 160
NUM_BITS, BIT_SIDE = 10, 16


def scene(number: int, num_frames: int, speed: float = 1.0, size: tuple[int, int] = (HEIGHT, WIDTH)) -> np.ndarray:
    """A texture that moves to the left, uint8 [F, H, W, 3]. number: of the texture; speed: pixels per frame."""
    height, width = size
    grid = np.random.default_rng(number).integers(0, 256, (7, 40, 3), np.uint8)
    texture = np.asarray(Image.fromarray(grid).resize((width * 6, height), Image.Resampling.BICUBIC))
    return np.stack([texture[:, round(k * speed) : round(k * speed) + width] for k in range(num_frames)])


def number_frames(frames: np.ndarray) -> np.ndarray:
    """Draw the number of each frame on top, as black and white squares, of which one changes from frame to frame."""
    frames = frames.copy()
    for number, picture in enumerate(frames):
        for bit in range(NUM_BITS):
            left = bit * BIT_SIDE
            picture[:BIT_SIDE, left : left + BIT_SIDE] = 255 * ((number ^ number >> 1) >> bit & 1)  # Gray code
    return frames


def read_numbers(frames: np.ndarray) -> list[int]:
    """The numbers drawn into frames of the same size."""
    centers = frames[:, BIT_SIDE // 2, BIT_SIDE // 2 : NUM_BITS * BIT_SIDE : BIT_SIDE].mean(axis=-1) > 127
    # A bit of a number is the parity of its own and the higher bits of the Gray code.
    parities = np.cumsum(centers[:, ::-1], axis=1)[:, ::-1] % 2
    return (parities << np.arange(NUM_BITS)).sum(axis=1).tolist()


def write_film(path: Path, lengths: Sequence[int], pts_ms: Sequence[int] | None = None) -> Path:
    """A film of scenes with these numbers of frames, at 25 fps or with a time for each frame."""
    frames = np.concatenate([scene(number, length) for number, length in enumerate(lengths)])
    return encode(path, number_frames(frames), pts_ms)


def ffmpeg(*arguments: object) -> None:
    """Run ffmpeg, which knows nothing of cogds."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments)]
    subprocess.run(command, check=True, timeout=60)
