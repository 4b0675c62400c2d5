"""What the HTTP API takes: OpenAI's fields as they are, and ours beside them. Unknown fields are errors."""

from typing import Literal, Self

import fastapi
from pydantic import ConfigDict, Field, model_validator

from diffusion_core.config import InpaintingName, Task
from diffusion_core.engine import Priority
from pipelines.config import SampleOptions

Format = Literal["png", "jpeg", "webp"]
MEDIA_TYPES: dict[Format, str] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}


class ImageOptions(SampleOptions):
    """What every request may say."""

    model_config = ConfigDict(allow_inf_nan=False)

    model: str | None = Field(None, max_length=200, description="name of the model; see GET /v1/models")
    prompt: str = Field("", max_length=1000, description="a class of the model, or empty for any")
    negative_prompt: str = Field("", max_length=1000, description="a class to lead away from; needs guidance")
    n: int = Field(1, ge=1, le=4096, description="number of pictures")
    size: str = Field("auto", max_length=20, description="auto, or the model's own size such as 32x32")
    response_format: Literal["b64_json", "url"] = Field("b64_json", description="url gives a data: URL")
    output_format: Format = Field("png", description="png holds model, seed and settings; so do the others, as EXIF")
    output_compression: int = Field(95, ge=0, le=100, description="quality of jpeg and webp")
    stream: bool = Field(False, description="answer by server-sent events")
    partial_images: int = Field(0, ge=0, le=100, description="previews of each picture on the way, with stream")
    background: Literal["auto", "opaque"] = Field("auto", description="pictures have no transparency")
    quality: Literal["auto"] = Field("auto", description="what steps is for")
    moderation: Literal["auto", "low"] = Field("auto", description="there is none")
    user: str = Field("", max_length=200, description="taken for OpenAI's sake; has no effect")
    seed: int | None = Field(None, ge=0, lt=2**62, description="keys the pictures; drawn and returned where absent")
    priority: Priority = Field("interactive", description="bulk waits for what is interactive")
    timeout: float | None = Field(None, gt=0, description="seconds that the answer is waited for")

    @model_validator(mode="after")
    def _previews_need_a_stream(self) -> Self:
        if self.partial_images and not self.stream:
            raise ValueError("partial_images: previews need stream: true")
        return self


class GenerationBody(ImageOptions):
    """Pictures of a class, or near the picture of another seed."""

    parent: int | None = Field(None, ge=0, lt=2**62, description="seed of a picture to vary, as its answer told it")
    strength: float | None = Field(None, ge=0, le=1, description="with parent: share of the way to another picture")

    model_config = ConfigDict(json_schema_extra={"examples": [{"prompt": "", "n": 2, "seed": 7, "steps": 5}]})

    @property
    def task(self) -> Task:
        """What is asked for."""
        return "generate" if self.parent is None and self.strength is None else "vary"


class EditForm(ImageOptions):
    """A picture to repaint where its mask is transparent; or, with a strength and no mask, to start from."""

    image: fastapi.UploadFile = Field(description="picture to edit")
    mask: fastapi.UploadFile | None = Field(
        None, description="PNG of the image's size, transparent = repaint; default: the image's own transparency"
    )
    inpainting: InpaintingName = Field("posterior", description="posterior, or the faster replacement")
    solves: int = Field(2, ge=1, le=50, description="iterations of posterior guidance a step")
    resample: int = Field(1, ge=1, le=100, description="how often every five rows are walked (RePaint)")
    strength: float | None = Field(None, ge=0, le=1, description="image-to-image: 0 keeps the picture, 1 hardly any")

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.strength is not None and self.mask is not None:
            raise ValueError("strength: starts from the whole picture, so it goes without a mask")
        return self

    @property
    def task(self) -> Task:
        """What is asked for."""
        return "inpaint" if self.strength is None else "image_to_image"


class DenoiseForm(ImageOptions):
    """A picture with noise."""

    image: fastapi.UploadFile = Field(description="noisy picture")
    noise_level: float | None = Field(
        None, description="sigma of the noise, for values in [-1, 1] at the model's size; default: estimated"
    )
    steps: int = Field(1, ge=1, le=1000, description="1 gives the mean of all answers, more steps a sharper one")
    guidance_scale: float = Field(1.0, ge=0.0, le=20.0, description="classifier-free guidance; 1 is off")

    @property
    def task(self) -> Task:
        """What is asked for."""
        return "denoise"


class VariationForm(ImageOptions):
    """A picture to make others like it from."""

    image: fastapi.UploadFile = Field(description="picture to start from")
    strength: float = Field(0.6, ge=0, le=1, description="0 keeps the picture, 1 hardly any of it")

    @property
    def task(self) -> Task:
        """What is asked for."""
        return "image_to_image"


Body = GenerationBody | EditForm | DenoiseForm | VariationForm
# Fields of a body that are also a request's, where the body has them
REQUEST_FIELDS = ("prompt", "negative_prompt", "inpainting", "solves", "resample", "strength", "parent", "noise_level")
