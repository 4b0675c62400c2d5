"""A job: its settings, its model, and its rows, of which every worker can make any range by itself."""

import bisect
import functools
import io
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from diffusion_core.noise import derive_seeds
from pipelines import storage
from pipelines.bulk.rows import settings_of
from pipelines.config import GenerateConfig, PipelineError
from pipelines.image_sets import FILES, request_columns
from pipelines.model import load_config

STAGING = "staging"
CARRIED = "carried."


@dataclass(frozen=True)
class Order:
    """A row: its number, what is asked for, its files (a URI, or the bytes), what it carries, or why it is refused."""

    row: int
    asked: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str | bytes] = field(default_factory=dict)
    carried: dict[str, Any] = field(default_factory=dict)
    refused: str = ""


@dataclass(frozen=True)
class Table:
    """A table as it was checked and staged: its digest, its rows, those refused, and of each part the first shard."""

    digest: str
    rows: int
    refused: int
    parts: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Job:
    """What is to be made, where, with which model; `classes` are those in turn of rows without a table."""

    config: GenerateConfig
    uri: str
    model: str
    classes: tuple[str, ...]
    table: Table | None = None

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.config.count if self.table is None else self.table.rows

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.rows // self.config.shard_size)

    def span(self, shard: int) -> range:
        """The numbers of a shard's rows."""
        size = self.config.shard_size
        return range(shard * size, min((shard + 1) * size, self.rows))

    def orders(self, shard: int) -> list[Order]:
        """The rows of a shard. Raises StorageError where the staged table cannot be read."""
        span = self.span(shard)
        seeds = derive_seeds(self.config.seed, torch.arange(span.start, span.stop)).tolist()
        if self.table is None:
            classes = self.classes
            return [
                Order(row, {**settings_of(self.config, {"prompt": classes[row % len(classes)]}), "seed": seed})
                for row, seed in zip(span, seeds, strict=True)
            ]
        rows = _staged(self.uri, self.table, shard)
        return [_order(row, seed) for row, seed in zip(rows, seeds, strict=True)]

    def carried(self) -> list[pa.Field]:
        """Names and Arrow types of the columns that go along."""
        if self.table is None:
            return []
        schema = pq.read_schema(io.BytesIO(_staged_part(self.uri, self.table.parts[0])))
        names = (name for name in schema.names if name.startswith(CARRIED))
        return [schema.field(name).with_name(name.removeprefix(CARRIED)) for name in names]


def classes_in_turn(config: GenerateConfig) -> tuple[str, ...]:
    """The classes asked for; one empty name for a model without classes. Raises PipelineError on an unknown one."""
    known = load_config(config.model).class_names
    if config.classes == "all":
        return tuple(known) or ("",)
    wanted = tuple(name.strip() for name in config.classes.split(","))
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise PipelineError(f"classes: no class {unknown[0]!r}; there are {', '.join(known) or 'none'}")
    return wanted


def _staged(uri: str, table: Table, shard: int) -> list[dict[str, Any]]:
    """The staged rows of a shard: a row group of the part that has it."""
    part = table.parts[bisect.bisect_right(table.parts, shard, key=lambda part: part["first"]) - 1]
    data = _staged_part(uri, part)
    return pq.ParquetFile(io.BytesIO(data)).read_row_group(shard - part["first"]).to_pylist()  # type: ignore[no-any-return]


def _staged_part(uri: str, part: dict[str, Any]) -> bytes:
    return _part(storage.join(uri, STAGING), part["name"], part["sha256"])


@functools.lru_cache(maxsize=2)
def _part(folder: str, name: str, checksum: str) -> bytes:
    """A staged part, kept for the next shard of it."""
    return storage.read_part(folder, {"name": name, "sha256": checksum})


def _order(row: dict[str, Any], seed: int) -> Order:
    """A row as it was staged; one without a seed has one derived from the job's."""
    if row["refused"]:
        return Order(row["row"], carried=_carried(row), refused=row["refused"])
    asked = {name: row[name] for name in request_columns() if row[name] is not None}
    asked.setdefault("seed", seed)
    found = {name: row[f"{name}_bytes"] or row[f"{name}_uri"] for name in FILES}
    return Order(row["row"], asked, {name: file for name, file in found.items() if file}, _carried(row))


def _carried(row: dict[str, Any]) -> dict[str, Any]:
    """The columns that go along."""
    return {name.removeprefix(CARRIED): value for name, value in row.items() if name.startswith(CARRIED)}
