"""The work of one unit: its items decoded, resized, digested and staged, and a record of what became of them."""

import hashlib
import io
import json
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import storage
from pipelines.cells import printable
from pipelines.config import IngestConfig, PipelineError, status_of
from pipelines.images import ImageError, Limits, Pixels, decode, encode, fit
from pipelines.ingest.hashing import perceptual_hash
from pipelines.ingest.items import Item, Shard, items
from pipelines.ingest.sources import Unit

# What is known of a staged picture. Its stored bytes lie in a blob, at `offset`; `crc` is their CRC-32.
KEYS = pa.schema(
    [
        ("digest", pa.string()), ("source", pa.string()), ("class", pa.string()), ("caption", pa.string()),
        ("heldout", pa.bool_()), ("hash", pa.uint64()), ("colours", pa.binary()),
        ("sum", pa.int64()), ("squares", pa.int64()),
        ("blob", pa.string()), ("offset", pa.int64()), ("length", pa.int64()), ("crc", pa.int64()),
    ]
)  # fmt: skip
_CHUNK_BYTES = 32 * 2**20
_CHUNK_ROWS = 8192
_BUCKETS = 10_000


@dataclass
class _Staging:
    """Collects kept pictures and rejected rows of a unit and writes them in chunks of bounded size."""

    folder: str
    number: int
    blob: bytearray = field(default_factory=bytearray)
    keys: list[dict[str, Any]] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    parts: list[dict[str, Any]] = field(default_factory=list)
    rejects: list[dict[str, Any]] = field(default_factory=list)

    def keep(self, data: bytes, key: dict[str, Any]) -> None:
        """Take a picture; writes when a chunk is full."""
        place = {"offset": len(self.blob), "length": len(data), "crc": zlib.crc32(data)}
        self.blob += data
        self.keys.append(key | place)
        if len(self.blob) >= _CHUNK_BYTES or len(self.keys) >= _CHUNK_ROWS:
            self.flush()

    def reject(self, row: dict[str, Any]) -> None:
        """Take a rejected row; writes when a chunk is full."""
        self.rejected.append(row)
        if len(self.rejected) >= _CHUNK_ROWS:
            self.flush()

    def flush(self) -> None:
        """Write what was collected."""
        if self.keys:
            stem = f"units/{self.number:08}-{len(self.parts):04}"
            blob = storage.put_part(self.folder, stem, ".blob", bytes(self.blob))["name"]
            keys = pa.Table.from_pylist([key | {"blob": blob} for key in self.keys], schema=KEYS)
            part = storage.put_part(self.folder, stem, ".keys.parquet", to_parquet(keys))
            self.parts.append({**part, "rows": len(self.keys)})
        if self.rejected:
            stem = f"units/{self.number:08}-{len(self.rejects):04}"
            part = storage.put_part(self.folder, stem, ".rejected.jsonl", to_lines(self.rejected))
            self.rejects.append({**part, "rows": len(self.rejected)})
        self.blob, self.keys, self.rejected = bytearray(), [], []


def read_unit(row: dict[str, Any], config: IngestConfig, folder: str) -> dict[str, Any]:
    """Do a unit and write its record; what storage refused after all retries is told as a fault, not raised.

    One unit that cannot be read must not stop the others, whose records a later run finds.
    """
    unit = Unit.from_row(row)
    told = {"number": unit.number, "bytes": unit.bytes}
    try:
        record = _staged(unit, config, folder)
    except (PipelineError, OSError) as error:  # an OSError here is this machine's, such as a full disk
        fault = printable(str(error) if isinstance(error, PipelineError) else f"{unit.name}: {error}")
        return {**told, "found": 0, "rejected": 0, "fault": fault, "status": status_of(error)}
    storage.write_bytes(record_uri(folder, unit.number), storage.to_json(record))
    rejected = sum(record["reasons"].values())
    return {**told, "found": record["found"], "rejected": rejected, "fault": "", "status": 0}


def record_uri(folder: str, number: int) -> str:
    """Where the record of a unit lies; the unit is done once it does."""
    return storage.join(folder, f"units/{number:08}.json")


def to_parquet(table: pa.Table, **options: Any) -> bytes:
    """A table as the bytes of a Parquet file."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **options)
    return buffer.getvalue()


def to_lines(rows: list[dict[str, Any]]) -> bytes:
    """Rows as JSON Lines."""
    return b"".join(json.dumps(row, sort_keys=True, ensure_ascii=False).encode() + b"\n" for row in rows)


def _staged(unit: Unit, config: IngestConfig, folder: str) -> dict[str, Any]:
    """Stage all items of a unit; its record."""
    staging, shard = _Staging(folder, unit.number), Shard(unit.name)
    reasons, kinds, notes = Counter[str](), Counter[str](), Counter[str]()
    found = 0
    for found, (item, outcome) in enumerate(_outcomes(unit, config, shard), start=1):  # noqa: B007
        if isinstance(outcome, ImageError):
            reasons[outcome.reason] += 1
            told = {"source": printable(item.source), "error": printable(str(outcome))}
            staging.reject({**told, "reason": outcome.reason})
            continue
        kinds[outcome.kind] += 1
        notes.update([outcome.note] if outcome.note else [])
        staging.keep(outcome.data, outcome.key)
    staging.flush()
    return {
        "found": found, "reasons": dict(reasons), "kinds": dict(kinds), "notes": dict(notes), "keys": staging.parts,
        "rejected": staging.rejects, "fields": sorted(shard.fields),
        "incomplete": shard.as_json() if shard.incomplete else None,
    }  # fmt: skip


@dataclass(frozen=True)
class _Kept:
    data: bytes
    key: dict[str, Any]
    kind: str
    note: str


def _outcomes(unit: Unit, config: IngestConfig, shard: Shard) -> Iterator[tuple[Item, "_Kept | ImageError"]]:
    """Every item with what became of it."""
    limits = Limits(config.max_pixels, config.min_side)
    for item in items(unit, config, shard):
        try:
            yield item, _kept(item, config, limits)
        except ImageError as error:
            yield item, error


def _kept(item: Item, config: IngestConfig, limits: Limits) -> _Kept:
    """The picture as it will be stored. Raises ImageError with the reason why it is not kept."""
    if item.reason:
        raise ImageError(item.reason, item.error)
    if config.labels == "required" and item.class_name is None:
        raise ImageError("missing_label", f"no {config.class_field}")
    picture = decode(item.data, limits, config.background, config.resolution)
    pixels = fit(picture.image, config.resolution, config.fit, config.background)
    near = perceptual_hash(pixels) if config.near_duplicates else (0, b"")
    key = {
        "digest": hashlib.sha256(pixels.tobytes()).hexdigest(), "source": printable(item.source),
        "class": "" if config.labels == "ignored" else printable(item.class_name or ""),
        "caption": printable(item.caption), "heldout": _is_heldout(item.data, config.heldout),
        "hash": near[0], "colours": near[1], **_sums(pixels),
    }  # fmt: skip
    return _Kept(encode(pixels, config.stored_as), key, picture.kind, picture.note)


def _is_heldout(data: bytes, share: float) -> bool:
    """By the file's own bytes: the same picture stays on its side at every resolution and whatever is added."""
    return int.from_bytes(hashlib.sha256(data).digest()[:6], "big") % _BUCKETS < share * _BUCKETS


def _sums(pixels: Pixels) -> dict[str, int]:
    """Sum and sum of squares of the bytes, exact, so that statistics do not depend on the order of adding."""
    flat = pixels.astype(np.int64).ravel()
    return {"sum": int(flat.sum()), "squares": int(flat @ flat)}
