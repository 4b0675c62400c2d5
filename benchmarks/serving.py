"""The service under load, beside what people would put up instead: one model, one mix of requests, one machine.

usage: python benchmarks/serving.py compare SCRATCH [--seconds 40] [--rates 0.5 0.8 1.0 1.2]
                                           [--clients 1 4 16] [--batch 8 0.02]
       python benchmarks/serving.py tune SCRATCH [--seconds 30]
       python benchmarks/serving.py soak SCRATCH [--pictures 2000]

ours: the service with one engine. batch: the same engine behind `@serve.batch`: a batch is begun with those who wait,
finished rows leave it, nobody joins it; the best size and wait of `tune`. lock: diffusers' network and DDIM scheduler
behind FastAPI with a lock, one request at a time.

The mix: 10, 20 and 50 steps of DDIM; half guided; a quarter inpaint (the known region written in after each step).
Closed loop: so many clients that ask again at once. Open loop: Poisson arrivals, at rates that are shares of what
`batch` answers in a closed loop of 16. Goodput: answers a second within the deadline, three times a lone request of 50
guided steps. The services are measured in turns in each condition; times are seconds. SCRATCH keeps the model.
--plot FILE draws goodput and the 95th percentile of every condition. compare also prints what batching gains on this
machine, the time to the first preview, and the time from the start of a process to its first picture. soak: memory over
many requests; a service must not grow.
"""

import argparse
import asyncio
import base64
import contextlib
import io
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

import httpx
import numpy as np
import torch

from diffusion_core.config import ModelConfig, Timesteps, UNetConfig
from diffusion_core.schedules import timestep_sigmas
from pipelines.images import to_png

STEPS = (10, 20, 50)
SIDE = 32
GUIDED = 2.0
BATCH = (8, 0.02)  # size and wait of `batch`, as `tune` found
PORTS = {"ours": 19710, "batch": 19720, "lock": 19730}
GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"


def main() -> None:
    """Answer one question, or be one of the services."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", choices=[*QUESTIONS, *SERVICES])
    parser.add_argument("scratch")
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.5, 0.8, 1.0, 1.2])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--plot", default="")
    parser.add_argument("--batch", type=float, nargs=2, default=BATCH)
    asked = parser.parse_args()
    {**QUESTIONS, **SERVICES}[asked.question](asked)


@dataclass(frozen=True)
class Ask:
    """A request of the mix."""

    steps: int
    guided: bool
    inpaint: bool
    seed: int

    @property
    def fields(self) -> dict[str, Any]:
        """As the HTTP API takes them."""
        scale = GUIDED if self.guided else 1.0
        told = {"prompt": "a", "steps": self.steps, "guidance_scale": scale, "seed": self.seed, "sampler": "ddim"}
        return {**told, "grid": "leading", **({"inpainting": "replacement"} if self.inpaint else {})}


def mix(count: int, seed: int) -> list[Ask]:
    """Requests as they come."""
    choices = random.Random(seed)
    return [
        Ask(choices.choice(STEPS), choices.random() < 0.5, choices.random() < 0.25, number) for number in range(count)
    ]


def files() -> dict[str, tuple[str, bytes, str]]:
    """A picture and the mask of its left half."""
    pixels = np.random.default_rng(0).integers(256, size=(SIDE, SIDE, 3), dtype=np.uint8)
    alpha = np.full((SIDE, SIDE, 1), 255, np.uint8)
    alpha[:, : SIDE // 2] = 0
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.concatenate([pixels, alpha], axis=2)).save(buffer, format="PNG")
    return {"image": ("image.png", to_png(pixels), "image/png"), "mask": ("mask.png", buffer.getvalue(), "image/png")}


async def answer(client: httpx.AsyncClient, ask: Ask) -> float:
    """Seconds to the answer; NaN where there is none."""
    began = time.perf_counter()
    if ask.inpaint:
        told = await client.post(EDITS, data={k: str(v) for k, v in ask.fields.items()}, files=files())
    else:
        told = await client.post(GENERATIONS, json=ask.fields)
    return time.perf_counter() - began if told.status_code == 200 else float("nan")


async def closed(url: str, clients: int, seconds: float) -> list[float]:
    """Answers' seconds of clients that ask again at once."""
    taken: list[float] = []
    until = time.perf_counter() + seconds

    async def one(number: int, client: httpx.AsyncClient) -> None:
        for ask in mix(10_000, number):
            if time.perf_counter() >= until:
                return
            taken.append(await answer(client, ask))

    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        await asyncio.gather(*(one(number, client) for number in range(clients)))
    return taken


