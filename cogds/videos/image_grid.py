"""Videos beside one another, in one picture or one video: uint8 arrays in, uint8 arrays out, no files.

A video is uint8 [F, H, W, 3], a picture uint8 [H, W, 3].
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GAP = 4  # pixels between the parts
BAR_HEIGHT = 18  # of the bar that a label stands in
BACKGROUND = 24  # a dark grey


def shrunk(video: np.ndarray, width: int) -> np.ndarray:
    """The video at most `width` pixels wide, its aspect kept, both sides even."""
    height, own = video.shape[1:3]
    if own <= width:
        return video
    size = (width // 2 * 2, max(2, round(height * width / own / 2) * 2))
    return np.stack([np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC)) for frame in video])


def evenly(video: np.ndarray, num: int) -> list[np.ndarray]:
    """So many frames, evenly spaced from the first to the last; all of them where there are no more."""
    return [video[index] for index in np.linspace(0, len(video) - 1, min(num, len(video))).round().astype(int)]


def labelled(video: np.ndarray, text: str) -> np.ndarray:
    """The video under a bar with a line of text, cut off where it is too long."""
    width = video.shape[2]
    bar = Image.new("RGB", (width, BAR_HEIGHT), (BACKGROUND,) * 3)
    ImageDraw.Draw(bar).text((GAP, 2), text, fill=(235, 235, 235), font=ImageFont.load_default(size=12))
    return np.concatenate([np.broadcast_to(np.asarray(bar), (len(video), BAR_HEIGHT, width, 3)), video], axis=1)


def grid(rows: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """Videos in rows and columns; the shorter ones stand still at their last frame. Both sides are even."""
    num_frames = max(len(video) for row in rows for video in row)
    return _joined([_joined([_lasting(video, num_frames) for video in row], axis=2) for row in rows], axis=1)


def row(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures side by side."""
    return grid([[picture[None] for picture in pictures]])[0]


def _lasting(video: np.ndarray, num_frames: int) -> np.ndarray:
    return np.concatenate([video, np.repeat(video[-1:], num_frames - len(video), axis=0)])


def _joined(videos: Sequence[np.ndarray], axis: int) -> np.ndarray:
    """Along the height (1) or the width (2), with gaps; what is smaller the other way is filled up."""
    other = 3 - axis
    extent = max(video.shape[other] for video in videos)
    parts: list[np.ndarray] = []
    for number, video in enumerate(videos):
        last = number == len(videos) - 1
        padding = [(0, 0)] * 4
        padding[other] = (0, extent - video.shape[other])
        padding[axis] = (0, 0 if last else GAP)
        parts.append(np.pad(video, padding, constant_values=BACKGROUND))
    joined = np.concatenate(parts, axis=axis)
    odd = [(0, joined.shape[side] % 2 if side in (1, 2) else 0) for side in range(4)]
    return np.pad(joined, odd, constant_values=BACKGROUND)
