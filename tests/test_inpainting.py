import pytest
import torch

from diffusion_core.config import Inpainting, SamplerConfig
from diffusion_core.inpainting import KnownRegion, denoise_plan, repaint_plan
from diffusion_core.samplers import make_plan, sample, start_noise
from diffusion_core.schedules import sigma_grid

RHO, SEEN = 0.8, 1.5
COUNT = 500
SEEDS = torch.arange(COUNT)
COVARIANCE = torch.tensor([[1.0, RHO], [RHO, 1.0]], dtype=torch.float64)


def gaussian(x, sigma):
    """Exact denoiser of two correlated pixels, x [B, 1, 1, 2]."""
    gain = COVARIANCE @ torch.linalg.inv(COVARIANCE + sigma[0] ** 2 * torch.eye(2, dtype=torch.float64))
    return x @ gain.T


def inpaint(plan):
    picture = torch.tensor([SEEN, 0.0], dtype=torch.float64).expand(COUNT, 1, 1, 2)
    mask = torch.tensor([0.0, 1.0], dtype=torch.float64).expand(COUNT, 1, 1, 2)
    known = KnownRegion(picture, mask, SEEDS)
    x = sample(gaussian, plan, start_noise(plan, SEEDS, (1, 1, 2), torch.float64), SEEDS, known)
    assert (x[..., 0] == SEEN).all(), "the known pixel comes back exactly"
    return x[..., 1].flatten()


def test_resampling_inpaints_the_right_distribution_where_replacement_does_not():
    config, sigmas = SamplerConfig(sampler="ddpm"), sigma_grid("log_snr", 50, 0.02, 20.0)
    replaced = inpaint(make_plan(config, sigmas))
    resampled = inpaint(repaint_plan(config, sigmas, Inpainting(jump=10, times=10)))
    truth, deviation = RHO * SEEN, (1 - RHO**2) ** 0.5
    assert abs(float(resampled.mean()) - truth) < 0.1
    assert abs(float(resampled.std()) - deviation) < 0.1
    assert abs(float(replaced.mean()) - truth) > 0.3


@pytest.mark.parametrize(("jump", "times", "rows"), [(5, 3, 20), (4, 2, 10), (7, 3, 18), (30, 5, 10)])
def test_a_resampling_path_walks_every_block_as_often_as_it_says(jump, times, rows):
    sigmas = sigma_grid("karras", rows, 0.02, 20.0)
    plan = repaint_plan(SamplerConfig(), sigmas, Inpainting(jump=jump, times=times))
    level, walked = 0, [0] * rows
    for row in range(len(plan)):
        assert plan.sigma[row] == sigmas[level]
        walked[level] += 1
        level = int((sigmas == plan.sigma_next[row]).nonzero())
    assert level == rows
    last = (rows - 1) // jump * jump
    assert walked == [1 if at >= last else times for at in range(rows)]


def test_a_soft_mask_mixes():
    picture, mask = torch.zeros(1, 1, 1, 2), torch.tensor([0.25, 1.0]).view(1, 1, 1, 2)
    x = torch.ones(1, 1, 1, 2)
    mixed = KnownRegion(picture, mask, torch.tensor([0]))(x, torch.zeros(1), 0)
    assert mixed.flatten().tolist() == [0.25, 1.0]


def test_what_is_behind_a_kept_pixel_does_not_matter_even_if_it_is_not_a_number():
    x = torch.full((1, 1, 1, 1), torch.nan)
    kept = KnownRegion(torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), torch.tensor([0]))(x, torch.zeros(1), 0)
    assert kept.item() == 1.0


def test_denoising_in_one_step_is_the_posterior_mean():
    sigma = 0.7
    x = torch.randn(50, 1, 1, 2, dtype=torch.float64)
    plan = denoise_plan(SamplerConfig(steps=1), sigma_grid("karras", 20, 0.02, 20.0), sigma)
    told = sample(gaussian, plan, x, torch.arange(50))
    exact = x @ (COVARIANCE @ torch.linalg.inv(COVARIANCE + sigma**2 * torch.eye(2, dtype=torch.float64))).T
    assert torch.allclose(told, exact, rtol=0, atol=1e-12)


def test_denoising_in_more_steps_begins_at_the_level_of_the_noise():
    plan = denoise_plan(SamplerConfig(steps=20), sigma_grid("karras", 20, 0.02, 20.0), 0.7)
    assert plan.sigma[0] == 0.7
    assert (plan.sigma.diff() < 0).all()
    assert plan.sigma_next[-1] == 0


def test_resampling_of_nothing_is_refused():
    with pytest.raises(ValueError, match="jump 0"):
        Inpainting(jump=0)


def test_the_known_region_is_as_noisy_as_the_level_and_exact_at_zero():
    picture, mask = torch.full((2, 3, 40, 40), 0.5), torch.zeros(2, 1, 40, 40)
    mask[:, :, 20:] = 1.0
    x = torch.randn(2, 3, 40, 40)
    region = KnownRegion(picture, mask, torch.tensor([1, 2]))
    noisy = region(x, torch.tensor([2.0, 0.0]), 4)
    assert torch.equal(noisy[:, :, 20:], x[:, :, 20:]), "what is repainted is left alone"
    assert torch.equal(noisy[1, :, :20], picture[1, :, :20])
    added = noisy[0, :, :20] - 0.5
    assert float(added.mean()) == pytest.approx(0.0, abs=5 * 2 / 2400**0.5)
    assert float(added.std()) == pytest.approx(2.0, rel=5 / 4800**0.5)
    again = region(x, torch.tensor([2.0, 0.0]), 5)
    assert not torch.equal(noisy[0], again[0]), "every row draws its own noise"


def test_walking_every_block_once_is_the_sampler_itself():
    config, sigmas = SamplerConfig(sampler="ddpm"), sigma_grid("karras", 12, 0.02, 20.0)
    plain, once = make_plan(config, sigmas), repaint_plan(config, sigmas, Inpainting(jump=4, times=1))
    for name in ("sigma", "sigma_next", "a", "b", "c", "s"):
        assert torch.equal(getattr(plain, name), getattr(once, name))


def test_denoising_with_fresh_noise_gives_posterior_samples_with_the_right_mean_and_covariance():
    sigma, count = 0.7, 20000
    noisy = torch.tensor([1.2, -0.4], dtype=torch.float64)
    config = SamplerConfig("dpmpp_2m_sde", steps=50, eta=1.0)
    plan = denoise_plan(config, sigma_grid("arctan", 50, 0.002, 80.0), sigma)
    x = sample(gaussian, plan, noisy.repeat(count, 1).view(count, 1, 1, 2), torch.arange(count)).view(count, 2)
    gain = COVARIANCE @ torch.linalg.inv(COVARIANCE + sigma**2 * torch.eye(2, dtype=torch.float64))
    mean, covariance = gain @ noisy, COVARIANCE - gain @ COVARIANCE
    assert torch.allclose(x.mean(dim=0), mean, rtol=0, atol=4 * float(covariance[0, 0] / count) ** 0.5)
    # the sampling error of a covariance of normal samples is √((c₁₁c₂₂ + c₁₂²)/n)
    spread = ((covariance[0, 0] ** 2 + covariance**2) / count).sqrt()
    assert ((torch.cov(x.T) - covariance).abs() < 4 * spread).all()
