"""The loss on held-out pictures at fixed noise levels with fixed noise, comparable between runs and models."""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffusion_core.losses import LEVELS, heldout_loss
from diffusion_core.strategies import Ranks
from diffusion_core.training import TrainState
from pipelines.dataset import Dataset, Rows
from pipelines.images import to_floats

# Picture i is looked at with level i modulo the number of LEVELS.
_PICTURES = 384
_AT_A_TIME = 32


class Share(NamedTuple):
    """A rank's part of the held-out pictures; the last of its rows may be there only to make all parts equal."""

    rows: Rows
    real: int


def heldout_share(dataset: Dataset, ranks: Ranks) -> Share | None:
    """A rank's share of the first held-out pictures, as many as others'; None where nothing is held out."""
    if not dataset.rows("heldout"):
        return None
    rows = dataset.read("heldout", _PICTURES)
    count = len(rows.ids)
    own = np.arange(ranks.rank, -(-count // ranks.world) * ranks.world, ranks.world)
    where = np.minimum(own, count - 1)
    return Share(Rows(rows.pixels[where], rows.labels[where], rows.ids[where]), int((own < count).sum()))


@torch.no_grad()
def loss_sums(state: TrainState, share: Share, device: torch.device) -> list[float]:
    """Sum of this rank's losses at each of LEVELS, then their counts, with the weights of the first average."""
    rows, classes = share.rows, state.denoiser.config.unet.classes
    with averaged(state):
        parts = [
            _losses(state, rows.cut(first, first + _AT_A_TIME), classes, device)
            for first in range(0, len(rows.ids), _AT_A_TIME)
        ]
    losses, levels = torch.cat(parts).cpu().double().numpy()[: share.real], rows.ids[: share.real] % len(LEVELS)
    sums = np.zeros((2, len(LEVELS)))
    np.add.at(sums[0], levels, losses)
    np.add.at(sums[1], levels, 1)
    return [float(value) for value in sums.flatten()]


def by_level(sums: list[float]) -> list[float]:
    """The mean over levels, then the loss at each level, from sums over all ranks; levels without a picture are NaN."""
    losses, counts = np.array(sums).reshape(2, -1)
    means = np.divide(losses, counts, out=np.full_like(losses, np.nan), where=counts > 0)
    return [float(np.nanmean(means)), *map(float, means)]


@contextlib.contextmanager
def averaged(state: TrainState) -> Iterator[None]:
    """The network with the first average's weights, put back afterwards."""
    weights = state.network.eval().state_dict()
    kept = {name: value.detach().clone() for name, value in weights.items()}
    _copy(state.ema[0], weights)
    try:
        yield
    finally:
        _copy(kept, weights)
        state.network.train()


def _copy(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    for name, value in source.items():
        target[name].copy_(value)


def _losses(state: TrainState, rows: Rows, classes: int, device: torch.device) -> Tensor:
    """Losses [B] of a few pictures."""
    x0 = torch.from_numpy(to_floats(rows.pixels)).to(device, memory_format=torch.channels_last)
    ids = torch.from_numpy(rows.ids).to(device)
    label = rows.labels_of(classes)
    sigma = torch.tensor(LEVELS, device=device)[ids % len(LEVELS)]
    return heldout_loss(state.denoiser, x0, ids, sigma, None if label is None else torch.from_numpy(label).to(device))
