"""The choice of a file's video stream."""

import io
from pathlib import Path

import mutagen.mp4
import numpy as np
import pytest
from PIL import Image

from cogds.core.geometry import ClipShape
from cogds.data.video.media import DecodeError, probe_video, read_clip
from tests.data.video import ffmpeg
from tests.data.video.pictures import numbered, numbers

H264 = ("-c:v", "libx264", "-pix_fmt", "yuv420p", "-bf", "0")


def jpeg() -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.full((200, 200, 3), 90, np.uint8)).save(data, "JPEG")
    return data.getvalue()


def test_cover_art_in_front_of_the_video_is_not_a_frame(tmp_path: Path) -> None:
    bare = ("-map_metadata", "-1", "-fflags", "+bitexact", "-flags:v", "+bitexact")
    path = ffmpeg.make(tmp_path / "a.mp4", numbered(30), 25, *H264, *bare)
    # Without an `udta` box at the end, the picture is put in front, and FFmpeg lists it as the first stream.
    path.write_bytes(path.read_bytes().replace(b"udta", b"free"))
    tags = mutagen.mp4.MP4(path)
    tags["covr"] = [mutagen.mp4.MP4Cover(jpeg(), imageformat=mutagen.mp4.MP4Cover.FORMAT_JPEG)]
    tags.save()
    assert "Stream #0:0" in ffmpeg.run("-i", path, "-map", "0:v:0", "-f", "null", "-").stderr.decode()
    assert (probe_video(path).num_frames, probe_video(path).width) == (30, 96)
    assert numbers(read_clip(path, ClipShape(30, 64, 96), 25)) == list(range(30))


def test_a_file_with_only_cover_art_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg())
    path = tmp_path / "a.m4a"
    sound = ("-f", "lavfi", "-i", "sine=duration=1", "-i", tmp_path / "a.jpg", "-map", "0", "-map", "1")
    ffmpeg.run(*sound, "-c:v", "copy", "-disposition:v", "attached_pic", path)
    with pytest.raises(DecodeError, match="only a cover picture"):
        probe_video(path)


@pytest.mark.parametrize("suffix, is_default", [
    ("mkv", True), ("mp4", True), ("mov", True), ("mkv", False), ("ts", False),
])  # fmt: skip
def test_of_two_videos_the_default_or_larger_is_read(tmp_path: Path, suffix: str, is_default: bool) -> None:
    proxy = ffmpeg.make(tmp_path / "proxy.mp4", 255 - numbered(30, 32, 48), 25, *H264)
    film = ffmpeg.make(tmp_path / "film.mp4", numbered(30), 25, *H264)
    path = tmp_path / f"a.{suffix}"
    marks = ("-disposition:v:0", "0", "-disposition:v:1", "default" if is_default else "0")
    ffmpeg.run("-i", proxy, "-i", film, "-map", "0:v", "-map", "1:v", "-c", "copy", *marks, path)
    assert probe_video(path).width == 96
    assert numbers(read_clip(path, ClipShape(30, 64, 96), 25)) == list(range(30))
