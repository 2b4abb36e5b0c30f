"""Conditions of `cogds sample`: files are read at the model's frame rate, and impossible combinations are refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from cogds.core.condition_modes import MODES, ConditionSettings, condition_frames, pieces_of
from cogds.core.geometry import ClipShape
from cogds.data.video.media import write_video
from cogds.errors import UserError
from cogds.model.pipelines import Conditions
from cogds.videos.conditions import (
    ConditionFiles,
    conditions_of_clip,
    context_latents,
    modes_of,
    read_conditions,
    shown_image,
    untrained_warning,
)
from tests.published_model import PUBLISHED

GEOMETRY = PUBLISHED["CogVideoX1.5-5B-I2V"]
SHAPE, FPS = ClipShape(17, 32, 32), 8.0
FIRST = np.zeros((32, 32, 3), np.uint8)


@pytest.fixture
def folder(tmp_path):
    """A video of 2 s at 16 frames/s whose brightness is 7 x the frame's number, and images."""
    frames = np.stack([np.full((32, 32, 3), 7 * number, np.uint8) for number in range(32)])
    write_video(tmp_path / "clip.mp4", frames, 16)
    for name, level in (("a", 50), ("b", 200)):
        Image.new("RGB", (40, 32), (level,) * 3).save(tmp_path / f"{name}.png")
    return tmp_path


def read(folder, num_latents=2, image=None, **files):
    named = {
        name: [(time, str(folder / file)) for time, file in value] if name == "keyframes"
        else str(folder / value) if name in ("last_image", "video") else value
        for name, value in files.items()
    }  # fmt: skip
    return read_conditions(image, ConditionFiles(**named), num_latents, SHAPE, FPS, GEOMETRY)


@pytest.mark.parametrize("place, expected", [("start", range(22, 32, 2)), ("end", range(0, 10, 2))])
def test_a_video_gives_its_last_or_first_frames_at_the_frame_rate(folder, place, expected):
    video = read(folder, video="clip.mp4", video_at=place).video
    assert video.shape == (5, 32, 32, 3)
    levels = video.mean(axis=(1, 2, 3))
    assert np.abs(levels - [7 * number for number in expected]).max() < 3


def test_images_are_read_at_their_frames(folder):
    conditions = read(folder, image=FIRST, last_image="b.png", keyframes=[(1.0, "a.png")])
    assert conditions.last_image.mean() == 200
    assert {frame: image.mean() for frame, image in conditions.keyframes.items()} == {8: 50}
    assert modes_of(conditions) == ("keyframes",)


def test_a_loop_ends_at_the_first_frame():
    conditions = read_conditions(FIRST, ConditionFiles(loop=True), 2, SHAPE, FPS, GEOMETRY)
    assert conditions.last_image is conditions.image
    assert modes_of(conditions) == ("first_last",)


@pytest.mark.parametrize(
    "files, image, message",
    [
        ({"loop": True, "last_image": "a.png"}, FIRST, "^--loop: --last-image"),
        ({"loop": True, "video": "clip.mp4"}, None, "^--loop: --video"),
        ({"loop": True, "keyframes": [(1, "a.png")]}, None, "^--loop: there is no first frame"),
        ({"video": "clip.mp4"}, FIRST, "^--video: --image"),
        ({"video": "clip.mp4", "video_at": "end", "last_image": "a.png"}, FIRST, "^--video: --last-image"),
        ({"segments": 2, "last_image": "a.png"}, FIRST, "^--segments: --last-image"),
        ({"segments": 2, "loop": True}, FIRST, "^--segments: --loop"),
        ({"segments": 2, "video": "clip.mp4", "video_at": "end"}, None, "^--segments: --video-at end"),
        ({"context": "3"}, FIRST, "^--context: there is no video"),
        ({"keyframes": [(1, "a.png"), (1.01, "b.png")]}, None, "^--keyframe: 1.01 s is given twice"),
        ({"keyframes": [(0, "a.png")]}, FIRST, "^--keyframe: 0 s is given twice"),
        ({"keyframes": [(1.9, "a.png")], "last_image": "b.png"}, None, "^--last-image: sets the same .* --keyframe"),
        ({"keyframes": [(0.25, "a.png")], "video": "clip.mp4"}, None, "^--keyframe: sets the same .* --context"),
        ({"keyframes": [(3, "a.png")]}, None, "^--keyframe: 3 s is after the last frame, which is at 2 s"),
        ({"keyframes": [(1, "none.png")]}, None, "^--keyframe: .*none.png"),
        ({"last_image": "none.png"}, FIRST, "^--last-image: .*none.png"),
        ({"video": "none.mp4"}, None, "^--video: .*none.mp4"),
    ],
)
def test_impossible_conditions_are_refused(folder, files, image, message):
    with pytest.raises(UserError, match=message):
        read(folder, image=image, **files)


