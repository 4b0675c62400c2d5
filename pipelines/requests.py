"""What may be asked of a model: one schema for HTTP, bulk and evaluation, checked against the model at the door."""

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from diffusion_core.config import ModelConfig
from pipelines.config import PipelineError, SampleOptions
from pipelines.images import Pixels, decode, decode_alpha, fit

Task = Literal["generate", "inpaint", "denoise"]
_MAX_PIXELS = 16_000_000


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
    image: bytes | None = Field(None, description="picture file to inpaint or denoise")
    mask: bytes | None = Field(None, description="PNG whose transparent pixels are repainted; default: the image's own")
    noise_level: float | None = Field(None, description="sigma of the noise in a picture to denoise, in [-1, 1] units")


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


def check(request: ImageRequest, model: ModelConfig) -> None:
    """Refuse what the model cannot do, by RequestError, before any work."""
    label_of(request, model)
    own = 0 if model.timesteps is None else model.timesteps.count
    if request.grid == "timesteps" and request.steps > own:
        raise RequestError(
            "grid", f"{request.steps} steps on a model with {own} timesteps of its own; take another grid"
        )
    if request.task != "generate":
        picture_of(request, model)
    if request.task == "inpaint":
        mask_of(request, model)
    if request.task == "denoise":
        level_of(request, model)


def picture_of(request: ImageRequest, model: ModelConfig) -> Pixels:
    """The picture to edit, uint8 [H, W, 3] at the model's resolution."""
    if request.image is None:
        raise RequestError("image", f"missing; a request to {request.task} needs a picture")
    return fit(_open("image", request.image, model), model.unet.resolution)


def mask_of(request: ImageRequest, model: ModelConfig) -> NDArray[np.float32]:
    """Where to repaint, float32 [H, W] from 0 (keep) to 1 (repaint): the transparency of the mask, or of the image.

    Raises RequestError where it keeps everything.
    """
    field, data = ("mask", request.mask) if request.mask is not None else ("image", request.image or b"")
    _open(field, data, model)
    mask = np.float32(1.0) - decode_alpha(data).astype(np.float32) / np.float32(255.0)
    if not mask.any():
        raise RequestError(field, "no transparent pixel, so there is nothing to repaint")
    return mask


def level_of(request: ImageRequest, model: ModelConfig) -> float:
    """The noise level of a picture to denoise. Raises RequestError outside the model's range."""
    level = request.noise_level
    if level is None or not math.isfinite(level) or not model.sigma_min < level <= model.sigma_max:
        raise RequestError("noise_level", f"{level}; need more than {model.sigma_min} and at most {model.sigma_max}")
    return level


def _open(field: str, data: bytes, model: ModelConfig) -> Image.Image:
    """A picture of the model's size. Raises RequestError by the field's name."""
    size = model.unet.resolution
    try:
        image = decode(data, _MAX_PIXELS)
    except PipelineError as error:
        raise RequestError(field, str(error)) from error
    if image.size != (size, size):
        raise RequestError(field, f"{image.width}x{image.height} pixels; this model takes {size}x{size}")
    return image
