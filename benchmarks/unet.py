"""Time of the U-Net against diffusers' UNet2DModel, same weights and batch; cost of noise; memory of checkpointing.

usage: python benchmarks/unet.py     needs torch alone; the comparison also needs diffusers

Forward and training step (forward, backward, AdamW) are interleaved; on a CPU their CPU time is taken, medians shown.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from diffusion_core.config import PRESETS, UNetConfig
from diffusion_core.names import diffusers_config, from_diffusers
from diffusion_core.noise import normal
from diffusion_core.unet import UNet

ROUNDS = 25
BATCH = 32
COMPARED = ("cpu-small", "small")
NOISE = ("cpu-small", "small")
MEASURED_MEMORY = "medium-64"
Work = Callable[[], object]


def main(arguments: list[str]) -> None:
    """All figures; `--memory on|off` is the child process that one of them needs."""
    if arguments[:1] == ["--memory"]:
        print(peak_of_one_step(arguments[1] == "on"))
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, batch {BATCH}, {ROUNDS} rounds")
    for preset in COMPARED:
        compare(preset, device)
    for preset in NOISE:
        noise_share(preset, device)
    memory()


def compare(preset: str, device: torch.device) -> None:
    """Ratios of time to UNet2DModel's."""
    try:
        from diffusers import UNet2DModel
    except ImportError:
        print(f"{preset}: diffusers is not installed, so there is nothing to compare with")
        return
    config = replace(PRESETS[preset], embedding="timestep")
    theirs = UNet2DModel(**diffusers_config(config)).to(device)
    ours = UNet(config).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    ours.load_state_dict(from_diffusers(config, theirs.state_dict()))
    x, t = batch(config, device), torch.rand(BATCH, device=device) * 999
    plain = x.contiguous()
    works: dict[str, tuple[nn.Module, Work]] = {
        "ours": (ours, lambda: ours(x, t, None)),
        "diffusers": (theirs, lambda: theirs(plain, t).sample),
    }
    forward = medians({name: inference(work) for name, (_, work) in works.items()}, device)
    step = medians({name: training(net, work) for name, (net, work) in works.items()}, device)
    for what, seconds in (("forward", forward), ("training step", step)):
        ratio = seconds["ours"] / seconds["diffusers"]
        print(
            f"{preset}: {what} {1e3 * seconds['ours']:.1f} ms, UNet2DModel {1e3 * seconds['diffusers']:.1f} ms, "
            f"ratio {ratio:.2f}"
        )


def noise_share(preset: str, device: torch.device) -> None:
    """Share of a training step and of a sampling step that generating their noise takes."""
    config = PRESETS[preset]
    network = UNet(config).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    parameters = sum(parameter.numel() for parameter in network.parameters())
    x, t, seeds = batch(config, device), torch.rand(BATCH, device=device), torch.arange(BATCH, device=device)
    seconds = medians(
        {
            "noise": lambda: normal(seeds, "sampler", 3, x.shape[1:]),
            "training": training(network, lambda: network(x, t, None)),
            "sampling": inference(lambda: network(x, t, None)),
        },
        device,
    )
    shares = {name: 100 * seconds["noise"] / seconds[name] for name in ("training", "sampling")}
    print(
        f"{preset} ({parameters / 1e6:.1f} M): noise {1e3 * seconds['noise']:.2f} ms, {shares['training']:.1f} % of a "
        f"training step, {shares['sampling']:.1f} % of a sampling step"
    )


def memory() -> None:
    """Peak memory of one training step with activation checkpointing off and on, each in a process of its own."""
    peak = {}
    for setting in ("off", "on"):
        command = [sys.executable, __file__, "--memory", setting]
        peak[setting] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    print(
        f"{MEASURED_MEMORY} at batch 8: peak memory of a training step above that of its network {peak['off']:.2f} "
        f"GB, with activation checkpointing {peak['on']:.2f} GB, ratio {peak['on'] / peak['off']:.2f}"
    )


def peak_of_one_step(checkpointing: bool) -> float:
    """Gigabytes that one forward and backward pass adds at its peak."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = PRESETS[MEASURED_MEMORY]
    network = UNet(config, checkpointing).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    x, t = batch(config, device)[:8], torch.rand(8, device=device)
    before = torch.cuda.memory_allocated() / 1e9 if device.type == "cuda" else resident("VmRSS")
    network(x, t, None).square().mean().backward()
    after = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else resident("VmHWM")
    return after - before


def resident(field: str) -> float:
    """Resident memory of the process in gigabytes: VmRSS now, VmHWM at its peak (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024 / 1e9


def batch(config: UNetConfig, device: torch.device) -> Tensor:
    """Random pictures [BATCH, C, H, W] in channels_last."""
    x = torch.randn(BATCH, config.channels, config.resolution, config.resolution, device=device)
    return x.contiguous(memory_format=torch.channels_last)


def inference(work: Work) -> Work:
    """The work without gradients."""
    return torch.inference_mode()(work)


def training(network: nn.Module, work: Work) -> Work:
    """Forward, backward and a step of AdamW."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        out = work()
        assert isinstance(out, Tensor)
        out.square().mean().backward()
        optimizer.step()

    return step


def medians(works: dict[str, Work], device: torch.device) -> dict[str, float]:
    """Median seconds of each, interleaved; CPU time of all threads on a CPU, after two rounds of warming up."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(ROUNDS + 2):
        for name, work in works.items():
            seconds[name].append(timed(work, device))
    return {name: statistics.median(each[2:]) for name, each in seconds.items()}


def timed(work: Work, device: torch.device) -> float:
    """Seconds that the work takes."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        return time.perf_counter() - began
    began = time.process_time()
    work()
    return time.process_time() - began


if __name__ == "__main__":
    main(sys.argv[1:])
