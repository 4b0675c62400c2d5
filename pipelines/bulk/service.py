"""Shards made by the running service, which other people use at the same time, and committed here."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from pipelines.bulk.engine import End, calls_of
from pipelines.bulk.inputs import Rejection, read_requests
from pipelines.bulk.job import Job, Order
from pipelines.bulk.numerics import pin
from pipelines.bulk.shards import Numerics, Record, commit_shard
from pipelines.config import PipelineError
from pipelines.model import load_config
from pipelines.requests import ImageRequest

# Shards in flight for each worker of the service that there may be, and how many of those where it is not said.
_AT_ONCE, _WORKERS = 2, 2
# Waits for a service that restarts.
_WAITS_S = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)


class _Flight(NamedTuple):
    """A shard on its way: its rows, those of them that were sent, and the answer to come."""

    shard: int
    orders: list[Order]
    requests: list[ImageRequest | Rejection]
    asked: list[ImageRequest]
    answer: Any


def through_service(job: Job, missing: Sequence[int]) -> Iterator[tuple[int, Record]]:
    """Shards as they come, some in flight at once.

    Raises PipelineError where there is no such service, it has another model, or it fails for longer than is waited.
    """
    service = Service(job)
    at_once = _AT_ONCE * (job.config.workers or _WORKERS)
    flying: deque[_Flight] = deque()
    todo = deque(missing)
    while todo or flying:
        while todo and len(flying) < at_once:
            flying.append(_sent(job, service, todo.popleft()))
        flight = flying.popleft()
        yield flight.shard, _landed(job, service, flight)


def _sent(job: Job, service: "Service", shard: int) -> _Flight:
    orders = job.orders(shard)
    requests = read_requests(orders)
    asked = [request for request in requests if isinstance(request, ImageRequest)]
    return _Flight(shard, orders, requests, asked, service.ask(asked))


def _landed(job: Job, service: "Service", flight: _Flight) -> Record:
    """The record of a shard whose answer is waited for."""
    answers = iter(service.ends(flight.asked, flight.answer))
    ends = [request if isinstance(request, Rejection) else next(answers) for request in flight.requests]
    calls = sum(calls_of(request, service.model) for request in flight.asked)
    spent = {"calls": calls, "seconds": 0.0}  # the service does other work as well, so its seconds are not told
    return commit_shard(job, flight.shard, flight.orders, flight.requests, ends, service.numerics, spent)


class Service:
    """The running service: what it is asked, and what it answers."""

    def __init__(self, job: Job) -> None:
        from ray import serve
        from ray.serve.exceptions import RayServeException

        self.job, self.model = job, load_config(job.config.model)
        try:
            self.handle = serve.get_app_handle(job.config.app)
        except RayServeException as error:
            raise PipelineError(
                f"--via serve: no application {job.config.app!r} on this Ray; start it there, or take --via actors"
            ) from error
        self.numerics = self._pinned()

    def ask(self, requests: list[ImageRequest]) -> Any:
        """Send rows at bulk priority, which takes what others leave; what `ends` takes."""
        return self.handle.paint_rows.remote(requests, self.job.config.model)

    def ends(self, requests: list[ImageRequest], answer: Any) -> list[End]:
        """A picture uint8 [H, W, 3] for each request, or why there is none; a service that restarts is asked again.

        Raises PipelineError where it has another model, or fails for longer than is waited.
        """
        from ray.exceptions import RayError

        for wait in _WAITS_S:
            try:
                return _ends(answer)
            except RayError as error:
                if isinstance(error, PipelineError):
                    raise
                time.sleep(wait)
                self._pinned()  # what comes back may be another kind of device
                answer = self.ask(requests)
        return _ends(answer)

    def _pinned(self) -> Numerics:
        """The numerics profile of the service, which must be the job's."""
        numerics: Numerics = self.handle.describe_model.remote(self.job.config.model).result()["numerics"]
        pin(self.job.uri, numerics)
        return numerics


def _ends(answer: Any) -> list[End]:
    return [Rejection("refused", end) if isinstance(end, str) else end for end in answer.result()]
