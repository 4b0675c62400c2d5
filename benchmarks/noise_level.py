"""How well the level of white noise in photographs is estimated, from the picture alone.

usage: python benchmarks/noise_level.py [--photographs FOLDER] [--count 240]

Prints the median of |estimate/sigma - 1| over the photographs in the tars of FOLDER (default: ../shared/data/clothing),
for values that were left as they are, and for those clipped and rounded to bytes, beside the classic estimate (median
of Haar's diagonal detail, Donoho & Johnstone 1994) on the unclipped ones. Goal: 0.05 for unclipped values.
"""

import argparse
import io
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from diffusion_core.noise import normal
from diffusion_core.noise_level import estimate_sigma

SIDES = (32, 64, 128, 256)
SIGMAS = (0.05, 0.1, 0.2, 0.4, 0.7, 1.0)
_MEDIAN = 0.6744897501960817


def main() -> None:
    """Measure and print."""
    options = _options()
    shards = sorted(Path(options.photographs).glob("*.tar"))
    if not shards:
        sys.exit(f"error: no tars in {options.photographs}; name a folder of tars of photographs")
    torch.set_num_threads(1)
    images = [image for shard in shards for image in read(shard, -(-options.count // len(shards)))]
    print(f"{len(images)} photographs, torch {torch.__version__}; median relative error (goal 0.05 unclipped)")
    print("side  values     " + "".join(f"{sigma:>9}" for sigma in SIGMAS) + "   ms a picture")
    for side in SIDES:
        pictures = torch.stack([as_tensor(image, side) for image in images])
        for name, degrade, estimate in (
            ("unclipped", lambda x: x, estimate_sigma),
            ("bytes", to_bytes, estimate_sigma),
            ("classic", lambda x: x, classic),
        ):
            began = time.perf_counter()
            row = [median_error(pictures, sigma, degrade, estimate) for sigma in SIGMAS]
            each = (time.perf_counter() - began) / len(SIGMAS) / len(images)
            print(f"{side:4}  {name:10} " + "".join(f"{error:9.3f}" for error in row) + f"   {1000 * each:.2f}")


def median_error(
    pictures: Tensor, sigma: float, degrade: Callable[[Tensor], Tensor], estimate: Callable[[Tensor], Tensor]
) -> float:
    """Median of |estimate/sigma - 1| over pictures [B, C, H, W] with keyed noise."""
    errors = []
    for seed, picture in enumerate(pictures):
        noise = normal(torch.tensor([seed]), "degrade", round(1000 * sigma), picture.shape, torch.float64)
        errors.append(float(estimate(degrade(picture[None] + sigma * noise))[0]) / sigma - 1)
    return float(np.median(np.abs(errors)))


def to_bytes(x: Tensor) -> Tensor:
    """Clipped to [-1, 1] and rounded to 256 values."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def classic(x: Tensor) -> Tensor:
    """Median of Haar's diagonal detail over all channels."""
    detail = (x[..., ::2, ::2] - x[..., 1::2, ::2] - x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 2
    return detail.abs().flatten(1).median(dim=1).values / _MEDIAN


def read(shard: Path, count: int) -> list[Image.Image]:
    """The first `count` JPEGs of a tar."""
    with tarfile.open(shard) as tar:
        names = [member for member in tar if member.name.endswith(".jpg")][:count]
        files = [tar.extractfile(member) for member in names]
        return [Image.open(io.BytesIO(file.read())).convert("RGB") for file in files if file is not None]


def as_tensor(image: Image.Image, side: int) -> Tensor:
    """The middle square at `side` pixels, [3, side, side] in [-1, 1] (float64)."""
    edge = min(image.size)
    left, top = (image.width - edge) // 2, (image.height - edge) // 2
    square = image.crop((left, top, left + edge, top + edge)).resize((side, side), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).double() / 127.5 - 1


def _options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    beside = Path(__file__).resolve().parent.parent.parent / "shared/data/clothing"
    parser.add_argument("--photographs", default=str(beside), help="folder of tars of JPEGs")
    parser.add_argument("--count", type=int, default=240, help="photographs to take, spread over the tars")
    return parser.parse_args()


if __name__ == "__main__":
    main()
