"""The HTTP API over an engine in this process: everything but Ray."""

import asyncio
import contextlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import uvicorn

from pipelines.config import ServeConfig
from pipelines.model import load_model
from pipelines.serve.api import Service, create_api
from pipelines.serve.batch_api import Desk
from pipelines.serve.batches import Batches
from pipelines.serve.catalogue import Catalogue, sources
from pipelines.serve.dispatch import Dispatcher
from pipelines.serve.keys import KeyRing, read_keys
from pipelines.serve.metrics import RequestMetrics
from pipelines.serve.runner import Runner
from pipelines.serve.uploads import Uploads
from pipelines.worker import Worker
from pipelines.worker.loop import TickLoop


class LocalService:
    """A service on a free port of 127.0.0.1; `ticks` are those of its engine, `url` is where it listens."""

    def __init__(self, config):
        self.config, self.ticks = config, []
        self.worker = Worker(load_model(config.model), lanes=config.lanes, threads=1)
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._thread.start()
        assert self._ready.wait(30), "the service did not start"

    @property
    def url(self):
        return f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"

    def stop(self):
        self._server.should_exit = True
        self._thread.join(30)

    async def _serve(self):
        with ThreadPoolExecutor(1) as executor:
            self.loop = TickLoop(self.worker.engine, executor, self.config.queue, self.ticks.append)
            ticking = asyncio.create_task(self.loop.run())
            app = create_api(await self._service())
            self._server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=5))
            serving = asyncio.create_task(self._server.serve())
            while not self._server.started:
                await asyncio.sleep(0.01)
            self._ready.set()
            await serving
            ticking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await ticking

    async def _service(self):
        async def prepare(_):
            return None

        catalogue = Catalogue(sources(self.config), prepare)
        await catalogue.refresh()
        dispatcher = Dispatcher(lambda _, order: self.loop.make(order), self.config.retries)
        ring = KeyRing(read_keys(self.config.key_file) if self.config.key_file else [])
        return Service(self.config, catalogue, dispatcher, ring, RequestMetrics(), self._desk(catalogue))

    def _desk(self, catalogue):
        """Takes batches where a store was named; `runner` makes them, once it is told by which command."""
        if "store" not in self.config.model_fields_set:
            return None
        batches = Batches(self.config.store)
        self.runner = Runner(batches, self.config.batches, 0.05, dict(os.environ))
        return Desk(
            Uploads(self.config.store, self.config.max_rows), batches, catalogue, self.config.app, self.config.callback
        )


@contextlib.contextmanager
def local_service(model, **settings):
    """A running service of a model."""
    service = LocalService(ServeConfig(**{"model": model, "name": "tiny", "lanes": 8, **settings}))
    try:
        yield service
    finally:
        service.stop()
