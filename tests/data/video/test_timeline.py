"""Sound files that are not one whole film: cut, trimmed, with dropped frames. FFmpeg's program tells what they show."""

import shutil
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import av
import numpy as np
import pytest

from cogds.core.geometry import ClipShape
from cogds.data.video.media import DecodeError, num_frames_at, probe_video, read_clip
from tests.data.video import ffmpeg
from tests.data.video.pictures import numbered, numbers, psnr

OPEN_GOP = "open-gop=1:bframes=3:keyint=12:min-keyint=12:scenecut=0:b-adapt=0:log-level=none"
CODECS: dict[str, Sequence[str]] = {
    "h264": ("-c:v", "libx264", "-pix_fmt", "yuv420p", "-x264-params", OPEN_GOP),
    "hevc": ("-c:v", "libx265", "-pix_fmt", "yuv420p", "-x265-params", OPEN_GOP),
    "mpeg2": ("-c:v", "mpeg2video", "-bf", "2", "-q:v", "2", "-g", "12"),
}


def check_all_windows(path: Path, expected: Sequence[int], fps: float) -> None:
    """Compare with the frames that FFmpeg displays and with their numbers, read at once and one by one."""
    times, frames = ffmpeg.shown(path)
    assert numbers(frames) == list(expected)
    info = probe_video(path)
    assert info.num_frames == len(expected)
    num = num_frames_at(info, fps)
    assert num >= round(times[-1] * fps) + 1
    clip = read_clip(path, ClipShape(num, 64, 96), fps)
    for k in range(num):
        index = np.searchsorted(times, k / fps + 0.0006, side="right") - 1
        assert psnr(clip[k], frames[index]) > 50, k
        assert np.array_equal(read_clip(path, ClipShape(1, 64, 96), fps, k / fps)[0], clip[k]), k


