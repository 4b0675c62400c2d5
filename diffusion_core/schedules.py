"""Noise levels: schedules sigma(t) and t(sigma), the grids that samplers walk, and the sigmas that training draws.

State is kept in sigma coordinates, x = x0 + sigma·eps, so that adding noise is addition. All levels are float64.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from diffusion_core.config import BetaName, GridName, ScheduleName, Timesteps

_BETA_MIN, _BETA_SPAN = 0.1, 19.9
_COSINE_OFFSET = 0.008 / 1.008 * math.pi / 2
_RHO = 7.0
_SHAPING, _SHAPING_WIDTH = 0.8, 3.0
_EDM_MIN, _EDM_MAX = 0.002 ** (1 / _RHO), 80.0 ** (1 / _RHO)


class Schedule(NamedTuple):
    """A forward process: `sigma` of t in [0, 1], increasing, and its inverse `t` of sigma."""

    sigma: Callable[[Tensor], Tensor]
    t: Callable[[Tensor], Tensor]


def _linear_sigma(t: Tensor) -> Tensor:
    """Song et al. 2021 (score SDE), eq. 33: the limit of 1,000 betas from 1e-4 to 0.02."""
    return torch.sqrt(torch.expm1(0.5 * _BETA_SPAN * t**2 + _BETA_MIN * t))


def _linear_t(sigma: Tensor) -> Tensor:
    rise = 2 * _BETA_SPAN * torch.log1p(sigma**2)
    return rise / (_BETA_SPAN * (torch.sqrt(_BETA_MIN**2 + rise) + _BETA_MIN))


def _cosine_sigma(t: Tensor) -> Tensor:
    """Nichol & Dhariwal 2021, eq. 17, by cos²a − cos²b = sin(b − a)·sin(b + a), exact also near t = 0."""
    turn = t * (math.pi / 2 - _COSINE_OFFSET)
    rest = (1 - t) * (math.pi / 2 - _COSINE_OFFSET)
    return torch.sqrt(torch.sin(turn) * torch.sin(turn + 2 * _COSINE_OFFSET)) / torch.sin(rest)


def _cosine_t(sigma: Tensor) -> Tensor:
    angle = torch.atan2(
        torch.sqrt(sigma**2 + math.sin(_COSINE_OFFSET) ** 2), torch.full_like(sigma, math.cos(_COSINE_OFFSET))
    )
    return (angle - _COSINE_OFFSET) / (math.pi / 2 - _COSINE_OFFSET)


SCHEDULES: dict[ScheduleName, Schedule] = {
    "linear": Schedule(_linear_sigma, _linear_t),
    "cosine": Schedule(_cosine_sigma, _cosine_t),
    # Karras et al. 2022, eq. 5, read as a schedule from 0.002 to 80
    "edm": Schedule(
        lambda t: (_EDM_MIN + t * (_EDM_MAX - _EDM_MIN)) ** _RHO,
        lambda sigma: (sigma ** (1 / _RHO) - _EDM_MIN) / (_EDM_MAX - _EDM_MIN),
    ),
    # Rectified flow (Liu et al. 2022): x_t = (1 − t)·x0 + t·eps, divided by 1 − t
    "flow": Schedule(lambda t: t / (1 - t), lambda sigma: sigma / (1 + sigma)),
}


def add_noise(x0: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """x0 + sigma·noise for x0 and noise [B, …], sigma [B]."""
    return x0 + sigma.to(x0.dtype).reshape(-1, *[1] * (x0.ndim - 1)) * noise


@functools.lru_cache(maxsize=16)
def timestep_sigmas(timesteps: Timesteps) -> Tensor:
    """Noise levels [count] (float64, increasing) of a discrete model's timesteps 0 … count - 1."""
    alphas = torch.cumprod(1 - _BETAS[timesteps.betas](timesteps), dim=0)
    return torch.sqrt((1 - alphas) / alphas)


def timestep_of(sigma: Tensor, levels: Tensor) -> Tensor:
    """The timestep, whole at `levels` [count] and linear in ln(sigma) between them; held at both ends. float64."""
    logs = levels.log()
    value = sigma.to(torch.float64).log().clamp(logs[0], logs[-1])
    upper = torch.searchsorted(logs, value).clamp(1, len(logs) - 1)
    low, high = logs[upper - 1], logs[upper]
    return upper - 1 + (value - low) / (high - low)


