"""Pictures as arrays: decode, convert, resize, encode. uint8 [H, W, 3] outside, float [3, H, W] in [-1, 1] inside."""

import functools
import io
import json
import re
import struct
import warnings
import zlib
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms, ImageColor, ImageOps, PngImagePlugin, UnidentifiedImageError

from pipelines.config import Encoding, Fit, PipelineError

Pixels = NDArray[np.uint8]
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
# Suffixes of pictures that are not taken: these are told of, while a README among the pictures is no loss.
OTHER_SUFFIXES = (
    ".heic", ".heif", ".avif", ".jxl", ".jp2", ".svg", ".psd", ".ico", ".tga", ".eps", ".pdf", ".dng", ".cr2", ".nef",
    ".arw", ".raw", ".exr", ".hdr", ".ppm", ".pgm", ".qoi",
)  # fmt: skip
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
_OTHER_FORMATS = {
    "HEIC or AVIF": rb".{4}ftyp", "JPEG XL": rb"\xff\x0a|.{4}JXL ", "JPEG 2000": rb".{4}jP  ", "PSD": rb"8BPS",
    "SVG": rb"\s*(<\?xml[^>]*>)?\s*(<!--.*?-->|<!DOCTYPE[^>]*>)?\s*<svg", "PDF": rb"%PDF", "ICO": rb"\x00\x00\x01\x00",
    "PPM": rb"P[1-6]\s", "QOI": rb"qoif", "OpenEXR": rb"v/1\x01",
}  # fmt: skip
_SAVED: dict[str, dict[str, Any]] = {
    "png": {"format": "PNG"},
    "webp": {"format": "WEBP", "quality": 90},
    "jpeg": {"format": "JPEG", "quality": 95, "subsampling": 0},
}
# What a side of a picture may have at most, by the format's own limits (PNG: 2^31 - 1, more than is ever decoded)
LONGEST_SIDE = {"png": 2**31 - 1, "webp": 16_383, "jpeg": 65_500}
_DRAFT_GAP = 4
_SIXTEEN_BITS = 65_535
# What Pillow's decoders raise on damaged files, by its source and by trying.
_DECODER_ERRORS = (
    OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, ArithmeticError, AttributeError, RuntimeError,
    struct.error, zlib.error,
)  # fmt: skip


