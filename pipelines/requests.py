"""What may be asked of a model: one schema for HTTP, bulk and evaluation, checked against the model at the door."""

import json
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from diffusion_core.config import Inpainting, InpaintingName, ModelConfig, Task
from diffusion_core.tasks import Request, prepare
from pipelines.config import PipelineError, SampleOptions
from pipelines.images import Limits, decode, decode_alpha, fit, to_floats
from pipelines.storage import digest

_MAX_PIXELS = 16_000_000
_FILES = ("image", "mask")


class RequestError(PipelineError):
    """A request that no model can answer; `field` names the part that is wrong."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


class ImageRequest(SampleOptions):
    """One picture to make. `seed` alone keys its noise; `prompt` names a class, or is empty for any."""

    task: Task = "generate"
    prompt: str = ""
    seed: int = Field(ge=0, lt=2**62)
    image: bytes | None = Field(None, description="picture file to inpaint, denoise or start from")
    mask: bytes | None = Field(None, description="PNG whose transparent pixels are repainted; default: the image's own")
    inpainting: InpaintingName = Field(
        "posterior", description="posterior steers by the network's Jacobian, replacement writes the known region in"
    )
    solves: int = Field(2, ge=1, le=50, description="iterations of posterior guidance a step; more for smooth pictures")
    resample: int = Field(1, ge=1, le=100, description="how often inpainting walks every five rows (RePaint)")
    noise_level: float | None = Field(
        None, description="sigma of the noise in a picture to denoise, in [-1, 1] units; default: estimated"
    )
    strength: float | None = Field(
        None, description="0 to 1: how far to go from the image (image_to_image), or from the parent's picture (vary)"
    )
    parent: int | None = Field(None, description="seed whose picture to vary")


def metadata(request: ImageRequest, model: str) -> dict[str, str]:
    """What a picture's PNG says of how it was made: the digest of its `model`, its `seed`, and all other `settings`.

    The settings are JSON; a file that was edited stands there by its SHA-256.
    """
    plain = {"task", "prompt", *SampleOptions.model_fields}
    left_out = {"seed", *_FILES} if request.task != "generate" else set(ImageRequest.model_fields) - plain
    settings: dict[str, Any] = request.model_dump(mode="json", exclude=left_out)
    files = {name: getattr(request, name) for name in _FILES}
    settings |= {name: digest(data) for name, data in files.items() if data is not None}
    return {"model": model, "seed": str(request.seed), "settings": json.dumps(settings, sort_keys=True)}


def request_of(texts: dict[str, str], **files: bytes | None) -> ImageRequest:
    """Inverse of `metadata`; `files` are the picture and the mask that were edited.

    Raises RequestError where a file is missing or another one, or the texts are of another version of this project.
    """
    try:
        settings: dict[str, Any] = json.loads(texts["settings"])
        for name in _FILES:
            asked, given = settings.pop(name, None), files.get(name)
            if asked != (None if given is None else digest(given)):
                raise RequestError(name, f"made of a file with SHA-256 {asked}; need that one" if asked else "not used")
            settings[name] = given
        return ImageRequest(seed=int(texts["seed"]), **settings)
    except (KeyError, ValueError, TypeError) as error:
        raise RequestError("settings", f"not those of this version ({str(error).splitlines()[0]})") from error


def label_of(request: ImageRequest, model: ModelConfig) -> int | None:
    """The label that a prompt names, the null class for an empty one, None for a model without classes.

    Raises RequestError where there is no such class; the message lists those that there are.
    """
    if not model.class_names:
        if request.prompt:
            raise RequestError("prompt", f"{request.prompt!r} given, but this model has no classes; leave it empty")
        return None
    if not request.prompt:
        return len(model.class_names)
    if request.prompt not in model.class_names:
        raise RequestError("prompt", f"no class {request.prompt!r}; there are {', '.join(model.class_names)}")
    return model.class_names.index(request.prompt)


def core_request(request: ImageRequest, model: ModelConfig) -> Request:
    """The request in the core's terms, with all that the model cannot do refused by RequestError, before any work."""
    label = label_of(request, model)
    picture = _picture(request, model) if request.image is not None else None
    try:
        made = Request(
            seed=request.seed,
            task=request.task,
            sampler=request.sampler_config(),
            label=label,
            guidance_scale=request.guidance_scale,
            guidance_low=request.guidance_low,
            guidance_high=request.guidance_high,
            guidance_rescale=request.guidance_rescale,
            picture=picture,
            mask=_mask(request, model) if request.task == "inpaint" and picture is not None else None,
            inpainting=Inpainting(request.inpainting, request.solves, times=request.resample),
            noise_level=request.noise_level,
            strength=request.strength,
            parent=request.parent,
        )
        prepare(made, model)
    except ValueError as error:
        field, _, told = str(error).partition(": ")
        raise RequestError({"picture": "image"}.get(field, field), told) from error
    return made


def _picture(request: ImageRequest, model: ModelConfig) -> Tensor:
    """The picture to edit, [C, H, W] in [-1, 1] at the model's resolution."""
    pixels = fit(_open("image", request.image or b"", model), model.unet.resolution)
    return torch.from_numpy(to_floats(pixels[None]))[0]


def _mask(request: ImageRequest, model: ModelConfig) -> Tensor:
    """Where to repaint, [1, H, W] from 0 (keep) to 1 (repaint): the transparency of the mask, or of the image.

    Raises RequestError where it keeps everything.
    """
    field, data = ("mask", request.mask) if request.mask is not None else ("image", request.image or b"")
    _open(field, data, model)
    mask = np.float32(1.0) - decode_alpha(data).astype(np.float32) / np.float32(255.0)
    if not mask.any():
        raise RequestError(field, "no transparent pixel, so there is nothing to repaint")
    return torch.from_numpy(mask)[None]


def _open(field: str, data: bytes, model: ModelConfig) -> Image.Image:
    """A picture of the model's size. Raises RequestError by the field's name."""
    size = model.unet.resolution
    try:
        image = decode(data, Limits(_MAX_PIXELS)).image
    except PipelineError as error:
        raise RequestError(field, str(error)) from error
    if image.size != (size, size):
        raise RequestError(field, f"{image.width}x{image.height} pixels; this model takes {size}x{size}")
    return image
