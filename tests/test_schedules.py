import math
from statistics import NormalDist

import pytest
import torch

from diffusion_core.schedules import log_normal_sigma, sigma_grid, truncate

GRIDS = ("karras", "log_snr")


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("steps", [2, 3, 50])
def test_every_grid_has_one_level_more_than_steps_and_falls_to_zero(grid, steps):
    levels = sigma_grid(grid, steps, 0.01, 50.0).tolist()
    assert len(levels) == steps + 1
    assert levels[0] == pytest.approx(50.0, rel=1e-12)
    assert levels[-2] == pytest.approx(0.01, rel=1e-9)
    assert levels[-1] == 0
    assert levels == sorted(set(levels), reverse=True)


@pytest.mark.parametrize("grid", GRIDS)
def test_a_single_step_goes_straight_from_sigma_max_to_zero(grid):
    assert sigma_grid(grid, 1, 0.01, 50.0).tolist() == pytest.approx([50.0, 0.0], rel=1e-12)


def test_karras_levels_are_equation_5_with_rho_7():
    low, high = 0.002 ** (1 / 7), 80.0 ** (1 / 7)
    expected = [(high + i / 17 * (low - high)) ** 7 for i in range(18)]
    assert sigma_grid("karras", 18, 0.002, 80.0)[:-1].tolist() == pytest.approx(expected, rel=1e-9)


def test_log_snr_levels_are_a_geometric_sequence():
    expected = [80.0 * (0.002 / 80.0) ** (i / 17) for i in range(18)]
    assert sigma_grid("log_snr", 18, 0.002, 80.0)[:-1].tolist() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("low", "high"), [(2.0, 1.0), (1.0, 1.0), (0.0, 1.0), (-1.0, 1.0), (math.nan, 1.0)])
def test_an_empty_noise_range_is_refused(low, high):
    with pytest.raises(ValueError, match="need 0 < sigma_min < sigma_max"):
        sigma_grid("karras", 5, low, high)


@pytest.mark.parametrize("steps", [0, -3])
def test_a_grid_without_steps_is_refused(steps):
    with pytest.raises(ValueError, match=f"steps: {steps}; need at least 1"):
        sigma_grid("karras", steps, 0.01, 50.0)


@pytest.mark.parametrize(
    ("sigma", "expected"),
    [(9.0, [9.0, 8.0, 2.0, 1.0, 0.0]), (2.0, [2.0, 1.0, 0.0]), (1.5, [1.5, 1.0, 0.0]), (0.1, [0.1, 0.0])],
)
def test_a_walk_from_a_known_level_keeps_the_levels_below_it(sigma, expected):
    assert truncate(torch.tensor([8.0, 2.0, 1.0, 0.0], dtype=torch.float64), sigma).tolist() == expected


@pytest.mark.parametrize(("mean", "std"), [(-1.2, 1.2), (0.4, 2.0)])
def test_training_sigmas_have_the_quantiles_of_the_log_normal(mean, std):
    levels = [1e-9, 0.01, 0.16, 0.5, 0.84, 0.999999]
    expected = [math.exp(NormalDist(mean, std).inv_cdf(level)) for level in levels]
    found = log_normal_sigma(torch.tensor(levels, dtype=torch.float64), mean, std)
    assert found.tolist() == pytest.approx(expected, rel=1e-6)
