"""The ingest stage: Ray Data reads pictures from their sources, checks and resizes them, and writes a dataset."""

import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import __version__, storage
from pipelines.config import IngestConfig, Outcome, PipelineError, identity, what
from pipelines.dataset import ROW_GROUP, SCHEMA
from pipelines.images import SUFFIXES, ImageError, decode, fit, to_floats, to_png
from pipelines.progress import Progress

VERSION = 1
_FILES_IN_UNIT = 256
_BUCKETS = 10_000
Row = dict[str, Any]


def find(config: IngestConfig) -> Outcome | None:
    """The dataset of these settings and sources, if it is there. Raises StorageError where a source does not exist."""
    uri = _uri(config, _sources(config))
    return Outcome(uri=uri, found=True) if storage.is_published(uri) else None


def run(config: IngestConfig) -> Outcome:
    """Read all sources and publish the dataset. Raises PipelineError where no picture can be kept."""
    sources = _sources(config)
    units = _units(config, sources)
    tally = _Tally(config)
    progress = Progress("ingest", len(units), "units", every=2.0)
    writers = {split: _ShardWriter(_uri(config, sources), split, config.shard_size) for split in ("train", "heldout")}
    for row in _read_units(config, units):
        if tally.keeps(row):
            writers[row["split"]].add(row)
        progress.update(row["unit"], f"{tally.counts['found']} pictures")
    progress.update(len(units), f"{tally.counts['found']} pictures")
    return _publish(config, sources, tally, {split: writer.close() for split, writer in writers.items()})


def read_unit(unit: dict[str, Any], config: IngestConfig) -> Iterator[Row]:
    """Every item of a unit of work (a tar shard, or some picture files) as a row that is kept or says why not."""
    items = _tar_items(unit["uris"][0]) if unit["tar"] else _file_items(unit)
    for item in items:
        yield {"unit": unit["number"], **_checked(item, config)}


@dataclass(frozen=True)
class _Item:
    """One thing found in a source: a picture's bytes and what goes with them, or the reason why it is none."""

    source: str
    data: bytes = b""
    class_name: str = ""
    meta: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    error: str = ""


def _sources(config: IngestConfig) -> list[tuple[str, storage.ObjectInfo]]:
    """All objects of all sources that may hold pictures, with the root that each was found under."""
    found = [(storage.normalise(root), info) for root in config.source for info in storage.list_objects(root)]
    usable = [(root, info) for root, info in found if info.uri.lower().endswith((".tar", *SUFFIXES))]
    if not usable:
        raise PipelineError(
            f"{', '.join(config.source)}: {len(found)} objects, but no picture ({' '.join(SUFFIXES)}) and no .tar shard"
        )
    return usable


def _uri(config: IngestConfig, sources: list[tuple[str, storage.ObjectInfo]]) -> str:
    """Where the dataset of these sources lies."""
    listing = [[info.uri, info.size, info.version] for _, info in sources]
    digest = identity("ingest", VERSION, what(config), listing)
    return storage.join(storage.normalise(config.store), "datasets", config.name, digest)


def _units(config: IngestConfig, sources: list[tuple[str, storage.ObjectInfo]]) -> list[dict[str, Any]]:
    """Units of work in a fixed order: every tar one, picture files by the hundred."""
    tars = [info.uri for _, info in sources if info.uri.lower().endswith(".tar")]
    files = [
        (info.uri, _folder_class(root, info.uri)) for root, info in sources if not info.uri.lower().endswith(".tar")
    ]
    units: list[dict[str, Any]] = [{"tar": True, "uris": [uri], "classes": [""]} for uri in tars]
    for start in range(0, len(files), _FILES_IN_UNIT):
        uris, classes = zip(*files[start : start + _FILES_IN_UNIT], strict=True)
        units.append({"tar": False, "uris": list(uris), "classes": list(classes)})
    return [{"number": number, **unit} for number, unit in enumerate(units)]


def _folder_class(root: str, uri: str) -> str:
    """The class of a picture in one folder per class: the first folder below the source; empty in a flat folder."""
    below = uri.removeprefix(root).lstrip("/") if uri.startswith(root) else ""
    return below.split("/")[0] if "/" in below else ""


