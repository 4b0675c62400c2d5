"""One optimisation step, and nothing else: what the training stage, its tests and its benchmarks all call.

How the network is spread over processes is in `strategies`; a step is the same for all of them.
"""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from diffusion_core import checks
from diffusion_core.config import Decay, Precision, Weighting
from diffusion_core.denoiser import Denoiser
from diffusion_core.ema import Profile, new_ema, update_ema
from diffusion_core.losses import per_sample_loss
from diffusion_core.noise import derive_seeds, normal, uniform
from diffusion_core.schedules import SigmaDistribution, stratify


@dataclass(frozen=True)
class Optimisation:
    """The settings of the optimiser: AdamW, linear warm-up, decay, gradient clipping, EMA.

    "cosine" decays to 0 at `steps`. `micro_batches` cuts a rank's batch for memory's sake. "bfloat16" runs the
    network under autocast; weights and averages stay float32. `stratified` spreads sigma evenly over the batch of
    `global_batch_size`. `world` is the number of ranks that share that batch.
    """

    steps: int
    learning_rate: float
    warmup: int
    clip: float
    weight_decay: float
    label_dropout: float
    ema: tuple[Profile, ...]
    seed: int
    global_batch_size: int
    weighting: Weighting = "unit"
    weighting_gamma: float = 5.0
    sigma: SigmaDistribution = field(default_factory=SigmaDistribution)
    stratified: bool = True
    micro_batches: int = 1
    precision: Precision = "float32"
    decay: Decay = "cosine"
    world: int = 1

    def __post_init__(self) -> None:
        """Raise ValueError on settings that no run can have."""
        if self.micro_batches < 1 or self.global_batch_size < 1:
            raise ValueError(
                f"micro_batches, global_batch_size: {self.micro_batches}, {self.global_batch_size}; need at least 1"
            )
        if not 0.0 <= self.label_dropout <= 1.0:
            raise ValueError(f"label_dropout: {self.label_dropout}; need 0 to 1")


class Batch(NamedTuple):
    """A rank's share of a global batch: pictures [B, C, H, W] in [-1, 1], labels [B] or None, ids and places [B].

    `ids` name the samples; `place` counts them through the global batch, from 0.
    """

    x0: Tensor
    label: Tensor | None
    ids: Tensor
    place: Tensor

    def micro_batches(self, count: int) -> list["Batch"]:
        """The batch cut into `count` parts, or single pictures where it has fewer."""
        count = min(count, len(self.x0))
        labels = (None,) * count if self.label is None else self.label.tensor_split(count)
        cut = (values.tensor_split(count) for values in (self.x0, self.ids, self.place))
        parts = (
            (x0, label, ids, place) for (x0, ids, place), label in zip(zip(*cut, strict=True), labels, strict=True)
        )
        return [Batch(*part) for part in parts]


@dataclass
class TrainState:
    """All that a training run carries from step to step. `network` is bare where the denoiser holds a wrapped one."""

    denoiser: Denoiser
    network: nn.Module
    optimizer: torch.optim.Optimizer
    ema: list[dict[str, Tensor]]
    step: int = 0


def new_state(denoiser: Denoiser, network: nn.Module, settings: Optimisation) -> TrainState:
    """A state before the first step. `network` is the bare network, also where the denoiser holds a wrapped one."""
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, betas=(0.9, 0.99),
        fused=True,
    )  # fmt: skip
    for parameter in network.parameters():
        # The optimiser makes these at its first step; a checkpoint is to find them before.
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }
    return TrainState(denoiser, network, optimizer, [new_ema(network) for _ in settings.ema])


