"""The Ray Serve application: its deployments, and how it is started here, or written down for a cluster."""

import asyncio
import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import fastapi
import ray
import yaml
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from pipelines.config import AwayError, Outcome, PipelineError, ServeConfig, to_values
from pipelines.images import Pixels
from pipelines.model import load_model
from pipelines.requests import ImageRequest, Opened, opened_or_refused
from pipelines.serve.api import Service, create_api
from pipelines.serve.batch_api import Desk
from pipelines.serve.batches import Batches
from pipelines.serve.catalogue import Catalogue, Source, Version, open_version, sources
from pipelines.serve.dispatch import Dispatcher, pictures, through_serve
from pipelines.serve.keys import KeyRing, read_keys
from pipelines.serve.metrics import RequestMetrics
from pipelines.serve.replica import EngineReplica, EngineSettings
from pipelines.serve.runner import Runner
from pipelines.serve.scaling import LoadPolicy
from pipelines.serve.uploads import Uploads
from pipelines.storage import StorageError, normalise
from pipelines.worker import gpus_of_a_worker
from pipelines.worker.loop import Order
from pipelines.worker.memory import keeping

_ONGOING = 1024
_ALL = 100
_LOOK_BACK_S = 15.0
_HEALTH_S = 2.0
_MISSED = 15
_QUIET = {"log_level": "WARNING", "enable_access_log": False}
# What `serve deploy` reads: where the application is, and what it is given
_IMPORT_PATH = "pipelines.serve:build"
_BULK_TIMEOUT_S = 86_400.0
_BULK_PAUSE_S = 1.0
_ENGINE_START_S = 600.0


@serve.ingress()
class Ingress:
    """Takes HTTP requests, and rows of bulk jobs by handle; `engines` are the handles of each model's engines."""

    async def __init__(  # type: ignore[misc]
        self, config: ServeConfig, engines: dict[str, Any]
    ) -> None:
        self.config, self.engines = config, engines
        metrics = RequestMetrics()
        dispatcher = Dispatcher(through_serve(engines), config.retries, metrics.retry)
        ring = KeyRing(read_keys(config.key_file) if config.key_file else [], config.ingress_replicas)
        catalogue, batches = Catalogue(sources(config), self._prepare), Batches(normalise(config.store))
        uploads, app = Uploads(batches.store, config.max_rows), serve.get_replica_context().app_name
        desk = Desk(uploads, batches, catalogue, app, config.callback) if config.batches else None
        self.service = Service(config, catalogue, dispatcher, ring, metrics, desk)
        self._others: dict[str, Version] = {}
        await catalogue.refresh()
        runner = Runner(batches, config.batches, config.watch, _environment(), _leads)
        self._watching = [asyncio.create_task(each) for each in (catalogue.watch(config.watch), runner.watch())]

    def __serve_build_asgi_app__(self) -> fastapi.FastAPI:
        return create_api(self.service)

    async def paint_rows(self, requests: list[ImageRequest], model: str) -> list[Pixels | str]:
        """A picture uint8 [H, W, 3] for each request by the version at the URI `model`, or its error in words.

        Waits while there is no room. Raises PipelineError where the service does not have this model, or fails.
        """
        version = await self._version_of(model)
        opened = await asyncio.to_thread(lambda: [opened_or_refused(each, version.config) for each in requests])
        whole = [(at, each) for at, each in enumerate(opened) if isinstance(each, Opened)]
        found: dict[int, Pixels | str] = {
            at: str(each) for at, each in enumerate(opened) if isinstance(each, Exception)
        }
        for first in range(0, len(whole), self.config.queue):
            part = whole[first : first + self.config.queue]
            order = Order(tuple(each.core for _, each in part), "bulk", "bulk", _BULK_TIMEOUT_S)
            for end in await self._ends(version, order):
                at, each = part[end.place]
                found[at] = each.answer(end.pixels) if end.pixels is not None else str(end.error)
        return [found[at] for at in range(len(requests))]

    async def is_there(self) -> bool:
        """Says so, whatever the engines do."""
        return True

    async def describe_model(self, model: str) -> dict[str, Any]:
        """What the version at the URI `model` is, and the numerics profile of an engine that has it."""
        version = await self._version_of(model)
        about: dict[str, Any] = await self.engines[version.name].describe.remote(version.name, version.uri)
        return about

    async def _ends(self, version: Version, order: Order) -> list[Any]:
        """The ends of an order that waits for its turn. Raises PipelineError where the engines fail."""
        while True:
            ends, refusal = await pictures(self.service.dispatcher.make(version, order))
            if refusal is None:
                return ends
            if refusal.reason not in ("overloaded", "unavailable"):
                raise PipelineError(f"{version.uri}: {refusal.message}; run it again, what is committed is kept")
            await asyncio.sleep(_BULK_PAUSE_S)

    async def _version_of(self, model: str) -> Version:
        """The version at a URI, live or not, by the engines of the model that it is one of."""
        uri = normalise(model)
        for version in self.service.catalogue:
            if version.uri == uri:
                return version
        if uri not in self._others:
            names = [source.name for source in self.service.catalogue.sources]
            name = next((each for each in names if f"/models/{each}/" in uri), None)
            if name is None:
                raise PipelineError(f"model: this service runs {', '.join(names)}, not {uri}; serve that one")
            self._others[uri] = await asyncio.to_thread(open_version, name, uri)
        return self._others[uri]

    async def _prepare(self, version: Version) -> str | None:
        """Have an engine load a version before it answers; where engines may rest, its file is looked at here.

        Waits for an engine where no other version answers meanwhile. Returns what stands in the way, in words, or None.
        """
        try:
            if not self.config.replicas:
                await asyncio.to_thread(load_model, version.uri)
                return None
            patience = 0.0 if version.name in self.service.catalogue.live else _ENGINE_START_S
            load = self.engines[version.name].load
            return await loaded(lambda: load.remote(version.name, version.uri), patience, self.config.watch)
        except PipelineError as error:
            return str(error)
        except (RayError, RayServeException) as error:
            return f"{version.uri}: the engine that should load it died ({type(error).__name__})"


