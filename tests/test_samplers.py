import dataclasses
import math
from itertools import pairwise
from statistics import NormalDist
from typing import get_args

import numpy as np
import pytest
import torch

from diffusion_core.config import PRESETS, GridName, ModelConfig, SamplerConfig, SamplerName, Timesteps
from diffusion_core.denoiser import Denoiser
from diffusion_core.noise import normal
from diffusion_core.samplers import Row, State, make_plan, model_grid, new_state, sample, start_noise, step
from diffusion_core.schedules import sigma_grid
from diffusion_core.unet import UNet

SIGMA_DATA = 0.5
SEEDS = torch.arange(6)
MEMORY = {
    "ddim": 0, "ddpm": 0, "euler": 0, "euler_ancestral": 0, "heun": 1, "dpmpp_2m": 1, "dpmpp_2m_sde": 1, "ipndm_4": 3,
    "exponential_3": 2, "exponential_4": 3, "angular_3": 3,
}  # fmt: skip
# "angular_3" is exact for Gaussian data instead
EXACT_FOR_ONE_PICTURE = [name for name in MEMORY if name != "angular_3"]
COLUMNS = ("sigma", "sigma_next", "a", "b", "c", "s", "alpha", "beta")


pytestmark = pytest.mark.usefixtures("one_thread")


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


# Steps of every size, for recursions that say nothing of the grid; and the same ending at 0
UNEVEN = doubles(30.0, 21.0, 9.0, 8.0, 3.0, 1.1, 0.4, 0.3, 0.2)
TO_ZERO = torch.cat((UNEVEN, doubles(0.0)))


def gaussian(x, sigma):
    """The exact denoiser of N(0, sigma_data²)."""
    return x * (SIGMA_DATA**2 / (SIGMA_DATA**2 + sigma**2))[:, None]


def curved(x, sigma):
    """Some smooth denoiser, for comparing recursions."""
    return torch.tanh(x / (1 + sigma[:, None]))


def start(sigma):
    return sigma * normal(SEEDS, "start", 0, (4,), torch.float64)


def noise_of(row):
    return normal(SEEDS, "sampler", row, (4,), torch.float64)


def walk(name, sigmas, denoise, x, **settings):
    return sample(denoise, make_plan(SamplerConfig(sampler=name, **settings), sigmas), x, SEEDS)


def assert_same(found, expected):
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)


MODES = doubles(-1.0, 0.6)
WEIGHTS = doubles(0.3, 0.7)
MODE_STD = 0.2


def mixture(x, sigma):
    """The exact denoiser of two modes: 0.3·N(-1, 0.2²) + 0.7·N(0.6, 0.2²), value by value."""
    s = sigma[:, None, None]
    spread = MODE_STD**2 + s**2
    log_weight = WEIGHTS.log() - (x[..., None] - MODES) ** 2 / (2 * spread)
    posterior = (MODE_STD**2 * x[..., None] + s**2 * MODES) / spread
    return (log_weight.softmax(-1) * posterior).sum(-1)


def mixture_cdf(x, sigma):
    spread = torch.sqrt(MODE_STD**2 + sigma**2)[..., None]
    return (WEIGHTS * torch.special.ndtr((x[..., None] - MODES) / spread)).sum(-1)


def mixture_start(first):
    """Quantiles [1, 8] away from 0.3, where the flow parts into the two modes and amplifies every error."""
    places = [0.03, 0.08, 0.13, 0.55, 0.65, 0.75, 0.85, 0.95]
    return doubles([NormalDist(0.12, math.hypot(first, 0.7)).inv_cdf(p) for p in places])


def mixture_path(x, sigmas):
    """The exact flow from x [1, P] at sigmas[0], at each of sigmas [N], [N, 1, P]: every quantile stays itself."""
    levels = sigmas[:, None, None]
    quantile = mixture_cdf(x, levels[0])
    high = (4 + 4 * levels).expand(-1, *x.shape)
    low = -high
    for _ in range(60):
        middle = (low + high) / 2
        below = mixture_cdf(middle, levels) < quantile
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return middle


def problem(kind, first, last):
    """Denoiser, start and exact end."""
    if kind == "gaussian":
        x = start(first)
        return gaussian, x, x * math.sqrt((SIGMA_DATA**2 + last**2) / (SIGMA_DATA**2 + first**2))
    x = mixture_start(first)
    return mixture, x, mixture_path(x, doubles(first, last))[1]


def flow_errors(name, kind, counts, first, last):
    """Errors at `last` after each of `counts` intervals on a log-SNR grid that ends there."""
    denoise, x, exact = problem(kind, first, last)
    errors = []
    for count in counts:
        plan = make_plan(SamplerConfig(sampler=name), sigma_grid("log_snr", count + 1, last, first)[:-1])
        errors.append(float((sample(denoise, plan, x, SEEDS[: len(x)]) - exact).square().mean().sqrt()))
    return errors


def slope(counts, errors):
    return -np.polyfit(np.log(counts), np.log(errors), 1)[0]


