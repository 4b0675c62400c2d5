"""Inpainting and denoising: the known region held in place, and walks that start below full noise."""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_core.config import SamplerConfig
from diffusion_core.noise import normal
from diffusion_core.samplers import Plan, make_plan
from diffusion_core.schedules import truncate


@dataclass(frozen=True)
class Resampling:
    """RePaint's harmonisation (Lugmayr et al. 2022, section 4.2): after every `jump` rows, walk them `times` times."""

    jump: int = 5
    times: int = 3

    def __post_init__(self) -> None:
        """Raise ValueError where there is nothing to walk."""
        if self.jump < 1 or self.times < 1:
            raise ValueError(f"resampling: jump {self.jump}, times {self.times}; need at least 1 each")


@dataclass(frozen=True)
class KnownRegion:
    """Pictures to keep: `picture` [B, C, H, W] in [-1, 1], `mask` [B, 1, H, W] with 1 = repaint and 0 = keep."""

    picture: Tensor
    mask: Tensor
    seeds: Tensor

    def __call__(self, x: Tensor, sigma_next: Tensor, row: int) -> Tensor:
        """x with the known region replaced by the picture at noise level `sigma_next` [B]; exact where that is 0."""
        level = sigma_next[:, None, None, None]
        noisy = self.picture + level * normal(self.seeds, "known", row, x.shape[1:], x.dtype)
        return torch.where(self.mask == 0, noisy, torch.lerp(noisy, x, self.mask))


def repaint_plan(config: SamplerConfig, sigmas: Tensor, resampling: Resampling) -> Plan:
    """The table of a sampler whose path jumps back up: every block of `jump` rows is walked `times` times.

    The block that ends at 0 is walked once: its result is the answer. `sigmas` [N + 1] decreases to 0.
    """
    down, up = [sigmas[:1]], []
    rows = len(sigmas) - 1
    for first in range(0, rows, resampling.jump):
        last = min(first + resampling.jump, rows)
        block = sigmas[first + 1 : last + 1]
        for turn in range(1 if last == rows else resampling.times, 0, -1):
            down.append(block)
            up.append(block if turn == 1 else torch.cat((block[:-1], sigmas[first : first + 1])))
    return make_plan(config, torch.cat(down), torch.cat(up))


def denoise_plan(config: SamplerConfig, sigmas: Tensor, sigma: float) -> Plan:
    """The table that starts from a picture of known noise level: `config.steps` levels from `sigma` down to 0.

    One step is the posterior mean, the best answer by squared error; more steps give sharper pictures.
    """
    if config.steps == 1:
        return make_plan(config, torch.tensor([sigma, 0.0], dtype=torch.float64))
    return make_plan(config, truncate(sigmas, sigma))