def learning_rate(step: int, settings: Optimisation) -> float:
    """Rate of optimisation step `step` (from 0): linear warm-up, then a half cosine down to 0, or no change."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    if settings.decay == "constant":
        return settings.learning_rate
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def sigmas_of(batch: Batch, step: int, settings: Optimisation) -> Tensor:
    """The noise levels [B] of a batch in optimisation step `step`."""
    return settings.sigma.sigma(_quantiles(derive_seeds(settings.seed, batch.ids), batch, step, settings))


def losses_of(denoiser: Denoiser, batch: Batch, step: int, settings: Optimisation) -> Tensor:
    """Losses [B] with sigma, noise and label dropout keyed by (seed, step, sample id), whatever the batch is cut to."""
    seeds, label = derive_seeds(settings.seed, batch.ids), batch.label
    noise = normal(seeds, "train_noise", step, batch.x0.shape[1:], batch.x0.dtype)
    if label is not None:
        dropped = uniform(seeds, "train_label", step) < settings.label_dropout
        label = torch.where(dropped, denoiser.config.unet.classes, label)
    sigma = settings.sigma.sigma(_quantiles(seeds, batch, step, settings)).to(batch.x0.dtype)
    return per_sample_loss(denoiser, batch.x0, sigma, noise, label, settings.weighting, settings.weighting_gamma)


class Step(NamedTuple):
    """What a step tells: the mean loss of the global batch, the gradient's norm before clipping, this rank's losses."""

    loss: float
    norm: float
    losses: Tensor


def train_step(
    state: TrainState, batch: Batch, settings: Optimisation, over_ranks: Callable[[float], float] = float
) -> tuple[TrainState, Step]:
    """One step; returns the state (updated in place) and what it told.

    `over_ranks` sums a number over all ranks. Raises ValueError on a batch that is no batch of pictures in [-1, 1],
    and FloatingPointError, on every rank, where loss or gradient is not finite; the weights are then as before.
    """
    _check(batch, state.denoiser)
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(state.step, settings)
    state.optimizer.zero_grad(set_to_none=True)
    losses = _accumulate(state, batch, settings)
    loss = over_ranks(float(losses.sum()) / settings.global_batch_size)
    norm = _full(nn.utils.clip_grad_norm_(state.network.parameters(), settings.clip))
    if not (math.isfinite(loss) and math.isfinite(norm)):
        state.optimizer.zero_grad(set_to_none=True)
        raise FloatingPointError(
            f"loss: {loss}, gradient norm {norm} at step {state.step}; "
            f"lower the learning rate ({settings.learning_rate})"
        )
    state.optimizer.step()
    state.step += 1
    for average, profile in zip(state.ema, settings.ema, strict=True):
        update_ema(average, state.network, state.step, profile)
    return state, Step(loss, norm, losses)


def rehearse(state: TrainState, batch: Batch, settings: Optimisation) -> None:
    """Gradients that are thrown away: what arranges itself by a first pass (ddp's buckets) is then as in later ones.

    Without it, the order in which three or more ranks sum would differ between a first step and the same step of a
    run that was never stopped.
    """
    _accumulate(state, batch, settings)
    state.optimizer.zero_grad(set_to_none=True)


def _accumulate(state: TrainState, batch: Batch, settings: Optimisation) -> Tensor:
    """Losses [B]; gradients of the global batch's mean loss, a micro-batch at a time; ranks exchange at the last."""
    parts, losses = batch.micro_batches(settings.micro_batches), []
    for number, part in enumerate(parts, start=1):
        with _exchange(state.denoiser.network, number == len(parts)):
            device = part.x0.device.type
            with torch.autocast(device, torch.bfloat16, enabled=settings.precision == "bfloat16"):
                each = losses_of(state.denoiser, part, state.step, settings)
            # Ranks average their gradients, and may hold unequal shares of the batch.
            backward: Callable[[], None] = (each.sum() * (settings.world / settings.global_batch_size)).backward
            backward()
        losses.append(each.detach())
    return torch.cat(losses)


def _exchange(network: nn.Module, exchanges: bool) -> contextlib.AbstractContextManager[object]:
    """Where gradients are averaged over ranks: after the last micro-batch alone."""
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(exchanges)
    if isinstance(network, DistributedDataParallel) and not exchanges:
        waits: contextlib.AbstractContextManager[object] = network.no_sync()
        return waits
    return contextlib.nullcontext()


def _quantiles(seeds: Tensor, batch: Batch, step: int, settings: Optimisation) -> Tensor:
    """Quantiles [B] of the sigma distribution."""
    if not settings.stratified:
        return uniform(seeds, "train_sigma", step)
    shared = derive_seeds(settings.seed, torch.full_like(batch.ids[:1], -1))
    return stratify(uniform(shared, "train_sigma", step), batch.place, settings.global_batch_size)


def _full(norm: Tensor) -> float:
    """The norm over all ranks, also of sharded gradients."""
    whole: Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return float(whole)


def _check(batch: Batch, denoiser: Denoiser) -> None:
    """Raise ValueError unless the batch is what `Batch` says."""
    checks.picture_batch("x0", batch.x0, denoiser.config.unet.channels)
    checks.within("x0", batch.x0, -1.0, 1.0)
    checks.labels("label", batch.label, len(batch.x0))
    checks.classes("label", batch.label, denoiser.config.unet.classes)
    for name, values in (("ids", batch.ids), ("place", batch.place)):
        checks.seeds(name, values)
        if len(values) != len(batch.x0):
            raise ValueError(f"{name}: {len(values)} for {len(batch.x0)} pictures; need one for each")