@pytest.mark.parametrize("kind", ["gaussian", "mixture"])
@pytest.mark.parametrize(
    ("name", "order"), [("euler", 1), ("ddim", 1), ("heun", 2), ("dpmpp_2m", 2), ("dpmpp_2m_sde", 2), ("ipndm_4", 2)]
)
def test_a_sampler_has_its_order_against_the_exact_flow(name, order, kind):
    counts = [16, 32, 64, 128]
    assert slope(counts, flow_errors(name, kind, counts, 20.0, 0.05)) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("kind", ["gaussian", "mixture"])
@pytest.mark.parametrize(("name", "least"), [("exponential_3", 2.7), ("exponential_4", 3.5), ("angular_3", 2.7)])
def test_a_multistep_of_higher_order_has_it_from_noise_on(name, least, kind):
    # The first rows have lower order; at sigma 80, where the answer hardly depends on x, that costs nothing.
    coarse, fine = flow_errors(name, kind, (64, 128), 80.0, 0.002)
    assert math.log2(coarse / fine) >= least


@pytest.mark.parametrize(
    ("name", "order", "grid"),
    [
        ("dpmpp_2m", 2, "karras"),
        ("exponential_3", 3, "karras"),
        ("exponential_4", 4, "karras"),
        ("angular_3", 3, "karras"),
        # its weights are those of equal steps; on any other grid it is a method of second order
        ("ipndm_4", 4, "equal"),
        ("ipndm_4", 2, "karras"),
    ],
)
def test_rows_that_lean_on_an_exact_past_have_their_full_order(name, order, grid):
    counts, errors = [32, 64, 128], []
    for count in counts:
        equal = torch.linspace(3.0, 0.3, count + 1, dtype=torch.float64)
        levels = equal if grid == "equal" else sigma_grid("karras", count + 1, 0.05, 20.0)[:-1]
        memory = MEMORY[name]
        plan, path = make_plan(SamplerConfig(name), levels), mixture_path(mixture_start(float(levels[0])), levels)
        known = []
        for x, sigma in zip(path, levels, strict=True):
            d, n = mixture(x, sigma[None]), torch.hypot(sigma, doubles(4.0))
            slopes = {"ipndm_4": (x - d) / sigma, "angular_3": (n * d - 16 / n * x) / (4 * sigma)}
            known.append(slopes.get(name, d))
        state = State(path[memory], tuple(known[:memory][::-1]))
        for row in range(memory, len(plan)):
            state = step(state, plan.row(row), mixture(state.x, plan.sigma[row : row + 1]), None)
        errors.append(float((state.x - path[-1]).square().mean().sqrt()))
    assert slope(counts, errors) == pytest.approx(order, abs=0.35)


@pytest.mark.parametrize("sigmas", [UNEVEN, TO_ZERO])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_the_ancestral_family_is_the_textbook_recursion_of_ddim(eta, sigmas):
    x = start(30.0)
    # Song et al. 2021, eq. 12 and 16, in variance-preserving coordinates y = sqrt(a)·x with a = 1/(1 + sigma²)
    alphas = 1 / (1 + sigmas**2)
    y = alphas[0].sqrt() * x
    for row in range(len(sigmas) - 1):
        a, after = alphas[row], alphas[row + 1]
        x0 = curved(y / a.sqrt(), sigmas[row].expand(6))
        eps = (y - a.sqrt() * x0) / (1 - a).sqrt()
        spread = eta * ((1 - after) / (1 - a)).sqrt() * (1 - a / after).sqrt()
        y = after.sqrt() * x0 + (1 - after - spread**2).clamp(min=0).sqrt() * eps + spread * noise_of(row)
    assert_same(walk("ddim", sigmas, curved, x, eta=eta), y / alphas[-1].sqrt())


@pytest.mark.parametrize("sigmas", [sigma_grid("uniform_t", 12, 0.02, 30.0, "cosine"), UNEVEN])
def test_ddpm_is_the_textbook_posterior(sigmas):
    x = start(30.0)
    alphas = 1 / (1 + sigmas**2)
    y = alphas[0].sqrt() * x
    for row in range(len(sigmas) - 1):
        bar, bar_before = alphas[row], alphas[row + 1]  # Ho et al. 2020, eq. 7
        alpha = bar / bar_before
        x0 = curved(y / bar.sqrt(), sigmas[row].expand(6))
        mean = bar_before.sqrt() * (1 - alpha) / (1 - bar) * x0 + alpha.sqrt() * (1 - bar_before) / (1 - bar) * y
        variance = (1 - bar_before) / (1 - bar) * (1 - alpha)
        y = mean + variance.sqrt() * noise_of(row)
    assert_same(walk("ddpm", sigmas, curved, x), y / alphas[-1].sqrt())


