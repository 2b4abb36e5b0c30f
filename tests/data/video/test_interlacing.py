"""Interlaced clips. FFmpeg's program makes them, and deinterlaces them with the same filter."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from cogds.core.geometry import ClipShape
from cogds.data.video.media import DecodeError, probe_video, read_clip
from tests.data.video import ffmpeg
from tests.data.video.pictures import covering, psnr

MARKED = ("-flags", "+ildct+ilme")
LOSSLESS = ("-c:v", "libx264", "-qp", "0", "-pix_fmt", "yuv420p")


def moving(num_frames: int, height: int = 144, width: int = 240, step: int = 4) -> np.ndarray:
    """A smooth gray texture that moves to the left. Gray, since the programs differ in the position of chroma."""
    rng = np.random.default_rng(0)
    small = rng.integers(20, 236, (height // 24 + 2, (width + step * num_frames) // 24 + 2, 1)).repeat(3, 2)
    picture = covering(small, height, width + step * num_frames)
    frames = [picture[:, step * k : step * k + width] for k in range(num_frames)]
    return np.stack(frames).round().astype(np.uint8)


@pytest.mark.parametrize("shape", [ClipShape(5, 144, 240), ClipShape(5, 96, 160), ClipShape(5, 192, 240)])
@pytest.mark.parametrize("step", [0, 4])
def test_progressive_pictures_that_are_marked_interlaced_are_scaled_whole(
    tmp_path: Path, shape: ClipShape, step: int
) -> None:
    frames = moving(20, step=step)
    plain = ffmpeg.make(tmp_path / "plain.mp4", frames, 25, *LOSSLESS)
    marked = ffmpeg.make(tmp_path / "a.mp4", frames, 25, "-vf", "setfield=tff", *LOSSLESS, *MARKED)
    assert "top first" in ffmpeg.run("-i", marked, "-f", "null", "-").stderr.decode()
    assert probe_video(marked).processing == ""
    clip = read_clip(marked, shape, 25)
    assert np.array_equal(clip, read_clip(plain, shape, 25))
    assert psnr(clip[2], covering(frames[2], shape.height, shape.width)) > 35


@pytest.mark.parametrize("name, field, options", [
    ("a.mp4", "tff", (*LOSSLESS, *MARKED)),
    ("a.ts", "bff", (*LOSSLESS, *MARKED)),
    ("a.mpg", "tff", ("-c:v", "mpeg2video", "-q:v", "2", *MARKED)),
    ("a.avi", "bff", ("-c:v", "mpeg4", "-q:v", "2", *MARKED)),  # marked in its frames only
    ("a.mov", "tff", ("-c:v", "mjpeg", "-q:v", "2")),  # marked in its container only
])  # fmt: skip
def test_interlaced_clips_are_deinterlaced(tmp_path: Path, name: str, field: str, options: Sequence[str]) -> None:
    frames = moving(60)
    path = ffmpeg.make(tmp_path / name, frames, 50, "-vf", f"interlace=scan={field}", *options)
    _, expected = ffmpeg.shown(path, f"bwdif=mode=send_frame:parity={field}:deint=all")
    info = probe_video(path)
    assert (info.num_frames, info.processing) == (30, "deinterlaced")
    clip = read_clip(path, ClipShape(30, 144, 240), 25)
    assert min(map(psnr, clip, expected)) > 45
    woven = ffmpeg.shown(path)[1]
    # The first field is of the time of every second picture.
    assert psnr(clip[10], frames[20]) > psnr(woven[10], frames[20]) + 3
    for k in range(0, 30, 7):
        assert np.array_equal(read_clip(path, ClipShape(1, 144, 240), 25, k / 25)[0], clip[k]), k
    with pytest.raises(DecodeError, match=r"interlaced.*pyav"):
        read_clip(path, ClipShape(1, 144, 240), 25, decoder="decord")


def test_fields_that_are_stored_one_by_one_are_refused(tmp_path: Path) -> None:
    """H.265 has no interlaced pictures: its frames would be half as high."""
    options = ("-c:v", "libx265", "-pix_fmt", "yuv420p", "-x265-params", "interlace=tff:log-level=none")
    path = ffmpeg.make(tmp_path / "a.mkv", moving(20, height=72), 50, *options)
    with pytest.raises(DecodeError, match="separate pictures"):
        probe_video(path)
