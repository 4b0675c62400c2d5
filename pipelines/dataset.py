"""Datasets: the manifest, the shard reader, and the deterministic, resumable sample stream that training reads."""

import functools
import io
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines import storage
from pipelines.config import PipelineError
from pipelines.images import Pixels, from_png

SCHEMA = pa.schema(
    [
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("class", pa.string()),
        ("caption", pa.string()),
        ("digest", pa.string()),
        ("source", pa.string()),
    ]
)
ROW_GROUP = 256
_WINDOW = 1024
_CACHED_GROUPS = 64


class Rows(NamedTuple):
    """Pictures with what is known of them: uint8 [N, H, W, 3], label [N] (−1 for none), row number in the split [N]."""

    pixels: Pixels
    labels: NDArray[np.int64]
    ids: NDArray[np.int64]


@dataclass(frozen=True)
class Dataset:
    """A published dataset, read through its manifest."""

    uri: str
    manifest: dict[str, Any]

    @property
    def digest(self) -> str:
        """The name that stands for the content: the last part of the URI."""
        return self.uri.rsplit("/", 1)[1]

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes in the order of their labels; empty where the pictures have none."""
        return tuple(sorted(self.manifest["classes"]))

    @property
    def resolution(self) -> int:
        """Height and width of every picture, in pixels."""
        return int(self.manifest["resolution"])

    @property
    def sigma_data(self) -> float:
        """Standard deviation of the training pictures in [-1, 1]."""
        return float(self.manifest["sigma_data"])

    def row_groups(self, split: str) -> list["RowGroup"]:
        """The row groups of a split in storage order. Raises PipelineError on an unknown split."""
        if split not in self.manifest["shards"]:
            raise PipelineError(f"{self.uri}: no split {split!r}; there are {', '.join(self.manifest['shards'])}")
        groups: list[RowGroup] = []
        first = 0
        for shard in self.manifest["shards"][split]:
            for number, start in enumerate(range(0, shard["rows"], ROW_GROUP)):
                rows = min(ROW_GROUP, shard["rows"] - start)
                groups.append(RowGroup(shard["name"], number, first, rows))
                first += rows
        return groups

    def rows(self, split: str) -> int:
        """Number of pictures in a split."""
        return sum(group.rows for group in self.row_groups(split))

    def read_group(self, split: str, group: "RowGroup") -> Rows:
        """Decode one row group. Raises StorageError where the shard is not what the manifest promised."""
        shard = next(item for item in self.manifest["shards"][split] if item["name"] == group.shard)
        table = _open_shard(self.uri, shard["name"], shard["sha256"]).read_row_group(group.number, ["image", "class"])
        pixels = np.stack([from_png(item["bytes"]) for item in table["image"].to_pylist()])
        index = {name: label for label, name in enumerate(self.class_names)}
        labels = np.array([index.get(name, -1) for name in table["class"].to_pylist()], dtype=np.int64)
        return Rows(pixels, labels, np.arange(group.first, group.first + group.rows, dtype=np.int64))

    def read(self, split: str, limit: int | None = None) -> Rows:
        """The first `limit` pictures of a split (default: all) in storage order."""
        parts, count = [], 0
        for group in self.row_groups(split):
            if limit is not None and count >= limit:
                break
            parts.append(self.read_group(split, group))
            count += group.rows
        if not parts:
            raise PipelineError(f"{self.uri}: split {split!r} holds no pictures")
        return Rows(*(np.concatenate(columns)[:limit] for columns in zip(*parts, strict=True)))


class RowGroup(NamedTuple):
    """A row group: its shard's name, its number there, the split's row number of its first row, its rows."""

    shard: str
    number: int
    first: int
    rows: int


def open_dataset(uri: str) -> Dataset:
    """The dataset at `uri`. Raises StorageError where there is none."""
    uri = storage.normalise(uri)
    return Dataset(uri, storage.read_manifest(uri, "dataset"))


@functools.lru_cache(maxsize=8)
def _open_shard(uri: str, name: str, sha256: str) -> pq.ParquetFile:
    """A shard in memory, its checksum verified."""
    return pq.ParquetFile(io.BytesIO(storage.read_part(uri, {"name": name, "sha256": sha256})))


@dataclass(frozen=True)
class SampleStream:
    """Global batches that depend on (dataset, seed, epoch, batch size, streams) alone, cut over `world` ranks.

    Per epoch the row groups in a seeded order make one list of rows, cut into `streams` equal stretches; each stretch
    is permuted window by window. Global batch k takes the next B/S rows of every stretch; rank r owns the stretches
    r, r + world, …. What is left over when the rows are no multiple of the batch differs from epoch to epoch.
    """

    dataset: Dataset
    split: str
    seed: int
    global_batch_size: int
    streams: int
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        """Raise PipelineError where batch, streams, workers and rows do not fit one another."""
        if self.global_batch_size % self.streams or self.streams % self.world:
            raise PipelineError(
                f"streams: {self.streams} must divide global_batch_size={self.global_batch_size} "
                f"and be a multiple of the {self.world} workers"
            )
        if self.batches_per_epoch < 1:
            raise PipelineError(
                f"{self.dataset.uri}: {self.dataset.rows(self.split)} pictures in split {self.split!r} do not fill one "
                f"global batch of {self.global_batch_size}; lower global_batch_size or add pictures"
            )

    @property
    def batches_per_epoch(self) -> int:
        """Global batches in an epoch."""
        return self.dataset.rows(self.split) // self.global_batch_size

    def indices(self, batch: int) -> NDArray[np.int64]:
        """Row numbers of this rank's share of the global batch number `batch`, counted from the start of training."""
        epoch, k = divmod(batch, self.batches_per_epoch)
        share = self.global_batch_size // self.streams
        own = range(self.rank, self.streams, self.world)
        return np.concatenate([self._stretch(epoch, s)[k * share : (k + 1) * share] for s in own])

    def places(self) -> NDArray[np.int64]:
        """Places in the global batch of this rank's share, in the order of `indices`; the same in every batch."""
        share = self.global_batch_size // self.streams
        return np.concatenate(
            [np.arange(s * share, (s + 1) * share) for s in range(self.rank, self.streams, self.world)]
        )

    def batches(self, first: int) -> Iterator[Rows]:
        """The rank's share of global batch `first`, first + 1, …, without end and without reading what was before."""
        reader = _RowReader(self.dataset, self.split)
        batch = first
        while True:
            yield reader.read(self.indices(batch))
            batch += 1

    def _stretch(self, epoch: int, stream: int) -> NDArray[np.int64]:
        """Row numbers of one stream in one epoch, in reading order."""
        return _stretch(
            tuple(self.dataset.row_groups(self.split)), self.seed, epoch, self.streams, stream,
            self.batches_per_epoch * self.global_batch_size // self.streams,
        )  # fmt: skip


