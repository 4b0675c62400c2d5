"""The evaluate stage: generates, inpaints and denoises with a model, and measures what came out."""

import base64
import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from PIL import Image

from diffusion_core.noise import derive_seeds, normal
from pipelines import __version__, storage
from pipelines.config import EvaluateConfig, Outcome, PipelineError, SampleOptions, identity, narrow, what
from pipelines.dataset import Dataset, Rows, open_dataset
from pipelines.features import Classifier, predict, psnr, share_with_interval, train_classifier
from pipelines.images import Pixels, from_png, to_bytes, to_floats, to_png
from pipelines.model import load_model
from pipelines.report import grid
from pipelines.requests import ImageRequest
from pipelines.worker import Worker, picture_seed

VERSION = 2
_TIMEOUT_S = 600.0
_CLIENTS = 16
Painter = Callable[[list[ImageRequest]], list[Pixels]]


def find(config: EvaluateConfig) -> Outcome | None:
    """The evaluation of this model with these settings, if it is there."""
    uri = _uri(config)
    return Outcome(uri=uri, found=True) if storage.is_published(uri) else None


def run(config: EvaluateConfig) -> Outcome:
    """Make the pictures, measure them, and publish grids and figures."""
    uri, dataset = _uri(config), open_dataset(config.dataset)
    paint: Painter = _http_painter(config.url) if config.url else Worker(load_model(config.model)).paint
    classes = list(dataset.class_names)
    judge, figures = _judge(config, dataset)
    samples = _samples(config, classes, paint)
    grids = {"samples": grid(samples, max(len(classes), 1) if classes else 8)}
    if judge is not None:
        figures["samples"] = _agreement(judge, samples, [index % len(classes) for index in range(len(samples))])
        if config.images:
            figures["bulk"] = _agreement(judge, *_bulk_pictures(config.images, classes))
    edited, measured = _edits(config, dataset, paint)
    figures |= measured
    grids |= {"training": grid(_by_class(dataset.read("train", 512), len(samples)), 8), **edited}
    parts = [storage.put_part(uri, name, ".png", to_png(picture)) for name, picture in sorted(grids.items())]
    manifest = {"kind": "evaluation", "schema": 1, "code": __version__, "settings": what(config), "figures": figures}
    storage.publish(uri, {**manifest, "pictures": dict(zip(sorted(grids), parts, strict=True))})
    return Outcome(uri=uri, found=False)


def _uri(config: EvaluateConfig) -> str:
    """Where the evaluation of this model on this dataset lies."""
    inputs = [
        open_dataset(config.dataset).digest,
        load_model(config.model).digest,
        (config.images or "").split("/")[-1],
    ]
    digest = identity("evaluate", VERSION, what(config), inputs)
    return storage.join(storage.normalise(config.store), "evaluations", config.name, digest)


def _http_painter(url: str) -> Painter:
    """Pictures by the service's HTTP API, as any client would ask for them."""

    def paint(requests: list[ImageRequest]) -> list[Pixels]:
        with httpx.Client(base_url=url, timeout=_TIMEOUT_S) as client, ThreadPoolExecutor(_CLIENTS) as pool:
            return list(pool.map(lambda request: _ask(client, request), requests))

    return paint


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


def _judge(config: EvaluateConfig, dataset: Dataset) -> tuple[Classifier | None, dict[str, Any]]:
    """A classifier of the dataset's classes with its accuracy on held-out pictures, where there are classes."""
    classes = len(dataset.class_names)
    if classes < 2 or not config.classifier_steps or not dataset.rows("heldout"):
        return None, {}
    judge = train_classifier(dataset.read("train"), classes, config.classifier_steps, config.seed)
    heldout = dataset.read("heldout")
    right = int((predict(judge, heldout.pixels) == heldout.labels).sum())
    return judge, {"classifier": share_with_interval(right, len(heldout.labels))}


def _samples(config: EvaluateConfig, classes: list[str], paint: Painter) -> Pixels:
    """Generated pictures, classes in turn."""
    options = narrow(config, SampleOptions).model_dump()
    prompts = classes or [""]
    requests = [
        ImageRequest(prompt=prompts[index % len(prompts)], seed=picture_seed(config.seed, index), **options)
        for index in range(config.samples)
    ]
    return np.stack(paint(requests))


def _agreement(judge: Classifier, pixels: Pixels, asked: list[int]) -> dict[str, float]:
    """How many pictures are recognised as the class that was asked for."""
    return share_with_interval(int((predict(judge, pixels) == np.array(asked)).sum()), len(asked))


