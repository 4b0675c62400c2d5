"""The HTTP API: checks requests, has them made, answers as OpenAI's images API does."""

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from dataclasses import dataclass, replace
from typing import Annotated, Any, TypeVar

import fastapi
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response, StreamingResponse

from pipelines import __version__
from pipelines.config import SampleOptions, ServeConfig
from pipelines.frame import Frame
from pipelines.images import LONGEST_SIDE
from pipelines.requests import ImageRequest, RequestError, open_request
from pipelines.serve.answers import ErrorAnswer, ImagesAnswer, Making, describe, event
from pipelines.serve.batch_api import Desk, add_batches
from pipelines.serve.catalogue import Catalogue, Version
from pipelines.serve.dispatch import Dispatcher, pictures
from pipelines.serve.errors import RefusedError, add_handlers, error_body, refusal_body
from pipelines.serve.guard import Guard, sender
from pipelines.serve.keys import KeyRing
from pipelines.serve.metrics import Asked, RequestMetrics
from pipelines.serve.page import add_page
from pipelines.serve.schemas import REQUEST_FIELDS, Body, DenoiseForm, EditForm, GenerationBody, VariationForm
from pipelines.worker import picture_seed
from pipelines.worker.loop import End, Event, Order, Preview, Refusal

T = TypeVar("T")
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": told}
    for status, told in {
        400: "a field is wrong; param names it", 401: "no such key", 408: "the request came too slowly",
        413: "the request is too large", 429: "the key's limit is reached", 503: "overloaded, or no engine is there",
        504: "not done in time",
    }.items()
}  # fmt: skip
# An event of a stream (OpenAPI 3.2 names the schema of one so)
_EVENT = {
    "type": "object",
    "properties": {"event": {"type": "string"}, "data": {"type": "string", "contentMediaType": "application/json"}},
    "required": ["event", "data"],
}
# Pictures of the largest size that an answer may hold, previews among them: they are in memory at once.
_WHOLE_PICTURES = 4


@dataclass(frozen=True)
class Service:
    """What the API stands on."""

    config: ServeConfig
    catalogue: Catalogue
    dispatcher: Dispatcher
    ring: KeyRing
    metrics: RequestMetrics
    desk: Desk | None = None


