import numpy as np
import pytest
from PIL import Image

from pipelines.frame import Frame, mixed


def picture(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8))


def test_a_picture_of_the_squares_own_size_stays_as_it_is():
    frame, image = Frame(8, 8, 8), picture(8, 8)
    assert np.array_equal(frame.put(image), np.asarray(image))
    assert np.array_equal(frame.take(frame.put(image)), np.asarray(image))
    mask = np.random.default_rng(1).random((8, 8), dtype=np.float32)
    assert np.array_equal(frame.put_mask(mask), mask)


@pytest.mark.parametrize("size", [(20, 13), (13, 20), (5, 5), (8, 3), (1, 300), (300, 1), (31, 32)])
def test_a_picture_is_whole_in_the_square_and_comes_back_in_its_own_size(size):
    frame = Frame(*size, 8)
    grey = Image.new("RGB", size, (10, 120, 250))
    assert np.array_equal(frame.put(grey), np.full((8, 8, 3), (10, 120, 250), np.uint8)), "edges are repeated"
    back = frame.take(frame.put(picture(*size)))
    assert back.shape == (size[1], size[0], 3)


def test_a_wide_picture_lies_in_the_middle_and_its_edge_goes_on_above_and_below():
    image = Image.fromarray(np.arange(16, dtype=np.uint8).repeat(8 * 3).reshape(16, 8, 3)[:4] * 20)
    square = Frame(8, 4, 8).put(image)
    assert np.array_equal(square[2:6], np.asarray(image))
    assert np.array_equal(square[:2], np.repeat(np.asarray(image)[:1], 2, axis=0))
    assert np.array_equal(square[6:], np.repeat(np.asarray(image)[-1:], 2, axis=0))


def test_smooth_pictures_lose_little_by_the_way_there_and_back():
    ramp = np.linspace(0, 255, 96)[None, :, None] + np.zeros((64, 1, 3))
    image = Image.fromarray(ramp.astype(np.uint8))
    frame = Frame(96, 64, 32)
    off = np.abs(frame.take(frame.put(image)).astype(int) - np.asarray(image).astype(int))
    assert off[:, 3:-3].max() <= 2


def test_a_place_is_known_only_where_all_of_it_is_kept():
    mask = np.zeros((16, 32), np.float32)
    mask[5, 9] = 1.0
    small = Frame(32, 16, 8).put_mask(mask)
    assert small.shape == (8, 8)
    assert small[2:6].sum() == 1.0
    assert small[2 + 5 // 4, 9 // 4] == 1.0
    assert small[:2].min() == small[6:].min() == 1.0, "beyond the picture nothing is known"


def test_kept_pixels_stand_byte_for_byte_and_half_kept_ones_are_mixed():
    own, painted = np.asarray(picture(6, 4, 1)), np.asarray(picture(6, 4, 2))
    mask = np.zeros((4, 6), np.float32)
    mask[1], mask[2] = 1.0, 0.5
    both = mixed(own, painted, mask)
    assert np.array_equal(both[[0, 3]], own[[0, 3]])
    assert np.array_equal(both[1], painted[1])
    assert np.abs(both[2] - (own[2].astype(float) + painted[2]) / 2).max() <= 0.5
