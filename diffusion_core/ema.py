"""Exponential moving average of the weights with a power-function profile (Karras et al. 2024, eq. 123 and 127)."""

import torch
from torch import Tensor, nn


def gamma_of_width(width: float) -> float:
    """The exponent whose profile has the relative standard deviation `width` (in (0, 0.28]), by bisection of eq. 126.

    Raises ValueError outside that range.
    """
    if not 0.0 < width <= 0.28:
        raise ValueError(f"ema: width {width}; need more than 0 and at most 0.28")
    low, high = 0.0, 1e6
    for _ in range(100):
        middle = (low + high) / 2
        spread = (middle + 1) ** 0.5 / ((middle + 2) * (middle + 3) ** 0.5)
        low, high = (middle, high) if spread > width else (low, middle)
    return low


def new_ema(network: nn.Module) -> dict[str, Tensor]:
    """A copy of the network's weights, to be averaged in place by `update_ema`."""
    return {name: value.detach().clone() for name, value in network.state_dict().items()}


@torch.no_grad()
def update_ema(ema: dict[str, Tensor], network: nn.Module, step: int, gamma: float) -> None:
    """Move `ema` towards the weights after optimisation step `step` (from 1): rate (1 − 1/step)^(gamma + 1)."""
    keep = (1 - 1 / step) ** (gamma + 1)
    for name, value in network.state_dict().items():
        ema[name].lerp_(value, 1 - keep)
