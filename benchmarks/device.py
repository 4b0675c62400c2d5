"""How fast a training step is on this device, and what bounds it; `python benchmarks/training.py device`.

Needs torch alone; diffusers' UNet2DModel takes part where it is importable, with the same shape and in the set-up of
its own unconditional training script (DDPMScheduler, autocast, AdamW, clipping, EMAModel; eager, NCHW).
"""

import argparse
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from diffusion_core.config import PRESETS, ModelConfig, UNetConfig
from diffusion_core.denoiser import Denoiser
from diffusion_core.ema import Profile
from diffusion_core.flops import peak_flops, training_flops
from diffusion_core.names import diffusers_config
from diffusion_core.strategies import Ranks, distribute
from diffusion_core.training import Batch, Optimisation, new_state, train_step
from diffusion_core.unet import UNet

WARM_UP, BLOCK_S = 3, 2.0
GOAL = 0.45
Work = Callable[[], object]


@dataclass(frozen=True)
class Machine:
    """A device, the precision it works in, and what it reaches: FLOP/s of a large product, bytes/s of a large copy."""

    device: torch.device
    precision: str
    flops: float
    bandwidth: float

    @property
    def peak(self) -> float:
        """FLOP/s to measure utilisation by: the data sheet's where it is known, else those of the large product."""
        return peak_flops(self.device) or self.flops


def run(asked: argparse.Namespace) -> None:
    """Rates of all ways in turns, then the roofline."""
    machine, config = measure_machine(asked.precision), PRESETS[asked.preset or default_preset()]
    count = asked.batch or (64 if machine.device.type == "cuda" else 8)
    tell_machine(machine, config, count)
    works, held = {}, {}
    for name, make in ways(config, count, machine).items():
        works[name], held[name] = with_memory(make, machine.device)
    seconds = in_turns(works, machine.device, asked.rounds)
    for name, each in seconds.items():
        rate = count / each
        used = rate * training_flops(config) / machine.peak
        print(
            f"{name:10} {1e3 * each:8.1f} ms a step  {rate:8.1f} pictures/s  MFU {used:6.1%}  "
            f"{seconds['eager'] / each:.2f} of eager's rate  {held[name]}"
        )
    print(f"(goal: MFU {GOAL:.0%} on a GPU, compiled)")
    roofline(works["eager"], machine)


def default_preset() -> str:
    """The ADM-class network on a GPU, one of 0.2 M parameters elsewhere."""
    return "adm-64" if torch.cuda.is_available() else "tiny"


