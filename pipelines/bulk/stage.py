"""The stage itself: what is done already, what is left, when to stop, and the manifest, written last."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipelines import __version__, storage
from pipelines.bulk.bill import Bill
from pipelines.bulk.job import STAGING, Job
from pipelines.bulk.metrics import BulkMetrics
from pipelines.bulk.page import PAGE, write_page
from pipelines.bulk.painting import Made, through_actors
from pipelines.bulk.plan import job_uri, plan_job
from pipelines.bulk.service import through_service
from pipelines.bulk.shards import Numerics, Record, committed, write_metadata
from pipelines.config import GenerateConfig, InterruptedRunError, Outcome, PipelineError, what
from pipelines.progress import Progress, print_line

_MOST_PNGS = 100_000
_PAINT: dict[str, Callable[[Job, Sequence[int]], Iterator[Made]]] = {
    "actors": through_actors, "serve": through_service,
}  # fmt: skip


def find(config: GenerateConfig) -> Outcome | None:
    """The images of these settings, this model and this table, if they are published."""
    uri = job_uri(config)
    return Outcome(uri=uri, found=True) if storage.is_published(uri) else None


def run(config: GenerateConfig) -> Outcome:
    """Make all shards that are not there yet and publish them; goes on where a run that was stopped left off.

    Raises PipelineError on rows that are wrong, before anything is made; where more turn out to be impossible than is
    allowed; and where storage or devices fail for longer than is retried. What was done by then is kept.
    """
    uri = job_uri(config)
    try:
        if not storage.is_published(uri):
            return _made(plan_job(config, uri))
    except Exception:
        # Another run of the same job may have finished it and cleared the staging folder under this one's hands.
        if not storage.is_published(uri):
            raise
    return _told_found(uri)


def _made(job: Job) -> Outcome:
    """All the work of a job."""
    config = job.config
    if config.format == "png" and job.rows > _MOST_PNGS:
        raise PipelineError(f"--format png is for sets up to {_MOST_PNGS} pictures, not {job.rows}; take webdataset")
    done = Done(Bill(config.price))
    try:
        _make(job, done)
        return _publish(job, [done.parts[shard] for shard in range(job.shards)], done.bill)
    except KeyboardInterrupt as error:
        raise InterruptedRunError(f"generate: stopped; {_kept(job, done)}") from error
    except Exception:
        if done.parts and not storage.is_published(job.uri):
            print_line(f"generate: {_kept(job, done)}")
        raise


@dataclass
class Done:
    """What is done of a job: the bill, and of each shard its entry in the manifest alone, as there may be millions."""

    bill: Bill
    parts: dict[int, dict[str, Any]] = field(default_factory=dict)
    numerics: Numerics = field(default_factory=dict)

    def add(self, shard: int, record: Record) -> None:
        """Add a shard; all have one numerics profile, which is kept once."""
        self.bill.add(record)
        part = record["part"]
        if part["numerics"] == self.numerics:
            part = {**part, "numerics": self.numerics}
        self.numerics, self.parts[shard] = part["numerics"], part


def _make(job: Job, done: Done) -> None:
    """Find what earlier runs made, and make the shards that are missing."""
    for shard, record in committed(job.uri):
        done.add(shard, record)
    bill, metrics = done.bill, BulkMetrics(job.config.name)
    progress = Progress("generate", job.rows, "rows" if job.table else "pictures", done=bill.rows)
    _check_rejected(job, bill)
    metrics.tell(bill, job.rows)
    missing = [shard for shard in range(job.shards) if shard not in done.parts]
    for shard, record in _PAINT[job.config.via](job, missing):
        done.add(shard, record)
        metrics.tell(bill, job.rows)
        progress.update(bill.rows, bill.figures(job.rows))
        _check_rejected(job, bill)


def _check_rejected(job: Job, bill: Bill) -> None:
    """Raise PipelineError where more rows turned out to be impossible than is allowed."""
    limit = job.config.max_rejected
    share = float(limit.removesuffix("%"))
    most = share / 100 * job.rows if limit.endswith("%") else share
    if bill.rejected - bill.skipped > most:
        raise PipelineError(
            f"{job.uri}: {bill.rejected - bill.skipped} of {job.rows} rows cannot be made, more than --max-rejected "
            f"{limit}; rejected/ there says why; mend the table, or allow more"
        )


def _publish(job: Job, parts: list[dict[str, Any]], bill: Bill) -> Outcome:
    """The bill, the page, and the manifest, written last."""
    config = job.config
    reasons = sum((Counter(part.get("reasons", {})) for part in parts), Counter[str]())
    counts = {"rows": job.rows, "made": bill.pictures, "rejected": bill.rejected}
    table = None if job.table is None else {"uri": config.table, "digest": job.table.digest}
    manifest = {
        "kind": "images", "schema": 2, "name": config.name, "code": __version__, "settings": what(config),
        "format": config.format, "rows": job.rows, "counts": counts, "reasons": dict(reasons), "calls": bill.calls,
        "parts": parts, "model": {"uri": config.model, "digest": job.model}, "table": table,
    }  # fmt: skip
    if config.format == "png":
        manifest["metadata"] = write_metadata(job.uri, parts)
    storage.write_bytes(storage.join(job.uri, "bill.json"), storage.to_json(bill.as_json()))
    write_page(job.uri, manifest, bill)
    if storage.publish(job.uri, manifest) != "created":
        return _told_found(job.uri)
    storage.remove_folder(storage.join(job.uri, STAGING))
    for line in _summary(job, manifest, bill):
        print_line(line)
    return Outcome(uri=job.uri, found=False)


def _summary(job: Job, manifest: dict[str, Any], bill: Bill) -> Iterator[str]:
    """What came out, and what it cost."""
    yield f"generate: {bill.pictures} pictures in {len(manifest['parts'])} shards at {job.uri}"
    if bill.rejected:
        why = ", ".join(f"{count} {reason}" for reason, count in sorted(manifest["reasons"].items()))
        yield f"generate: {bill.rejected} of {job.rows} rows rejected ({why}); each with its reason in rejected/"
    yield f"generate: {bill.figures(job.rows)}; look at it: {storage.join(job.uri, PAGE)}"


def _kept(job: Job, done: Done) -> str:
    """What there is to go on from."""
    count = f"{len(done.parts)} of {job.shards} shards"
    return f"{count} are done and kept at {job.uri}; give the same command again to go on"


def _told_found(uri: str) -> Outcome:
    """The images that another run has published meanwhile; what this one staged since is cleared away."""
    storage.remove_folder(storage.join(uri, STAGING))
    print_line(f"generate: another run published {uri} first; this one's is not needed")
    return Outcome(uri=uri, found=True)
