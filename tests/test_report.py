import numpy as np

from pipelines.features import psnr, share_with_interval
from pipelines.report import grid, loss_curve


def test_a_grid_holds_every_picture_at_its_place():
    pictures = np.arange(5 * 4 * 6 * 3, dtype=np.uint8).reshape(5, 4, 6, 3)
    sheet = grid(pictures, 2)
    assert sheet.shape == (3 * 4 + 2 * 2, 2 * 6 + 2, 3)
    assert np.array_equal(sheet[0:4, 8:14], pictures[1])
    assert np.array_equal(sheet[12:16, 0:6], pictures[4])
    assert (sheet[12:16, 8:14] == 255).all()


def test_a_curve_is_a_drawing_that_asks_nothing_of_the_network():
    drawing = loss_curve([[10.0, 0.9], [20.0, 0.5], [30.0, 0.4]])
    assert b"<svg" in drawing
    assert b"<image" not in drawing


def test_a_curve_shows_the_held_out_loss_beside_the_training_loss_and_is_a_picture_where_one_is_asked_for():
    curve = [[10.0, 0.9], [20.0, 0.5], [30.0, 0.4]]
    assert b"held out" in loss_curve(curve, [[15.0, 0.8], [30.0, 0.5]])
    assert b"held out" not in loss_curve(curve)
    assert loss_curve(curve, kind="png").startswith(b"\x89PNG")


def test_a_share_has_its_wilson_interval():
    told = share_with_interval(90, 100)
    assert told["share"] == 0.9
    assert abs(told["low"] - 0.8256) < 1e-3
    assert abs(told["high"] - 0.9448) < 1e-3
    assert abs(share_with_interval(100, 100)["high"] - 1.0) < 1e-12


def test_psnr_of_a_known_error():
    a = np.zeros((2, 4, 4, 3), dtype=np.uint8)
    assert abs(psnr(a, a + 16) - 20 * np.log10(255 / 16)) < 1e-9
