"""Samplers as tables: one row per denoiser call, x' = a·x + b·D + c·D_prev + s·z, then D_prev' = D."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion_core.config import SamplerConfig, SamplerName
from diffusion_core.noise import normal

Denoise = Callable[[Tensor, Tensor], Tensor]
Constrain = Callable[[Tensor, Tensor, int], Tensor]
Watch = Callable[[int, Tensor], None]


@dataclass(frozen=True)
class Plan:
    """The table of a sampler: float64 columns [N], one row per denoiser call.

    `sigma` is the noise level that a row starts from, `sigma_next` the one that it leaves behind.
    """

    sigma: Tensor
    sigma_next: Tensor
    a: Tensor
    b: Tensor
    c: Tensor
    s: Tensor

    def __len__(self) -> int:
        """Number of denoiser calls."""
        return len(self.sigma)


class State(NamedTuple):
    """A picture on its way: x [B, C, H, W], and the denoiser's last answer of the same shape."""

    x: Tensor
    previous: Tensor


def make_plan(config: SamplerConfig, sigmas: Tensor, up: Tensor | None = None) -> Plan:
    """The table of `config.sampler` along `sigmas` [N + 1], which ends at 0.

    Row i walks down to sigmas[i + 1] and then jumps up to `up[i]` [N] by adding noise (RePaint; default: no jump),
    where the next row starts. Raises ValueError where a row would not walk down from a positive level.
    """
    down = sigmas[1:].to(torch.float64)
    after = down if up is None else up.to(torch.float64)
    high = torch.cat((sigmas[:1].to(torch.float64), after[:-1]))
    if len(down) < 1 or bool((down >= high).any()) or bool((down < 0).any()) or bool((after < down).any()):
        raise ValueError(f"sigmas: {sigmas.tolist()}; need levels that decrease to 0, at least two of them")
    return _PLANNERS[config.sampler](high, down, after, config.eta)


def step(state: State, plan: Plan, row: int, denoised: Tensor, z: Tensor | None) -> State:
    """One row of the table: state and denoised D(x, sigma) -> next state. `z` is needed where the row's s is not 0."""
    a, b, c, s = (float(column[row]) for column in (plan.a, plan.b, plan.c, plan.s))
    x = a * state.x + b * denoised + c * state.previous
    return State(x if z is None else x + s * z, denoised)


def sample(
    denoise: Denoise,
    plan: Plan,
    x: Tensor,
    seeds: Tensor,
    constrain: Constrain | None = None,
    watch: Watch | None = None,
) -> Tensor:
    """Walk `x` [B, C, H, W] at plan.sigma[0] down the table; `seeds` [B] key the sampler's noise.

    `denoise(x, sigma [B])` is D; `constrain(x, sigma_next [B], row)` may amend x after each row (inpainting);
    `watch(row, denoised)` sees every estimate.
    """
    state = State(x, torch.zeros_like(x))
    for row in range(len(plan)):
        level = plan.sigma[row].expand(len(x)).to(x.device, x.dtype)
        denoised = denoise(state.x, level)
        z = normal(seeds, "sampler", row, x.shape[1:], x.dtype) if plan.s[row] != 0 else None
        state = step(state, plan, row, denoised, z)
        if constrain is not None:
            state = state._replace(x=constrain(state.x, plan.sigma_next[row].expand(len(x)).to(x), row))
        if watch is not None:
            watch(row, denoised)
    return state.x


def start_noise(plan: Plan, seeds: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Where generation begins: x = sigma_0 · noise, [B, *shape]."""
    return float(plan.sigma[0]) * normal(seeds, "start", 0, shape, dtype)


def _ancestral(high: Tensor, down: Tensor, after: Tensor, eta: float) -> Plan:
    """DDIM (eta 0; Song et al. 2021) to DDPM (eta 1; Ho et al. 2020) in sigma coordinates; a jump only raises s."""
    r = down / high
    s = eta * down * torch.sqrt(1 - r**2)
    a = torch.sqrt(down**2 - s**2) / high
    return Plan(high, after, a, 1 - a, torch.zeros_like(a), torch.sqrt(s**2 + after**2 - down**2))


def _dpmpp_2m(high: Tensor, down: Tensor, after: Tensor, _: float) -> Plan:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2) for any grid; first order on the first row and after a jump."""
    r = down / high
    h = -torch.log(r)
    k = torch.zeros_like(r)
    k[1:] = h[1:] / (2 * h[:-1])
    k[1:][after[:-1] > down[:-1]] = 0.0
    k[down == 0] = 0.0
    return Plan(high, after, r, (1 - r) * (1 + k), -(1 - r) * k, torch.sqrt(after**2 - down**2))


_PLANNERS: dict[SamplerName, Callable[[Tensor, Tensor, Tensor, float], Plan]] = {
    "ddim": _ancestral,
    "euler": lambda high, down, after, _: _ancestral(high, down, after, 0.0),
    "ddpm": lambda high, down, after, _: _ancestral(high, down, after, 1.0),
    "euler_ancestral": lambda high, down, after, _: _ancestral(high, down, after, 1.0),
    "dpmpp_2m": _dpmpp_2m,
}
