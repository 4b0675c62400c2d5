"""The pictures that an evaluation asks a model for, by what they are for."""

import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from diffusion_core.noise import derive_seeds, normal
from pipelines.config import EvaluateConfig, SampleOptions, narrow
from pipelines.dataset import Dataset, Rows
from pipelines.images import Pixels, to_bytes, to_floats, to_png
from pipelines.requests import ImageRequest
from pipelines.worker import picture_seed

Orders = dict[str, list[ImageRequest]]


class Edits(NamedTuple):
    """Held-out pictures [N, H, W, 3] and what is done to them: masks [H, W] by name, noisy ones by level."""

    rows: Rows
    masks: dict[str, NDArray[np.bool_]]
    noisy: dict[float, Pixels]


def in_turn(classes: Sequence[str], count: int) -> list[str]:
    """The class of each of `count` pictures; empty names where there are none."""
    names = list(classes) or [""]
    return [names[index % len(names)] for index in range(count)]


def edits_of(config: EvaluateConfig, dataset: Dataset) -> Edits:
    """The first held-out pictures (of training where none are), masked and noised."""
    rows = dataset.read("heldout" if dataset.rows("heldout") else "train", config.edits)
    noisy = {level: _noisy(rows.pixels, level, config.seed) for level in config.noise_levels}
    return Edits(rows, masks(dataset.resolution), noisy)


def orders_of(config: EvaluateConfig, classes: Sequence[str], edits: Edits) -> Orders:
    """All requests of an evaluation: samples, samples by sampler and steps, inpaintings by mask, denoised by level.

    `classes` are those of the dataset in the order of its labels, or none for a model that knows none.
    """
    options = narrow(config, SampleOptions).model_dump()
    seeds = [picture_seed(config.seed, index) for index in range(max(config.samples, config.curve_samples))]

    def samples(count: int, **changed: object) -> list[ImageRequest]:
        prompts = in_turn(classes, count)
        return [ImageRequest(prompt=prompts[at], seed=seeds[at], **{**options, **changed}) for at in range(count)]

    orders = {"samples": samples(config.samples)}
    if config.curve_samples:
        for sampler in config.curve_samplers:
            for steps in config.curve_steps:
                orders[curve_name(sampler, steps)] = samples(config.curve_samples, sampler=sampler, steps=steps)
    return orders | _edit_orders(config, classes, edits)


def curve_name(sampler: str, steps: int) -> str:
    """The name of the samples by a sampler in so many steps."""
    return f"{sampler}-in-{steps}"


def masks(side: int) -> dict[str, NDArray[np.bool_]]:
    """Masks [side, side] by name, True where to repaint: a box, a half, strokes, every second line."""
    box, half, strokes, lines = np.zeros((4, side, side), dtype=np.bool_)
    box[side * 3 // 8 : side * 7 // 8, side // 4 : side * 3 // 4] = True
    half[:, side // 2 :] = True
    strokes[side // 3 : side // 3 + 3] = True
    rows = np.arange(side)
    for shift in range(3):
        strokes[rows, (2 * rows + shift) % side] = True
        strokes[rows, (side - rows + shift) % side] = True
    lines[1::2] = True
    return {"box": box, "half": half, "strokes": strokes, "lines": lines}


def _edit_orders(config: EvaluateConfig, classes: Sequence[str], edits: Edits) -> Orders:
    """Inpaintings and denoised pictures."""
    options = narrow(config, SampleOptions).model_dump()
    plain = [
        ImageRequest(
            prompt=classes[label] if classes and label >= 0 else "",
            seed=picture_seed(config.seed, config.samples + index),
            **options,
        )
        for index, label in enumerate(edits.rows.labels)
    ]
    orders: Orders = {}
    for name, mask in edits.masks.items():
        own: dict[str, object] = {"task": "inpaint", "mask": _mask_png(mask)}
        orders[f"inpainted-{name}"] = _with_pictures(plain, edits.rows.pixels, own)
    for level, pictures in edits.noisy.items():
        # one step without guidance is the posterior mean
        own = {"task": "denoise", "noise_level": level, "steps": 1, "guidance_scale": 1.0}
        orders[f"denoised-{level:g}"] = _with_pictures(plain, pictures, own)
    return orders


def _with_pictures(requests: list[ImageRequest], pixels: Pixels, own: dict[str, object]) -> list[ImageRequest]:
    return [
        request.model_copy(update={**own, "image": to_png(picture)})
        for request, picture in zip(requests, pixels, strict=True)
    ]


def _mask_png(mask: NDArray[np.bool_]) -> bytes:
    """A mask as OpenAI's API has it: transparent where to repaint."""
    alpha = np.where(mask, np.uint8(0), np.uint8(255))
    buffer = io.BytesIO()
    Image.fromarray(np.dstack([np.zeros((*mask.shape, 3), dtype=np.uint8), alpha])).save(buffer, format="PNG")
    return buffer.getvalue()


def _noisy(pixels: Pixels, level: float, seed: int) -> Pixels:
    """Pictures with noise of the known level, rounded and clipped to bytes as a sender would."""
    seeds = derive_seeds(seed, torch.arange(len(pixels)))
    noise = normal(seeds, "degrade", 0, (3, *pixels.shape[1:3])).numpy()
    return to_bytes(to_floats(pixels) + np.float32(level) * noise)
