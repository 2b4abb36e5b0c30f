"""Pixels as files of bounded size: one picture, or frames that play."""

import io

import numpy as np
from PIL import Image

MAX_SIDE = 2048  # pixels of a picture's longer side
MAX_PNG_BYTES = 1 << 20  # a picture that is larger than this without loss is a photograph: it becomes a JPEG
JPEG_QUALITY = 90
MAX_PLAYED_SIDE = 480  # pixels of an animation's longer side
MAX_PLAYED_FPS = 8.0
MAX_PLAYED_FRAMES = 96


def encode_picture(pixels: np.ndarray) -> tuple[bytes, int, int]:
    """uint8 [H, W, 3] as a PNG, or a JPEG where that is large, with its height and width: at most MAX_SIDE."""
    image = _shrunk(Image.fromarray(_checked(pixels, 3)), MAX_SIDE)
    data = _saved(image, format="PNG", optimize=False)
    if len(data) > MAX_PNG_BYTES:
        data = _saved(image, format="JPEG", quality=JPEG_QUALITY)
    return data, image.height, image.width


def encode_animation(frames: np.ndarray, fps: float) -> tuple[bytes, int, int]:
    """uint8 [F, H, W, 3] as a GIF that plays for ever at the clip's own speed, with its height and width.

    A GIF is large and has 256 colours: it is for a look, no more. At most MAX_PLAYED_SIDE pixels, MAX_PLAYED_FPS and
    MAX_PLAYED_FRAMES; frames between are left out.
    """
    frames = _checked(frames, 4)
    step = max(1, round(fps / MAX_PLAYED_FPS), -(-len(frames) // MAX_PLAYED_FRAMES))
    images = [_shrunk(Image.fromarray(frame), MAX_PLAYED_SIDE) for frame in frames[::step]]
    # One palette for all: with one a frame, still places flicker.
    palette = images[len(images) // 2].quantize(256)
    first, *rest = [image.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG) for image in images]
    data = _saved(
        first, format="GIF", save_all=True, append_images=rest, duration=round(1000 * step / fps), loop=0, disposal=1
    )
    return data, first.height, first.width


def _checked(pixels: np.ndarray, num_axes: int) -> np.ndarray:
    if pixels.dtype != np.uint8 or pixels.ndim != num_axes or pixels.shape[-1] != 3 or not pixels.size:
        raise ValueError(f"pixels are {pixels.dtype} {pixels.shape}, not uint8 [{'F, ' * (num_axes == 4)}H, W, 3]")
    return np.ascontiguousarray(pixels)


def _shrunk(image: Image.Image, most: int) -> Image.Image:
    scale = most / max(image.size)
    if scale >= 1:
        return image
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _saved(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, **options)  # type: ignore[arg-type]
    return buffer.getvalue()
