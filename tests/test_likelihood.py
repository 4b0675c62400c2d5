import math

import numpy as np
import pytest
import torch

from diffusion_core.config import PRESETS, ModelConfig
from diffusion_core.denoiser import Denoiser
from diffusion_core.likelihood import SIGMA_MIN, bits_per_dimension, log_likelihood
from diffusion_core.unet import UNet

pytestmark = pytest.mark.usefixtures("one_thread")
SPREAD = 0.5
SEEDS = torch.arange(4)


def gaussian(x, sigma, label):
    """The exact denoiser of pictures whose values are independent, normal, of standard deviation SPREAD."""
    return x * (SPREAD**2 / (SPREAD**2 + sigma**2))[:, None, None, None].to(x.dtype)


def two_modes(x, sigma, label):
    """The exact denoiser of points at (1, .5) and (-1, -.5) with normal spread SPREAD about each, equally often."""
    centre = torch.tensor([1.0, 0.5], dtype=x.dtype)[None, :, None, None]
    var = (SPREAD**2 + sigma**2)[:, None, None, None].to(x.dtype)
    side = torch.tanh((x * centre).sum(dim=1, keepdim=True) / var)
    return side * centre + SPREAD**2 / var * (x - side * centre)


def normal_nats(x, variance):
    flat = x.double().flatten(1)
    return -0.5 * flat.square().sum(dim=1) / variance - 0.5 * flat.shape[1] * math.log(2 * math.pi * variance)


def points(count, shape=(3, 4, 4)):
    return torch.from_numpy(np.random.default_rng(3).normal(0, SPREAD, (count, *shape)))


def test_the_density_of_normal_pictures_is_the_closed_form():
    x = points(4)
    expected = normal_nats(x, SPREAD**2 + SIGMA_MIN**2)
    assert torch.allclose(log_likelihood(gaussian, x, None, SEEDS, 64), expected, rtol=0, atol=5e-3)


def test_the_error_falls_with_the_fourth_power_of_the_steps():
    x = points(4)
    expected = normal_nats(x, SPREAD**2 + SIGMA_MIN**2)
    # What is left at many steps comes from the prior, which is wider than the pictures with the most noise.
    left = log_likelihood(gaussian, x, None, SEEDS, 256)
    assert torch.allclose(left, expected, rtol=0, atol=5e-3)
    coarse, fine = ((log_likelihood(gaussian, x, None, SEEDS, n) - left).abs().mean().item() for n in (12, 24))
    assert 3.5 < math.log2(coarse / fine) < 4.6


def test_the_trace_is_right_on_average_where_values_depend_on_one_another():
    """Two values have two probes up to sign, so the mean over both is the exact trace's."""
    x = torch.tensor([0.4, -0.3], dtype=torch.float64).reshape(1, 2, 1, 1).expand(16, 2, 1, 1)
    centre = torch.tensor([1.0, 0.5]).reshape(1, 2, 1, 1)
    modes = torch.stack([normal_nats(x[:1] - sign * centre, SPREAD**2 + SIGMA_MIN**2) for sign in (1, -1)])
    found = log_likelihood(two_modes, x, None, torch.arange(16), 64).numpy().round(9)
    assert len(np.unique(found)) == 2
    exact = (torch.logsumexp(modes, 0) - math.log(2)).item()
    assert np.unique(found).mean() == pytest.approx(exact, abs=5e-3)


def test_bits_are_those_of_bytes():
    """A normal distribution much wider than a byte needs its differential entropy, in units of a byte's width."""
    pixels = torch.from_numpy(np.round((points(64).numpy().clip(-1, 1) + 1) * 127.5) / 127.5 - 1)
    bits = bits_per_dimension(gaussian, pixels, None, torch.arange(64), 24)
    ideal = normal_nats(pixels, SPREAD**2) / (-48 * math.log(2)) - math.log2(2 / 255)
    assert bits.mean().item() == pytest.approx(ideal.mean().item(), abs=0.01)


def test_a_picture_has_the_same_bits_beside_any_other():
    torch.manual_seed(0)
    unet = PRESETS["tiny"]
    denoiser = Denoiser(UNet(unet).eval(), ModelConfig(unet))
    x = points(6, (3, unet.resolution, unet.resolution)).float().clamp(-1, 1)
    together = bits_per_dimension(denoiser, x, None, torch.arange(6), 3)
    turned = bits_per_dimension(denoiser, x.flip(0), None, torch.arange(6).flip(0), 3)
    assert torch.allclose(together, turned.flip(0), rtol=1e-5)
