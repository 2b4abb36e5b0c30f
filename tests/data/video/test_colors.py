"""Colors of HDR and wide gamut. Clips are made by the formulas of the ITU in the direction of the encoder."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cogds.core.geometry import ClipShape
from cogds.data.video.media import DecodeError, probe_video, read_clip
from tests.data.video import ffmpeg

COLORS = np.array([
    (200, 30, 40), (40, 180, 60), (30, 60, 190), (220, 170, 140), (128, 128, 128), (20, 20, 20), (250, 250, 250),
    (255, 255, 255),
])  # fmt: skip
# From linear BT.709, as in ITU-R BT.2087 and in the CSS definition of Display P3.
TO_BT2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])
TO_P3 = np.array([[0.822462, 0.177538, 0], [0.033194, 0.966806, 0], [0.017083, 0.072397, 0.910520]])


def pq(light: np.ndarray) -> np.ndarray:
    """SMPTE ST 2084. light: 1 is 203 cd/m2."""
    y = (light * 203 / 10000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * y) / (1 + 18.6875 * y)) ** 78.84375


def hlg(light: np.ndarray) -> np.ndarray:
    """BT.2100, for a display of 1000 cd/m2."""
    light = light * 203 / 1000
    luminance = light @ [0.2627, 0.6780, 0.0593]
    scene = light * np.maximum(luminance, 1e-9)[..., None] ** (1 / 1.2 - 1)
    log = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), log)


def gamma(light: np.ndarray) -> np.ndarray:
    return light ** (1 / 2.4)


def patches(path: Path, light: np.ndarray, curve: Callable[[np.ndarray], np.ndarray], tags: str) -> Path:
    """A lossless 16-bit clip with a patch of 16x16 pixels for each color. light: linear in the clip's primaries."""
    signal = np.clip(curve(light), 0, 1).repeat(16, 0)[None, None].repeat(16, 1)
    frames = np.round(signal * 65535).astype("<u2").repeat(3, 0)
    primaries, transfer, matrix = tags.split()
    filters = f"scale=out_color_matrix={matrix}:out_range=tv:flags=accurate_rnd,format=yuv444p16le"
    marks = f"setparams=color_primaries={primaries}:color_trc={transfer}:colorspace={matrix}"
    return ffmpeg.make(path, frames, 25, "-vf", f"{filters},{marks}", "-c:v", "ffv1")


def read(path: Path) -> np.ndarray:
    """The color of each patch."""
    clip = read_clip(path, ClipShape(1, 16, 16 * len(COLORS)), 25)
    return clip[0, 8, 8::16].astype(int)


@pytest.mark.parametrize("curve, matrix, tags, processing", [
    (pq, TO_BT2020, "bt2020 smpte2084 bt2020nc", "tone-mapped from HDR"),
    (hlg, TO_BT2020, "bt2020 arib-std-b67 bt2020nc", "tone-mapped from HDR"),
    (pq, TO_P3, "smpte432 smpte2084 bt2020nc", "tone-mapped from HDR"),
    (gamma, TO_BT2020, "bt2020 bt2020-10 bt2020nc", "converted from a wide gamut"),
    (gamma, TO_P3, "smpte432 bt709 bt709", "converted from a wide gamut"),
    (gamma, np.eye(3), "bt709 bt709 bt709", ""),
])  # fmt: skip
def test_colors_are_those_of_bt709(
    tmp_path: Path, curve: Callable[[np.ndarray], np.ndarray], matrix: np.ndarray, tags: str, processing: str
) -> None:
    light = (COLORS / 255) ** 2.4 @ matrix.T
    path = patches(tmp_path / "a.mkv", light, curve, tags)
    assert probe_video(path).processing == processing
    assert np.abs(read(path) - COLORS).max() <= 1
    if processing:
        with pytest.raises(DecodeError, match=r"data\.decoder=pyav"):
            read_clip(path, ClipShape(1, 16, 128), 25, decoder="decord")


@pytest.mark.parametrize("curve, tags", [(pq, "bt2020 smpte2084 bt2020nc"), (hlg, "bt2020 arib-std-b67 bt2020nc")])
def test_highlights_are_white(tmp_path: Path, curve: Callable[[np.ndarray], np.ndarray], tags: str) -> None:
    light = np.array([0.5, 0.9, 1, 1.1, 1.5, 2, 3, 4.9])[:, None].repeat(3, 1)
    path = patches(tmp_path / "a.mkv", light, curve, tags)
    expected = np.round(255 * np.minimum(1, light) ** (1 / 2.4))
    assert np.abs(read(path) - expected).max() <= 1


@pytest.mark.parametrize("tags", ["bt709 linear bt709", "bt709 log100 bt709", "smpte428 bt709 bt709"])
def test_colors_that_cannot_be_converted_are_refused(tmp_path: Path, tags: str) -> None:
    path = patches(tmp_path / "a.mkv", COLORS / 255, gamma, tags)
    for read in (probe_video, lambda path: read_clip(path, ClipShape(1, 16, 128), 25)):
        with pytest.raises(DecodeError, match="colors are not supported"):
            read(path)


def test_dolby_vision_without_other_tags_is_refused(tmp_path: Path) -> None:
    options = ("-c:v", "libx265", "-pix_fmt", "yuv420p10le", "-tag:v", "hvc1", "-x265-params", "log-level=none")
    path = ffmpeg.make(tmp_path / "a.mp4", np.zeros((3, 64, 96, 3), np.uint8), 25, *options)
    assert probe_video(path).num_frames == 3
    path.write_bytes(path.read_bytes().replace(b"hvc1", b"dvh1"))
    with pytest.raises(DecodeError, match="Dolby Vision"):
        probe_video(path)
