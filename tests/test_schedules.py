import math
from statistics import NormalDist
from typing import get_args

import diffusers
import pytest
import torch

from diffusion_core.config import GridName, Timesteps
from diffusion_core.schedules import (
    SCHEDULES,
    SigmaDistribution,
    add_noise,
    grid_from,
    sigma_grid,
    stratify,
    timestep_of,
    timestep_sigmas,
)

NAMES = list(SCHEDULES)
# Every grid that needs no model's own levels: name and schedule
GRIDS = [("arctan", "edm"), ("karras", "edm"), ("log_snr", "edm"), *[("uniform_t", name) for name in NAMES]]


pytestmark = pytest.mark.usefixtures("one_thread")


def cosine_alpha(t):
    """Nichol & Dhariwal 2021, eq. 17, with s = 0.008: alpha_bar without its division by that of t = 0."""
    return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2


# What the papers write: alpha_bar(t), with sigma² = (1 - alpha_bar)/alpha_bar; or sigma itself
PUBLISHED = {
    "linear": lambda t: math.sqrt(1 / math.exp(-0.5 * 19.9 * t**2 - 0.1 * t) - 1),
    "cosine": lambda t: math.sqrt(cosine_alpha(0) / cosine_alpha(t) - 1),
    "edm": lambda t: (0.002 ** (1 / 7) + t * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7,
    "flow": lambda t: t / (1 - t),
}


def published_t(name, sigma):
    """The inverse of the published formula, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if PUBLISHED[name](middle) < sigma else (low, middle)
    return low


def published_betas(timesteps):
    """Betas one by one: Ho et al. 2020, the same in the root, and Nichol & Dhariwal 2021 cut off at 0.999."""
    count, first, last = timesteps.count, timesteps.first, timesteps.last
    if timesteps.betas == "linear":
        return [first + k / (count - 1) * (last - first) for k in range(count)]
    if timesteps.betas == "scaled_linear":
        return [(math.sqrt(first) + k / (count - 1) * (math.sqrt(last) - math.sqrt(first))) ** 2 for k in range(count)]
    return [min(1 - cosine_alpha((k + 1) / count) / cosine_alpha(k / count), 0.999) for k in range(count)]


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("name", NAMES)
def test_a_schedule_is_its_published_formula(name):
    times = [0.01, 0.1, 0.25, 0.5, 0.9, 0.99]
    levels = [PUBLISHED[name](t) for t in times]
    assert SCHEDULES[name].sigma(doubles(*times)).tolist() == pytest.approx(levels, rel=1e-11)
    assert SCHEDULES[name].t(doubles(*levels)).tolist() == pytest.approx(times, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "slope"), [("linear", 0.1), ("cosine", math.pi / 1.008 * math.tan(0.004 / 1.008 * math.pi))]
)
def test_the_first_levels_keep_their_digits(name, slope):
    # Near t = 0 alpha_bar is 1 - slope·t, which the formula as it is printed would round away.
    t = 1e-13
    assert float(SCHEDULES[name].sigma(doubles(t))) == pytest.approx(math.sqrt(slope * t), rel=1e-9)
    assert float(SCHEDULES[name].t(doubles(math.sqrt(slope * t)))) == pytest.approx(t, abs=1e-15)


@pytest.mark.parametrize("name", NAMES)
def test_sigma_and_t_are_exact_inverses(name):
    # Toward t = 1 "cosine" and "flow" go to infinity, and a last digit of t is many of sigma.
    t = torch.cat((doubles(0.0, 1e-12, 1e-9, 1e-6, 1e-4), torch.arange(1, 1000).double() / 1000, doubles(1 - 1e-6)))
    schedule = SCHEDULES[name]
    sigma = schedule.sigma(t)
    assert (sigma.diff() > 0).all()
    assert torch.allclose(schedule.t(sigma), t, rtol=0, atol=2e-15)
    levels = torch.logspace(-2, 2, 401, dtype=torch.float64)
    assert (schedule.t(levels).diff() > 0).all()
    assert torch.allclose(schedule.sigma(schedule.t(levels)), levels, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_uniform_t_takes_equal_steps_of_the_schedule(name):
    first, last = published_t(name, 50.0), published_t(name, 0.01)
    expected = [PUBLISHED[name](first + i / 11 * (last - first)) for i in range(12)]
    found = sigma_grid("uniform_t", 12, 0.01, 50.0, name)[:-1].tolist()
    assert found == pytest.approx(expected, rel=1e-9)
    assert (found[0], found[-1]) == (50.0, 0.01), "the ends are kept to the bit"


@pytest.mark.parametrize(
    "timesteps",
    [
        Timesteps(),
        Timesteps("scaled_linear", 1000, 0.00085, 0.012),
        Timesteps("cosine"),
        Timesteps("linear", 7, 0.1, 0.5),
    ],
)
def test_the_levels_of_timesteps_are_those_of_the_betas(timesteps):
    expected, product = [], 1.0
    for beta in published_betas(timesteps):
        product *= 1 - beta
        expected.append(math.sqrt((1 - product) / product))
    found = timestep_sigmas(timesteps)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("ours", "theirs"), [("linear", "linear"), ("scaled_linear", "scaled_linear"), ("cosine", "squaredcos_cap_v2")]
)
def test_the_levels_of_timesteps_are_those_of_diffusers(ours, theirs):
    alphas = diffusers.DDPMScheduler(1000, 1e-4, 0.02, theirs).alphas_cumprod
    found = 1 / (1 + timestep_sigmas(Timesteps(ours)) ** 2)
    # they subtract each beta from 1 and multiply up in float32: half a unit in the last place, a thousand times
    assert torch.allclose(found, alphas.double(), rtol=1e-4, atol=0)


def test_a_timestep_is_whole_at_its_level_linear_in_ln_sigma_and_held_at_the_ends():
    levels = timestep_sigmas(Timesteps())
    whole = torch.arange(1000, dtype=torch.float64)
    assert torch.allclose(timestep_of(levels, levels), whole, rtol=0, atol=1e-9)
    assert torch.allclose(timestep_of(levels.float(), levels), whole, rtol=0, atol=1e-3), "also as a model is told it"
    for low, part in ((0, 0.25), (41, 0.25), (998, 0.9)):
        between = math.exp((1 - part) * math.log(levels[low]) + part * math.log(levels[low + 1]))
        assert float(timestep_of(doubles(between), levels)) == pytest.approx(low + part, abs=1e-9)
    found = timestep_of(torch.logspace(-3, 3, 5000, dtype=torch.float64), levels)
    inside = (found > 0) & (found < 999)
    assert (found.diff() >= 0).all()
    assert (found[inside].diff() > 0).all()
    assert timestep_of(doubles(1e-9, 1e9), levels).tolist() == [0.0, 999.0]


@pytest.mark.parametrize("steps", [2, 7, 50, 400, 1000])
@pytest.mark.parametrize(
    ("grid", "spacing"), [("timesteps", "linspace"), ("leading", "leading"), ("trailing", "trailing")]
)
def test_grids_of_own_timesteps_visit_those_of_diffusers(grid, spacing, steps):
    levels = timestep_sigmas(Timesteps())
    scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    found = sigma_grid(grid, steps, 1e-3, 1e3, levels=levels)
    assert timestep_of(found[:-1], levels).round().long().tolist() == scheduler.timesteps.tolist()
    assert found[-1] == 0


def test_own_timesteps_are_taken_evenly_from_the_highest_down():
    levels = timestep_sigmas(Timesteps())
    sigmas = sigma_grid("timesteps", 4, 1e-3, 1e3, levels=levels)
    assert sigmas.tolist() == [*levels[[999, 666, 333, 0]].tolist(), 0.0]
    inside = [level for level in levels.tolist() if 0.1 <= level <= 10.0]
    places = [round((len(inside) - 1) * (19 - i) / 19) for i in range(20)]
    assert sigma_grid("timesteps", 20, 0.1, 10.0, levels=levels)[:-1].tolist() == [inside[place] for place in places]
    everything = sigma_grid("timesteps", 1000, 1e-3, 1e3, levels=levels)
    assert everything.tolist() == [*levels.flip(0).tolist(), 0.0]
    assert sigma_grid("timesteps", 1, 1e-3, 1e3, levels=levels).tolist() == [float(levels[-1]), 0.0]


@pytest.mark.parametrize(
    ("steps", "low", "high", "known"), [(1001, 1e-3, 1e3, True), (20, 1.0, 1.01, True), (2, 0.1, 1.0, False)]
)
def test_more_steps_than_own_timesteps_are_refused(steps, low, high, known):
    with pytest.raises(ValueError, match=f"grid: timesteps has .* for {steps} steps"):
        sigma_grid("timesteps", steps, low, high, levels=timestep_sigmas(Timesteps()) if known else None)


def test_noise_is_added_by_its_sigma():
    x0, noise = torch.ones(2, 1, 2, 2), torch.full((2, 1, 2, 2), 3.0)
    x = add_noise(x0, doubles(0.5, 2.0), noise)
    assert x.dtype == torch.float32, "levels are float64, pictures keep their type"
    assert x.flatten(1).tolist() == [[2.5] * 4, [7.0] * 4]


@pytest.mark.parametrize("name", NAMES)
def test_sigmas_uniform_in_t_fill_the_schedule_evenly(name):
    low, high = published_t(name, 0.01), published_t(name, 50.0)
    places = [1e-4, 0.25, 0.5, 0.9, 1 - 1e-4]
    found = SigmaDistribution("uniform_t", schedule=name, low=0.01, high=50.0).sigma(doubles(*places))
    assert found.tolist() == pytest.approx([PUBLISHED[name](low + p * (high - low)) for p in places], rel=1e-9)


@pytest.mark.parametrize("settings", [{"std": 0.0}, {"low": 0.0}, {"low": 2.0, "high": 1.0}, {"high": math.inf}])
def test_an_empty_distribution_is_refused(settings):
    with pytest.raises(ValueError, match="sigma: mean"):
        SigmaDistribution(**settings)


@pytest.mark.parametrize("count", [7, 16, 48])
@pytest.mark.parametrize("offset", [0.003, 0.2971, 0.7503, 0.999])
def test_a_stratified_batch_takes_every_stratum_once_wherever_it_is_cut(offset, count):
    place = torch.arange(count)
    quantiles = stratify(doubles(offset), place, count)
    assert sorted((quantiles * count).floor().long().tolist()) == list(range(count))
    assert quantiles.tolist() == pytest.approx([(offset + k / count) % 1 for k in range(count)], abs=1e-7)
    parts = [stratify(doubles(offset), part, count) for part in place.split(5)]
    assert torch.equal(torch.cat(parts), quantiles)


@pytest.mark.parametrize("place", [0, 5, 15])
def test_a_single_stratified_quantile_is_uniform(place):
    offsets = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    found = stratify(offsets, torch.full((1000,), place), 16).sort().values
    # the offsets are turned by place/16, half a step of theirs or none
    assert torch.allclose(found, offsets, rtol=0, atol=0.00051)


def test_a_stratified_quantile_is_never_0_or_1():
    found = stratify(doubles(0.0, 1.0, 1 - 2.0**-53), torch.tensor([0, 0, 0]), 4)
    assert 0 < float(found.min()) <= float(found.max()) < 1
    assert torch.isfinite(SigmaDistribution().sigma(found)).all()


@pytest.mark.parametrize(("grid", "schedule"), GRIDS)
@pytest.mark.parametrize("steps", [2, 3, 50])
def test_every_grid_has_one_level_more_than_steps_and_falls_to_zero(grid, schedule, steps):
    sigmas = sigma_grid(grid, steps, 0.01, 50.0, schedule)
    levels = sigmas.tolist()
    assert sigmas.dtype == torch.float64
    assert len(levels) == steps + 1
    assert levels[0] == pytest.approx(50.0, rel=1e-12)
    assert levels[-2] == pytest.approx(0.01, rel=1e-12) or grid == "arctan", "which has 0 in place of sigma_min"
    assert levels[-1] == 0
    assert levels == sorted(set(levels), reverse=True)


@pytest.mark.parametrize(("grid", "schedule"), GRIDS)
def test_a_single_step_goes_straight_from_sigma_max_to_zero(grid, schedule):
    assert sigma_grid(grid, 1, 0.01, 50.0, schedule).tolist() == pytest.approx([50.0, 0.0], rel=1e-12)


def test_karras_levels_are_equation_5_with_rho_7():
    low, high = 0.002 ** (1 / 7), 80.0 ** (1 / 7)
    expected = [(high + i / 17 * (low - high)) ** 7 for i in range(18)]
    assert sigma_grid("karras", 18, 0.002, 80.0)[:-1].tolist() == pytest.approx(expected, rel=1e-9)


def test_log_snr_levels_are_a_geometric_sequence():
    expected = [80.0 * (0.002 / 80.0) ** (i / 17) for i in range(18)]
    assert sigma_grid("log_snr", 18, 0.002, 80.0)[:-1].tolist() == pytest.approx(expected, rel=1e-9)


def test_arctan_levels_are_equal_steps_of_an_angle_that_end_at_zero():
    high, low = (math.atan((math.log(sigma) - 0.8) / 3) for sigma in (80.0, 0.002))
    expected = [math.exp(0.8 + 3 * math.tan(high + i / 18 * (low - high))) for i in range(18)] + [0.0]
    assert sigma_grid("arctan", 18, 0.002, 80.0).tolist() == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("grid", get_args(GridName))
@pytest.mark.parametrize(
    ("low", "high"),
    [(2.0, 1.0), (1.0, 1.0), (0.0, 1.0), (-1.0, 1.0), (math.nan, 1.0), (1.0, math.nan), (1.0, math.inf)],
)
def test_an_empty_noise_range_is_refused(grid, low, high):
    with pytest.raises(ValueError, match=r"sigma_min, sigma_max: .*; need 0 < sigma_min < sigma_max"):
        sigma_grid(grid, 5, low, high)


@pytest.mark.parametrize("grid", get_args(GridName))
@pytest.mark.parametrize("steps", [0, -3])
def test_a_grid_without_steps_is_refused(grid, steps):
    with pytest.raises(ValueError, match=f"steps: {steps}; need at least 1"):
        sigma_grid(grid, steps, 0.01, 50.0)


@pytest.mark.parametrize(
    ("sigma", "steps", "expected"),
    [
        (8.0, 3, [8.0, 2.0, 1.0, 0.0]),  # the grid itself
        (2.0, 2, [2.0, 1.0, 0.0]),  # its tail
        (4.0, 1, [4.0, 0.0]),
        (4.0, 5, [4.0, 2.0, 2**0.5, 1.0, 0.5, 0.0]),  # half a level at a time: geometric, and linear to 0
        (0.5, 2, [0.5, 0.25, 0.0]),
    ],
)
def test_a_walk_from_a_known_level_is_spaced_as_the_grid_is_below_it(sigma, steps, expected):
    grid = torch.tensor([8.0, 2.0, 1.0, 0.0], dtype=torch.float64)
    assert grid_from(grid, sigma, steps).tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("grid", ["arctan", "karras", "log_snr", "uniform_t"])
@pytest.mark.parametrize("sigma", [0.003, 0.05, 1.0, 79.0, 80.0])
def test_a_walk_from_any_level_decreases_in_as_many_steps_as_asked(grid, sigma):
    levels = grid_from(sigma_grid(grid, 18, 0.002, 80.0), sigma, 7)
    assert len(levels) == 8
    assert levels[0] == sigma
    assert levels[-1] == 0
    assert (levels.diff() < 0).all()


@pytest.mark.parametrize(("mean", "std"), [(-1.2, 1.2), (0.4, 2.0)])
def test_training_sigmas_have_the_quantiles_of_the_log_normal(mean, std):
    levels = [1e-9, 0.01, 0.16, 0.5, 0.84, 0.999999]
    expected = [math.exp(NormalDist(mean, std).inv_cdf(level)) for level in levels]
    found = SigmaDistribution(mean=mean, std=std).sigma(torch.tensor(levels, dtype=torch.float64))
    assert found.tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("sigma", [0.0, -1.0, 8.5, math.nan, math.inf])
def test_a_walk_from_no_level_of_the_grid_is_refused(sigma):
    with pytest.raises(ValueError, match=f"sigma: {sigma}; need more than 0 and at most 8"):
        grid_from(torch.tensor([8.0, 2.0, 0.0]), sigma, 3)
