"""What bulk generation costs beside the bare sampling loop, and how it grows.

usage: python benchmarks/bulk.py rate MODEL              pictures a second of the stage's workers over the bare loop
       python benchmarks/bulk.py serve-rate MODEL        the same through a running service
       python benchmarks/bulk.py workers MODEL           the same job by 2 workers over 1, each on one thread
       python benchmarks/bulk.py plan MODEL              the planner's memory and time by rows and kind of a table
       python benchmarks/bulk.py memory MODEL            the driver's memory over a whole job, by its rows; its workers
                                                         commit one shard's pictures over and over
       python benchmarks/bulk.py resume MODEL            time to find 10,000 committed shards

MODEL is the URI of a published model. `rate` takes the time between the second shard's record and the last one's, so
that starting Ray and loading the model are not in it, nor which of the first two was done first. The bare loop runs
before and after.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipelines import bulk, jobs, serve, storage
from pipelines.bulk import painting
from pipelines.bulk.job import Job
from pipelines.bulk.painting import ShardPainter, through_actors
from pipelines.bulk.plan import job_uri, plan_job
from pipelines.bulk.service import through_service
from pipelines.bulk.shards import Record, committed, record_uri
from pipelines.config import GenerateConfig, ServeConfig
from pipelines.model import load_config
from pipelines.requests import ImageRequest, open_request
from pipelines.worker import load_worker, memory
from pipelines.worker.threads import apart

SHARD, SHARDS = 64, 8
ROWS = (1_000, 1_000_000)
KINDS = ("csv", "jsonl", "parquet")
# Bytes of a cell that goes along: a table of a million rows has half a GB
CELL = 512
COMMITTED = 10_000


Through = Callable[[Job, Sequence[int]], Iterator[tuple[int, Record]]]


def main() -> None:
    """Run the question that was asked."""
    questions: dict[str, Callable[[str], None]] = {
        "rate": rate, "serve-rate": rate_by_service, "workers": scaling, "plan": planning, "plan-once": plan_once,
        "resume": resuming, "memory": driving, "memory-once": drive_once,
    }  # fmt: skip
    if len(sys.argv) != 3 or sys.argv[1] not in questions:
        sys.exit(__doc__)
    questions[sys.argv[1]](sys.argv[2])


def job_of(store: str, model: str, **settings: object) -> Job:
    """A job of some shards that the flags describe."""
    chosen = {"count": SHARD * SHARDS, "shard_size": SHARD, "name": "bench", "workers": 1, **settings}
    config = GenerateConfig(store=store, model=model, **chosen)
    return plan_job(config, job_uri(config))


def rate(model: str) -> None:
    """The stage's workers, full lanes, against nothing but the sampling loop on the same requests."""
    memory.keep()  # as the stage does
    jobs.connect()
    compare(model, "by actors", through_actors, 0.9)


def rate_by_service(model: str) -> None:
    """The same through a service with one engine."""
    jobs.connect()
    name = model.rsplit("/models/", 1)[1].split("/")[0]
    serve.start(ServeConfig(model=model, name=name, port=0))
    compare(model, "by the service", through_service, 0.85)
    serve.stop()


