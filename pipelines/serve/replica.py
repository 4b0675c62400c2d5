"""An engine on one device: the models that it makes pictures with, their versions in memory, and the loop of each."""

import asyncio
import contextlib
import logging
import os
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
    another one of its model needs the place. An engine that fails ends this process: Ray Serve puts another in its
    place and sends nobody here meanwhile; what was under way is asked for again by the ingress.
    """

    async def __init__(  # type: ignore[misc]
        self, sources: list[Source], settings: EngineSettings
    ) -> None:
        self.sources, self.settings = sources, settings
        self._metrics = {source.name: EngineMetrics(source.name) for source in sources}
        self._executor = ThreadPoolExecutor(1, "tick")
        self._loaded: dict[str, _Loaded] = {}
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._live: dict[str, str] = {}
        for source in sources:
            await self._begin(source)
        self._watching = asyncio.create_task(self._watch())

    async def _begin(self, source: Source) -> None:
        """Load what is live. Where that is damaged, the version before can be asked for by its URI."""
        uri = self._live[source.name] = normalise(await asyncio.to_thread(source.current))
        problem = await self.load(source.name, uri)
        if problem is not None and source.uri is not None:
            raise PipelineError(problem)
        if problem is not None:
            _log.warning("serve: %s starts without what is live: %s", source.name, problem)

    async def make(self, name: str, uri: str, order: Order) -> AsyncGenerator[Event, None]:
        """What becomes of an order by the version of a model at `uri`, as `TickLoop.make` tells it."""
        try:
            loaded = await self._get(name, uri)
        except PipelineError as error:
            yield Refusal("unavailable", str(error), 5.0)
            return
        loaded.users += 1
        try:
            async with contextlib.aclosing(loaded.loop.make(order)) as events:
                async for event in events:
                    yield event
        finally:
            loaded.users -= 1
            loaded.used = time.monotonic()

    async def load(self, name: str, uri: str) -> str | None:
        """Have a version of a model in memory; what stands in the way, in words, or None. Raises KeyError as `_get`."""
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

    async def _get(self, name: str, uri: str) -> _Loaded:
        """A version, loaded now where it is not yet; those who ask meanwhile wait for the same.

        Raises KeyError where this engine has no such model, as one that is replaced just now may not have.
        """
        if name not in self._metrics:
            raise KeyError(f"no model {name!r} in this engine")
        uri = normalise(uri)
        while uri not in self._loaded:  # it may be let go again before whoever waited for it has its turn
            if uri not in self._loading:
                self._loading[uri] = asyncio.create_task(self._load(name, uri))
            await asyncio.shield(self._loading[uri])
        return self._loaded[uri]

    async def _load(self, name: str, uri: str) -> None:
        """Load a version beside the ticks of the others. Raises PipelineError where it is damaged, or has no place."""
        try:
            self._make_room(name)
            worker = await asyncio.to_thread(self._open, uri)
            loop = TickLoop(worker.engine, self._executor, self.settings.queue, self._metrics[name].tell)
            task = asyncio.create_task(self._run(name, loop))
            self._loaded[uri] = _Loaded(name, worker, loop, task, used=time.monotonic())
        finally:
            del self._loading[uri]

    async def _run(self, name: str, loop: TickLoop) -> None:
        """Tick until the version is let go; a failure is the end of this process."""
        try:
            await loop.run()
        finally:
            if not isinstance(loop.error, asyncio.CancelledError):
                _log.error("serve: an engine of %s failed", name, exc_info=loop.error)
                os._exit(1)  # an error of a device stays with its process; so may others

    def _open(self, uri: str) -> Worker:
        try:
            return Worker(load_model(uri), lanes=self.settings.lanes, threads=self.settings.threads)
        except (RuntimeError, ValueError) as error:
            raise PipelineError(f"{uri}: cannot be loaded on this device ({str(error).splitlines()[0]})") from error

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