@pytest.mark.parametrize("files", [{"video": "clip.mp4"}, {"segments": 2, "context": "5"}])
def test_a_context_that_leaves_nothing_to_generate_is_refused(folder, files):
    flag = "--context" if "video" in files else "--segments"
    write_video(folder / "clip.mp4", np.zeros((64, 32, 32, 3), np.uint8), 8)
    with pytest.raises(UserError, match=f"^{flag}: .*leaves none to generate"):
        read(folder, 5, **files)
    with pytest.raises(UserError, match=r"^--video: .* has 64 frames at 8 frames/s, but 69 are needed"):
        read(folder, 18, video="clip.mp4")


@pytest.mark.parametrize("files", [{"video": "clip.mp4"}, {"segments": 2}])
def test_an_image_is_not_continued(folder, files):
    write_video(folder / "clip.mp4", np.zeros((64, 32, 32, 3), np.uint8), 8)
    paths = {name: str(folder / file) if name == "video" else file for name, file in files.items()}
    with pytest.raises(UserError, match=r"^--(video|segments): the size 1x32x32 is that of an image"):
        read_conditions(None, ConditionFiles(**paths), 2, ClipShape(1, 32, 32), FPS, GEOMETRY)


def test_the_length_of_the_context():
    assert context_latents(None, None, FPS, GEOMETRY) == 2
    assert context_latents(None, 4, FPS, GEOMETRY) == 4
    assert context_latents("3", 4, FPS, GEOMETRY) == 3
    assert context_latents("1.2s", 4, FPS, GEOMETRY) == 3  # 10 frames: 9 and a rest
    for text, message in (("1", "1 latent frame. Use at least 2"), ("0.1s", "Use at least 2"), ("long", "'long' is")):
        with pytest.raises(UserError, match=f"^--context: .*{message}"):
            context_latents(text, None, FPS, GEOMETRY)


def test_untrained_modes_are_named():
    video = np.stack([FIRST] * 5)
    assert modes_of(Conditions()) == ("none",)
    assert modes_of(Conditions(FIRST)) == ("first",)
    assert modes_of(Conditions(last_image=FIRST)) == ("last",)
    assert modes_of(Conditions(video=video)) == ("prefix",)
    assert modes_of(Conditions(FIRST, video=video, video_at="end")) == ("first", "suffix")
    assert untrained_warning(("prefix",), {"first": 0.5, "prefix": 0.5}, "the LoRA") is None
    assert "prefix was not trained: the model was trained with first." in untrained_warning(
        ("prefix",), {"first": 1.0}, "the model"
    )
    both = untrained_warning(("first", "suffix"), {"first": 0.5, "suffix": 0.5}, "the LoRA")
    assert "first and suffix together were not trained" in both


@pytest.mark.parametrize("mode", MODES)
def test_the_conditions_of_a_clip_are_those_of_its_mode(mode):
    settings = ConditionSettings(2, (0, 6, 16))
    video = torch.randint(0, 256, (17, 3, 8, 8), dtype=torch.uint8)
    numbers = condition_frames(MODES, 17, GEOMETRY, settings)
    encoded = {"first_frame": video[0], "condition_frames": video[list(numbers)]}
    conditions = conditions_of_clip(mode, pieces_of(mode, 17, GEOMETRY, settings), encoded, numbers)
    assert modes_of(conditions) == (mode,)
    pixels = video.permute(0, 2, 3, 1).numpy()
    expected = {
        "first": [pixels[0]], "last": [pixels[16]], "first_last": [pixels[0], pixels[16]], "prefix": [pixels[:5]],
        "suffix": [pixels[12:]], "keyframes": [pixels[0], pixels[6], pixels[16]], "none": [],
    }[mode]  # fmt: skip
    assert all(np.array_equal(a, b) for a, b in zip(conditions.arrays(), expected, strict=True))
    assert list(conditions.keyframes) == ([0, 6, 16] if mode == "keyframes" else [])
    assert conditions.video_at == ("end" if mode == "suffix" else "start")
    assert (shown_image(conditions) is None) == (mode == "none")
