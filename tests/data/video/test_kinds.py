"""Every suffix that counts as a video or an image can be read."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cogds.core.geometry import ClipShape
from cogds.data.video.kinds import IMAGE_SUFFIXES, VIDEO_SUFFIXES, kind_of
from cogds.data.video.media import probe_video, read_clip, read_image
from cogds.data.video.probe_task import ProbeTask, probe_file
from tests.data.video import ffmpeg
from tests.data.video.pictures import numbered, numbers, psnr

MPEG2 = ("-c:v", "mpeg2video", "-q:v", "2", "-pix_fmt", "yuv420p")
# What FFmpeg does not choose by itself for a suffix.
OPTIONS: dict[str, Sequence[str]] = {
    ".3g2": ("-c:v", "mpeg4", "-q:v", "2"),
    ".3gp": ("-c:v", "h263", "-s", "176x144"),
    ".divx": ("-c:v", "mpeg4", "-q:v", "2", "-f", "avi"),
    ".dv": ("-c:v", "dvvideo", "-s", "720x576", "-pix_fmt", "yuv420p"),
    ".f4v": ("-f", "mp4", "-pix_fmt", "yuv420p"),
    ".gif": (),
    ".apng": ("-plays", "0"),
    ".m2t": (*MPEG2, "-f", "mpegts"),
    ".mpeg": MPEG2,
    ".mpg": MPEG2,
    ".mts": ("-c:v", "libx264", "-pix_fmt", "yuv420p", "-f", "mpegts"),
    ".mxf": MPEG2,
    ".ogv": ("-c:v", "libtheora", "-q:v", "9"),
    ".qt": ("-f", "mov", "-pix_fmt", "yuv420p"),
    ".vob": MPEG2,
    ".wmv": ("-c:v", "wmv2", "-q:v", "2"),
}  # fmt: skip


@pytest.mark.parametrize("suffix", sorted(VIDEO_SUFFIXES))
def test_video_suffixes(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix.upper()}"
    made = ffmpeg.make(tmp_path / f"a{suffix}", numbered(30), 25, *OPTIONS.get(suffix, ("-pix_fmt", "yuv420p")))
    made.rename(path)
    assert kind_of(str(path)) == "video"
    info = probe_video(path)
    assert (info.num_frames, info.fps) == (30, 25)
    clip = read_clip(path, ClipShape(30, 64, 96), 25)
    assert numbers(clip) == list(range(30))
    assert np.array_equal(read_clip(path, ClipShape(9, 64, 96), 25, 0.8), clip[20:29])


@pytest.mark.parametrize("suffix", sorted(IMAGE_SUFFIXES))
def test_image_suffixes(tmp_path: Path, suffix: str) -> None:
    import pillow_heif

    pillow_heif.register_heif_opener()
    formats = {"jfif": "JPEG", "jpe": "JPEG", "jpg": "JPEG", "tif": "TIFF", "heic": "HEIF", "hif": "HEIF"}
    path, pixels = tmp_path / f"a{suffix.upper()}", numbered(6)[5]
    Image.fromarray(pixels).save(path, formats.get(suffix[1:], suffix[1:].upper()), quality=95)
    assert kind_of(str(path)) == "image"
    assert probe_file(ProbeTask("image", str(path))).num_frames == 1
    assert psnr(read_image(path, 64, 96), pixels) > 33


@pytest.mark.parametrize("name", ["a", "a.txt", "a.mp4.part", "mp4", ".mp4", "a.json"])
def test_other_suffixes_are_no_kind(name: str) -> None:
    assert kind_of(name) is None
