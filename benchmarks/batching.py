"""What can batching gain on this machine? Time of one denoiser call on n pictures against n calls on one.

usage: python benchmarks/batching.py     needs torch alone; prints a ratio for each n, measured side by side in one run
"""

import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from diffusion_core.config import PRESETS, ModelConfig
from diffusion_core.denoiser import Denoiser
from diffusion_core.unet import UNet

SIZES = (1, 4, 16, 64)
ROUNDS = 15


def main() -> None:
    """Interleave the sizes, so that a change of the machine's speed meets all of them."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    unet = PRESETS["cpu-small"]
    denoiser = Denoiser(UNet(unet).eval().to(device, memory_format=torch.channels_last), ModelConfig(unet))
    seconds: dict[int, list[float]] = {size: [] for size in SIZES}
    for _ in range(ROUNDS):
        for size in SIZES:
            seconds[size].append(one_call(denoiser, size, device))
    single = statistics.median(seconds[1])
    print(
        f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, cpu-small at 32x32, {ROUNDS} rounds"
    )
    for size in SIZES:
        each = statistics.median(seconds[size])
        print(f"batch {size:3}: {1e3 * each:8.2f} ms, {size / each:8.1f} pictures/s, gain {size * single / each:.2f}")


@torch.inference_mode()
def one_call(denoiser: Denoiser, size: int, device: torch.device) -> float:
    """Seconds of one denoiser call."""
    x = torch.randn(size, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    sigma = torch.ones(size, device=device)
    began = time.perf_counter()
    denoiser(x, sigma, None).sum().item()  # reading a number waits for a GPU
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
