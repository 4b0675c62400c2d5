"""Noise levels: the sigma grids that samplers walk, and the sigmas that training draws."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from diffusion_core.config import GridName


def sigma_grid(grid: GridName, steps: int, sigma_min: float, sigma_max: float) -> Tensor:
    """Decreasing sigmas [steps + 1] (float64) from sigma_max over sigma_min to 0; one step goes straight to 0.

    Raises ValueError where steps < 1 or not 0 < sigma_min < sigma_max.
    """
    if steps < 1:
        raise ValueError(f"steps: {steps}; need at least 1")
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"sigma_min, sigma_max: {sigma_min}, {sigma_max}; need 0 < sigma_min < sigma_max")
    fractions = torch.linspace(0.0, 1.0, steps, dtype=torch.float64)
    return torch.cat((_GRIDS[grid](fractions, sigma_min, sigma_max), torch.zeros(1, dtype=torch.float64)))


def truncate(sigmas: Tensor, sigma: float) -> Tensor:
    """The part of a grid below `sigma`, with `sigma` itself in front: where a walk from a known noise level begins."""
    return torch.cat((torch.tensor([sigma], dtype=sigmas.dtype), sigmas[sigmas < sigma]))


def log_normal_sigma(uniform: Tensor, mean: float = -1.2, std: float = 1.2) -> Tensor:
    """Training sigmas with ln(sigma) ~ N(mean, std²) from uniform numbers in (0, 1) (Karras et al. 2022, table 1)."""
    return torch.exp(mean + std * math.sqrt(2.0) * torch.erfinv(2.0 * uniform - 1.0))


def _karras(fractions: Tensor, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """Karras et al. 2022, eq. 5."""
    high, low = math.pow(sigma_max, 1 / rho), math.pow(sigma_min, 1 / rho)
    return torch.pow(high + fractions * (low - high), rho)


def _log_snr(fractions: Tensor, sigma_min: float, sigma_max: float) -> Tensor:
    """Equal steps of ln sigma."""
    return torch.exp(math.log(sigma_max) + fractions * (math.log(sigma_min) - math.log(sigma_max)))


_GRIDS: dict[str, Callable[[Tensor, float, float], Tensor]] = {"karras": _karras, "log_snr": _log_snr}