class ImageError(PipelineError):
    """Bytes that are no usable picture; `reason` is one word for accounting."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


class Picture(NamedTuple):
    """A decoded picture: RGB and upright; its format and colour mode as found; what was odd about it, or nothing."""

    image: Image.Image
    kind: str
    note: str


@dataclass(frozen=True)
class Limits:
    """What a picture may be: pixels at most and bytes at most (before decoding), and the shorter side at least."""

    max_pixels: int
    min_side: int = 1
    max_bytes: int = 256 * 2**20


def decode(data: bytes, limits: Limits, background: str = "white", resolution: int | None = None) -> Picture:
    """Bytes of a picture file -> RGB, upright, in sRGB, laid over `background` where it is transparent.

    Of several frames the first is taken. Where the `resolution` to come is given, a JPEG of many times that size is
    decoded at a half, a quarter or an eighth of it, which is never less than four times the resolution. Raises
    ImageError where the bytes are no picture, are damaged or cut short, or lie outside the limits.
    """
    if len(data) > limits.max_bytes:
        raise ImageError("too_large", f"{len(data)} bytes are more than {limits.max_bytes}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd metadata and of sizes; the limits here decide
            Image.MAX_IMAGE_PIXELS = limits.max_pixels  # checked by Pillow before it allocates
            image = _open(data, limits)
            kind = f"{image.format} {image.mode}"
            if resolution is not None and image.format in ("JPEG", "MPO"):
                image.draft(image.mode, (resolution * _DRAFT_GAP, resolution * _DRAFT_GAP))
            image.load()
            image, turned = _upright(image)
            rgb, note = _to_rgb(image, background)
            return Picture(rgb, kind, "; ".join(filter(None, (turned, note))))
    except Image.DecompressionBombError as error:
        raise ImageError("too_large", f"more than {limits.max_pixels} pixels ({error})") from error
    except UnidentifiedImageError as error:
        raise _unidentified(data) from error
    except _DECODER_ERRORS as error:
        raise ImageError("undecodable", str(error) or type(error).__name__) from error


def decode_alpha(data: bytes) -> Pixels:
    """The opacity of a picture that `decode` accepted: uint8 [H, W], 255 everywhere where it has none."""
    with warnings.catch_warnings(), Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        warnings.simplefilter("ignore")
        return np.asarray(_upright(image)[0].convert("RGBA").getchannel("A"), dtype=np.uint8)


def fit(image: Image.Image, resolution: int, how: Fit = "crop", background: str = "white") -> Pixels:
    """Resize to a square (Lanczos, antialiased): uint8 [H, W, 3].

    `crop` fills it and loses what sticks out, `pad` shows all on the background, `stretch` changes the proportions.
    """
    width, height = image.size
    if (width, height) == (resolution, resolution):
        return np.asarray(image, dtype=np.uint8)
    if how == "pad":
        scale = resolution / max(width, height)
        inner = (max(1, round(width * scale)), max(1, round(height * scale)))
        canvas = Image.new("RGB", (resolution, resolution), ImageColor.getrgb(background)[:3])
        canvas.paste(_resized(image, inner), ((resolution - inner[0]) // 2, (resolution - inner[1]) // 2))
        return np.asarray(canvas, dtype=np.uint8)
    side = min(width, height)
    left, top = ((width - side) / 2, (height - side) / 2) if how == "crop" else (0, 0)
    return np.asarray(
        _resized(image, (resolution, resolution), (left, top, width - left, height - top)), dtype=np.uint8
    )


def _resized(
    image: Image.Image, size: tuple[int, int], box: tuple[float, float, float, float] | None = None
) -> Image.Image:
    """Lanczos; from many times the size by means of whole blocks first, down to three times (error: half a level)."""
    return image.resize(size, Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)


def encode(pixels: Pixels, encoding: Encoding) -> bytes:
    """uint8 [H, W, 3] as it is stored in a dataset: without any metadata."""
    if encoding == "raw":
        return pixels.tobytes()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, **_SAVED[encoding])
    return buffer.getvalue()


def stored(data: bytes, encoding: Encoding, resolution: int) -> Pixels:
    """Inverse of `encode`: uint8 [H, W, 3]."""
    if encoding == "raw":
        return np.frombuffer(data, dtype=np.uint8).reshape(resolution, resolution, 3)
    return from_png(data)


def to_png(pixels: Pixels, metadata: dict[str, str] | None = None) -> bytes:
    """uint8 [H, W, 3] -> PNG bytes, the same for the same input; `metadata` becomes tEXt chunks in its order.

    (PNG specification, third edition, 11.3.3: a text that is not Latin-1 becomes an iTXt chunk.)
    """
    info = PngImagePlugin.PngInfo()
    for key, value in (metadata or {}).items():
        info.add_text(key, value)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()


def to_file(pixels: Pixels, kind: Literal["png", "jpeg", "webp"], metadata: dict[str, str], quality: int) -> bytes:
    """uint8 [H, W, 3] as a file; `metadata` becomes texts of a PNG, and one JSON text in the EXIF of others.

    `quality` (0 to 100) is that of jpeg and webp.
    """
    if kind == "png":
        return to_png(pixels, metadata)
    exif = Image.Exif()
    if metadata:
        exif[ExifTags.Base.ImageDescription] = json.dumps(metadata, sort_keys=True)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, **{**_SAVED[kind], "quality": quality}, exif=exif)
    return buffer.getvalue()


def from_png(data: bytes) -> Pixels:
    """Bytes of a picture file that this project wrote -> uint8 [H, W, 3]."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"), dtype=np.uint8)


