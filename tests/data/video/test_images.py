"""Photos and animations."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from PIL import Image, ImageCms

from cogds.core.geometry import ClipShape
from cogds.data.video.decode_task import DecodeTask, decode
from cogds.data.video.images import read_animation
from cogds.data.video.media import DecodeError, num_frames_at, probe_image, probe_video, read_clip, read_image
from cogds.data.video.probe_task import ProbeTask, probe_file
from tests.conftest import ROOT
from tests.data.video import ffmpeg
from tests.data.video.pictures import covering, numbered, numbers, psnr

P3 = {"color_primaries": 12, "transfer_characteristics": 13, "matrix_coefficients": 1}


def picture(height: int, width: int) -> np.ndarray:
    """Smooth colors, different in every corner."""
    return covering(np.random.default_rng(0).integers(20, 236, (4, 6, 3)), height, width).round().astype(np.uint8)


def save_heic(path: Path, pixels: np.ndarray, **options: object) -> Path:
    pillow_heif.from_pillow(Image.fromarray(pixels)).save(path, quality=95, **options)
    return path


def test_a_photo_made_of_tiles_is_read_whole(tmp_path: Path) -> None:
    """As phones write them. FFmpeg takes its first tile for a video."""
    pixels = picture(128, 192)
    path = save_heic(tmp_path / "a.HEIC", pixels, tile_size=64)
    assert probe_image(path) == probe_file(ProbeTask("image", str(path)))
    assert (probe_image(path).width, probe_image(path).height) == (192, 128)
    assert psnr(read_image(path, 64, 96), covering(pixels, 64, 96)) > 35
    for read in (probe_video, lambda path: read_clip(path, ClipShape(1, 64, 96), 25)):
        with pytest.raises(DecodeError, match=r"photo.*image"):
            read(path)


def test_a_turned_photo_is_upright(tmp_path: Path) -> None:
    """By the property `irot`: number of quarter turns counterclockwise."""
    pixels, exif = picture(120, 200), Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(np.rot90(pixels))
    image.info["exif"] = exif.tobytes()
    pillow_heif.from_pillow(image).save(tmp_path / "a.heic", quality=95)  # stores the picture upright, and the turn
    assert b"irot\x03" in (tmp_path / "a.heic").read_bytes()
    assert probe_image(tmp_path / "a.heic").height == 200
    assert psnr(read_image(tmp_path / "a.heic", 200, 120), np.rot90(pixels, 3)) > 35


def test_heic_without_its_package_says_what_to_install(tmp_path: Path) -> None:
    path = save_heic(tmp_path / "a.heic", picture(64, 96))
    code = (
        "import sys\nsys.modules['pillow_heif'] = None\n"
        "from cogds.data.video.probe_task import ProbeTask, categorize, probe_file\n"
        "try: probe_file(ProbeTask('image', sys.argv[1]))\n"
        "except Exception as error: print(type(error).__name__, categorize(str(error)))"
    )
    said = subprocess.check_output([sys.executable, "-c", code, str(path)], text=True, timeout=60, cwd=ROOT)
    assert said.startswith("DecodeError package missing: ")
    assert "pip install --upgrade pillow pillow-heif" in said


@pytest.mark.parametrize("transfer", [16, 18])
def test_an_hdr_photo_is_refused(tmp_path: Path, transfer: int) -> None:
    tags = {"color_primaries": 9, "transfer_characteristics": transfer, "matrix_coefficients": 9}
    path = save_heic(tmp_path / "a.heic", picture(64, 96), **tags)
    with pytest.raises(DecodeError, match="HDR photo"):
        probe_image(path)


COLORS = np.array([(200, 30, 40), (40, 180, 60), (30, 60, 190), (220, 170, 140), (128, 128, 128), (250, 250, 250)])


def p3_profile() -> bytes:
    """Display P3 with the curve of gamma 2.2 in the bytes of an sRGB profile."""
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = bytearray(lab)
    # XYZ of red, green and blue, adapted to D50.
    for tag, xyz in (
        (b"rXYZ", (0.5151, 0.2412, -0.0011)),
        (b"gXYZ", (0.2920, 0.6922, 0.0419)),
        (b"bXYZ", (0.1571, 0.0666, 0.7841)),
    ):
        at = int.from_bytes(data[(entry := data.index(tag)) + 4 : entry + 8])
        data[at + 8 : at + 20] = b"".join(round(value * 65536).to_bytes(4, signed=True) for value in xyz)
    text = "sRGB built-in"
    return bytes(data).replace(
        text.encode("utf-16-be"), "P3 by the test".ljust(len(text))[: len(text)].encode("utf-16-be")
    )


@pytest.mark.parametrize("suffix", ["png", "jpg", "heic", "tags.heic", "webp", "avif", "tif"])
def test_photos_in_a_wide_gamut_are_converted(tmp_path: Path, suffix: str) -> None:
    """Phones write Display P3, by a profile or by tags."""
    linear = np.where(COLORS <= 10, COLORS / 255 / 12.92, ((COLORS / 255 + 0.055) / 1.055) ** 2.4)
    to_p3 = np.array([[0.822462, 0.177538, 0], [0.033194, 0.966806, 0], [0.017083, 0.072397, 0.910520]])
    stored = 255 * (1.055 * (linear @ to_p3.T) ** (1 / 2.4) - 0.055)
    pixels = stored.round().astype(np.uint8).repeat(16, 0)[None].repeat(16, 0)
    path = tmp_path / f"a.{suffix}"
    image = Image.fromarray(pixels)
    if suffix == "tags.heic":
        save_heic(path, pixels, **P3)
    elif suffix == "heic":
        image.info["icc_profile"] = p3_profile()
        pillow_heif.from_pillow(image).save(path, quality=95)
    else:
        image.save(path, icc_profile=p3_profile(), **({} if suffix in ("png", "tif") else {"quality": 95}))
    read = read_image(path, 16, 96)[8, 8::16].astype(int)
    assert np.abs(read - COLORS).max() <= (2 if suffix in ("png", "tif") else 8)
    assert np.abs(read - COLORS).mean() < np.abs(stored - COLORS).mean() / 2


def test_a_broken_profile_is_ignored(tmp_path: Path) -> None:
    Image.fromarray(picture(16, 24)).save(tmp_path / "a.png", icc_profile=b"no profile" * 20)
    assert np.array_equal(read_image(tmp_path / "a.png", 16, 24), picture(16, 24))


DURATIONS_MS = [100, 50, 200, 30, 10, 400, 70, 60]


def animation(path: Path) -> Path:
    first, *others = map(Image.fromarray, numbered(len(DURATIONS_MS)))
    lossless = {"lossless": True} if path.suffix == ".webp" else {}
    first.save(path, save_all=True, append_images=others, duration=DURATIONS_MS, loop=0, **lossless)
    return path


def shown_at(times_s: np.ndarray) -> list[int]:
    starts = np.cumsum([0, *DURATIONS_MS[:-1]]) / 1000
    return (np.searchsorted(starts, times_s + 0.0006, side="right") - 1).tolist()


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "apng", "avif"])
@pytest.mark.parametrize("kind", ["video", "image"])
def test_animations_are_read_by_their_times(tmp_path: Path, suffix: str, kind: str) -> None:
    path = animation(tmp_path / f"a.{suffix}")
    info = probe_file(ProbeTask(kind, str(path)))
    assert (info.num_frames, info.width, info.height) == (8, 96, 64)
    assert info.duration_s == pytest.approx(sum(DURATIONS_MS) / 1000)
    num = num_frames_at(info, 20)
    assert num == round(info.duration_s * 20 + 0.4)

    def frames(num: int, start_s: float) -> np.ndarray:
        return decode(DecodeTask(str(path), kind, None, start_s, ClipShape(num, 64, 96), 20, "pyav")).pixels

    assert numbers(frames(num, 0)) == shown_at(np.arange(num) / 20)
    assert numbers(frames(4, 0.35)) == shown_at(0.35 + np.arange(4) / 20)
    assert numbers(frames(1, 0.35)) == shown_at(np.array([0.35]))
    with pytest.raises(DecodeError, match="ends too early"):
        frames(num + 1, 0)
    if suffix == "gif":  # FFmpeg's program reads no animated WebP and other frames of AVIF
        times, pictures = ffmpeg.shown(path)
        assert numbers(pictures) == list(range(8))
        assert times == pytest.approx(np.cumsum([0, *DURATIONS_MS[:-1]]) / 1000)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
@pytest.mark.parametrize("kind", ["video", "image"])
def test_a_still_picture_of_such_a_format_has_one_frame(tmp_path: Path, suffix: str, kind: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(numbered(6)[5]).save(path)
    info = probe_file(ProbeTask(kind, str(path)))
    assert (info.num_frames, num_frames_at(info, 16)) == (1, 1)
    task = DecodeTask(str(path), kind, None, 0.0, ClipShape(1, 64, 96), 16, "pyav")
    assert numbers(decode(task).pixels) == [5]


@pytest.mark.parametrize("share", [0.3, 0.7, 0.95])
def test_a_truncated_animation_is_refused(tmp_path: Path, share: float) -> None:
    data = animation(tmp_path / "a.webp").read_bytes()
    (tmp_path / "a.webp").write_bytes(data[: int(share * len(data))])
    for read in (probe_video, probe_image, lambda path: read_clip(path, ClipShape(9, 64, 96), 20)):
        with pytest.raises(DecodeError, match="image"):
            read(tmp_path / "a.webp")


def test_pages_of_a_tiff_are_no_animation(tmp_path: Path) -> None:
    first, *others = map(Image.fromarray, numbered(3))
    first.save(tmp_path / "a.tif", save_all=True, append_images=others)
    assert probe_image(tmp_path / "a.tif").num_frames == 1
    assert numbers(read_image(tmp_path / "a.tif", 64, 96)[None]) == [0]


def test_a_bug_is_not_reported_as_a_bad_image(tmp_path):
    pictures = [Image.new("RGB", (16, 16), (shade, 0, 0)) for shade in (0, 100, 200)]
    pictures[0].save(tmp_path / "a.webp", save_all=True, append_images=pictures[1:], duration=100)
    with pytest.raises(TypeError):  # in another module of the package, while the image is open
        read_animation(tmp_path / "a.webp", ClipShape(1, 16, 16), ["no time"])
