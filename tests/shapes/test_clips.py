"""The demo's clips: captioned videos of one new motion, larger than what is trained."""

import torch

from cogds.core.geometry import ClipShape
from cogds.data.video.media import probe_video, read_clip
from cogds.shapes.clips import DEMO_CLIPS, DEMO_MOTION, SCALE, demo_scenes, draw_demo_clips, unseen_scenes
from cogds.shapes.judge import psnr
from cogds.shapes.world import FPS, NEW_MOTIONS, PHRASES, SIZES


def test_the_demos_clips_show_a_new_motion_in_several_sizes(tmp_path):
    draw_demo_clips(tmp_path / "clips")
    videos = sorted((tmp_path / "clips").glob("*.mp4"))
    assert len(videos) == sum(DEMO_CLIPS) == 12
    assert DEMO_MOTION in NEW_MOTIONS
    sizes = set()
    for video, scene in zip(videos, demo_scenes()):
        size = (scene.frames, scene.height, scene.width)
        assert video.with_suffix(".txt").read_text() == scene.caption + "\n"
        info = probe_video(video)
        assert (info.width, info.height, info.fps) == (SCALE * scene.width, SCALE * scene.height, FPS)
        frames = torch.from_numpy(read_clip(video, ClipShape(*size), FPS)).permute(0, 3, 1, 2) / 255
        assert psnr(frames, scene.draw()) > 35
        sizes.add(size)
    assert len(sizes) == 4
    before = {video: video.stat().st_mtime_ns for video in videos}
    draw_demo_clips(tmp_path / "clips")
    assert {video: video.stat().st_mtime_ns for video in videos} == before


def test_unseen_scenes_take_sizes_and_motions_in_turn():
    scenes = unseen_scenes(24, SIZES[:3], ["up", "down"])
    assert [(scene.frames, scene.height, scene.width) for scene in scenes[:3]] == list(SIZES[:3])
    assert [scene.motion for scene in scenes] == [*["up"] * 3, *["down"] * 3] * 4
    assert {scene.motion for scene in unseen_scenes(11, SIZES[:1], list(PHRASES))} == set(PHRASES)
