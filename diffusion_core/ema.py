"""Moving averages of the weights: power-function profiles of any width, and the classic exponential.

An average with the power profile weighs step s of t by s^gamma; its width is the standard deviation of that profile
over t. From snapshots of a few widths any other is rebuilt after training (Karras et al. 2024, section 3 and
appendix C).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Profile:
    """How an average weighs the past: "power" by its relative width, "exponential" by what each step keeps of it."""

    kind: Literal["power", "exponential"]
    value: float

    def __post_init__(self) -> None:
        """Raise ValueError on a width or a share that no profile has."""
        if self.kind == "power":
            gamma_of_width(self.value)
        elif not 0.0 <= self.value < 1.0:
            raise ValueError(f"ema: keeps {self.value} of itself at each step; need at least 0 and less than 1")

    def keep(self, step: int) -> float:
        """The share of the average that stays in optimisation step `step` (from 1); eq. 127 for "power"."""
        if self.kind == "exponential":
            return self.value
        return float((1 - 1 / step) ** (gamma_of_width(self.value) + 1))


@dataclass(frozen=True)
class Snapshot:
    """An average as it stood after `step` steps, with the power profile of relative width `width`."""

    step: int
    width: float
    weights: dict[str, Tensor]


def gamma_of_width(width: float) -> float:
    """The exponent whose profile has the relative standard deviation `width`, the root of eq. 126.

    Raises ValueError unless 0 < width <= 0.28.
    """
    if not 0.0 < width <= 0.28:
        raise ValueError(f"ema: width {width}; need more than 0 and at most 0.28")
    low, high = 0.0, 1.0 / width  # the spread at gamma is below 1/(gamma + 2)
    for _ in range(60):
        middle = (low + high) / 2
        spread = (middle + 1) ** 0.5 / ((middle + 2) * (middle + 3) ** 0.5)
        low, high = (middle, high) if spread > width else (low, middle)
    return low


def new_ema(network: nn.Module) -> dict[str, Tensor]:
    """A copy of the network's weights, sharded as they are, to be averaged in place by `update_ema`."""
    return {name: value.detach().clone() for name, value in network.state_dict().items()}


@torch.no_grad()
def update_ema(ema: dict[str, Tensor], network: nn.Module, step: int, profile: Profile) -> None:
    """Move `ema` in place towards the weights after optimisation step `step` (from 1)."""
    weights = network.state_dict()
    averages = [_local(ema[name]) for name in weights]
    # All at once: a call for each of hundreds of tensors would keep a GPU waiting.
    torch._foreach_lerp_(averages, [_local(value) for value in weights.values()], 1 - profile.keep(step))


def _local(value: Tensor) -> Tensor:
    """A rank's own part of a sharded tensor, which is averaged without the others."""
    return value.to_local() if isinstance(value, DTensor) else value


def posthoc_weights(steps: Sequence[int], widths: Sequence[float], step: int, width: float) -> Tensor:
    """Factors [N] (float64) of N snapshots whose sum is nearest to the average of `width` after `step` steps.

    Least squares over the profiles (Karras et al. 2024, algorithm 3). Raises ValueError where the lists differ in
    length, are empty, or a snapshot is later than `step`.
    """
    if len(steps) != len(widths) or not steps or min(steps) < 1 or max(steps) > step:
        raise ValueError(
            f"snapshots: {len(steps)} steps {list(steps)[:8]} and {len(widths)} widths for step {step}; "
            "need as many of each, at least one, from step 1 on and none later than the step asked for"
        )
    times = torch.tensor(steps, dtype=torch.float64)
    gammas = torch.tensor([gamma_of_width(each) for each in widths], dtype=torch.float64)
    aim_time, aim_gamma = times.new_tensor([step]), times.new_tensor([gamma_of_width(width)])
    products = _products(times[:, None], gammas[:, None], times[None], gammas[None])
    aims = _products(times, gammas, aim_time, aim_gamma)
    # Snapshots close to one another make the products nearly singular; their roots' scale evens them out.
    scale = products.diagonal().sqrt()
    even = products / (scale[:, None] * scale)
    solution: Tensor = torch.linalg.lstsq(even, (aims / scale)[:, None], driver="gelsd").solution
    return solution[:, 0] / scale


def reconstruct(snapshots: Sequence[Snapshot], step: int, width: float) -> dict[str, Tensor]:
    """The average of any `width` as it would have stood after `step` steps, from stored snapshots.

    Raises ValueError as `posthoc_weights` does. Sums are taken in float64; dtypes stay.
    """
    factors = posthoc_weights([each.step for each in snapshots], [each.width for each in snapshots], step, width)
    return {name: _mixed(snapshots, factors, name) for name in snapshots[0].weights}


def _mixed(snapshots: Sequence[Snapshot], factors: Tensor, name: str) -> Tensor:
    """One tensor of the reconstruction."""
    total = torch.zeros_like(snapshots[0].weights[name], dtype=torch.float64)
    for factor, snapshot in zip(factors.tolist(), snapshots, strict=True):
        total += factor * snapshot.weights[name]
    return total.to(snapshots[0].weights[name].dtype)


def _products(t_a: Tensor, gamma_a: Tensor, t_b: Tensor, gamma_b: Tensor) -> Tensor:
    """Inner products of power profiles that end at t_a and t_b (eq. 151), kept in range for late steps."""
    ratio = t_a / t_b
    exponent = torch.where(t_a < t_b, gamma_b, -gamma_a)
    return (gamma_a + 1) * (gamma_b + 1) * ratio**exponent / ((gamma_a + gamma_b + 1) * torch.maximum(t_a, t_b))
