"""Shards made by the running service, which other people use at the same time, and committed here."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from pipelines.bulk.engine import End, calls_of
from pipelines.bulk.inputs import Rejection, read_requests
from pipelines.bulk.job import Job, Order
from pipelines.bulk.numerics import as_pinned, pin, pinned
from pipelines.bulk.painting import through_actors
from pipelines.bulk.shards import Numerics, Record, commit_shard, record_of
from pipelines.config import AwayError, PipelineError
from pipelines.model import load_config
from pipelines.progress import print_line
from pipelines.requests import ImageRequest

# Shards in flight for each worker of the service that there may be, and how many of those where it is not said.
_AT_ONCE, _WORKERS = 2, 2
# Waits for a service that restarts: three minutes in all.
_WAITS_S = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 30.0, 30.0, 30.0, 30.0)
# An answer that takes longer is asked after: a service that is gone says nothing. A model may take long to load.
_LOOK_S, _LOADING_S = 20.0, 300.0


class ServiceAwayError(AwayError):
    """The service was away for longer than is waited."""


class _Answer(NamedTuple):
    """An answer to come, and to which of the connections."""

    response: Any
    connection: int


class _Flight(NamedTuple):
    """A shard on its way: its rows, those of them that were sent, and the answer to come."""

    shard: int
    orders: list[Order]
    requests: list[ImageRequest | Rejection]
    asked: list[ImageRequest]
    answer: _Answer


def through_service(job: Job, missing: Sequence[int]) -> Iterator[tuple[int, Record]]:
    """Shards as they come, some in flight at once; a service that does not come back is gone on without.

    Raises PipelineError where there is no such service at the beginning, it has another model, or it fails.
    """
    service, left = Service(job), dict.fromkeys(missing)
    try:
        for shard, record in _landing(job, service, missing):
            del left[shard]
            yield shard, record
    except ServiceAwayError as error:
        print_line(f"generate: {error}; going on with workers of the job's own")
        # As the engines were, whose lanes and threads are the service's: this job's flags say nothing of them.
        own = replace(job, config=as_pinned(job.config, pinned(job.uri), flags=False))
        yield from through_actors(own, list(left))


def _landing(job: Job, service: "Service", missing: Sequence[int]) -> Iterator[tuple[int, Record]]:
    """Shards as the service makes them, but for those that another run of the same job has made by now."""
    at_once = _AT_ONCE * (job.config.workers or _WORKERS)
    flying, todo = deque[_Flight](), deque(missing)
    while todo or flying:
        while todo and len(flying) < at_once:
            shard = todo.popleft()
            found = record_of(job.uri, shard)
            if found is not None:
                yield shard, found
            else:
                flying.append(_sent(job, service, shard))
        if flying:
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
        from ray.serve.exceptions import RayServeException

        self.job, self.model, self.connection = job, load_config(job.config.model), 0
        try:
            self._connect()
        except (RayServeException, TimeoutError) as error:
            raise PipelineError(
                f"--via serve: no application {job.config.app!r} on this Ray; start it there, or take --via actors"
            ) from error

    def ask(self, requests: list[ImageRequest]) -> _Answer:
        """Send rows at bulk priority, which takes what others leave; what `ends` takes."""
        return _Answer(self.handle.paint_rows.remote(requests, self.job.config.model), self.connection)

    def ends(self, requests: list[ImageRequest], answer: _Answer) -> list[End]:
        """A picture uint8 [H, W, 3] for each request, or why there is none; a service that restarts is asked again.

        Raises ServiceAwayError where it stays away, PipelineError where it has another model, or fails.
        """
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        for wait in (0.0, *_WAITS_S):
            time.sleep(wait)
            try:
                if wait and answer.connection == self.connection:
                    self._connect()
                if answer.connection != self.connection:  # lost with the one before, whoever noticed it
                    answer = self.ask(requests)
                return self._waited_for(answer)
            except (RayError, RayServeException, TimeoutError) as error:
                if isinstance(error, PipelineError):
                    raise
        raise ServiceAwayError(
            f"--via serve: the application {self.job.config.app!r} is away for {sum(_WAITS_S):.0f} s"
        )

    def _waited_for(self, answer: _Answer) -> list[End]:
        """The ends in an answer. Raises TimeoutError where the service it is to come from does not answer at all."""
        while True:
            try:
                ends = answer.response.result(timeout_s=_LOOK_S)
                return [Rejection("refused", end) if isinstance(end, str) else end for end in ends]
            except TimeoutError:
                self.handle.is_there.remote().result(timeout_s=_LOOK_S)

    def _connect(self) -> None:
        """Find the service, which is another one after a restart, and may be on another kind of device."""
        from ray import serve
        from ray.serve import context

        context._disconnect()  # Ray Serve keeps to a controller that is gone
        self.handle = serve.get_app_handle(self.job.config.app)
        self.connection += 1
        told = self.handle.describe_model.remote(self.job.config.model).result(timeout_s=_LOADING_S)
        self.numerics: Numerics = told["numerics"]
        pin(self.job.uri, self.numerics)