@pytest.mark.parametrize("sigmas", [UNEVEN, TO_ZERO])
def test_euler_ancestral_steps_down_and_adds_noise_back(sigmas):
    y = x = start(30.0)
    for row, (high, low) in enumerate(pairwise(sigmas)):
        up = min(low, (low**2 * (high**2 - low**2) / high**2).sqrt())
        down = (low**2 - up**2).sqrt()
        y = y + (down - high) * (y - curved(y, high.expand(6))) / high + up * noise_of(row)
    assert_same(walk("euler_ancestral", sigmas, curved, x), y)


def test_ddpm_and_euler_ancestral_are_ddim_with_eta_one():
    x = start(30.0)
    expected = walk("ddim", TO_ZERO, curved, x, eta=1.0)
    for name in ("ddpm", "euler_ancestral"):
        assert torch.equal(walk(name, TO_ZERO, curved, x, eta=0.3), expected), "eta is theirs alone"


@pytest.mark.parametrize("sigmas", [UNEVEN, TO_ZERO])
def test_euler_is_the_textbook_step_along_the_slope(sigmas):
    y = x = start(30.0)
    for high, low in pairwise(sigmas):
        y = y + (low - high) * (y - curved(y, high.expand(6))) / high
    assert_same(walk("euler", sigmas, curved, x), y)


@pytest.mark.parametrize("sigmas", [UNEVEN, TO_ZERO])
@pytest.mark.parametrize(
    ("churn", "low_end", "high_end"), [(0.0, 0.0, math.inf), (3.0, 0.25, 20.0), (40.0, 0.4, 9.0), (3.0, 0.0, math.inf)]
)
def test_heun_is_algorithm_2_of_the_edm_paper(churn, low_end, high_end, sigmas):
    settings = {"churn": churn, "churn_low": low_end, "churn_high": high_end, "churn_noise": 1.01}
    y, calls, count = start(30.0), 0, len(sigmas) - 1
    for row, (high, low) in enumerate(pairwise(sigmas)):
        # The walk's first level is not raised; above it our noise belongs to the row before, where the level was left.
        gamma = min(churn / count, math.sqrt(2) - 1) if row and low_end <= high <= high_end else 0.0
        raised = high * (1 + gamma)
        y = y + (raised**2 - high**2).sqrt() * 1.01 * noise_of(calls - 1) if row else y
        first = (y - curved(y, raised.expand(6))) / raised
        calls += 1
        ahead = y + (low - raised) * first
        if low > 0:
            other = (ahead - curved(ahead, low.expand(6))) / low
            calls += 1
            ahead = y + (low - raised) * (first + other) / 2
        y = ahead
    assert_same(walk("heun", sigmas, curved, start(30.0), **settings), y)
    assert calls == len(make_plan(SamplerConfig("heun", **settings), sigmas))


@pytest.mark.parametrize("sigmas", [UNEVEN, TO_ZERO])
@pytest.mark.parametrize("lower_final", [False, True])
def test_dpmpp_2m_is_the_published_algorithm(lower_final, sigmas):
    # Lu et al. 2022, algorithm 2, with alpha = 1 and lambda = -ln sigma; the last row at first order where asked to
    x = start(30.0)
    y, last, last_h = x, None, None
    for row, (high, low) in enumerate(pairwise(sigmas)):
        d = curved(y, high.expand(6))
        if low == 0:
            y = d
            break
        h = torch.log(high) - torch.log(low)
        first_order = last is None or (lower_final and row == len(sigmas) - 2)
        mixed = d if first_order else (1 + h / (2 * last_h)) * d - h / (2 * last_h) * last
        y, last, last_h = (low / high) * y - torch.expm1(-h) * mixed, d, h
    assert_same(walk("dpmpp_2m", sigmas, curved, x, lower_final=lower_final), y)


@pytest.mark.parametrize("sigmas", [UNEVEN, TO_ZERO])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_dpmpp_2m_sde_is_the_published_midpoint_form(eta, sigmas):
    # Lu et al. 2022, section 5: the noise of the SDE over the interval, and D carried on to its middle
    x = start(30.0)
    y, last, last_h = x, None, None
    for row, (high, low) in enumerate(pairwise(sigmas)):
        d = curved(y, high.expand(6))
        if low == 0:
            y = d
            break
        h = torch.log(high / low)
        y = low / high * torch.exp(-eta * h) * y - torch.expm1(-(1 + eta) * h) * d
        if last is not None:
            y = y - 0.5 * torch.expm1(-(1 + eta) * h) * (h / last_h) * (d - last)
        y = y + low * (-torch.expm1(-2 * eta * h)).sqrt() * noise_of(row)
        last, last_h = d, h
    assert_same(walk("dpmpp_2m_sde", sigmas, curved, x, eta=eta), y)


@pytest.mark.parametrize("sigmas", [UNEVEN, TO_ZERO])
def test_ipndm_adds_up_its_last_four_slopes(sigmas):
    x = start(30.0)
    y, slopes = x, []
    weights = [[1], [1.5, -0.5], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24]]
    for high, low in pairwise(sigmas):
        d = curved(y, high.expand(6))
        slopes = [(y - d) / high, *slopes[:3]]
        y = y + (low - high) * sum(w * s for w, s in zip(weights[len(slopes) - 1], slopes, strict=True)) if low else d
    assert_same(walk("ipndm_4", sigmas, curved, x), y)


