"""The verify command: an image set read whole again, every byte compared with what was promised, every row counted."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from pipelines import storage
from pipelines.config import PipelineError, VerifyConfig
from pipelines.image_sets import Row, rejected_of, rows_of
from pipelines.images import ImageError, png_texts
from pipelines.progress import Progress, print_line

_SHOWN = 20


def run(config: VerifyConfig) -> None:
    """Read an image set whole and say what was counted. Raises PipelineError with all that is not as promised."""
    manifest = storage.read_manifest(config.uri, "images")
    progress = Progress("verify", len(manifest["parts"]), "parts")
    faults, counts = list[str](), Counter[str]()
    for number, part in enumerate(manifest["parts"]):
        faults += _part_faults(config.uri, manifest, number, part, counts)
        progress.update(number + 1)
    promised = manifest.get("counts", {"rows": manifest["rows"], "made": manifest["rows"], "rejected": 0})
    for name in ("made", "rejected"):
        if counts[name] != promised[name]:
            faults.append(f"{counts[name]} rows {name}, but the manifest says {promised[name]}")
    if faults:
        more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise PipelineError(f"{config.uri}: {len(faults)} faults: {'; '.join(faults[:_SHOWN])}{more}")
    print_line(
        f"verify: {config.uri} is whole: {promised['rows']} rows = {counts['made']} pictures + {counts['rejected']} "
        f"rejected, in {len(manifest['parts'])} shards, {counts['bytes']} bytes"
    )


def _part_faults(
    uri: str, manifest: dict[str, Any], number: int, part: dict[str, Any], counts: Counter[str]
) -> Iterator[str]:
    """What is wrong with a part, in words; `counts` is added to."""
    size = manifest["settings"]["shard_size"]
    wanted = set(range(number * size, min((number + 1) * size, manifest["rows"])))
    try:
        rows, rejected = list(rows_of(uri, manifest, part)), rejected_of(uri, part)
    except PipelineError as error:
        yield str(error)
        return
    counts.update(made=len(rows), rejected=len(rejected), bytes=sum(len(row["image"]["bytes"]) for row in rows))
    seen = Counter(row["row"] for row in (*rows, *rejected))
    yield from (f"{part['name']}: row {row} is there {count} times" for row, count in seen.items() if count > 1)
    yield from (f"{part['name']}: row {row} is missing" for row in sorted(wanted - set(seen)))
    yield from (f"{part['name']}: row {row} does not belong there" for row in sorted(set(seen) - wanted))
    yield from (f"{part['name']}: row {row['row']}: {told}" for row in rows for told in _row_faults(manifest, row))


def _row_faults(manifest: dict[str, Any], row: Row) -> Iterator[str]:
    """What is wrong with a picture."""
    data = row["image"]["bytes"]
    if "sha256" in row and storage.digest(data) != row["sha256"]:
        yield "the picture is not that of its digest"
        return
    try:
        texts = png_texts(data)
    except ImageError as error:
        yield str(error)
        return
    told = {"model": manifest["model"]["digest"], "seed": str(row["seed"])}
    told |= {"settings": row["settings"]} if "settings" in row else {}
    yield from (f"the picture's {name} is not the row's" for name in told if texts.get(name) != told[name])
