"""Shards made and committed by workers: a pool on the whole cluster, or one in this process."""

import contextlib
import json
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import torch

from pipelines.bulk.engine import Shared
from pipelines.bulk.inputs import read_requests
from pipelines.bulk.job import Job
from pipelines.bulk.numerics import as_pinned, pin, pinned
from pipelines.bulk.shards import Record, commit_shard, record_of
from pipelines.config import GenerateConfig, PipelineError, failure, ray_address, status_of
from pipelines.model import load_model
from pipelines.worker import Worker, load_worker, one_of_a_pool, pool_size
from pipelines.worker.threads import apart

# Shards that a worker has at once: rows of the second fill the batch while the last of the first are made.
_AT_ONCE = 2
# Tasks of Ray at most, each some neighbouring shards: what the driver holds does not grow with the table.
_TASKS = 1000
Made = tuple[int, Record]


class ShardPainter:
    """A worker of the stage's own: makes and commits whole shards on its device, several at once by threads."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.refusal: PipelineError | None = None
        worker = _worker(job)
        self.numerics, self.shared = worker.profile, Shared(worker)
        try:
            pin(job.uri, self.numerics)
        except PipelineError as error:  # told with each shard: Ray would start an actor again that fails here
            self.refusal = error

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Row with the number of a `shard` -> that number and its record, or the `fault` that kept it from being."""
        shard = int(row["shard"])
        try:
            if self.refusal:
                raise self.refusal
            return {"shard": shard, "record": json.dumps(self._shard(shard)), "fault": "", "status": 0}
        except PipelineError as error:
            return {"shard": shard, "record": "", "fault": str(error), "status": status_of(error)}

    def _shard(self, shard: int) -> Record:
        """A shard's record: another run's of the same job where there is one by now."""
        found = record_of(self.job.uri, shard)
        if found is not None:
            return found
        orders = self.job.orders(shard)
        requests = read_requests(orders)
        painted = self.shared.paint(requests)
        spent = {"calls": painted.calls, "seconds": self.shared.take_seconds()}
        return commit_shard(self.job, shard, orders, requests, painted.ends, self.numerics, spent)


def _worker(job: Job) -> Worker:
    """The model on a device; lanes and threads of which no flag says how many are those of the job's first worker."""
    there = pinned(job.uri)
    worker = _loaded(as_pinned(job.config, there))
    if there is not None:
        return worker
    with contextlib.suppress(PipelineError):
        pin(job.uri, worker.profile)
    first = pinned(job.uri)
    return worker if first == worker.profile else _loaded(as_pinned(job.config, first))


def _loaded(config: GenerateConfig) -> Worker:
    return load_worker(config.model, lanes=config.lanes, threads=config.threads)


def through_actors(job: Job, missing: Sequence[int]) -> Iterator[Made]:
    """Shards made by workers, one per device, as they come. Raises PipelineError on a fault.

    They are a Ray Data pool; one in this process where one is all that there would be.
    """
    if not missing:
        return
    # A damaged model is an error here, in one line, and not of an actor that starts again.
    apart(partial(load_model, job.config.model))
    size = pool_size(job.config.workers, len(missing))
    for row in (_here if size == 1 and ray_address() is None else _by_pool)(job, missing, size):
        if row["fault"]:
            raise failure(row["fault"], row["status"])
        yield int(row["shard"]), json.loads(row["record"])


def _by_pool(job: Job, missing: Sequence[int], size: int) -> Iterator[dict[str, Any]]:
    """What a Ray Data pool of painters says of each shard."""
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    pool = ray.data.ActorPoolStrategy(
        size=size,
        max_tasks_in_flight_per_actor=_AT_ONCE,
        max_concurrent_calls_per_actor=_AT_ONCE,
        enable_true_multi_threading=True,
    )
    rows = ray.data.from_items([{"shard": shard} for shard in missing], override_num_blocks=min(len(missing), _TASKS))
    yield from rows.map(ShardPainter, fn_constructor_args=(job,), compute=pool, **one_of_a_pool()).iter_rows()


def _here(job: Job, missing: Sequence[int], _: int) -> Iterator[dict[str, Any]]:
    """What a painter in this process says of each shard."""
    threads, painter = torch.get_num_threads(), apart(partial(ShardPainter, job))
    pool, flying = ThreadPoolExecutor(_AT_ONCE), deque[Future[dict[str, Any]]]()
    try:
        for shard in missing:
            flying.append(pool.submit(painter, {"shard": shard}))
            if len(flying) > _AT_ONCE:
                yield flying.popleft().result()
        while flying:
            yield flying.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        painter.shared.close()
        torch.set_num_threads(threads)
