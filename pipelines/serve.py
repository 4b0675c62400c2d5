"""The serve stage: a Ray Serve application that generates, inpaints and denoises behind OpenAI's images API."""

import asyncio
import base64
import secrets
import signal
import socket
import threading
import time
from typing import Annotated, Any

import fastapi
from fastapi.exceptions import RequestValidationError
from pydantic import Field
from ray import serve

from diffusion_core.config import InpaintingName, ModelConfig, Task
from pipelines.config import Outcome, PipelineError, SampleOptions, ServeConfig
from pipelines.images import to_png
from pipelines.model import load_model
from pipelines.registry import default_model
from pipelines.requests import ImageRequest, RequestError, core_request, metadata
from pipelines.storage import normalise
from pipelines.worker import LANES, load_worker, picture_seed

_ONGOING = 1024
_WAIT_S = 0.01
_MAX_N = 64


class ImageOptions(SampleOptions):
    """What every request may say; unknown fields are errors."""

    model: str | None = Field(None, description="name of the model; see GET /v1/models")
    prompt: str = Field("", description="a class of the model, or empty for any")
    n: int = Field(1, ge=1, le=_MAX_N, description="number of pictures")
    size: str = Field("auto", description="auto, or the model's own size such as 32x32")
    response_format: str = Field("b64_json", pattern="^b64_json$")
    output_format: str = Field("png", pattern="^png$")
    seed: int | None = Field(None, ge=0, lt=2**62, description="keys the pictures; drawn and returned where absent")


class EditForm(ImageOptions):
    """Form of an inpainting request."""

    image: fastapi.UploadFile = Field(description="picture of the model's size")
    mask: fastapi.UploadFile | None = Field(None, description="PNG, transparent = repaint; default: the image's own")
    inpainting: InpaintingName = Field("posterior", description="posterior, or the faster replacement")
    resample: int = Field(1, ge=1, le=100, description="how often every five rows are walked (RePaint)")


class DenoiseForm(ImageOptions):
    """Form of a denoising request."""

    image: fastapi.UploadFile = Field(description="noisy picture of the model's size")
    noise_level: float | None = Field(
        None, description="sigma of the noise, for pictures in [-1, 1]; default: estimated"
    )
    steps: int = Field(1, ge=1, le=1000, description="1 gives the mean of all answers, more steps a sharper one")
    guidance_scale: float = Field(1.0, ge=0.0, le=20.0, description="classifier-free guidance; 1 is off")


class Model:
    """A model on a device. Waiting requests share batches, whoever sent them."""

    def __init__(self, uri: str, lanes: int) -> None:
        self.worker = load_worker(uri, lanes=lanes)

    async def describe(self) -> dict[str, Any]:
        """What the model is: URI, digest, configuration, and the numerics profile of its device."""
        model = self.worker.model
        about = {"uri": model.uri, "digest": model.digest, "config": model.config.to_dict()}
        return {**about, "numerics": self.worker.profile}

    async def paint(self, requests: list[ImageRequest], model: str | None = None) -> list[Any]:
        """One picture uint8 [H, W, 3] for each request. Raises PipelineError where another model was meant."""
        if model is not None and normalise(model) != self.worker.model.uri:
            raise PipelineError(f"model: this service runs {self.worker.model.uri}, not {model}; serve that one")
        ends = await asyncio.gather(*(self._paint_one(request) for request in requests))
        for end in ends:
            if isinstance(end, PipelineError):
                raise end
        return list(ends)

    @serve.batch(  # type: ignore[untyped-decorator]
        max_batch_size=LANES, batch_wait_timeout_s=_WAIT_S
    )
    async def _paint_one(self, requests: list[ImageRequest]) -> list[Any]:
        """One batch at a time, off the event loop, so that the replica keeps answering; an error ends one request."""
        return await asyncio.get_running_loop().run_in_executor(None, self.worker.paint_each, requests)


api = fastapi.FastAPI(title="Image diffusion service", version="1")


@api.exception_handler(RequestValidationError)
async def refuse_invalid(_: fastapi.Request, error: RequestValidationError) -> fastapi.responses.JSONResponse:
    """A request of the wrong form: the first field that is wrong, by name."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"] if part not in ("body", "query")) or "body"
    return _refusal(field, f"{field}: {first['msg']}")


@api.exception_handler(RequestError)
async def refuse_request(_: fastapi.Request, error: RequestError) -> fastapi.responses.JSONResponse:
    """A request that the model cannot answer."""
    return _refusal(error.field, str(error))


def _refusal(field: str, message: str) -> fastapi.responses.JSONResponse:
    """An error as OpenAI's API words it."""
    told = {"message": message, "type": "invalid_request_error", "param": field, "code": None}
    return fastapi.responses.JSONResponse({"error": told}, status_code=400)


