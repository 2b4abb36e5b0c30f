"""Frames one after the other have the pixels and times of clips."""

import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cogds.core.geometry import ClipShape
from cogds.data.storage.tars import list_members
from cogds.data.video.frames import iter_frames, read_frame
from cogds.data.video.media import probe_image, probe_video, read_clip
from tests.data.video import ffmpeg
from tests.data.video.test_colors import COLORS, TO_BT2020, hlg, patches
from tests.data.video.test_interlacing import LOSSLESS, MARKED, moving


def check(path: str | Path, fps: float, side: int) -> None:
    """All frames of a file with a constant rate are those of a clip, from any start."""
    probe = probe_image if str(path).endswith(".webp") else probe_video
    info = probe(path)
    scale = side / max(info.height, info.width)
    shape = ClipShape(info.num_frames, round(scale * info.height), round(scale * info.width))
    clip = read_clip(path, shape, fps)
    for first, end in ((0, info.num_frames), (3, info.num_frames), (3, 5)):
        end_s = None if end == info.num_frames else end / fps
        frames = list(iter_frames(path, first / fps, end_s))
        assert [frame.start_s for frame in frames] == pytest.approx([k / fps for k in range(first, end)])
        assert [frame.end_s for frame in frames] == pytest.approx([(k + 1) / fps for k in range(first, end)])
        assert frames[0].size == (info.height, info.width)
        np.testing.assert_array_equal(np.stack([frame.pixels(side) for frame in frames]), clip[first:end])
    np.testing.assert_array_equal(read_frame(path, 4.5 / fps, side), clip[4])


@pytest.mark.parametrize("side", [240, 160])
def test_interlaced_and_marked_ones(tmp_path: Path, side: int) -> None:
    options = (*LOSSLESS, "-g", "8", *MARKED)
    interlaced = ffmpeg.make(tmp_path / "a.ts", moving(40), 50, "-vf", "interlace=scan=tff", *options)
    assert probe_video(interlaced).processing == "deinterlaced"
    check(interlaced, 25, side)
    check(ffmpeg.make(tmp_path / "b.mp4", moving(20), 25, "-vf", "setfield=tff", *options), 25, side)


def test_hdr(tmp_path: Path) -> None:
    single = patches(tmp_path / "a.mkv", (COLORS / 255) ** 2.4 @ TO_BT2020.T, hlg, "bt2020 arib-std-b67 bt2020nc")
    path = tmp_path / "b.mkv"
    ffmpeg.run("-stream_loop", 3, "-i", single, "-c", "copy", path)
    assert probe_video(path).processing == "tone-mapped from HDR"
    check(path, 25, 128)


@pytest.mark.parametrize("suffix", [".webp", ".tar"])
def test_animations_and_members_of_tar_files(tmp_path: Path, suffix: str) -> None:
    images = [Image.fromarray(frame) for frame in moving(8)]
    path = tmp_path / "a.webp"
    images[0].save(path, save_all=True, append_images=images[1:], duration=100, lossless=True)
    if suffix == ".webp":
        check(path, 10, 120)
        return
    ffmpeg.make(tmp_path / "a.mp4", moving(8), 10, *LOSSLESS)
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        tar.add(tmp_path / "a.mp4", "a.mp4")
    ((member, _),) = list_members(str(tmp_path / "all.tar"))
    check(member.location, 10, 120)