def boxes(data: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start and end of the boxes of an MP4 file."""
    while start + 8 <= end:
        size = struct.unpack_from(">I", data, start)[0]
        yield data[start + 4 : start + 8], start, start + size
        start += size


def with_edits(source: Path, target: Path, edits: Sequence[tuple[float, float]]) -> Path:
    """Copy an MP4 with another edit list. edits: (seconds to show, seconds after the first frame)."""
    data = source.read_bytes()
    start, end, path = 0, len(data), []
    for name in (b"moov", b"trak", b"edts", b"elst"):
        start, end = next((a, b) for kind, a, b in boxes(data, start, end) if kind == name)
        path.append((start, end))
        start += 8
    first = struct.unpack_from(">i", data, start + 12)[0]
    movie_scale, media_scale = (struct.unpack_from(">I", data, data.index(box) + 16)[0] for box in (b"mvhd", b"mdhd"))
    rows = [(round(shown * movie_scale), first + round(at * media_scale)) for shown, at in edits]
    elst = struct.pack(">I4sII", 16 + 12 * len(rows), b"elst", 0, len(rows))
    elst += b"".join(struct.pack(">IiHH", *row, 1, 0) for row in rows)
    a, b = path.pop()
    grown = len(elst) - (b - a)
    new = bytearray(data[:a] + elst + data[b:])
    for a, b in path:
        struct.pack_into(">I", new, a, b - a + grown)
    target.write_bytes(new)  # the header is last, so the frames have not moved
    return target


@pytest.mark.parametrize("num_b_frames", [0, 2])
@pytest.mark.parametrize("edits, expected", [
    ([(1.6, 0)], range(40)),  # the end is cut off
    ([(0.8, 0.6)], range(15, 35)),
    ([(0.8, 0), (0.8, 1.6)], [*range(20), *range(40, 60)]),  # the middle is cut out
])  # fmt: skip
def test_edit_lists(
    tmp_path: Path, edits: Sequence[tuple[float, float]], expected: Sequence[int], num_b_frames: int
) -> None:
    options = ("-c:v", "libx264", "-pix_fmt", "yuv420p", "-g", 15, "-bf", num_b_frames, "-use_editlist", 1)
    whole = ffmpeg.make(tmp_path / "whole.mp4", numbered(60), 25, *options)
    check_all_windows(with_edits(whole, tmp_path / "a.mp4", edits), expected, 25)


@pytest.mark.parametrize("codec", ["mpeg4", "mjpeg"])
def test_dropped_frames_of_an_avi(tmp_path: Path, codec: str) -> None:
    """They are chunks of 0 bytes, which the header counts."""
    keep = "select='not(between(n,10,14))*not(between(n,30,31))'"
    options = ("-vf", keep, "-fps_mode", "vfr", "-c:v", codec, "-q:v", "2")
    path = ffmpeg.make(tmp_path / "a.avi", numbered(60), 30, *options)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 60
    expected = [k for k in range(60) if not 10 <= k <= 14 and k not in (30, 31)]
    check_all_windows(path, expected, 16)


@pytest.mark.parametrize("name", ["a.avi", "a.mp4"])
def test_a_file_cut_off_between_two_frames_is_truncated(tmp_path: Path, name: str) -> None:
    path = ffmpeg.make(tmp_path / name, numbered(60), 30, "-c:v", "mpeg4", "-movflags", "+faststart")
    with av.open(str(path)) as container:
        entry = list(container.streams.video[0].index_entries)[40]
    # In AVI, the position is that of the chunk's header.
    path.write_bytes(path.read_bytes()[: entry.pos])
    for read in (probe_video, lambda path: read_clip(path, ClipShape(5, 64, 96), 30)):
        with pytest.raises(DecodeError, match="truncated"):
            read(path)


@pytest.mark.parametrize("codec, source, target", [
    ("h264", "mkv", "mkv"), ("h264", "mkv", "mp4"), ("h264", "ts", "ts"),
    ("hevc", "mkv", "ts"), ("hevc", "mkv", "mkv"), ("hevc", "mkv", "mp4"),
    ("mpeg2", "ts", "ts"), ("mpeg2", "ts", "mkv"), ("mpeg2", "mpg", "mpg"),
])  # fmt: skip
@pytest.mark.parametrize("options", [(), ("-avoid_negative_ts", "make_zero")])
def test_a_copy_cut_at_an_open_gop(
    tmp_path: Path, codec: str, source: str, target: str, options: Sequence[str]
) -> None:
    """Its first B-frames depend on frames before the cut. No player shows them."""
    whole = ffmpeg.make(tmp_path / f"whole.{source}", numbered(60), 25, *CODECS[codec])
    path = tmp_path / f"a.{target}"
    ffmpeg.run("-ss", "1.0", "-i", whole, "-c", "copy", *options, path)
    first = numbers(ffmpeg.shown(path)[1])[0]
    assert first > 0
    check_all_windows(path, range(first, 60), 25)


@pytest.mark.parametrize("codec", ["h264", "mpeg2"])
def test_a_recording_that_begins_between_keyframes(tmp_path: Path, codec: str) -> None:
    whole = ffmpeg.make(tmp_path / "whole.ts", numbered(60), 25, *CODECS[codec])
    data, path = whole.read_bytes(), tmp_path / "a.ts"
    path.write_bytes(data[: 3 * 188] + data[len(data) // 188 // 3 * 188 :])
    check_all_windows(path, range(24, 60), 25)


def test_damage_after_the_cut_of_an_open_gop_is_detected(tmp_path: Path) -> None:
    whole = ffmpeg.make(tmp_path / "whole.mkv", numbered(60), 25, *CODECS["h264"])
    path = tmp_path / "a.mkv"
    ffmpeg.run("-ss", "1.0", "-i", whole, "-c", "copy", path)
    good = read_clip(path, ClipShape(40, 64, 96), 25)
    with av.open(str(path)) as container:
        packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    data, num_refused = path.read_bytes(), 0
    for packet in packets[6:30:4]:
        at = data.index(packet) + len(packet) // 2
        path.write_bytes(data[:at] + bytes(byte ^ 0xFF for byte in data[at : at + 8]) + data[at + 8 :])
        try:
            assert np.array_equal(read_clip(path, ClipShape(40, 64, 96), 25), good)
        except DecodeError:
            num_refused += 1
    assert num_refused >= 4


def test_equal_timestamps(tmp_path: Path) -> None:
    """Of frames with the same time, the last one is displayed."""
    options = ("-vf", "setpts='floor(N/2)*2/25/TB'", "-fps_mode", "passthrough", "-enc_time_base", "1/1000")
    path = ffmpeg.make(tmp_path / "a.mkv", numbered(60), 25, *options, "-c:v", "libx264", "-pix_fmt", "yuv420p")
    assert ffmpeg.shown(path)[0][:4].tolist() == [0, 0, 0.08, 0.08]
    check_all_windows(path, range(60), 12.5)
    assert numbers(read_clip(path, ClipShape(20, 64, 96), 12.5)) == list(range(1, 40, 2))


def test_windows_of_a_transport_stream_are_found_without_decoding_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cogds.data.video import media

    path = ffmpeg.make(tmp_path / "a.ts", numbered(60), 25, "-c:v", "mpeg2video", "-g", "12", "-bf", "2", "-q:v", "2")
    read_clip(path, ClipShape(1, 64, 96), 25)
    starts = []
    decode_range = media.decode_range
    monkeypatch.setattr(
        media, "decode_range", lambda *args, from_start: starts.append(from_start) or decode_range(*args, from_start)
    )
    assert numbers(read_clip(path, ClipShape(5, 64, 96), 25, 1.6)) == list(range(40, 45))
    assert starts == [False]


def test_a_lost_frame_of_an_avi_with_b_frames_is_detected(tmp_path: Path) -> None:
    path = ffmpeg.make(tmp_path / "a.avi", numbered(60), 25, "-c:v", "libx264", "-pix_fmt", "yuv420p", "-bf", "2")
    good = read_clip(path, ClipShape(50, 64, 96), 25)
    assert numbers(good) == list(range(50))
    with av.open(str(path)) as container:
        packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    data, num_refused = path.read_bytes(), 0
    for packet in packets[3:30:5]:
        at = data.index(packet)
        shutil.copy(path, tmp_path / "b.avi")
        (tmp_path / "b.avi").write_bytes(data[:at] + bytes(len(packet)) + data[at + len(packet) :])
        try:
            assert np.array_equal(read_clip(tmp_path / "b.avi", ClipShape(50, 64, 96), 25), good)
        except DecodeError:
            num_refused += 1
    assert num_refused >= 5
