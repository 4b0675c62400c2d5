"""The figures that diffusers publishes for its schedulers (its tests' dummy model and sample), from our tables."""

import diffusers
import pytest
import torch
from torch import nn

from diffusion_core.config import ModelConfig, SamplerConfig, Timesteps, UNetConfig
from diffusion_core.denoiser import Denoiser
from diffusion_core.samplers import make_plan, new_state, step
from diffusion_core.schedules import timestep_of, timestep_sigmas

PREDICTIONS = {"eps": "epsilon", "v": "v_prediction"}
BETAS = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
UNET = UNetConfig(resolution=8, widths=(16,), attention=(), middle_attention=False)


class Dummy(nn.Module):
    """The published dummy: the answer at timestep t is x·t/(t + 1)."""

    def forward(self, x, t, label):
        return x * (t / (t + 1))[:, None, None, None]


def dummy_sample():
    count = 4 * 3 * 8 * 8
    return (torch.arange(count, dtype=torch.float64).reshape(3, 8, 8, 4) / count).permute(3, 0, 1, 2)


def denoiser(prediction, timesteps):
    return Denoiser(Dummy(), ModelConfig(UNET, prediction, timesteps=timesteps))


def walk(denoise, plan, x, clip=False):
    """Our walk in sigma coordinates; fresh noise as diffusers draws it."""
    state, generator = new_state(x, plan.memory), torch.manual_seed(0)
    for row in range(len(plan)):
        denoised = denoise(state.x, plan.sigma[row].expand(4))
        noisy = plan.s[row] != 0
        z = torch.randn(x.shape, generator=generator).double() if noisy else None
        state = step(state, plan.row(row), denoised.clamp(-1, 1) if clip else denoised, z)
    return state.x


def theirs(scheduler, x, scales=False):
    """The published loop. Where it scales the model's input, it goes on from the scaled sample."""
    generator = torch.manual_seed(0)
    for t in scheduler.timesteps:
        if scales:
            x = scheduler.scale_model_input(x, t)
        out = x * t / (t + 1)
        takes = {"generator": generator} if "generator" in scheduler.step.__code__.co_varnames else {}
        x = scheduler.step(out, t, x, **takes).prev_sample
    return x.double()


def assert_published(x, total, mean):
    assert float(x.abs().sum()) == pytest.approx(total, abs=1e-2)
    assert float(x.abs().mean()) == pytest.approx(mean, abs=1e-3)


@pytest.mark.parametrize(("prediction", "total", "mean"), [("eps", 258.9606, 0.3372), ("v", 202.0296, 0.2631)])
def test_ddpm_with_every_timestep(prediction, total, mean):
    levels = timestep_sigmas(Timesteps())
    sigmas = torch.cat((levels.flip(0), torch.zeros(1)))
    start = dummy_sample() * torch.sqrt(1 + sigmas[0] ** 2)
    made = denoiser(prediction, Timesteps())
    x = walk(lambda x, sigma: made(x, sigma, None), make_plan(SamplerConfig("ddpm"), sigmas), start, clip=True)
    assert_published(x, total, mean)
    scheduler = diffusers.DDPMScheduler(1000, **BETAS, clip_sample=True, prediction_type=PREDICTIONS[prediction])
    assert torch.allclose(x, theirs(scheduler, dummy_sample().float()), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("prediction", "total", "mean"), [("eps", 172.0067, 0.223967), ("v", 52.5302, 0.0684)])
def test_ddim_with_ten_steps(prediction, total, mean):
    # The published loop clips x0 to [-1, 1]; the dummy's never leaves it, so clipping or not gives the same.
    levels = timestep_sigmas(Timesteps())
    sigmas = torch.cat((levels[torch.arange(900, -1, -100)], torch.zeros(1)))
    start = dummy_sample() * torch.sqrt(1 + sigmas[0] ** 2)
    made = denoiser(prediction, Timesteps())
    x = walk(lambda x, sigma: made(x, sigma, None), make_plan(SamplerConfig("ddim"), sigmas), start)
    assert_published(x, total, mean)
    scheduler = diffusers.DDIMScheduler(1000, **BETAS, clip_sample=False, prediction_type=PREDICTIONS[prediction])
    scheduler.set_timesteps(10)
    assert torch.allclose(x, theirs(scheduler, dummy_sample().float()), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("prediction", "mean"), [("eps", 0.3301), ("v", 0.2251)])
