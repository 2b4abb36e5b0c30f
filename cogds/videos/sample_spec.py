"""What a video is generated from: text states, first frame, size and seed."""

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
class SampleSpec:
    """The inputs of one generated video.

    pixels: the first frame, uint8 [H, W, 3]. states: T5 states of the prompt, [text_tokens, dim].
    """

    prompt: str
    shape: ClipShape
    seed: int
    pixels: np.ndarray
    states: torch.Tensor

    def file_stem(self, num_steps: int, guidance: float) -> str:
        """Return the prompt's first words and a digest of all inputs except the weights.

        The frame rate and `conditioning.image_latents` are not in the digest: they are the same for a whole run.
        """
        inputs = repr((self.prompt, str(self.shape), self.seed, num_steps, guidance)).encode() + self.pixels.tobytes()
        return f"{slug(self.prompt)}-{hashlib.blake2b(inputs, digest_size=4).hexdigest()}"


def slug(text: str, max_length: int = 40) -> str:
    """Return the first words of a text in any language, joined by dashes, for use in a file name."""
    letters = (char if char.isalnum() or unicodedata.category(char)[0] == "M" else " " for char in text.lower())
    words = unicodedata.normalize("NFKC", "".join(letters)).split()
    return "-".join(words)[:max_length].rstrip("-") or "video"


def load_first_frame(
    image: str, size: str | None, buckets: Sequence[ClipShape], geometry: ModelGeometry, size_key: str = "--size"
) -> tuple[ClipShape, np.ndarray]:
    """Return the shape of a video and its first frame, uint8 [H, W, 3], resized to cover that shape and cropped.

    size: FRAMESxHEIGHTxWIDTH, or None for the bucket that crops the image least. size_key: the key or flag that sets
    it. Raises UserError if the model does not support the size or the image cannot be read.
    """
    try:
        shape = ClipShape.parse(size, size_key) if size else best_bucket(image, buckets)
        check_shape(shape, geometry, size_key)
        return shape, read_image(image, shape.height, shape.width)
    except (DecodeError, OSError) as error:
        raise UserError(f"{image}: {error}") from None


def best_bucket(image: str, buckets: Sequence[ClipShape]) -> ClipShape:
    """Return the video bucket that crops an image least; of several, the longest. Raises DecodeError."""
    info = probe_image(image)
    return buckets[assign(max(shape.frames for shape in buckets), info.height, info.width, buckets) or 0]