def exponential_weights(nodes, h):
    """Weights [p] that integrate e^(u − h) times u⁰ … u^(p − 1) over 0 … h from values at `nodes`.

    By the Vandermonde system; the moments are series of positive terms: e^(−h)·Σ h^(m + k + 1)/(k!·(m + k + 1)).
    """
    terms = range(80)
    moments = [
        math.exp(-h) * math.fsum(h ** (m + k + 1) / (math.factorial(k) * (m + k + 1)) for k in terms)
        for m in range(len(nodes))
    ]
    return np.linalg.solve(np.vander(nodes, increasing=True).T, moments).tolist()


@pytest.mark.parametrize("sigmas", [UNEVEN, TO_ZERO, sigma_grid("karras", 5, 0.002, 80.0)])
@pytest.mark.parametrize("order", [3, 4])
def test_the_exponential_multistep_is_the_integral_of_its_polynomial(order, sigmas):
    y = x = start(30.0)
    known = []
    for row, (high, low) in enumerate(pairwise(sigmas.tolist())):
        known = [curved(y, doubles(high).expand(6)), *known[: order - 1]]
        if low == 0:
            y = known[0]
            break
        nodes = [math.log(high / float(sigmas[row - age])) for age in range(len(known))]
        weights = exponential_weights([-abs(node) for node in nodes], math.log(high / low))
        y = low / high * y + sum(w * d for w, d in zip(weights, known, strict=True))
    assert_same(walk(f"exponential_{order}", sigmas, curved, x), y)


@pytest.mark.parametrize("order", [3, 4])
def test_the_exponential_multistep_is_exact_for_polynomials_in_ln_sigma(order):
    # Where D is a polynomial of lambda of degree below the order and of nothing else, the solution is closed:
    # x' = r·x + sum over m of the derivatives, by parts: the integral of e^l·P is e^l·(P - P' + P'' - P''').
    polynomial = np.polynomial.Polynomial(np.random.default_rng(0).normal(size=order))
    parts = sum((-1) ** m * polynomial.deriv(m) if m else polynomial for m in range(order))
    plan = make_plan(SamplerConfig(f"exponential_{order}"), UNEVEN)
    state = new_state(torch.zeros(1, 1, dtype=torch.float64), plan.memory)
    for row, (high, low) in enumerate(pairwise(UNEVEN.tolist())):
        before = float(state.x)
        state = step(state, plan.row(row), doubles([polynomial(-math.log(high))]), None)
        if row >= order - 1:
            gain = parts(-math.log(low)) - low / high * parts(-math.log(high))
            assert float(state.x) == pytest.approx(low / high * before + gain, abs=1e-12)


def polynomial_move(nodes, values, begin, end):
    """The integral from `begin` to `end` of the polynomial through `values` at `nodes`, moment by moment."""
    moments = [(end**m - begin**m) / m for m in range(1, len(nodes) + 1)]
    weights = np.linalg.solve(np.vander(nodes, increasing=True).T, moments).tolist()
    return sum(w * value for w, value in zip(weights, values, strict=True))


@pytest.mark.parametrize("sigmas", [UNEVEN, TO_ZERO, sigma_grid("arctan", 9, 0.02, 30.0)])
def test_angular_3_predicts_in_the_angle_and_corrects_a_row_later(sigmas):
    x = start(30.0)
    # y = x/n with n = sqrt(sigma² + 16) has dy/dt = (n²/4)·((x - D)/(sigma·n) - x·sigma/n³) at sigma = 4·tan t
    y, known, move, last_h = x / math.hypot(30.0, 4.0), [], None, None
    angles = [math.atan(sigma / 4) for sigma in sigmas.tolist()]
    for row, (high, low) in enumerate(pairwise(sigmas.tolist())):
        n = math.hypot(high, 4.0)
        d = curved(y * n, doubles(high).expand(6))
        known = [n**2 / 4 * ((y * n - d) / (high * n) - y * high / n**2), *known[:2]]
        nodes = angles[row - len(known) + 1 : row + 1][::-1]
        if move is not None:
            corrected = polynomial_move(nodes, known, angles[row - 1], angles[row])
            y = y + (corrected - move) / (1 + last_h**4)
        move, last_h = polynomial_move(nodes, known, angles[row], angles[row + 1]), math.log(high / low) if low else 0
        y = y + move
    assert_same(walk("angular_3", sigmas, curved, x), y * math.hypot(float(sigmas[-1]), 4.0))


