"""Predicted against measured peak memory of training steps, and what each lever changes in memory and time.

usage: python benchmarks/memory.py              predicted over measured, configuration by configuration
       python benchmarks/memory.py levers       memory and time of a step with each lever, over one without
       python benchmarks/memory.py glibc        what glibc's allocator keeps beside

needs torch alone; on a GPU, what its allocator gave out is measured, else resident memory (Linux), each configuration
in a process of its own. There freed memory goes back to the system at once (MALLOC_MMAP_THRESHOLD_), which `glibc`
compares with the default. Times on a CPU are CPU time.
"""

import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from diffusion_core.config import PRESETS, ModelConfig, Precision, Strategy
from diffusion_core.denoiser import Denoiser
from diffusion_core.ema import Profile
from diffusion_core.memory import predict
from diffusion_core.strategies import Ranks, distribute
from diffusion_core.training import Batch, Optimisation, TrainState, new_state, train_step
from diffusion_core.unet import UNet

STEPS = 3
RETURNED = "65536"  # bytes from which glibc maps every block by itself, and unmaps it when it is freed


class Case(NamedTuple):
    """A training step: what is computed, and over how many processes."""

    preset: str
    share: int
    micro_batch: int
    checkpointing: bool = False
    precision: Precision = "float32"
    widths: int = 1
    strategy: Strategy = "ddp"
    world: int = 1


CASES = (
    Case("cpu-small", 16, 16),
    Case("cpu-small", 32, 32, checkpointing=True),
    Case("small", 8, 8),
    Case("small", 8, 2),
    Case("small", 8, 8, checkpointing=True, widths=3),
    Case("small", 4, 4, precision="bfloat16"),
    Case("small", 8, 8, strategy="ddp", world=2),
    Case("small", 8, 8, strategy="fsdp", world=2),
    Case("ddpm-32", 2, 2),
    Case("ddpm-32", 1, 1, strategy="fsdp", world=2),
    Case("medium-64", 2, 2, checkpointing=True),
)
PLAIN = Case("small", 8, 8, widths=3)
LEVERS = {
    "micro-batch 2 of 8": PLAIN._replace(micro_batch=2),
    "activation checkpointing": PLAIN._replace(checkpointing=True),
    "bfloat16": PLAIN._replace(precision="bfloat16"),
    "one EMA width of three": PLAIN._replace(widths=1),
    "a smaller preset (`cpu-small`)": PLAIN._replace(preset="cpu-small"),
    "all of these but the preset": PLAIN._replace(micro_batch=2, checkpointing=True, precision="bfloat16", widths=1),
}
REPLICAS = PLAIN._replace(share=4, micro_batch=4, strategy="ddp", world=2)
SHARDS = {"`fsdp` on 2 workers": REPLICAS._replace(strategy="fsdp")}


def main(arguments: list[str]) -> None:
    """What the first argument names; `--measure CASE` is the child process that takes a figure."""
    if arguments[:1] == ["--measure"]:
        print(json.dumps(measured_here(Case(*json.loads(arguments[1])))))
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, {STEPS} steps each", flush=True)
    {"levers": compare_levers, "glibc": compare_allocators}.get(" ".join(arguments), compare_predictions)()


def compare_predictions() -> None:
    """Predicted over measured peak of each configuration."""
    print("| configuration | predicted | measured | ratio |\n|---|---|---|---|")
    for case in CASES:
        expected, found = predicted(case), measured(case)["bytes"]
        print(
            f"| {named(case)} | {expected / 1e6:.0f} MB | {found / 1e6:.0f} MB | {expected / found:.2f} |", flush=True
        )


def compare_levers() -> None:
    """Memory and time with each lever, over the same step without it."""
    print("| lever | memory | time | predicted memory |\n|---|---|---|---|")
    for base, levers in ((PLAIN, LEVERS), (REPLICAS, SHARDS)):
        without = measured(base)
        print(f"| none: {named(base)} | {without['bytes'] / 1e6:.0f} MB | {without['seconds']:.2f} s | "
              f"{predicted(base) / 1e6:.0f} MB |", flush=True)  # fmt: skip
        for name, case in levers.items():
            found = measured(case)
            print(f"| {name} | {found['bytes'] / without['bytes']:.2f} | {found['seconds'] / without['seconds']:.2f} | "
                  f"{predicted(case) / predicted(base):.2f} |", flush=True)  # fmt: skip


def compare_allocators() -> None:
    """Peak and time with glibc's own settings, over those with which all that is freed goes back at once."""
    print("| configuration | memory | time |\n|---|---|---|")
    for case in CASES:
        usual, returned = measured(case, returned=None), measured(case)
        ratios = (usual[name] / returned[name] for name in ("bytes", "seconds"))
        print(f"| {named(case)} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |", flush=True)


