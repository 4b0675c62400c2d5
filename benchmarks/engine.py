"""What the engine reaches of the machine: against the bare loop, sequential requests and request-level batches.

usage: python benchmarks/engine.py [--preset cpu-small] [--rounds 5] [--requests 48]     needs torch alone

Prints, each measured side by side in one run:
1. full lanes: network inputs a second of the engine over those of the bare sampling loop (goal: 0.95);
2. mixed lengths (10, 20, 50 steps), all there at once: inputs a second of the engine, of requests one after another,
   and of request-level batches (the waiting requests grouped by length, each group run to its end);
3. the same requests arriving at random (Poisson, at 80 % of what 2. reached): latency. The clock is virtual: it adds
   up what was measured, and jumps over idle time;
4. what batching could gain: the time of a batch of n over n batches of one, and the share of it that is reached.
"""

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from diffusion_core.config import PRESETS, ModelConfig, SamplerConfig
from diffusion_core.denoiser import Denoiser, guidance, guided
from diffusion_core.engine import Engine
from diffusion_core.samplers import make_plan, model_grid, sample, start_noise
from diffusion_core.tasks import Request
from diffusion_core.unet import UNet
from diffusion_core.widths import agreeing_widths, measure_lanes

LENGTHS = (10, 20, 50)
LANES = 32
LOAD = 0.8


def main() -> None:
    """Measure and print."""
    options = _options()
    denoiser, shape, device = build(options.preset)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {device}, {options.preset}")
    began = time.perf_counter()
    widths = (LANES,) if device.type == "cuda" else agreeing_widths(denoiser, shape, device, LANES)
    print(f"batch sizes that agree bit by bit  {widths}, found in {time.perf_counter() - began:.1f} s")
    print(f"lanes by measurement  {measure_lanes(denoiser, shape, (4, 8, 16, 32, 64), device)}")
    engine = Engine(denoiser, widths, device=device)
    for scale in (1.0, 2.0):
        ratio, rate = full_lanes(engine, scale, options.rounds)
        print(f"full lanes, guidance {scale:g}: engine / bare loop  {ratio:.3f} (goal 0.95), {rate:.0f} inputs/s")
    single, gains = possible(denoiser, shape, device, widths, options.rounds)
    print("gain of a batch over single calls  " + ", ".join(f"{n}: {gain:.2f}" for n, gain in gains.items()))
    rates = backlog(engine, options.requests, options.rounds)
    print_backlog(rates, single, gains)
    for name, (median, high) in arrivals(engine, options.requests, LOAD * rates["engine"]).items():
        print(f"arrivals at {LOAD:g} of the engine's rate, {name:22} latency p50 {median:6.2f} s, p95 {high:6.2f} s")


def build(preset: str) -> tuple[Denoiser, tuple[int, int, int], torch.device]:
    """A U-Net of random weights, none of them zero."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    unet = PRESETS[preset]
    torch.manual_seed(0)
    network = UNet(unet).eval().requires_grad_(False)
    for weight in network.parameters():
        if weight.ndim > 1:
            weight.normal_(0.0, 0.05)
    network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Denoiser(network, ModelConfig(unet)), (unet.channels, unet.resolution, unet.resolution), device


@torch.no_grad()
def bare(engine: Engine, steps: int, seeds: list[int], scale: float = 1.0) -> float:
    """Seconds of the sampling loop for requests of one length as one batch."""
    config = SamplerConfig(steps=steps)
    plan = make_plan(config, model_grid(config, engine.model))
    unet, count = engine.model.unet, len(seeds)
    label = torch.zeros(count, dtype=torch.int64, device=engine.device) if unet.classes else None
    how = guidance(torch.full((count,), scale, device=engine.device))
    began = time.perf_counter()
    keys = torch.tensor(seeds, device=engine.device)
    x = start_noise(plan, keys, (unet.channels, unet.resolution, unet.resolution))
    x = x.contiguous(memory_format=torch.channels_last)
    float(sample(lambda x, sigma: guided(engine.denoiser, x, sigma, label, how), plan, x, keys).sum())
    return time.perf_counter() - began


def through(engine: Engine, requests: list[Request]) -> float:
    """Seconds of the engine for requests that are all there at once."""
    began = time.perf_counter()
    float(engine.run(requests)[-1].sum())
    return time.perf_counter() - began


def full_lanes(engine: Engine, scale: float, rounds: int) -> tuple[float, float]:
    """Median ratio of rates, and the engine's rate, for equal requests that fill the lanes."""
    count, steps = engine.lanes, 18
    requests = [Request(seed, sampler=SamplerConfig(steps=steps), guidance_scale=scale) for seed in range(count)]
    pairs = []
    for number in range(rounds + 1):
        sides: list[Callable[[], float]] = [
            lambda: bare(engine, steps, list(range(count)), scale),
            lambda: through(engine, requests),
        ]
        order = (0, 1) if number % 2 else (1, 0)
        seconds = {side: sides[side]() for side in order}
        pairs.append((seconds[0], seconds[1]))
    ratio = statistics.median(loop / ours for loop, ours in pairs[1:])
    return ratio, count * steps / statistics.median(ours for _, ours in pairs[1:])


def possible(
    denoiser: Denoiser, shape: tuple[int, int, int], device: torch.device, widths: tuple[int, ...], rounds: int
) -> tuple[float, dict[int, float]]:
    """Single calls a second, and how many times as many inputs a second a batch of each size makes."""
    sizes = (1, *[width for width in widths if width > 1])
    seconds: dict[int, list[float]] = {size: [] for size in sizes}
    for _ in range(2 * rounds + 1):
        for size in sizes:
            x = torch.randn(size, *shape, device=device).contiguous(memory_format=torch.channels_last)
            seconds[size].append(call(denoiser, x))
    best = {size: statistics.median(times[1:]) for size, times in seconds.items()}
    return 1 / best[1], {size: size * best[1] / best[size] for size in sizes[1:]}


