"""Batch sizes: which agree bit by bit on this device, and which is the smallest that is fast."""

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion_core.denoiser import Denoiser
from diffusion_core.lanes import laid_out
from diffusion_core.noise import normal


def agreeing_widths(
    denoiser: Denoiser,
    shape: Sequence[int],
    device: torch.device | str = "cpu",
    most: int = 32,
    dtype: torch.dtype = torch.float32,
) -> tuple[int, ...]:
    """Batch sizes, at most `most`, that give a picture of `shape` (C, H, W) the same bits at every place of the batch.

    Libraries choose kernels by shape and share the work of a batch between threads, so this is found by trying: the
    forward pass and the vector-Jacobian product of one picture, as many times as the batch has places. The largest
    size whose places agree is the reference for the others. Takes the time of about 6·`most` single calls.
    """
    threads = torch.get_num_threads()
    sizes = sorted({1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, threads, 2 * threads, 4 * threads, most})
    reference, agreeing = None, []
    for width in reversed([size for size in sizes if size <= most]):
        answers = _answers(denoiser, shape, width, torch.device(device), dtype)
        alike = bool((answers == answers[:1]).all())
        if alike and (reference is None or torch.equal(answers[0], reference)):
            reference = answers[0]
            agreeing.append(width)
    return tuple(reversed(agreeing))


def measure_lanes(
    denoiser: Denoiser, shape: tuple[int, int, int], widths: Sequence[int], device: torch.device | str = "cpu"
) -> int:
    """The smallest of `widths` whose denoiser calls on pictures of `shape` come within 5 % of the best rate here."""
    rates = {width: width / _seconds_per_call(denoiser, shape, torch.device(device), width) for width in widths}
    return min(width for width, rate in rates.items() if rate >= 0.95 * max(rates.values()))


def _answers(denoiser: Denoiser, shape: Sequence[int], width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """What one picture gives at each of `width` places: D and its vector-Jacobian product, [width, 2·C·H·W]."""
    x = normal(torch.zeros(1, dtype=torch.int64), "start", 0, shape, dtype).to(device)
    at = laid_out(x.repeat(width, 1, 1, 1)).requires_grad_()
    with torch.enable_grad():
        denoised = denoiser(at, torch.ones(width, device=device, dtype=dtype), _first_label(denoiser, width, device))
    product = torch.autograd.grad(denoised, at, at.detach())[0]
    return torch.cat((denoised.detach().flatten(1), product.flatten(1)), dim=1)


@torch.no_grad()
def _seconds_per_call(denoiser: Denoiser, shape: tuple[int, int, int], device: torch.device, width: int) -> float:
    """The best of three calls after one to warm up."""
    x, sigma = laid_out(torch.zeros(width, *shape, device=device)), torch.ones(width, device=device)
    times = []
    for _ in range(4):
        begun = time.perf_counter()
        float(denoiser(x, sigma, _first_label(denoiser, width, device)).sum())  # reading a number waits for the device
        times.append(time.perf_counter() - begun)
    return min(times[1:])


def _first_label(denoiser: Denoiser, width: int, device: torch.device) -> Tensor | None:
    """Labels for a trial."""
    return torch.zeros(width, dtype=torch.int64, device=device) if denoiser.config.unet.classes else None
