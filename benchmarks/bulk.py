"""What bulk generation costs beside the bare sampling loop, and how it grows.

usage: python benchmarks/bulk.py rate MODEL              pictures a second of the stage's workers over the bare loop
       python benchmarks/bulk.py workers MODEL           the same job by 2 workers over 1, each on one thread
       python benchmarks/bulk.py plan MODEL              the planner's memory and time by rows of a table
       python benchmarks/bulk.py resume MODEL            time to find 10,000 committed shards

MODEL is the URI of a published model. `rate` takes the time between the first shard's record and the last one's, so
that starting Ray and loading the model are not in it.
"""

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

import torch

from pipelines import jobs, storage
from pipelines.bulk.job import Job
from pipelines.bulk.painting import through_actors
from pipelines.bulk.plan import job_uri, plan_job
from pipelines.bulk.shards import committed, record_uri
from pipelines.config import GenerateConfig
from pipelines.model import load_config
from pipelines.requests import ImageRequest, open_request
from pipelines.worker import load_worker

SHARD, SHARDS = 64, 8
ROWS = (1_000, 100_000, 1_000_000)
COMMITTED = 10_000


def main() -> None:
    """Run the question that was asked."""
    questions: dict[str, Callable[[str], None]] = {
        "rate": rate, "workers": scaling, "plan": planning, "resume": resuming, "plan-once": plan_once,
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
    """The stage's workers, full lanes, against nothing but the sampling loop on the same requests; in turn, twice."""
    jobs.connect()
    ratios = []
    for trial in range(2):
        with tempfile.TemporaryDirectory() as store:
            theirs = bare(model, SHARD * SHARDS // 2)
            ours = staged(job_of(store, model))
        ratios.append(ours / theirs)
        print(
            f"trial {trial}: bare loop {theirs:.2f}, by actors {ours:.2f} pictures/s, ratio {ratios[-1]:.3f}",
            flush=True,
        )
    print(f"ratio {sum(ratios) / len(ratios):.3f} (goal 0.9)")


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


def staged(job: Job) -> float:
    """Pictures a second of a Ray Data pool, from the first shard's end to the last one's."""
    times = []
    for _ in through_actors(job, range(job.shards)):
        times.append(time.perf_counter())
    return SHARD * (len(times) - 1) / (times[-1] - times[0])


def scaling(model: str) -> None:
    """Two workers over one, each on one thread of this machine."""
    os.environ["OMP_NUM_THREADS"] = "1"
    jobs.connect()
    rates = {}
    for workers in (1, 2):
        with tempfile.TemporaryDirectory() as store:
            rates[workers] = staged(job_of(store, model, workers=workers, count=SHARD * SHARDS * workers))
        print(f"{workers} workers: {rates[workers]:.2f} pictures/s", flush=True)
    print(f"2 over 1: {rates[2] / rates[1]:.2f}; {os.cpu_count()} cores, so a worker's threads are others' too")


def planning(model: str) -> None:
    """Peak memory and time of the planner in a process of its own, by rows of a CSV table."""
    for rows in ROWS:
        told = subprocess.run(
            [sys.executable, __file__, "plan-once", f"{model}#{rows}"], capture_output=True, text=True, check=True
        )
        print(told.stdout.strip().splitlines()[-1], flush=True)


def plan_once(model: str) -> None:
    """One plan; prints what it took."""
    model, _, rows = model.rpartition("#")
    names = load_config(model).class_names or ("",)
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "t.csv"
        with table.open("w") as file:
            file.write("class,seed,id\n")
            for row in range(int(rows)):
                file.write(f"{names[row % len(names)]},{row},order-{row}\n")
        config = GenerateConfig(store=folder, model=model, table=str(table), carry=["id"])
        begun = time.perf_counter()
        job = plan_job(config, job_uri(config))
        list(job.orders(job.shards - 1))
        seconds = time.perf_counter() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{rows} rows, {job.shards} shards: planned in {seconds:.1f} s, peak memory {peak:.0f} MB")


def resuming(model: str) -> None:
    """Time to find what is done of a job with many shards."""
    with tempfile.TemporaryDirectory() as store:
        job = job_of(store, model, count=COMMITTED * SHARD)
        for shard in range(COMMITTED):
            part = storage.put_part(job.uri, f"part-{shard:05}", ".parquet", b"%d" % shard)
            record = {"part": {**part, "rows": SHARD}, "spent": {}}
            Path(record_uri(job.uri, shard)).parent.mkdir(parents=True, exist_ok=True)
            Path(record_uri(job.uri, shard)).write_bytes(storage.to_json(record))
        begun = time.perf_counter()
        found = committed(job.uri)
        print(f"{len(found)} shards found in {time.perf_counter() - begun:.2f} s")


if __name__ == "__main__":
    main()