async def opened(url: str, rate: float, seconds: float) -> list[float]:
    """Answers' seconds of Poisson arrivals, the same for every service."""
    choices, at, tasks = random.Random(7), 0.0, []
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        began = time.perf_counter()
        for ask in mix(100_000, 1):
            at += choices.expovariate(rate)
            if at > seconds:
                break
            await asyncio.sleep(max(0.0, began + at - time.perf_counter()))
            tasks.append(asyncio.create_task(answer(client, ask)))
        return list(await asyncio.gather(*tasks))


class Figures(NamedTuple):
    """What a service did in a condition."""

    rate: float
    goodput: float
    p50: float
    p95: float
    p99: float
    failed: int

    @property
    def row(self) -> str:
        """As cells of a table."""
        return "| " + " | ".join(f"{value:.2f}" for value in self[:-1]) + f" | {self.failed} |"


def figured(taken: list[float], spent: float, deadline: float) -> Figures:
    """Figures of answers' seconds, NaN where one failed."""
    fine = np.array([each for each in taken if each == each])
    p50, p95, p99 = np.percentile(fine, [50, 95, 99]) if len(fine) else (np.nan,) * 3
    return Figures(len(taken) / spent, (fine <= deadline).sum() / spent, p50, p95, p99, len(taken) - len(fine))


def compare(asked: argparse.Namespace) -> None:
    """The three, closed and open."""
    prepare(asked.scratch)
    print(gain())
    with contextlib.ExitStack() as stack:
        urls = {name: stack.enter_context(service(name, asked)) for name in PORTS}
        deadline = 3 * asyncio.run(lone(urls["ours"]))
        print(f"deadline {deadline:.2f} s; first preview after {asyncio.run(preview(urls['ours'])):.3f} s")
        print(
            "| condition, service | answers/s | goodput/s | p50 | p95 | p99 | failed |\n|---|---|---|---|---|---|---|"
        )
        figures: dict[str, dict[str, Figures]] = {}

        def measured(condition: str, ask: Callable[[str], Any]) -> None:
            figures[condition] = {}
            for name, url in urls.items():
                began = time.perf_counter()
                taken = asyncio.run(ask(url))
                figures[condition][name] = figured(taken, time.perf_counter() - began, deadline)
                print(f"| {condition}, {name} {figures[condition][name].row}", flush=True)

        for clients in asked.clients:
            measured(f"{clients} clients", lambda url, clients=clients: closed(url, clients, asked.seconds))
        saturated = figures[f"{max(asked.clients)} clients"]["batch"].rate
        for share in asked.rates:
            rate = share * saturated
            measured(f"{rate:.2f}/s", lambda url, rate=rate: opened(url, rate, asked.seconds))
    if asked.plot:
        plot(figures, asked.plot)


def plot(figures: dict[str, dict[str, "Figures"]], path: str) -> None:
    """Goodput and 95th percentile, service by service."""
    import matplotlib.pyplot as plt

    shown, axes = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    for axis, field, label in zip(
        axes, ("goodput", "p95"), ("answers a second in time", "95 % within, s"), strict=True
    ):
        for at, name in enumerate(PORTS):
            values = [getattr(row[name], field) for row in figures.values()]
            axis.bar([number + 0.27 * (at - 1) for number in range(len(values))], values, 0.25, label=name)
        axis.set_xticks(range(len(figures)), list(figures))
        axis.set_ylabel(label)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    shown.savefig(path, dpi=110)


def tune(asked: argparse.Namespace) -> None:
    """The size and the wait of `batch` that answer most in a closed loop of 16, and the tails that they give."""
    prepare(asked.scratch)
    for size in (8, 16, 32):
        for wait in (0.0, 0.02):
            asked.batch = (size, wait)
            with service("batch", asked) as url:
                began = time.perf_counter()
                taken = asyncio.run(closed(url, 16, asked.seconds))
                print(f"size {size}, wait {wait} {figured(taken, time.perf_counter() - began, 1e9).row}", flush=True)


def soak(asked: argparse.Namespace) -> None:
    """Memory of the service's processes, from the first tenth of many requests to the last."""
    prepare(asked.scratch)
    from demo import own_bytes, tree

    with service("ours", asked) as url:
        asks = mix(asked.pictures, 3)

        async def part(some: list[Ask]) -> None:
            gate = asyncio.Semaphore(16)

            async def one(client: httpx.AsyncClient, ask: Ask) -> None:
                async with gate:
                    await answer(client, ask)

            async with httpx.AsyncClient(base_url=url, timeout=600) as client:
                await asyncio.gather(*(one(client, ask) for ask in some))

        tenth = len(asks) // 10
        for number in range(10):
            asyncio.run(part(asks[number * tenth : (number + 1) * tenth]))
            held = sum(own_bytes(pid) for pid in tree(os.getpid()) - {os.getpid()})
            print(f"soak: after {(number + 1) * tenth} answers {held / 1e6:.0f} MB", flush=True)


