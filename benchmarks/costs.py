"""What a run takes on 1, 8 and 64 GPUs, worked out from arithmetic counted here and rates measured elsewhere.

usage: python benchmarks/costs.py [--mfu 0.25] [--peak 989e12]     needs torch alone; takes seconds

Counted: operations of a training step and of a denoiser call, on tensors without storage. Measured (docs/results.md, 2
cores): pictures a second of training, the engine's share of the bare loop. Assumed, and marked so in docs/costs.md:
the share of a GPU's arithmetic that is reached (--mfu), and how much of it more GPUs keep.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from diffusion_core.config import PRESETS
from diffusion_core.flops import training_flops

# Pictures a second of `cpu-small` on 2 cores (the demo), and the share of the bare loop that the engine reaches.
MEASURED_RATE, ENGINE = 61.0, 0.975
# Share of linear speed-up kept, by GPUs: assumed.
KEPT = {1: 1.0, 8: 0.9, 64: 0.8}
CALLS, GUIDED = 18, 2
HOUR = 3600.0


class Run(NamedTuple):
    """A network and how many pictures its training sees."""

    preset: str
    pictures: float


# Smaller networks do not fill a GPU: what they take is its start-up.
RUNS = (Run("ddpm-32", 100e6), Run("adm-64", 500e6), Run("adm-256", 500e6))
IMAGES = 1e6


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(usage=(__doc__ or "").split("usage: ")[1].split("     needs")[0])
    parser.add_argument("--mfu", type=float, default=0.25)
    parser.add_argument("--peak", type=float, default=989e12)
    asked = parser.parse_args()
    reached = asked.mfu * asked.peak
    cpu = MEASURED_RATE * training_flops(PRESETS["cpu-small"])
    print(f"2 cores, measured: {cpu / 1e9:.0f} GFLOP/s in training; a GPU as assumed: {reached / 1e12:.0f} TFLOP/s\n")
    print("| training | operations a picture | " + " | ".join(f"{gpus} GPU" + "s" * (gpus > 1) for gpus in KEPT) + " |")
    for run in RUNS:
        flops = training_flops(PRESETS[run.preset])
        hours = [run.pictures * flops / (reached * gpus * kept) / HOUR for gpus, kept in KEPT.items()]
        print(f"| `{run.preset}`, {run.pictures:,.0f} pictures | {flops / 1e9:.2f} G | {told(hours)} |")
    print("\n| bulk, 1,000,000 pictures | operations a picture | " + " | ".join(f"{gpus}" for gpus in KEPT) + " |")
    for run in RUNS:
        flops = training_flops(PRESETS[run.preset]) / 3 * CALLS * GUIDED
        # Workers of bulk share nothing: twice the devices are twice the speed.
        hours = [IMAGES * flops / (reached * ENGINE * gpus) / HOUR for gpus in KEPT]
        print(f"| `{run.preset}` | {flops / 1e9:.1f} G | {told(hours)} |")


def told(hours: list[float]) -> str:
    """Hours of wall time, and of devices, for each number of GPUs."""
    cells = [f"{_time(each)} ({_number(each * gpus)} GPU h)" for each, gpus in zip(hours, KEPT, strict=True)]
    return " | ".join(cells)


def _time(hours: float) -> str:
    if hours >= 48:
        return f"{hours / 24:.1f} days"
    return f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.1f} min" if hours >= 1 / 60 else f"{hours * HOUR:.2g} s"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


if __name__ == "__main__":
    main()
