"""Bits per dimension by the probability-flow ODE (Song et al. 2021, "Score-based generative modeling through SDEs")."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from diffusion_core.denoiser import Denoiser
from diffusion_core.noise import normal, uniform_field

SIGMA_MIN, SIGMA_MAX = 0.002, 80.0
# Pictures in [-1, 1] have 256 levels.
_BIN = 2 / 255
State = tuple[Tensor, Tensor]


def bits_per_dimension(denoiser: Denoiser, pictures: Tensor, label: Tensor | None, seeds: Tensor, steps: int) -> Tensor:
    """Bits [B] (float64) that the model needs for each value of `pictures` [B, C, H, W], which are bytes as floats.

    Noise of `seeds` [B] spreads every byte over its bin (Theis et al. 2016, section 3.1), so that this bounds the bits
    of the bytes from above, up to the solver's error.
    """
    spread = pictures + _BIN * (uniform_field(seeds, "dequantise", 0, pictures.shape[1:]).to(pictures) - 0.5)
    nats = log_likelihood(denoiser, spread, label, seeds, steps)
    return -nats / (math.prod(pictures.shape[1:]) * math.log(2)) - math.log2(_BIN)


def log_likelihood(denoiser: Denoiser, x: Tensor, label: Tensor | None, seeds: Tensor, steps: int) -> Tensor:
    """ln p(x) in nats [B] (float64) of x [B, C, H, W], by `steps` classical Runge-Kutta steps in ln sigma.

    Along dx/dσ = (x − D)/σ the density changes by the divergence (eq. 39 there): with t = ln σ, dx/dt = x − D and
    d ln p/dt = −(dim − tr ∂D/∂x). The trace is Hutchinson's estimate by one vector of signs of `seeds` [B], the same at
    all levels; its mean is exact. Four times `steps` calls of the denoiser and of its vector-Jacobian product.
    """
    probe = normal(seeds, "probe", 0, x.shape[1:]).sign().to(x)
    times = torch.linspace(math.log(SIGMA_MIN), math.log(SIGMA_MAX), steps + 1, dtype=torch.float64)

    def slope(time: float, place: Tensor) -> State:
        return _flow(denoiser, place, time, label, probe)

    gained = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for time, after in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
        x, more = _runge_kutta(slope, x, time, after - time)
        gained += more
    prior = -0.5 * (x.double().flatten(1) / SIGMA_MAX).square().sum(dim=1)
    prior -= 0.5 * x[0].numel() * math.log(2 * math.pi * SIGMA_MAX**2)
    return prior + gained


def _flow(denoiser: Denoiser, x: Tensor, time: float, label: Tensor | None, probe: Tensor) -> State:
    """dx/dt [B, C, H, W] and its divergence [B] (float64) at t = ln sigma."""
    with torch.enable_grad():
        place = x.detach().requires_grad_()
        clean = denoiser(place, torch.full((len(x),), math.exp(time), device=x.device, dtype=x.dtype), label)
        (pulled,) = torch.autograd.grad(clean, place, probe)
    trace = (pulled.double() * probe.double()).flatten(1).sum(dim=1)
    return x - clean.detach(), probe.double().square().flatten(1).sum(dim=1) - trace


def _runge_kutta(slope: Callable[[float, Tensor], State], x: Tensor, time: float, step: float) -> State:
    """One step of the classical fourth-order method: the new place, and the integral of the divergence."""
    first, one = slope(time, x)
    second, two = slope(time + step / 2, x + step / 2 * first)
    third, three = slope(time + step / 2, x + step / 2 * second)
    fourth, four = slope(time + step, x + step * third)
    return x + step / 6 * (first + 2 * second + 2 * third + fourth), step / 6 * (one + 2 * two + 2 * three + four)
