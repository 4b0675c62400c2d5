"""Request tables as a stream of rows, whatever their size: Parquet, CSV and JSON Lines."""

import csv
import functools
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import storage
from pipelines.bulk.rows import check_carried, check_columns
from pipelines.config import PipelineError
from pipelines.storage import ObjectInfo

_BLOCK_BYTES = 2**20
_ROWS_AT_A_TIME = 64
_KINDS = (".parquet", ".csv", ".tsv", ".jsonl", ".ndjson")
_LOOKED_AT = 1000
_TYPES = {int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
# A row, and why it cannot be read where it cannot.
Read = tuple[dict[str, Any], str]


@functools.lru_cache(maxsize=4)
def table_digest(info: ObjectInfo) -> str:
    """SHA-256 of a table's bytes, read block by block. Raises StorageError where it cannot be read."""
    with storage.local_copy(info) as path:
        return copy_digest(path)


def copy_digest(path: str) -> str:
    """SHA-256 of a table's bytes from its copy on this machine's disk."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def rows_of_table(uri: str, path: str, carry: list[str]) -> Iterator[Read]:
    """The rows of the table at `uri`, read from its copy at `path`, with why one cannot be read where that is so.

    Raises PipelineError on a kind of file or a column that is not known, and where the whole cannot be read.
    """
    lower = uri.lower()
    if not lower.endswith(_KINDS):
        raise PipelineError(f"{uri}: no table of a kind that is read; there are {' '.join(_KINDS)}")
    if lower.endswith(".parquet"):
        yield from _parquet(uri, path, carry)
    elif lower.endswith((".csv", ".tsv")):
        yield from _csv(uri, path, carry, "\t" if lower.endswith(".tsv") else ",")
    else:
        yield from _json_lines(uri, path, carry)


def carried_types(uri: str, path: str, carry: list[str]) -> dict[str, pa.DataType]:
    """Arrow types of the columns to carry: Parquet's own, of CSV text, of JSON by the first value."""
    if uri.lower().endswith(".parquet"):
        next(_parquet(uri, path, carry), None)  # which checks the columns first
        schema = pq.read_schema(path)
        return {name: schema.field(name).type for name in carry}
    found: dict[str, pa.DataType] = {}
    if uri.lower().endswith((".jsonl", ".ndjson")):
        for row, _ in itertools.islice(_json_lines(uri, path, carry), _LOOKED_AT):
            for name in carry:
                if row.get(name) is not None:
                    found.setdefault(name, _TYPES.get(type(row[name]), pa.string()))
    return {name: found.get(name, pa.string()) for name in carry}


def _parquet(uri: str, path: str, carry: list[str]) -> Iterator[Read]:
    try:
        with pq.ParquetFile(path, buffer_size=_BLOCK_BYTES, pre_buffer=False) as file:
            check_columns(uri, file.schema_arrow.names, carry)
            check_carried(uri, file.schema_arrow.names, carry)
            for batch in file.iter_batches(_ROWS_AT_A_TIME, use_threads=False):  # each would keep memory of its own
                for row in batch.to_pylist():
                    yield row, ""
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise PipelineError(f"{uri}: no whole Parquet file ({str(error).splitlines()[0]}); write it anew") from error


def _csv(uri: str, path: str, carry: list[str], comma: str) -> Iterator[Read]:
    # Strict: a quote that is never closed would else make one cell of all rows that follow.
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, restkey="", delimiter=comma, strict=True)
        try:
            columns = list(reader.fieldnames or [])
            check_columns(uri, columns, carry)
            check_carried(uri, columns, carry)
            for row in reader:
                told = f"{len(columns) + len(row[''])} fields, {len(columns)} expected" if "" in row else ""
                yield row, told
        except csv.Error as error:
            raise PipelineError(f"{uri}: after line {reader.line_num}: {error}; mend the table's quotes") from error
        except UnicodeDecodeError as error:
            raise PipelineError(f"{uri}: no UTF-8 text ({error}); save the table as UTF-8") from error


def _json_lines(uri: str, path: str, carry: list[str]) -> Iterator[Read]:
    seen: set[str] = set()
    with open(path, encoding="utf-8-sig", newline="\n") as file:
        try:
            for row, told in map(_json_row, _lines(file)):
                if not seen.issuperset(row):
                    check_columns(uri, row, carry)
                    seen |= set(row)
                yield row, told
        except UnicodeDecodeError as error:
            raise PipelineError(f"{uri}: no UTF-8 text ({error}); save the table as UTF-8") from error
    check_carried(uri, sorted(seen), carry)


def _lines(file: Iterable[str]) -> Iterator[str]:
    return (line for line in file if line.strip())


def _json_row(line: str) -> Read:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return {}, f"no JSON: {error}"
    return (row, "") if isinstance(row, dict) else ({}, "no JSON object")
