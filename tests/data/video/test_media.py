import dataclasses
import shutil
import struct
import subprocess
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import decord
import numpy as np
import pytest
from PIL import Image, ImageDraw

from cogds.core.geometry import ClipShape
from cogds.data.video import decode, decord_reader, media, pixels, timeline
from cogds.data.video.media import (
    DecodeError,
    num_frames_at,
    probe_image,
    probe_video,
    read_clip,
    read_image,
    write_video,
)
from cogds.errors import UserError
from tests.conftest import ROOT
from tests.data.video.clips import audio_only, encode, patch, rotate
from tests.data.video.pictures import center_crop, covering, exact, numbered, numbers, psnr, resized

# Not getrusage: right after a fork, it may report the parent's peak.
PEAK_KB = "int(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"


def read(path: Path, num_frames: int, fps: float = 25, start_s: float = 0.0, **more: Any) -> np.ndarray:
    info = probe_video(path)
    return read_clip(path, ClipShape(num_frames, info.height, info.width), fps, start_s, **more)


# ------------------------------------------------------------------------------------------------ the right frames


@pytest.mark.parametrize("name, num, fps, start_s", [
    ("bikes", 49, 16, 0.0), ("bikes", 25, 8, 1.3), ("carphone_pristine", 81, 24, 0.0),
    ("carphone_pristine", 60, 60, 2.0), ("bigbuckbunny", 9, 4, 0.5),
])  # fmt: skip
def test_real_clips_by_time(real_clips: Path, name: str, num: int, fps: float, start_s: float) -> None:
    """Against frames decoded in order, chosen by exact arithmetic and converted in floating point."""
    path = real_clips / f"{name}.mp4"
    with av.open(str(path)) as container:
        pictures = [(frame.pts * frame.time_base, frame) for frame in container.decode(video=0)]
    height, width = pictures[0][1].height, pictures[0][1].width
    wide = probe_video(path).width
    assert (height, wide) == (height, {"carphone_pristine": 193}.get(name, width))  # its pixels are 128:117
    clip = read_clip(path, ClipShape(num, height, width), fps, start_s)
    for k in range(num):
        time = Fraction(start_s) + Fraction(k) / Fraction(fps)
        shown = [frame for start, frame in pictures if start <= time + Fraction(1, 2000)][-1]
        if wide == width:
            assert psnr(clip[k], exact(shown)) > 55, k
        else:
            assert psnr(clip[k], center_crop(resized(exact(shown), height, wide), height, width)) > 45, k


