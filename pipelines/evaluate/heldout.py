"""What a model makes of pictures that it has not seen: its loss by noise level, and bits per dimension."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusion_core.denoiser import Denoiser
from diffusion_core.likelihood import bits_per_dimension
from diffusion_core.losses import LEVELS, heldout_loss
from diffusion_core.noise import derive_seeds
from pipelines.config import EvaluateConfig
from pipelines.dataset import Rows
from pipelines.features import distances
from pipelines.images import to_floats

HELDOUT = 128  # pictures that are looked at
_AT_A_TIME = 32


def heldout_figures(config: EvaluateConfig, denoiser: Denoiser, rows: Rows) -> dict[str, Any]:
    """The mean loss over LEVELS and at each, and bits per dimension, with intervals over pictures."""
    rng = np.random.default_rng(config.seed)
    count = min(len(rows.ids), HELDOUT)
    losses = np.stack([_losses(denoiser, rows.cut(0, count), level) for level in LEVELS], axis=1)
    figures: dict[str, Any] = {
        "heldout_loss": distances.mean(losses.mean(axis=1), config.bootstrap, rng),
        "heldout_loss_by_level": {
            f"{level:g}": distances.mean(each, config.bootstrap, rng)
            for level, each in zip(LEVELS, losses.T, strict=True)
        },
    }
    if config.likelihood:
        bits = _bits(config, denoiser, rows.cut(0, config.likelihood))
        figures["bits_per_dimension"] = distances.mean(bits, config.bootstrap, rng)
    return figures


@torch.no_grad()
def _losses(denoiser: Denoiser, rows: Rows, level: float) -> NDArray[np.float64]:
    """Losses [N] at one noise level."""
    parts = []
    for some in _parts(rows):
        x0, label, ids = _tensors(denoiser, some)
        parts.append(heldout_loss(denoiser, x0, ids, torch.full((len(ids),), level, device=x0.device), label))
    return torch.cat(parts).double().cpu().numpy()


def _bits(config: EvaluateConfig, denoiser: Denoiser, rows: Rows) -> NDArray[np.float64]:
    """Bits per dimension [N]."""
    parts = []
    for some in _parts(rows):
        x0, label, ids = _tensors(denoiser, some)
        parts.append(bits_per_dimension(denoiser, x0, label, derive_seeds(config.seed, ids), config.likelihood_steps))
    return torch.cat(parts).cpu().numpy()


def _tensors(denoiser: Denoiser, rows: Rows) -> tuple[Tensor, Tensor | None, Tensor]:
    """Pictures, labels (the null class where there is none) and ids on the network's device."""
    device = next(denoiser.network.parameters()).device
    x0 = torch.from_numpy(to_floats(rows.pixels)).to(device, memory_format=torch.channels_last)
    labels = rows.labels_of(denoiser.config.unet.classes)
    label = None if labels is None else torch.from_numpy(labels).to(device)
    return x0, label, torch.from_numpy(rows.ids).to(device)


def _parts(rows: Rows) -> list[Rows]:
    return [rows.cut(at, at + _AT_A_TIME) for at in range(0, len(rows.ids), _AT_A_TIME)]