@pytest.mark.parametrize("up", [[5.0, 2.0, 1.0, 0.5, 0.1, 0.0], [5.0, 9.0, 1.5, 2.0, 0.1, 0.0]])
def test_angular_3_is_exact_in_every_row_for_gaussian_data_of_its_unit(up):
    # The slope in the angle is 0 there, also where the sampler goes to 0.
    down = [5.0, 2.0, 1.0, 0.5, 0.1, 0.0]
    plan = make_plan(SamplerConfig("angular_3"), doubles(9.0, *down), doubles(*up))
    state = new_state(torch.ones(1, 1, dtype=torch.float64), 3)
    for row, (begin, end, leave) in enumerate(zip([9.0, *up[:-1]], down, up, strict=True)):
        before = float(state.x)
        state = step(state, plan.row(row), state.x * 16 / (16 + begin**2), None)
        assert float(state.x) == pytest.approx(before * math.hypot(end, 4) / math.hypot(begin, 4), rel=1e-13)
        assert float(plan.s[row] ** 2) == pytest.approx(leave**2 - end**2, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("ddpm", {}), ("ddim", {"eta": 0.5}), ("euler_ancestral", {}), ("dpmpp_2m_sde", {"eta": 1.0}),
        ("dpmpp_2m_sde", {"eta": 0.5}), ("heun", {"churn": 40.0}),
    ],
)  # fmt: skip
def test_fresh_noise_keeps_the_right_variance(name, settings):
    # x as a sum of independent normals: the start and the noise of every row, one column each. For Gaussian data all
    # of it is linear, so that its variance is exact; it nears that of the data as the steps become finer.
    errors = []
    for count in (150, 300):
        plan = make_plan(SamplerConfig(name, **settings), sigma_grid("log_snr", count, 0.002, 80.0))
        parts = torch.eye(len(plan) + 1, dtype=torch.float64)
        state = new_state(math.hypot(80.0, SIGMA_DATA) * parts[:1], plan.memory)
        for row in range(len(plan)):
            denoised = gaussian(state.x, plan.sigma[row : row + 1])
            state = step(state, plan.row(row), denoised, parts[row + 1 : row + 2])
        errors.append(abs(float(state.x.square().sum()) / SIGMA_DATA**2 - 1))
    assert errors[1] < min(0.04, 0.6 * errors[0])


@pytest.mark.parametrize(
    ("sampler", "settings"), [*[(name, {"eta": 0.7}) for name in EXACT_FOR_ONE_PICTURE], ("heun", {"churn": 5.0})]
)
@pytest.mark.parametrize(
    "up", [None, (5.0, 9.0, 1.5, 2.0, 0.3, 0.0), (5.0, 2.0, 1.0, 4.0, 0.1, 0.5)], ids=["straight", "jumps", "end above"]
)
def test_each_row_leaves_the_noise_level_that_it_names(sampler, settings, up):
    # Where the data is one picture, 0, and so is D, all of x is noise, and with x = sigma a row leaves the square
    # of what it makes of x and its history, and its own noise.
    levels = doubles(9.0, 5.0, 2.0, 1.0, 0.5, 0.1, 0.0)
    plan = make_plan(SamplerConfig(sampler, **settings), levels, None if up is None else doubles(*up))
    assert plan.sigma[0] == 9.0
    assert torch.equal(plan.sigma[1:], plan.sigma_next[:-1])
    assert plan.sigma_next[-1] == (0.0 if up is None else up[-1])
    state = new_state(plan.sigma[:1, None], plan.memory)
    for row in range(len(plan)):
        state = step(state, plan.row(row), torch.zeros(1, 1, dtype=torch.float64), None)
        left = float(state.x**2 + plan.s[row] ** 2)
        assert left == pytest.approx(float(plan.sigma_next[row]) ** 2, rel=1e-12, abs=1e-30)
        state = state._replace(x=plan.sigma_next[row : row + 1, None])
    if sampler != "heun":
        assert plan.sigma_next.tolist() == (levels[1:].tolist() if up is None else list(up))


@pytest.mark.parametrize("name", EXACT_FOR_ONE_PICTURE)
def test_a_picture_that_the_denoiser_is_sure_of_is_where_the_walk_ends(name):
    x = start(30.0)
    sure = torch.full_like(x, 0.3)
    assert_same(walk(name, TO_ZERO, lambda x, sigma: sure, x, eta=0.5, churn=3.0), sure)
    if name in ("ddim", "euler", "heun", "dpmpp_2m", "ipndm_4", "exponential_3", "exponential_4"):
        # straight towards it, by as much as the noise falls
        assert_same(walk(name, UNEVEN, lambda x, sigma: sure, x), sure + (x - sure) * 0.2 / 30.0)


@pytest.mark.parametrize("grid", get_args(GridName))
@pytest.mark.parametrize("name", get_args(SamplerName))
def test_no_sampler_loses_its_numbers_at_either_end(name, grid):
    model = ModelConfig(PRESETS["tiny"], "v", 0.5, 0.0101, 150.0, (), "cosine", Timesteps())
    for steps in (1, 2, 3, 20):
        sigmas = model_grid(SamplerConfig(name, steps, grid), model)
        assert len(sigmas) == steps + 1
        for levels in (sigmas, sigmas[:-1])[: 1 if steps == 1 else 2]:
            plan = make_plan(SamplerConfig(name, steps, grid, eta=0.7, churn=5.0), levels)
            assert all(torch.isfinite(getattr(plan, column)).all() for column in COLUMNS)
            x = sample(gaussian, plan, start_noise(plan, SEEDS, (4,)), SEEDS)
            assert torch.isfinite(x).all()
            assert steps < 20 or float(x.abs().max()) < 5  # heun overshoots on a few steps


