"""Pictures with known content, and exact resizing and conversion in floating point to compare with."""

import av
import numpy as np


def numbered(num_frames: int, height: int = 64, width: int = 96) -> np.ndarray:
    """Frames that show their number in binary, as eight bright or dark columns, lowest bit on the left."""
    frames = np.empty((num_frames, height, width, 3), np.uint8)
    for k in range(num_frames):
        for bit in range(8):
            frames[k, :, bit * width // 8 : (bit + 1) * width // 8] = 220 if k >> bit & 1 else 30
    return frames


def numbers(clip: np.ndarray) -> list[int]:
    columns = clip.mean(axis=(1, 3)).reshape(len(clip), 8, -1).mean(axis=2)
    return [sum(1 << bit for bit in range(8) if row[bit] > 125) for row in columns]


def bicubic(size: int, new_size: int) -> np.ndarray:
    """Weights [new_size, size] of an antialiased bicubic filter, a = -0.5."""
    scale = size / new_size
    centers, support = (np.arange(new_size) + 0.5) * scale, max(scale, 1.0)
    x = np.abs((np.arange(size) + 0.5 - centers[:, None]) / support)
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0))
    return weights / weights.sum(axis=1, keepdims=True)


def resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Antialiased bicubic resize in floating point, the reference for all resizing tests."""
    rows, columns = bicubic(image.shape[0], height), bicubic(image.shape[1], width)
    return np.einsum("yh,hwc,xw->yxc", rows, image.astype(np.float64), columns, optimize=True).clip(0, 255)


def doubled(size: int, new_size: int, shift: float) -> np.ndarray:
    """Weights [new_size, size] of a bicubic interpolation (a = -0.6, as in FFmpeg) to twice the size."""
    positions = (np.arange(new_size) + 0.5) / 2 - 0.5 + shift
    near = np.floor(positions)[:, None] + np.arange(-1, 3)
    x = np.abs(positions[:, None] - near)
    values = np.where(x < 1, 1.4 * x**3 - 2.4 * x**2 + 1, -0.6 * x**3 + 3 * x**2 - 4.8 * x + 2.4)
    weights = np.zeros((new_size, size))
    np.add.at(weights, (np.arange(new_size)[:, None], near.clip(0, size - 1).astype(int)), values)
    return weights


def exact(frame: av.VideoFrame) -> np.ndarray:
    """RGB of a yuv420p frame with limited range in floating point, by the definition of BT.601, not rounded."""
    y, u, v = (np.frombuffer(p, np.uint8).reshape(p.height, -1)[:, : p.width].astype(float) for p in frame.planes)
    assert (frame.format.name, frame.colorspace, frame.color_range) == ("yuv420p", 2, 0)
    # Chroma samples are at the even columns, and between the rows.
    rows, columns = doubled(u.shape[0], y.shape[0], 0), doubled(u.shape[1], y.shape[1], 0.25)
    y, u, v = (y - 16) / 219, *(rows @ (plane - 128) @ columns.T / 224 for plane in (u, v))
    red, blue = y + 1.402 * v, y + 1.772 * u
    return 255 * np.stack([red, (y - 0.299 * red - 0.114 * blue) / 0.587, blue], axis=2).clip(0, 1)


def psnr(image: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(1e-9, np.square(image.astype(np.float64) - other).mean())))


def covering(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """The image resized to cover a size, and cropped."""
    scale = max(height / image.shape[0], width / image.shape[1])
    size = max(height, round(image.shape[0] * scale)), max(width, round(image.shape[1] * scale))
    return center_crop(resized(image, *size), height, width)


def center_crop(image: np.ndarray, height: int, width: int) -> np.ndarray:
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return image[top : top + height, left : left + width]
