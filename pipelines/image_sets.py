"""Sets of generated pictures in the store: the columns of a row, and the rows of a part in each format."""

import functools
import io
import json
import tarfile
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import storage
from pipelines.requests import ImageRequest

FILES = ("image", "mask")
_FIRST = ("task", "prompt", "seed")
_TYPES: dict[Any, pa.DataType] = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
Row = dict[str, Any]


@functools.cache
def request_columns() -> dict[str, pa.DataType]:
    """Columns of all that a request may say but its files, with their Arrow types."""
    plain = [name for name in ImageRequest.model_fields if name not in (*_FIRST, *FILES)]
    return {name: _arrow_type(ImageRequest.model_fields[name].annotation) for name in (*_FIRST, *plain)}


def row_columns() -> dict[str, pa.DataType]:
    """Columns of a row of an image set, but those that a table's user carried along."""
    files = {f"{name}_{what}": pa.string() for name in FILES for what in ("uri", "sha256")}
    picture = {"image": pa.struct([("bytes", pa.binary()), ("path", pa.string())]), "sha256": pa.string()}
    return {"row": pa.int64(), **picture, "model": pa.string(), **request_columns(), **files, "settings": pa.string()}


def own_names() -> set[str]:
    """Names that the lines of an image set have themselves in any format, those of rejected rows among them."""
    return {*row_columns(), "file_name", "reason", "error"}


def rows_of(uri: str, manifest: dict[str, Any], part: dict[str, Any]) -> Iterator[Row]:
    """The rows of a part, each with its picture as `image`: {bytes, path}.

    Raises DamagedError where bytes are not those that the manifest promised.
    """
    data = storage.read_part(uri, part)
    yield from {"parquet": _parquet, "webdataset": _tar, "png": _pngs}[manifest.get("format", "parquet")](uri, data)


def rejected_of(uri: str, part: dict[str, Any]) -> list[Row]:
    """The rejected rows of a part: number, reason, error. Raises DamagedError as `rows_of` does."""
    if not part.get("rejected"):
        return []
    return [json.loads(line) for line in storage.read_part(uri, part["rejected"]).splitlines()]


def _parquet(_: str, data: bytes) -> Iterator[Row]:
    for batch in pq.ParquetFile(io.BytesIO(data)).iter_batches(64):
        yield from batch.to_pylist()


def _tar(_: str, data: bytes) -> Iterator[Row]:
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        for member in tar:
            content = tar.extractfile(member)
            assert content is not None
            if member.name.endswith(".png"):
                image = {"bytes": content.read(), "path": member.name}
            else:
                yield {**json.loads(content.read()), "image": image}


def _pngs(uri: str, data: bytes) -> Iterator[Row]:
    """Pictures that lie beside one another, read one by one and checked against the digests of their lines."""
    for line in data.splitlines():
        row = json.loads(line)
        path = row.pop("file_name")
        name = {"name": path, "sha256": row["sha256"]}
        yield {**row, "image": {"bytes": storage.read_part(uri, name), "path": path}}


def _arrow_type(annotation: Any) -> pa.DataType:
    """The Arrow type of a field's values; None of them is a null."""
    if get_origin(annotation) is Literal:
        return pa.string()
    inner = [kind for kind in get_args(annotation) if kind is not type(None)]
    return _arrow_type(inner[0]) if inner else _TYPES[annotation]
