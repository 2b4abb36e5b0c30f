"""A drawn world for a tiny model: one colored shape that moves over a dark background as its caption says.

Everything that a clip shows follows from its first frame and its caption, so a generated video can be compared with the
real one. The motions in `NEW_MOTIONS` are left out of the base model's training: a LoRA can teach them.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

FPS = 8
SIZE = 48  # short side of a clip in pixels
# Frames, height, width: square, landscape and portrait, each 2 s and 1 s long.
SIZES = tuple((frames, *size) for frames in (17, 9) for size in ((SIZE, SIZE), (SIZE, 64), (64, SIZE)))

COLORS = {
    "red": (225, 50, 50),
    "green": (60, 185, 75),
    "blue": (60, 100, 235),
    "yellow": (240, 220, 60),
    "orange": (245, 140, 40),
    "white": (240, 240, 240),
}
PURPLE = (170, 50, 210)
SHAPES = ("disc", "square", "triangle")
MOTIONS = {
    "left": "moves to the left",
    "right": "moves to the right",
    "up": "moves up",
    "down": "moves down",
    "circle": "moves in a circle",
    "grow": "grows",
    "shrink": "shrinks",
    "still": "stands still",
}
NEW_MOTIONS = {"bounce": "bounces", "swing": "swings from side to side", "purple": "turns purple"}
PHRASES = MOTIONS | NEW_MOTIONS

EDGE = 0.5  # softness of a shape's edge in pixels
DISTANCE = 11.5  # pixels that a shape moves in 2 s
TURN = 6.0  # radius of the circle that a shape moves in
HOP = 10.5  # height of a bounce, and width of a swing to either side
MARGIN = 5.0  # how far from the middle a shape may start


@dataclass(frozen=True)
class Track:
    """Where a shape is in each frame: center x, y and radius, in pixels, each [F]."""

    x: torch.Tensor
    y: torch.Tensor
    radius: torch.Tensor


@dataclass(frozen=True)
class Scene:
    """One shape with its motion, over a linear gradient.

    shape: one of SHAPES. motion: a key of PHRASES. x, y, radius: of the first frame, in pixels. color, background: RGB
    from 0 to 1; background has the two ends of the gradient, angle its direction. rotation: the shape's angle by time
    in units of 2 s.
    """

    shape: str
    color_name: str
    motion: str
    frames: int
    height: int
    width: int
    x: float
    y: float
    radius: float
    color: tuple[float, ...]
    background: tuple[tuple[float, ...], ...]
    angle: float
    rotation: Callable[[torch.Tensor], torch.Tensor] | None = field(default=None, compare=False)

    @property
    def caption(self) -> str:
        """What the clip shows, in the words of its captions."""
        return f"a {self.color_name} {self.shape} {PHRASES[self.motion]}"

    @property
    def time(self) -> torch.Tensor:
        """The time of each frame in units of 2 s, [F]."""
        return torch.arange(self.frames) / (2 * FPS)

    def track(self, motion: str | None = None) -> Track:
        """Return the track of the scene's motion, or of another."""
        motion, time = motion or self.motion, self.time
        x, y, radius = (torch.full((self.frames,), value) for value in (self.x, self.y, self.radius))
        turn = 2 * math.pi * time
        match motion:
            case "left":
                x = x - DISTANCE * time
            case "right":
                x = x + DISTANCE * time
            case "up":
                y = y - DISTANCE * time
            case "down":
                y = y + DISTANCE * time
            case "circle":
                x, y = x + TURN * (1 - torch.cos(turn)), y - TURN * torch.sin(turn)
            case "grow":
                radius = radius * (1 + 0.7 * time)
            case "shrink":
                radius = radius * (1 - 0.5 * time)
            case "bounce":
                y = y - HOP * torch.sin(turn).abs()
            case "swing":
                x = x + HOP * torch.sin(turn)
        return Track(x, y, radius)

    def draw(self, scale: int = 1) -> torch.Tensor:
        """Draw the clip, float32 [F, 3, H, W] from 0 to 1. scale: how many times larger than the scene's size."""
        return self.draw_over(self.draw_background(scale)[None], scale)

    def draw_background(self, scale: int = 1) -> torch.Tensor:
        """Draw the gradient, float32 [3, H, W]."""
        y, x = pixel_centers(self.height, self.width, scale)
        along = (x - self.width / 2) * math.cos(self.angle) + (y - self.height / 2) * math.sin(self.angle)
        share = (along / self.width + 0.5).clamp(0, 1)
        first, second = (torch.tensor(color)[:, None, None] for color in self.background)
        return first * (1 - share) + second * share

    def draw_over(self, frames: torch.Tensor, scale: int = 1) -> torch.Tensor:
        """Draw the shape over frames [F or 1, 3, H, W]."""
        color = torch.tensor(self.color).expand(self.frames, 3)
        if self.motion == "purple":
            share = (1.4 * self.time).clamp(max=1)[:, None]
            color = color * (1 - share) + torch.tensor(PURPLE) / 255 * share
        angle = None if self.rotation is None else self.rotation(self.time)
        cover = cover_of(self.shape, self.track(), self.height, self.width, scale, angle)[:, None]
        return frames * (1 - cover) + color[:, :, None, None] * cover