def named(case: Case) -> str:
    """A configuration in words."""
    words = [f"{case.preset}, {case.share} pictures"]
    words += [f"{case.micro_batch} at a time"] if case.micro_batch < case.share else []
    words += ["checkpointing"] if case.checkpointing else []
    words += [case.precision] if case.precision != "float32" else []
    words += [f"{case.widths} EMA widths"] if case.widths > 1 else []
    words += [f"{case.strategy} on {case.world}"] if case.world > 1 else []
    return ", ".join(words)


def predicted(case: Case) -> int:
    """Bytes that the planner expects."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ranks = Ranks(0, case.world, case.world, device)
    model = ModelConfig(PRESETS[case.preset])
    return predict(
        model, optimisation(case), case.strategy, ranks, case.share, case.micro_batch, case.checkpointing
    ).total


def measured(case: Case, returned: str | None = RETURNED) -> dict[str, float]:
    """Peak in bytes and seconds a step, taken in a new process."""
    environment = dict(os.environ) | ({"MALLOC_MMAP_THRESHOLD_": returned} if returned else {})
    command = [sys.executable, __file__, "--measure", json.dumps(case)]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    found: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return found


def measured_here(case: Case) -> dict[str, float]:
    """The same in this process, or in as many as the case has ranks; the first rank's figures."""
    if case.world == 1:
        return figures(case, Ranks(device=torch.device("cuda" if torch.cuda.is_available() else "cpu")))
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(on_rank, (case, folder), nprocs=case.world)  # type: ignore[no-untyped-call]
        found: dict[str, float] = json.loads(Path(folder, "figures.json").read_text())
    return found


def on_rank(rank: int, case: Case, folder: str) -> None:
    """A process of several, over NCCL where each has a GPU, else over gloo."""
    on_gpus = torch.cuda.device_count() >= case.world
    if on_gpus:
        torch.cuda.set_device(rank)
    torch.set_num_threads(1)
    backend, device = ("nccl", torch.device("cuda", rank)) if on_gpus else ("gloo", torch.device("cpu"))
    dist.init_process_group(backend, init_method=f"file://{folder}/meeting", rank=rank, world_size=case.world)
    found = figures(case, Ranks(rank, case.world, case.world, device))
    if rank == 0:
        Path(folder, "figures.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def figures(case: Case, ranks: Ranks) -> dict[str, float]:
    """Peak in bytes above what there was before, and the median seconds of a step."""
    # A smaller step of the same kind first, so that code and libraries are in memory before the count begins.
    take_steps(case._replace(preset="tiny", share=2, micro_batch=1 if case.micro_batch < case.share else 2), ranks)
    before = forget_peak(ranks)
    seconds = take_steps(case, ranks)
    return {"bytes": peak(ranks) - before, "seconds": statistics.median(seconds[1:])}


def take_steps(case: Case, ranks: Ranks) -> list[float]:
    """Seconds of each training step of a new network; on a CPU those of its own time, whatever else is running."""
    state, batch, settings, seconds = begin(case, ranks), pictures(case, ranks), optimisation(case), []
    for _ in range(STEPS):
        began = clock(ranks)
        train_step(state, batch, settings)
        seconds.append(clock(ranks) - began)
    return seconds


def clock(ranks: Ranks) -> float:
    """Seconds: of this process's CPU time, or, with all work on a GPU done, since some moment."""
    if ranks.device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def begin(case: Case, ranks: Ranks) -> TrainState:
    """A network with its optimiser and averages."""
    model = ModelConfig(PRESETS[case.preset])
    network = UNet(model.unet, case.checkpointing)
    spread = distribute(network, case.strategy, ranks, case.precision)
    return new_state(Denoiser(spread, model), network, optimisation(case))


def pictures(case: Case, ranks: Ranks) -> Batch:
    """A rank's share of a batch."""
    unet = PRESETS[case.preset]
    ids = torch.arange(case.share, device=ranks.device) + case.share * ranks.rank
    x0 = torch.rand(case.share, unet.channels, unet.resolution, unet.resolution, device=ranks.device) * 2 - 1
    return Batch(x0.contiguous(memory_format=torch.channels_last), None, ids, ids)


def optimisation(case: Case) -> Optimisation:
    """The settings of a case."""
    settings = Optimisation(
        steps=100, learning_rate=1e-4, warmup=1, clip=1.0, weight_decay=0.0, label_dropout=0.0,
        ema=(Profile("power", 0.1),) * case.widths, seed=0, global_batch_size=case.share * case.world,
    )  # fmt: skip
    turns = -(-case.share // case.micro_batch)
    return replace(settings, micro_batches=turns, precision=case.precision, world=case.world)


def forget_peak(ranks: Ranks) -> int:
    """Bytes in use now, from where the peak is counted anew."""
    gc.collect()
    if ranks.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def peak(ranks: Ranks) -> int:
    """The most bytes in use since."""
    return torch.cuda.max_memory_allocated() if ranks.device.type == "cuda" else resident("VmHWM")


def resident(field: str) -> int:
    """Resident memory of the process in bytes: VmRSS now, VmHWM at its peak (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main(sys.argv[1:])