def _read_units(config: IngestConfig, units: list[dict[str, Any]]) -> Iterator[Row]:
    """All rows in the order of the units, read by Ray Data on all workers."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    rows = ray.data.from_items(units, override_num_blocks=len(units)).flat_map(read_unit, fn_kwargs={"config": config})
    yield from rows.iter_rows()


def _file_items(unit: dict[str, Any]) -> Iterator[_Item]:
    for uri, class_name in zip(unit["uris"], unit["classes"], strict=True):
        yield _Item(uri, storage.read_bytes(uri), class_name)


def _tar_items(uri: str) -> Iterator[_Item]:
    """The samples of a WebDataset shard: neighbouring members that share a key."""
    with storage.open_read(uri) as file:
        try:
            with tarfile.open(fileobj=file, mode="r|") as tar:
                yield from _grouped(uri, tar)
        except (tarfile.TarError, EOFError) as error:
            # What stands behind the break cannot be counted: the shard itself is the item that is listed.
            yield _Item(uri, reason="truncated_shard", error=f"{type(error).__name__}: {error}")


def _grouped(uri: str, tar: tarfile.TarFile) -> Iterator[_Item]:
    """Samples of an open tar; a stream is read once, so members are taken as they come."""
    key, members = "", dict[str, bytes]()
    for member in tar:
        file = tar.extractfile(member) if member.isfile() else None
        if file is None:
            continue
        folder, _, name = member.name.rpartition("/")
        stem, _, suffix = name.partition(".")
        if members and f"{folder}/{stem}" != key:
            yield _sample(uri, key, members)
            members = {}
        key = f"{folder}/{stem}"
        members[f".{suffix.lower()}"] = file.read()
    if members:
        yield _sample(uri, key, members)


def _sample(uri: str, key: str, members: dict[str, bytes]) -> _Item:
    """One sample of a shard from its members by suffix."""
    source = f"{uri}#{key.lstrip('/')}"
    picture = next((suffix for suffix in members if suffix in SUFFIXES), None)
    if picture is None:
        return _Item(source, reason="no_picture", error=f"members: {', '.join(sorted(members))}")
    try:
        meta = json.loads(members.get(".json", b"{}"))
    except ValueError as error:
        return _Item(source, reason="undecodable", error=f".json: {error}")
    if not isinstance(meta, dict):
        return _Item(source, reason="undecodable", error=".json: not an object")
    return _Item(source + picture, members[picture], meta=meta)


def _checked(item: _Item, config: IngestConfig) -> Row:
    """The row of an item: decoded, resized and digested, or with the reason why not."""
    row: Row = {"source": item.source, "reason": item.reason, "error": item.error}
    row |= {"png": b"", "digest": "", "sum": 0.0, "squares": 0.0, "split": ""}
    row["class"] = str(item.meta.get(config.class_field, item.class_name))
    row["caption"] = str(item.meta.get(config.caption_field, ""))
    if item.reason:
        return row
    try:
        image = decode(item.data, config.max_pixels, config.background, config.min_side)
    except ImageError as error:
        return row | {"reason": error.reason, "error": str(error)}
    pixels = fit(image, config.resolution)
    floats = to_floats(pixels).astype(np.float64)
    digest = storage.digest(f"{image.size}".encode() + image.tobytes())
    heldout = int(digest[:12], 16) % _BUCKETS < config.heldout * _BUCKETS
    row |= {"png": to_png(pixels), "digest": digest, "split": "heldout" if heldout else "train"}
    return row | {"sum": float(floats.mean()), "squares": float(np.square(floats).mean())}


@dataclass
class _Tally:
    """What became of every item: found = kept + rejected + duplicates."""

    config: IngestConfig
    counts: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    classes: Counter[str] = field(default_factory=Counter)
    seen: dict[str, str] = field(default_factory=dict)
    rejected: list[Row] = field(default_factory=list)
    duplicates: list[Row] = field(default_factory=list)
    sums: tuple[float, float] = (0.0, 0.0)

    def keeps(self, row: Row) -> bool:
        """Count the row; whether it goes into the dataset."""
        self.counts["found"] += 1
        if row["reason"]:
            self.counts["rejected"] += 1
            self.reasons[row["reason"]] += 1
            self.rejected.append({name: row[name] for name in ("source", "reason", "error")})
            return False
        if row["digest"] in self.seen:
            self.counts["duplicates"] += 1
            self.duplicates.append({"source": row["source"], "same_as": self.seen[row["digest"]]})
            return False
        self.seen[row["digest"]] = row["source"]
        self.counts["kept"] += 1
        self.counts[row["split"]] += 1
        if row["class"]:
            self.classes[row["class"]] += 1
        if row["split"] == "train":
            self.sums = (self.sums[0] + row["sum"], self.sums[1] + row["squares"])
        return True

    def mean_and_sigma(self) -> tuple[float, float]:
        """Mean and standard deviation of the training pictures' values in [-1, 1]."""
        count = max(self.counts["train"], 1)
        mean = self.sums[0] / count
        return mean, float(np.sqrt(max(self.sums[1] / count - mean**2, 1e-12)))


