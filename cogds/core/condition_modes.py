"""Ways to condition a clip on frames of its own: which pixel frames, encoded how, at which latent frames.

    mode        condition                                                     encoded as
    first       the first frame (diffusers' image-to-video)                   an image
    last        the last frame                                                an image
    first_last  both: interpolation, and loops if they are equal              two images
    prefix      the first latent frames of the clip: continuation             a video
    suffix      the last latent frames of the clip                            a video
    keyframes   frames at given times                                         an image each
    none        nothing

The condition has a latent for every latent frame of the clip, and zeros at those that are free. A latent is placed at
the latent frame that its pixel frame lies in, after padding in front:

    pixel frame           0     1-4    5-8    9-12   13-16
    latent frame          0     1      2      3      4        (of 17 frames, temporal compression 4)
    padded latent frame   0, 1  2      3      4      5        (temporal patch size 2)

The latent of frame 0 as an image is placed at padded latent frame 0 only, as in diffusers. A prefix is padded in front
with copies of its first latent, as the clip itself is. The VAE is causal, so that the first latent of any video is that
of a single frame: a suffix of k latent frames starts at the last pixel frame of its first latent frame.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from cogds.core.geometry import ModelGeometry, latent_frames, padding_frames
from cogds.errors import UserError

Mode = Literal["first", "last", "first_last", "prefix", "suffix", "keyframes", "none"]
MODES: tuple[Mode, ...] = get_args(Mode)
DEFAULT_MODES: tuple[Mode, ...] = ("first",)
MIN_CONTEXT = 2  # latent frames of a prefix or suffix; one alone would be an image


@dataclass(frozen=True)
class ConditionSettings:
    """What the modes depend on, in frames.

    Attributes:
        context: latent frames that `prefix` and `suffix` condition on, at least MIN_CONTEXT.
        keyframes: pixel frames that `keyframes` conditions on, ascending.
    """

    context: int = MIN_CONTEXT
    keyframes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Piece:
    """Pixel frames that the VAE encodes together, and where their latents are placed.

    Attributes:
        frames: consecutive pixel frames, 4n + 1 of them.
        place: padded latent frame of their first latent.
        padding: copies of the first latent in front of `place`.
    """

    frames: range
    place: int
    padding: int = 0

    def places(self, geometry: ModelGeometry) -> range:
        """The padded latent frames that it sets."""
        return range(self.place - self.padding, self.place + latent_frames(len(self.frames), geometry))


def pieces_of(mode: Mode, num_frames: int, geometry: ModelGeometry, settings: ConditionSettings) -> tuple[Piece, ...]:
    """Return the pieces of the condition of a clip of `num_frames` pixel frames.

    A clip of one frame is conditioned on that frame in every mode but `none`. Raises UserError if the clip is too short
    for the mode.
    """
    if mode == "none":
        return ()
    if mode == "first" or num_frames == 1:
        return (_image(0, num_frames, geometry),)
    if mode == "last":
        return (_image(num_frames - 1, num_frames, geometry),)
    if mode == "first_last":
        return (_image(0, num_frames, geometry), _image(num_frames - 1, num_frames, geometry))
    if mode == "keyframes":
        return _keyframes(num_frames, geometry, settings.keyframes)
    latents = latent_frames(num_frames, geometry)
    if settings.context >= latents:
        raise UserError(
            f"{mode}: a clip of {num_frames} frames has {latents} latent frames, and conditioning on "
            f"{settings.context} of them leaves none to generate. Use a shorter prefix and suffix, or longer clips."
        )
    length = pixel_frames(settings.context, geometry)
    padding = padding_frames(latents, geometry.patch_size_t)
    if mode == "prefix":
        return (Piece(range(length), padding, padding),)
    return (Piece(range(num_frames - length, num_frames), padding + latents - settings.context),)


def pixel_frames(num_latent_frames: int, geometry: ModelGeometry) -> int:
    """Number of pixel frames of a video with this number of latent frames."""
    return (num_latent_frames - 1) * geometry.vae_temporal + 1


def condition_frames(
    modes: Iterable[Mode], num_frames: int, geometry: ModelGeometry, settings: ConditionSettings
) -> tuple[int, ...]:
    """Return the pixel frames that the pieces of all modes need, ascending, without frame 0 as an image.

    That image is kept apart, because a dataset may have another image for it. Raises UserError as `pieces_of`.
    """
    pieces = [piece for mode in modes for piece in pieces_of(mode, num_frames, geometry, settings)]
    return tuple(sorted({frame for piece in pieces if not is_first_image(piece) for frame in piece.frames}))


def is_first_image(piece: Piece) -> bool:
    """Whether a piece is the first frame as an image."""
    return piece.frames == range(1)


def draw_mode(probabilities: Mapping[Mode, float], uniform: float) -> Mode:
    """Return the mode for a uniform number in [0, 1). The order of the mapping does not matter."""
    chosen: Mode = "none"
    for mode in MODES:
        if probability := probabilities.get(mode, 0.0):
            chosen = mode  # the last one, if rounding leaves the sum below `uniform`
            uniform -= probability
            if uniform < 0:
                break
    return chosen


def used_modes(probabilities: Mapping[Mode, float]) -> tuple[Mode, ...]:
    """Return the modes with a probability above 0, in the order of MODES."""
    return tuple(mode for mode in MODES if probabilities.get(mode, 0.0) > 0)


def settings_in_frames(
    context_latents: int,
    context_s: float | None,
    keyframe_times: Iterable[float],
    fps: float,
    geometry: ModelGeometry,
) -> ConditionSettings:
    """Convert the settings of a run (`ConditioningConfig`) at a frame rate. `context_s` replaces `context_latents`."""
    if context_s is not None:
        context_latents = max(MIN_CONTEXT, latent_frames(max(1, round(context_s * fps)), geometry))
    return ConditionSettings(context_latents, tuple(sorted({round(time * fps) for time in keyframe_times})))


def _image(frame: int, num_frames: int, geometry: ModelGeometry) -> Piece:
    """A single pixel frame at its latent frame. Frame 0 is placed at padded latent frame 0, as in diffusers."""
    if frame == 0:
        return Piece(range(1), 0)
    padding = padding_frames(latent_frames(num_frames, geometry), geometry.patch_size_t)
    return Piece(range(frame, frame + 1), padding + -(-frame // geometry.vae_temporal))


def _keyframes(num_frames: int, geometry: ModelGeometry, frames: tuple[int, ...]) -> tuple[Piece, ...]:
    if not frames:
        raise UserError("keyframes: no times are given. Pass at least one.")
    if max(frames) >= num_frames:
        raise UserError(
            f"keyframes: frame {max(frames)} is after the end of a clip of {num_frames} frames. Use earlier times, or "
            "longer clips."
        )
    pieces = tuple(_image(frame, num_frames, geometry) for frame in frames)
    places = [piece.place for piece in pieces]
    for frame, before, place, place_before in zip(frames[1:], frames, places[1:], places):
        if place == place_before:
            raise UserError(
                f"keyframes: frames {before} and {frame} lie in the same latent frame, which holds "
                f"{geometry.vae_temporal} pixel frames. Use times that are further apart."
            )
    return pieces
