"""How a picture of any size lies in the square that a model works on, and how the answer comes back to its own size."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.images import Pixels

_FILTER = Image.Resampling.LANCZOS


@dataclass(frozen=True)
class Frame:
    """A picture of `width` x `height` pixels in a square of `side`: whole, centred, its longer side filling it.

    What is left at the shorter side repeats the picture's edge. A picture of the square's own size stays as it is.
    """

    width: int
    height: int
    side: int

    @property
    def is_whole(self) -> bool:
        """Whether the picture has the square's own size."""
        return (self.width, self.height) == (self.side, self.side)

    @property
    def _inner(self) -> tuple[int, int]:
        """Width and height of the picture inside the square."""
        scale = self.side / max(self.width, self.height)
        return max(1, round(self.width * scale)), max(1, round(self.height * scale))

    @property
    def _corner(self) -> tuple[int, int]:
        """Left and top of the picture inside the square."""
        width, height = self._inner
        return (self.side - width) // 2, (self.side - height) // 2

    def put(self, image: Image.Image) -> Pixels:
        """The picture (RGB) in the square: uint8 [side, side, 3]."""
        if self.is_whole:
            return np.asarray(image, dtype=np.uint8)
        inner = np.asarray(image.resize(self._inner, _FILTER, reducing_gap=3.0), dtype=np.uint8)
        return np.pad(inner, (*self._padding, (0, 0)), mode="edge")

    def put_mask(self, mask: NDArray[np.float32]) -> NDArray[np.float32]:
        """Where to repaint, float32 [H, W] from 0 (keep) to 1 -> float32 [side, side].

        In a picture that was resized a place is known only where all of it is; what lies beyond its edge is not known.
        """
        if self.is_whole:
            return mask
        shares = Image.fromarray(mask).resize(self._inner, Image.Resampling.BOX)
        touched = (np.asarray(shares) > 0).astype(np.float32)
        padded: NDArray[np.float32] = np.pad(touched, self._padding, constant_values=np.float32(1.0))
        return padded

    def take(self, pixels: Pixels) -> Pixels:
        """The answer uint8 [side, side, 3] in the picture's own size: uint8 [H, W, 3]."""
        if self.is_whole:
            return pixels
        (left, top), (width, height) = self._corner, self._inner
        inner = Image.fromarray(pixels[top : top + height, left : left + width])
        return np.asarray(inner.resize((self.width, self.height), _FILTER), dtype=np.uint8)

    @property
    def _padding(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Rows above and below, columns left and right of the picture."""
        (left, top), (width, height) = self._corner, self._inner
        return (top, self.side - height - top), (left, self.side - width - left)


def mixed(own: Pixels, painted: Pixels, mask: NDArray[np.float32]) -> Pixels:
    """`own` where mask [H, W] is 0, byte for byte, `painted` where it is 1, each uint8 [H, W, 3]."""
    share = mask[:, :, None]
    both: Pixels = np.rint(own * (np.float32(1.0) - share) + painted * share).astype(np.uint8)
    return both
