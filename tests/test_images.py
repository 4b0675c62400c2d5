import io

import numpy as np
import pytest
from PIL import Image

from pipelines import images

LIMITS = images.Limits(10_000, min_side=8)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def test_bytes_and_floats_are_inverse_for_every_value():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    floats = images.to_floats(pixels)
    assert floats.shape == (1, 3, 16, 16)
    assert (floats.min(), floats.max()) == (-1.0, 1.0)
    assert np.array_equal(images.to_bytes(floats), pixels)


def test_floats_outside_the_range_are_clipped():
    assert images.to_bytes(np.full((3, 1, 1), 7.0)).tolist() == [[[255, 255, 255]]]
    assert images.to_bytes(np.full((3, 1, 1), -7.0)).tolist() == [[[0, 0, 0]]]


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "CMYK", "RGBA", "LA"])
def test_every_common_mode_becomes_rgb(mode):
    kind = "TIFF" if mode == "CMYK" else "PNG"
    image = images.decode(encoded(Image.new("RGB", (9, 8), "red").convert(mode), kind), LIMITS).image
    assert (image.mode, image.size) == ("RGB", (9, 8))


def test_transparency_shows_the_background():
    clear = encoded(Image.new("RGBA", (8, 8), (9, 9, 9, 0)))
    assert images.decode(clear, LIMITS, "lime").image.getpixel((0, 0)) == (0, 255, 0)


def test_orientation_of_a_photograph_is_honoured():
    image = Image.new("RGB", (20, 10), "white")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    assert images.decode(encoded(image, "JPEG", exif=exif), LIMITS).image.size == (10, 20)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "undecodable"),
        (b"no picture at all", "undecodable"),
        (encoded(Image.effect_noise((64, 64), 50))[:900], "undecodable"),
        (encoded(Image.new("RGB", (200, 200))), "too_large"),
        (encoded(Image.new("RGB", (90, 3))), "too_small"),
        (encoded(Image.new("F", (64, 64)), "TIFF"), "unsupported"),
    ],
)
def test_what_is_no_usable_picture_is_refused_with_its_reason(data, reason):
    with pytest.raises(images.ImageError) as raised:
        images.decode(data, LIMITS)
    assert raised.value.reason == reason


def test_fit_crops_the_middle():
    image = Image.new("RGB", (30, 10), "red")
    image.paste("blue", (10, 0, 20, 10))
    assert np.array_equal(images.fit(image, 10), np.full((10, 10, 3), (0, 0, 255), dtype=np.uint8))


def test_png_keeps_every_byte_and_its_metadata():
    pixels = np.random.default_rng(0).integers(256, size=(5, 7, 3), dtype=np.uint8)
    data = images.to_png(pixels, {"seed": "7"})
    assert np.array_equal(images.from_png(data), pixels)
    assert Image.open(io.BytesIO(data)).text["seed"] == "7"


def test_opacity_is_full_where_there_is_none():
    assert (images.decode_alpha(encoded(Image.new("RGB", (3, 2)))) == 255).all()
