"""One optimisation step, and nothing else: what the training stage, its tests and its benchmarks all call."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from diffusion_core.denoiser import Denoiser
from diffusion_core.ema import gamma_of_width, new_ema, update_ema
from diffusion_core.losses import per_sample_loss
from diffusion_core.noise import derive_seeds, normal, uniform
from diffusion_core.schedules import log_normal_sigma


@dataclass(frozen=True)
class Optimisation:
    """The settings of the optimiser: AdamW, linear warm-up, cosine decay to 0 at `steps`, gradient clipping, EMA."""

    steps: int
    learning_rate: float
    warmup: int
    clip: float
    weight_decay: float
    label_dropout: float
    ema: float
    seed: int


@dataclass
class TrainState:
    """All that a training run carries from step to step."""

    denoiser: Denoiser
    optimizer: torch.optim.Optimizer
    ema: dict[str, Tensor]
    step: int = 0
    gamma: float = field(default=0.0)


def new_state(denoiser: Denoiser, weights: nn.Module, settings: Optimisation) -> TrainState:
    """A state before the first step. `weights` is the bare network, also where the denoiser holds a wrapped one."""
    optimizer = torch.optim.AdamW(
        weights.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, betas=(0.9, 0.99)
    )
    return TrainState(denoiser, optimizer, new_ema(weights), gamma=gamma_of_width(settings.ema))


def learning_rate(step: int, settings: Optimisation) -> float:
    """Rate of optimisation step `step` (from 0): linear warm-up, then a half cosine down to 0."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def loss_of(denoiser: Denoiser, x0: Tensor, label: Tensor | None, ids: Tensor, step: int, s: Optimisation) -> Tensor:
    """Mean loss of x0 [B, C, H, W] with sigma, noise and label dropout keyed by (seed, step, sample id [B])."""
    seeds = derive_seeds(s.seed, ids)
    sigma = log_normal_sigma(uniform(seeds, "train_sigma", step))
    noise = normal(seeds, "train_noise", step, x0.shape[1:], x0.dtype)
    if label is not None:
        dropped = uniform(seeds, "train_label", step) < s.label_dropout
        label = torch.where(dropped, denoiser.config.unet.classes, label)
    return per_sample_loss(denoiser, x0, sigma.to(x0.dtype), noise, label).mean()


def train_step(
    state: TrainState, weights: nn.Module, x0: Tensor, label: Tensor | None, ids: Tensor, settings: Optimisation
) -> tuple[TrainState, float]:
    """One step on x0 [B, C, H, W] in [-1, 1]; returns the state (updated in place) and the mean loss.

    Raises FloatingPointError where the loss is not finite; the weights are then as they were before.
    """
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(state.step, settings)
    loss = loss_of(state.denoiser, x0, label, ids, state.step, settings)
    value = float(loss.detach())
    if not math.isfinite(value):
        raise FloatingPointError(
            f"loss: {value} at step {state.step}; lower the learning rate ({settings.learning_rate})"
        )
    state.optimizer.zero_grad(set_to_none=True)
    backward: Callable[[], None] = loss.backward
    backward()
    nn.utils.clip_grad_norm_(weights.parameters(), settings.clip)
    state.optimizer.step()
    state.step += 1
    update_ema(state.ema, weights, state.step, state.gamma)
    return state, value
