"""What the service costs beside its arithmetic, and how models are best laid out over engines.

usage: python benchmarks/service.py overhead MODEL [--rounds 5] [--clients 16] [--pictures 96]
       python benchmarks/service.py models MODEL [--rounds 3] [--pictures 48]
       python benchmarks/service.py admission MODEL [--rounds 20]
       python benchmarks/service.py swap STORE NAME [--rounds 3]

MODEL is the URI of a published model.
overhead: pictures a second through HTTP, ingress and engine against the bare engine in a process of its own, in turns;
requests of 10, 20 and 50 steps. Both compute with one thread, so that HTTP has the other core, as it has beside a GPU.
models: two models asked at random, by two engine processes: one model each, or both in both (what multiplexing does);
in turns, by the time until all is answered and the 95th percentile of the answers.
admission: how long a request that comes while others run waits for its first tick, in ticks.
swap: seconds from a promotion to the first answer by the new version, and the slowest answer meanwhile over the median.
STORE must have two versions of NAME; it is promoted in, so take a copy.
"""

import argparse
import asyncio
import contextlib
import multiprocessing
import os
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

import httpx

from diffusion_core.config import SamplerConfig
from diffusion_core.tasks import Request
from pipelines.config import PromoteConfig, ServeConfig
from pipelines.model import load_model, published_models
from pipelines.registry import promote
from pipelines.worker import Worker, picture_seed
from pipelines.worker.loop import Order, TickLoop

STEPS = (10, 20, 50)
GENERATIONS = "/v1/images/generations"


def main() -> None:
    """Answer one question."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", choices=list(QUESTIONS))
    parser.add_argument("where", nargs="+")
    for name, value in (("rounds", 3), ("clients", 16), ("pictures", 96)):
        parser.add_argument(f"--{name}", type=int, default=value)
    asked = parser.parse_args()
    QUESTIONS[asked.question](asked)


def overhead(asked: argparse.Namespace) -> None:
    """HTTP and Serve against the bare engine."""
    model = asked.where[0]
    bodies = [{"seed": n, "steps": STEPS[n % 3], "guidance_scale": 1.0} for n in range(asked.pictures)]
    with multiprocessing.get_context("spawn").Pool(1) as alone, serving(model=model, threads=1) as url:
        ratios = []
        for number in range(asked.rounds + 1):
            bare = alone.apply(_bare, (model, bodies))
            served = _asked(url, bodies, asked.clients)
            if number:  # the first round warms up
                ratios.append(served / bare)
                print(f"round {number}: {len(bodies) / served:.1f} pictures/s served, {len(bodies) / bare:.1f} bare")
    print(f"overhead: time through HTTP over the bare engine's, median {statistics.median(ratios):.3f} (goal 1.10)")


def _bare(model: str, bodies: list[dict[str, Any]]) -> float:
    """Seconds of an engine alone for the same pictures."""
    worker = _worker(model)
    requests = [_request(body) for body in bodies]
    began = time.perf_counter()
    worker.engine.run(requests)
    return time.perf_counter() - began


_workers: dict[str, Worker] = {}


def _worker(model: str) -> Worker:
    """The worker of this process, loaded once."""
    if model not in _workers:
        _workers[model] = Worker(load_model(model), threads=1)
    return _workers[model]


def _request(body: dict[str, Any]) -> Request:
    return Request(picture_seed(body["seed"], 0), sampler=SamplerConfig(steps=body["steps"]))


def _asked(url: str, bodies: list[dict[str, Any]], clients: int) -> float:
    """Seconds until all are answered, by so many clients at a time."""
    with ThreadPoolExecutor(clients) as pool, httpx.Client(base_url=url, timeout=600) as client:
        began = time.perf_counter()
        answers = list(pool.map(lambda body: client.post(GENERATIONS, json=body), bodies))
        seconds = time.perf_counter() - began
    assert all(answer.status_code == 200 for answer in answers), [answer.text for answer in answers][:1]
    return seconds


@contextlib.contextmanager
def serving(**settings: Any) -> Iterator[str]:
    """The URL of a running service; leaves Ray at the end."""
    from pipelines import jobs, serve

    jobs.connect()
    try:
        yield serve.start(ServeConfig(**{"name": "model", "port": 0, **settings}))
    finally:
        serve.stop()
        jobs.disconnect()


def models(asked: argparse.Namespace) -> None:
    """A model an engine against both models in both."""
    model, choices = asked.where[0], random.Random(0)
    wanted = [(choices.randrange(2), n, STEPS[n % 3]) for n in range(asked.pictures)]
    shares = {
        "one model each": lambda: [[each for each in wanted if each[0] == name] for name in range(2)],
        "both in both": lambda: [wanted[::2], wanted[1::2]],
    }
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in shares}
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as first, context.Pool(1) as second:
        for _ in range(asked.rounds + 1):
            for name, share in shares.items():
                halves = share()
                began = time.perf_counter()
                waiting = [
                    pool.apply_async(_mixed, (model, half)) for pool, half in zip((first, second), halves, strict=True)
                ]
                latencies = sorted(each for answer in waiting for each in answer.get())
                spent[name].append((time.perf_counter() - began, latencies[int(0.95 * len(latencies))]))
    for name, figures in spent.items():
        whole, tail = (statistics.median(column) for column in zip(*figures[1:], strict=True))
        print(f"models: {name}: {len(wanted) / whole:.2f} pictures/s, 95 % within {tail:.1f} s")


def _mixed(model: str, wanted: list[tuple[int, int, int]]) -> list[float]:
    """Seconds to each answer of an engine process that has the models it is asked for, all asked at once."""
    if not _engines:
        _engines.extend(Worker(load_model(model), threads=1) for _ in range(2))
    return asyncio.run(_answered(wanted))


_engines: list[Worker] = []


async def _answered(wanted: list[tuple[int, int, int]]) -> list[float]:
    with ThreadPoolExecutor(1) as executor:
        loops = [TickLoop(worker.engine, executor) for worker in _engines]
        tasks = [asyncio.create_task(loop.run()) for loop in loops]

        async def one(name: int, seed: int, steps: int) -> float:
            began = time.perf_counter()
            order = Order((Request(seed, sampler=SamplerConfig(steps=steps)),))
            async for _ in loops[name].make(order):
                pass
            return time.perf_counter() - began

        seconds = await asyncio.gather(*(one(*each) for each in wanted))
        for task in tasks:
            task.cancel()
        return seconds


def admission(asked: argparse.Namespace) -> None:
    """Time from a request's coming to its first tick: what passes until its first preview, without that tick itself."""
    waits = asyncio.run(_admissions(asked.where[0], asked.rounds))
    print(f"admission: median {statistics.median(waits):.2f} ticks, at most {max(waits):.2f} (goal 1)")


