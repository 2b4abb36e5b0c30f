import pytest

from cogds.core.condition_modes import (
    MODES,
    ConditionSettings,
    Piece,
    condition_frames,
    draw_mode,
    pieces_of,
    settings_in_frames,
    used_modes,
)
from cogds.errors import UserError
from tests.published_model import PUBLISHED

V15, V10 = PUBLISHED["CogVideoX1.5-5B-I2V"], PUBLISHED["CogVideoX-5b-I2V"]
SETTINGS = ConditionSettings(context=2, keyframes=(0, 6, 16))


@pytest.mark.parametrize(
    "mode, pieces",
    [
        ("none", []),
        ("first", [Piece(range(1), 0)]),
        ("last", [Piece(range(16, 17), 5)]),
        ("first_last", [Piece(range(1), 0), Piece(range(16, 17), 5)]),
        ("prefix", [Piece(range(5), 1, padding=1)]),
        ("suffix", [Piece(range(12, 17), 4)]),
        ("keyframes", [Piece(range(1), 0), Piece(range(6, 7), 3), Piece(range(16, 17), 5)]),
    ],
)
def test_pieces_with_padding_in_front(mode, pieces):
    # 17 frames: 5 latent frames, padded in front to 6.
    assert list(pieces_of(mode, 17, V15, SETTINGS)) == pieces


def test_pieces_without_a_temporal_patch_are_not_padded():
    assert pieces_of("prefix", 17, V10, SETTINGS) == (Piece(range(5), 0),)
    assert pieces_of("last", 17, V10, SETTINGS) == (Piece(range(16, 17), 4),)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_frames", [1, 9, 13, 81])
def test_every_piece_lies_in_the_latent_frames_of_its_pixels(mode, num_frames):
    settings = ConditionSettings(2, (num_frames - 1,))
    num_latents = (num_frames - 1) // 4 + 1
    padding = num_latents % 2
    for piece in pieces_of(mode, num_frames, V15, settings):
        assert len(piece.frames) % 4 == 1
        for number, frame in enumerate(piece.frames[::4]):
            # The last pixel frame of each latent frame is 0, 4, 8, ...
            latent = (frame + 3) // 4
            is_first_image = piece.frames == range(1)
            assert piece.place + number == (0 if is_first_image else padding + latent)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "none"])
def test_a_single_frame_is_its_own_condition(mode):
    assert pieces_of(mode, 1, V15, SETTINGS) == (Piece(range(1), 0),)


@pytest.mark.parametrize("mode", ["prefix", "suffix"])
def test_a_context_as_long_as_the_clip_is_refused(mode):
    with pytest.raises(UserError, match=f"{mode}: a clip of 17 frames has 5 latent frames, and conditioning on 5"):
        pieces_of(mode, 17, V15, ConditionSettings(context=5))


@pytest.mark.parametrize(
    "keyframes, message",
    [((), "no times"), ((0, 17), "frame 17 is after the end of a clip of 17"), ((5, 8), "5 and 8 lie in the same")],
)
def test_impossible_keyframes_are_refused(keyframes, message):
    with pytest.raises(UserError, match=message):
        pieces_of("keyframes", 17, V15, ConditionSettings(keyframes=keyframes))


def test_frames_of_all_modes_without_the_first_image():
    assert condition_frames(["first"], 17, V15, SETTINGS) == ()
    assert condition_frames(["first_last", "keyframes"], 17, V15, SETTINGS) == (6, 16)
    assert condition_frames(["prefix", "last"], 17, V15, SETTINGS) == (0, 1, 2, 3, 4, 16)


def test_modes_are_drawn_with_their_probabilities():
    probabilities = {"prefix": 0.2, "first": 0.5, "none": 0.3}
    assert [draw_mode(probabilities, number) for number in (0.0, 0.49, 0.51, 0.69, 0.71, 0.999)] == [
        "first", "first", "prefix", "prefix", "none", "none",
    ]  # fmt: skip
    assert draw_mode({"first": 0.5, "last": 0.4999999}, 0.99999999) == "last"
    assert used_modes(probabilities) == ("first", "prefix", "none")


def test_seconds_become_frames():
    assert settings_in_frames(2, None, (2.5, 0), 16.0, V15) == ConditionSettings(2, (0, 40))
    assert settings_in_frames(2, 1.0, (), 16.0, V15).context == 4  # 13 frames
    assert settings_in_frames(2, 0.01, (), 16.0, V15).context == 2
