"""Scores of drawn pictures."""

import numpy as np
import pytest
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from cogds.data.video.frames import read_frame
from cogds.prepare.scores import mean_speed, picture_hash, sharpness, text_share
from cogds.report.quality import HARDLY_MOVES
from tests.prepare.films import scene


@pytest.mark.parametrize("size", [(96, 160), (144, 256), (256, 144)])
@pytest.mark.parametrize("speed", [0.0, 0.02, 0.1, 0.3])
def test_motion_is_the_speed_in_sides_per_second_whatever_the_size_and_frame_rate(size, speed):
    for seconds in (1 / 8, 1 / 12):
        before, after = scene(1, 2, speed * max(size) * seconds, size)
        moved_px = round(speed * max(size) * seconds)
        measured = mean_speed(before, after, seconds)
        assert measured == pytest.approx(moved_px / max(size) / seconds, rel=0.15, abs=0.003)


def test_noise_of_a_still_picture_is_hardly_motion():
    picture = scene(1, 1)[0].astype(np.float32)
    noise = np.random.default_rng(0).normal(0, 3, (2, *picture.shape))
    before, after = np.clip(picture + noise, 0, 255).astype(np.uint8)
    assert mean_speed(before, after, 1 / 8) < HARDLY_MOVES / 2


def test_blur_lowers_sharpness():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 160, 3), np.uint8))
    values = [sharpness(np.asarray(picture.filter(ImageFilter.GaussianBlur(radius)))) for radius in (0, 1, 2, 4)]
    assert values == sorted(values, reverse=True)
    assert sharpness(np.full((96, 160, 3), 128, np.uint8)) == 0.0


@pytest.mark.slow
def test_the_share_of_text_is_the_share_of_its_boxes(real_clips):
    picture = read_frame(real_clips / "bigbuckbunny.mp4", 2.0, 640)
    assert text_share(picture) == 0.0
    written = Image.fromarray(picture)
    font = ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf", 22)
    draw = ImageDraw.Draw(written)
    place, text = (120, 310), "It was a long way home to the woods"
    draw.text(place, text, font=font, fill="white", stroke_width=1, stroke_fill="black")
    left, top, right, bottom = draw.textbbox(place, text, font=font)
    share = (right - left) * (bottom - top) / (written.width * written.height)
    assert share < text_share(np.asarray(written)) < 2 * share  # RapidOCR's boxes have margins


def test_hashes_survive_scaling_and_compression_and_differ_between_pictures(tmp_path):
    hashes = []
    for number in range(6):
        picture = Image.fromarray(scene(number, 1)[0])
        picture.resize((100, 60), Image.Resampling.BICUBIC).save(tmp_path / "a.jpg", quality=40)
        own, copy = (
            int.from_bytes(picture_hash(np.asarray(image.convert("RGB"))))
            for image in (picture, Image.open(tmp_path / "a.jpg"))
        )
        assert (own ^ copy).bit_count() <= 6
        assert all((own ^ other).bit_count() > 12 for other in hashes)
        hashes.append(own)


def test_flat_pictures_have_no_hash():
    assert not any(picture_hash(np.zeros((96, 160, 3), np.uint8)))
    assert any(picture_hash(scene(1, 1)[0]))