def pixel_centers(height: int, width: int, scale: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the y and x of each pixel's center, [H, W] each."""
    rows, columns = ((torch.arange(side * scale) + 0.5) / scale for side in (height, width))
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return y, x


def cover_of(
    shape: str, track: Track, height: int, width: int, scale: int = 1, angle: torch.Tensor | None = None
) -> torch.Tensor:
    """How much of each pixel a shape covers, from 0 to 1, [F, H, W]. All shapes of a radius have about the same area.

    The edge is soft, from a signed distance in pixels, so that motion is smooth at any speed. angle: of the shape in
    each frame, in radians, [F].
    """
    y, x = pixel_centers(height, width, scale)
    dx, dy = x - track.x[:, None, None], y - track.y[:, None, None]
    if angle is not None:
        cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
        dx, dy = cos * dx + sin * dy, cos * dy - sin * dx
    radius = track.radius[:, None, None]
    match shape:
        case "disc":
            distance = (dx.square() + dy.square()).sqrt() - radius
        case "square":
            distance = torch.maximum(dx.abs(), dy.abs()) - 0.886 * radius
        case _:  # a triangle that points up, around its centroid
            distance = torch.maximum(0.866 * dx.abs() - 0.5 * dy, dy) - 0.75 * radius
    return torch.sigmoid(-distance / EDGE)


class Numbers:
    """Random numbers from one generator."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def between(self, low: float, high: float) -> float:
        """Return a number."""
        return low + (high - low) * torch.rand((), generator=self.generator).item()

    def vector(self, low: float, high: float) -> torch.Tensor:
        """Return three numbers."""
        return low + (high - low) * torch.rand(3, generator=self.generator)

    def choose(self, options: Iterable[Any]) -> Any:
        """Return one of the options."""
        options = list(options)
        return options[int(torch.randint(len(options), (), generator=self.generator))]


def random_scene(
    numbers: Numbers, size: tuple[int, int, int] = SIZES[0], motions: Iterable[str] = tuple(MOTIONS)
) -> Scene:
    """Choose a scene at random: a shape that starts near the middle, so that only the caption tells where it goes.

    size: frames, height and width.
    """
    frames, height, width = size
    base = numbers.between(0.08, 0.32) + numbers.vector(-0.07, 0.07)
    ends = base, base + numbers.between(-0.1, 0.14) + numbers.vector(-0.04, 0.04)
    color = numbers.choose(COLORS)
    return Scene(
        shape=numbers.choose(SHAPES),
        color_name=color,
        motion=numbers.choose(motions),
        frames=frames,
        height=height,
        width=width,
        x=width / 2 + numbers.between(-MARGIN, MARGIN) * width / SIZE,
        y=height / 2 + numbers.between(-MARGIN, MARGIN) * height / SIZE,
        radius=numbers.between(6, 8),
        color=tuple(channel / 255 for channel in COLORS[color]),
        background=tuple(tuple(end.clamp(0, 1).tolist()) for end in ends),
        angle=numbers.between(0, 2 * math.pi),
    )
