"""A model on a device: takes requests, gives pictures. A picture depends on the model and its request alone."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from diffusion_core.denoiser import Guidance, guided
from diffusion_core.inpainting import KnownRegion, Resampling, denoise_plan, repaint_plan
from diffusion_core.noise import derive_seeds
from diffusion_core.samplers import Plan, make_plan, model_grid, sample, start_noise
from pipelines.images import Pixels, to_bytes, to_floats
from pipelines.model import Model, load_model
from pipelines.requests import ImageRequest, RequestError, check, label_of, level_of, mask_of, picture_of

LANES = 32
# On a CPU, batches of four and more run the same kernels, so that a sample's bits do not depend on its neighbours.
_FEWEST = 4


class Worker:
    """A loaded model with its device, and on a CPU with `threads` threads (0: one per core)."""

    def __init__(self, model: Model, device: str = "auto", lanes: int = LANES, threads: int = 0) -> None:
        self.model, self.lanes = model, lanes
        self.device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        if self.device.type == "cpu":
            torch.set_num_threads(threads or os.cpu_count() or 1)  # Ray would leave a process one
        model.denoiser.network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def profile(self) -> dict[str, str | int]:
        """The numerics profile within which the bytes of a picture repeat."""
        kind = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        return {
            "device": kind,
            "dtype": "float32",
            "lanes": self.lanes,
            "threads": torch.get_num_threads(),
            "torch": str(torch.__version__),
        }

    def check(self, request: ImageRequest) -> None:
        """Refuse what this model cannot do. Raises RequestError that names the field."""
        check(request, self.model.config)

    def paint(self, requests: Sequence[ImageRequest]) -> list[Pixels]:
        """One picture uint8 [H, W, 3] for each request, in order. Raises RequestError before any work is done."""
        for request in requests:
            self.check(request)
        pictures: dict[int, Pixels] = {}
        for members in _groups(requests, self.lanes):
            painted = self._paint_group([requests[i] for i in members])
            pictures.update(zip(members, painted, strict=True))
        return [pictures[i] for i in range(len(requests))]

    @torch.inference_mode()
    def _paint_group(self, requests: list[ImageRequest]) -> list[Pixels]:
        """Requests that share a table, as one batch of a shape that does not depend on how many there are."""
        batch = requests + [requests[-1]] * (self._width(len(requests)) - len(requests))
        seeds = torch.tensor([request.seed for request in batch], dtype=torch.int64, device=self.device)
        plan, x, known = self._begin(batch, seeds)
        label, how = self._conditioning(batch)
        x = sample(
            lambda x, sigma: guided(self.model.denoiser, x, sigma, label, how),
            plan, x.contiguous(memory_format=torch.channels_last), seeds, known,
        )  # fmt: skip
        return list(to_bytes(x[: len(requests)].cpu().numpy()))

    def _width(self, count: int) -> int:
        """Lanes of a batch for `count` requests: all of them on a GPU, whose kernels are chosen by shape."""
        return self.lanes if self.device.type == "cuda" else max(count, min(_FEWEST, self.lanes))

    def _begin(self, batch: list[ImageRequest], seeds: Tensor) -> tuple[Plan, Tensor, KnownRegion | None]:
        """The table, the starting point and the constraint of requests of one kind."""
        first, config = batch[0], self.model.config
        sampler = first.sampler_config()
        sigmas = model_grid(sampler, config)
        if first.task == "denoise":
            return denoise_plan(sampler, sigmas, level_of(first, config)), self._pictures(batch), None
        shape = (config.unet.channels, config.unet.resolution, config.unet.resolution)
        if first.task == "generate":
            plan = make_plan(sampler, sigmas)
            return plan, start_noise(plan, seeds, shape), None
        plan = repaint_plan(sampler, sigmas, Resampling())
        masks = torch.from_numpy(np.stack([mask_of(request, config) for request in batch]))[:, None].to(self.device)
        return plan, start_noise(plan, seeds, shape), KnownRegion(self._pictures(batch), masks, seeds)

    def _pictures(self, batch: list[ImageRequest]) -> Tensor:
        """The pictures to edit, [B, C, H, W] in [-1, 1]."""
        pixels = np.stack([picture_of(request, self.model.config) for request in batch])
        return torch.from_numpy(to_floats(pixels)).to(self.device)

    def _conditioning(self, batch: list[ImageRequest]) -> tuple[Tensor | None, Guidance]:
        """Labels [B] (None for a model without classes) and guidance."""
        labels = [label_of(request, self.model.config) for request in batch]
        asked = [(r.guidance_scale, r.guidance_low, r.guidance_high, r.guidance_rescale) for r in batch]
        how = Guidance(*torch.tensor(asked, device=self.device).unbind(1))
        known = [label for label in labels if label is not None]
        return (torch.tensor(known, device=self.device) if known else None), how

    def sample(self, prompt: str = "", n: int = 1, seed: int = 0, **options: Any) -> list[Image.Image]:
        """`n` pictures of the class `prompt` (empty: of any), the same that the service gives for this request.

        `options` are those of `SampleOptions`: steps, sampler, grid, eta, guidance_scale and so on. Raises RequestError
        on a class, an option or a value that this model does not take.
        """
        if not 0 <= seed < 2**62 or n < 1:
            raise RequestError("seed, n", f"{seed}, {n}; need 0 to 2^62 - 1, and at least 1")
        seeds = [picture_seed(seed, index) for index in range(n)]
        return [Image.fromarray(pixels) for pixels in self.paint([_request(prompt, own, options) for own in seeds])]


def load_worker(model_uri: str, device: str = "auto", lanes: int = LANES) -> Worker:
    """The model at a URI on a device. Raises StorageError where it is missing or damaged."""
    return Worker(load_model(model_uri), device, lanes)


def picture_seed(seed: int, index: int) -> int:
    """The seed of picture `index` of a request or job with the seed `seed`."""
    return int(derive_seeds(seed, torch.tensor([index], dtype=torch.int64))[0])


def _request(prompt: str, seed: int, options: dict[str, Any]) -> ImageRequest:
    """A request from Python, refused in one line where it is none."""
    try:
        return ImageRequest(prompt=prompt, seed=seed, **options)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "options"
        raise RequestError(field, f"{first.get('input')!r}: {first['msg']}") from error


def _groups(requests: Sequence[ImageRequest], lanes: int) -> Iterator[list[int]]:
    """Indices of requests that may share a batch, at most `lanes` each."""
    kinds: dict[object, list[int]] = {}
    for index, request in enumerate(requests):
        guided_at = request.guidance_scale != 1.0 and (request.guidance_low, request.guidance_high)
        key = (request.task, request.sampler_config(), guided_at, request.noise_level)
        kinds.setdefault(key, []).append(index)
    for members in kinds.values():
        for start in range(0, len(members), lanes):
            yield members[start : start + lanes]
