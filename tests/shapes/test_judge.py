"""The judge names what it sees, also in blurred and noisy videos, and measures errors in pixels."""

import dataclasses
import math

import pytest
import torch

from cogds.shapes.clips import unseen_scenes
from cogds.shapes.generation import judge_all
from cogds.shapes.judge import Estimate, judge, summarize
from cogds.shapes.world import PHRASES, SIZES, Numbers, random_scene

SCENES = unseen_scenes(66, SIZES, list(PHRASES))


def blurred(video, noise=0.05):
    soft = torch.nn.functional.avg_pool2d(video, 3, 1, 1, count_include_pad=False)
    return (soft + noise * torch.randn(video.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)


def test_every_size_and_motion_is_among_the_scenes():
    assert {(scene.frames, scene.height, scene.width) for scene in SCENES} == set(SIZES)
    assert {scene.motion for scene in SCENES} == set(PHRASES)


def test_real_clips_are_right_in_everything():
    for judgement in judge_all([scene.draw() for scene in SCENES], SCENES):
        seen = judgement.values
        assert (seen["motion_seen"], seen["shape_seen"], seen["color_seen"]) == (1, 1, 1), judgement
        assert (seen["path_error"], seen["color_error"]) == (0, 0)
        assert seen["clip_psnr"] > 90


def test_blurred_and_noisy_clips_are_still_seen():
    summary = summarize(judge_all([blurred(scene.draw()) for scene in SCENES], SCENES))
    assert summary["motion_seen"].mean == 1
    assert summary["color_seen"].mean == 1
    assert summary["shape_seen"].mean > 0.95
    assert summary["path_error"].mean < 0.3


@pytest.mark.parametrize("shown", PHRASES)
def test_another_motion_than_the_captions_is_named(shown):
    scene = random_scene(Numbers(2), SIZES[0], ["left" if shown != "left" else "right"])
    video = dataclasses.replace(scene, motion=shown).draw()
    judgement = judge(blurred(video), scene)
    assert judgement.motion == shown
    assert judgement.values["motion_seen"] == 0


def test_the_path_error_is_the_distance_in_pixels():
    scene = random_scene(Numbers(3), SIZES[0], ["still"])
    moved = dataclasses.replace(scene, x=scene.x + 3, y=scene.y - 4)
    assert judge(moved.draw(), scene).path_error == pytest.approx(5, abs=0.1)


def test_another_shape_and_color_are_named():
    scene = dataclasses.replace(random_scene(Numbers(4), SIZES[0], ["still"]), shape="disc", color_name="red")
    other = dataclasses.replace(scene, shape="triangle", color=(60 / 255, 100 / 255, 235 / 255))
    judgement = judge(blurred(other.draw()), scene)
    assert (judgement.shape, judgement.color_name) == ("triangle", "blue")
    assert judgement.color_error > 0.5


def test_a_video_without_a_shape_is_judged_too():
    scene = random_scene(Numbers(5))
    judgement = judge(scene.draw_background()[None].expand(scene.frames, -1, -1, -1), scene)
    assert all(map(math.isfinite, judgement.values.values()))


def test_an_estimate_has_the_standard_error_of_the_mean():
    assert Estimate.of([1.0, 2.0, 3.0, 4.0]) == Estimate(2.5, pytest.approx(1.2909944 / 2))
