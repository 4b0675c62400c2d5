"""A shard as it lies in the store: its pictures with their rows, what was rejected, and the record that it is done."""

import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import storage
from pipelines.bulk.inputs import Rejection
from pipelines.bulk.job import STAGING, Job, Order
from pipelines.image_sets import FILES, request_columns, row_columns
from pipelines.images import Pixels, to_png
from pipelines.requests import ImageRequest, metadata

Numerics = dict[str, str | int]
Record = dict[str, Any]
_AT_A_TIME = 32
_READ_AHEAD = 1024
_METADATA = "metadata.jsonl"
_RECORDS = f"{STAGING}/shards"


def commit_shard(
    job: Job,
    shard: int,
    orders: Sequence[Order],
    requests: Sequence[ImageRequest | Rejection],
    ends: Sequence[Pixels | Rejection],
    numerics: Numerics,
    spent: dict[str, Any],
) -> Record:
    """Write a shard: the same pictures on the same kind of device give the same bytes; its record, written last.

    `numerics` is the profile within which they repeat, `spent` the denoiser calls and seconds that it took.
    """
    made = [
        _row(job, order, request, picture)
        for order, request, picture in zip(orders, requests, ends, strict=True)
        if isinstance(request, ImageRequest) and not isinstance(picture, Rejection)
    ]
    rejected = [
        {"row": order.row, "reason": end.reason, "error": end.error, **order.carried}
        for order, end in zip(orders, ends, strict=True)
        if isinstance(end, Rejection)
    ]
    part = {**_WRITERS[job.config.format](job, shard, made, numerics), "rows": len(made), "numerics": numerics}
    if rejected:
        lines = "".join(json.dumps(row, sort_keys=True, default=str) + "\n" for row in rejected)
        put = _put(job.uri, f"rejected/part-{shard:05}", ".jsonl", lines.encode())
        part["rejected"] = {**put, "rows": len(rejected)}
        part["reasons"] = dict(Counter(row["reason"] for row in rejected))
    pictures = sum(len(row["image"]["bytes"]) for row in made)
    record = {"part": part, "spent": {**spent, "pictures": len(made), "bytes": pictures}}
    storage.write_bytes(record_uri(job.uri, shard), storage.to_json(record))
    return record


def record_uri(uri: str, shard: int) -> str:
    """Where the record of a shard that is done lies."""
    return storage.join(uri, _RECORDS, f"{shard:09}.json")


def record_of(uri: str, shard: int) -> Record | None:
    """The record of a shard, or None where it is not done."""
    try:
        found: Record = storage.read_json(record_uri(uri, shard))
    except storage.NotFoundError:
        return None
    return found


def committed(uri: str) -> Iterator[tuple[int, Record]]:
    """Records of the shards that earlier runs wrote and that still lie there, by one listing of the job's folder."""
    sizes = {info.uri.removeprefix(f"{uri}/"): info.size for info in storage.list_if_any(uri)}
    names = [name for name in sizes if name.startswith(f"{_RECORDS}/")]
    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        for first in range(0, len(names), _READ_AHEAD):
            some = names[first : first + _READ_AHEAD]
            records = pool.map(lambda name: storage.read_json(storage.join(uri, name)), some)
            for name, record in zip(some, records, strict=True):
                if all(sizes.get(part["name"]) == part["bytes"] for part in _parts(record)):
                    yield int(name.removeprefix(f"{_RECORDS}/").removesuffix(".json")), record


def write_metadata(uri: str, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The lines of all PNGs as one file under the name that Hugging Face's image folders want."""
    data = b"".join(storage.read_part(uri, part) for part in parts)
    storage.write_bytes(storage.join(uri, _METADATA), data)
    return {"name": _METADATA, "bytes": len(data), "sha256": storage.digest(data)}


def _parts(record: Record) -> Iterable[dict[str, Any]]:
    """What a record promises to lie there."""
    part = record["part"]
    return [part, part["rejected"]] if "rejected" in part else [part]


def _row(job: Job, order: Order, request: ImageRequest, picture: Pixels) -> dict[str, Any]:
    """A row of the output, by the names of its columns."""
    texts = metadata(request, job.model)
    png = to_png(picture, texts)
    row: dict[str, Any] = {"row": order.row, "image": {"bytes": png, "path": f"{order.row:09}.png"}}
    row |= {"sha256": storage.digest(png), "model": job.model, "settings": texts["settings"]}
    row |= {name: getattr(request, name) for name in request_columns()}
    for name in FILES:
        data, place = getattr(request, name), order.files.get(name)
        row[f"{name}_uri"] = place if isinstance(place, str) else None
        row[f"{name}_sha256"] = None if data is None else storage.digest(data)
    return row | order.carried


def _parquet(job: Job, shard: int, rows: list[dict[str, Any]], numerics: Numerics) -> dict[str, Any]:
    """Rows as a Parquet shard, the picture as Hugging Face's datasets store one."""
    schema = pa.schema([*(pa.field(name, kind) for name, kind in row_columns().items()), *job.carried()])
    told = {"info": {"features": {"image": {"_type": "Image"}}}}
    texts = {"numerics": json.dumps(numerics, sort_keys=True), "huggingface": json.dumps(told)}
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema.with_metadata(texts)), buffer, compression="none")
    return _put(job.uri, f"part-{shard:05}", ".parquet", buffer.getvalue())


def _tar(job: Job, shard: int, rows: list[dict[str, Any]], _: Numerics) -> dict[str, Any]:
    """Rows as a WebDataset tar: a picture and its row as JSON under one key."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for row in rows:
            for suffix, content in ((".png", row["image"]["bytes"]), (".json", _line(row))):
                member = tarfile.TarInfo(f"{row['row']:09}{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return _put(job.uri, f"part-{shard:05}", ".tar", buffer.getvalue())


def _pngs(job: Job, shard: int, rows: list[dict[str, Any]], _: Numerics) -> dict[str, Any]:
    """Rows as PNGs by themselves, and a line for each that names its file."""
    lines = []
    for row in rows:
        name = _put(job.uri, f"pictures/{row['row']:09}", ".png", row["image"]["bytes"])["name"]
        lines.append(_line({"file_name": name, **row}))
    return _put(job.uri, f"part-{shard:05}", ".jsonl", b"".join(line + b"\n" for line in lines))


_WRITERS = {"parquet": _parquet, "webdataset": _tar, "png": _pngs}


def _line(row: dict[str, Any]) -> bytes:
    """A row but for its picture as one line of JSON."""
    return json.dumps({name: value for name, value in row.items() if name != "image"}, default=str).encode()


def _put(folder: str, stem: str, suffix: str, data: bytes) -> dict[str, Any]:
    """As `put_part`, but what lies there already with these bytes' name and size is left alone."""
    checksum = storage.digest(data)
    name = f"{stem}-{checksum[:12]}{suffix}"
    uri = storage.join(folder, name)
    try:
        if storage.stat(uri).size == len(data):
            return {"name": name, "bytes": len(data), "sha256": checksum}
    except storage.NotFoundError:
        pass
    return storage.put_part(folder, stem, suffix, data)