@pytest.mark.parametrize(
    "sigmas", [[1e-12, 0.0], [80.0, 1e-12, 0.0], [1.0, 1 - 1e-12, 1 - 2e-12, 0.5], [1e4, 1.0, 1e-4]]
)
@pytest.mark.parametrize("name", get_args(SamplerName))
def test_tables_of_extreme_grids_are_finite(name, sigmas):
    plan = make_plan(SamplerConfig(name, eta=1.0, churn=5.0), doubles(*sigmas))
    assert all(torch.isfinite(getattr(plan, column)).all() for column in COLUMNS)


@pytest.mark.parametrize("grid", ["karras", "log_snr", "uniform_t"])
@pytest.mark.parametrize("name", get_args(SamplerName))
def test_one_step_is_the_denoiser_itself(name, grid):
    sigmas, x = sigma_grid(grid, 1, 0.02, 30.0), start(30.0)
    found = walk(name, sigmas, curved, x, eta=1.0, churn=5.0)
    assert_same(found, curved(x, sigmas[:1].expand(6)))


@pytest.mark.parametrize("name", get_args(SamplerName))
def test_a_jump_begins_the_table_anew(name):
    # Whatever was walked before a jump to 4, the rows after it are those of a walk that begins there.
    up = doubles(4.0, 2.0, 4.0, 2.0, 1.0, 0.5)
    plan = make_plan(SamplerConfig(name, eta=0.5), doubles(8.0, 4.0, 2.0, 1.0, 2.0, 1.0, 0.5), up)
    alone = make_plan(SamplerConfig(name, eta=0.5), doubles(4.0, 2.0, 1.0, 0.5))
    for column in COLUMNS:
        assert torch.allclose(getattr(plan, column)[-len(alone) :], getattr(alone, column), rtol=1e-12), column
    before = make_plan(SamplerConfig(name, eta=0.5), doubles(8.0, 4.0, 2.0, 1.0))
    last = len(plan) - len(alone) - 1
    assert float(plan.s[last] ** 2 - before.s[-1] ** 2) == pytest.approx(4.0**2 - 1.0**2)


def test_dpmpp_2m_takes_a_first_order_step_after_a_jump():
    sigmas = doubles(4.0, 2.0, 1.0, 0.5, 0.0)
    plan = make_plan(SamplerConfig("dpmpp_2m"), sigmas, up=doubles(2.0, 3.0, 0.5, 0.0))
    # Only the second row leans on the one before, by (1 - r)·h/(2·h_before) with r = 1/2 and equal h
    assert plan.c[:, 0].tolist() == pytest.approx([0.0, -0.25, 0.0, 0.0])


@pytest.mark.parametrize("name", list(MEMORY))
def test_a_sampler_remembers_as_much_as_its_rule_needs(name):
    plan = make_plan(SamplerConfig(name), TO_ZERO)
    state = new_state(torch.ones(2, 3, dtype=torch.float64), plan.memory)
    assert plan.memory == len(state.history) == MEMORY[name]
    assert all(torch.equal(each, torch.zeros(2, 3, dtype=torch.float64)) for each in state.history)
    for row in range(5):
        state = step(state, plan.row(row), torch.full((2, 3), float(row + 2), dtype=torch.float64), None)
    if name not in ("ipndm_4", "angular_3"):  # those remember slopes
        assert [float(each[0, 0]) for each in state.history] == [6.0, 5.0, 4.0][: plan.memory], "the newest first"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "names", [("ipndm_4", "exponential_4"), ("dpmpp_2m", "heun", "dpmpp_2m_sde"), ("ddim", "ddpm")], ids=str
)
def test_a_batch_may_mix_rows_and_samplers_without_changing_a_bit(names, dtype):
    plans = [make_plan(SamplerConfig(name, eta=0.5), sigma_grid("log_snr", 9, 0.02, 30.0)) for name in names]
    rows = [plan.row(index) for index in (0, 4, 7, 8) for plan in plans]
    count, generator = len(rows), torch.Generator().manual_seed(0)
    x, d, z, *history = (
        torch.randn(count, 3, 5, 7, generator=generator, dtype=dtype) for _ in range(3 + plans[0].memory)
    )
    mixed = Row(*(torch.cat([getattr(row, column.name) for row in rows]) for column in dataclasses.fields(Row)))
    assert mixed.a.shape == (count,)
    assert mixed.c.shape == (count, plans[0].memory)
    together = step(State(x, tuple(history)), mixed, d, z)
    for at, row in enumerate(rows):
        part = slice(at, at + 1)
        alone = step(State(x[part], tuple(each[part] for each in history)), row, d[part], z[part])
        assert torch.equal(alone.x, together.x[part])
        for one, all_ in zip(alone.history, together.history, strict=True):
            assert torch.equal(one, all_[part])


