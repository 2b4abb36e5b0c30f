"""Scenes of films whose frame numbers are drawn into the pixels."""

import itertools
import math

import numpy as np
import pytest
from PIL import Image

from cogds.core.geometry import ClipShape
from cogds.data.video.media import DecodeError, num_frames_at, probe_video, read_clip
from cogds.prepare.find_scenes import find_scenes
from cogds.prepare.scene import CutOptions, Source
from tests.data.video.clips import encode
from tests.prepare.films import HEIGHT, WIDTH, ffmpeg, read_numbers, scene, write_film

ONLY_CUTS = CutOptions(threshold=3.0, min_s=0.1, max_s=math.inf, scores=())


def trained_numbers(path, part, fps):
    """Numbers of the frames in the longest clip of a scene, as training reads it."""
    num = num_frames_at(probe_video(path), fps, part.start_s, part.end_s)
    return read_numbers(read_clip(path, ClipShape(num, HEIGHT, WIDTH), fps, part.start_s, part.end_s))


def irregular_ms(num_frames):
    """Times of a phone's video: frames of 33, 34, 50 and 17 ms."""
    return [0, *itertools.accumulate(itertools.islice(itertools.cycle((33, 34, 50, 17)), num_frames - 1))]


@pytest.mark.parametrize("times", ["constant", "variable", "late start", "edit list", "transport stream"])
def test_no_clip_of_a_scene_holds_a_frame_of_another(tmp_path, times):
    lengths, first_number = [30, 15, 20], 0
    pts_ms = irregular_ms(65) if times == "variable" else None
    if times == "late start":
        pts_ms = [1000 + 40 * k for k in range(65)]
    path = write_film(tmp_path / "film.mp4", lengths, pts_ms)
    if times == "edit list":  # a trimmed copy, in which the frames before 0.4 s are hidden
        trimmed, first_number = tmp_path / "trimmed.mp4", 10
        ffmpeg("-ss", "0.4", "-i", path, "-c", "copy", trimmed)
        path = trimmed
    if times == "transport stream":
        stream = tmp_path / "film.mkv"
        ffmpeg("-i", path, "-c", "copy", "-f", "mpegts", stream)
        path = stream
    result = find_scenes(Source(str(path), "video"), ONLY_CUTS)
    assert len(result.scenes) == 3
    assert result.scenes[0].start_s == 0.0
    edges = [0, 30, 45, 65]
    for part, first, end in zip(result.scenes, edges, edges[1:]):
        for fps in (8, 16, 29.97):
            numbers = trained_numbers(path, part, fps)
            assert numbers[0] == max(first, first_number)
            assert numbers == sorted(numbers)
            assert numbers[-1] < end
        assert trained_numbers(path, part, 1000.0)[-1] == end - 1  # and none of its own is lost


def test_scenes_are_adjacent_and_end_with_the_file(tmp_path):
    path = write_film(tmp_path / "film.mp4", [30, 25])
    first, second = find_scenes(Source(str(path), "video"), ONLY_CUTS).scenes
    assert (first.start_s, first.end_s, second.start_s, second.end_s) == (0.0, 1.2, 1.2, 2.2)
    assert (first.width, first.height) == (WIDTH, HEIGHT)
    assert first.fps == pytest.approx(25.0)


def test_cuts_at_the_ends_are_found_and_their_short_scenes_left_out(tmp_path):
    path = write_film(tmp_path / "film.mp4", [1, 30, 2])
    result = find_scenes(Source(str(path), "video"), ONLY_CUTS)
    assert [(part.start_s, part.end_s) for part in result.scenes] == [(0.04, 1.24)]
    assert result.num_short == 2


def test_a_range_is_cut_by_itself(tmp_path):
    path = write_film(tmp_path / "film.mp4", [30, 25, 40])
    result = find_scenes(Source(str(path), "video", start_s=0.5, end_s=2.4), ONLY_CUTS)
    assert [part.end_s for part in result.scenes] == [1.2, 2.2, 2.4]
    assert trained_numbers(path, result.scenes[0], 25)[0] == 12  # displayed at 0.5 s
    assert trained_numbers(path, result.scenes[-1], 25) == [55, 56, 57, 58, 59]
    assert result.duration_s == pytest.approx(1.92)


