"""Inpainting and denoising: the known region held in place, and walks that start below full noise."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_core.config import Inpainting, SamplerConfig
from diffusion_core.noise import normal
from diffusion_core.samplers import Plan, make_plan
from diffusion_core.schedules import grid_from

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class KnownRegion:
    """Pictures to keep: `picture` [B, C, H, W] in [-1, 1], `mask` [B, 1, H, W] with 1 = repaint and 0 = keep."""

    picture: Tensor
    mask: Tensor
    seeds: Tensor

    def __call__(self, x: Tensor, sigma_next: Tensor, row: int | Tensor) -> Tensor:
        """x with the known region replaced by the picture at noise level `sigma_next` [B]; exact where that is 0."""
        level = sigma_next[:, None, None, None]
        noisy = self.picture + level * normal(self.seeds, "known", row, x.shape[1:], x.dtype)
        return torch.where(self.mask == 0, noisy, torch.lerp(noisy, x, self.mask))


def steered(
    denoised: Tensor, product: Product, sigma: Tensor, known: KnownRegion, pull: Tensor, solves: int
) -> tuple[Tensor, Tensor]:
    """E[x0 | x, known region] [B, C, H, W] at noise level `sigma` [B], and the pull that led there.

    `denoised` is D(x) and `product(v)` its vector-Jacobian product Jᵀv. As sigma²·J is the covariance of x0 given x
    (Tweedie), D + Jᵀz with z = (W·Jᵀ·W)⁻¹·W·(picture − D) is exact for jointly Gaussian pixels, W the known region;
    Song et al. 2023 (PiGDM) put one number in place of W·Jᵀ·W. Here z is the one with the least residual among `solves`
    directions and the last row's answer: generalised conjugate residuals (Eisenstat et al. 1983), which never move
    away from the known region even where a network's Jacobian is no covariance. `pull` [B, C, H, W] is z/sigma², which
    hardly changes from row to row (zeros before the first row). Costs solves + 1 products. A pixel that is partly known
    steers as a known one does; how much of it is mixed in is decided at the end.
    """
    share, variance = (known.mask < 1).to(denoised), (sigma**2)[:, None, None, None]
    z, move = torch.zeros_like(denoised), torch.zeros_like(denoised)
    residual = share * (known.picture - denoised)
    direction = variance * pull
    tried: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for _ in range(solves + 1):
        ahead = product(share * direction)
        for other, other_ahead, seen, size in tried:
            part = _ratio(_dot(share * ahead, seen), size)
            direction, ahead = direction - part * other, ahead - part * other_ahead
        seen = share * ahead
        size = _dot(seen, seen)
        length = _ratio(_dot(residual, seen), size)
        tried.append((direction, ahead, seen, size))
        z, move, residual = z + length * direction, move + length * ahead, residual - length * seen
        direction = residual
    return torch.where(known.mask == 0, known.picture, denoised + move), z / variance


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products [B, 1, 1, 1]."""
    return (a * b).flatten(1).sum(dim=1)[:, None, None, None]


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a/b, and 0 where b is 0: nothing is left to solve."""
    return torch.where(b > 0, a / torch.where(b > 0, b, 1.0), 0.0)


def repaint_plan(config: SamplerConfig, sigmas: Tensor, how: Inpainting) -> Plan:
    """The table of a sampler whose path jumps back up: every block of `how.jump` rows is walked `how.times` times.

    The block that ends at 0 is walked once: its result is the answer. `sigmas` [N + 1] decreases to 0.
    """
    down, up = [sigmas[:1]], []
    rows = len(sigmas) - 1
    for first in range(0, rows, how.jump):
        last = min(first + how.jump, rows)
        block = sigmas[first + 1 : last + 1]
        for turn in range(1 if last == rows else how.times, 0, -1):
            down.append(block)
            up.append(block if turn == 1 else torch.cat((block[:-1], sigmas[first : first + 1])))
    return make_plan(config, torch.cat(down), torch.cat(up))


def denoise_plan(config: SamplerConfig, sigmas: Tensor, sigma: float) -> Plan:
    """The table that starts from a picture of known noise level: `config.steps` steps from `sigma` down to 0.

    One step is the posterior mean, the best answer by squared error; more steps give sharper pictures.
    """
    return make_plan(config, grid_from(sigmas, sigma, config.steps))