def sigma_grid(
    grid: GridName,
    steps: int,
    sigma_min: float,
    sigma_max: float,
    schedule: ScheduleName = "edm",
    levels: Tensor | None = None,
) -> Tensor:
    """Decreasing sigmas [steps + 1] (float64) from sigma_max over sigma_min to 0; one step goes straight to 0.

    "arctan" goes to 0 in place of sigma_min. "uniform_t" has equal steps of t in `schedule`. "timesteps", "leading" and
    "trailing" take entries of `levels`, a discrete model's own noise levels, within the range: evenly spaced with both
    ends, or whole steps apart from the lowest up, or from the highest down (Lin et al. 2024, table 2). Raises
    ValueError where steps < 1, not 0 < sigma_min < sigma_max, or there are fewer levels than steps.
    """
    if steps < 1:
        raise ValueError(f"steps: {steps}; need at least 1")
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(f"sigma_min, sigma_max: {sigma_min}, {sigma_max}; need 0 < sigma_min < sigma_max")
    if grid == "arctan":
        return _arctan(torch.linspace(0.0, 1.0, steps + 1, dtype=torch.float64), sigma_min, sigma_max)
    fractions = torch.linspace(0.0, 1.0, steps, dtype=torch.float64)
    if grid in _PLACES:
        sigmas = _own_levels(grid, steps, sigma_min, sigma_max, levels)
    elif grid == "uniform_t":
        sigmas = _uniform_t(fractions, sigma_min, sigma_max, SCHEDULES[schedule])
    else:
        sigmas = _GRIDS[grid](fractions, sigma_min, sigma_max)
    return torch.cat((sigmas, torch.zeros(1, dtype=torch.float64)))


def level_at(sigmas: Tensor, place: Tensor) -> Tensor:
    """Sigmas at places 0 … N of a grid `sigmas` [N + 1], whole or between its levels: geometric there, linear to 0."""
    upper = place.floor().clamp(0, len(sigmas) - 2).long()
    high, low, share = sigmas[upper], sigmas[upper + 1], place - upper
    geometric = torch.exp(torch.lerp(high.log(), low.clamp(min=1e-300).log(), share))
    return torch.where(low > 0, geometric, torch.lerp(high, low, share))


def grid_from(sigmas: Tensor, sigma: float, steps: int) -> Tensor:
    """Decreasing sigmas [steps + 1] from `sigma` to the end of a grid, spaced as the grid [N + 1] is spaced below it.

    Raises ValueError unless sigma is positive, finite, above the grid's end and at most its first level.
    """
    if not float(sigmas[-1]) < sigma <= float(sigmas[0]) * (1 + 1e-9):  # grids are exact to rounding
        raise ValueError(
            f"sigma: {sigma}; need more than {float(sigmas[-1]):g} and at most {float(sigmas[0]):g}, as the grid has"
        )
    upper = max(int((sigmas >= sigma).sum()) - 1, 0)
    high, low = float(sigmas[upper]), float(sigmas[upper + 1])
    share = math.log(high / sigma) / math.log(high / low) if low > 0 else (high - sigma) / high
    places = torch.linspace(upper + share, len(sigmas) - 1, steps + 1, dtype=torch.float64)
    levels = level_at(sigmas, places)
    levels[0], levels[-1] = sigma, sigmas[-1]
    return levels


@dataclass(frozen=True)
class SigmaDistribution:
    """The sigmas that training draws: ln(sigma) ~ N(mean, std²) (Karras et al. 2022, table 1), or uniform in t.

    "uniform_t" draws t of `schedule` between those of `low` and `high`, which "log_normal" has no use for.
    """

    kind: Literal["log_normal", "uniform_t"] = "log_normal"
    mean: float = -1.2
    std: float = 1.2
    schedule: ScheduleName = "edm"
    low: float = 0.002
    high: float = 80.0

    def __post_init__(self) -> None:
        """Raise ValueError where the distribution is empty."""
        if not (math.isfinite(self.mean) and 0 < self.std < math.inf and 0 < self.low < self.high < math.inf):
            raise ValueError(
                f"sigma: mean {self.mean}, std {self.std}, low {self.low}, high {self.high}; "
                "need finite values, std > 0 and 0 < low < high"
            )

    def sigma(self, uniform: Tensor) -> Tensor:
        """The sigmas at quantiles `uniform` [B] in (0, 1)."""
        if self.kind == "log_normal":
            return torch.exp(self.mean + self.std * math.sqrt(2.0) * torch.erfinv(2.0 * uniform - 1.0))
        ends = SCHEDULES[self.schedule].t(torch.tensor([self.low, self.high], dtype=torch.float64))
        return SCHEDULES[self.schedule].sigma(torch.lerp(ends[0], ends[1], uniform.to(torch.float64)))