def measure_machine(precision: str) -> Machine:
    """The device with what it reaches."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = precision or ("bfloat16" if device.type == "cuda" else "float32")
    dtype, size = getattr(torch, precision), 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.empty(2**28 if device.type == "cuda" else 2**26, device=device, dtype=torch.float32).zero_()
    target = torch.empty_like(source)
    seconds = in_turns({"product": lambda: a @ b, "copy": lambda: target.copy_(source)}, device, 5)
    return Machine(device, precision, 2 * size**3 / seconds["product"], 8 * len(source) / seconds["copy"])


def tell_machine(machine: Machine, config: UNetConfig, count: int) -> None:
    """What is measured where."""
    name = torch.cuda.get_device_name() if machine.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    sheet = peak_flops(machine.device)
    print(f"{name}, torch {torch.__version__}, {machine.precision}, batch {count}, {config.resolution} pixels")
    print(f"network {config.widths} x {config.blocks}: {training_flops(config) / 1e9:.1f} GFLOP to train on a picture")
    print(
        f"large product {machine.flops / 1e12:.2f} TFLOP/s (data sheet: {f'{sheet / 1e12:.0f}' if sheet else 'none'}), "
        f"large copy {machine.bandwidth / 1e9:.0f} GB/s; in balance at {machine.peak / machine.bandwidth:.0f} FLOP/byte"
    )


def ways(config: UNetConfig, count: int, machine: Machine) -> dict[str, Callable[[], Work]]:
    """Makers of one training step each."""
    made: dict[str, Callable[[], Work]] = {
        "eager": lambda: ours(config, count, machine, compiled=False),
        "compiled": lambda: ours(config, count, machine, compiled=True),
    }
    try:
        import diffusers  # noqa: F401
    except ImportError:
        print("diffusers is not importable, so there is nothing to compare with")
    else:
        made["diffusers"] = lambda: theirs(config, count, machine)
    return made


def ours(config: UNetConfig, count: int, machine: Machine, compiled: bool) -> Work:
    """The core's own step, channels_last."""
    ranks = Ranks(device=machine.device)
    torch.manual_seed(0)
    network = UNet(config)
    wrapped = distribute(network, "ddp", ranks, machine.precision, compiled)
    settings = Optimisation(
        steps=10**6, learning_rate=1e-4, warmup=1, clip=1.0, weight_decay=0.0, label_dropout=0.1,
        ema=(Profile("power", 0.1),), seed=0, global_batch_size=count, precision=machine.precision,
    )  # fmt: skip
    state = new_state(Denoiser(wrapped, ModelConfig(config)), network, settings)
    x0 = pictures(config, count, machine.device).contiguous(memory_format=torch.channels_last)
    ids = torch.arange(count, device=machine.device)
    return lambda: train_step(state, Batch(x0, None, ids, ids), settings)


