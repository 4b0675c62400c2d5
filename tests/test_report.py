import numpy as np

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