@dataclass
class _ShardWriter:
    """Collects rows of one split and writes them as Parquet shards of a fixed number of rows."""

    folder: str
    split: str
    shard_size: int
    rows: list[Row] = field(default_factory=list)
    shards: list[dict[str, Any]] = field(default_factory=list)

    def add(self, row: Row) -> None:
        """Take a row; write a shard when it is full."""
        self.rows.append(row)
        if len(self.rows) == self.shard_size:
            self._write()

    def close(self) -> list[dict[str, Any]]:
        """Write what is left; the shards for the manifest."""
        if self.rows:
            self._write()
        return self.shards

    def _write(self) -> None:
        stem = f"shards/{self.split}-{len(self.shards):05}"
        part = storage.put_part(self.folder, stem, ".parquet", _parquet(self.rows))
        self.shards.append({**part, "rows": len(self.rows)})
        self.rows = []


def _parquet(rows: list[Row]) -> bytes:
    """Rows as the bytes of a Parquet file; PNG bytes do not compress again."""
    columns = {name: [row[name] for row in rows] for name in ("class", "caption", "digest", "source")}
    images = [{"bytes": row["png"], "path": f"{row['digest'][:16]}.png"} for row in rows]
    buffer = io.BytesIO()
    table = pa.table({"image": images, **columns}, schema=SCHEMA)
    pq.write_table(table, buffer, row_group_size=ROW_GROUP, compression="none")
    return buffer.getvalue()


def _publish(
    config: IngestConfig,
    sources: list[tuple[str, storage.ObjectInfo]],
    tally: _Tally,
    shards: dict[str, list[dict[str, Any]]],
) -> Outcome:
    """Write the lists of what was left out, then the manifest."""
    if not tally.counts["train"]:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(tally.reasons.items())) or "all held out"
        raise PipelineError(f"{', '.join(config.source)}: no picture to train on ({reasons})")
    uri = _uri(config, sources)
    mean, sigma = tally.mean_and_sigma()
    counts = {name: tally.counts[name] for name in ("found", "kept", "rejected", "duplicates")}
    manifest = {
        "kind": "dataset",
        "schema": 1,
        "name": config.name,
        "code": __version__,
        "settings": what(config),
        "resolution": config.resolution,
        "mean": mean,
        "sigma_data": sigma,
        "encoding": "png",
        "classes": dict(sorted(tally.classes.items())),
        "counts": counts,
        "reasons": dict(sorted(tally.reasons.items())),
        "shards": shards,
        "inputs": {"source": config.source, "objects": len(sources), "bytes": sum(info.size for _, info in sources)},
        "rejected": _lines(uri, "rejected/rejected", tally.rejected),
        "duplicates": _lines(uri, "rejected/duplicates", tally.duplicates),
    }
    if not storage.publish(uri, manifest):
        raise PipelineError(f"{uri}: another run published other content under this name; run again to use it")
    print(summary(manifest), flush=True)
    return Outcome(uri=uri, found=False)


def summary(manifest: dict[str, Any]) -> str:
    """One line on what became of every item of a dataset."""
    counts = manifest["counts"]
    why = "".join(f", {count} {reason}" for reason, count in manifest["reasons"].items())
    return (
        f"ingest: found {counts['found']} = kept {counts['kept']} + rejected {counts['rejected']}"
        f" + duplicates {counts['duplicates']}{why}"
    )


def _lines(folder: str, stem: str, rows: Iterable[Row]) -> dict[str, Any] | None:
    """Rows as a JSON Lines part, or None where there are none."""
    data = b"".join(json.dumps(row, sort_keys=True, ensure_ascii=False).encode() + b"\n" for row in rows)
    return storage.put_part(folder, stem, ".jsonl", data) if data else None
