"""The dry run: all rows checked and counted, a tick measured, and time and cost told; nothing is made or written."""

import os
import random
import time
from collections.abc import Iterator
from typing import Any

import torch

from pipelines import storage
from pipelines.bulk.job import Job, classes_in_turn
from pipelines.bulk.plan import Bad, checked_rows, job_uri, refused_rows
from pipelines.bulk.rows import stand_in
from pipelines.config import GenerateCommand, ray_address
from pipelines.image_sets import FILES, request_columns
from pipelines.model import load_config, model_digest
from pipelines.progress import duration, print_line
from pipelines.requests import ImageRequest, open_request
from pipelines.worker import Worker, load_worker, pool_size

_SAMPLE = 64
_TICKS = 4
_FEWEST_CALLS = 0.1


def rehearse(command: GenerateCommand) -> None:
    """Print rows, shards, and the time and cost to expect. Raises PipelineError on rows that are wrong."""
    uri = job_uri(command)
    if storage.is_published(uri):
        print_line(f"generate: found {uri}; nothing is left to make")
        return
    rows, refused, sample = _counted(command, uri)
    shards = -(-rows // command.shard_size)
    print_line(f"{rows} rows in {shards} shards of {command.shard_size}" + (f", {refused} left out" if refused else ""))
    print_line("\n".join(_expected(command, rows - refused, shards, sample)))


def _counted(command: GenerateCommand, uri: str) -> tuple[int, int, list[ImageRequest]]:
    """Rows, those that are wrong, and some requests as they will be made."""
    if command.table is None:
        model = model_digest(storage.read_manifest(storage.normalise(command.model), "model"))
        job = Job(command, uri, model, classes_in_turn(command))
        places = sorted({job.shards * at // 8 for at in range(8)})
        orders = [order for shard in places for order in job.orders(shard)[: _SAMPLE // 8]]
        return job.rows, 0, [ImageRequest(**order.asked) for order in orders]
    return _counted_in_table(command, command.table)


def _counted_in_table(command: GenerateCommand, table: str) -> tuple[int, int, list[ImageRequest]]:
    """The same of a table; its pictures are not read, one of the model's size stands for them."""
    info, bad, rows, sample = storage.stat(table), Bad(), 0, list[dict[str, Any]]()
    chance = random.Random(0)  # rows of a sorted table may cost differently, so the sample is of all
    model = model_digest(storage.read_manifest(storage.normalise(command.model), "model"))
    with storage.local_copy(info) as path:
        for row in checked_rows(command, info, path, model):
            rows += 1
            bad.add([row])
            place = chance.randrange(rows)
            if row["refused"]:
                continue
            if len(sample) < _SAMPLE:
                sample.append(row)
            elif place < _SAMPLE:
                sample[place] = row
    if not rows or (bad.count and not command.skip_bad):
        raise refused_rows(table, rows, bad)
    picture = stand_in(load_config(command.model).unet.resolution)
    return rows, bad.count, [_as_asked(row, picture) for row in sample]


def _as_asked(row: dict[str, Any], picture: bytes) -> ImageRequest:
    """A staged row as a request, with `picture` for each file that it names."""
    asked = {name: row[name] for name in request_columns() if row[name] is not None}
    files = {name: picture for name in FILES if f"{name}_uri" in row or f"{name}_bytes" in row}
    return ImageRequest(**{"seed": 0, **asked}, **files)


def _expected(command: GenerateCommand, rows: int, shards: int, sample: list[ImageRequest]) -> Iterator[str]:
    """The time and cost of so many rows like the sample, by some ticks of an engine on this machine."""
    if not sample:
        yield "no row to make"
        return
    worker = load_worker(command.model, lanes=command.lanes, threads=command.threads)
    calls, rate = _measured(worker, sample)
    workers = min(shards, _workers(command, worker))
    seconds = rows * calls / rate
    yield f"{calls:.1f} denoiser calls a picture; measured here {rate:.0f} calls/s ({rate / calls:.1f} pictures/s)"
    yield f"device time {duration(seconds)}; with {workers} such devices ready in about {duration(seconds / workers)}"
    if command.price is not None:
        yield f"cost about {seconds / 3600 * command.price:.2f}, at {command.price} a device hour"
    yield "nothing was made; give the same command without --dry-run"


def _measured(worker: Worker, sample: list[ImageRequest]) -> tuple[float, float]:
    """Denoiser calls a picture, and calls a second with full lanes, by ticks after one to warm up."""
    engine, config = worker.engine, worker.model.config
    asked = [open_request(request, config).core for request in sample]
    tickets = [engine.submit(request, "bulk") for request in asked]
    calls = max(engine.pending_calls / len(tickets), _FEWEST_CALLS)
    for _ in range(int(engine.lanes * (_TICKS + 1) / (calls * len(asked)))):
        tickets += [engine.submit(request, "bulk") for request in asked]
    engine.tick()
    before, begun = engine.pending_calls, time.perf_counter()
    for _ in range(_TICKS):
        engine.tick()
    seconds, done = time.perf_counter() - begun, before - engine.pending_calls
    for ticket in tickets:
        engine.cancel(ticket)
    return calls, max(done, 1) / seconds


def _workers(command: GenerateCommand, worker: Worker) -> int:
    """Devices that the job would have: those asked for, or of this machine where it is no part of a cluster."""
    if command.workers:
        return command.workers
    if ray_address() is not None:
        import ray

        ray.init(logging_level="WARNING", ignore_reinit_error=True)
        return pool_size(0, 2**31)
    return torch.cuda.device_count() if worker.device.type == "cuda" else max(1, (os.cpu_count() or 1) // 2)
