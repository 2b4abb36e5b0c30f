"""Colors of HDR and wide-gamut video as BT.709, by the formulas of the ITU. Pure functions.

HDR is mapped as in BT.2408: its reference white of 203 cd/m2 becomes the white of SDR. Everything darker looks as it
does on an HDR display, and brighter highlights are clipped to white. Of flat patches, the result is within 1 of 255
levels. (FFmpeg's own conversion in swscale is up to 10 levels off, because it compresses highlights, and it takes 4 s
for each stream.) A frame of 768x1360 takes 90 ms for PQ or wide gamut and 120 ms for HLG.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

SDR_WHITE = 203.0  # cd/m2, reference white of HDR by BT.2408
_HLG_PEAK, _HLG_GAMMA = 1000.0, 1.2  # the nominal display of BT.2100
_PQ_PEAK = 10000.0
_SDR_GAMMA = 2.4  # BT.1886

# AVColorTransferCharacteristic, AVColorPrimaries and AVColorSpace: the numbers of ITU-T H.273.
_UNSPECIFIED = 2
_SRGB, _PQ, _HLG = 13, 16, 18
_UNSUPPORTED_CURVES = {8: "linear", 9: "logarithmic", 10: "logarithmic", 17: "SMPTE ST 428-1"}
_BT709, _BT2020, _XYZ = 1, 9, 10
# (x, y) of red, green, blue and white.
_D65 = (0.3127, 0.3290)
_PRIMARIES = {
    _BT709: ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060), _D65),
    _BT2020: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046), _D65),
    11: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), (0.314, 0.351)),  # DCI-P3
    12: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), _D65),  # Display P3
}
# Those that FFmpeg converts to RGB. It would read the others as BT.601.
_MATRICES = {0, 1, 2, 3, 4, 5, 6, 7, 9}


class UnsupportedColorsError(Exception):
    """The colors of a video cannot be converted. The message says which they are."""


@dataclass(frozen=True)
class Colors:
    """Color tags of a picture, by the numbers of H.273."""

    primaries: int
    transfer: int
    matrix: int

    @property
    def is_hdr(self) -> bool:
        """Whether the picture has to be tone-mapped."""
        return self.transfer in (_PQ, _HLG)

    @property
    def is_wide(self) -> bool:
        """Whether the picture's primaries have to be converted."""
        return self.primaries in _PRIMARIES and self.primaries != _BT709

    def check(self) -> None:
        """Raise UnsupportedColorsError if the picture cannot be converted."""
        if self.transfer in _UNSUPPORTED_CURVES:
            raise UnsupportedColorsError(f"a {_UNSUPPORTED_CURVES[self.transfer]} transfer curve")
        if self.primaries == _XYZ:
            raise UnsupportedColorsError("XYZ primaries")
        if self.matrix not in _MATRICES:
            raise UnsupportedColorsError(f"matrix {self.matrix} of H.273")


def to_bt709(rgb: np.ndarray, colors: Colors) -> np.ndarray:
    """Convert R'G'B' of the colors, uint16 [H, W, 3] of full range, to uint8 R'G'B' of BT.709."""
    primaries = colors.primaries if colors.primaries in _PRIMARIES else (_BT2020 if colors.is_hdr else _BT709)
    linear = _curve(colors.transfer)[rgb]
    if colors.transfer == _HLG:
        # The display's system gamma, from scene light to display light.
        luminance = linear @ _to_xyz(_BT2020)[1].astype(np.float32)
        linear *= _HLG_PEAK / SDR_WHITE * luminance[..., None] ** np.float32(_HLG_GAMMA - 1)
    linear = linear @ _to_709(primaries).T
    # The square root spreads dark values, so that 16 bits are enough.
    index = np.sqrt(np.clip(linear, 0, 1, out=linear), out=linear)
    index *= 65535
    return _to_8_bits(colors.transfer)[np.rint(index, out=index).astype(np.uint16)]


@functools.cache
def _curve(transfer: int) -> np.ndarray:
    """float32 [65536]: light of each 16-bit value. 1 is the white of SDR, but for HLG, the peak of the scene."""
    value = np.arange(65536) / 65535
    if transfer == _PQ:  # SMPTE ST 2084
        root = value ** (1 / 78.84375)
        light = (np.maximum(root - 0.8359375, 0) / (18.8515625 - 18.6875 * root)) ** (1 / 0.1593017578125)
        light *= _PQ_PEAK / SDR_WHITE
    elif transfer == _HLG:  # BT.2100
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        light = np.where(value <= 0.5, value**2 / 3, (np.exp((value - c) / a) + b) / 12)
    elif transfer == _SRGB:
        light = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    else:
        light = value**_SDR_GAMMA
    return light.astype(np.float32)


@functools.cache
def _to_8_bits(transfer: int) -> np.ndarray:
    """uint8 [65536]: value for the square root of light, by the curve of sRGB if it was decoded by that."""
    light = (np.arange(65536) / 65535) ** 2
    value = light ** (1 / _SDR_GAMMA)
    if transfer == _SRGB:
        value = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return np.rint(255 * value).astype(np.uint8)


@functools.cache
def _to_709(primaries: int) -> np.ndarray:
    """float32 [3, 3]: from linear RGB of the primaries to that of BT.709. White stays white."""
    return (np.linalg.inv(_to_xyz(_BT709)) @ _to_xyz(primaries)).astype(np.float32)


def _to_xyz(primaries: int) -> np.ndarray:
    """float64 [3, 3]: from linear RGB to XYZ, scaled so that white is (1, 1, 1) in RGB."""
    x, y = np.array(_PRIMARIES[primaries]).T
    xyz = np.stack([x / y, np.ones(4), (1 - x - y) / y])
    return xyz[:, :3] * np.linalg.solve(xyz[:, :3], xyz[:, 3])