def png_texts(data: bytes) -> dict[str, str]:
    """The texts that `to_png` was given as `metadata`. Raises ImageError where the bytes are no PNG."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            image.load()  # texts may stand behind the pixels
            return {key: str(value) for key, value in image.text.items()}  # type: ignore[attr-defined]
    except _DECODER_ERRORS as error:
        raise ImageError("undecodable", f"no PNG ({error})") from error


def to_floats(pixels: Pixels) -> NDArray[np.float32]:
    """uint8 [..., H, W, 3] -> float32 [..., 3, H, W] in [-1, 1]."""
    return np.moveaxis(pixels, -1, -3).astype(np.float32) / np.float32(127.5) - np.float32(1.0)


def to_bytes(floats: NDArray[Any]) -> Pixels:
    """Inverse of `to_floats`, rounding to the nearest byte and clipping."""
    scaled = np.rint((np.asarray(floats, dtype=np.float32) + np.float32(1.0)) * np.float32(127.5))
    return np.ascontiguousarray(np.moveaxis(np.clip(scaled, 0, 255).astype(np.uint8), -3, -1))


def _open(data: bytes, limits: Limits) -> Image.Image:
    """The picture with its header read and checked, its pixels still packed."""
    image = Image.open(io.BytesIO(data), formats=_FORMATS)
    width, height = image.size
    if width * height > limits.max_pixels:
        raise ImageError("too_large", f"{width}x{height} has more than {limits.max_pixels} pixels")
    if min(width, height) < limits.min_side:
        raise ImageError("too_small", f"{width}x{height} has a side under {limits.min_side} pixels")
    if image.format == "PNG":
        image.verify()  # checks every chunk's CRC, which decoding alone does not
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    return image


def _upright(image: Image.Image) -> tuple[Image.Image, str]:
    """The picture turned by its EXIF orientation, and a note where that cannot be read: its pixels may be whole."""
    try:
        return ImageOps.exif_transpose(image), ""
    except _DECODER_ERRORS:
        return image, "EXIF unreadable, taken as upright"


def _unidentified(data: bytes) -> ImageError:
    """Why bytes that no decoder took are no picture: a format that is not taken, or none at all."""
    for name, pattern in _OTHER_FORMATS.items():
        if re.match(pattern, data, re.DOTALL):
            return ImageError("unsupported", f"{name}; convert it to one of {', '.join(_FORMATS)}")
    return ImageError("undecodable", f"no known picture format in {len(data)} bytes" if data else "empty, 0 bytes")


def _to_rgb(image: Image.Image, background: str) -> tuple[Image.Image, str]:
    """RGB in sRGB with transparency laid over the background, and a note where something was passed over."""
    profile = image.info.get("icc_profile", b"")
    image, alpha = _split_alpha(_to_eight_bits(image))
    image, note = _to_srgb(image, profile) if profile else (image.convert("RGB"), "")
    if alpha is None or alpha.getextrema() == (255, 255):
        return image, note
    canvas = Image.new("RGB", image.size, ImageColor.getrgb(background)[:3])
    # Through Pillow's own compositing, whose rounding is that of RGBA pictures.
    image.putalpha(alpha)
    return Image.alpha_composite(canvas.convert("RGBA"), image).convert("RGB"), note


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey as 8-bit grey; other modes as they are. Raises ImageError on modes without a known range."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min(initial=0) < 0 or values.max(initial=0) > _SIXTEEN_BITS:
            raise ImageError("unsupported", f"mode {image.mode} with values over 16 bits")
        return Image.fromarray(np.rint(values / 257).astype(np.uint8))
    if image.mode in ("F", "LAB"):
        raise ImageError("unsupported", f"mode {image.mode}")
    return image


def _split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """The colours and the opacity, None where there is no transparency; palettes become colours."""
    if image.mode == "P" or "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        grey = image.mode in ("L", "LA", "La")
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        return (image.getchannel("R") if grey else image.convert("RGB")), alpha
    return (image.convert("L") if image.mode == "1" else image), None


def _to_srgb(image: Image.Image, profile: bytes) -> tuple[Image.Image, str]:
    """The picture's colours by its ICC profile in sRGB; a profile that does not fit the picture is noted."""
    try:
        transform = _transform(profile, image.mode)
        return (image.convert("RGB") if transform is None else ImageCms.applyTransform(image, transform)), ""  # type: ignore[return-value]
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image.convert("RGB"), "colour profile unusable, taken as sRGB"


@functools.lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Colour transform from a profile to sRGB; None where it is sRGB already."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    if "sRGB" in ImageCms.getProfileDescription(source):
        return None
    return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
