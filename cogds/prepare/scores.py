"""Scores of pictures: motion, sharpness, share of text, and hashes for near duplicates.

All are measured in pictures of a fixed size, so they compare between sources of any resolution and frame rate.
"""

import functools
from typing import Any

import cv2
import numpy as np

# One thread, because worker processes share the cores, and so that the number of cores does not change a score.
cv2.setNumThreads(1)

# Longer side of pictures in which text is searched [px]. At 736 px of the shorter side, RapidOCR's default, a search
# takes four times as long.
TEXT_SIDE = 640
NUM_HASHES = 4
_HASH_SIDE = 32
_HASH_BYTES = 8
# Pictures with less contrast, such as black ones, have no hash: all of them would be duplicates.
_MIN_CONTRAST = 2.0


def mean_speed(before: np.ndarray, after: np.ndarray, seconds: float) -> float:
    """How fast the picture moves on average, in shares of its longer side per second.

    It is the mean length of the optical flow (DIS, Kroeger et al. 2016). before, after: uint8 [H, W, 3].
    """
    flow = _flow_finder().calc(_gray(before), _gray(after), None)
    return float(np.hypot(flow[..., 0], flow[..., 1]).mean()) / max(before.shape) / seconds


@functools.cache
def _flow_finder() -> Any:
    return cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_FAST)


def sharpness(picture: np.ndarray) -> float:
    """Variance of the Laplacian of the luma, in 8-bit levels. picture: uint8 [H, W, 3]."""
    return float(cv2.Laplacian(_gray(picture), cv2.CV_32F).var())


def text_share(picture: np.ndarray) -> float:
    """Share of the picture covered by text, in [0, 1]: the boxes found by RapidOCR. picture: uint8 [H, W, 3]."""
    boxes = _text_finder()(np.ascontiguousarray(picture[..., ::-1]), use_det=True, use_cls=False, use_rec=False).boxes
    if boxes is None:
        return 0.0
    covered = np.zeros(picture.shape[:2], np.uint8)
    cv2.fillPoly(covered, [np.round(box).astype(np.int32) for box in boxes], 1)
    return float(covered.mean())


@functools.cache
def _text_finder() -> Any:
    from rapidocr import RapidOCR  # takes a second, and only this score needs it

    return RapidOCR(
        params={
            "Global.log_level": "error",
            "Global.use_cls": False,
            "Global.use_rec": False,
            "Det.limit_type": "max",
            "Det.limit_side_len": TEXT_SIDE,
            "EngineConfig.onnxruntime.intra_op_num_threads": 1,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        }
    )


def picture_hash(picture: np.ndarray) -> bytes:
    """A perceptual hash of 64 bits, which scaling and compression hardly change; zeros for a flat picture.

    The bits are the signs of the lowest frequencies (DCT) relative to their median. picture: uint8 [H, W, 3].
    """
    small = cv2.resize(_gray(picture), (_HASH_SIDE, _HASH_SIDE), interpolation=cv2.INTER_AREA).astype(np.float32)
    if small.std() < _MIN_CONTRAST:
        return bytes(_HASH_BYTES)
    frequencies = cv2.dct(small)[:8, :8].ravel()
    return np.packbits(frequencies > np.median(frequencies[1:])).tobytes()


def _gray(picture: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
