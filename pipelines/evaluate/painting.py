"""The pictures of an evaluation, made by workers on the whole cluster or by a service, and kept as they come."""

import base64
import io
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import torch

from pipelines import storage
from pipelines.config import EvaluateConfig, PipelineError, SampleOptions, ray_address
from pipelines.evaluate.orders import Orders
from pipelines.images import Pixels, from_png
from pipelines.progress import Progress
from pipelines.requests import ImageRequest
from pipelines.worker import Worker, load_worker, pool_of, pool_size

_CHUNK = 64
_TIMEOUT_S = 600.0
_CLIENTS = 16
Chunks = dict[str, list[ImageRequest]]


def paint(config: EvaluateConfig, uri: str, orders: Orders) -> tuple[dict[str, Pixels], list[dict[str, Any]]]:
    """Pictures uint8 [N, H, W, 3] by the names of `orders`, and the parts of the folder `uri` that hold them.

    What an earlier run has kept there is not made again. Raises PipelineError where the service refuses.
    """
    chunks = {
        f"{name}-{number:04}": requests[number * _CHUNK : (number + 1) * _CHUNK]
        for name, requests in orders.items()
        for number in range(-(-len(requests) // _CHUNK))
    }
    done = {stem: found for stem in chunks if (found := storage.find_part(uri, stem, ".npy"))}
    missing = {stem: requests for stem, requests in chunks.items() if stem not in done}
    made = sum(len(chunks[stem]) for stem in done)
    progress = Progress("evaluate", sum(map(len, orders.values())), "pictures", done=made)
    for stem in _painter(config, len(missing))(config, uri, missing):
        made += len(missing[stem])
        progress.update(made)
    parts = {stem: done.get(stem) or storage.find_part(uri, stem, ".npy") for stem in chunks}
    kept = {stem: part for stem, part in parts.items() if part is not None}
    pictures = {
        name: np.concatenate([np.load(io.BytesIO(kept[stem][1])) for stem in chunks if stem.rpartition("-")[0] == name])
        for name in orders
    }
    return pictures, [part for part, _ in kept.values()]


def _painter(config: EvaluateConfig, chunks: int) -> Callable[[EvaluateConfig, str, Chunks], Iterator[str]]:
    """By the service; else by workers, or in this process where one worker is all that there would be."""
    if config.url:
        return _through_service
    alone = ray_address() is None and pool_size(config.workers, chunks) == 1
    return _here if alone else _through_actors


class ChunkPainter:
    """A worker that makes and keeps whole chunks on its device."""

    def __init__(self, model: str, lanes: int, threads: int, uri: str) -> None:
        self.worker: Worker = load_worker(model, lanes=lanes, threads=threads)
        self.uri = uri

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Row with a chunk's `stem` and its pickled `requests` -> the stem."""
        _keep(self.uri, row["stem"], self.worker.paint(pickle.loads(row["requests"])))
        return {"stem": row["stem"]}


def _here(config: EvaluateConfig, uri: str, missing: Chunks) -> Iterator[str]:
    """Chunks by a worker in this process; their stems as they are done."""
    threads = torch.get_num_threads()
    try:
        worker = load_worker(config.model, lanes=config.lanes, threads=config.threads)
        for stem, requests in missing.items():
            _keep(uri, stem, worker.paint(requests))
            yield stem
    finally:
        torch.set_num_threads(threads)


def _through_actors(config: EvaluateConfig, uri: str, missing: Chunks) -> Iterator[str]:
    """Chunks by a Ray Data pool of workers, one per device; their stems as they are done."""
    import ray.data

    if not missing:
        return
    ray.data.DataContext.get_current().enable_progress_bars = False
    rows = [{"stem": stem, "requests": pickle.dumps(requests)} for stem, requests in missing.items()]
    painted = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        ChunkPainter,
        fn_constructor_args=(config.model, config.lanes, config.threads, uri),
        **pool_of(config.workers, len(rows)),
    )
    for row in painted.iter_rows():
        yield row["stem"]


def _through_service(config: EvaluateConfig, uri: str, missing: Chunks) -> Iterator[str]:
    """Chunks by the service's HTTP API, as any client would ask for them."""
    with (
        httpx.Client(base_url=config.url or "", timeout=_TIMEOUT_S) as client,
        ThreadPoolExecutor(_CLIENTS) as pool,
    ):
        for stem, requests in missing.items():
            _keep(uri, stem, list(pool.map(lambda request: _ask(client, request), requests)))
            yield stem


def _ask(client: httpx.Client, request: ImageRequest) -> Pixels:
    """One request over HTTP. Raises PipelineError with the service's own words."""
    fields = request.model_dump(include={"prompt", "seed", *SampleOptions.model_fields})
    if request.task == "generate":
        answer = client.post("/v1/images/generations", json=fields)
    elif request.task == "inpaint":
        files = {"image": request.image or b"", "mask": request.mask or b""}
        answer = client.post("/v1/images/edits", data=fields, files=files)
    else:
        fields["noise_level"] = request.noise_level
        answer = client.post("/v1/images/denoise", data=fields, files={"image": request.image or b""})
    if answer.status_code != httpx.codes.OK:
        raise PipelineError(f"{client.base_url}: {answer.status_code} {answer.text[:300]}")
    return from_png(base64.b64decode(answer.json()["data"][0]["b64_json"]))


def _keep(uri: str, stem: str, pictures: list[Pixels]) -> None:
    """Write a chunk into the evaluation's folder."""
    buffer = io.BytesIO()
    np.save(buffer, np.stack(pictures))
    storage.put_part(uri, stem, ".npy", buffer.getvalue())
