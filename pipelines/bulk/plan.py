"""The plan of a job: its table read once, row by row, checked, and staged in ranges that workers read by themselves."""

import io
import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import storage
from pipelines.bulk.job import CARRIED, STAGING, Job, Table, classes_in_turn
from pipelines.bulk.rows import Checker
from pipelines.bulk.tables import carried_types, copy_digest, rows_of_table, table_digest
from pipelines.config import GenerateConfig, PipelineError, identity, what
from pipelines.image_sets import FILES, request_columns
from pipelines.model import load_config, model_digest
from pipelines.progress import print_line
from pipelines.requests import RequestError
from pipelines.storage import ObjectInfo

VERSION = 4
_PLAN = "plan.json"
# A staged part holds so many rows or bytes: it is what a worker has in memory, and what it reads for one shard.
_ROWS_IN_PART = 8192
_BYTES_IN_PART = 16 * 2**20
_TELL_EVERY_S = 5.0
# Of the rows that are wrong so many stand in the error; all are listed in objects of so many bytes below this folder
_SHOWN = 20
_BYTES_OF_LIST = 4 * 2**20
_WRONG = f"{STAGING}/wrong"
_LONGEST_REASON = 500


def job_uri(config: GenerateConfig) -> str:
    """Where the images of these settings, this model and this table lie. Raises StorageError where one is missing."""
    model = model_digest(storage.read_manifest(storage.normalise(config.model), "model"))
    return _uri_of(config, model, None if config.table is None else table_digest(storage.stat(config.table)))


def _uri_of(config: GenerateConfig, model: str, table: str | None) -> str:
    """Where the images lie, by the digests of the model and the table."""
    inputs: Any = model
    if config.table is not None:
        # Pictures may be named from the table's folder on, so the same table elsewhere is another one.
        inputs = [model, table, config.table.rsplit("/", 1)[0]]
    name = identity("generate", VERSION, what(config), inputs)
    return storage.join(storage.normalise(config.store), "images", config.name, name)


def plan_job(config: GenerateConfig, uri: str) -> Job:
    """The job with its rows: those of the flags, or those of the table, checked and staged unless they are already.

    Raises PipelineError with the rows that are wrong, before anything is made.
    """
    model = model_digest(storage.read_manifest(storage.normalise(config.model), "model"))
    if config.table is None:
        return Job(config, uri, model, classes_in_turn(config))
    return Job(config, uri, model, (), _staged_table(config, uri, model))


def checked_rows(config: GenerateConfig, info: ObjectInfo, path: str, model: str) -> Iterator[dict[str, Any]]:
    """Every row of the table copied to `path` as it is staged: number, settings, files, what it carries, why refused.

    Raises PipelineError where the table cannot be read, or has a column that means nothing.
    """
    types = carried_types(info.uri, path, config.carry)
    names = (model, storage.normalise(config.model))
    checker = Checker(config, info.uri, load_config(config.model), names)
    for number, (row, unreadable) in enumerate(rows_of_table(info.uri, path, config.carry)):
        staged: dict[str, Any] = {"row": number, "refused": unreadable}
        if not unreadable:
            try:
                staged |= {f"{CARRIED}{name}": _fitting(name, row.pop(name, None), types[name]) for name in types}
                staged |= checker.staged(row)
            except RequestError as error:
                staged["refused"] = str(error)
        staged["refused"] = _bounded(staged["refused"])
        yield staged


def staged_schema(types: dict[str, pa.DataType]) -> pa.Schema:
    """Columns of a staged table; `types` are those of what it carries."""
    files = [(f"{name}_{kind}", kinds) for name in FILES for kind, kinds in _FILE_TYPES.items()]
    carried = [(f"{CARRIED}{name}", kind) for name, kind in types.items()]
    return pa.schema([("row", pa.int64()), ("refused", pa.string()), *request_columns().items(), *files, *carried])


_FILE_TYPES = {"uri": pa.string(), "bytes": pa.binary()}


