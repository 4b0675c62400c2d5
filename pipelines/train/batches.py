"""Rows of the sample stream as batches on a device."""

import numpy as np
import torch

from diffusion_core.noise import derive_seeds, uniform
from diffusion_core.training import Batch
from pipelines.config import TrainConfig
from pipelines.dataset import Rows
from pipelines.images import to_floats


def labels_of(rows: Rows, classes: int) -> torch.Tensor | None:
    """Labels [B], the null class `classes` where a picture has none; None for a network without classes."""
    return torch.from_numpy(np.where(rows.labels < 0, classes, rows.labels)) if classes else None


def to_batch(rows: Rows, place: torch.Tensor, config: TrainConfig, step: int, classes: int) -> Batch:
    """Rows as a batch on the device of `place`, mirrored by a key of (seed, step, sample) where the settings say so."""
    x0, ids = torch.from_numpy(to_floats(rows.pixels)), torch.from_numpy(rows.ids)
    if config.flip:
        flips = uniform(derive_seeds(config.seed, ids), "train_flip", step) < 0.5
        x0 = torch.where(flips[:, None, None, None], x0.flip(-1), x0)
    label = labels_of(rows, classes)
    x0 = x0.to(place.device, memory_format=torch.channels_last)
    return Batch(x0, None if label is None else label.to(place.device), ids.to(place.device), place)