def compare(model: str, told: str, through: Through, goal: float) -> None:
    """One way over the bare loop, in turns, twice."""
    ratios, loop = [], partial(bare, model, SHARD * SHARDS // 4)
    for trial in range(2):
        theirs = apart(loop)
        with tempfile.TemporaryDirectory() as store:
            ours = staged(job_of(store, model), through)
        theirs = 2 / (1 / theirs + 1 / apart(loop))
        ratios.append(ours / theirs)
        line = f"trial {trial}: bare loop {theirs:.2f}, {told} {ours:.2f} pictures/s, ratio {ratios[-1]:.3f}"
        print(line, flush=True)
    print(f"ratio {sum(ratios) / len(ratios):.3f} (goal {goal})")


def bare(model: str, count: int) -> float:
    """Pictures a second of the engine alone, always full: no encoding, no files."""
    worker = load_worker(model)
    names = load_config(model).class_names or ("",)
    requests = [
        open_request(ImageRequest(prompt=names[at % len(names)], seed=at), worker.model.config).core
        for at in range(count)
    ]
    for request in requests:
        worker.engine.submit(request, "bulk")
    done, begun = 0, time.perf_counter()
    with torch.no_grad():
        while not worker.engine.idle:
            done += len(worker.engine.tick())
    return done / (time.perf_counter() - begun)


def staged(job: Job, through: Through = through_actors) -> float:
    """Pictures a second of the stage's workers or the service, from the second shard's end to the last one's."""
    times = []
    for _ in through(job, range(job.shards)):
        times.append(time.perf_counter())
    return SHARD * (len(times) - 2) / (times[-1] - times[1])


def scaling(model: str) -> None:
    """Two workers over one, each on one thread of this machine."""
    memory.keep()
    jobs.connect()
    rates = {}
    for workers in (1, 2):
        with tempfile.TemporaryDirectory() as store:
            rates[workers] = staged(job_of(store, model, workers=workers, threads=1, count=SHARD * SHARDS * workers))
        print(f"{workers} workers: {rates[workers]:.2f} pictures/s", flush=True)
    print(f"2 over 1: {rates[2] / rates[1]:.2f}; {os.cpu_count()} cores, so a worker's threads are others' too")


def planning(model: str) -> None:
    """Peak memory and time of the planner in a process of its own, by rows and kind of a table."""
    for kind in KINDS:
        for rows in ROWS:
            print(alone("plan-once", f"{model}#{rows}#{kind}"), flush=True)


def alone(question: str, model: str) -> str:
    """The last line of a question asked in a process of its own."""
    told = subprocess.run([sys.executable, __file__, question, model], capture_output=True, text=True, check=False)
    if told.returncode:
        sys.exit(told.stdout + told.stderr)
    return told.stdout.strip().splitlines()[-1]


def plan_once(model: str) -> None:
    """One plan; prints what it took."""
    memory.keep()  # as the stage does
    model, rows, kind = model.split("#")
    with tempfile.TemporaryDirectory() as folder:
        table = table_of(folder, model, int(rows), kind)
        config = GenerateConfig(store=folder, model=model, table=table, carry=["id"])
        before, begun = resident(), time.perf_counter()
        job = plan_job(config, job_uri(config))
        list(job.orders(job.shards - 1))
        seconds, size = time.perf_counter() - begun, os.path.getsize(table) / 2**20
    print(
        f"{kind} of {rows} rows, {size:.0f} MB, {job.shards} shards: planned in {seconds:.1f} s, "
        f"peak memory {resident():.0f} MB ({before:.0f} before)"
    )


def resident() -> float:
    """The most memory that this process has held, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def table_of(folder: str, model: str, rows: int, kind: str) -> str:
    """A table of so many rows with a long cell that goes along; written by a process of its own."""
    path, names = f"{folder}/t.{kind}", load_config(model).class_names or ("",)
    if os.fork() == 0:
        write_table(path, names, rows, kind)
        os._exit(0)
    os.wait()
    return path


def write_table(path: str, names: Sequence[str], rows: int, kind: str) -> None:
    """Write the rows of a table, a Parquet one as one row group, which is the hardest to read in ranges."""
    made = ((names[row % len(names)], row, f"order-{row}".ljust(CELL, "x")) for row in range(rows))
    if kind == "parquet":
        classes, seeds, ids = zip(*made, strict=True)
        columns = pa.table({"class": classes, "seed": seeds, "id": ids})
        pq.write_table(columns, path, row_group_size=rows, use_dictionary=False, compression="none")
        return
    with open(path, "w") as file:
        file.write("class,seed,id\n" if kind == "csv" else "")
        for name, seed, text in made:
            line = f"{name},{seed},{text}" if kind == "csv" else json.dumps({"class": name, "seed": seed, "id": text})
            file.write(line + "\n")


class Stamp(ShardPainter):
    """A worker that makes one shard and commits its bytes as every other's: what the driver sees is a whole job."""

    _first: dict[str, Any] | None = None

    def _shard(self, shard: int) -> Record:
        if self._first is None:
            self._first = super()._shard(shard)
            self._data = storage.read_part(self.job.uri, self._first["part"])
            return self._first
        part = storage.put_part(self.job.uri, f"part-{shard:05}", ".parquet", self._data)
        record = {**self._first, "part": {**self._first["part"], **part, "rows": len(self.job.span(shard))}}
        storage.write_bytes(record_uri(self.job.uri, shard), storage.to_json(record))
        return record


def driving(model: str) -> None:
    """Peak memory of the driver over a whole job, and again where all of it was committed before."""
    for rows in ROWS:
        print(alone("memory-once", f"{model}#{rows}"), flush=True)


def drive_once(model: str) -> None:
    """One job of two workers; prints what its driver took, and what one took that found all shards committed."""
    model, rows = model.split("#")
    painting.ShardPainter = Stamp  # type: ignore[misc]
    memory.keep()  # as the stage does
    jobs.connect()
    with tempfile.TemporaryDirectory() as store:
        config = GenerateConfig(store=store, model=model, count=int(rows), steps=1, workers=2)
        begun = time.perf_counter()
        uri = bulk.run(config).uri
        seconds, first = time.perf_counter() - begun, resident()
        manifest = os.path.getsize(f"{uri}/manifest.json") / 2**20
    print(f"{rows} rows: {seconds:.0f} s, driver's peak memory {first:.0f} MB, manifest {manifest:.1f} MB")


def resuming(model: str) -> None:
    """Time to find what is done of a job with many shards."""
    with tempfile.TemporaryDirectory() as store:
        job = job_of(store, model, count=COMMITTED * SHARD)
        for shard in range(COMMITTED):
            part = storage.put_part(job.uri, f"part-{shard:05}", ".parquet", b"%d" % shard)
            record = {"part": {**part, "rows": SHARD}, "spent": {}}
            Path(record_uri(job.uri, shard)).parent.mkdir(parents=True, exist_ok=True)
            Path(record_uri(job.uri, shard)).write_bytes(storage.to_json(record))
        before, begun = resident(), time.perf_counter()
        found = sum(1 for _ in committed(job.uri))
        seconds = time.perf_counter() - begun
        print(f"{found} shards found in {seconds:.2f} s, in {resident() - before:.0f} MB more than before")


if __name__ == "__main__":
    main()