async def lone(url: str) -> float:
    """Seconds of a guided request of 50 steps alone, the fastest of three."""
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        return min([await answer(client, Ask(50, True, False, seed)) for seed in range(3)])


async def preview(url: str) -> float:
    """Seconds to the first preview of a request alone."""
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        began = time.perf_counter()
        body = {"prompt": "a", "steps": 50, "stream": True, "partial_images": 50}
        async with client.stream("POST", GENERATIONS, json=body) as told:
            async for _ in told.aiter_bytes():
                return time.perf_counter() - began
    return float("nan")


def gain() -> str:
    """What a batch gains on this machine over single calls of the same network."""
    from diffusion_core.denoiser import Denoiser
    from diffusion_core.unet import UNet

    config = model_config()
    denoiser = Denoiser(UNet(config.unet).eval().to(memory_format=torch.channels_last), config)
    spent = {}
    with torch.inference_mode():
        for size in (1, 4, 16, 32) * 3:
            x = torch.randn(size, 3, SIDE, SIDE).contiguous(memory_format=torch.channels_last)
            began = time.perf_counter()
            for _ in range(5):
                denoiser(x, torch.ones(size), torch.zeros(size, dtype=torch.int64))
            spent[size] = min(spent.get(size, 1e9), (time.perf_counter() - began) / 5)
    return "batching gain: " + ", ".join(f"{size}: {size * spent[1] / each:.2f}" for size, each in spent.items())


def model_config() -> ModelConfig:
    """A network of about a million parameters that diffusers has, too."""
    unet = UNetConfig(SIDE, 3, (48, 96, 96), 1, (2,), 96, 8, classes=2, embedding="timestep")
    levels = timestep_sigmas(Timesteps("linear"))
    return ModelConfig(unet, "eps", 0.5, float(levels[0]), float(levels[-1]), ("a", "b"), "linear", Timesteps("linear"))


def prepare(scratch: str) -> None:
    """The model, with random weights, in our folder and in diffusers'."""
    if (Path(scratch) / "diffusers/unet").exists():
        return
    from diffusion_core.unet import UNet
    from pipelines import exchange
    from pipelines.config import ExportConfig
    from pipelines.model import Publication, publish_model

    torch.manual_seed(0)
    config = model_config()
    lineage = {"kind": "train", "name": "load", "settings": {}, "dataset": "d", "dataset_digest": "0", "parent": None}
    weights = UNet(config.unet).state_dict()
    empty: dict[str, list[list[float]]] = {"curve": [], "validation": []}
    publish_model(f"{scratch}/model", Publication(config, {0.1: weights}, lineage, empty, None))
    exchange.run(ExportConfig(model=f"{scratch}/model", to=f"{scratch}/diffusers"))


