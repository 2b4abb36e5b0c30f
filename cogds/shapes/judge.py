"""Judges generated videos of the shapes world: does the shape move as the caption says, and does it look right?

The background is known, so the shape is what differs from it. The judge follows its center, area and color, and names
the motion, shape and color that fit best. Paths and colors are compared with those that it sees in the real clip, so
its own errors cancel.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from cogds.shapes.world import COLORS, PHRASES, PURPLE, SHAPES, Scene, Track, cover_of, pixel_centers

PEAK_PIXELS = 15  # the strongest differences, which surely belong to the shape
MIN_CONTRAST = 0.3  # RGB distance below which a difference is noise, not a shape
RADIUS_WEIGHT = 1.5  # of an error of one pixel in radius, beside one pixel in position
COLOR_WEIGHT = 10.0  # of an RGB distance of 1, beside one pixel in position
SHAPE_RADII = (0.85, 0.925, 1.0, 1.075, 1.15)
SHAPE_BLURS = (0.7, 1.2, 1.8)  # standard deviations of Gaussian blurs [px], because generated shapes are blurred


@dataclass(frozen=True)
class Sighting:
    """What was seen of a shape: its track, its color in each frame [F, 3], and how much it covers [F, H, W]."""

    track: Track
    color: torch.Tensor
    cover: torch.Tensor


def follow(video: torch.Tensor, scene: Scene) -> Sighting:
    """Follow the shape through a video, float [F, 3, H, W] from 0 to 1."""
    difference = (video.float() - scene.draw_background()).norm(dim=1)
    peak = difference.flatten(1).topk(PEAK_PIXELS, dim=1).values.mean(1).clamp(min=MIN_CONTRAST)[:, None, None]
    cover = ramp(difference / peak)
    area = cover.sum((1, 2)) + 1e-6
    y, x = pixel_centers(scene.height, scene.width)
    core = (difference / peak > 0.7).float()[:, None]
    color = (video.float() * core).sum((2, 3)) / (core.sum((2, 3)) + 1e-6)
    track = Track((cover * x).sum((1, 2)) / area, (cover * y).sum((1, 2)) / area, (area / math.pi).sqrt())
    return Sighting(track, color, cover)


def ramp(strength: torch.Tensor) -> torch.Tensor:
    """Drop faint traces and count soft edges by half. strength: of the difference to the background, 1 at its peak."""
    return (2 * (strength - 0.25)).clamp(0, 1)


@dataclass(frozen=True)
class Judgement:
    """One generated clip beside the real one.

    motion, shape, color_name: what is seen. path_error: mean distance between the seen positions of both clips in
    pixels. first_frame_psnr, clip_psnr: in dB. color_error: RGB distance at the last frame, 0 to 1.73.
    """

    scene: Scene
    motion: str
    shape: str
    color_name: str
    path_error: float
    first_frame_psnr: float
    clip_psnr: float
    color_error: float

    @property
    def values(self) -> dict[str, float]:
        """Return every figure as a number. Those named `..._seen` are 1 if what was asked for is seen."""
        return {
            "motion_seen": float(self.motion == self.scene.motion),
            "shape_seen": float(self.shape == self.scene.shape),
            "color_seen": float(self.color_name == self.scene.color_name),
            "path_error": self.path_error,
            "first_frame_psnr": self.first_frame_psnr,
            "clip_psnr": self.clip_psnr,
            "color_error": self.color_error,
        }


def judge(video: torch.Tensor, scene: Scene) -> Judgement:
    """Judge a generated clip, float [F, 3, H, W] from 0 to 1, of a scene's first frame and caption."""
    real = scene.draw()
    seen, expected = follow(video, scene), follow(real, scene)
    distance = _distance(seen.track, expected.track)
    last = seen.color[-1]
    return Judgement(
        scene=scene,
        motion=name_motion(seen, scene),
        shape=name_shape(seen),
        color_name=min(COLORS, key=lambda name: (seen.color[0] - torch.tensor(COLORS[name]) / 255).norm().item()),
        path_error=distance.mean().item(),
        first_frame_psnr=psnr(video[0], real[0]),
        clip_psnr=psnr(video, real),
        color_error=(last - expected.color[-1]).norm().item(),
    )


def name_motion(seen: Sighting, scene: Scene) -> str:
    """Return the key of PHRASES whose track and color fit best, from the start as seen."""
    errors = {}
    for motion in PHRASES:
        track = scene.track(motion)
        moved = Track(
            seen.track.x - seen.track.x[0] + track.x[0], seen.track.y - seen.track.y[0] + track.y[0], track.radius
        )
        radius = seen.track.radius * scene.radius / seen.track.radius[0].clamp(min=1)
        color = PURPLE if motion == "purple" else COLORS[scene.color_name]
        errors[motion] = (
            _distance(moved, track).mean()
            + RADIUS_WEIGHT * (radius - track.radius).abs().mean()
            + COLOR_WEIGHT * (seen.color[-1] - torch.tensor(color) / 255).norm()
        ).item()
    return min(errors, key=errors.__getitem__)


def name_shape(seen: Sighting) -> str:
    """Return the shape that, blurred, covers the same pixels as what was seen. Larger shapes count more."""
    size = seen.cover.shape[1:]
    weights = seen.track.radius.square() / seen.track.radius.square().sum()
    errors = {}
    for shape in SHAPES:
        for factor in SHAPE_RADII:
            cover = cover_of(shape, Track(seen.track.x, seen.track.y, seen.track.radius * factor), *size)
            for sigma in SHAPE_BLURS:
                soft = blur(cover, sigma)
                expected = ramp(soft / soft.amax((1, 2), keepdim=True).clamp(min=MIN_CONTRAST))
                error = ((expected - seen.cover).square().mean((1, 2)) * weights).sum()
                errors[shape, factor, sigma] = error.item()
    return min(errors, key=errors.__getitem__)[0]


def blur(pictures: torch.Tensor, sigma: float) -> torch.Tensor:
    """Blur pictures [F, H, W] with a Gaussian."""
    offsets = torch.arange(-4, 5).float()
    kernel = torch.exp(-offsets.square() / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    pictures = torch.nn.functional.conv2d(pictures[:, None], kernel[None, None, None], padding=(0, 4))
    return torch.nn.functional.conv2d(pictures, kernel[None, None, :, None], padding=(4, 0))[:, 0]


def _distance(first: Track, second: Track) -> torch.Tensor:
    return torch.hypot(first.x - second.x, first.y - second.y)


def psnr(first: torch.Tensor, second: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures from 0 to 1."""
    return -10 * math.log10((first.float() - second).square().mean().item() + 1e-10)


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error."""

    mean: float
    error: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        numbers = torch.tensor(values, dtype=torch.float64)
        error = numbers.std().item() / math.sqrt(len(numbers)) if len(numbers) > 1 else math.nan
        return cls(numbers.mean().item(), error)


def summarize(judgements: Sequence[Judgement]) -> Mapping[str, Estimate]:
    """Return each figure's mean over clips and its standard error."""
    columns = [judgement.values for judgement in judgements]
    return {name: Estimate.of([column[name] for column in columns]) for name in columns[0]}
