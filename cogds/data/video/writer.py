"""Writing videos."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cogds.errors import UserError
from cogds.files import whole_file

if TYPE_CHECKING:
    import torch

_FASTSTART = {"movflags": "+faststart"}


def write_video(
    path: str | Path, frames: np.ndarray | torch.Tensor, fps: float, crf: int = 18, num_threads: int = 0
) -> None:
    """Encode uint8 [F, H, W, 3] as H.264 (yuv420p) with faststart. The file appears under its name when it is complete.

    num_threads: 0 lets x264 choose. With 1, the same frames give the same file on every machine. Raises UserError for
    odd sizes, which yuv420p does not support, and ValueError for any other kind of array.
    """
    import av

    pixels = np.asarray(frames)
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3 or not len(pixels):
        raise ValueError(f"frames must be uint8 [F, H, W, 3] with F > 0: got {pixels.dtype} {list(pixels.shape)}")
    height, width = pixels.shape[1:3]
    if height % 2 or width % 2:
        raise UserError(f"{path}: H.264 requires an even height and width, but the frames are {height}x{width}.")
    with whole_file(path) as partial, av.open(str(partial), "w", format="mp4", options=_FASTSTART) as container:
        # 29.97 becomes 30000/1001, a fraction in which timestamps can be counted exactly.
        rate = Fraction(fps).limit_denominator(1001)
        options = {"crf": str(crf)}
        if num_threads == 1:
            options["x264-params"] = "asm=0"  # output of the AVX-512 code differs from run to run
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.codec_context.thread_count = num_threads
        for image in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
        container.mux(stream.encode())