def _bulk_pictures(uri: str, classes: list[str]) -> tuple[Pixels, list[int]]:
    """The pictures of a bulk job with the labels that were asked for."""
    pixels, asked = [], []
    for part in storage.read_manifest(uri, "images")["parts"]:
        table = pq.read_table(io.BytesIO(storage.read_part(uri, part)), columns=["image", "prompt"])
        pixels += [from_png(image["bytes"]) for image in table["image"].to_pylist()]
        asked += [classes.index(prompt) for prompt in table["prompt"].to_pylist()]
    return np.stack(pixels), asked


def _edits(config: EvaluateConfig, dataset: Dataset, paint: Painter) -> tuple[dict[str, Pixels], dict[str, Any]]:
    """Held-out pictures inpainted and denoised: grids of before, after, original, and the errors."""
    split = "heldout" if dataset.rows("heldout") else "train"
    rows = dataset.read(split, config.edits)
    original, box = rows.pixels, _box(dataset.resolution)
    noisy = _noisy(original, config)
    common = _edit_requests(config, dataset, rows)
    mask = _mask_png(box)
    inpainted = np.stack(
        paint(
            [
                request.model_copy(update={"task": "inpaint", "image": to_png(picture), "mask": mask})
                for request, picture in zip(common, original, strict=True)
            ]
        )
    )
    # one step without guidance is the posterior mean
    known = {"task": "denoise", "noise_level": config.noise_level, "steps": 1, "guidance_scale": 1.0}
    denoised = np.stack(
        paint(
            [
                request.model_copy(update={**known, "image": to_png(picture)})
                for request, picture in zip(common, noisy, strict=True)
            ]
        )
    )
    masked = np.where(box[:, :, None], np.uint8(128), original)
    return (
        {"inpainting": _rows_grid(masked, inpainted, original), "denoising": _rows_grid(noisy, denoised, original)},
        _edit_figures(config, original, box, inpainted, noisy, denoised),
    )


def _edit_requests(config: EvaluateConfig, dataset: Dataset, rows: Rows) -> list[ImageRequest]:
    """A request for each held-out picture, to which the task and the picture are still to be added."""
    options = narrow(config, SampleOptions).model_dump()
    return [
        ImageRequest(
            prompt=dataset.class_names[label] if label >= 0 else "",
            seed=picture_seed(config.seed, config.samples + index),
            **options,
        )
        for index, label in enumerate(rows.labels)
    ]


def _edit_figures(
    config: EvaluateConfig, original: Pixels, box: NDArray[np.bool_], inpainted: Pixels, noisy: Pixels, denoised: Pixels
) -> dict[str, Any]:
    """Errors of the edits; the known region must come back byte for byte."""
    error = np.abs(inpainted.astype(np.int64) - original)
    return {
        "inpainting": {
            "count": len(original),
            "known_bytes_changed": int((error[:, ~box] != 0).sum()),
            "unknown_mean_error": float(error[:, box].mean() / 127.5),
        },
        "denoising": {
            "count": len(original), "sigma": config.noise_level,
            "psnr_noisy": psnr(noisy, original), "psnr_denoised": psnr(denoised, original),
        },
    }  # fmt: skip


def _box(resolution: int) -> NDArray[np.bool_]:
    """A box over the lower right of the middle, a quarter of the picture: [H, W], True where it is repainted."""
    box = np.zeros((resolution, resolution), dtype=np.bool_)
    box[resolution * 3 // 8 : resolution * 7 // 8, resolution // 4 : resolution * 3 // 4] = True
    return box


def _mask_png(box: NDArray[np.bool_]) -> bytes:
    """A mask as OpenAI's API has it: transparent where to repaint."""
    alpha = np.where(box, np.uint8(0), np.uint8(255))
    buffer = io.BytesIO()
    Image.fromarray(np.dstack([np.zeros((*box.shape, 3), dtype=np.uint8), alpha])).save(buffer, format="PNG")
    return buffer.getvalue()


def _noisy(pixels: Pixels, config: EvaluateConfig) -> Pixels:
    """Pictures with noise of the known level, rounded and clipped to bytes as a sender would."""
    seeds = derive_seeds(config.seed, torch.arange(len(pixels)))
    noise = normal(seeds, "degrade", 0, (3, *pixels.shape[1:3])).numpy()
    return to_bytes(to_floats(pixels) + np.float32(config.noise_level) * noise)


def _rows_grid(*rows: Pixels) -> Pixels:
    """Pictures of several kinds under one another, one column for each original."""
    return grid(np.concatenate(rows), len(rows[0]))


def _by_class(rows: Rows, count: int) -> Pixels:
    """Training pictures with the classes in turn, as the samples have them."""
    rank = np.zeros(len(rows.labels), dtype=np.int64)
    for label in np.unique(rows.labels):
        members = np.flatnonzero(rows.labels == label)
        rank[members] = np.arange(len(members))
    turn = np.lexsort((rows.labels, rank))
    return rows.pixels[turn][:count]
