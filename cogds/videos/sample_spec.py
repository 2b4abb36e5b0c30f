"""What a video is generated from: text states, in image-to-video a first frame, size and seed."""

import dataclasses
import hashlib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cogds.config.schema import PromptConfig, RunConfig
from cogds.core.buckets import assign
from cogds.core.geometry import ClipShape, ModelGeometry, check_shape
from cogds.data.video.kinds import kind_of
from cogds.data.video.media import DecodeError, probe_image, probe_video, read_clip, read_image
from cogds.errors import UserError
from cogds.model.pipelines import Conditions
from cogds.videos.conditions import ConditionFiles, modes_of, read_conditions


@dataclass(frozen=True)
class SampleSpec:
    """The inputs of one generated video.

    states: T5 states of the prompt, [text_tokens, dim]. control: latents of the control video, [1, F, C, H, W], scaled
    and padded; None without one. control_source: identifies the control video, on any device.
    """

    prompt: str
    shape: ClipShape
    seed: int
    conditions: Conditions
    states: torch.Tensor
    control: torch.Tensor | None = None
    control_source: str = ""

    def file_stem(self, num_steps: int, guidance: float) -> str:
        """Return the prompt's first words, the mode unless it is a first frame, and a digest of all inputs.

        The weights are not in the digest.

        The frame rate and `conditioning.image_latents` are not in the digest: they are the same for a whole run.
        """
        inputs = repr((self.prompt, str(self.shape), self.seed, num_steps, guidance)).encode()
        inputs += b"".join(array.tobytes() for array in self.conditions.arrays())
        inputs += self.control_source.encode()
        modes = modes_of(self.conditions)
        kind = "" if modes in (("first",), ("none",)) else "-" + "-".join(modes)
        return f"{slug(self.prompt)}{kind}-{hashlib.blake2b(inputs, digest_size=4).hexdigest()}"


def slug(text: str, max_length: int = 40) -> str:
    """Return the first words of a text in any language, joined by dashes, for use in a file name."""
    letters = (char if char.isalnum() or unicodedata.category(char)[0] == "M" else " " for char in text.lower())
    words = unicodedata.normalize("NFKC", "".join(letters)).split()
    return "-".join(words)[:max_length].rstrip("-") or "video"


def load_first_frame(
    image: str | None, size: str | None, buckets: Sequence[ClipShape], geometry: ModelGeometry, size_key: str = "--size"
) -> tuple[ClipShape, np.ndarray | None]:
    """Return the shape of a video and its first frame, uint8 [H, W, 3], resized to cover that shape and cropped.

    size: FRAMESxHEIGHTxWIDTH, or None for the bucket that crops the image least. size_key: the key or flag that sets
    it. Of a video, its first frame is used. In text-to-video, there is no image, and the default is the largest bucket.
    Raises UserError if the model does not support the size, needs an image or takes none, or the image cannot be read.
    """
    if image is None or not geometry.family.takes_image:
        check_image(image, geometry)
        shape = ClipShape.parse(size, size_key) if size else largest_bucket(buckets)
        check_shape(shape, geometry, size_key)
        return shape, None
    try:
        shape = ClipShape.parse(size, size_key) if size else best_bucket(image, buckets)
        check_shape(shape, geometry, size_key)
        if kind_of(image) == "video":
            return shape, read_clip(image, dataclasses.replace(shape, frames=1), fps=1.0)[0]
        return shape, read_image(image, shape.height, shape.width)
    except (DecodeError, OSError) as error:
        raise UserError(f"{image}: {error}. Choose another image.") from None


def load_conditions(
    prompt: PromptConfig, cfg: RunConfig, buckets: Sequence[ClipShape], geometry: ModelGeometry, key: str
) -> tuple[ClipShape, Conditions]:
    """Return the shape of a video of `sample.prompts` and the frames that it is given. key: of the prompt, for errors.

    Raises UserError if a file cannot be used, or does not fit into the video.
    """
    files = ConditionFiles(prompt.last_image, prompt.video)
    sized_by = prompt.image or prompt.last_image or prompt.video
    shape, pixels = load_first_frame(sized_by, prompt.size, buckets, geometry, f"{key}.size")
    if sized_by is None:
        return shape, Conditions()
    image = None if prompt.image is None else pixels
    context = cfg.condition_settings(geometry).context
    return shape, read_conditions(image, files, context, shape, cfg.data.fps, geometry)


def read_control(file: str, shape: ClipShape, fps: float, key: str) -> np.ndarray:
    """Read the beginning of a control video: uint8 [F, H, W, 3]. Raises UserError, naming the key or flag."""
    try:
        return read_clip(file, shape, fps)
    except (DecodeError, OSError) as error:
        raise UserError(f"{key}: {file}: {error}. Choose another video.") from None


def check_prompts(cfg: RunConfig, buckets: Sequence[ClipShape], geometry: ModelGeometry) -> None:
    """Raise UserError if training could not make a video of one of its prompts, because of its files or size."""
    for index, prompt in enumerate(cfg.sample.prompts if cfg.sample.every is not None else ()):
        key = f"sample.prompts[{index}]"
        try:
            shape, _ = load_conditions(prompt, cfg, buckets, geometry, key)
            if prompt.control:
                read_control(prompt.control, shape, cfg.data.fps, f"{key}.control")
        except UserError as error:
            message = str(error)
            for flag, name in (("--last-image", "last_image"), ("--video", "video"), ("--context", "video")):
                if message.startswith(f"{flag}: "):
                    message = f"{key}.{name}: {message.removeprefix(f'{flag}: ')}"
            raise UserError(message if message.startswith(key) else f"{key}.image: {message}") from None


def check_image(image: str | None, geometry: ModelGeometry) -> None:
    """Raise UserError if an image-to-video model gets no image, or a text-to-video model gets one."""
    if geometry.family.takes_image and image is None:
        raise UserError("no image is given, but this model makes videos from a first frame and a prompt. Pass one.")
    if not geometry.family.takes_image and image is not None:
        raise UserError(f"{image} is given, but this model makes videos from the prompt alone. Leave it out.")


def largest_bucket(buckets: Sequence[ClipShape]) -> ClipShape:
    """The video bucket with the most pixels, or the image bucket if there are only those."""
    return max(buckets, key=lambda shape: (shape.frames > 1, shape.frames * shape.height * shape.width))


def best_bucket(image: str, buckets: Sequence[ClipShape]) -> ClipShape:
    """Return the video bucket that crops an image least; of several, the longest. Raises DecodeError."""
    info = probe_video(image) if kind_of(image) == "video" else probe_image(image)
    return buckets[assign(max(shape.frames for shape in buckets), info.height, info.width, buckets) or 0]