def theirs(config: UNetConfig, count: int, machine: Machine) -> Work:
    """UNet2DModel of the same shape as diffusers' examples/unconditional_image_generation trains it."""
    from diffusers import DDPMScheduler, UNet2DModel
    from diffusers.training_utils import EMAModel

    network = UNet2DModel(**diffusers_config(replace(config, embedding="timestep"))).to(machine.device)
    average = EMAModel(network.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    average.to(machine.device)
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    clean = pictures(config, count, machine.device)

    def step() -> float:
        noise = torch.randn_like(clean)
        steps = torch.randint(0, 1000, (count,), device=machine.device)
        noisy = scheduler.add_noise(clean, noise, steps)
        with torch.autocast(machine.device.type, torch.bfloat16, enabled=machine.precision == "bfloat16"):
            predicted = network(noisy, steps).sample
        loss = F.mse_loss(predicted.float(), noise)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.step(network.parameters())
        return loss.item()

    return step


def pictures(config: UNetConfig, count: int, device: torch.device) -> Tensor:
    """Random pictures [count, C, H, W] in [-1, 1]."""
    torch.manual_seed(1)
    return torch.rand(count, config.channels, config.resolution, config.resolution, device=device) * 2 - 1


def with_memory(make: Callable[[], Work], device: torch.device) -> tuple[Work, str]:
    """A step that has been warmed up, and the memory that it and its network took at most."""
    if device.type != "cuda":
        work = make()
        warm_up(work)
        return work, ""
    before = torch.cuda.memory_allocated()
    work = make()
    warm_up(work)
    torch.cuda.reset_peak_memory_stats()
    work()
    return work, f"peak {(torch.cuda.max_memory_allocated() - before) / 1e9:.2f} GB"


def warm_up(work: Work) -> None:
    """The first steps compile and choose kernels."""
    for _ in range(WARM_UP):
        work()


def in_turns(works: dict[str, Work], device: torch.device, rounds: int) -> dict[str, float]:
    """Median seconds of each, a block of a few seconds each in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    counts = {name: max(1, round(BLOCK_S / timed(work, 2, device))) for name, work in works.items()}
    for _ in range(rounds):
        for name, work in works.items():
            seconds[name].append(timed(work, counts[name], device))
    return {name: statistics.median(each) for name, each in seconds.items()}


def timed(work: Work, count: int, device: torch.device) -> float:
    """Seconds of one of `count` calls."""
    wait_for(device)
    began = time.perf_counter()
    for _ in range(count):
        work()
    wait_for(device)
    return (time.perf_counter() - began) / count


def wait_for(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


@dataclass
class Tally:
    """What the operations of a class ask for, at least take, and took one by one."""

    flops: float = 0.0
    bytes: float = 0.0
    least: float = 0.0
    compute: float = 0.0
    seconds: float = 0.0


class Counter(TorchDispatchMode):
    """Counts every operation by class: its arithmetic, the bytes that it must read and write, and its time."""

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self.machine = machine
        self.tallies: dict[str, Tally] = defaultdict(Tally)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        wait_for(self.machine.device)
        began = time.perf_counter()
        out = func(*args, **kwargs)
        wait_for(self.machine.device)
        seconds = time.perf_counter() - began
        if not func.is_view:
            self.count(func, args, kwargs, out, seconds)
        return out

    def count(self, func: Any, args: Any, kwargs: Any, out: Any, seconds: float) -> None:
        """Add an operation to its class."""
        packet = func._overloadpacket
        flops = arithmetic(packet, args, kwargs, out)
        moved = float(sum(each.nbytes for each in tree_leaves((args, kwargs, out)) if isinstance(each, Tensor)))
        tally = self.tallies[class_of(packet.__name__, args)]
        tally.flops += flops
        tally.bytes += moved
        tally.compute += flops / self.machine.peak
        tally.least += max(flops / self.machine.peak, moved / self.machine.bandwidth)
        tally.seconds += seconds


def arithmetic(packet: Any, args: Any, kwargs: Any, out: Any) -> float:
    """Floating-point operations of a call; PyTorch's table knows attention on GPUs alone."""
    if packet in flop_registry:
        return float(flop_registry[packet](*args, **kwargs, out_val=out))
    if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        return float(sdpa_flop_count(*(each.shape for each in args[:3])))
    if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return float(sdpa_backward_flop_count(*(each.shape for each in args[:4])))
    return 0.0


def class_of(name: str, args: Any) -> str:
    """The class of layers that an operation belongs to."""
    if "convolution" in name:
        weight = args[2] if name.endswith("backward") else args[1]
        return "convolutions 1x1" if weight.shape[-1] == 1 else f"convolutions {weight.shape[-1]}x{weight.shape[-1]}"
    if name in ("mm", "addmm", "bmm"):
        return "linear layers"
    if "attention" in name:
        return "attention"
    if "norm" in name and "foreach" not in name and "linalg" not in name:
        return "normalisation"
    if "adam" in name or "foreach" in name or "lerp" in name:
        return "optimiser, averages"
    return "pointwise, copies"


def roofline(work: Work, machine: Machine) -> None:
    """What every class of layers asks for in an eager step, and what bounds it."""
    for _ in range(2):  # the first one warms up
        with Counter(machine) as counter:
            work()
    tallies = sorted(counter.tallies.items(), key=lambda item: -item[1].least)
    total = sum(tally.flops for _, tally in tallies)
    print("class of operations    share of FLOP  GB moved  FLOP/byte  bound by   at least ms  took ms  reached")
    for name, tally in tallies:
        bound = "compute" if tally.compute > tally.least / 2 else "bandwidth"
        print(
            f"{name:22} {tally.flops / total:13.1%} {tally.bytes / 1e9:9.2f} {tally.flops / tally.bytes:10.1f}  "
            f"{bound:9} {1e3 * tally.least:12.2f} {1e3 * tally.seconds:8.2f} {tally.least / tally.seconds:8.0%}"
        )
    least = sum(tally.least for _, tally in tallies)
    fused = sum(tally.least for _, tally in tallies if tally.compute)
    ideal = total / machine.peak
    print(
        f"the roofline allows an MFU of {ideal / least:.0%} operation by operation, and {ideal / fused:.0%} where all "
        "that is not convolution, product or attention costs nothing, being fused into its neighbours"
    )
