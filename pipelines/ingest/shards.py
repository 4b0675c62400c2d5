"""The shards of a dataset: written from their plans, each by one task, the same bytes whoever writes them."""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import storage
from pipelines.config import PipelineError, status_of
from pipelines.dataset import SCHEMA
from pipelines.ingest.units import to_parquet
from pipelines.storage import read_ranges


def write_shard(row: dict[str, Any]) -> dict[str, Any]:
    """Gather the pictures of one plan into a shard and record it; a fault is told, not raised, as in `read_unit`."""
    try:
        plan = pq.read_table(
            io.BytesIO(storage.read_part(row["staging"], {"name": row["name"], "sha256": row["sha256"]}))
        )
        images = pictures(row["staging"], plan)
        data = to_parquet(
            _table(plan, images, row["encoding"]), row_group_size=row["row_group"], compression=_packed(row)
        )
        part = storage.put_part(
            row["uri"], f"shards/{row['split']}-{row['first'] + row['number']:05}", ".parquet", data
        )
        storage.write_bytes(record_uri(row), storage.to_json({**part, "rows": len(plan)}))
        return {"rows": len(plan), "fault": "", "status": 0}
    except PipelineError as error:
        return {"rows": 0, "fault": str(error), "status": status_of(error)}


def record_uri(row: dict[str, Any]) -> str:
    """Where the record of a shard lies; the shard is done once it does."""
    return storage.join(row["staging"], f"shards/{row['split']}-{row['number']:05}.json")


def pictures(staging: str, plan: pa.Table) -> list[bytes]:
    """The staged bytes of a plan's pictures, in its order, each verified."""
    blobs = np.asarray(plan["blob"].to_pylist(), dtype=object)
    columns = [plan[name].to_pylist() for name in ("offset", "length", "crc")]
    images: list[bytes] = [b""] * len(plan)
    for blob in sorted(set(blobs)):
        at = np.flatnonzero(blobs == blob).tolist()
        at.sort(key=lambda index: columns[0][index])
        ranges = [(columns[0][index], columns[1][index], columns[2][index]) for index in at]
        for index, data in zip(at, read_ranges(storage.join(staging, blob), ranges), strict=True):
            images[index] = data
    return images


def row_group_size(resolution: int) -> int:
    """Rows in a row group: a power of two, 256 at most, and 16 MB of pixels at most where 16 rows are not more."""
    rows = 256
    while rows > 16 and rows * 3 * resolution**2 > 2**24:
        rows //= 2
    return rows


def _packed(row: dict[str, Any]) -> dict[str, str]:
    """Compression by column: words are packed, pictures are left as they are, to be read fast."""
    return {name: "none" if name.startswith("image") else "zstd" for name in _leaves()}


def _leaves() -> Iterator[str]:
    for column in SCHEMA:
        if pa.types.is_struct(column.type):
            yield from (f"{column.name}.{inner.name}" for inner in column.type)
        else:
            yield column.name


def _table(plan: pa.Table, images: list[bytes], encoding: str) -> pa.Table:
    names = [f"{digest[:16]}.{encoding}" for digest in plan["digest"].to_pylist()]
    image = pa.StructArray.from_arrays(
        [pa.array(images, pa.binary()), pa.array(names, pa.string())], fields=list(SCHEMA.field("image").type)
    )
    return pa.table({"image": image, **{name: plan[name] for name in SCHEMA.names if name != "image"}}, schema=SCHEMA)
