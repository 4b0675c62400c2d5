"""Samplers as tables: one row per denoiser call, and one update that knows no sampler by name.

    x' = a·x + b·D + Σⱼ cⱼ·Hⱼ + s·z        H' = (α·x + β·D, H₁, …)        with the x before the update

D is the denoised picture, H what earlier rows remembered, z fresh noise. Below, r = sigma'/sigma.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion_core import checks
from diffusion_core.config import ModelConfig, SamplerConfig, SamplerName
from diffusion_core.noise import normal
from diffusion_core.schedules import sigma_grid, timestep_sigmas

Denoise = Callable[[Tensor, Tensor], Tensor]
Constrain = Callable[[Tensor, Tensor, int], Tensor]
Watch = Callable[[int, Tensor], None]

_ANGLE_UNIT = 4.0


@dataclass(frozen=True)
class Row:
    """Coefficients of one update, each [B] or [1], `c` [B or 1, K]."""

    a: Tensor
    b: Tensor
    c: Tensor
    s: Tensor
    alpha: Tensor
    beta: Tensor


@dataclass(frozen=True)
class Plan(Row):
    """The table of a sampler: columns [N], one row per denoiser call; `c` [N, K] for a history of K.

    `sigma` is the noise level that a row starts from, `sigma_next` the one that it leaves behind.
    """

    sigma: Tensor
    sigma_next: Tensor

    def __len__(self) -> int:
        """Number of denoiser calls."""
        return len(self.sigma)

    @property
    def memory(self) -> int:
        """Number of remembered pictures K."""
        return self.c.shape[1]

    def row(self, index: int) -> Row:
        """The coefficients of row `index`, each [1]."""
        columns = (self.a, self.b, self.c, self.s, self.alpha, self.beta)
        return Row(*(column[index : index + 1] for column in columns))


class State(NamedTuple):
    """A picture on its way: x [B, …], and K remembered pictures of the same shape, the newest first."""

    x: Tensor
    history: tuple[Tensor, ...]


def new_state(x: Tensor, memory: int) -> State:
    """A state before the first row, with room to remember `memory` pictures."""
    return State(x, tuple(torch.zeros_like(x) for _ in range(memory)))


def make_plan(config: SamplerConfig, sigmas: Tensor, up: Tensor | None = None) -> Plan:
    """The table of `config.sampler` along `sigmas` [N + 1], which ends at 0 or above it.

    Interval i walks down to sigmas[i + 1] and then jumps up to `up[i]` [N] by adding noise (RePaint; default: no
    jump), where the next one starts. Raises ValueError where an interval would not walk down from a positive level.
    """
    levels = sigmas.to(torch.float64)
    if levels.ndim != 1 or len(levels) < 2 or not (torch.isfinite(levels) & (levels >= 0)).all():
        raise ValueError(f"sigmas: {sigmas.tolist()}; need levels that decrease to 0, at least two of them")
    down = levels[1:]
    after = down if up is None else up.to(torch.float64)
    if after.shape != down.shape or not (torch.isfinite(after) & (after >= down)).all():
        raise ValueError(f"up: {after.tolist()}; need a finite level for each interval, none below {down.tolist()}")
    high = torch.cat((levels[:1], after[:-1]))
    if not (down < high).all():
        raise ValueError(f"sigmas: {sigmas.tolist()}; need levels that decrease to 0, at least two of them")
    return _PLANNERS[config.sampler](_Walk(high, down, after), config)


def step(state: State, row: Row, denoised: Tensor, z: Tensor | None) -> State:
    """One row of the table: state and denoised D(x, sigma) [B, …] -> next state.

    `z` is needed where a row's s is not 0. Products are rounded one by one, so that no batch shape changes a bit.
    """
    x = _times(row.a, state.x) + _times(row.b, denoised)
    for age, remembered in enumerate(state.history):
        x = x + _times(row.c[:, age], remembered)
    if z is not None:
        x = x + _times(row.s, z)
    newest = _times(row.alpha, state.x) + _times(row.beta, denoised)
    return State(x, (newest, *state.history)[: len(state.history)])


def sample(
    denoise: Denoise,
    plan: Plan,
    x: Tensor,
    seeds: Tensor,
    constrain: Constrain | None = None,
    watch: Watch | None = None,
) -> Tensor:
    """Walk `x` [B, …] at plan.sigma[0] down the table; `seeds` [B] (int64) key the sampler's noise.

    `denoise(x, sigma [B])` is D; `constrain(x, sigma_next [B], row)` may amend x after each row (inpainting);
    `watch(row, denoised)` sees every estimate. Raises ValueError on seeds of another type or number, and on an x
    that is not floating or not finite.
    """
    checks.seeds("seeds", seeds)
    if x.shape[:1] != seeds.shape or x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"x: {x.dtype} {list(x.shape)}; need float32 or float64, a picture for {len(seeds)} seeds")
    checks.finite("x", x)
    state = new_state(x, plan.memory)
    for row in range(len(plan)):
        denoised = denoise(state.x, plan.sigma[row].expand(len(x)).to(x.device, x.dtype))
        z = normal(seeds, "sampler", row, x.shape[1:], x.dtype) if plan.s[row] != 0 else None
        state = step(state, plan.row(row), denoised, z)
        if constrain is not None:
            state = state._replace(x=constrain(state.x, plan.sigma_next[row].expand(len(x)).to(x), row))
        if watch is not None:
            watch(row, denoised)
    return state.x


def start_noise(
    plan: Plan,
    seeds: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    model: ModelConfig | None = None,
) -> Tensor:
    """Where generation begins: x = sigma_0 · noise, [B, *shape]; by `start_level` where the model is given."""
    level = float(plan.sigma[0]) if model is None else start_level(plan, model)
    return level * normal(seeds, "start", 0, shape, dtype)


def start_level(plan: Plan, model: ModelConfig) -> float:
    """Standard deviation of the noise that generation begins with: sigma_0, with room for a discrete model's picture.

    A discrete model's network sees noise of variance 1 at first (Ho et al. 2020, algorithm 2): x = √(1 + sigma_0²)·z.
    """
    sigma = float(plan.sigma[0])
    return sigma if model.timesteps is None else math.hypot(1.0, sigma)


def model_grid(config: SamplerConfig, model: ModelConfig) -> Tensor:
    """The sigmas [steps + 1] that `config` walks with `model`. Raises ValueError where the model has no such grid."""
    levels = timestep_sigmas(model.timesteps) if model.timesteps else None
    return sigma_grid(config.grid, config.steps, model.sigma_min, model.sigma_max, model.schedule, levels)


class _Walk(NamedTuple):
    """Intervals [N] from `high` down to `down`, each followed by a jump up to `after` (equal to `down`: no jump)."""

    high: Tensor
    down: Tensor
    after: Tensor

    @property
    def jump(self) -> Tensor:
        """Variance that the jumps add."""
        return self.after**2 - self.down**2

    def reach(self) -> list[int]:
        """How many rows before each may be leant on: those since the start or the last jump."""
        counts = [0]
        for jumps in (self.after > self.down)[:-1].tolist():
            counts.append(0 if jumps else counts[-1] + 1)
        return counts


def _ancestral(walk: _Walk, eta: float) -> Plan:
    """DDIM (eta 0; Song et al. 2021) to DDPM (eta 1; Ho et al. 2020) in sigma coordinates; a jump only raises s."""
    s = eta * walk.down * torch.sqrt(1 - (walk.down / walk.high) ** 2)
    a = torch.sqrt(walk.down**2 - s**2) / walk.high
    return _remembering(walk, a, 1 - a, a.new_zeros(len(a), 0), torch.sqrt(s**2 + walk.jump))


def _dpmpp_2m(walk: _Walk, config: SamplerConfig, eta: float) -> Plan:
    """DPM-Solver++(2M) and, with eta > 0, its SDE form (Lu et al. 2022, algorithm 2 and section 5) on any grid.

    First order on the first row, after a jump and where the row ends at 0.
    """
    r = walk.down / walk.high
    h = -torch.log(r)
    k = torch.zeros_like(r)
    k[1:] = h[1:] / (2 * h[:-1])
    k[torch.tensor(walk.reach()) == 0] = 0.0
    k[walk.down == 0] = 0.0
    if config.lower_final:
        k[-1] = 0.0
    a = r ** (1 + eta)
    s = torch.sqrt(walk.down**2 * (1 - r ** (2 * eta)) + walk.jump)
    return _remembering(walk, a, (1 - a) * (1 + k), (-(1 - a) * k)[:, None], s)


def _heun(walk: _Walk, config: SamplerConfig) -> Plan:
    """Karras et al. 2022, algorithm 2: a row for the prediction and one for its correction; an interval to 0 has one.

    Churn folds into the noise of the row before: an interval's first level rises from sigma to sigma·(1 + gamma).
    The level that the whole walk starts from is not raised: more noise there is the same distribution.
    """
    gamma = min(config.churn / len(walk.high), 2**0.5 - 1)
    churned = (walk.after >= config.churn_low) & (walk.after <= config.churn_high) & (walk.after > 0)
    churned[-1] = False
    risen = torch.where(churned, walk.after * (1 + gamma), walk.after)
    spread = config.churn_noise**2 * (risen**2 - walk.after**2) + walk.jump
    high = torch.cat((walk.high[:1], risen[:-1]))
    rows: list[tuple[float, ...]] = []
    for begin, end, leave, variance in torch.stack((high, walk.down, risen, spread), dim=1).tolist():
        r = end / begin
        alone = end == 0
        rows.append((begin, leave if alone else end, r, 1 - r, 0.0, variance**0.5 if alone else 0.0))
        if not alone:
            k = 0.5 * (begin / end - 1)
            rows.append((end, leave, 1.0, k, -k, variance**0.5))
    sigma, sigma_next, a, b, c, s = torch.tensor(rows, dtype=torch.float64).unbind(1)
    return Plan(a, b, c[:, None], s, torch.zeros_like(a), torch.ones_like(a), sigma, sigma_next)


# Adams-Bashforth on equal steps, newest slope first
_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def _ipndm_4(walk: _Walk) -> Plan:
    """Improved pseudo numerical method (Zhang & Chen 2023; Liu et al. 2022): slopes (x − D)/sigma are remembered."""
    weights = torch.zeros(len(walk.high), 4, dtype=torch.float64)
    for row, reach in enumerate(walk.reach()):
        order = 1 if walk.down[row] == 0 else min(reach + 1, 4)
        weights[row, :order] = torch.tensor(_BASHFORTH[order - 1], dtype=torch.float64)
    move = (walk.down - walk.high)[:, None] * weights
    slope = move[:, 0] / walk.high
    alpha = 1 / walk.high
    return Plan(1 + slope, -slope, move[:, 1:], torch.sqrt(walk.jump), alpha, -alpha, walk.high, walk.after)


def _exponential(walk: _Walk, order: int) -> Plan:
    """Exponential Adams-Bashforth in lambda = −ln sigma: x' = r·x + sigma'·∫ e^lambda·P(lambda) d lambda.

    P is the polynomial through the last `order` values of D (Hochbruck & Ostermann 2010, section 2.5), integrated for
    the grid as it is. First order on the first row, one more on each row after; x' = D where the row ends at 0.
    """
    weights = torch.zeros(len(walk.high), order, dtype=torch.float64)
    logs = -torch.log(walk.high)
    for row, reach in enumerate(walk.reach()):
        used = min(reach + 1, order)
        if walk.down[row] == 0:
            weights[row, 0] = 1.0
        else:
            nodes = logs[row - used + 1 : row + 1].flip(0) - logs[row]
            weights[row, :used] = _integrals(nodes, float(torch.log(walk.high[row] / walk.down[row])))
    return _remembering(walk, walk.down / walk.high, weights[:, 0], weights[:, 1:], torch.sqrt(walk.jump))


def _angular_3(walk: _Walk) -> Plan:
    """Predictor and corrector of third order in the angle t = atan(sigma/c), for one call a row.

    With n = √(sigma² + c²), y = x/n and the slope F = (n·D − (c²/n)·x)/(sigma·c), the flow is dy/dt = −F: regular down
    to sigma 0, and 0 for data of standard deviation c. A row moves y by the polynomial through the last three F. Once
    F is known at the row's end, the next row takes that move back and makes the one of the polynomial through F there
    (as Zhao et al. 2023 do in lambda), by the share 1/(1 + h⁴), h = ln(sigma/sigma'): long steps keep the prediction.
    A row to 0 with nothing behind it is x' = D.
    """
    c, high, down = _ANGLE_UNIT, walk.high, walk.down
    angles, ends = torch.atan(high / c), torch.atan(down / c)
    weights = torch.zeros(len(high), 4, dtype=torch.float64)
    predicted = torch.zeros(3, dtype=torch.float64)
    for row, reach in enumerate(walk.reach()):
        nodes = angles[row - min(reach, 2) : row + 1].flip(0)
        if reach:
            share = 1 / (1 + torch.log(high[row - 1] / high[row]) ** 4)
            weights[row, : len(nodes)] += share * _moves(nodes, angles[row - 1], angles[row])
            weights[row, 1:] -= share * predicted
        predicted = torch.zeros(3, dtype=torch.float64)
        predicted[: len(nodes)] = _moves(nodes, angles[row], ends[row])
        weights[row, :3] += predicted
    norm, after = torch.sqrt(high**2 + c**2), torch.sqrt(down**2 + c**2)
    alpha, beta = -c / (high * norm), norm / (high * c)
    moved = -after[:, None] * weights
    a, b = after / norm + moved[:, 0] * alpha, moved[:, 0] * beta
    direct = (down == 0) & (torch.tensor(walk.reach()) == 0)
    a, b = torch.where(direct, 0.0, a), torch.where(direct, 1.0, b)
    return Plan(a, b, moved[:, 1:], torch.sqrt(walk.jump), alpha, beta, high, walk.after)


def _moves(nodes: Tensor, begin: Tensor, end: Tensor) -> Tensor:
    """∫ ℓⱼ(t) dt from `begin` to `end` for the Lagrange polynomials ℓⱼ of `nodes` [p]."""
    places, weights = _gauss_legendre()
    t = (begin + end) / 2 + (end - begin) / 2 * places
    return (end - begin) / 2 * (weights @ _lagrange(nodes, t))


def _integrals(nodes: Tensor, h: float) -> Tensor:
    """∫₀ʰ e^(u − h)·ℓⱼ(u) du for the Lagrange polynomials ℓⱼ of `nodes` [p], by Gauss-Legendre quadrature."""
    places, weights = _gauss_legendre()
    u = 0.5 * h * (places + 1)
    return (0.5 * h * weights * torch.exp(u - h)) @ _lagrange(nodes, u)


def _lagrange(nodes: Tensor, places: Tensor) -> Tensor:
    """Lagrange polynomials of `nodes` [p] at `places` [n], [n, p]."""
    values = []
    for j, node in enumerate(nodes):
        others = torch.cat((nodes[:j], nodes[j + 1 :]))
        values.append(((places[:, None] - others) / (node - others)).prod(dim=1))
    return torch.stack(values, dim=1)


@functools.cache
def _gauss_legendre(count: int = 40) -> tuple[Tensor, Tensor]:
    """Places in (-1, 1) and weights of the quadrature, by the eigenvalues of Golub & Welsch 1969."""
    n = torch.arange(1, count, dtype=torch.float64)
    beside = n / torch.sqrt(4 * n**2 - 1)
    places, vectors = torch.linalg.eigh(torch.diag(beside, 1) + torch.diag(beside, -1))
    return places, 2 * vectors[0] ** 2


def _remembering(walk: _Walk, a: Tensor, b: Tensor, c: Tensor, s: Tensor) -> Plan:
    """A plan with one row an interval, that remembers D."""
    return Plan(a, b, c, s, torch.zeros_like(a), torch.ones_like(a), walk.high, walk.after)


def _times(coefficient: Tensor, x: Tensor) -> Tensor:
    """Coefficients [B] or [1] times pictures [B, …]."""
    return coefficient.to(x.device, x.dtype).reshape(-1, *[1] * (x.ndim - 1)) * x


_PLANNERS: dict[SamplerName, Callable[[_Walk, SamplerConfig], Plan]] = {
    "ddim": lambda walk, config: _ancestral(walk, config.eta),
    "euler": lambda walk, _: _ancestral(walk, 0.0),
    "ddpm": lambda walk, _: _ancestral(walk, 1.0),
    "euler_ancestral": lambda walk, _: _ancestral(walk, 1.0),
    "heun": _heun,
    "dpmpp_2m": lambda walk, config: _dpmpp_2m(walk, config, 0.0),
    "dpmpp_2m_sde": lambda walk, config: _dpmpp_2m(walk, config, config.eta),
    "ipndm_4": lambda walk, _: _ipndm_4(walk),
    "exponential_3": lambda walk, _: _exponential(walk, 3),
    "exponential_4": lambda walk, _: _exponential(walk, 4),
    "angular_3": lambda walk, _: _angular_3(walk),
}
