"""Images and clips as encoded files of bounded size."""

import io

import numpy as np
from PIL import Image

MAX_SIDE = 2048  # longer side of an image, pixels
MAX_PNG_BYTES = 1 << 20  # an image with a larger PNG is a photograph and becomes a JPEG
JPEG_QUALITY = 90
MAX_GIF_SIDE = 512  # longer side of a GIF, pixels
MAX_GIF_FPS = 8.0
MAX_GIF_FRAMES = 96


def encode_image(pixels: np.ndarray) -> tuple[bytes, int, int]:
    """Encode uint8 [H, W, 3] as a PNG, or as a JPEG if that is large; return the data, height and width."""
    image = _shrink(Image.fromarray(_check(pixels, 3)), MAX_SIDE)
    data = _encode(image, format="PNG", optimize=False)
    if len(data) > MAX_PNG_BYTES:
        data = _encode(image, format="JPEG", quality=JPEG_QUALITY)
    return data, image.height, image.width


def encode_gif(frames: np.ndarray, fps: float) -> tuple[bytes, int, int]:
    """Encode uint8 [F, H, W, 3] as a GIF that loops at the clip's own speed; return the data, height and width.

    A GIF is large and has 256 colors, so it is a preview only: at most MAX_GIF_SIDE pixels, MAX_GIF_FPS and
    MAX_GIF_FRAMES. Frames in between are left out.
    """
    frames = _check(frames, 4)
    step = max(1, round(fps / MAX_GIF_FPS), -(-len(frames) // MAX_GIF_FRAMES))
    images = [_shrink(Image.fromarray(frame), MAX_GIF_SIDE) for frame in frames[::step]]
    # One palette for all frames: with one per frame, areas that do not move flicker.
    palette = images[len(images) // 2].quantize(256)
    first, *rest = [image.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG) for image in images]
    data = _encode(
        first, format="GIF", save_all=True, append_images=rest, duration=round(1000 * step / fps), loop=0, disposal=1
    )
    return data, first.height, first.width


def _check(pixels: np.ndarray, num_axes: int) -> np.ndarray:
    if pixels.dtype != np.uint8 or pixels.ndim != num_axes or pixels.shape[-1] != 3 or not pixels.size:
        expected = "[F, H, W, 3]" if num_axes == 4 else "[H, W, 3]"
        raise ValueError(f"pixels are {pixels.dtype} {pixels.shape} instead of uint8 {expected}")
    return np.ascontiguousarray(pixels)


def _shrink(image: Image.Image, max_side: int) -> Image.Image:
    scale = max_side / max(image.size)
    if scale >= 1:
        return image
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _encode(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, **options)  # type: ignore[arg-type]
    return buffer.getvalue()
