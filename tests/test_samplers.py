import dataclasses
from itertools import pairwise

import numpy as np
import pytest
import torch

from diffusion_core.config import PRESETS, ModelConfig, SamplerConfig
from diffusion_core.denoiser import Denoiser
from diffusion_core.noise import normal
from diffusion_core.samplers import make_plan, sample, start_noise
from diffusion_core.schedules import log_normal_sigma, sigma_grid, truncate
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


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("ddim", 1), ("dpmpp_2m", 2)])
def test_a_sampler_has_its_order_against_the_exact_flow(name, order):
    first, last = 20.0, 0.05
    x, counts, errors = start(first), [16, 32, 64, 128], []
    exact = x * np.sqrt((SIGMA_DATA**2 + last**2) / (SIGMA_DATA**2 + first**2))
    for count in counts:
        sigmas = sigma_grid("log_snr", count + 1, last, first)[:-1]
        errors.append(float((walk(name, sigmas, gaussian, x) - exact).abs().max()))
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(order, abs=0.15)


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


def test_grids_fall_from_sigma_max_over_sigma_min_to_zero():
    rho = 7
    for grid in ("karras", "log_snr"):
        sigmas = sigma_grid(grid, 10, 0.002, 80.0)
        assert sigmas[[0, -2]].tolist() == pytest.approx([80.0, 0.002])
        assert sigmas[-1] == 0
        assert (sigmas.diff() < 0).all()
    middle = (80 ** (1 / rho) + 3 / 9 * (0.002 ** (1 / rho) - 80 ** (1 / rho))) ** rho
    assert float(sigma_grid("karras", 10, 0.002, 80.0)[3]) == pytest.approx(middle)
    assert sigma_grid("log_snr", 10, 0.002, 80.0)[1:9].log().diff().std() < 1e-9


def test_a_grid_cut_at_a_level_begins_there():
    assert truncate(torch.tensor([8.0, 4.0, 1.0, 0.0]), 4.0).tolist() == [4.0, 1.0, 0.0]


def test_training_sigmas_are_log_normal():
    uniform = torch.linspace(0.0005, 0.9995, 1000, dtype=torch.float64)
    logs = log_normal_sigma(uniform).log()
    assert float(logs.mean()) == pytest.approx(-1.2, abs=1e-6)
    assert float(logs.std()) == pytest.approx(1.2, rel=0.01)


@pytest.mark.parametrize("sigmas", [[1.0], [1.0, 2.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0], [1.0, -1.0]])
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
    assert plan.c.tolist() == pytest.approx([0.0, -0.25, 0.0, 0.0])


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