@pytest.mark.parametrize("name", ["ddpm", "exponential_3"])
@torch.inference_mode()
def test_a_request_has_the_same_bits_at_any_place_of_any_batch(name):
    torch.manual_seed(0)
    config = dataclasses.replace(PRESETS["tiny"], classes=3)
    network = UNet(config).eval().to(memory_format=torch.channels_last)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    denoiser = Denoiser(network, ModelConfig(config, class_names=("a", "b", "c")))
    plan = make_plan(SamplerConfig(sampler=name), sigma_grid("karras", 4, 0.02, 30.0))

    def drawn(seeds, labels):
        x = start_noise(plan, seeds, (3, 8, 8)).contiguous(memory_format=torch.channels_last)
        return sample(lambda x, sigma: denoiser(x, sigma, labels), plan, x, seeds)

    alone = drawn(torch.tensor([41, 1, 2, 3]), torch.tensor([2, 0, 1, 0]))[0]
    for size, place in ((4, 3), (5, 2), (16, 6)):
        seeds, labels = torch.arange(100, 100 + size), torch.arange(size) % 3
        seeds[place], labels[place] = 41, 2
        assert torch.equal(drawn(seeds, labels)[place], alone)


def test_a_walk_starts_from_noise_of_its_first_level():
    plan = make_plan(SamplerConfig(), UNEVEN)
    assert torch.equal(
        start_noise(plan, SEEDS, (4,), torch.float64), 30.0 * normal(SEEDS, "start", 0, (4,), torch.float64)
    )
    assert start_noise(plan, SEEDS, (4,)).dtype == torch.float32


def test_a_denoiser_is_told_the_level_of_its_row_in_the_type_of_x():
    told = []
    plan = make_plan(SamplerConfig("heun"), TO_ZERO)
    sample(lambda x, sigma: told.append(sigma) or x, plan, start(30.0).float(), SEEDS)
    assert torch.equal(torch.stack(told), plan.sigma.float()[:, None].expand(-1, 6))


def test_a_watcher_sees_every_estimate_in_its_order():
    seen = []
    plan = make_plan(SamplerConfig("dpmpp_2m"), sigma_grid("karras", 5, 0.02, 30.0))
    x = sample(curved, plan, start(30.0), SEEDS, watch=lambda row, denoised: seen.append((row, denoised)))
    assert [row for row, _ in seen] == [0, 1, 2, 3, 4]
    assert torch.equal(seen[-1][1], x), "the last row goes to 0, where the estimate is the picture"


def test_a_constraint_amends_x_after_every_row_at_the_level_that_it_leaves():
    seen, met = [], []
    plan = make_plan(SamplerConfig("heun"), TO_ZERO)

    def constrain(x, sigma_next, row):
        seen.append((row, sigma_next.tolist()))
        return torch.full_like(x, float(row))

    x = sample(lambda x, sigma: met.append(float(x[0, 0])) or x, plan, start(30.0), SEEDS, constrain=constrain)
    assert seen == [(row, [level] * 6) for row, level in enumerate(plan.sigma_next.tolist())]
    assert met[1:] == [float(row) for row in range(len(plan) - 1)]
    assert torch.equal(x, torch.full_like(x, len(plan) - 1))


def test_dropping_the_order_of_the_last_row_changes_that_row_alone():
    kept, dropped = (make_plan(SamplerConfig("dpmpp_2m", lower_final=final), UNEVEN) for final in (False, True))
    assert kept.c[-1] != 0
    assert dropped.c[-1] == 0
    assert torch.equal(kept.c[:-1], dropped.c[:-1])


@pytest.mark.parametrize(
    ("settings", "known"),
    [
        ({"eta": 0.7}, {"ddim", "dpmpp_2m_sde"}),
        ({"churn": 5.0, "churn_noise": 1.1}, {"heun"}),
        ({"lower_final": True}, {"dpmpp_2m", "dpmpp_2m_sde"}),
    ],
    ids=["eta", "churn", "lower_final"],
)
def test_a_setting_is_for_those_samplers_alone_that_know_it(settings, known):
    changed = set()
    for name in MEMORY:
        plain, other = (make_plan(SamplerConfig(name, **given), UNEVEN) for given in ({}, settings))
        if not all(torch.equal(getattr(plain, column), getattr(other, column)) for column in COLUMNS):
            changed.add(name)
    assert changed == known


def test_uniform_t_is_uniform_in_the_schedule_of_the_model():
    model = ModelConfig(PRESETS["tiny"], "flow", sigma_min=0.01, sigma_max=99.0, schedule="flow")
    times = [0.99 + i / 8 * (0.01 / 1.01 - 0.99) for i in range(9)]
    expected = [t / (1 - t) for t in times] + [0.0]
    assert model_grid(SamplerConfig(steps=9, grid="uniform_t"), model).tolist() == pytest.approx(expected, rel=1e-11)