async def loaded(load: Callable[[], Awaitable[str | None]], patience: float, pause: float) -> str | None:
    """What `load` answers, asked again for `patience` seconds while engines die, or do not know the model yet.

    Raises RayError or RayServeException after that.
    """
    until = time.monotonic() + patience
    while True:
        try:
            return await load()
        except (RayError, RayServeException):
            if time.monotonic() >= until:
                raise
        await asyncio.sleep(pause)


def _leads() -> bool:
    """Whether this is the one of the ingresses that has batches made."""
    return bool(serve.get_replica_context().rank.rank == 0)


def _environment() -> dict[str, str]:
    """The environment of a command that is to be part of this Ray."""
    return {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}


def build(arguments: dict[str, Any]) -> Any:
    """The application, from settings of the serve stage: what `serve deploy` and KubeRay call.

    Raises ValueError on unknown settings, StorageError where a model is missing or damaged.
    """
    return application(ServeConfig.model_validate(arguments))


def application(config: ServeConfig) -> Any:
    """The application of these settings. Raises PipelineError where a model is missing or damaged."""
    served = sources(config)
    for source in served:
        load_model(source.current())  # what is wrong with it is told here, and not by engines that keep restarting
    if config.share:
        engines = dict.fromkeys((source.name for source in served), _engine(config, "engine", served))
    else:
        engines = {source.name: _engine(config, f"engine-{source.name}", [source]) for source in served}
    ingress = serve.deployment(
        Ingress, name="Ingress", num_replicas=config.ingress_replicas, max_ongoing_requests=_ONGOING,
        max_queued_requests=_ONGOING, logging_config=_QUIET, ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=config.drain, max_surge_percent=_ALL,  # one that is replaced answers until then
    )  # fmt: skip
    return ingress.bind(config, engines)


def _engine(config: ServeConfig, name: str, served: list[Source]) -> Any:
    """A deployment of engines for these models."""
    settings = EngineSettings(config.lanes, config.threads, config.queue, config.watch, config.versions)
    gpus = config.gpus if config.gpus is not None else gpus_of_a_worker()
    counts: dict[str, Any] = {"num_replicas": config.replicas}
    if config.most_replicas > config.replicas:
        counts = {"autoscaling_config": _autoscaling(config)}
    engine = serve.deployment(
        EngineReplica, name=name, max_ongoing_requests=_ONGOING, logging_config=_QUIET,
        ray_actor_options={"num_cpus": config.cpus, "num_gpus": gpus, "runtime_env": keeping()},
        graceful_shutdown_timeout_s=config.drain,
        health_check_period_s=_HEALTH_S, max_surge_percent=config.surge, **counts,
    )  # fmt: skip
    return engine.bind(served, settings)