def test_dpmpp_2m_with_ten_steps_on_a_grid_that_ends_at_sigma_min(prediction, mean):
    levels = timestep_sigmas(Timesteps())
    timesteps = torch.linspace(0, 999, 11).round().long().flip(0)[:-1]
    sigmas = torch.cat((levels[timesteps], levels[:1]))
    start = dummy_sample() * torch.sqrt(1 + sigmas[0] ** 2)
    made = denoiser(prediction, Timesteps())
    x = walk(lambda x, sigma: made(x, sigma, None), make_plan(SamplerConfig("dpmpp_2m"), sigmas), start)
    x = x / torch.sqrt(1 + levels[0] ** 2)
    assert float(x.abs().mean()) == pytest.approx(mean, abs=1e-3)
    scheduler = diffusers.DPMSolverMultistepScheduler(
        1000, **BETAS, prediction_type=PREDICTIONS[prediction], lower_order_final=False, final_sigmas_type="sigma_min"
    )
    scheduler.set_timesteps(10)
    assert torch.allclose(x, theirs(scheduler, dummy_sample().float()), rtol=1e-3, atol=1e-4)


def own_grid(timesteps):
    """Ten levels evenly spaced in t, as diffusers interpolates them: linear in sigma."""
    levels = timestep_sigmas(timesteps)
    places = torch.linspace(0, timesteps.count - 1, 10, dtype=torch.float64).flip(0)
    below = places.floor().long().clamp(max=timesteps.count - 2)
    sigmas = torch.lerp(levels[below], levels[below + 1], places - below)
    return torch.cat((sigmas, torch.zeros(1))), dict(zip(sigmas.tolist(), places.tolist(), strict=True))


def published_denoise(prediction, places):
    """D as the published loop has it: the scaled sample is both the model's input and what it is taken from."""

    def denoise(x, sigma):
        t = torch.tensor([places[float(each)] for each in sigma], dtype=x.dtype)
        out, s = Dummy()(x, t, None), sigma[:, None, None, None]
        return x - s * out if prediction == "eps" else x / (1 + s**2) - s / torch.sqrt(1 + s**2) * out

    return denoise


@pytest.mark.parametrize(("prediction", "total", "mean"), [("eps", 152.3192, 0.1983), ("v", 108.4439, 0.1412)])
def test_euler_ancestral_with_ten_steps(prediction, total, mean):
    sigmas, places = own_grid(Timesteps(count=1100))
    scheduler = diffusers.EulerAncestralDiscreteScheduler(1100, **BETAS, prediction_type=PREDICTIONS[prediction])
    scheduler.set_timesteps(10)
    plan, denoise = make_plan(SamplerConfig("euler_ancestral"), sigmas), published_denoise(prediction, places)
    state, generator = (
        new_state(dummy_sample() * float(scheduler.init_noise_sigma), plan.memory),
        torch.manual_seed(0),
    )
    for row in range(len(plan)):
        scaled = state._replace(x=state.x / torch.sqrt(1 + plan.sigma[row] ** 2))
        z = torch.randn(scaled.x.shape, generator=generator).double()
        state = step(scaled, plan.row(row), denoise(scaled.x, plan.sigma[row].expand(4)), z)
    assert_published(state.x, total, mean)
    begin = dummy_sample().float() * scheduler.init_noise_sigma
    assert torch.allclose(state.x, theirs(scheduler, begin, scales=True), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("prediction", "total", "mean"), [("eps", 0.1233, 0.0002), ("v", 4.6934e-07, 6.1112e-10)])
def test_heun_with_ten_steps(prediction, total, mean):
    sigmas, places = own_grid(Timesteps(count=1100))
    scheduler = diffusers.HeunDiscreteScheduler(1100, **BETAS, prediction_type=PREDICTIONS[prediction])
    scheduler.set_timesteps(10)
    plan, denoise = make_plan(SamplerConfig("heun"), sigmas), published_denoise(prediction, places)
    state = new_state(dummy_sample() * float(scheduler.init_noise_sigma), plan.memory)
    for row in range(len(plan)):
        scaled = state.x / torch.sqrt(1 + plan.sigma[row] ** 2)
        denoised = denoise(scaled, plan.sigma[row].expand(4))
        if plan.a[row] == 1:  # a corrector goes on from where the predictor began, so the scaling meets D alone
            denoised = denoised + state.x - scaled
        else:
            state = state._replace(x=scaled)
        state = step(state, plan.row(row), denoised, None)
    assert_published(state.x, total, mean)
    begin = dummy_sample().float() * scheduler.init_noise_sigma
    assert torch.allclose(state.x, theirs(scheduler, begin, scales=True), rtol=1e-3, atol=1e-4)


def test_our_denoiser_finds_the_timesteps_of_a_discrete_model():
    levels = timestep_sigmas(Timesteps())
    assert torch.allclose(timestep_of(levels, levels), torch.arange(1000.0, dtype=torch.float64), atol=1e-9)
