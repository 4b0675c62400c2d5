import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

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


def test_sixteen_bit_grey_keeps_its_shades():
    ramp = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    for kind in ("PNG", "TIFF"):
        image = images.decode(encoded(Image.fromarray(ramp), kind), LIMITS).image
        assert np.array_equal(np.asarray(image)[..., 0].ravel(), np.arange(256))


def test_a_palette_and_grey_with_transparency_show_the_background():
    palette = Image.new("P", (8, 8), 3)
    palette.putpalette([level for level in range(256) for _ in "rgb"])
    for image in (Image.new("LA", (8, 8), (9, 0)), palette):
        options = {"transparency": 3} if image.mode == "P" else {}
        picture = images.decode(encoded(image, **options), LIMITS, "lime").image
        assert picture.getpixel((0, 0)) == (0, 255, 0)


def test_colour_profiles_are_brought_to_srgb():
    """A profile with swapped primaries: what is stored as pure red is another colour; in sRGB nothing changes."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    lab = ImageCms.createProfile("LAB")
    image = Image.new("RGB", (8, 8), (200, 30, 90))
    assert images.decode(encoded(image, icc_profile=srgb.tobytes()), LIMITS).image.getpixel((0, 0)) == (200, 30, 90)
    picture = images.decode(encoded(image, icc_profile=ImageCms.ImageCmsProfile(lab).tobytes()), LIMITS)
    assert picture.note == "colour profile unusable, taken as sRGB"
    assert picture.image.getpixel((0, 0)) == (200, 30, 90)


def gamma_profile(gamma):
    """sRGB's profile with every channel's curve replaced by a power: the bytes of an ICC file."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    start = len(data)
    data += curve
    for at in range(struct.unpack(">I", data[128:132])[0]):
        entry = 132 + 12 * at
        if data[entry : entry + 4] in (b"rTRC", b"gTRC", b"bTRC"):
            data[entry + 4 : entry + 12] = struct.pack(">II", start, len(curve))
    data[0:4] = struct.pack(">I", len(data))
    return bytes(data).replace("sRGB".encode("utf-16-be"), "gama".encode("utf-16-be"))


def test_a_profile_with_another_gamma_is_converted_by_its_formula():
    level = 128
    picture = images.decode(encoded(Image.new("RGB", (8, 8), (level,) * 3), icc_profile=gamma_profile(1.0)), LIMITS)
    linear = level / 255
    expected = 255 * (1.055 * linear ** (1 / 2.4) - 0.055)
    assert picture.note == ""
    assert picture.image.getpixel((0, 0)) == pytest.approx((expected,) * 3, abs=1.5)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_a_picture_with_unreadable_exif_is_still_a_picture(kind):
    data = encoded(Image.new("RGB", (12, 9), "red"), kind, exif=b"Exif\0\0garbage here")
    picture = images.decode(data, LIMITS)
    assert (picture.image.size, picture.note) == ((12, 9), "EXIF unreadable, taken as upright")
    assert images.decode_alpha(data).shape == (9, 12)


def test_the_limit_on_pixels_is_the_one_that_was_set():
    """Pillow's own limit lies at 179 million."""
    data = encoded(Image.new("1", (14_000, 13_000)))
    with pytest.raises(images.ImageError, match="14000x13000 has a side under 13001 pixels"):
        images.decode(data, images.Limits(200_000_000, min_side=13_001))
    with pytest.raises(images.ImageError, match="14000x13000 has more than 181000000 pixels"):
        images.decode(data, images.Limits(181_000_000))


def test_of_a_film_the_first_frame_is_taken():
    frames = [Image.new("RGB", (9, 9), colour) for colour in ("red", "blue")]
    film = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert images.decode(film, LIMITS).image.getpixel((0, 0)) == (255, 0, 0)


def test_a_large_photograph_decoded_small_is_nearly_the_same():
    size, limits = (1600, 1200), images.Limits(10**8)
    smooth = Image.effect_noise((80, 60), 90).resize(size, Image.Resampling.BICUBIC)
    photograph = encoded(
        Image.merge("RGB", [smooth, smooth.transpose(Image.Transpose.FLIP_LEFT_RIGHT), smooth]), "JPEG"
    )
    small = images.decode(photograph, limits, resolution=32).image
    assert small.size == (200, 150), "an eighth, and more than four times 32"
    whole = images.fit(images.decode(photograph, limits).image, 32).astype(float)
    error = np.square(images.fit(small, 32) - whole).mean()
    assert 10 * np.log10(255**2 / error) > 40


@pytest.mark.parametrize("how", ["crop", "pad", "stretch"])
def test_resizing_is_antialiased(how):
    """A fine checkerboard becomes grey, and not some of its own fields."""
    board = Image.fromarray((np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)).convert("RGB")
    assert np.abs(images.fit(board, 8, how).astype(int) - 127.5).max() < 3


@pytest.mark.parametrize("encoding", ["raw", "png"])
def test_stored_pixels_come_back(encoding):
    pixels = np.random.default_rng(0).integers(256, size=(16, 16, 3), dtype=np.uint8)
    assert np.array_equal(images.stored(images.encode(pixels, encoding), encoding, 16), pixels)
