"""The stage itself: what is done already, what is left to do, and in which order."""

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pipelines import storage
from pipelines.capacity import capacity
from pipelines.config import AWAY_STATUS, IngestConfig, Outcome, PipelineError, failure
from pipelines.ingest import shards
from pipelines.ingest.duplicates import Part
from pipelines.ingest.manifest import Record, accounts, check_found, check_rejected, make_manifest, summary
from pipelines.ingest.plan import SPLITS, Plan, make_plan
from pipelines.ingest.shards import row_group_size, write_shard
from pipelines.ingest.sources import Unit, list_sources, units
from pipelines.ingest.units import read_unit, record_uri
from pipelines.ingest.work import Work, earlier, listing_digest, plan_work
from pipelines.progress import Progress

_FAULTS_TO_STOP = 8
_RECORDS_AT_A_TIME = 32
_TASKS_A_CORE = 1.5


def find(config: IngestConfig) -> Outcome | None:
    """The dataset of these settings and sources, if it is there.

    Raises StorageError where a source does not exist, PipelineError where it has more rejected than is allowed.
    """
    listing = list_sources(config)
    done = next(
        (dataset for dataset in earlier(config) if dataset.manifest["sources"]["sha256"] == listing_digest(listing)),
        None,
    )
    if done is None:
        return None
    check_found(config, done.uri, done.manifest)
    return Outcome(uri=done.uri, found=True)


def run(config: IngestConfig) -> Outcome:
    """Read what is new at the sources and publish the dataset; goes on where a run that was stopped left off.

    Raises PipelineError where no picture can be kept, where more are rejected than allowed, or where the storage
    failed for longer than it is retried; what was done by then is kept for the next run.
    """
    work = plan_work(config)
    if storage.is_published(work.uri):  # since `find` looked
        return _told_found(work)
    try:
        manifest = _make(work)
        outcome = storage.publish(work.uri, manifest)
    except Exception:
        # Another run of the same work may have finished it and cleared the staging folder under this one's hands.
        if not storage.is_published(work.uri):
            raise
        return _told_found(work)
    if outcome != "created":
        return _told_found(work)
    storage.remove_folder(work.staging)
    print(f"{summary(manifest)}\nlook at it: {storage.join(work.uri, 'dataset.html')}", flush=True)
    return Outcome(uri=work.uri, found=False)


def _make(work: Work) -> dict[str, Any]:
    """All the work up to the manifest."""
    config = work.config
    if work.parent:
        known = len(work.listing.taken) - len(work.new.taken)
        print(f"ingest: builds on {work.parent.uri}: {known} objects known, {len(work.new.taken)} to read", flush=True)
    todo = list(units(config, work.new))
    _read(work, todo)
    records = _records(work.staging, [record_uri(work.staging, unit.number) for unit in todo])
    _check_fields(config, records)
    plan = _plan(work, records)
    _tell_of_fields(config, records, plan)
    counts, reasons = accounts(records, plan)
    check_rejected(config, work.before, counts, reasons, at_end=True)
    if not plan.counts["train"] and not work.parent:
        why = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
        why = why or ("all held out" if counts["found"] else "the shards and tables are empty")
        raise PipelineError(f"{', '.join(config.source)}: no picture to train on ({why})")
    made = _write_shards(work, plan)
    return make_manifest(work, records, plan, made, counts, reasons)