def test_a_discrete_model_walks_its_own_timesteps():
    model = ModelConfig(PRESETS["tiny"], "eps", sigma_min=0.01, sigma_max=160.0, timesteps=Timesteps())
    product, own = 1.0, []
    for k in range(1000):
        product *= 1 - (1e-4 + k / 999 * (0.02 - 1e-4))
        own.append(math.sqrt((1 - product) / product))
    expected = [own[round(999 * (9 - i) / 9)] for i in range(10)] + [0.0]
    assert model_grid(SamplerConfig(steps=10, grid="timesteps"), model).tolist() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, "grid: timesteps has 0 levels from 0.01 to 160.0 for 20 steps"),
        ({"timesteps": Timesteps(count=10)}, "grid: timesteps has 10 levels from 0.01 to 160.0 for 20 steps"),
        (
            {"timesteps": Timesteps(), "sigma_min": 150.0},
            "grid: timesteps has . levels from 150.0 to 160.0 for 20 steps",
        ),
    ],
)
def test_a_model_without_such_a_grid_is_refused(settings, told):
    model = dataclasses.replace(ModelConfig(PRESETS["tiny"], "eps", sigma_min=0.01, sigma_max=160.0), **settings)
    with pytest.raises(ValueError, match=told):
        model_grid(SamplerConfig(steps=20, grid="timesteps"), model)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"steps": 0}, "steps: 0; need at least 1"),
        ({"steps": -2}, "steps: -2; need at least 1"),
        ({"eta": 1.5}, "eta: 1.5; need 0 to 1"),
        ({"eta": -0.1}, "eta: -0.1; need 0 to 1"),
        ({"eta": math.nan}, "eta: nan; need 0 to 1"),
        ({"churn": -1.0}, "churn, churn_noise: -1.0, 1.0"),
        ({"churn": math.inf}, "churn, churn_noise: inf, 1.0"),
        ({"churn_noise": math.nan}, "churn, churn_noise: 0.0, nan"),
        ({"churn_low": 2.0, "churn_high": 1.0}, "churn_low, churn_high: 2.0, 1.0"),
        ({"churn_low": math.nan}, "churn_low, churn_high: nan"),
    ],
)
def test_settings_without_a_table_are_refused_by_name(settings, told):
    with pytest.raises(ValueError, match=told):
        SamplerConfig("heun", **settings)


@pytest.mark.parametrize(
    "sigmas",
    [
        [], [1.0], [1.0, 2.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0], [1.0, 0.0, 0.0], [1.0, -1.0], [math.nan, 0.0],
        [4.0, math.nan, 0.0], [4.0, math.nan], [math.inf, 1.0, 0.0], [1.0, -math.inf], [[2.0, 1.0], [1.0, 0.5]],
    ],
    ids=str,
)  # fmt: skip
def test_a_grid_that_does_not_fall_is_refused(sigmas):
    with pytest.raises(ValueError, match=r"sigmas: .*; need levels that decrease to 0"):
        make_plan(SamplerConfig(), torch.tensor(sigmas))


@pytest.mark.parametrize(
    "up", [[0.5, 0.0], [math.nan, 0.0], [1.0, math.nan], [1.0], [1.0, 0.0, 0.0], [-1.0, 0.0]], ids=str
)
def test_a_jump_that_does_not_rise_is_refused(up):
    with pytest.raises(ValueError, match=r"^(sigmas|up): "):
        make_plan(SamplerConfig(), doubles(4.0, 1.0, 0.0), doubles(*up))


@pytest.mark.parametrize(
    ("x", "seeds", "told"),
    [
        (torch.zeros(6, 4), torch.zeros(6), "seeds: torch.float32 .6.; need torch.int64"),
        (torch.zeros(6, 4), torch.arange(6, dtype=torch.int32), "seeds: torch.int32"),
        (torch.zeros(6, 4), torch.arange(6)[:, None], "seeds: torch.int64 .6, 1."),
        (torch.zeros(0, 4), torch.arange(0), "seeds: torch.int64 .0."),
        (torch.zeros(6, 4), torch.arange(5), "x: torch.float32 .6, 4.; need .* for 5 seeds"),
        (torch.zeros(6, 4, dtype=torch.int64), torch.arange(6), "x: torch.int64"),
        (torch.full((6, 4), math.nan), torch.arange(6), "x: 24 of 24 values are NaN"),
        (torch.tensor([[0.0, math.inf]]), torch.arange(1), "x: 1 of 2 values are NaN or infinite"),
    ],
)
def test_a_start_that_is_none_is_refused_by_its_name(x, seeds, told):
    plan = make_plan(SamplerConfig(), sigma_grid("karras", 3, 0.02, 30.0))
    with pytest.raises(ValueError, match=told):
        sample(curved, plan, x, seeds)
