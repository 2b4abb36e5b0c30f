"""Grids of videos and images, for mp4 files and TensorBoard.

A video is uint8 [F, H, W, 3], an image uint8 [H, W, 3].
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GAP = 4  # pixels between cells
LABEL_HEIGHT = 18  # pixels of the bar above a labeled video
BACKGROUND = 24  # a dark gray


def shrink(video: np.ndarray, max_width: int) -> np.ndarray:
    """Return the video at most `max_width` pixels wide. A resized video keeps its aspect ratio and has even sides."""
    height, width = video.shape[1:3]
    if width <= max_width:
        return video
    size = (max_width // 2 * 2, max(2, round(height * max_width / width / 2) * 2))
    return np.stack([np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC)) for frame in video])


def evenly_spaced_frames(video: np.ndarray, num: int) -> list[np.ndarray]:
    """Return `num` frames from the first to the last, or all frames if the video has no more."""
    return [video[index] for index in np.linspace(0, len(video) - 1, min(num, len(video))).round().astype(int)]


def add_label(video: np.ndarray, text: str) -> np.ndarray:
    """Return the video below a bar with one line of text. Text that is too long is cut off."""
    width = video.shape[2]
    bar = Image.new("RGB", (width, LABEL_HEIGHT), (BACKGROUND,) * 3)
    ImageDraw.Draw(bar).text((GAP, 2), text, fill=(235, 235, 235), font=ImageFont.load_default(size=12))
    return np.concatenate([np.broadcast_to(np.asarray(bar), (len(video), LABEL_HEIGHT, width, 3)), video], axis=1)


def make_grid(rows: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """Join videos in rows and columns. Shorter videos hold their last frame. Both sides of the result are even."""
    num_frames = max(len(video) for row in rows for video in row)
    return _join([_join([_extend(video, num_frames) for video in row], axis=2) for row in rows], axis=1)


def _extend(video: np.ndarray, num_frames: int) -> np.ndarray:
    """Repeat the last frame."""
    return np.concatenate([video, np.repeat(video[-1:], num_frames - len(video), axis=0)])


def _join(videos: Sequence[np.ndarray], axis: int) -> np.ndarray:
    """Join videos along the height (1) or the width (2), with gaps, and pad the smaller ones on the other axis."""
    other = 3 - axis
    extent = max(video.shape[other] for video in videos)
    parts: list[np.ndarray] = []
    for number, video in enumerate(videos):
        is_last = number == len(videos) - 1
        padding = [(0, 0)] * 4
        padding[other] = (0, extent - video.shape[other])
        padding[axis] = (0, 0 if is_last else GAP)
        parts.append(np.pad(video, padding, constant_values=BACKGROUND))
    joined = np.concatenate(parts, axis=axis)
    to_even = [(0, joined.shape[side] % 2 if side in (1, 2) else 0) for side in range(4)]
    return np.pad(joined, to_even, constant_values=BACKGROUND)
