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


def gaussian(x, sigma):
    """The exact denoiser of N(0, sigma_data²)."""
    return x * (SIGMA_DATA**2 / (SIGMA_DATA**2 + sigma**2))[:, None]


def curved(x, sigma):
    """Some smooth denoiser, for comparing recursions."""
    return torch.tanh(x / (1 + sigma[:, None]))


def start(sigma):
    return sigma * normal(SEEDS, "start", 0, (4,), torch.float64)


def walk(name, sigmas, denoise, x, **settings):
    return sample(denoise, make_plan(SamplerConfig(sampler=name, **settings), sigmas), x, SEEDS)


def mixture(x, sigma):
    """The exact denoiser of two modes: 0.3·N(-1, 0.2²) + 0.7·N(0.6, 0.2²), value by value."""
    s = sigma[:, None, None]
    spread = MODE_STD**2 + s**2
    log_weight = WEIGHTS.log() - (x[..., None] - MODES) ** 2 / (2 * spread)
    posterior = (MODE_STD**2 * x[..., None] + s**2 * MODES) / spread
    return (log_weight.softmax(-1) * posterior).sum(-1)


MODES = torch.tensor([-1.0, 0.6], dtype=torch.float64)
WEIGHTS = torch.tensor([0.3, 0.7], dtype=torch.float64)
MODE_STD = 0.2


def mixture_cdf(x, sigma):
    spread = math.sqrt(MODE_STD**2 + sigma**2)
    return sum(w * NormalDist(m, spread).cdf(x) for w, m in zip(WEIGHTS.tolist(), MODES.tolist(), strict=True))


def mixture_flow(x, first, last):
    """Where the probability flow takes x: in one dimension it keeps every quantile (by bisection)."""
    level, low, high = mixture_cdf(x, first), -4.0, 4.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if mixture_cdf(middle, last) < level else (low, middle)
    return middle


def flow_error(name, denoise, x, exact, count, first, last):
    sigmas = sigma_grid("log_snr", count + 1, last, first)[:-1]
    return float((walk(name, sigmas, denoise, x) - exact).square().mean().sqrt())


def problem(kind, first, last):
    """Denoiser, start, exact end, first and last sigma."""
    if kind == "gaussian":
        x = start(first)
        return gaussian, x, x * math.sqrt((SIGMA_DATA**2 + last**2) / (SIGMA_DATA**2 + first**2)), first, last
    # Quantiles away from 0.3, where the flow parts into the two modes and amplifies every error
    places = [0.03, 0.08, 0.13, 0.55, 0.65, 0.75, 0.85, 0.95]
    x = torch.tensor([NormalDist(0.12, first).inv_cdf(p) for p in places], dtype=torch.float64)
    exact = torch.tensor([mixture_flow(float(value), first, last) for value in x], dtype=torch.float64)
    return mixture, x.reshape(1, -1).expand(6, -1), exact.expand(6, -1), first, last