def _autoscaling(config: ServeConfig) -> dict[str, Any]:
    """Engines by their load."""
    policy = {"policy_function": LoadPolicy, "policy_kwargs": {"calls_per_replica": config.calls_per_replica}}
    return {
        "min_replicas": config.replicas, "max_replicas": config.most_replicas, "policy": policy,
        "look_back_period_s": _LOOK_BACK_S, "upscale_delay_s": 0.0, "downscale_delay_s": config.rest_after,
    }  # fmt: skip


def start(config: ServeConfig) -> str:
    """Start the application on the connected Ray; returns its URL. Raises PipelineError where a model is missing."""
    made = application(config)
    port = config.port or _free_port(config.host)
    _check_free(config.host, port)
    serve.start(http_options={"host": config.host, "port": port}, logging_config=_QUIET)
    serve.run(made, name=config.app, route_prefix="/")
    return f"http://{config.host}:{port}"


def stop() -> None:
    """Stop the application once what runs has ended, and then its HTTP server."""
    for name in serve.status().applications:
        _delete(name)
    serve.shutdown()  # at once, whatever it carries


def _delete(name: str) -> None:
    """Wait until an application is gone, which has as long as its deployments say."""
    gone = False
    while not gone:
        with contextlib.suppress(TimeoutError):  # Ray Serve waits for a minute at a time
            serve.delete(name)
            gone = True


def run(config: ServeConfig) -> Outcome:
    """Serve until interrupted; or write the configuration for `serve deploy`."""
    if config.to is not None:
        return _write(config, config.to)
    if config.wait:
        _wait_for_models(config)
    url = start(config)
    if config.host not in ("127.0.0.1", "localhost", "::1") and not config.key_file:
        print(f"serve: no --key-file: whoever reaches {config.host}:{config.port} may use it", flush=True)
    print(f"serve: {url}  is a page to play with ({url}/docs documents the API; stop with Ctrl-C)", flush=True)
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    while not stopped.wait(_HEALTH_S):
        _check_answers(config.host, int(url.rsplit(":", 1)[1]), stopped)
    print("serve: stopping; what runs may end", flush=True)
    stop()
    return Outcome(uri=url, found=False)


def _wait_for_models(config: ServeConfig) -> None:
    """Wait until every model that is named has a version."""
    for source in sources(config):
        told = ""
        while True:
            try:
                source.current()
                break
            except StorageError as error:
                if str(error) != told:
                    told = str(error)
                    print(f"serve: waiting: {told}", flush=True)
            time.sleep(config.watch)


def _check_answers(host: str, port: int, stopped: threading.Event) -> None:
    """Raise AwayError where nothing takes connections any more: the Ray that this service ran on is gone."""
    for _ in range(_MISSED):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1" if host == "0.0.0.0" else host, port)) == 0 or stopped.wait(_HEALTH_S):
                return
    raise AwayError(f"{host}:{port}: the service is gone, and with it perhaps its Ray; start it again")


def find(_: ServeConfig) -> None:
    """A service is never found: it runs or it does not."""


def deployed(config: ServeConfig) -> dict[str, Any]:
    """The configuration that `serve deploy` and KubeRay's serveConfigV2 take."""
    arguments = {
        name: value for name, value in to_values(config).items() if name not in ("to", "wait", "host", "port", "app")
    }
    application_ = {"name": config.app, "route_prefix": "/", "import_path": _IMPORT_PATH, "args": arguments}
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": config.host, "port": config.port or 8000},
        "applications": [application_],
    }


def _write(config: ServeConfig, path: str) -> Outcome:
    """Write the configuration."""
    with open(path, "w") as file:
        yaml.safe_dump(deployed(config), file, sort_keys=False)
    print(f"serve: wrote {path}; start it with: serve deploy {path}", flush=True)
    return Outcome(uri=path, found=False)


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