def create_api(service: Service) -> fastapi.FastAPI:
    """The application of a service."""
    api = fastapi.FastAPI(title="Image diffusion service", version=__version__, responses=_ERRORS)
    add_handlers(api)
    limits = {"max_body": int(service.config.max_body), "max_file": int(service.config.max_file)}
    api.add_middleware(Guard, ring=service.ring, **limits)
    if service.config.origin:
        methods, headers = ["GET", "POST", "DELETE"], ["Authorization", "Content-Type"]
        origins = service.config.origin
        api.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=methods, allow_headers=headers)
    add_page(api)
    _add_state(api, service)
    _add_images(api, service)
    if service.desk is not None:
        add_batches(api, service.desk)
    document = api.openapi

    def openapi() -> dict[str, Any]:
        told = document()
        for path in told["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)  # FastAPI's own, in place of which 400 is answered
        return told

    api.openapi = openapi  # type: ignore[method-assign]
    return api


def _add_state(api: fastapi.FastAPI, service: Service) -> None:
    """What the service is, and whether it can answer."""

    @api.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Whether the service is alive."""
        return {"status": "ok"}

    @api.get("/readyz")
    async def readyz() -> Response:
        """Whether every model can answer."""
        ready, problems = service.catalogue.ready, service.catalogue.problems
        told = {"status": "ready" if ready else "waiting", "waiting": sorted(problems)}
        return JSONResponse(told, 200 if ready else 503)

    @api.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The models, with what each can do."""
        return {"object": "list", "data": [describe(version) for version in service.catalogue]}

    @api.get("/v1/models/{name}", responses={404: _ERRORS[400]})
    async def model(name: str) -> Response:
        """One model."""
        try:
            return JSONResponse(describe(service.catalogue.find(name)))
        except RequestError as error:
            return JSONResponse(error_body(str(error), "not_found_error", "model", "model_not_found"), 404)


def _add_images(api: fastapi.FastAPI, service: Service) -> None:
    """What makes pictures."""
    answers: dict[int | str, dict[str, Any]] = {
        200: {"model": ImagesAnswer, "content": {"text/event-stream": {"itemSchema": _EVENT}}}
    }

    @api.post("/v1/images/generations", responses=answers)
    async def generations(request: fastapi.Request, body: GenerationBody) -> Response:
        """Generate `n` pictures of a class, or near the picture of another seed."""
        return await _answer(service, request, body)

    @api.post("/v1/images/edits", responses=answers)
    async def edits(request: fastapi.Request, form: Annotated[EditForm, fastapi.Form()]) -> Response:
        """Repaint the transparent part of a picture, all else coming back as it was; or start from it by `strength`."""
        return await _answer(service, request, form)

    @api.post("/v1/images/variations", responses=answers)
    async def variations(request: fastapi.Request, form: Annotated[VariationForm, fastapi.Form()]) -> Response:
        """Make pictures like a picture."""
        return await _answer(service, request, form)

    @api.post("/v1/images/denoise", responses=answers)
    async def denoise(request: fastapi.Request, form: Annotated[DenoiseForm, fastapi.Form()]) -> Response:
        """Remove noise of a known or estimated level from a picture."""
        return await _answer(service, request, form)


async def _answer(service: Service, request: fastapi.Request, body: Body) -> Response:
    """Check, make, encode; whoever goes away stops it."""
    key, version = sender(request.scope), _version(service, body)
    _check(body, version, service.config)
    wait = service.ring.spend(key, body.n)
    if wait:
        told = f"rate limit: {key.name} has {key.pictures_per_minute:g} pictures a minute"
        raise RefusedError(Refusal("rate_limit", told, wait))
    making = await _open(body, version, service.config)
    requests = tuple(replace(making.opened.core, seed=own) for own in making.seeds)
    timeout = min(body.timeout or service.config.timeout, service.config.timeout)
    order = Order(requests, body.priority, key.name, timeout, body.partial_images)
    events = _counted(service.dispatcher.make(version, order), Asked(version.name, body.task), body.n, service.metrics)
    if body.stream:
        return await _stream(request, making, events)
    ends, refusal = await _unless_gone(request, pictures(events))
    _check_ends(ends, refusal)
    return JSONResponse(await asyncio.to_thread(making.answer, ends))


async def _unless_gone(request: fastapi.Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of work for a client, which is stopped where the client hangs up meanwhile."""
    working, leaving = asyncio.create_task(work), asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise fastapi.HTTPException(499, "the client hung up")
        return await working
    finally:
        working.cancel()
        leaving.cancel()


async def _gone(request: fastapi.Request) -> None:
    """Return once the client has hung up."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _version(service: Service, body: Body) -> Version:
    """The version that answers. Raises RefusedError where its model is known, and cannot answer yet."""
    known = {source.name for source in service.catalogue.sources}
    if (body.model is None or body.model in known) and not service.catalogue.ready:
        name = body.model or service.catalogue.sources[0].name
        if name not in service.catalogue.live:
            raise RefusedError(Refusal("unavailable", f"{name}: {service.catalogue.problems.get(name)}", 5.0))
    return service.catalogue.find(body.model)


def _check(body: Body, version: Version, config: ServeConfig) -> None:
    """Refuse another size than the model's, and more pictures than are allowed."""
    resolution = version.config.unet.resolution
    if body.size not in ("auto", f"{resolution}x{resolution}"):
        raise RequestError("size", f"{body.size!r}; this model makes {resolution}x{resolution}")
    if body.n > config.max_pictures:
        raise RequestError("n", f"{body.n}; this service makes up to {config.max_pictures} pictures a request")


async def _open(body: Body, version: Version, config: ServeConfig) -> Making:
    """The request with its files read and decoded, off the event loop. Raises RequestError on what cannot be done."""
    files = {name: getattr(body, name, None) for name in ("image", "mask")}
    data = {name: await file.read() for name, file in files.items() if file is not None}
    fields = {name: getattr(body, name) for name in REQUEST_FIELDS if hasattr(body, name)}
    options = {name: getattr(body, name) for name in SampleOptions.model_fields}
    seed = secrets.randbits(53) if body.seed is None else body.seed
    seeds = [picture_seed(seed, index) for index in range(body.n)]
    asked = ImageRequest(task=body.task, seed=seeds[0], **fields, **options, **data)
    opened = await asyncio.to_thread(open_request, asked, version.config, config.max_pixels)
    if opened.frame is not None:
        _check_answer(body, opened.frame, config)
    return Making(body, version, asked, opened, seed, seeds)


def _check_answer(body: Body, frame: Frame, config: ServeConfig) -> None:
    """Refuse pictures of the caller's own size that the format cannot hold, or that are too much all together."""
    most, count = LONGEST_SIDE[body.output_format], body.n * (1 + body.partial_images)
    if max(frame.width, frame.height) > most:
        told = f"{body.output_format!r} has sides up to {most}; the image has {frame.width}x{frame.height} pixels"
        raise RequestError("output_format", f"{told}; take png")
    if count * frame.width * frame.height > _WHOLE_PICTURES * config.max_pixels:
        told = f"{count} pictures and previews of {frame.width}x{frame.height} pixels"
        raise RequestError("n", f"{told}; an answer has up to {_WHOLE_PICTURES * config.max_pixels} pixels in all")


async def _stream(request: fastapi.Request, making: Making, events: AsyncGenerator[Event, None]) -> Response:
    """The events of a request, the first of which decides whether there are any."""
    first = await _unless_gone(request, _first(events))
    if isinstance(first, Refusal):
        raise RefusedError(first)
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(_told(making, first, events), media_type="text/event-stream", headers=headers)


async def _first(events: AsyncGenerator[Event, None]) -> Event:
    return await anext(events)


async def _told(making: Making, first: Event, events: AsyncGenerator[Event, None]) -> AsyncIterator[bytes]:
    """Events as they are sent."""
    shown = [0] * len(making.seeds)
    async with contextlib.aclosing(_with_first(first, events)) as all_events:
        async for each in all_events:
            if isinstance(each, Preview):
                shown[each.place] += 1
                yield await asyncio.to_thread(making.preview_event, each, shown[each.place] - 1)
            elif isinstance(each, Refusal):
                yield event("error", refusal_body(each))
            elif each.error is not None:
                yield event("error", error_body(f"picture {each.place}: {each.error}", "server_error"))
            else:
                yield await asyncio.to_thread(making.end_event, each)


async def _with_first(first: Event, events: AsyncGenerator[Event, None]) -> AsyncGenerator[Event, None]:
    """An iterator whose first event was taken, whole again."""
    async with contextlib.aclosing(events):
        yield first
        async for each in events:
            yield each


def _check_ends(ends: list[End], refusal: Refusal | None) -> None:
    """Raise RefusedError where pictures are missing."""
    if refusal is not None:
        raise RefusedError(refusal)
    failed = next((end for end in ends if end.error is not None), None)
    if failed is not None:
        raise RequestError("request", f"picture {failed.place}: {failed.error}; ask for other settings")


async def _counted(
    events: AsyncGenerator[Event, None], asked: Asked, pictures_wanted: int, metrics: RequestMetrics
) -> AsyncGenerator[Event, None]:
    """The same events, with what they say counted."""
    began, previewed, ended = time.monotonic(), False, 0
    async with contextlib.aclosing(events):
        async for each in events:
            if isinstance(each, Refusal):
                metrics.refuse(asked, each.reason)
            elif isinstance(each, Preview) and not previewed:
                previewed = True
                metrics.previewed(asked, time.monotonic() - began)
            elif isinstance(each, End):
                ended += 1
            if ended == pictures_wanted:
                ended = -1
                metrics.answered(asked, pictures_wanted, time.monotonic() - began)
            yield each