@contextlib.contextmanager
def service(name: str, asked: argparse.Namespace) -> Iterator[str]:
    """The URL of a service in processes of its own, once it has answered; tells how long that took."""
    url, began = f"http://127.0.0.1:{PORTS[name]}", time.perf_counter()
    command = [sys.executable, __file__, f"serve-{name}", asked.scratch, "--batch", *map(str, asked.batch)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            while not _answers(url):
                assert process.poll() is None, f"{name} ended with {process.returncode}"
                time.sleep(0.1)
            print(f"{name}: first picture {time.perf_counter() - began:.1f} s after its start", flush=True)
            yield url
        finally:
            process.send_signal(signal.SIGTERM)


def _answers(url: str) -> bool:
    try:
        body = {"prompt": "a", "steps": 2, "sampler": "ddim", "grid": "leading", "seed": 0, "guidance_scale": 1.0}
        return httpx.post(url + GENERATIONS, json=body, timeout=60).status_code == 200
    except httpx.TransportError:
        return False


def ours(asked: argparse.Namespace) -> None:
    """Our service."""
    from pipelines.config import ServeConfig
    from pipelines.jobs import run_stage

    run_stage("serve", ServeConfig(model=f"{asked.scratch}/model", name="load", port=PORTS["ours"], queue=4096))


def batch(asked: argparse.Namespace) -> None:
    """The same engine behind @serve.batch."""
    import fastapi
    from ray import serve

    from pipelines import jobs
    from pipelines.requests import ImageRequest
    from pipelines.worker import load_worker

    size, wait = int(asked.batch[0]), asked.batch[1]

    @serve.deployment(max_ongoing_requests=4096, logging_config={"enable_access_log": False})
    class Batched:
        def __init__(self, model: str) -> None:
            self.worker = load_worker(model)

        @serve.batch(max_batch_size=size, batch_wait_timeout_s=wait)
        async def paint(self, requests: list[Any]) -> list[Any]:
            return await asyncio.get_running_loop().run_in_executor(None, self.worker.paint_each, requests)

    api = fastapi.FastAPI()

    @serve.deployment(max_ongoing_requests=4096, ray_actor_options={"num_cpus": 0})
    @serve.ingress(api)
    class Front:
        def __init__(self, model: Any) -> None:
            self.model = model

        @api.post(GENERATIONS)
        async def generations(self, request: fastapi.Request) -> dict[str, Any]:
            return await self._made(await request.json())

        @api.post(EDITS)
        async def edits(self, request: fastapi.Request) -> dict[str, Any]:
            form = dict(await request.form())
            sent = {name: await form.pop(name).read() for name in ("image", "mask")}
            return await self._made({**form, **sent, "task": "inpaint"})

        async def _made(self, fields: dict[str, Any]) -> dict[str, Any]:
            pixels = await self.model.paint.remote(ImageRequest.model_validate(fields))
            return {"data": [{"b64_json": base64.b64encode(to_png(pixels)).decode()}]}

    jobs.connect()
    serve.start(http_options={"port": PORTS["batch"]})
    serve.run(Front.bind(Batched.bind(f"{asked.scratch}/model")))
    signal.sigwait({signal.SIGTERM})


def lock(asked: argparse.Namespace) -> None:
    """diffusers' network and scheduler behind FastAPI with a lock."""
    import fastapi
    import uvicorn
    from diffusers import DDIMScheduler, UNet2DModel

    unet = UNet2DModel.from_pretrained(f"{asked.scratch}/diffusers", subfolder="unet").eval()
    scheduler = DDIMScheduler.from_pretrained(f"{asked.scratch}/diffusers", subfolder="scheduler")
    api, guard = fastapi.FastAPI(), threading.Lock()

    def made(fields: dict[str, Any], image: bytes | None = None) -> dict[str, Any]:
        with guard, torch.inference_mode():
            pixels = _ddim(unet, scheduler, fields, image)
        return {"data": [{"b64_json": base64.b64encode(to_png(pixels)).decode()}]}

    @api.post(GENERATIONS)
    def generations(fields: dict[str, Any]) -> dict[str, Any]:
        return made(fields)

    @api.post(EDITS)
    async def edits(request: fastapi.Request) -> dict[str, Any]:
        form = dict(await request.form())
        image = await form.pop("image").read()  # type: ignore[union-attr]
        return await asyncio.get_running_loop().run_in_executor(None, made, form, image)

    uvicorn.run(api, port=PORTS["lock"], log_level="error")


def _ddim(unet: Any, scheduler: Any, fields: dict[str, Any], image: bytes | None) -> Any:
    """A request by diffusers' own loop; the known half is written in after each step."""
    from pipelines.images import from_png, to_bytes, to_floats

    steps, scale = int(fields["steps"]), float(fields["guidance_scale"])
    generator = torch.Generator().manual_seed(int(fields["seed"]))
    x = torch.randn(1, 3, SIDE, SIDE, generator=generator)
    known = None if image is None else torch.from_numpy(to_floats(from_png(image)[None]))
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        labels = torch.tensor([0, 2] if scale != 1 else [0])
        out = unet(x.expand(len(labels), -1, -1, -1), t, class_labels=labels).sample
        eps = out if scale == 1 else out[1:] + scale * (out[:1] - out[1:])
        x = scheduler.step(eps, t, x).prev_sample
        if known is not None:
            noisy = scheduler.add_noise(known, torch.randn(known.shape, generator=generator), t[None])
            x[..., SIDE // 2 :] = noisy[..., SIDE // 2 :]
    return to_bytes(x.numpy())[0]


QUESTIONS: dict[str, Callable[[argparse.Namespace], None]] = {"compare": compare, "tune": tune, "soak": soak}
SERVICES = {"serve-ours": ours, "serve-batch": batch, "serve-lock": lock}

if __name__ == "__main__":
    main()
