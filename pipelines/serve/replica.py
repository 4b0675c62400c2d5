"""An engine on one device: the models that it makes pictures with, their versions in memory, and the loop of each."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from pipelines.config import PipelineError
from pipelines.model import load_model
from pipelines.serve.catalogue import Source
from pipelines.serve.metrics import EngineMetrics
from pipelines.serve.scaling import PENDING
from pipelines.storage import normalise
from pipelines.worker import Worker
from pipelines.worker.loop import Event, Order, Refusal, TickLoop

_log = logging.getLogger("ray.serve")
_KEEP_S = 60.0


@dataclass(frozen=True)
class EngineSettings:
    """How an engine works; the same for all of a service."""

    lanes: int
    threads: int
    queue: int
    watch: float
    versions: int


@dataclass(eq=False)
class _Loaded:
    """A version of the model `name` in memory: its worker, its loop, how many use it, and when it was last used."""

    name: str
    worker: Worker
    loop: TickLoop
    task: asyncio.Task[None]
    users: int = 0
    used: float = 0.0


class EngineReplica:
    """Makes pictures with any version of its models, and has the live ones in memory, which it follows.

    All tick in turns on the one device. A version that is not live is let go when it was not used for a minute, or when
    another one of its model needs the place.
    """

    async def __init__(  # type: ignore[misc]
        self, sources: list[Source], settings: EngineSettings
    ) -> None:
        self.sources, self.settings = sources, settings
        self._metrics = {source.name: EngineMetrics(source.name) for source in sources}
        self._executor = ThreadPoolExecutor(1, "tick")
        self._loaded: dict[str, _Loaded] = {}
        self._loading: dict[str, asyncio.Task[_Loaded]] = {}
        self._live: dict[str, str] = {}
        for source in sources:
            self._live[source.name] = normalise(await asyncio.to_thread(source.current))
            await self._get(source.name, self._live[source.name])
        self._watching = asyncio.create_task(self._watch())

    async def make(self, name: str, uri: str, order: Order) -> AsyncGenerator[Event, None]:
        """What becomes of an order by the version of a model at `uri`, as `TickLoop.make` tells it."""
        try:
            loaded = await self._get(name, uri)
        except PipelineError as error:
            yield Refusal("unavailable", str(error), 5.0)
            return
        loaded.users += 1
        try:
            async for event in loaded.loop.make(order):
                yield event
        finally:
            loaded.users -= 1
            loaded.used = time.monotonic()

    async def load(self, name: str, uri: str) -> str | None:
        """Have a version of a model in memory; what stands in the way, in words, or None."""
        try:
            await self._get(name, uri)
        except PipelineError as error:
            return str(error)
        return None

    async def describe(self, name: str, uri: str) -> dict[str, Any]:
        """What a version is: URI, digest, configuration, and the numerics profile of this device.

        Raises PipelineError where it cannot be loaded.
        """
        worker = (await self._get(name, uri)).worker
        about = {"uri": worker.model.uri, "digest": worker.model.digest, "config": worker.model.config.to_dict()}
        return {**about, "numerics": worker.profile}

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """The load, for Ray Serve's autoscaler."""
        return {PENDING: float(sum(each.loop.pending_calls for each in self._loaded.values()))}

    async def check_health(self) -> None:
        """Raise RuntimeError where an engine has failed, so that Ray Serve puts another in this one's place."""
        for uri, loaded in self._loaded.items():
            if loaded.loop.error is not None:
                raise RuntimeError(f"{uri}: the engine failed: {loaded.loop.error!r}")

    async def _get(self, name: str, uri: str) -> _Loaded:
        """A version, loaded now where it is not yet; those who ask meanwhile wait for the same."""
        uri = normalise(uri)
        if uri not in self._loaded:
            if uri not in self._loading:
                self._loading[uri] = asyncio.create_task(self._load(name, uri))
            return await asyncio.shield(self._loading[uri])
        return self._loaded[uri]

    async def _load(self, name: str, uri: str) -> _Loaded:
        """Load a version beside the ticks of the others. Raises PipelineError where it is damaged, or has no place."""
        try:
            self._make_room(name)
            worker = await asyncio.to_thread(self._open, uri)
            loop = TickLoop(worker.engine, self._executor, self.settings.queue, self._metrics[name].tell)
            loaded = _Loaded(name, worker, loop, asyncio.create_task(loop.run()), used=time.monotonic())
            self._loaded[uri] = loaded
            return loaded
        finally:
            del self._loading[uri]

    def _open(self, uri: str) -> Worker:
        return Worker(load_model(uri), lanes=self.settings.lanes, threads=self.settings.threads)

    def _make_room(self, name: str) -> None:
        """Let go of the version of a model that was unused for longest. Raises PipelineError where all are in use."""
        while len(own := [uri for uri, each in self._loaded.items() if each.name == name]) >= self.settings.versions:
            unused = [uri for uri in own if self._is_unused(uri)]
            if not unused:
                told = f"{len(own)} versions are in use; --versions allows {self.settings.versions}"
                raise PipelineError(f"{name}: {told}; try again later")
            self._drop(min(unused, key=lambda uri: self._loaded[uri].used))

    def _is_unused(self, uri: str) -> bool:
        """Whether a version is neither live nor used by anybody."""
        return uri not in self._live.values() and not self._loaded[uri].users

    def _drop(self, uri: str) -> None:
        """Let go of a version."""
        self._loaded.pop(uri).task.cancel()

    async def _watch(self) -> None:
        """Follow what is live, and let go of what is not and was not used for long."""
        while True:
            await asyncio.sleep(self.settings.watch)
            for source in self.sources:
                await self._follow(source)
            aged = time.monotonic() - _KEEP_S
            for uri in [uri for uri, each in self._loaded.items() if each.used < aged and self._is_unused(uri)]:
                self._drop(uri)

    async def _follow(self, source: Source) -> None:
        """Have the live version of a model; where it cannot be had, the one before stays."""
        try:
            live = normalise(await asyncio.to_thread(source.current))
            if live != self._live[source.name]:
                await self._get(source.name, live)
                self._live[source.name] = live
        except PipelineError as error:
            _log.warning("serve: %s stays at %s: %s", source.name, self._live[source.name], error)