@dataclass
class _Staging:
    """Writes shards of rows as row groups of parts of bounded size."""

    folder: str
    schema: pa.Schema
    parts: list[dict[str, Any]] = field(default_factory=list)
    shards: int = 0
    rows: int = 0

    def __post_init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self.first, self.buffer = self.shards, io.BytesIO()
        self.writer = pq.ParquetWriter(self.buffer, self.schema)

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Take the rows of the next shard."""
        self.writer.write_table(pa.Table.from_pylist(rows, schema=self.schema), row_group_size=len(rows))
        self.shards, self.rows = self.shards + 1, self.rows + len(rows)
        if self.rows >= _ROWS_IN_PART or self.buffer.tell() >= _BYTES_IN_PART:
            self.close()
            self._begin()

    def close(self) -> None:
        """Write the part that is open, if it has a shard."""
        self.writer.close()
        self.rows = 0
        if self.shards > self.first:
            part = storage.put_part(self.folder, f"rows-{len(self.parts):05}", ".parquet", self.buffer.getvalue())
            self.parts.append({**part, "first": self.first})


def _staged_table(config: GenerateConfig, uri: str, model: str) -> Table:
    """The staged table: an earlier run's where it got that far."""
    assert config.table is not None
    plan = storage.join(uri, STAGING, _PLAN)
    if not storage.exists(plan):
        info = storage.stat(config.table)
        with storage.local_copy(info) as path:
            digest = copy_digest(path)
            if _uri_of(config, model, digest) != uri:
                raise PipelineError(
                    f"{config.table}: replaced meanwhile; run the same command again to take the new one"
                )
            made = {"digest": digest, **_stage(config, uri, info, path, model)}
        storage.write_bytes(plan, storage.to_json(made))
    told = storage.read_json(plan)
    if told["refused"] and not config.skip_bad:
        raise refused_rows(config.table, told["rows"], Bad(uri, told["refused"], told["bad"]))
    return Table(told["digest"], told["rows"], told["refused"], tuple(told["parts"]))


def _stage(config: GenerateConfig, uri: str, info: ObjectInfo, path: str, model: str) -> dict[str, Any]:
    """Check and stage all rows. Raises PipelineError where some are wrong."""
    folder, bad, rows = storage.join(uri, STAGING), Bad(uri), 0
    staging = _Staging(folder, staged_schema(carried_types(info.uri, path, config.carry)))
    told = time.monotonic()
    checked = checked_rows(config, info, path, model)
    while shard := list(itertools.islice(checked, config.shard_size)):
        rows += len(shard)
        bad.add(shard)
        if not bad.count or config.skip_bad:
            staging.add(shard)
        if time.monotonic() - told > _TELL_EVERY_S:
            told = time.monotonic()
            print_line(f"check: {rows} rows, {bad.count} of them wrong")
    bad.close()
    if not rows or (bad.count and not config.skip_bad):
        raise refused_rows(info.uri, rows, bad)
    staging.close()
    return {"rows": rows, "refused": bad.count, "bad": bad.rows, "parts": staging.parts}


@dataclass
class Bad:
    """The rows that are wrong: how many, and the first of them; all, where they are more, in a list of job `uri`.

    Without a job they are counted alone: nothing is written.
    """

    uri: str = ""
    count: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)
    _buffer: bytearray = field(default_factory=bytearray)
    _parts: int = 0

    @property
    def folder(self) -> str:
        """Where the list lies."""
        return storage.join(self.uri, _WRONG)

    def add(self, staged: list[dict[str, Any]]) -> None:
        """Take down those among these rows. Raises StorageError."""
        found = [{"row": row["row"], "reason": row["refused"]} for row in staged if row["refused"]]
        self.count += len(found)
        self.rows += found[: _SHOWN - len(self.rows)]
        if self.uri:
            self._buffer += b"".join(json.dumps(row).encode() + b"\n" for row in found)
            if len(self._buffer) >= _BYTES_OF_LIST:
                self._write()

    def close(self) -> None:
        """Write what is left of the list, unless an error has room for all. Raises StorageError."""
        if self._buffer and self.count > _SHOWN:
            self._write()

    def _write(self) -> None:
        storage.put_part(self.folder, f"part-{self._parts:05}", ".jsonl", bytes(self._buffer))
        self._parts += 1
        self._buffer.clear()


def refused_rows(table: str, rows: int, bad: Bad) -> PipelineError:
    """What to say of a table whose rows are wrong, or that has none."""
    if not rows:
        return PipelineError(f"{table}: has no rows")
    listed = "; ".join(f"row {row['row']}: {row['reason']}" for row in bad.rows[:_SHOWN])
    where = f"all are listed in {bad.folder}" if bad.uri else "a run lists all"
    more = f"; and {bad.count - _SHOWN} more ({where})" if bad.count > _SHOWN else ""
    return PipelineError(
        f"{table}: {bad.count} of {rows} rows (the first is 0) are wrong: {listed}{more}; mend them, or leave them out "
        "with --skip-bad"
    )


def _bounded(reason: str) -> str:
    """A reason without the middle of a value that is long."""
    half = _LONGEST_REASON // 2
    return reason if len(reason) <= _LONGEST_REASON else f"{reason[:half]} … {reason[-half:]}"


def _fitting(name: str, value: Any, kind: pa.DataType) -> Any:
    """A carried value, of the column's type. Raises RequestError where it has another."""
    if value is None or pa.types.is_string(kind):
        return value if value is None or isinstance(value, str) else str(value)
    try:
        pa.scalar(value, kind)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise RequestError(name, f"{value!r} is no {kind}, as the column's first value is") from error
    return value
