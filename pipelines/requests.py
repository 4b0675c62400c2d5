"""What may be asked of a model: one schema for HTTP, bulk and evaluation, checked against the model at the door."""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field
from torch import Tensor

from diffusion_core.config import Inpainting, InpaintingName, ModelConfig, Task
from diffusion_core.tasks import Request, prepare
from pipelines.config import PipelineError, SampleOptions
from pipelines.frame import Frame, mixed
from pipelines.images import Limits, Pixels, decode, decode_alpha, to_floats
from pipelines.storage import digest

_MAX_PIXELS = 16_000_000
_FILES = ("image", "mask")
# The core's names of what a request calls otherwise
_FIELDS = {"picture": "image", "label": "prompt", "negative": "negative_prompt"}


class RequestError(PipelineError):
    """A request that no model can answer; `field` names the part that is wrong."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


class ImageRequest(SampleOptions):
    """One picture to make. `seed` alone keys its noise; `prompt` names a class, or is empty for any."""

    task: Task = "generate"
    prompt: str = ""
    negative_prompt: str = Field("", description="a class to lead away from, in place of no class; needs guidance")
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
    plain = {"task", "prompt", *SampleOptions.model_fields} | (
        {"negative_prompt"} if request.negative_prompt else set()
    )
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


def label_of(field: str, prompt: str, model: ModelConfig) -> int | None:
    """The label that a prompt names, None (the null class) for an empty one.

    Raises RequestError, by the name of the `field`, where there is no such class; the message lists those that are.
    """
    if not prompt:
        return None
    if not model.class_names:
        raise RequestError(field, f"{prompt!r} given, but this model has no classes; leave it empty")
    if prompt not in model.class_names:
        raise RequestError(field, f"no class {prompt!r}; there are {', '.join(model.class_names)}")
    return model.class_names.index(prompt)


@dataclass(frozen=True)
class Opened:
    """A request in the core's terms, and what brings its answer back to the size of the picture that was edited."""

    core: Request
    frame: Frame | None = None
    own: Pixels | None = None
    mask: NDArray[np.float32] | None = None

    def answer(self, pixels: Pixels) -> Pixels:
        """The model's picture uint8 [R, R, 3] in the size of the edited one, whose kept pixels stand as they were."""
        if self.frame is None or self.frame.is_whole:
            return pixels
        taken = self.frame.take(pixels)
        return taken if self.own is None or self.mask is None else mixed(self.own, taken, self.mask)


def open_request(request: ImageRequest, model: ModelConfig, max_pixels: int = _MAX_PIXELS) -> Opened:
    """The request with its files decoded, and all that the model cannot do refused by RequestError, before any work.

    A picture of another size than the model's is put whole into its square (`Frame`).
    """
    label, negative = _labels(request, model)
    image = _open("image", request.image, max_pixels) if request.image is not None else None
    inpainted = request.task == "inpaint" and image is not None
    mask = _mask(request, image.size, max_pixels) if inpainted and image is not None else None
    frame = Frame(*image.size, model.unet.resolution) if image is not None else None
    try:
        made = Request(
            seed=request.seed,
            task=request.task,
            sampler=request.sampler_config(),
            label=label,
            negative=negative,
            guidance_scale=request.guidance_scale,
            guidance_low=request.guidance_low,
            guidance_high=request.guidance_high,
            guidance_rescale=request.guidance_rescale,
            picture=None if frame is None or image is None else _floats(frame.put(image)),
            mask=None if frame is None or mask is None else torch.from_numpy(frame.put_mask(mask))[None],
            inpainting=Inpainting(request.inpainting, request.solves, times=request.resample),
            noise_level=request.noise_level,
            strength=request.strength,
            parent=request.parent,
        )
        prepare(made, model)
    except ValueError as error:
        field, _, told = str(error).partition(": ")
        raise RequestError(_FIELDS.get(field, field), told) from error
    own = None if mask is None or image is None else np.asarray(image, dtype=np.uint8)
    return Opened(made, frame, own, mask)


def opened_or_refused(request: ImageRequest, model: ModelConfig) -> Opened | RequestError:
    """As `open_request`, with the refusal handed back, for where one request must not stop others."""
    try:
        return open_request(request, model)
    except RequestError as error:
        return error


def _labels(request: ImageRequest, model: ModelConfig) -> tuple[int | None, int | None]:
    """The labels to lead to and away from, None for the null class."""
    negative = label_of("negative_prompt", request.negative_prompt, model)
    return label_of("prompt", request.prompt, model), negative


def _floats(pixels: Pixels) -> Tensor:
    """uint8 [H, W, 3] -> [3, H, W] in [-1, 1]."""
    return torch.from_numpy(to_floats(pixels[None]))[0]


def _mask(request: ImageRequest, size: tuple[int, int], max_pixels: int) -> NDArray[np.float32]:
    """Where to repaint, [H, W] from 0 (keep) to 1 (repaint): the transparency of the mask, or of the image.

    Raises RequestError where it keeps everything, or has another size than the image.
    """
    field, data = ("mask", request.mask) if request.mask is not None else ("image", request.image or b"")
    found = _open(field, data, max_pixels).size
    if found != size:
        raise RequestError(field, f"{found[0]}x{found[1]} pixels, but the image has {size[0]}x{size[1]}")
    mask = np.float32(1.0) - decode_alpha(data).astype(np.float32) / np.float32(255.0)
    if not mask.any():
        raise RequestError(field, "no transparent pixel, so there is nothing to repaint")
    return mask


def _open(field: str, data: bytes, max_pixels: int) -> Image.Image:
    """A picture. Raises RequestError by the field's name."""
    try:
        return decode(data, Limits(max_pixels)).image
    except PipelineError as error:
        raise RequestError(field, str(error)) from error
