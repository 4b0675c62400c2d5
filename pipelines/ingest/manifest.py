"""The accounts of a run, and the dataset's manifest."""

import json
import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

from pipelines import __version__, storage
from pipelines.cells import printable
from pipelines.config import IngestConfig, PipelineError, what
from pipelines.ingest import page
from pipelines.ingest.plan import SPLITS, Lines, Plan
from pipelines.ingest.shards import row_group_size
from pipelines.ingest.work import VERSION, Work, sources_table

Record = dict[str, Any]


def summary(manifest: dict[str, Any]) -> str:
    """What became of every item of a dataset, in a line; what is incomplete or was left aside, in further ones."""
    counts = manifest["counts"]
    why = "".join(f", {count} {reason}" for reason, count in manifest["reasons"].items())
    lines = [
        f"ingest: found {counts['found']} = kept {counts['kept']} + rejected {counts['rejected']}"
        f" + duplicates {counts['duplicates']}{why}"
    ]
    for shard in manifest["incomplete"]:
        missing = "an unknown number" if shard["missing"] is None else shard["missing"]
        lines.append(
            f"ingest: {shard['uri']} is incomplete after {shard['read']} items, {missing} missing: {shard['error']}"
        )
    if manifest["ignored"]:
        lines.append(
            f"ingest: {manifest['ignored']['rows']} objects are neither pictures nor shards and were left aside"
        )
    return "\n".join(lines)


def accounts(records: list[Record], plan: Plan) -> tuple[Counter[str], Counter[str]]:
    """found = kept + rejected + duplicates: found is counted by the readers, the others where they were decided.

    Raises PipelineError where the two do not agree.
    """
    reasons: Counter[str] = Counter()
    for record in records:
        reasons.update(record["reasons"])
    if plan.counts["rare"]:
        reasons["rare_class"] = plan.counts["rare"]
    counts = Counter(
        found=sum(record["found"] for record in records), kept=plan.counts["kept"], rejected=reasons.total(),
        duplicates=plan.counts["duplicates"],
    )  # fmt: skip
    if counts["found"] != counts["kept"] + counts["rejected"] + counts["duplicates"]:
        raise PipelineError(
            f"ingest: the counts do not add up: {dict(counts)}; nothing was published, please report it"
        )
    return counts, reasons


def check_rejected(
    config: IngestConfig, before: Record, counts: Counter[str], reasons: Counter[str], at_end: bool
) -> None:
    """Raise where more was rejected than `max_rejected` allows; a share can only be judged at the end.

    It is the dataset that is judged: what was rejected in an earlier one (`before`, its manifest) counts as well.
    """
    told = _too_many(config, counts + Counter(before.get("counts")), reasons + Counter(before.get("reasons")), at_end)
    if told:
        raise PipelineError(
            f"{told}; nothing was published; a higher --max-rejected goes on from here without reading again"
        )


def check_found(config: IngestConfig, uri: str, manifest: Record) -> None:
    """Raise where a finished dataset, made with another `max_rejected`, has more rejected than this one allows."""
    told = _too_many(config, Counter(manifest["counts"]), Counter(manifest["reasons"]), at_end=True)
    if told:
        raise PipelineError(f"{told}; they are listed in {storage.join(uri, 'rejected')}")


def _too_many(config: IngestConfig, counts: Counter[str], reasons: Counter[str], at_end: bool) -> str:
    limit = config.max_rejected
    if limit is None or (limit.endswith("%") and not at_end):
        return ""
    most = float(limit[:-1]) / 100 * counts["found"] if limit.endswith("%") else float(limit)
    if counts["rejected"] <= most:
        return ""
    why = "".join(f", {count} {reason}" for reason, count in sorted(reasons.items()))
    told = f"ingest: {counts['rejected']} of {counts['found']} items are rejected{why}"
    return f"{told}; --max-rejected {limit} allows {math.floor(most)}"


def make_manifest(
    work: Work, records: list[Record], plan: Plan, made: dict[str, list[dict[str, Any]]],
    counts: Counter[str], reasons: Counter[str],
) -> dict[str, Any]:  # fmt: skip
    """The dataset's manifest; pages and lists that it names are written first."""
    config, before = work.config, work.before
    sums = [own + old for own, old in zip(plan.sums, before.get("sums", (0, 0)), strict=True)]
    train = plan.counts["train"] + before.get("train", 0)
    mean, sigma = _mean_and_sigma(sums, train * 3 * config.resolution**2)
    old_shards = work.parent.shards_seen_from_beside() if work.parent else {split: [] for split in SPLITS}
    taken = work.listing.taken
    manifest = {
        "kind": "dataset", "schema": 2, "version": VERSION, "name": config.name, "code": __version__,
        "settings": what(config), "resolution": config.resolution, "encoding": config.stored_as,
        "row_group": row_group_size(config.resolution), "mean": mean, "sigma_data": sigma, "sums": sums, "train": train,
        "classes": _added(before.get("classes", {}), plan.classes),
        "counts": _added(before.get("counts", {}), counts), "reasons": _added(before.get("reasons", {}), reasons),
        "kinds": _added(before.get("kinds", {}), *(record["kinds"] for record in records)),
        "notes": _added(before.get("notes", {}), *(record["notes"] for record in records)),
        "incomplete": before.get("incomplete", []) + [told for record in records if (told := record["incomplete"])],
        "shards": {split: old_shards[split] + made[split] for split in SPLITS},
        "parent": work.parent.digest if work.parent else None,
        "sources": {"rows": len(taken), **_sources(work)},
        "inputs": {"source": config.source, "objects": len(taken), "bytes": sum(info.size for info in taken)},
        "rejected": _rejected(work, records, plan), "duplicates": plan.duplicates,
        "ignored": _ignored(work),
    }  # fmt: skip
    return page.add_pages(manifest, work.uri, work.staging, plan.shown, work.parent)


def _added(*parts: dict[str, int]) -> dict[str, int]:
    """Sums by name, sorted by name."""
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part)
    return dict(sorted(total.items()))


def _mean_and_sigma(sums: Iterable[int], values: int) -> tuple[float, float]:
    """Mean and standard deviation of bytes as values in [-1, 1], from their exact sum and sum of squares."""
    total, squares = sums
    mean = total / max(values, 1)
    variance = squares / max(values, 1) - mean**2
    return mean / 127.5 - 1, max(variance, 0.0) ** 0.5 / 127.5


def _rejected(work: Work, records: list[Record], plan: Plan) -> list[dict[str, Any]]:
    """The rejected rows of all units in order, as parts of the dataset."""
    lines = Lines(work.uri, "rejected/rejected")
    for record in records:
        for part in record["rejected"]:
            lines.add([json.loads(line) for line in storage.read_part(work.staging, part).splitlines()])
    return lines.close() + plan.rare


def _sources(work: Work) -> dict[str, Any]:
    return storage.put_part(work.uri, "sources", ".parquet", sources_table(work.listing))


def _ignored(work: Work) -> dict[str, Any] | None:
    """The list of objects that are neither pictures nor shards; None where there are none."""
    rows = [{"uri": printable(info.uri), "size": info.size} for info in work.listing.ignored]
    lines = Lines(work.uri, "rejected/ignored")
    lines.add(rows)
    parts = lines.close()
    return {"parts": parts, "rows": len(rows)} if parts else None