async def _admissions(model: str, rounds: int) -> list[float]:
    """Waits in ticks, each beside eight requests under way."""
    ticks: list[float] = []
    with ThreadPoolExecutor(1) as executor:
        loop = TickLoop(_worker(model).engine, executor, told=lambda tick: ticks.append(tick.seconds))
        running = asyncio.create_task(loop.run())

        async def first_preview(seed: int, steps: int) -> float:
            began = time.perf_counter()
            order = Order((Request(seed, sampler=SamplerConfig(steps=steps)),), previews=steps)
            async with contextlib.aclosing(loop.make(order)) as events:
                async for _ in events:
                    return time.perf_counter() - began - ticks[-1]
            return float("nan")

        async def whole(seed: int) -> None:
            async for _ in loop.make(Order((Request(seed, sampler=SamplerConfig(steps=1000)),))):
                pass

        others = [asyncio.create_task(whole(seed)) for seed in range(8)]
        choices, waits = random.Random(0), []
        for number in range(rounds + 2):
            await asyncio.sleep(choices.uniform(0.3, 0.6))
            waits.append(await first_preview(100 + number, 50) / statistics.median(ticks[-5:]))
        for task in [*others, running]:
            task.cancel()
    return waits[2:]


def swap(asked: argparse.Namespace) -> None:
    """What a promotion costs those who ask."""
    store, name = asked.where
    versions = published_models(store, name)[-2:]
    with serving(store=store, name=name, threads=1) as url:
        for number in range(asked.rounds):
            seconds, slowest = _swapped(url, versions[number % 2])
            print(
                f"swap {number}: new version answers after {seconds:.2f} s; slowest answer {slowest:.2f} x the median"
            )


def _swapped(url: str, uri: str) -> tuple[float, float]:
    """Seconds from the promotion of a version to its first answer; the slowest answer meanwhile over the median."""
    answers: list[tuple[float, float, str]] = []
    stop = threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=url, timeout=60) as client:
            while not stop.is_set():
                began = time.perf_counter()
                told = client.post(GENERATIONS, json={"steps": 10, "seed": 1}).json()
                answers.append((time.perf_counter(), time.perf_counter() - began, told["version"]))

    asking = threading.Thread(target=ask)
    asking.start()
    while len(answers) < 10:
        time.sleep(0.05)
    before, began = answers[-1][2], time.perf_counter()
    promote(PromoteConfig(model=uri, force=True, reason="benchmark"))
    while answers[-1][2] == before and time.perf_counter() - began < 60:
        time.sleep(0.01)
    stop.set()
    asking.join()
    first = next((at for at, _, version in answers if version != before), float("nan"))
    taken = [seconds for at, seconds, _ in answers]
    return first - began, max(taken) / statistics.median(taken)


QUESTIONS: dict[str, Callable[[argparse.Namespace], None]] = {
    "overhead": overhead, "models": models, "admission": admission, "swap": swap,
}  # fmt: skip

if __name__ == "__main__":
    main()
