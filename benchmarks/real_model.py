"""Error of every sampler and grid on a trained model, by denoiser calls, against a very fine walk from the same noise.

usage: python benchmarks/real_model.py MODEL [COUNT]     MODEL: URI of a published model; COUNT pictures (default 48)

The error is the root mean square over the pictures' values in [-1, 1], where one byte is 0.0078.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from diffusion_core.config import GridName, SamplerConfig, SamplerName
from diffusion_core.denoiser import Denoiser, guidance, guided
from diffusion_core.samplers import make_plan, model_grid, sample, start_noise
from pipelines.model import load_model

SAMPLERS: tuple[SamplerName, ...] = (
    "euler",
    "heun",
    "dpmpp_2m",
    "ipndm_4",
    "exponential_3",
    "exponential_4",
    "angular_3",
)
GRIDS: tuple[GridName, ...] = ("arctan", "karras", "log_snr")
CALLS = (5, 8, 10, 18, 32)
SCALES = (1.0, 1.5)
REFERENCE = SamplerConfig("exponential_4", 160, "log_snr")


def main(arguments: list[str]) -> None:
    """A table for each guidance scale."""
    denoiser = load_model(arguments[0]).denoiser
    count = int(arguments[1]) if len(arguments) > 1 else 48
    for scale in SCALES:
        exact = walk(denoiser, REFERENCE, count, scale)
        check = walk(denoiser, SamplerConfig("exponential_4", 80, "log_snr"), count, scale)
        print(f"guidance {scale}: the reference's own error is about {rms(check, exact):.4f}")
        print(f"{'sampler':16}{'grid':14}" + "".join(f"{calls:>10}" for calls in CALLS))
        for sampler in SAMPLERS:
            for grid in GRIDS:
                errors = [error(denoiser, sampler, grid, calls, scale, exact) for calls in CALLS]
                print(f"{sampler:16}{grid:14}" + "".join(f"{each:10.4f}" for each in errors), flush=True)


def error(denoiser: Denoiser, sampler: SamplerName, grid: GridName, calls: int, scale: float, exact: Tensor) -> float:
    """Error of the walk of at most `calls` denoiser calls."""
    steps = (calls + 1) // 2 if sampler == "heun" else calls
    return rms(walk(denoiser, SamplerConfig(sampler, steps, grid), len(exact), scale), exact)


@torch.inference_mode()
def walk(denoiser: Denoiser, config: SamplerConfig, count: int, scale: float) -> Tensor:
    """Pictures [count, C, H, W] of all classes in turn."""
    unet, seeds = denoiser.config.unet, torch.arange(count)
    label = torch.arange(count) % unet.classes if unet.classes else None
    how = guidance(torch.full((count,), scale))
    plan = make_plan(config, model_grid(config, denoiser.config))
    x = start_noise(plan, seeds, (unet.channels, unet.resolution, unet.resolution))
    x = x.contiguous(memory_format=torch.channels_last)
    return sample(lambda x, sigma: guided(denoiser, x, sigma, label, how), plan, x, seeds)


def rms(x: Tensor, exact: Tensor) -> float:
    """Root mean square of the difference."""
    return float((x - exact).square().mean().sqrt())


if __name__ == "__main__":
    main(sys.argv[1:])