def _read(work: Work, todo: list[Unit]) -> None:
    """Read the units that have no record yet. Raises PipelineError where some could not be read."""
    done = {info.uri for info in storage.list_if_any(storage.join(work.staging, "units")) if info.uri.endswith(".json")}
    left = [unit for unit in todo if record_uri(work.staging, unit.number) not in done]
    sized = all(unit.bytes for unit in todo)  # of a table's rows the sizes are not known
    total = sum(unit.bytes if sized else 1 for unit in todo)
    start = total - sum(unit.bytes if sized else 1 for unit in left)
    scale, name = (1, "units") if not sized else (10**6, "MB") if total >= 10**7 else (10**3, "kB")
    bar = Progress("ingest", total // scale, name, done=start // scale, every=2.0)
    found = rejected = 0
    faults: list[tuple[str, int]] = []
    seen = start
    kwargs = {"config": work.config, "folder": work.staging}
    for row in _on_ray(read_unit, [unit.to_row() for unit in left], kwargs, work.config.readers):
        seen, found, rejected = seen + (row["bytes"] if sized else 1), found + row["found"], rejected + row["rejected"]
        faults += [(row["fault"], row["status"])] if row["fault"] else []
        bar.update(seen // scale, f"{found} pictures, {found / max(bar.seconds(), 1e-9):.0f}/s")
        if len(faults) >= _FAULTS_TO_STOP:
            break
        check_rejected(work.config, work.before, Counter(found=found, rejected=rejected), Counter(), at_end=False)
    _raise_faults("ingest", faults)


def _raise_faults(stage: str, faults: list[tuple[str, int]]) -> None:
    """Raise AwayError where all faults may pass, else PipelineError where there are some."""
    if faults:
        lasting = [status for _, status in faults if status != AWAY_STATUS]
        raise failure(
            f"{stage}: {len(faults)} units could not be done; what was done is kept, run again to go on from here. "
            + "; ".join(sorted(fault for fault, _ in faults)[:_FAULTS_TO_STOP]),
            lasting[0] if lasting else AWAY_STATUS,
        )


def _on_ray(
    call: Callable[..., Any], rows: list[dict[str, Any]], kwargs: dict[str, Any], at_once: int
) -> Iterator[Any]:
    """`call` on every row by Ray Data, a task each; what it returns, as it comes."""
    import ray
    import ray.data

    if not rows:
        return
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = False
    # A task waits between its end and the next one's start, and for what it reads: more tasks than cores fill the gaps.
    cores = capacity().usable_cpus
    cpus = max(0.01, cores / (at_once or _TASKS_A_CORE * cores))
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    yield from dataset.map(call, fn_kwargs=kwargs, num_cpus=cpus).iter_rows()


def _records(staging: str, uris: list[str]) -> list[dict[str, Any]]:
    with ThreadPoolExecutor(_RECORDS_AT_A_TIME) as pool:
        return list(pool.map(storage.read_json, uris))


def _check_fields(config: IngestConfig, records: list[Record]) -> None:
    """Raise where the field of the class was chosen by name, but no sample of any shard has it."""
    fields = {name for record in records for name in record["fields"]}
    default = IngestConfig.model_fields["class_field"].default
    if config.class_field != default and fields and config.class_field not in fields:
        raise PipelineError(
            f"--class-field {config.class_field}: no sample has this field; there are {', '.join(sorted(fields))}"
        )


def _tell_of_fields(config: IngestConfig, records: list[Record], plan: Plan) -> None:
    """Say which fields there are where no picture got a class: it may stand under another name."""
    others = {name for record in records for name in record["fields"]} - {config.image_field, config.caption_field}
    if others and not plan.classes and config.labels != "ignored":
        print(f"ingest: no picture has a class; --class-field may name one of {', '.join(sorted(others))}", flush=True)


def _plan(work: Work, records: list[Record]) -> Plan:
    """The plan of the shards: an earlier run's where it got that far."""
    uri = storage.join(work.staging, "plan.json")
    if storage.exists(uri):
        told = storage.read_json(uri)
        return Plan(**{**told, "classes": Counter(told["classes"]), "counts": Counter(told["counts"])})
    new = [Part(work.staging, part["name"], part["sha256"], False) for record in records for part in record["keys"]]
    old, known = [], dict[str, int]()
    if work.parent:
        places = [work.parent.place(shard) for split in SPLITS for shard in work.parent.manifest["shards"][split]]
        old = [Part(folder, shard["name"], shard["sha256"], True) for folder, shard in places]
        known = work.parent.manifest["classes"]
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    plan = make_plan(work.config, work.uri, work.staging, new, old, known)
    storage.write_bytes(uri, storage.to_json(plan.as_json()))
    return plan


def _write_shards(work: Work, plan: Plan) -> dict[str, list[dict[str, Any]]]:
    """Write the shards that have no record yet; all of them in order, for the manifest."""
    rows = [
        {
            "uri": work.uri, "staging": work.staging, "split": split, "number": number, "name": part["name"],
            "sha256": part["sha256"], "rows": part["rows"], "encoding": work.config.stored_as,
            "row_group": row_group_size(work.config.resolution),
            "first": len(work.parent.manifest["shards"][split]) if work.parent else 0,
        }
        for split in SPLITS for number, part in enumerate(plan.shards[split])
    ]  # fmt: skip
    done = {info.uri for info in storage.list_if_any(storage.join(work.staging, "shards"))}
    left = [row for row in rows if shards.record_uri(row) not in done]
    bar = Progress("shards", len(rows), "shards", done=len(rows) - len(left), every=2.0)
    faults: list[tuple[str, int]] = []
    for row in _on_ray(write_shard, left, {}, work.config.readers):
        faults += [(row["fault"], row["status"])] if row["fault"] else []
        bar.update(bar.done + 1)
    _raise_faults("shards", faults)
    records = _records(work.staging, [shards.record_uri(row) for row in rows])
    return {
        split: [record for row, record in zip(rows, records, strict=True) if row["split"] == split] for split in SPLITS
    }


def _told_found(work: Work) -> Outcome:
    """The dataset that another run has published meanwhile; what this one staged since is cleared away.

    Raises PipelineError where it has more rejected than is allowed.
    """
    storage.remove_folder(work.staging)
    check_found(work.config, work.uri, storage.read_manifest(work.uri, "dataset"))
    print(f"ingest: another run published {work.uri} first; this one's is not needed", flush=True)
    return Outcome(uri=work.uri, found=True)
