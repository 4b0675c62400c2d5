import math
from statistics import NormalDist

import diffusers
import pytest
import torch

from diffusion_core.config import Timesteps
from diffusion_core.schedules import (
    SCHEDULES,
    SigmaDistribution,
    add_noise,
    sigma_grid,
    stratify,
    timestep_of,
    timestep_sigmas,
    truncate,
)

GRIDS = ("karras", "log_snr", "uniform_t")
COSINE = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(1000)]
# What the papers write: alpha_bar(t), with sigma² = (1 - alpha_bar)/alpha_bar; or sigma itself
PUBLISHED = {
    "linear": lambda t: math.sqrt(math.exp(0.5 * 19.9 * t**2 + 0.1 * t) - 1),
    "cosine": lambda t: math.sqrt(COSINE[0] / (math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2) - 1),
    "edm": lambda t: (0.002 ** (1 / 7) + t * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7,
    "flow": lambda t: t / (1 - t),
}


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_a_schedule_is_its_published_formula(name):
    times = [0.01, 0.1, 0.25, 0.5, 0.9, 0.99]
    found = SCHEDULES[name].sigma(torch.tensor(times, dtype=torch.float64))
    assert found.tolist() == pytest.approx([PUBLISHED[name](t) for t in times], rel=1e-9)


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_sigma_and_t_are_exact_inverses(name):
    t = torch.cat((torch.tensor([1e-6, 1e-4]), torch.linspace(0.001, 0.999, 999))).to(torch.float64)
    schedule = SCHEDULES[name]
    sigma = schedule.sigma(t)
    assert (sigma.diff() > 0).all()
    assert torch.allclose(schedule.t(sigma), t, rtol=0, atol=1e-14)
    assert torch.allclose(schedule.sigma(schedule.t(sigma)), sigma, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_uniform_t_takes_equal_steps_of_the_schedule(name):
    sigmas = sigma_grid("uniform_t", 12, 0.01, 50.0, name)[:-1]
    steps = SCHEDULES[name].t(sigmas).diff()
    assert torch.allclose(steps, steps[0].expand(11), rtol=1e-9)


@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "cosine"])
def test_the_levels_of_timesteps_are_those_of_the_betas(betas):
    theirs = {"cosine": "squaredcos_cap_v2"}.get(betas, betas)
    alphas = diffusers.DDPMScheduler(1000, 1e-4, 0.02, theirs).alphas_cumprod.double()
    found = timestep_sigmas(Timesteps(betas))
    # diffusers multiplies in float32, where the cosine's last products lose their digits
    assert torch.allclose(found[:990], ((1 - alphas) / alphas).sqrt()[:990], rtol=2e-3)
    by_hand, product = [], 1.0
    for k in range(1000):
        product *= 1 - (1e-4 + k / 999 * (0.02 - 1e-4))
        by_hand.append(math.sqrt((1 - product) / product))
    assert betas != "linear" or found.tolist() == pytest.approx(by_hand, rel=1e-9)


def test_a_timestep_is_whole_at_its_level_linear_in_ln_sigma_and_held_at_the_ends():
    levels = timestep_sigmas(Timesteps())
    assert torch.allclose(timestep_of(levels, levels), torch.arange(1000, dtype=torch.float64), atol=1e-9)
    between = torch.exp(0.75 * levels[41].log() + 0.25 * levels[42].log())
    assert float(timestep_of(between[None], levels)) == pytest.approx(41.25, abs=1e-9)
    assert timestep_of(torch.tensor([1e-6, 1e6]), levels).tolist() == [0.0, 999.0]


def test_own_timesteps_are_taken_evenly_from_the_highest_down():
    levels = timestep_sigmas(Timesteps())
    sigmas = sigma_grid("timesteps", 4, 1e-3, 1e3, levels=levels)
    assert sigmas.tolist() == [*levels[[999, 666, 333, 0]].tolist(), 0.0]
    within = sigma_grid("timesteps", 20, 0.1, 10.0, levels=levels)[:-1]
    assert 0.1 <= float(within.min()) <= float(within.max()) <= 10.0
    for count, given in ((1001, levels), (2, None)):
        with pytest.raises(ValueError, match=f"grid: timesteps has .* for {count} steps"):
            sigma_grid("timesteps", count, 1e-3, 1e3, levels=given)


def test_noise_is_added_by_its_sigma():
    x0, noise = torch.ones(2, 1, 2, 2), torch.full((2, 1, 2, 2), 3.0)
    x = add_noise(x0, torch.tensor([0.5, 2.0]), noise)
    assert x[:, 0, 0, 0].tolist() == [2.5, 7.0]


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_sigmas_uniform_in_t_fill_the_schedule_evenly(name):
    places = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    found = SCHEDULES[name].t(SigmaDistribution("uniform_t", schedule=name, low=0.01, high=50.0).sigma(places))
    ends = SCHEDULES[name].t(torch.tensor([0.01, 50.0], dtype=torch.float64)).tolist()
    assert found.tolist() == pytest.approx([ends[0] + p * (ends[1] - ends[0]) for p in places.tolist()], abs=1e-12)


@pytest.mark.parametrize("settings", [{"std": 0.0}, {"low": 0.0}, {"low": 2.0, "high": 1.0}, {"high": math.inf}])
def test_an_empty_distribution_is_refused(settings):
    with pytest.raises(ValueError, match="sigma: std"):
        SigmaDistribution(**settings)


def test_a_stratified_batch_takes_every_stratum_once_wherever_it_is_cut():
    place = torch.arange(16)
    for offset in (0.0, 0.03, 0.5, 0.999):
        quantiles = stratify(torch.tensor([offset], dtype=torch.float64), place, 16)
        assert sorted((quantiles * 16).floor().long().tolist()) == list(range(16))
        parts = [stratify(torch.tensor([offset], dtype=torch.float64), part, 16) for part in place.split(5)]
        assert torch.equal(torch.cat(parts), quantiles)


def test_a_single_stratified_quantile_is_uniform():
    offsets = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    found = stratify(offsets, torch.full((1000,), 5), 16).sort().values
    assert torch.allclose(found, offsets, atol=2e-3)


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


@pytest.mark.parametrize(
    ("low", "high"), [(2.0, 1.0), (1.0, 1.0), (0.0, 1.0), (-1.0, 1.0), (math.nan, 1.0), (1.0, math.inf)]
)
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
    found = SigmaDistribution(mean=mean, std=std).sigma(torch.tensor(levels, dtype=torch.float64))
    assert found.tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan, math.inf])
def test_a_walk_from_no_level_is_refused(sigma):
    with pytest.raises(ValueError, match=f"sigma: {sigma}"):
        truncate(torch.tensor([8.0, 2.0, 0.0]), sigma)
