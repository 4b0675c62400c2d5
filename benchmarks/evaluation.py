"""What evaluations cost, and how far their figures can be trusted.

usage: python benchmarks/evaluation.py intervals            share of intervals that hold the true value, by figure
       python benchmarks/evaluation.py likelihood           error and time of bits per dimension, by steps of the solver
       python benchmarks/evaluation.py distances            time of a distance with its interval: ours, and torchmetrics
                                                            called again for every resampled set

Features are drawn from known normal distributions, so that true values are known. `likelihood` needs torch alone.
"""

import functools
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# The distances need torchmetrics, so they are imported where they are used.
from diffusion_core.likelihood import SIGMA_MIN, log_likelihood

TRIALS, SAMPLES, SIZE, ROUNDS = 100, 256, 8, 100
SPREAD = 0.5


def main() -> None:
    """Run the question that was asked."""
    questions: dict[str, Callable[[], None]] = {
        "intervals": intervals,
        "likelihood": likelihood,
        "distances": compare_distances,
    }
    if len(sys.argv) != 2 or sys.argv[1] not in questions:
        sys.exit(__doc__)
    torch.set_num_threads(1)
    questions[sys.argv[1]]()


def intervals() -> None:
    """Of intervals over samples of a known distribution, how many hold the value of very many samples."""
    from pipelines.features import distances

    rng = np.random.default_rng(0)
    real, many = (rng.normal(shift, scale, (5000, SIZE)) for shift, scale in ((0, 1), (0.3, 1.2)))
    true = {
        "frechet": SIZE * (0.3**2 + 0.2**2),
        "kernel": distances.kernel_figure(real, many, 10, rng)["value"],
    }
    held = dict.fromkeys(true, 0)
    for _ in range(TRIALS):
        made = rng.normal(0.3, 1.2, (SAMPLES, SIZE))
        found = {
            "frechet": distances.frechet_figure(real, made, ROUNDS, rng),
            "kernel": distances.kernel_figure(real, made, ROUNDS, rng),
        }
        for name, each in found.items():
            held[name] += each["low"] <= true[name] <= each["high"]
    for name, count in held.items():
        print(f"intervals: {name}, {SAMPLES} samples of {SIZE} features: {count} of {TRIALS} hold {true[name]:.3f}")


def likelihood() -> None:
    """Bits per dimension of independent normal values, whose density is known, by steps of the solver."""
    x = torch.from_numpy(np.random.default_rng(0).normal(0, SPREAD, (16, 3, 16, 16)))
    count = x[0].numel()
    variance = SPREAD**2 + SIGMA_MIN**2
    exact = -0.5 * x.square().flatten(1).sum(dim=1) / variance - 0.5 * count * math.log(2 * math.pi * variance)
    for steps in (4, 8, 16, 32, 64):
        began = time.perf_counter()
        found = log_likelihood(gaussian, x, None, torch.arange(16), steps)  # type: ignore[arg-type]
        bits = ((found - exact) / (count * math.log(2))).abs().mean().item()
        seconds = time.perf_counter() - began
        told = f"off by {bits:.1e} bits a value, {seconds:.2f} s"
        print(f"likelihood: {steps:3} steps, {4 * steps:3} denoiser calls: {told}")


def gaussian(x: Tensor, sigma: Tensor, _: Tensor | None) -> Tensor:
    """The exact denoiser of independent normal values."""
    return x * (SPREAD**2 / (SPREAD**2 + sigma**2))[:, None, None, None].to(x.dtype)


def compare_distances() -> None:
    """A Fréchet distance with its interval of 20 resampled sets, by size of the features."""
    from pipelines.features import distances

    rng = np.random.default_rng(0)
    for size, real_count, count in ((96, 4000, 512), (512, 4000, 512), (2048, 4000, 512)):
        real, made = rng.normal(size=(real_count, size)), rng.normal(0.1, 1.1, (count, size))
        began = time.perf_counter()
        figure = distances.frechet_figure(real, made, 20, rng)
        ours = time.perf_counter() - began
        again = statistics.median(_seconds(functools.partial(distances.frechet, real, made)) for _ in range(3))
        print(
            f"distances: {size} features, {count} samples: {ours:.2f} s with 20 resampled sets; torchmetrics 21 times "
            f"{21 * again:.2f} s, ratio {ours / (21 * again):.2f}; {figure['value']:.3f}"
        )


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