@torch.no_grad()
def call(denoiser: Denoiser, x: Tensor) -> float:
    """Seconds of one denoiser call."""
    began = time.perf_counter()
    float(denoiser(x, torch.ones(len(x), device=x.device), None).sum())
    return time.perf_counter() - began


def mixed(count: int) -> list[Request]:
    """Requests of all lengths in a random order."""
    steps = [LENGTHS[number % len(LENGTHS)] for number in range(count)]
    random.Random(0).shuffle(steps)
    return [Request(seed, sampler=SamplerConfig(steps=length)) for seed, length in enumerate(steps)]


def calls(requests: list[Request]) -> int:
    """Denoiser calls of requests."""
    return sum(request.sampler.steps for request in requests)


def backlog(engine: Engine, count: int, rounds: int) -> dict[str, float]:
    """Inputs a second for mixed lengths that are all there at once, medians of interleaved rounds."""
    requests = mixed(count)
    seconds: dict[str, list[float]] = {"engine": [], "one after another": [], "request-level batches": []}
    for number in range(max(2, rounds // 2)):
        progress(f"backlog, round {number + 1}")
        seconds["engine"].append(through(engine, requests))
        seconds["one after another"].append(sum(bare(engine, r.sampler.steps, [r.seed]) for r in requests))
        batches = [requests[at : at + engine.lanes] for at in range(0, count, engine.lanes)]
        seconds["request-level batches"].append(sum(grouped(engine, batch) for batch in batches))
    return {name: calls(requests) / statistics.median(times) for name, times in seconds.items()}


def grouped(engine: Engine, batch: list[Request]) -> float:
    """Seconds of a request-level batch: one loop for each length in it."""
    lengths = {request.sampler.steps for request in batch}
    return sum(bare(engine, steps, [r.seed for r in batch if r.sampler.steps == steps]) for steps in lengths)


def print_backlog(rates: dict[str, float], single: float, gains: dict[int, float]) -> None:
    """Rates, ratios, and the share of what the machine could."""
    most = max(gains.values())
    for name, rate in rates.items():
        against = f"engine / this {rates['engine'] / rate:.2f}" if name != "engine" else " " * 18
        share = rate / (most * single)
        print(f"backlog of mixed lengths, {name:22} {rate:6.0f} inputs/s  {against}  {share:.2f} of the possible")


def arrivals(engine: Engine, count: int, rate: float) -> dict[str, tuple[float, float]]:
    """Median and 95th percentile of latency for mixed lengths arriving at `rate` inputs a second."""
    requests, draw, now = mixed(count), random.Random(1), 0.0
    gap = calls(requests) / count / rate
    times = []
    for _ in requests:
        now += draw.expovariate(1 / gap)
        times.append(now)
    found = {}
    for name, serve in (("engine", by_engine), ("one after another", by_one), ("request-level batches", by_batches)):
        progress(f"arrivals, {name}")
        latencies = sorted(serve(engine, requests, times))
        found[name] = (statistics.median(latencies), latencies[int(0.95 * count)])
    return found


def by_engine(engine: Engine, requests: list[Request], times: list[float]) -> list[float]:
    """Latencies of requests that join the running batch as they come."""
    clock, place, born, latencies = 0.0, 0, {}, []
    while place < len(requests) or not engine.idle:
        if engine.idle:
            clock = max(clock, times[place])
        while place < len(requests) and times[place] <= clock:
            born[engine.submit(requests[place])] = times[place]
            place += 1
        began = time.perf_counter()
        ends = engine.tick()
        clock += time.perf_counter() - began
        latencies += [clock - born[end.ticket] for end in ends]
    return latencies


def by_one(engine: Engine, requests: list[Request], times: list[float]) -> list[float]:
    """Latencies of requests that are met alone, first come first."""
    clock, latencies = 0.0, []
    for request, arrived in zip(requests, times, strict=True):
        clock = max(clock, arrived) + bare(engine, request.sampler.steps, [request.seed])
        latencies.append(clock - arrived)
    return latencies


def by_batches(engine: Engine, requests: list[Request], times: list[float]) -> list[float]:
    """Latencies of request-level batches: whoever waits when one has ended makes the next."""
    clock, place, latencies = 0.0, 0, []
    while place < len(requests):
        clock = max(clock, times[place])
        last = place
        while last < len(requests) and times[last] <= clock and last - place < engine.lanes:
            last += 1
        batch = list(zip(requests[place:last], times[place:last], strict=True))
        for steps in sorted({request.sampler.steps for request, _ in batch}):
            members = [(request.seed, arrived) for request, arrived in batch if request.sampler.steps == steps]
            clock += bare(engine, steps, [seed for seed, _ in members])
            latencies += [clock - arrived for _, arrived in members]
        place = last
    return latencies


def progress(text: str) -> None:
    """What is being measured."""
    print(f"… {text}", file=sys.stderr, flush=True)


def _options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="cpu-small", choices=sorted(PRESETS), help="shape of the U-Net")
    parser.add_argument("--rounds", type=int, default=5, help="repetitions, of which medians are taken")
    parser.add_argument("--requests", type=int, default=48, help="requests of mixed lengths")
    return parser.parse_args()


if __name__ == "__main__":
    main()
