"""Drawn clips of many sizes, lengths and frame rates, without a download."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from cogds.data.video.media import write_video
from cogds.files import whole_folder

# Width, height, frames per second, seconds: landscape, portrait and square clips of 0.7 to 3 s.
_CLIPS = (
    (320, 192, 16, 3.0),
    (192, 320, 24, 2.0),
    (256, 256, 30, 1.5),
    (320, 240, 12, 2.5),
    (240, 176, 25, 0.72),
    (176, 304, 12, 1.5),
)
_COLORS = {
    "red": (220, 40, 40),
    "green": (40, 180, 70),
    "yellow": (235, 210, 50),
    "white": (245, 245, 245),
    "orange": (240, 140, 30),
    "purple": (150, 60, 190),
}
_BACKGROUNDS = {"blue": (40, 70, 160), "grey": (110, 110, 115), "brown": (110, 75, 45), "teal": (20, 110, 115)}
_SHAPES = ("circle", "square", "triangle")
# Motion in the caption -> start and end of the center (x, y), as shares of width and height.
_MOVES = {
    "from left to right": ((0.2, 0.5), (0.8, 0.5)),
    "from right to left": ((0.8, 0.5), (0.2, 0.5)),
    "from top to bottom": ((0.5, 0.2), (0.5, 0.8)),
    "from bottom to top": ((0.5, 0.8), (0.5, 0.2)),
}


def draw_clips(folder: str | Path, seed: int = 0) -> None:
    """Write six captioned clips and one captioned image into a new folder. The files depend only on the seed.

    An existing folder is not changed. Several ranks may call this at once, since they all draw the same clips.
    """
    folder = Path(folder)
    if folder.exists():
        return
    rng = np.random.default_rng(seed)
    with whole_folder(folder) as partial:
        for number, (width, height, fps, length_s) in enumerate(_CLIPS):
            scene = _choose_scene(rng)
            num_frames = round(fps * length_s)
            frames = np.stack([scene.draw(width, height, k / (num_frames - 1)) for k in range(num_frames)])
            # One thread, because x264's output depends on the number of threads.
            write_video(partial / f"clip_{number}.mp4", frames, fps, num_threads=1)
            caption = f"a {scene.color} {scene.shape} moves {scene.move} over a {scene.background} background"
            (partial / f"clip_{number}.txt").write_text(caption + "\n", encoding="utf-8")
        scene = _choose_scene(rng)
        Image.fromarray(scene.draw(320, 192, 0.5)).save(partial / "image_0.png")
        caption = f"a {scene.color} {scene.shape} in the middle of a {scene.background} background"
        (partial / "image_0.txt").write_text(caption + "\n", encoding="utf-8")


class _Scene(NamedTuple):
    """A shape that moves over a background, by the names in the caption."""

    shape: str
    color: str
    background: str
    move: str

    def draw(self, width: int, height: int, progress: float) -> np.ndarray:
        """Draw one frame, uint8 [H, W, 3]. progress: of the motion, from 0 to 1."""
        # A gradient, because a model could not get the texture of a flat background wrong.
        light = np.linspace(0.7, 1.3, height)[:, None, None] * np.ones((1, width, 1))
        canvas = np.clip(light * np.array(_BACKGROUNDS[self.background]), 0, 255).astype(np.uint8)
        image = Image.fromarray(canvas)
        draw = ImageDraw.Draw(image)
        start, end = _MOVES[self.move]
        x, y = ((a + (b - a) * progress) * side for a, b, side in zip(start, end, (width, height)))
        r = min(width, height) / 6
        if self.shape == "circle":
            draw.ellipse((x - r, y - r, x + r, y + r), fill=_COLORS[self.color])
        elif self.shape == "square":
            draw.rectangle((x - r, y - r, x + r, y + r), fill=_COLORS[self.color])
        else:
            draw.polygon(((x, y - r), (x - r, y + r), (x + r, y + r)), fill=_COLORS[self.color])
        return np.array(image)


def _choose_scene(rng: np.random.Generator) -> _Scene:
    options = (_SHAPES, list(_COLORS), list(_BACKGROUNDS), list(_MOVES))
    return _Scene(*(names[int(rng.integers(len(names)))] for names in options))
