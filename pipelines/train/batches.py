"""Rows of the sample stream as batches on a device."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from diffusion_core.noise import derive_seeds, uniform
from diffusion_core.training import Batch
from pipelines.config import TrainConfig
from pipelines.dataset import Rows
from pipelines.images import to_floats

_BATCHES_AHEAD = 2


def to_batch(rows: Rows, place: torch.Tensor, config: TrainConfig, step: int, classes: int) -> Batch:
    """Rows as a batch on the device of `place`, mirrored by a key of (seed, step, sample) where the settings say so."""
    x0, ids = torch.from_numpy(to_floats(rows.pixels)), torch.from_numpy(rows.ids)
    if config.flip:
        flips = uniform(derive_seeds(config.seed, ids), "train_flip", step) < 0.5
        x0 = torch.where(flips[:, None, None, None], x0.flip(-1), x0)
    label = rows.labels_of(classes)
    x0 = x0.contiguous(memory_format=torch.channels_last)
    return Batch(
        _moved(x0, place.device),
        None if label is None else _moved(torch.from_numpy(label), place.device),
        _moved(ids, place.device),
        place,
    )


def fetched(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches, made in a thread of their own a little before they are asked for."""
    with ThreadPoolExecutor(1, "batches", _uses, (device,)) as pool:
        waiting = deque(pool.submit(next, batches, None) for _ in range(_BATCHES_AHEAD))
        try:
            while (batch := waiting.popleft().result()) is not None:
                waiting.append(pool.submit(next, batches, None))
                yield batch
        finally:
            pool.shutdown(cancel_futures=True)


def _uses(device: torch.device) -> None:
    """Which GPU is meant is known to each thread by itself."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _moved(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """On the device; by way of pinned memory, from where a GPU takes them while it computes."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values
