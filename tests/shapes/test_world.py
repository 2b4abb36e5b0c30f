"""The drawn world: shapes where their track says, of the same area, in the colors of their captions."""

import dataclasses
import math

import pytest
import torch

from cogds.shapes.world import (
    COLORS,
    MOTIONS,
    NEW_MOTIONS,
    PHRASES,
    PURPLE,
    SHAPES,
    SIZES,
    Numbers,
    Track,
    cover_of,
    random_scene,
)


def scene_of(motion, size=SIZES[0], seed=0):
    return random_scene(Numbers(seed), size, [motion])


@pytest.mark.parametrize("size", SIZES)
def test_a_clip_has_the_size_and_the_caption_of_its_scene(size):
    scene = random_scene(Numbers(1), size, PHRASES)
    assert scene.draw().shape == (size[0], 3, *size[1:])
    assert scene.caption.split()[1:3] == [scene.color_name, scene.shape]
    assert scene.caption.endswith(PHRASES[scene.motion])


def test_the_same_numbers_draw_the_same_clip():
    assert torch.equal(scene_of("circle", seed=3).draw(), scene_of("circle", seed=3).draw())
    assert not torch.equal(scene_of("circle", seed=3).draw(), scene_of("circle", seed=4).draw())


@pytest.mark.parametrize("shape", SHAPES)
def test_the_center_of_what_is_drawn_is_on_the_track_and_its_area_is_that_of_a_disc(shape):
    track = Track(*(torch.tensor([value]) for value in (20.3, 26.1, 7.0)))
    cover = cover_of(shape, track, 48, 48)[0]
    y, x = torch.meshgrid(torch.arange(48) + 0.5, torch.arange(48) + 0.5, indexing="ij")
    area = cover.sum()
    assert (cover * x).sum() / area == pytest.approx(20.3, abs=0.1)
    assert (cover * y).sum() / area == pytest.approx(26.1, abs=0.1)
    assert area == pytest.approx(math.pi * 7**2, rel=0.1)


@pytest.mark.parametrize("motion", [*MOTIONS, *NEW_MOTIONS])
def test_a_short_clip_is_the_first_half_of_a_long_one(motion):
    long = scene_of(motion, SIZES[0])
    short = dataclasses.replace(long, frames=9)
    assert torch.equal(short.draw(), long.draw()[:9])


def test_a_shape_that_turns_purple_keeps_its_place():
    scene = scene_of("purple")
    color = scene.draw()[-1, :, int(scene.y), int(scene.x)]
    torch.testing.assert_close(color, torch.tensor(PURPLE) / 255, atol=0.02, rtol=0)
    assert torch.equal(scene.track().x, scene.track("still").x)


def test_a_larger_drawing_shows_the_same_scene():
    scene = scene_of("up")
    small = torch.nn.functional.interpolate(scene.draw(4), scale_factor=0.25, mode="bicubic", antialias=True)
    assert (small - scene.draw()).square().mean() < 1e-5


def test_every_shape_stays_in_the_picture():
    for motion in PHRASES:
        for seed in range(20):
            track = scene_of(motion, seed=seed).track()
            assert ((track.x > 0) & (track.x < 48) & (track.y > 0) & (track.y < 48)).all()


def test_colors_are_far_apart():
    colors = [torch.tensor(color) / 255 for color in (*COLORS.values(), PURPLE)]
    assert min((a - b).norm() for n, a in enumerate(colors) for b in colors[:n]) > 0.25


@pytest.mark.parametrize(
    "motion, side", [("left", (-1, 0)), ("right", (1, 0)), ("up", (0, -1)), ("down", (0, 1)), ("still", (0, 0))]
)
def test_captions_name_the_direction_on_the_screen(motion, side):
    track = scene_of(motion).track()
    moved = [torch.sign((end[-1] - end[0]).round()).item() for end in (track.x, track.y)]
    assert tuple(moved) == side
    bounce = scene_of("bounce").track()
    assert bounce.y.max() == bounce.y[0]  # upwards
    assert scene_of("grow").track().radius.diff().min() > 0 > scene_of("shrink").track().radius.diff().max()
