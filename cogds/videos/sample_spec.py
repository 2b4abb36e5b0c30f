"""What a video is made from: a prompt's states, a first frame, a size and a seed."""

import hashlib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cogds.core.buckets import assign
from cogds.core.geometry import ClipShape, ModelGeometry, check_shape
from cogds.data.video.media import DecodeError, probe_image, read_image
from cogds.errors import UserError


@dataclass(frozen=True)
class Scene:
    """pixels uint8 [H, W, 3]: the first frame; states [text_tokens, dim]: T5's, of the prompt."""

    prompt: str
    shape: ClipShape
    seed: int
    pixels: np.ndarray
    states: torch.Tensor

    def name(self, num_steps: int, guidance: float) -> str:
        """For files: the prompt's first words, and a digest of what makes the frames but the model.

        Not of the frame rate and the convention of the image latents (`conditioning.image_latents`), of which a run has
        one each.
        """
        made_by = repr((self.prompt, str(self.shape), self.seed, num_steps, guidance)).encode() + self.pixels.tobytes()
        return f"{slug(self.prompt)}-{hashlib.blake2b(made_by, digest_size=4).hexdigest()}"


def slug(text: str, length: int = 40) -> str:
    """A text as part of a file's name: its first words, of any language, joined by dashes."""
    kept = (one if one.isalnum() or unicodedata.category(one)[0] == "M" else " " for one in text.lower())
    words = unicodedata.normalize("NFKC", "".join(kept)).split()
    return "-".join(words)[:length].rstrip("-") or "video"


def first_frame(
    image: str, size: str | None, buckets: Sequence[ClipShape], geometry: ModelGeometry
) -> tuple[ClipShape, np.ndarray]:
    """The video's shape, and a picture file as its first frame: uint8 [H, W, 3], resized to cover, then cropped.

    size: FRAMESxHEIGHTxWIDTH; None: that of the buckets which crops the picture least. Raises UserError where the model
    cannot take the size, and where the picture cannot be read.
    """
    try:
        shape = ClipShape.parse(size) if size else fitting_bucket(image, buckets)
        check_shape(shape, geometry)
        return shape, read_image(image, shape.height, shape.width)
    except DecodeError as error:
        raise UserError(f"{image}: {error}") from None


def fitting_bucket(image: str, buckets: Sequence[ClipShape]) -> ClipShape:
    """The bucket of videos that crops a picture least, the longest of several. Raises video.DecodeError."""
    info = probe_image(image)
    videos = [shape for shape in buckets if shape.frames > 1] or list(buckets)
    chosen = assign(max(shape.frames for shape in videos), info.height, info.width, videos)
    return videos[chosen or 0]
