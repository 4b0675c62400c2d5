"""Perceptual hash of a picture: close for pictures that look alike."""

import functools

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.images import Pixels

_SIDE, _KEPT = 32, 8
_LUMA = np.array([0.299, 0.587, 0.114])
_COLOUR_GRID = 2
COLOUR_DISTANCE = 24


def perceptual_hash(pixels: Pixels) -> tuple[int, bytes]:
    """64 bits: the signs of the lowest 8x8 DCT coefficients of the luma about their median (Zauner 2010, pHash).

    The second value is the mean colours of the quarters, for the hash knows no colour. pixels: uint8 [H, W, 3].
    """
    small = np.asarray(Image.fromarray(pixels).resize((_SIDE, _SIDE), Image.Resampling.BOX), dtype=np.float64)
    luma = small @ _LUMA
    block = np.round((_dct() @ luma @ _dct().T)[:_KEPT, :_KEPT].ravel(), 3)  # flat pictures: zeros, not rounding errors
    bits = block > np.median(block[1:])  # the first is the mean, far from all others
    quarters = small.reshape(_COLOUR_GRID, _SIDE // _COLOUR_GRID, _COLOUR_GRID, -1, 3).mean(axis=(1, 3))
    return int(np.packbits(bits).view(">u8")[0]), np.rint(quarters).astype(np.uint8).tobytes()


@functools.cache
def _dct() -> NDArray[np.float64]:
    """The DCT-II matrix [32, 32]."""
    k, n = np.arange(_SIDE)[:, None], np.arange(_SIDE)
    return np.cos(np.pi * k * (2 * n + 1) / (2 * _SIDE))
