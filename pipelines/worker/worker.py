"""A model on a device: takes requests, gives pictures. A picture depends on the model and its request alone."""

import io
import os
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from diffusion_core.config import Task
from diffusion_core.engine import Engine
from diffusion_core.noise import derive_seeds
from diffusion_core.widths import measure_lanes
from pipelines.config import PipelineError
from pipelines.images import Pixels, to_bytes
from pipelines.model import Model, load_model
from pipelines.requests import ImageRequest, Opened, RequestError, open_request, opened_or_refused

LANES = 32


class Worker:
    """A loaded model with its device and its engine, and on a CPU with `threads` threads (0: one per core).

    `lanes` is the size of the engine's largest batch; 0 chooses it by a short measurement.
    """

    def __init__(self, model: Model, device: str = "auto", lanes: int = LANES, threads: int = 0) -> None:
        self.model = model
        self.device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        if self.device.type == "cpu":
            torch.set_num_threads(threads or os.cpu_count() or 1)  # Ray would leave a process one
        network = model.denoiser.network.requires_grad_(False)
        network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        lanes = lanes or measure_lanes(model.denoiser, self._shape, (4, 8, 16, 32, 64), self.device)
        # kernels of a GPU are chosen by shape: there is one shape
        widths = (lanes,) if self.device.type == "cuda" else None
        self.engine = Engine(model.denoiser, widths, lanes, device=self.device)
        self.engine.prepare_for(self._shape)

    @property
    def _shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the model's own pictures."""
        unet = self.model.config.unet
        return unet.channels, unet.resolution, unet.resolution

    @property
    def profile(self) -> dict[str, str | int]:
        """The numerics profile within which the bytes of a picture repeat; threads are part of it on a CPU alone."""
        on_gpu = self.device.type == "cuda"
        return {
            "device": torch.cuda.get_device_name(self.device) if on_gpu else "cpu",
            "dtype": "float32",
            "lanes": self.engine.lanes,
            **({} if on_gpu else {"threads": torch.get_num_threads()}),
            "torch": str(torch.__version__),
        }

    def check(self, request: ImageRequest) -> None:
        """Refuse what this model cannot do. Raises RequestError that names the field."""
        open_request(request, self.model.config)

    def paint(self, requests: Sequence[ImageRequest]) -> list[Pixels]:
        """One picture uint8 [H, W, 3] for each request, in order; an edited one in its own size.

        Raises RequestError before any work is done where one cannot be met, PipelineError where one fails.
        """
        pictures = []
        for end in self._run([open_request(request, self.model.config) for request in requests]):
            if isinstance(end, PipelineError):
                raise end
            pictures.append(end)
        return pictures

    def paint_each(self, requests: Sequence[ImageRequest]) -> list[Pixels | PipelineError]:
        """One picture uint8 [H, W, 3] for each request, in order, or the error that ended it and no other."""
        return self._run([opened_or_refused(request, self.model.config) for request in requests])

    def _run(self, requests: Sequence[Opened | PipelineError]) -> list[Pixels | PipelineError]:
        """The ends of requests; errors among them stay where they are."""
        ends: dict[int, Pixels | PipelineError] = {}
        tickets: dict[int, tuple[int, Opened]] = {}
        for place, request in enumerate(requests):
            if isinstance(request, Opened):
                tickets[self.engine.submit(request.core)] = place, request
            else:
                ends[place] = request
        while len(ends) < len(requests):
            for end in self.engine.tick():
                place, request = tickets[end.ticket]
                failed = PipelineError(f"request {place}: {end.error}")
                ends[place] = failed if end.picture is None else request.answer(pixels_of(end.picture))
        return [ends[place] for place in range(len(requests))]

    def sample(self, prompt: str = "", n: int = 1, seed: int = 0, **options: Any) -> list[Image.Image]:
        """`n` pictures of the class `prompt` (empty: of any), the same that the service gives for this request.

        `options` are those of `SampleOptions`: steps, sampler, grid, eta, guidance_scale and so on. Raises RequestError
        on a class, an option or a value that this model does not take.
        """
        if not 0 <= seed < 2**62 or n < 1:
            raise RequestError("seed, n", f"{seed}, {n}; need 0 to 2^62 - 1, and at least 1")
        seeds = [picture_seed(seed, index) for index in range(n)]
        return [Image.fromarray(pixels) for pixels in self.paint([_request(prompt, own, options) for own in seeds])]

    def edit(
        self,
        task: Task,
        image: Image.Image | None = None,
        mask: Image.Image | None = None,
        prompt: str = "",
        seed: int = 0,
        **options: Any,
    ) -> Image.Image:
        """One picture of a task: "inpaint", "denoise", "image_to_image" or "vary".

        `image` is the picture to edit. To inpaint, the transparent pixels of `mask` are repainted (default: the
        image's own). `noise_level` (estimated where absent), `strength`, `parent` and further options are those of
        `ImageRequest`; to denoise, guidance is off unless it is asked for. Raises RequestError by the name of what does
        not fit.
        """
        if task == "denoise":
            options = {"guidance_scale": 1.0, **options}
        files = {"image": image, "mask": mask}
        given = {name: _png(picture) for name, picture in files.items() if picture is not None}
        return Image.fromarray(self.paint([_request(prompt, seed, {"task": task, **given, **options})])[0])


def pixels_of(picture: Tensor) -> Pixels:
    """A picture [C, H, W] of the engine -> uint8 [H, W, 3]."""
    pixels: Pixels = to_bytes(picture[None].cpu().numpy())[0]
    return pixels


def load_worker(model_uri: str, device: str = "auto", lanes: int = LANES, threads: int = 0) -> Worker:
    """The model at a URI on a device. Raises StorageError where it is missing or damaged."""
    return Worker(load_model(model_uri), device, lanes, threads)


def picture_seed(seed: int, index: int) -> int:
    """The seed of picture `index` of a request or job with the seed `seed`."""
    return int(derive_seeds(seed, torch.tensor([index], dtype=torch.int64))[0])


def _png(image: Image.Image) -> bytes:
    """A picture as a file, transparency and all."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _request(prompt: str, seed: int, options: dict[str, Any]) -> ImageRequest:
    """A request from Python, refused in one line where it is none."""
    try:
        return ImageRequest(prompt=prompt, seed=seed, **options)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "options"
        raise RequestError(field, f"{first.get('input')!r}: {first['msg']}") from error