@functools.lru_cache(maxsize=64)
def _stretch(
    groups: tuple[RowGroup, ...], seed: int, epoch: int, streams: int, stream: int, length: int
) -> NDArray[np.int64]:
    """A stream's rows: its part of the epoch's list of row groups, permuted in windows by keys of their own."""
    order = np.random.default_rng([seed, epoch]).permutation(len(groups))
    rows = np.concatenate([np.arange(groups[g].first, groups[g].first + groups[g].rows) for g in order])
    # The list is turned by a seeded amount, so that what falls off its end is not always from the same places.
    turn = int(np.random.default_rng([seed, epoch, streams]).integers(len(rows)))
    mine = np.roll(rows, turn)[stream * length : (stream + 1) * length]
    windows = [mine[start : start + _WINDOW] for start in range(0, length, _WINDOW)]
    return np.concatenate(
        [np.random.default_rng([seed, epoch, stream, n, 1]).permutation(window) for n, window in enumerate(windows)]
    )


class _RowReader:
    """Reads rows by number and keeps the row groups used last."""

    def __init__(self, dataset: Dataset, split: str) -> None:
        self.dataset, self.split = dataset, split
        self.groups = dataset.row_groups(split)
        self.firsts = np.array([group.first for group in self.groups])
        self.cache: OrderedDict[int, Rows] = OrderedDict()

    def read(self, indices: Sequence[int] | NDArray[np.int64]) -> Rows:
        """The rows with these numbers, in this order."""
        numbers = np.searchsorted(self.firsts, indices, side="right") - 1
        picked = [(self._group(int(n)), int(i) - int(self.firsts[n])) for n, i in zip(numbers, indices, strict=True)]
        return Rows(
            np.stack([group.pixels[at] for group, at in picked]),
            np.array([group.labels[at] for group, at in picked]),
            np.asarray(indices, dtype=np.int64),
        )

    def _group(self, number: int) -> Rows:
        """A row group, from the cache where it is there."""
        if number not in self.cache:
            self.cache[number] = self.dataset.read_group(self.split, self.groups[number])
        self.cache.move_to_end(number)
        while len(self.cache) > _CACHED_GROUPS:
            self.cache.popitem(last=False)
        return self.cache[number]