@serve.ingress(api)
class Images:
    """The HTTP side: checks requests, hands them to the model, answers as OpenAI's images API does."""

    def __init__(self, model: Any, name: str) -> None:
        self.model, self.name = model, name
        self.about: dict[str, Any] | None = None

    @api.get("/healthz")
    async def healthz(self) -> dict[str, str]:
        """Whether the service answers."""
        return {"status": "ok"}

    @api.get("/v1/models")
    async def models(self) -> dict[str, Any]:
        """The models, with what each can make."""
        about = await self._about()
        unet, classes = about["config"]["unet"], about["config"]["class_names"]
        size = f"{unet['resolution']}x{unet['resolution']}"
        entry = {"id": self.name, "object": "model", "digest": about["digest"], "size": size, "classes": classes}
        return {"object": "list", "data": [entry]}

    @api.post("/v1/images/generations")
    async def generations(self, body: ImageOptions) -> dict[str, Any]:
        """Generate `n` pictures of a class."""
        return await self._answer("generate", body, {})

    @api.post("/v1/images/edits")
    async def edits(self, form: Annotated[EditForm, fastapi.Form()]) -> dict[str, Any]:
        """Repaint the transparent part of a picture; all else comes back as it was."""
        mask = await form.mask.read() if form.mask is not None else None
        how = form.model_dump(include={"inpainting", "resample"})
        return await self._answer("inpaint", form, {"image": await form.image.read(), "mask": mask, **how})

    @api.post("/v1/images/denoise")
    async def denoise(self, form: Annotated[DenoiseForm, fastapi.Form()]) -> dict[str, Any]:
        """Remove noise of a known or estimated level from a picture."""
        return await self._answer("denoise", form, {"image": await form.image.read(), "noise_level": form.noise_level})

    async def _answer(self, task: Task, options: ImageOptions, picture: dict[str, Any]) -> dict[str, Any]:
        """Check, paint, encode."""
        about = await self._about()
        seed = options.seed if options.seed is not None else secrets.randbits(53)
        self._check_options(options, about)
        settings = options.model_dump(include={"prompt", *SampleOptions.model_fields})
        seeds = [picture_seed(seed, index) for index in range(options.n)]
        requests = [ImageRequest(task=task, seed=own, **settings, **picture) for own in seeds]
        core_request(requests[0], ModelConfig.from_dict(about["config"]))
        pictures = await self.model.paint.remote(requests)
        pngs = [to_png(made, metadata(asked, about["digest"])) for asked, made in zip(requests, pictures, strict=True)]
        data = [{"b64_json": base64.b64encode(png).decode(), "seed": own} for png, own in zip(pngs, seeds, strict=True)]
        return {"created": int(time.time()), "model": about["digest"], "seed": seed, "data": data}

    async def _about(self) -> dict[str, Any]:
        """The model's description, asked for once."""
        if self.about is None:
            self.about = await self.model.describe.remote()
        return self.about

    def _check_options(self, options: ImageOptions, about: dict[str, Any]) -> None:
        """Refuse another model's name or size."""
        resolution = about["config"]["unet"]["resolution"]
        if options.model not in (None, self.name, about["digest"]):
            raise RequestError("model", f"no model {options.model!r}; there is {self.name}")
        if options.size not in ("auto", f"{resolution}x{resolution}"):
            raise RequestError("size", f"{options.size!r}; this model makes {resolution}x{resolution}")


def start(config: ServeConfig) -> str:
    """Start the application on the connected Ray; returns its URL. Raises PipelineError where the model is missing."""
    uri = normalise(config.model) if config.model else default_model(config.store, config.name)
    load_model(uri)  # a missing or damaged model is an error here, and not of a replica that keeps restarting
    port = config.port or _free_port(config.host)
    _check_free(config.host, port)
    quiet = {"log_level": "WARNING", "enable_access_log": False}
    serve.start(http_options={"host": config.host, "port": port}, logging_config=quiet)
    model = serve.deployment(
        Model, name="Model", num_replicas=config.replicas, max_ongoing_requests=_ONGOING, logging_config=quiet,
        ray_actor_options={"num_cpus": 1, "num_gpus": 1 if _gpus() else 0},
    )  # fmt: skip
    ingress = serve.deployment(
        Images, name="Images", max_ongoing_requests=_ONGOING, logging_config=quiet, ray_actor_options={"num_cpus": 0}
    )
    serve.run(ingress.bind(model.bind(uri, config.lanes), config.name), name=config.app, route_prefix="/")
    return f"http://{config.host}:{port}"


def stop() -> None:
    """Stop the application and its HTTP server."""
    serve.shutdown()


def run(config: ServeConfig) -> Outcome:
    """Serve until interrupted."""
    url = start(config)
    print(f"serve: {url}  (documentation at {url}/docs; stop with Ctrl-C)", flush=True)
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    stopped.wait()
    stop()
    return Outcome(uri=url, found=False)


def find(_: ServeConfig) -> None:
    """A service is never found: it runs or it does not."""


def _gpus() -> bool:
    """Whether the cluster has GPUs."""
    import ray

    return bool(ray.cluster_resources().get("GPU", 0) >= 1)


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _check_free(host: str, port: int) -> None:
    """Refuse a port that another program holds, which Ray Serve would only log."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise PipelineError(
                f"port: {host}:{port} cannot be used ({error.strerror}); give another --port"
            ) from error
