"""One engine for several shards at once: rows of the next are in it before the last of one shard are done."""

import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

from diffusion_core.config import ModelConfig
from diffusion_core.lanes import Finished
from diffusion_core.tasks import prepare
from pipelines.bulk.inputs import Rejection
from pipelines.images import Pixels
from pipelines.requests import ImageRequest, Opened, RequestError, open_request, opened_or_refused
from pipelines.worker import Worker
from pipelines.worker.worker import pixels_of

End = Pixels | Rejection


class Painted(NamedTuple):
    """The ends of rows in order, each a picture uint8 [H, W, 3] or why there is none; the denoiser calls they took."""

    ends: list[End]
    calls: int


@dataclass
class _Batch:
    """Rows that came together: which are still on their way, by ticket, and what became of the others."""

    requests: list[Opened | Rejection]
    future: "Future[Painted]"
    ends: dict[int, End] = field(default_factory=dict)
    calls: int = 0


class Shared:
    """A worker's engine behind a thread of its own, which alone touches it; any thread may ask for pictures.

    `take_seconds` says how long the device has worked.
    """

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self._seconds: queue.SimpleQueue[float] = queue.SimpleQueue()
        self._inbox: queue.SimpleQueue[_Batch | None] = queue.SimpleQueue()
        self._flying: dict[int, tuple[_Batch, int]] = {}
        self._admitting: _Batch | None = None
        self._closed = False
        threading.Thread(target=self._run, name="engine", daemon=True).start()

    def paint(self, requests: Sequence[ImageRequest | Rejection]) -> Painted:
        """The ends of requests; waits for them, while others' are on their way as well.

        Raises what the engine raises where it breaks.
        """
        batch = _Batch([self._opened(request) for request in requests], Future())
        self._inbox.put(batch)
        ends, calls = batch.future.result()
        return Painted([_answer(request, end) for request, end in zip(batch.requests, ends, strict=True)], calls)

    def take_seconds(self) -> float:
        """Seconds that the device has worked since this was asked last: their sum over all shards is right."""
        total = 0.0
        while True:
            try:
                total += self._seconds.get_nowait()
            except queue.Empty:
                return round(total, 3)

    def close(self) -> None:
        """Let the thread end once nobody waits any more."""
        self._inbox.put(None)

    def _opened(self, request: ImageRequest | Rejection) -> Opened | Rejection:
        """A request with its files decoded, or why there is none."""
        if isinstance(request, Rejection):
            return request
        opened = opened_or_refused(request, self.worker.model.config)
        return Rejection("refused", str(opened)) if isinstance(opened, RequestError) else opened

    def _run(self) -> None:
        """Admit what has come, make a call, hand out what has ended; until it is closed."""
        while not self._closed:
            try:
                self._step()
            except Exception as error:  # noqa: BLE001  # whoever waits is told, whatever it is
                waiting = [batch for batch, _ in self._flying.values()]
                waiting += [] if self._admitting is None else [self._admitting]
                for batch in {id(batch): batch for batch in waiting}.values():
                    batch.future.set_exception(error)
                for ticket in self._flying:
                    self.worker.engine.cancel(ticket)
                self._flying.clear()
                self._admitting = None

    def _step(self) -> None:
        while not self._flying or not self._inbox.empty():
            batch = self._inbox.get()
            if batch is None:
                self._closed = True
                return
            self._admit(batch)
        begun = time.perf_counter()
        ended = self.worker.engine.tick()
        self._seconds.put(time.perf_counter() - begun)
        for end in ended:
            batch, place = self._flying.pop(end.ticket)
            batch.ends[place] = _end_of(end)
            self._settle(batch)

    def _admit(self, batch: _Batch) -> None:
        self._admitting = batch
        for place, request in enumerate(batch.requests):
            if isinstance(request, Opened):
                ticket = self.worker.engine.submit(request.core, "bulk")
                self._flying[ticket] = (batch, place)
                batch.calls += self.worker.engine.calls_of(ticket)
            else:
                batch.ends[place] = request
        self._admitting = None
        self._settle(batch)

    def _settle(self, batch: _Batch) -> None:
        """Hand out a batch whose rows have all ended."""
        if len(batch.ends) == len(batch.requests):
            batch.future.set_result(Painted([batch.ends[at] for at in range(len(batch.ends))], batch.calls))


def _end_of(end: Finished) -> End:
    return Rejection("failed", str(end.error)) if end.picture is None else pixels_of(end.picture)


def _answer(request: Opened | Rejection, end: End) -> End:
    """The end of a request, a picture in the size of the one that was edited."""
    return end if isinstance(request, Rejection) or isinstance(end, Rejection) else request.answer(end)


def calls_of(request: ImageRequest, model: ModelConfig) -> int:
    """Denoiser calls that a request takes; 0 of one that is refused."""
    try:
        plan = prepare(open_request(request, model).core, model).plan
    except RequestError:
        return 0
    return 0 if plan is None else len(plan)