@pytest.mark.parametrize("name, codec", [
    ("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.mov", "libx265"), ("a.webm", "libvpx-vp9"), ("a.avi", "mpeg4"),
    ("a.mp4", "libsvtav1"), ("a.ts", "libx264"),
])  # fmt: skip
def test_containers_and_codecs(tmp_path: Path, name: str, codec: str) -> None:
    """decord is refused for AV1 and MPEG-TS, which it does not read correctly."""
    options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    path = encode(tmp_path / name, numbered(60), codec=codec, options=options)
    info = probe_video(path)
    assert (info.num_frames, info.fps, info.width, info.height) == (60, 25, 96, 64)
    assert info.duration_s == pytest.approx(2.4, abs=0.002)
    assert numbers(read(path, 60)) == list(range(60))
    assert numbers(read(path, 5, 12.5, start_s=1.0)) == [25, 27, 29, 31, 33]
    assert numbers(read(path, 20, 50)) == [k // 2 for k in range(20)]  # slow sources repeat by time
    if codec == "libsvtav1" or name == "a.ts":
        with pytest.raises(DecodeError, match=r"data\.decoder=pyav"):
            read(path, 60, decoder="decord")
    else:
        assert np.abs(read(path, 60, decoder="decord").astype(int) - read(path, 60)).max() <= 4
        assert numbers(read(path, 5, 12.5, 1.0, decoder="decord")) == [25, 27, 29, 31, 33]
    # Decoded from a keyframe and from the start:
    assert np.array_equal(read(path, 10, start_s=2.0), read(path, 60)[50:60])


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("first_ms", [0, 700])
def test_variable_frame_rate(tmp_path: Path, suffix: str, first_ms: int) -> None:
    times = np.cumsum(np.r_[first_ms, np.random.default_rng(0).integers(10, 120, 59)])
    path = encode(tmp_path / f"a.{suffix}", numbered(60), times.tolist())
    expected = [int(np.searchsorted(times - first_ms, k * 1000 / 16 + 0.6, side="right")) - 1 for k in range(49)]
    assert numbers(read(path, 49, 16)) == expected


def test_frames_hidden_by_an_edit_list_are_skipped(tmp_path: Path) -> None:
    """A file cut by `ffmpeg -ss -c copy`. Unchecked, decord returns frame 10 in place of frame 5."""
    path = encode(tmp_path / "a.mp4", numbered(60))
    data = path.read_bytes()
    media_time = struct.unpack_from(">i", data, data.index(b"elst") + 16)[0]
    cut = patch(path, tmp_path / "cut.mp4", b"elst", 16, ">i", media_time + 5 * 512)
    assert probe_video(cut).num_frames == 55
    assert numbers(read(cut, 49)) == list(range(5, 54))
    assert numbers(read(cut, 5, start_s=1.6)) == list(range(45, 50))
    with pytest.raises(DecodeError, match="different frame times"):
        read(cut, 49, decoder="decord")


def test_a_title_that_is_not_utf_8(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", numbered(9), title="a caption")
    path.write_bytes(path.read_bytes().replace(b"a caption", b"a c\xe9ption"))
    assert probe_video(path).num_frames == 9
    assert numbers(read(path, 9)) == list(range(9))


def test_motion_jpeg_with_exif(tmp_path: Path) -> None:
    """PyAV 18 does not support this kind of side data, so the file is refused."""
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn clockwise by 90 degrees
    path = tmp_path / "a.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuvj420p"
        for number, image in enumerate(numbered(5)):
            Image.fromarray(image).save(tmp_path / "a.jpg", exif=exif)
            packet = av.Packet((tmp_path / "a.jpg").read_bytes())
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, number, number, Fraction(1, 25)
            packet.is_keyframe = True
            container.mux(packet)
    if av.__version__.startswith("18."):
        with pytest.raises(DecodeError, match="re-encode"):
            probe_video(path)
    else:
        info = probe_video(path)
        assert (info.width, info.height, info.rotation) == (64, 96, 90)
        assert numbers(np.rot90(read(path, 5), axes=(1, 2))) == list(range(5))


def test_b_frames_without_display_times(tmp_path: Path) -> None:
    """AVI has none, and FFmpeg's are wrong for H.264."""
    path = encode(tmp_path / "a.avi", numbered(60))
    assert probe_video(path).num_frames == 60
    assert numbers(read(path, 60)) == list(range(60))
    assert numbers(read(path, 9, 12.5, 1.2)) == list(range(30, 48, 2))


def test_num_frames_at_counts_the_readable_frames(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", numbered(30))
    info = probe_video(path)
    for fps, num in ((25, 30), (16, 20), (12.5, 15), (29.97, 36), (60, 72)):
        assert num_frames_at(info, fps) == num
        assert numbers(read(path, num, fps))[-1] == int((num - 1) * 25 / fps + 1e-6)
        with pytest.raises(DecodeError, match="ends too early"):
            read(path, num + 1, fps)


def test_one_frame(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", numbered(1))
    assert num_frames_at(probe_video(path), 16) == 1
    assert numbers(read(path, 1, 16)) == [0]


def test_rotated_videos_are_upright(tmp_path: Path) -> None:
    frames = np.full((10, 64, 96, 3), 40, np.uint8)
    frames[:, :16] = 240  # the stored top
    path = encode(tmp_path / "a.mp4", frames)
    for matrix, side in (((0, 1, -1, 0), "right"), ((-1, 0, 0, -1), "bottom"), ((0, -1, 1, 0), "left")):
        turned = rotate(path, tmp_path / f"{side}.mp4", *matrix)
        info = probe_video(turned)
        assert (info.height, info.width) == ((64, 96) if side == "bottom" else (96, 64))
        image = read(turned, 3)[-1].mean(axis=2)
        sides = {"top": image[:8], "bottom": image[-8:], "left": image[:, :8], "right": image[:, -8:]}
        assert max(sides, key=lambda name: sides[name].mean()) == side
        assert info.rotation == {"right": 90, "bottom": 180, "left": 270}[side]
        # decord rotates frames itself, at the source's size and scaled.
        assert np.abs(read(turned, 3, decoder="decord").astype(int) - read(turned, 3)).max() <= 3
        shape = ClipShape(3, 128, 80)
        by_decord, by_pyav = (read_clip(turned, shape, 25, decoder=name).astype(int) for name in ("decord", "pyav"))
        assert np.abs(by_decord - by_pyav).mean() < 3
    mirrored = rotate(path, tmp_path / "mirrored.mp4", -1, 0, 0, 1)
    with pytest.raises(DecodeError, match="mirror"):
        probe_video(mirrored)


@pytest.mark.parametrize("modules", ["decord, av", "av, decord"])
def test_both_decoders_in_either_import_order(tmp_path: Path, modules: str) -> None:
    path = encode(tmp_path / "a.mp4", numbered(12))
    code = (
        f"import {modules}\nimport sys\nfrom cogds.core.geometry import ClipShape\n"
        "from cogds.data.video.media import read_clip\n"
        "print(read_clip(sys.argv[1], ClipShape(9, 64, 96), 25).shape[0])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "9", done.stderr


def test_importing_loads_no_decoder() -> None:
    code = "import sys, cogds.data.video.media; print({'av', 'decord', 'torch', 'PIL'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, timeout=60).strip() == "set()"


# ------------------------------------------------------------------------------------------------------- bad files


def truncated(path: Path, share: float, front: bool) -> None:
    write_video(path, numbered(60), 25)
    if not front:
        encode(path, numbered(60))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


@pytest.mark.parametrize("make, match", [
    (lambda _: None, "does not exist"),
    (lambda p: p.mkdir(), "a folder"),
    (lambda p: p.touch(), "0 bytes"),
    (lambda p: p.write_text("no video " * 1000), "cannot be opened"),
    (lambda p: p.write_bytes(np.random.default_rng(0).bytes(100_000)), "cannot be opened"),
    (audio_only, "no video stream"),
    (lambda p: truncated(p, 0.7, front=True), "truncated"),
    (lambda p: truncated(p, 0.7, front=False), "no video stream"),
])  # fmt: skip
def test_bad_files_have_a_reason(tmp_path: Path, make: Any, match: str) -> None:
    path = tmp_path / "a.mp4"
    make(path)
    with pytest.raises(DecodeError, match=match):
        probe_video(path)
    with pytest.raises(DecodeError, match=match):
        read_clip(path, ClipShape(9, 64, 96), 16)


def test_damage_is_detected_or_harmless(real_clips: Path, tmp_path: Path) -> None:
    """A damaged file is refused or read correctly. decord returns wrong frames for nearly all of them."""
    data = (real_clips / "bikes.mp4").read_bytes()
    at = data.index(b"mdat")
    shape = ClipShape(25, 272, 640)
    good = read_clip(real_clips / "bikes.mp4", shape, 25)
    refused = decord_wrong = 0
    path = tmp_path / "a.mp4"
    for trial in range(12):
        rng = np.random.default_rng(trial)
        start = at + 200 + int(rng.integers(15_000))
        broken = bytearray(data)
        broken[start : start + 256] = rng.bytes(256)
        path.write_bytes(broken)
        reader = decord.VideoReader(str(path), num_threads=1, fault_tol=1e-9)
        try:
            plain = reader.get_batch(range(25)).asnumpy()
            decord_wrong += not np.array_equal(plain, good)
        except Exception:
            pass
        try:
            assert np.array_equal(read_clip(path, shape, 25), good)
        except DecodeError:
            refused += 1
    assert refused >= 10
    assert decord_wrong >= 8  # otherwise, strict decoding would not be needed


@pytest.mark.parametrize("error", [TypeError("planted"), AttributeError("planted"), ValueError("planted")])
@pytest.mark.parametrize("where", ["FrameCheck", "turns_of", "repeat"])
@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_a_bug_is_not_reported_as_a_bad_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, where: str, decoder: str
) -> None:
    path = encode(tmp_path / "a.mp4", numbered(9))

    def fail(*_: Any) -> None:
        raise error

    for module in (decode, timeline, pixels, media, decord_reader):
        if hasattr(module, where):
            monkeypatch.setattr(module, where, fail)
    with pytest.raises(type(error), match="planted"):
        read_clip(path, ClipShape(9, 64, 96), 25, decoder=decoder)


def test_wrong_frames_from_decord_are_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = encode(tmp_path / "a.mp4", numbered(30))
    init = decord.VideoReader.__init__

    def init_and_skip(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.next()

    assert numbers(read(path, 9, decoder="decord")) == list(range(9))
    monkeypatch.setattr(decord.VideoReader, "__init__", init_and_skip)
    with pytest.raises(DecodeError, match=r"different first frame.*data\.decoder=pyav"):
        read(path, 9, decoder="decord")


class _Watched:
    """A container that counts packets and whose seek may miss its target."""

    num_packets = 0

    def __init__(self, container: Any, shift: int = 0) -> None:
        self.container, self.shift = container, shift

    def __getattr__(self, name: str) -> Any:
        return getattr(self.container, name)

    def __enter__(self) -> "_Watched":
        return self

    def __exit__(self, *_: object) -> None:
        self.container.close()

    def seek(self, pts: int, **more: Any) -> None:
        self.container.seek(max(0, pts + self.shift), **more)

    def demux(self, stream: Any) -> Any:
        for packet in self.container.demux(stream):
            _Watched.num_packets += 1
            yield packet


def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the numbers of the frames decoded from now on."""
    seen: list[int] = []
    check = timeline.FrameCheck.check

    def counted(self: Any, frame: Any, index: int) -> None:
        seen.append(index)
        check(self, frame, index)

    monkeypatch.setattr(timeline.FrameCheck, "check", counted)
    return seen


def test_decoding_starts_and_ends_near_the_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = encode(tmp_path / "a.mp4", numbered(60), options={"sc_threshold": "0"})  # a keyframe each 12 frames
    seen = decoded(monkeypatch)
    read(path, 1)  # reads the timeline, which is kept
    open_container = media.open_container
    monkeypatch.setattr(media, "open_container", lambda path: _Watched(open_container(path)))
    for start, num, expected in ((0, 5, range(5)), (11, 3, range(14)), (12, 3, range(12, 15)), (50, 4, range(48, 54))):
        seen.clear()
        monkeypatch.setattr(_Watched, "num_packets", 0)
        clip = read_clip(path, ClipShape(num, 64, 96), 25, start / 25)
        assert seen == list(expected)
        assert _Watched.num_packets <= len(expected) + 6  # those on which B-frames depend
        assert numbers(clip) == list(range(start, start + num))


@pytest.mark.parametrize("options", [
    {"x264-params": "intra-refresh=1:keyint=12:log-level=none"}, {"x264-params": "open-gop=1:bframes=5:log-level=none"},
])  # fmt: skip
@pytest.mark.parametrize("suffix", ["mkv", "ts", "mp4"])
def test_a_start_between_keyframes_is_exact(tmp_path: Path, suffix: str, options: dict[str, str]) -> None:
    """With gradual refresh over many frames, or with frames before a keyframe that depend on it."""
    frames = np.random.default_rng(0).integers(0, 256, (60, 4, 6, 3), dtype=np.uint8).repeat(16, 1).repeat(16, 2)
    path = encode(tmp_path / f"a.{suffix}", frames, options=options)
    good = read(path, 60)
    for start in range(0, 60, 7):
        assert np.array_equal(read(path, 1, start_s=start / 25)[0], good[start])


def test_a_stream_without_a_keyframe_at_its_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = encode(tmp_path / "a.mp4", numbered(60), options={"sc_threshold": "0"})
    read_timeline = timeline.read_timeline

    def late_keys(container: Any) -> Any:
        times, frame = read_timeline(container)
        return dataclasses.replace(times, keys=[24, 36]), frame

    monkeypatch.setattr(timeline, "read_timeline", late_keys)
    shape = ClipShape(40, 64, 96)
    assert numbers(read_clip(path, shape, 25)) == list(range(40))
    assert numbers(read_clip(path, shape, 25, 0.4)) == list(range(10, 50))


@pytest.mark.parametrize("num_frames", [-24, 12, 24])
def test_a_wrong_seek_is_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_frames: int) -> None:
    path = encode(tmp_path / "a.mp4", numbered(60), options={"sc_threshold": "0"})
    shift = num_frames * 512  # the file's clock ticks 12800 times a second
    open_container = media.open_container
    monkeypatch.setattr(media, "open_container", lambda path: _Watched(open_container(path), shift))
    shape, seen = ClipShape(5, 64, 96), decoded(monkeypatch)
    read(path, 1)  # reads the timeline, which is kept
    seen.clear()
    assert numbers(read_clip(path, shape, 25, 1.2)) == list(range(30, 35))
    assert seen.count(30) == 1
    assert (0 in seen) == (num_frames > 0)  # decoded from the start if the seek went too far


def test_the_range_is_respected(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", numbered(60))
    info = probe_video(path)
    for fps, start_s, end_s in ((25, 0.4, 1.2), (16, 0.5, 2.0), (30, 1.0, 9.0), (8, 0.0, 0.1), (12.5, 2.3, None)):
        num = num_frames_at(info, fps, start_s, end_s)
        limit = min(2.4, end_s or 9)
        assert num == sum(start_s + k / fps < limit - 1e-3 for k in range(100))
        times = start_s + np.arange(num) / fps
        assert numbers(read(path, num, fps, start_s, end_s=end_s)) == np.floor(times * 25 + 0.02).tolist()
        with pytest.raises(DecodeError, match="ends too early"):
            read(path, num + 1, fps, start_s, end_s=end_s)
    assert num_frames_at(info, 25, 3.0) == num_frames_at(info, 25, 1.0, 0.5) == num_frames_at(info, 25, 1.0, 1.0) == 0
    with pytest.raises(ValueError, match="decoder"):
        read(path, 3, decoder="other")


def test_a_header_that_contradicts_the_packets(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mkv", numbered(30), [k * 100 for k in range(30)])
    data = bytearray(path.read_bytes())
    at = data.index(bytes.fromhex("23e383")) + 4  # DefaultDuration: nanoseconds per frame
    data[at : at + 4] = (1_000_000).to_bytes(4, "big")
    path.write_bytes(data)
    with av.open(str(path)) as container:
        assert container.streams.video[0].average_rate == 1000
    info = probe_video(path)
    assert (info.num_frames, info.fps) == (30, pytest.approx(10, rel=0.02))
    assert info.duration_s == pytest.approx(3, abs=0.2)
    assert numbers(read(path, 10, 5)) == list(range(0, 20, 2))


def test_memory_is_bounded_by_the_clip_and_a_few_frames(tmp_path: Path) -> None:
    """120 frames of 1280x720 would take 332 MB in RGB. Only two small frames are read."""
    frames = np.broadcast_to(np.uint8(90), (120, 720, 1280, 3))
    path = encode(tmp_path / "a.mp4", frames)
    code = (
        "import sys\nfrom cogds.core.geometry import ClipShape\nfrom cogds.data.video.media import read_clip\n"
        f"def peak(): return {PEAK_KB} // 1024\n"
        "for decoder in ('pyav', 'decord'):\n"
        "    read_clip(sys.argv[1], ClipShape(1, 32, 48), 25, decoder=decoder)\n"
        "    before = peak()\n"
        "    read_clip(sys.argv[1], ClipShape(100, 32, 48), 25, decoder=decoder)\n"
        "    print(peak() - before)"
    )
    grown = subprocess.check_output([sys.executable, "-c", code, str(path)], text=True, timeout=60, cwd=ROOT).split()
    assert all(int(megabytes) < 100 for megabytes in grown), grown


# -------------------------------------------------------------------------------------------------- size and pictures


def circle(height: int, width: int) -> np.ndarray:
    image = Image.new("RGB", (width, height), (20, 20, 20))
    r = min(height, width) * 0.3
    ImageDraw.Draw(image).ellipse((width / 2 - r, height / 2 - r, width / 2 + r, height / 2 + r), fill=(240, 240, 240))
    return np.array(image)


def extent(image: np.ndarray) -> tuple[int, int]:
    bright = image.mean(axis=2) > 130
    return int(bright.any(axis=1).sum()), int(bright.any(axis=0).sum())


@pytest.mark.parametrize("source", [(240, 320), (320, 200), (96, 256)])
@pytest.mark.parametrize("target", [(128, 128), (96, 160), (256, 144), (480, 640)])
def test_a_circle_stays_a_circle(tmp_path: Path, source: tuple[int, int], target: tuple[int, int]) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(circle(*source)).save(path)
    image = read_image(path, *target)
    assert image.shape == (*target, 3)
    scale = max(target[0] / source[0], target[1] / source[1])
    across = 0.6 * min(source) * scale
    tall, wide = extent(image)
    assert tall == pytest.approx(min(across, target[0]), abs=3)
    assert wide == pytest.approx(min(across, target[1]), abs=3)
    top, left = image[: target[0] // 2], image[:, : target[1] // 2]
    assert abs(top.mean() - image.mean()) < 4  # cropped at the center
    assert abs(left.mean() - image.mean()) < 4


def zone_plate(height: int, width: int) -> np.ndarray:
    """Rings whose frequency rises from the center to half a period per pixel at the sides."""
    y, x = np.mgrid[:height, :width] + 0.5
    phase = np.pi * (((x - width / 2) ** 2) / width + ((y - height / 2) ** 2) / height)
    return np.repeat(np.round(127.5 + 100 * np.cos(phase))[..., None], 3, axis=2).astype(np.uint8)


def ramps(height: int, width: int) -> np.ndarray:
    """Red rises to the right, green downward, blue in both directions."""
    y, x = np.mgrid[:height, :width]
    channels = (x / (width - 1), y / (height - 1), x / (width - 1) / 2 + y / (height - 1) / 2)
    return np.stack([np.round(20 + 210 * channel) for channel in channels], axis=2).astype(np.uint8)


@pytest.mark.parametrize("target", [(90, 160), (64, 64), (360, 640), (144, 100), (181, 321)])
@pytest.mark.parametrize("draw", [ramps, zone_plate])
@pytest.mark.parametrize("kind", ["video", "image"])
def test_resizing_is_antialiased_bicubic_without_a_shift(tmp_path: Path, kind: str, draw: Any, target: Any) -> None:
    source = draw(180, 320)
    if kind == "video":
        path = encode(
            tmp_path / "a.mp4", np.stack([source] * 3), codec="libx264rgb", options={"qp": "0"}, pix_fmt="rgb24"
        )
        image = read_clip(path, ClipShape(1, *target), 25)[0]
    else:
        Image.fromarray(source).save(tmp_path / "a.png")
        image = read_image(tmp_path / "a.png", *target)
    expected = covering(source, *target)
    # Measured: the plate 41 to 47 dB (FFmpeg's kernel has a = -0.6, not -0.5), taking the nearest pixel 12 to 19 dB,
    # one pixel of shift 10 to 17 dB.
    floor = {"image": 52, "video": 46 if draw is ramps else 38}[kind]
    assert psnr(image, expected) > floor
    assert np.abs(image.mean(axis=(0, 1)) - expected.mean(axis=(0, 1))).max() < 0.6


@pytest.mark.parametrize("name, target", [
    ("bigbuckbunny", (480, 720)), ("bikes", (480, 720)), ("bigbuckbunny", (768, 1360)), ("bikes", (192, 288)),
])  # fmt: skip
def test_real_clips_are_resized_accurately(real_clips: Path, name: str, target: tuple[int, int]) -> None:
    path = real_clips / f"{name}.mp4"
    with av.open(str(path)) as container:
        expected = covering(exact(next(container.decode(video=0))), *target)
    image = read_clip(path, ClipShape(1, *target), 25)[0]
    assert psnr(image, expected) > 50
    assert abs(image.mean() - expected.mean()) < 0.2
    by_decord = read_clip(path, ClipShape(1, *target), 25, decoder="decord")[0]
    assert psnr(by_decord, expected) > 38


COLORS = {"red": (200, 30, 40), "green": (40, 180, 60), "blue": (30, 60, 190), "skin": (220, 170, 140)}
MATRICES = {"bt709": (0.2126, 0.0722), "smpte170m": (0.299, 0.114), "bt2020nc": (0.2627, 0.0593)}


def colored(path: Path, rgb: Sequence[int], pixels: str, matrix: str | None, full: bool, codec: str) -> Path:
    """One color, converted by the definition: Y = Kr R + Kg G + Kb B, Cb = (B - Y) / 2 / (1 - Kb), ..."""
    red, blue = MATRICES[matrix or "smpte170m"]
    r, g, b = (value / 255 for value in rgb)
    y = red * r + (1 - red - blue) * g + blue * b
    chroma = ((b - y) / 2 / (1 - blue), (r - y) / 2 / (1 - red))
    depth = 10 if "10" in pixels else 8
    levels = (y * 255, *(c * 255 + 128 for c in chroma)) if full else (16 + 219 * y, *(128 + 224 * c for c in chroma))
    options = {"x264-params": "qp=0"} if codec == "libx264" else {"x265-params": "lossless=1:log-level=none"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = 192, 128, pixels
        if matrix:
            stream.codec_context.colorspace = {"bt709": 1, "smpte170m": 6, "bt2020nc": 9}[matrix]
        if full:
            stream.codec_context.color_range = 2
        for _ in range(3):
            frame = av.VideoFrame(192, 128, pixels)
            for plane, level in zip(frame.planes, levels):
                value = round(level * (4 if depth == 10 else 1))
                rows = np.frombuffer(plane, np.uint16 if depth == 10 else np.uint8)
                rows[:] = value
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("size", [(128, 192), (192, 288), (64, 80)])
@pytest.mark.parametrize("pixels, matrix, full, codec", [
    ("yuv420p", None, False, "libx264"), ("yuv420p", "bt709", False, "libx264"),
    ("yuv420p", "smpte170m", False, "libx264"), ("yuv420p", "bt709", True, "libx264"),
    ("yuv420p10le", "bt2020nc", False, "libx265"), ("yuv444p", "bt709", False, "libx264"),
    ("yuv422p10le", "bt709", False, "libx264"), ("yuv444p", None, False, "libx264"),
])  # fmt: skip
def test_colors_follow_the_tags(
    tmp_path: Path, pixels: str, matrix: str | None, full: bool, codec: str, size: tuple[int, int]
) -> None:
    for name, rgb in COLORS.items():
        path = colored(tmp_path / f"{name}.mp4", rgb, pixels, matrix, full, codec)
        image = read_clip(path, ClipShape(1, *size), 25)[0]
        # Without resizing, FFmpeg's plain conversion truncates.
        assert np.abs(image.astype(int) - rgb).max() <= (3 if size == (128, 192) else 1), name
        if matrix in (None, "smpte170m") and not full:
            by_decord = read_clip(path, ClipShape(1, *size), 25, decoder="decord")[0]
            assert np.abs(by_decord.astype(int) - rgb).max() <= 4, name
        else:
            with pytest.raises(DecodeError, match=r"tagged.*data\.decoder=pyav"):
                read_clip(path, ClipShape(1, *size), 25, decoder="decord")


@pytest.mark.slow
def test_a_large_portrait_needs_little_memory(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((7680, 4320, 3), np.uint8)).save(tmp_path / "a.png")
    encode(tmp_path / "a.mp4", np.broadcast_to(np.uint8(90), (2, 7680, 4320, 3)), options={"preset": "ultrafast"})
    code = (
        "import sys\nfrom cogds.core.geometry import ClipShape\nfrom cogds.data.video import media\n"
        "print(media.probe_video(sys.argv[1] + '/a.mp4').height)\n"
        "print(media.read_clip(sys.argv[1] + '/a.mp4', ClipShape(2, 480, 272), 25).shape)\n"
        "print(media.read_image(sys.argv[1] + '/a.png', 480, 272).shape)\n"
        f"print({PEAK_KB})"
    )
    lines = subprocess.check_output([sys.executable, "-c", code, str(tmp_path)], text=True, timeout=60, cwd=ROOT)
    assert lines.splitlines()[:3] == ["7680", "(2, 480, 272, 3)", "(480, 272, 3)"]
    assert int(lines.splitlines()[3]) < 900 * 1024


def test_windows_of_a_file_read_its_timeline_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = encode(tmp_path / "a.mp4", numbered(60))
    reads, read_timeline = [], timeline.read_timeline
    monkeypatch.setattr(timeline, "read_timeline", lambda container: reads.append(1) or read_timeline(container))
    shape = ClipShape(5, 64, 96)
    first = [read_clip(path, shape, 25, start) for start in (0, 0.4, 1.6)]
    assert len(reads) == 1
    timeline._recent_timelines.clear()
    second = [read_clip(path, shape, 25, start) for start in (1.6, 0.4, 0)]
    assert all(map(np.array_equal, first, reversed(second)))
    encode(path, numbered(30))  # another file under the same name
    reads.clear()
    with pytest.raises(DecodeError, match="ends too early"):
        read_clip(path, shape, 25, 1.6)
    assert len(reads) == 1


def test_non_square_pixels(tmp_path: Path) -> None:
    squeezed = np.array(Image.fromarray(circle(128, 256)).resize((128, 128)))
    path = encode(tmp_path / "a.mp4", np.stack([squeezed] * 9), aspect=Fraction(2))
    assert (probe_video(path).height, probe_video(path).width) == (128, 256)
    tall, wide = extent(read_clip(path, ClipShape(9, 128, 256), 25)[4])
    assert tall == pytest.approx(wide, abs=3)


def test_an_image_of_the_right_scale_is_not_resampled(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png", 64, 96), pixels)
    assert np.array_equal(read_image(tmp_path / "a.png", 64, 64), pixels[:, 16:80])
    info = probe_image(tmp_path / "a.png")
    assert (info.num_frames, info.height, info.width, num_frames_at(info, 16)) == (1, 64, 96, 1)


def test_resizing_rounds_and_clips(tmp_path: Path) -> None:
    pixels = np.full((64, 96, 3), 255, np.uint8)
    pixels[:, 48:] = 0
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png", 128, 192)
    assert (image[:, :80] >= 250).all()
    assert (image[:, 112:] <= 5).all()
    assert abs(image.mean() - 127.5) < 1


def test_image_modes_and_errors(tmp_path: Path) -> None:
    upright = circle(60, 90)
    upright[:10] = (255, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn clockwise by 90 degrees
    Image.fromarray(np.ascontiguousarray(np.rot90(upright))).save(tmp_path / "a.png", exif=exif)
    assert probe_image(tmp_path / "a.png").width == 90
    assert np.array_equal(read_image(tmp_path / "a.png", 60, 90), upright)
    for mode in ("L", "P", "RGBA", "CMYK"):
        suffix = "jpg" if mode == "CMYK" else "png"
        Image.fromarray(upright).convert(mode).save(tmp_path / f"{mode}.{suffix}")
        assert read_image(tmp_path / f"{mode}.{suffix}", 32, 48).shape == (32, 48, 3)
    Image.fromarray(np.full((9, 9), 40000, np.uint16)).save(tmp_path / "deep.png")
    (tmp_path / "text.png").write_text("no picture")
    shutil.copy(tmp_path / "a.png", tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:150])
    for name, match in (
        ("deep.png", "8 bits"),
        ("text.png", "image"),
        ("cut.png", "image"),
        ("none", "not exist"),
        (".", "folder"),
    ):
        with pytest.raises(DecodeError, match=match):
            read_image(tmp_path / name, 32, 32)


@pytest.mark.parametrize("kind", [2, 5, 7])  # texts, fractions, bytes
def test_any_error_of_pillow_for_a_damaged_image_is_a_decode_error(tmp_path: Path, kind: int) -> None:
    """Its TIFF parser raises a TypeError."""
    Image.new("RGB", (8, 8)).save(file := tmp_path / "a.tiff")
    data = bytearray(file.read_bytes())
    data[data.index(struct.pack("<HHI", 273, 4, 1)) + 2] = kind  # StripOffsets, of a type that is not an integer
    file.write_bytes(data)
    with pytest.raises(DecodeError, match="image"):
        read_image(file, 32, 32)


def test_a_wrong_call_of_pillow_is_not_reported_as_a_bad_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    monkeypatch.setattr("PIL.ImageOps.exif_transpose", lambda: None)
    with pytest.raises(TypeError):
        read_image(tmp_path / "a.png", 32, 32)


# ---------------------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("fps", [8, 12.5, 23.976, 16, 29.97])
def test_written_frames_are_read_back(tmp_path: Path, fps: float) -> None:
    frames = numbered(20)
    write_video(tmp_path / "a.mp4", frames, fps)
    info = probe_video(tmp_path / "a.mp4")
    assert (info.num_frames, info.height, info.width) == (20, 64, 96)
    assert info.fps == pytest.approx(fps, abs=1e-3)
    assert numbers(read(tmp_path / "a.mp4", 20, info.fps)) == list(range(20))
    data = (tmp_path / "a.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_a_tensor_is_written_like_an_array(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    for name, frames in (("a.mp4", numbered(3)), ("b.mp4", torch.from_numpy(numbered(3)))):
        write_video(tmp_path / name, frames, 16, num_threads=1)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_text("old")
    with pytest.raises(UserError, match="even"):
        write_video(tmp_path / "a.mp4", numbered(3)[:, :63], 16)
    with pytest.raises(ValueError, match="uint8"):
        write_video(tmp_path / "a.mp4", numbered(3).astype(np.float32), 16)
    with pytest.raises(Exception, match=r".+"):
        write_video(tmp_path / "a.mp4", numbered(3), -1)
    assert (tmp_path / "a.mp4").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