def test_long_scenes_are_split_evenly_and_short_ones_left_out(tmp_path):
    path = write_film(tmp_path / "film.mp4", [50, 20, 30])
    options = CutOptions(threshold=3.0, min_s=0.65, max_s=1.0, scores=())
    scenes = find_scenes(Source(str(path), "video"), options).scenes
    # 2 s become two parts, the second is 0.8 s, and 1.2 s become two parts of 0.6 s, which are too short.
    assert [(part.start_s, part.end_s) for part in scenes] == [(0.0, 1.0), (1.0, 2.0), (2.0, 2.8)]


def test_without_cuts_a_file_is_one_scene(tmp_path):
    path = write_film(tmp_path / "film.mp4", [30, 25])
    options = CutOptions(threshold=None, min_s=0.1, max_s=math.inf, scores=())
    assert [part.end_s for part in find_scenes(Source(str(path), "video"), options).scenes] == [2.2]


def test_of_a_damaged_film_the_scenes_before_the_damage_are_used(tmp_path):
    path = write_film(tmp_path / "film.mp4", [30, 25, 40])
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat")
    middle = start + (len(data) - start) * 6 // 10
    data[middle : middle + 400] = bytes(400)
    path.write_bytes(data)
    result = find_scenes(Source(str(path), "video"), ONLY_CUTS)
    assert [part.end_s for part in result.scenes] in ([1.2], [1.2, 2.2])
    assert "damaged" in result.reason or "cannot be decoded" in result.reason or "fails" in result.reason
    with pytest.raises(DecodeError):
        read_clip(path, ClipShape(95, HEIGHT, WIDTH), 25)  # the film is damaged indeed


@pytest.mark.slow
def test_the_cuts_of_a_real_film(real_clips):
    # Hard cuts that a person sees in this film, and no others.
    result = find_scenes(Source(str(real_clips / "bikes.mp4"), "video"), ONLY_CUTS)
    assert [round(part.start_s * 25) for part in result.scenes] == [0, 30, 76, 137, 187, 242]
    for name in ("bigbuckbunny.mp4", "carphone_pristine.mp4"):
        assert len(find_scenes(Source(str(real_clips / name), "video"), ONLY_CUTS).scenes) == 1


def test_scores_are_those_of_the_scene(tmp_path):
    path = encode(tmp_path / "film.mp4", np.concatenate([scene(1, 25, speed=0.5), scene(2, 25, speed=1.5)]))
    options = CutOptions(threshold=3.0, min_s=0.1, max_s=math.inf, scores=("motion", "sharpness", "duplicates"))
    whole = find_scenes(Source(str(path), "video"), options).scenes
    for scored, start_s, speed in zip(whole, (0.0, 1.0), (0.5, 1.5)):
        part = find_scenes(Source(str(path), "video", start_s, start_s + 1.0), options).scenes[0]
        assert scored.motion == part.motion == pytest.approx(speed * 25 / WIDTH, rel=0.1)
        assert (scored.sharpness, scored.hashes) == (part.sharpness, part.hashes)
    assert whole[0].hashes != whole[1].hashes


def test_scores_that_are_not_asked_for_are_not_computed(tmp_path):
    path = write_film(tmp_path / "film.mp4", [30])
    (only,) = find_scenes(Source(str(path), "video"), ONLY_CUTS).scenes
    assert (only.motion, only.sharpness, only.text_share, only.hashes) == (None, None, None, None)


def test_an_image_is_one_scene(tmp_path):
    Image.fromarray(scene(1, 1)[0]).save(tmp_path / "a.png")
    options = CutOptions(threshold=3.0, min_s=9.0, max_s=math.inf, scores=("motion", "sharpness", "duplicates"))
    (only,) = find_scenes(Source(str(tmp_path / "a.png"), "image"), options).scenes
    assert (only.start_s, only.end_s, only.motion) == (None, None, None)
    assert (only.width, only.height) == (WIDTH, HEIGHT)
    assert only.sharpness > 0