@pytest.mark.parametrize("kind", ["gaussian", "mixture"])
@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("ddim", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_a_sampler_has_its_order_against_the_exact_flow(name, order, kind):
    counts = [16, 32, 64, 128]
    denoise, x, exact, first, last = problem(kind, 20.0, 0.05)
    errors = [flow_error(name, denoise, x, exact, count, first, last) for count in counts]
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("kind", ["gaussian", "mixture"])
@pytest.mark.parametrize(("name", "least"), [("exponential_3", 2.7), ("exponential_4", 3.5)])
def test_the_exponential_multistep_has_its_order(name, least, kind):
    # The first rows have lower order; at sigma 80, where the answer hardly depends on x, that costs nothing.
    denoise, x, exact, first, last = problem(kind, 80.0, 0.002)
    coarse, fine = (flow_error(name, denoise, x, exact, count, first, last) for count in (64, 128))
    assert math.log2(coarse / fine) >= least


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_the_ancestral_family_is_the_textbook_recursion_of_ddim(eta):
    sigmas = sigma_grid("log_snr", 12, 0.02, 30.0)
    x = start(30.0)
    ours = walk("ddim", sigmas, curved, x, eta=eta)
    # Song et al. 2021, eq. 12 and 16, in variance-preserving coordinates y = sqrt(a)·x with a = 1/(1 + sigma²)
    alphas = 1 / (1 + sigmas**2)
    y = alphas[0].sqrt() * x
    for row in range(12):
        a, after = alphas[row], alphas[row + 1]
        x0 = curved(y / a.sqrt(), sigmas[row].expand(6))
        eps = (y - a.sqrt() * x0) / (1 - a).sqrt()
        spread = eta * ((1 - after) / (1 - a)).sqrt() * (1 - a / after).sqrt()
        z = normal(SEEDS, "sampler", row, (4,), torch.float64)
        y = after.sqrt() * x0 + (1 - after - spread**2).clamp(min=0).sqrt() * eps + spread * z
    assert torch.allclose(ours, y / alphas[-1].sqrt(), rtol=0, atol=1e-12)


def test_ddpm_and_euler_ancestral_are_ddim_with_eta_one():
    sigmas, x = sigma_grid("karras", 9, 0.02, 30.0), start(30.0)
    expected = walk("ddim", sigmas, curved, x, eta=1.0)
    for name in ("ddpm", "euler_ancestral"):
        assert torch.equal(walk(name, sigmas, curved, x), expected)


def test_euler_is_the_textbook_step_along_the_slope():
    sigmas, x = sigma_grid("karras", 9, 0.02, 30.0), start(30.0)
    expected = x
    for high, low in pairwise(sigmas):
        slope = (expected - curved(expected, high.expand(6))) / high
        expected = expected + (low - high) * slope
    assert torch.allclose(walk("euler", sigmas, curved, x), expected, rtol=0, atol=1e-12)


def test_dpmpp_2m_is_the_published_algorithm():
    sigmas, x = sigma_grid("karras", 11, 0.02, 30.0), start(30.0)
    # Lu et al. 2022, algorithm 2, with alpha = 1 and lambda = -ln sigma
    y, last, last_h = x, None, None
    for high, low in pairwise(sigmas):
        d = curved(y, high.expand(6))
        if low == 0:
            y = d
            break
        h = torch.log(high) - torch.log(low)
        mixed = d if last is None else (1 + h / (2 * last_h)) * d - h / (2 * last_h) * last
        y, last, last_h = (low / high) * y - torch.expm1(-h) * mixed, d, h
    assert torch.allclose(walk("dpmpp_2m", sigmas, curved, x), y, rtol=0, atol=1e-12)


def test_fresh_noise_keeps_the_right_variance():
    seeds = torch.arange(500)
    plan = make_plan(SamplerConfig(sampler="ddpm"), sigma_grid("log_snr", 400, 0.02, 20.0))
    x = sample(gaussian, plan, start_noise(plan, seeds, (20,), torch.float64), seeds)
    assert float(x.var()) == pytest.approx(SIGMA_DATA**2, rel=0.05)


def test_a_jump_up_arrives_at_the_right_noise_level():
    seeds = torch.arange(50_000)
    sigmas = torch.tensor([4.0, 1.0, 0.0], dtype=torch.float64)
    for name in ("ddim", "dpmpp_2m", "ddpm"):
        plan = make_plan(SamplerConfig(sampler=name), sigmas, up=torch.tensor([3.0, 0.0]))
        assert plan.sigma.tolist() == [4.0, 3.0]
        x = torch.zeros(50_000, 1, dtype=torch.float64)
        after = plan.s[0] * normal(seeds, "sampler", 0, (1,), torch.float64)
        drawn = 3.0**2 - 1.0**2 + (1.0 - 1 / 16 if name == "ddpm" else 0.0)
        assert float((x + after).var()) == pytest.approx(drawn, rel=0.03)


def test_one_step_is_the_denoiser_itself():
    sigmas, x = sigma_grid("karras", 1, 0.02, 30.0), start(30.0)
    assert torch.allclose(walk("dpmpp_2m", sigmas, curved, x), curved(x, sigmas[:1].expand(6)), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "sigmas", [[1.0], [1.0, 2.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0], [1.0, -1.0], [math.nan, 0.0], [math.inf, 1.0, 0.0]]
)
def test_a_grid_that_does_not_fall_is_refused(sigmas):
    with pytest.raises(ValueError, match="need levels that decrease to 0"):
        make_plan(SamplerConfig(), torch.tensor(sigmas))


@pytest.mark.parametrize(
    ("settings", "told"),
    [({"steps": 0}, "steps: 0"), ({"eta": 1.5}, "eta: 1.5")],
)
def test_settings_without_a_table_are_refused(settings, told):
    with pytest.raises(ValueError, match=told):
        SamplerConfig(**settings)
    with pytest.raises(ValueError, match="need 0 < sigma_min < sigma_max"):
        sigma_grid("karras", 5, 2.0, 1.0)


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpmpp_2m"])
def test_each_row_leaves_the_noise_level_that_it_names(name):
    # Where the data is one picture, 0, and so is D, a row takes the noise sigma² to a²·sigma² + s².
    sigmas = torch.tensor([9.0, 5.0, 2.0, 1.0, 0.5, 0.1, 0.0], dtype=torch.float64)
    up = torch.tensor([5.0, 9.0, 1.5, 2.0, 0.1, 0.0], dtype=torch.float64)
    plan = make_plan(SamplerConfig(sampler=name), sigmas, up)
    assert plan.sigma.tolist() == [9.0, *up[:-1].tolist()]
    assert plan.sigma_next.tolist() == up.tolist()
    assert (plan.a**2 * plan.sigma**2 + plan.s**2).tolist() == pytest.approx((up**2).tolist(), rel=1e-12)


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpmpp_2m"])
def test_a_picture_that_the_denoiser_is_sure_of_is_where_the_walk_ends(name):
    plan = make_plan(SamplerConfig(sampler=name), sigma_grid("karras", 7, 0.02, 30.0))
    x = sample(lambda x, sigma: torch.full_like(x, 0.3), plan, start(30.0), SEEDS)
    assert torch.allclose(x, torch.full_like(x, 0.3), rtol=0, atol=1e-12)


def test_dpmpp_2m_takes_a_first_order_step_after_a_jump():
    sigmas = torch.tensor([4.0, 2.0, 1.0, 0.5, 0.0], dtype=torch.float64)
    plan = make_plan(SamplerConfig(), sigmas, up=torch.tensor([2.0, 3.0, 0.5, 0.0], dtype=torch.float64))
    assert plan.c[:, 0].tolist() == pytest.approx([0.0, -0.25, 0.0, 0.0])


def test_a_watcher_sees_every_estimate_in_its_order():
    seen = []
    plan = make_plan(SamplerConfig(), sigma_grid("karras", 5, 0.02, 30.0))
    x = sample(curved, plan, start(30.0), SEEDS, watch=lambda row, denoised: seen.append((row, denoised)))
    assert [row for row, _ in seen] == [0, 1, 2, 3, 4]
    assert torch.equal(seen[-1][1], x), "the last row goes to 0, where the estimate is the picture"


@pytest.mark.parametrize("name", ["ddpm", "dpmpp_2m"])
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
    for size, place in ((4, 3), (5, 2), (8, 7), (16, 6)):
        seeds, labels = torch.arange(100, 100 + size), torch.arange(size) % 3
        seeds[place], labels[place] = 41, 2
        assert torch.equal(drawn(seeds, labels)[place], alone)


def noise_of(row):
    return normal(SEEDS, "sampler", row, (4,), torch.float64)


def test_ddpm_is_the_textbook_posterior_on_a_cosine_grid():
    sigmas = sigma_grid("uniform_t", 12, 0.02, 30.0, "cosine")
    x = start(30.0)
    alphas = 1 / (1 + sigmas**2)
    y = alphas[0].sqrt() * x
    for row in range(12):
        bar, bar_before = alphas[row], alphas[row + 1]  # Ho et al. 2020, eq. 7
        alpha = bar / bar_before
        x0 = curved(y / bar.sqrt(), sigmas[row].expand(6))
        mean = bar_before.sqrt() * (1 - alpha) / (1 - bar) * x0 + alpha.sqrt() * (1 - bar_before) / (1 - bar) * y
        variance = (1 - bar_before) / (1 - bar) * (1 - alpha)
        y = mean + variance.sqrt() * noise_of(row)
    assert torch.allclose(walk("ddpm", sigmas, curved, x), y / alphas[-1].sqrt(), rtol=0, atol=1e-12)


def test_euler_ancestral_steps_down_and_adds_noise_back():
    sigmas, x = sigma_grid("karras", 9, 0.02, 30.0), start(30.0)
    y = x
    for row, (high, low) in enumerate(pairwise(sigmas)):
        up = min(low, (low**2 * (high**2 - low**2) / high**2).sqrt())
        down = (low**2 - up**2).sqrt()
        slope = (y - curved(y, high.expand(6))) / high
        y = y + (down - high) * slope + up * noise_of(row)
    assert torch.allclose(walk("euler_ancestral", sigmas, curved, x), y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("churn", [0.0, 3.0, 40.0])
def test_heun_is_algorithm_2_of_the_edm_paper(churn):
    sigmas, x = sigma_grid("karras", 9, 0.02, 30.0), start(30.0)
    settings = {"churn": churn, "churn_low": 0.1, "churn_high": 20.0, "churn_noise": 1.01}
    y, calls = x, 0
    for row, (high, low) in enumerate(pairwise(sigmas)):
        gamma = min(churn / 9, math.sqrt(2) - 1) if 0.1 <= high <= 20.0 else 0.0
        raised = high * (1 + gamma)
        # our noise belongs to the row before: that of the corrector that ended at this level
        y = y + (raised**2 - high**2).sqrt() * 1.01 * noise_of(calls - 1) if row else y
        slope = (y - curved(y, raised.expand(6))) / raised
        calls += 1
        ahead = y + (low - raised) * slope
        if low > 0:
            other = (ahead - curved(ahead, low.expand(6))) / low
            calls += 1
            ahead = y + (low - raised) * (slope + other) / 2
        y = ahead
    assert torch.allclose(walk("heun", sigmas, curved, x, **settings), y, rtol=0, atol=1e-12)
    assert calls == len(make_plan(SamplerConfig("heun", **settings), sigmas)) == 17


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_dpmpp_2m_sde_is_the_published_midpoint_form(eta):
    sigmas, x = sigma_grid("karras", 11, 0.02, 30.0), start(30.0)
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
    assert torch.allclose(walk("dpmpp_2m_sde", sigmas, curved, x, eta=eta), y, rtol=0, atol=1e-12)


def test_ipndm_adds_up_its_last_four_slopes():
    sigmas, x = sigma_grid("karras", 11, 0.02, 30.0), start(30.0)
    y, slopes = x, []
    for high, low in pairwise(sigmas):
        slopes = [(y - curved(y, high.expand(6))) / high, *slopes[:3]]
        if low == 0:
            y = curved(y, high.expand(6))
            break
        weights = [[1], [1.5, -0.5], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24]]
        y = y + (low - high) * sum(w * s for w, s in zip(weights[len(slopes) - 1], slopes, strict=True))
    assert torch.allclose(walk("ipndm_4", sigmas, curved, x), y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("order", [3, 4])
def test_the_exponential_multistep_is_exact_for_polynomials_in_ln_sigma(order):
    # Where D is a polynomial of lambda of degree below the order and of nothing else, the solution is closed:
    # x' = r·x + sum over m of the derivatives, by parts: the integral of e^l·P is e^l·(P - P' + P'' - P''').
    sigmas = torch.tensor([9.0, 7.0, 3.0, 2.9, 0.8, 0.1, 0.03], dtype=torch.float64)
    rng = np.random.default_rng(0)
    polynomial = np.polynomial.Polynomial(rng.normal(size=order))
    parts = sum((-1) ** m * polynomial.deriv(m) if m else polynomial for m in range(order))
    plan = make_plan(SamplerConfig(f"exponential_{order}"), sigmas)
    state = new_state(torch.zeros(1, 1, dtype=torch.float64), plan.memory)
    for row in range(len(plan)):
        high, low = float(sigmas[row]), float(sigmas[row + 1])
        d = torch.full((1, 1), polynomial(-math.log(high)), dtype=torch.float64)
        before = float(state.x)
        state = step(state, plan.row(row), d, None)
        if row >= order - 1:
            gain = parts(-math.log(low)) - low / high * parts(-math.log(high))
            assert float(state.x) == pytest.approx(low / high * before + gain, abs=1e-11)


@pytest.mark.parametrize("grid", ["karras", "log_snr", "uniform_t", "timesteps"])
@pytest.mark.parametrize("name", get_args(SamplerName))
def test_no_sampler_loses_its_numbers_at_either_end(name, grid):
    model = ModelConfig(PRESETS["tiny"], "v", 0.5, 0.0101, 150.0, (), "cosine", Timesteps())
    for steps in (1, 2, 3, 20):
        sigmas = model_grid(SamplerConfig(name, steps, grid), model)
        for levels in (sigmas, sigmas[:-1])[: 1 if steps == 1 else 2]:
            plan = make_plan(SamplerConfig(name, steps, grid, eta=0.7, churn=5.0), levels)
            x = sample(gaussian, plan, start_noise(plan, SEEDS, (4,)), SEEDS)
            assert torch.isfinite(x).all()
            assert steps < 20 or float(x.abs().max()) < 5  # heun overshoots on a few steps


@pytest.mark.parametrize("name", get_args(SamplerName))
def test_one_step_is_the_denoiser_itself_for_every_sampler(name):
    sigmas, x = sigma_grid("karras", 1, 0.02, 30.0), start(30.0)
    assert torch.allclose(walk(name, sigmas, curved, x), curved(x, sigmas[:1].expand(6)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["dpmpp_2m", "dpmpp_2m_sde", "ipndm_4", "exponential_3", "exponential_4"])
def test_a_jump_begins_the_table_anew(name):
    sigmas = torch.tensor([8.0, 4.0, 2.0, 1.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    up = torch.tensor([4.0, 2.0, 4.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    plan = make_plan(SamplerConfig(name), sigmas, up)
    alone = make_plan(SamplerConfig(name), torch.tensor([4.0, 2.0, 1.0, 0.5]))
    for column in ("a", "b", "c", "alpha", "beta"):
        assert torch.allclose(getattr(plan, column)[3:], getattr(alone, column), rtol=1e-12), column
    assert float(plan.s[2] ** 2) == pytest.approx(4.0**2 - 1.0**2)


@pytest.mark.parametrize(
    ("name", "memory"),
    [("ddim", 0), ("heun", 1), ("dpmpp_2m", 1), ("ipndm_4", 3), ("exponential_3", 2), ("exponential_4", 3)],
)
def test_a_sampler_remembers_as_much_as_its_rule_needs(name, memory):
    assert make_plan(SamplerConfig(name), sigma_grid("karras", 9, 0.02, 30.0)).memory == memory


def test_a_batch_may_mix_rows_and_samplers_without_changing_a_bit():
    plans = [make_plan(SamplerConfig(n), sigma_grid("log_snr", 9, 0.02, 30.0)) for n in ("ipndm_4", "exponential_4")]
    rows = [plans[0].row(2), plans[1].row(6), plans[0].row(7)]
    generator = torch.Generator().manual_seed(0)
    x, d, z, *history = (torch.randn(3, 3, 8, 8, generator=generator) for _ in range(6))
    mixed = Row(*(torch.cat(columns) for columns in zip(*rows, strict=True)))
    together = step(State(x, tuple(history)), mixed, d, z)
    for at, row in enumerate(rows):
        part = slice(at, at + 1)
        alone = step(State(x[part], tuple(each[part] for each in history)), row, d[part], z[part])
        assert torch.equal(alone.x, together.x[part])
        for one, all_ in zip(alone.history, together.history, strict=True):
            assert torch.equal(one, all_[part])


def test_dropping_the_order_of_the_last_row_is_an_option():
    sigmas = sigma_grid("karras", 6, 0.02, 30.0)[:-1]
    kept, dropped = (make_plan(SamplerConfig(lower_final=final), sigmas) for final in (False, True))
    assert kept.c[-1] != 0
    assert dropped.c[-1] == 0
    assert torch.equal(kept.c[:-1], dropped.c[:-1])


def test_a_discrete_model_walks_its_own_timesteps():
    model = ModelConfig(PRESETS["tiny"], "eps", sigma_min=0.01, sigma_max=160.0, timesteps=Timesteps())
    sigmas = model_grid(SamplerConfig(steps=10, grid="timesteps"), model)
    assert float(sigmas[0]) == pytest.approx(157.4, abs=0.1)
    assert [name for name in get_args(GridName) if len(model_grid(SamplerConfig(steps=7, grid=name), model)) != 8] == []
    with pytest.raises(ValueError, match="grid: timesteps has 0 levels"):
        model_grid(SamplerConfig(grid="timesteps"), dataclasses.replace(model, timesteps=None))


@pytest.mark.parametrize(
    ("x", "seeds", "told"),
    [
        (torch.zeros(6, 4), torch.zeros(6), "seeds: torch.float32"),
        (torch.zeros(6, 4), torch.arange(5), "x: torch.float32 .6, 4.; need .* for 5 seeds"),
        (torch.zeros(6, 4, dtype=torch.int64), torch.arange(6), "x: torch.int64"),
        (torch.full((6, 4), math.nan), torch.arange(6), "x: 24 of 24 values are NaN"),
    ],
)
def test_a_start_that_is_none_is_refused_by_its_name(x, seeds, told):
    plan = make_plan(SamplerConfig(), sigma_grid("karras", 3, 0.02, 30.0))
    with pytest.raises(ValueError, match=told):
        sample(curved, plan, x, seeds)


@pytest.mark.parametrize(
    "settings", [{"churn": -1.0}, {"churn_noise": math.nan}, {"churn_low": 2.0, "churn_high": 1.0}]
)
def test_churn_without_a_meaning_is_refused(settings):
    with pytest.raises(ValueError, match="churn"):
        SamplerConfig("heun", **settings)