def stratify(offset: Tensor, place: Tensor, count: int) -> Tensor:
    """Quantiles [B] that cover (0, 1) evenly over a batch of `count`: the sample at `place` [B] of it takes its own.

    `offset` [B] is one uniform number of the whole batch (Kingma et al. 2021, appendix I.1). A single quantile is
    still uniform.
    """
    return torch.frac(offset + place.to(torch.float64) / count).clamp(2.0**-33, 1 - 2.0**-33)


def _karras(fractions: Tensor, sigma_min: float, sigma_max: float) -> Tensor:
    """Karras et al. 2022, eq. 5."""
    high, low = math.pow(sigma_max, 1 / _RHO), math.pow(sigma_min, 1 / _RHO)
    return torch.pow(high + fractions * (low - high), _RHO)


def _log_snr(fractions: Tensor, sigma_min: float, sigma_max: float) -> Tensor:
    """Equal steps of ln sigma."""
    return torch.exp(math.log(sigma_max) + fractions * (math.log(sigma_min) - math.log(sigma_max)))


_GRIDS: dict[str, Callable[[Tensor, float, float], Tensor]] = {"karras": _karras, "log_snr": _log_snr}


def _arctan(fractions: Tensor, sigma_min: float, sigma_max: float) -> Tensor:
    """Equal steps of atan((ln sigma − 0.8)/3) with 0 in place of sigma_min.

    They are closest around sigma 2.2, where pictures in [-1, 1] take their shape, and grow towards both ends.
    """
    high, low = (math.atan((math.log(end) - _SHAPING) / _SHAPING_WIDTH) for end in (sigma_max, sigma_min))
    sigmas = torch.exp(_SHAPING + _SHAPING_WIDTH * torch.tan(high + fractions * (low - high)))
    sigmas[-1], sigmas[0] = 0.0, sigma_max
    return sigmas


def _uniform_t(fractions: Tensor, sigma_min: float, sigma_max: float, schedule: Schedule) -> Tensor:
    """Equal steps of t, with both ends exact."""
    ends = torch.tensor([sigma_max, sigma_min], dtype=torch.float64)
    first, last = schedule.t(ends)
    sigmas = schedule.sigma(first + fractions * (last - first))
    sigmas[-1], sigmas[0] = ends[1], ends[0]
    return sigmas


def _linspace(count: int, steps: int) -> Tensor:
    """From count - 1 to 0, both ends included."""
    return (1 - torch.linspace(0.0, 1.0, steps, dtype=torch.float64)) * (count - 1)


def _leading(count: int, steps: int) -> Tensor:
    """Whole steps apart, down to 0: the highest is left out."""
    return torch.arange(steps - 1, -1, -1, dtype=torch.float64) * (count // steps)


def _trailing(count: int, steps: int) -> Tensor:
    """Equal steps apart from count - 1 down: the lowest is left out."""
    return torch.round(count - torch.arange(steps, dtype=torch.float64) * count / steps) - 1


# Timesteps of a discrete model of `count`, from the highest down.
_PLACES: dict[str, Callable[[int, int], Tensor]] = {
    "timesteps": _linspace, "leading": _leading, "trailing": _trailing,
}  # fmt: skip


def _own_levels(grid: str, steps: int, sigma_min: float, sigma_max: float, levels: Tensor | None) -> Tensor:
    """Entries of a discrete model's own levels, from the highest down."""
    own = torch.empty(0) if levels is None else levels[(levels >= sigma_min) & (levels <= sigma_max)]
    if len(own) < steps:
        raise ValueError(
            f"grid: {grid} has {len(own)} levels from {sigma_min} to {sigma_max} for {steps} steps; "
            "take fewer steps or another grid"
        )
    return own[torch.round(_PLACES[grid](len(own), steps)).long()].to(torch.float64)


def _cosine_betas(timesteps: Timesteps) -> Tensor:
    """Nichol & Dhariwal 2021, section 3.2, cut off at 0.999."""
    place = torch.arange(timesteps.count + 1, dtype=torch.float64) / timesteps.count
    alphas = torch.cos((place + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - alphas[1:] / alphas[:-1]).clamp(max=0.999)


_BETAS: dict[BetaName, Callable[[Timesteps], Tensor]] = {
    "linear": lambda t: torch.linspace(t.first, t.last, t.count, dtype=torch.float64),
    "scaled_linear": lambda t: torch.linspace(t.first**0.5, t.last**0.5, t.count, dtype=torch.float64) ** 2,
    "cosine": _cosine_betas,
}
