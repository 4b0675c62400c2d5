"""Pictures: decode with limits, convert to RGB, resize, encode; floats in [-1, 1] inside, bytes outside."""

import io
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageOps, PngImagePlugin

from pipelines.config import PipelineError

Pixels = NDArray[np.uint8]
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


class ImageError(PipelineError):
    """Bytes that are no usable picture; `reason` is one word for accounting."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


def decode(data: bytes, max_pixels: int, background: str = "white", min_side: int = 1) -> Image.Image:
    """Bytes of a picture file -> RGB, upright, transparency laid over `background`.

    Raises ImageError where the bytes are no picture, are cut short, or lie outside the limits.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd metadata and of sizes; the limits here decide
            image = Image.open(io.BytesIO(data))
            _check_size(image, max_pixels, min_side)
            return _to_rgb(ImageOps.exif_transpose(image), background)
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise ImageError("undecodable", str(error) or type(error).__name__) from error


def decode_alpha(data: bytes) -> Pixels:
    """The opacity of a picture that `decode` accepted: uint8 [H, W], 255 everywhere where it has none."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGBA").getchannel("A"), dtype=np.uint8)


def fit(image: Image.Image, resolution: int) -> Pixels:
    """Resize the short side to `resolution` (Lanczos) and crop the middle: uint8 [H, W, 3]."""
    if image.size != (resolution, resolution):
        image = ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS)
    return np.asarray(image, dtype=np.uint8)


def to_png(pixels: Pixels, metadata: dict[str, str] | None = None) -> bytes:
    """uint8 [H, W, 3] -> PNG bytes, with text `metadata` where given."""
    info = PngImagePlugin.PngInfo()
    for key, value in (metadata or {}).items():
        info.add_itxt(key, value)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()


def from_png(data: bytes) -> Pixels:
    """PNG bytes that this project wrote -> uint8 [H, W, 3]."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"), dtype=np.uint8)


def to_floats(pixels: Pixels) -> NDArray[np.float32]:
    """uint8 [..., H, W, 3] -> float32 [..., 3, H, W] in [-1, 1]."""
    return np.moveaxis(pixels, -1, -3).astype(np.float32) / np.float32(127.5) - np.float32(1.0)


def to_bytes(floats: NDArray[Any]) -> Pixels:
    """Inverse of `to_floats`, rounding to the nearest byte and clipping."""
    scaled = np.rint((np.asarray(floats, dtype=np.float32) + np.float32(1.0)) * np.float32(127.5))
    return np.ascontiguousarray(np.moveaxis(np.clip(scaled, 0, 255).astype(np.uint8), -3, -1))


def _check_size(image: Image.Image, max_pixels: int, min_side: int) -> None:
    """Refuse by the header alone, before anything is decoded."""
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError("too_large", f"{width}x{height} has more than {max_pixels} pixels")
    if min(width, height) < min_side:
        raise ImageError("too_small", f"{width}x{height} has a side under {min_side} pixels")


def _to_rgb(image: Image.Image, background: str) -> Image.Image:
    """Lay transparency over the background; other modes are converted."""
    if image.mode == "P" or "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, ImageColor.getrgb(background))
        image = Image.alpha_composite(canvas, image)
    if image.mode.startswith("I") or image.mode == "F":
        raise ImageError("unsupported", f"mode {image.mode} (more than 8 bits a channel)")
    return image.convert("RGB")
