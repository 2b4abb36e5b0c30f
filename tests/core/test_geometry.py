import pytest

from cogds.core.geometry import (
    ClipShape,
    check_shape,
    latent_frames,
    num_tokens,
    padded_latent_frames,
    token_grid,
)
from cogds.errors import UserError
from tests.published_model import PUBLISHED

V15, V10 = PUBLISHED["CogVideoX1.5-5B-I2V"], PUBLISHED["CogVideoX-5b-I2V"]
TEXT_10, SINCOS = PUBLISHED["CogVideoX-5b"], PUBLISHED["CogVideoX-2b"]


@pytest.mark.parametrize(
    "text, latents, padded, tokens",
    [
        ("81x768x1360", 21, 22, 45106),  # 22 / 2 * 48 * 85 + 226
        ("81x480x720", 21, 22, 15076),
        ("49x480x720", 13, 14, 9676),
        ("13x64x64", 4, 4, 258),
        ("1x64x64", 1, 2, 242),
    ],
)
def test_latents_and_tokens(text, latents, padded, tokens):
    shape = ClipShape.parse(text)
    assert latent_frames(shape.frames, V15) == latents
    assert padded_latent_frames(shape.frames, V15) == padded
    assert num_tokens(shape, V15) == tokens


def test_no_padding_without_a_temporal_patch():
    assert token_grid(ClipShape(49, 480, 720), V10) == (13, 30, 45)


def test_a_shape_survives_a_round_trip():
    assert str(ClipShape.parse(" 81x768x1360 ")) == "81x768x1360"


@pytest.mark.parametrize("text", ["81x768", "ax1x2", "81x0x16", "81*768*1360", ""])
def test_invalid_shape_texts_are_refused(text):
    with pytest.raises(UserError, match="FRAMESxHEIGHTxWIDTH"):
        ClipShape.parse(text)


@pytest.mark.parametrize(
    "geometry, text, message",
    [
        (V15, "80x768x1360", "^data.buckets: 80x768x1360 .* 81x768x1360"),
        (V15, "81x770x1366", "^data.buckets: 81x770x1366 .* 81x768x1360"),
        (V15, "81x2416x64", "^data.buckets: 81x2416x64 .* 2400 pixels high"),
        (V15, "81x64x2416", "^data.buckets: 81x64x2416 .* 2400 wide"),
        (V10, "49x480x704", "^data.buckets: 49x480x704 .* 49x480x720"),
        (V10, "33x480x720", "^data.buckets: 33x480x720 .* 49x480x720"),
    ],
)
def test_unsupported_shapes_are_refused(geometry, text, message):
    with pytest.raises(UserError, match=message):
        check_shape(ClipShape.parse(text), geometry)


@pytest.mark.parametrize(
    "geometry, text",
    [
        (V15, "81x2400x2400"), (V15, "1x16x16"), (V10, "49x480x720"), (TEXT_10, "49x480x720"), (TEXT_10, "1x768x1360"),
        (SINCOS, "49x480x720"), (SINCOS, "81x720x480"),
    ],
)  # fmt: skip
def test_supported_shapes_pass(geometry, text):
    check_shape(ClipShape.parse(text), geometry)
