"""Datasets: the manifest, the shard reader, and the deterministic, resumable sample stream that training reads."""

import functools
import io
import itertools
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
from pipelines.images import Pixels, stored
from pipelines.storage import ObjectInfo

SCHEMA = pa.schema(
    [
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("class", pa.string()),
        ("caption", pa.string()),
        ("digest", pa.string()),
        ("source", pa.string()),
        ("hash", pa.uint64()),
        ("colours", pa.binary()),
    ]
)
# A window holds four row groups: enough to mix, few enough to keep in memory for every stream.
_GROUPS_IN_WINDOW = 4
_SHARDS_OPEN, _BYTES_OPEN = 8, 256 * 2**20
_WINDOWS_AHEAD = 2
_WINDOWS_IN_RUN = 512


class Rows(NamedTuple):
    """Pictures with what is known of them: uint8 [N, H, W, 3], label [N] (−1 for none), row number in the split [N]."""

    pixels: Pixels
    labels: NDArray[np.int64]
    ids: NDArray[np.int64]

    def cut(self, start: int, stop: int | None) -> "Rows":
        """The rows from `start` up to `stop`, or to the end."""
        return Rows(self.pixels[start:stop], self.labels[start:stop], self.ids[start:stop])

    def labels_of(self, classes: int) -> NDArray[np.int64] | None:
        """Labels [N], the null class `classes` where a picture has none; None for a network without classes."""
        return np.where(self.labels < 0, classes, self.labels) if classes else None


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

    @property
    def row_group(self) -> int:
        """Rows in every row group of a shard but its last."""
        return int(self.manifest["row_group"])

    def place(self, shard: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """The folder that a shard of the manifest lies in (an earlier dataset's, or this one's), and the shard."""
        folder = self.uri.rsplit("/", 1)[0]
        return (storage.join(folder, shard["folder"]) if "folder" in shard else self.uri), shard

    def sources(self) -> list[ObjectInfo]:
        """The objects that it was read from, tables among them. Raises StorageError where the list is damaged."""
        return [ObjectInfo(**row) for row in self.sources_table().select(["uri", "size", "version"]).to_pylist()]

    def sources_table(self) -> pa.Table:
        """These objects with their classes by folder, as they were listed. Raises StorageError as `sources` does."""
        return pq.read_table(io.BytesIO(storage.read_part(self.uri, self.manifest["sources"])))

    def origins(self) -> Iterator[str]:
        """Source of every picture: the URI of an object, in a shard followed by `#` and the picture's name there."""
        for folder, shard in (self.place(each) for shards in self.manifest["shards"].values() for each in shards):
            with storage.open_random(storage.join(folder, shard["name"])) as file:
                yield from pq.ParquetFile(file).read(columns=["source"])["source"].to_pylist()

    def shards_seen_from_beside(self) -> dict[str, list[dict[str, Any]]]:
        """The shards as the manifest of another dataset in the same folder points at them."""
        return {
            split: [{"folder": self.digest, **shard} for shard in shards]
            for split, shards in self.manifest["shards"].items()
        }

    def layout(self, split: str) -> "Layout":
        """How a split's rows lie in shards and row groups. Raises PipelineError on an unknown split."""
        if split not in self.manifest["shards"]:
            raise PipelineError(f"{self.uri}: no split {split!r}; there are {', '.join(self.manifest['shards'])}")
        return Layout(self.row_group, tuple(shard["rows"] for shard in self.manifest["shards"][split]))

    def rows(self, split: str) -> int:
        """Number of pictures in a split."""
        return sum(self.layout(split).shards)

    def read_group(self, split: str, group: "RowGroup") -> Rows:
        """Decode one row group. Raises StorageError where the shard is not what the manifest promised."""
        folder, shard = self.place(self.manifest["shards"][split][group.shard])
        table = _read_row_group(folder, shard["name"], shard["sha256"], group.number)
        images = table["image"].combine_chunks().field("bytes").to_pylist()
        pixels = np.stack([stored(data, self.manifest["encoding"], self.resolution) for data in images])
        index = {name: label for label, name in enumerate(self.class_names)}
        labels = np.array([index.get(name, -1) for name in table["class"].to_pylist()], dtype=np.int64)
        return Rows(pixels, labels, np.arange(group.first, group.first + group.rows, dtype=np.int64))

    def read(self, split: str, limit: int | None = None) -> Rows:
        """The first `limit` pictures of a split (default: all) in storage order."""
        parts, count, layout = [], 0, self.layout(split)
        for group in map(layout.group, range(len(_groups(layout)[0]))):
            if limit is not None and count >= limit:
                break
            parts.append(self.read_group(split, group))
            count += group.rows
        if not parts:
            raise PipelineError(f"{self.uri}: split {split!r} holds no pictures")
        return Rows(*(np.concatenate(columns)[:limit] for columns in zip(*parts, strict=True)))


class RowGroup(NamedTuple):
    """A row group: its shard's place in the manifest, its number there, the row number of its first row, its rows."""

    shard: int
    number: int
    first: int
    rows: int


class Layout(NamedTuple):
    """How a split's rows lie: rows in every row group of a shard but its last, and the rows of each shard."""

    row_group: int
    shards: tuple[int, ...]

    def group(self, number: int) -> RowGroup:
        """A row group of the split by its number in storage order."""
        firsts, sizes = _groups(self)
        ends = np.cumsum(self.shards)
        place = int(np.searchsorted(ends, firsts[number], side="right"))
        first = int(firsts[number])
        begun = int(ends[place]) - self.shards[place]
        return RowGroup(place, (first - begun) // self.row_group, first, int(sizes[number]))


def open_dataset(uri: str) -> Dataset:
    """The dataset at `uri`. Raises StorageError where there is none."""
    uri = storage.normalise(uri)
    return Dataset(uri, storage.read_manifest(uri, "dataset"))


def _read_row_group(folder: str, name: str, sha256: str, number: int) -> pa.Table:
    """One row group of a shard whose checksum this process has verified, once."""
    key = (folder, name, sha256)
    if key not in _verified:
        data = storage.read_part(folder, {"name": name, "sha256": sha256})
        _verified.add(key)
        _keep_open(key, data)
    if key in _open:
        _open.move_to_end(key)
        return _open[key][0].read_row_group(number, ["image", "class"])
    # Verified before and let go since: only the row group's own bytes are fetched again.
    with storage.open_random(storage.join(folder, name)) as file:
        return pq.ParquetFile(file).read_row_group(number, ["image", "class"])


def _keep_open(key: tuple[str, str, str], data: bytes) -> None:
    """Keep a shard in memory, and let go of the longest unread ones where they are too many or too large."""
    _open[key] = (pq.ParquetFile(io.BytesIO(data)), len(data))
    while len(_open) > 1 and (len(_open) > _SHARDS_OPEN or sum(size for _, size in _open.values()) > _BYTES_OPEN):
        _open.popitem(last=False)


_verified: set[tuple[str, str, str]] = set()
_open: OrderedDict[tuple[str, str, str], tuple[pq.ParquetFile, int]] = OrderedDict()


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
        if self.global_batch_size % self.streams or self.streams < self.world:
            raise PipelineError(
                f"streams: {self.streams} must divide global_batch_size={self.global_batch_size} "
                f"and be at least the {self.world} workers"
            )
        if self.batches_per_epoch < 1:
            raise PipelineError(
                f"{self.dataset.uri}: {sum(self.layout.shards)} pictures in split {self.split!r} do not fill one "
                f"global batch of {self.global_batch_size}; lower global_batch_size or add pictures"
            )

    @functools.cached_property
    def layout(self) -> "Layout":
        """How the split's rows lie in shards and row groups."""
        return self.dataset.layout(self.split)

    @functools.cached_property
    def batches_per_epoch(self) -> int:
        """Global batches in an epoch."""
        return sum(self.layout.shards) // self.global_batch_size

    @property
    def window(self) -> int:
        """Rows in a window, which a key of its own permutes; the last of an epoch may have fewer."""
        return _GROUPS_IN_WINDOW * self.dataset.row_group

    @property
    def share(self) -> int:
        """Rows of one stream in a global batch."""
        return self.global_batch_size // self.streams

    @property
    def own(self) -> range:
        """The streams that this rank reads."""
        return range(self.rank, self.streams, self.world)

    def places(self) -> NDArray[np.int64]:
        """Places in the global batch of this rank's share, in the order of its rows; the same in every batch."""
        return np.concatenate([np.arange(s * self.share, (s + 1) * self.share) for s in self.own])

    def indices(self, batch: int) -> NDArray[np.int64]:
        """Row numbers of this rank's share of the global batch number `batch`, counted from the start of training."""
        epoch, k = divmod(batch, self.batches_per_epoch)
        start, stop = k * self.share, (k + 1) * self.share
        parts = []
        for stream in self.own:
            first, last = start // self.window, (stop - 1) // self.window
            rows = np.concatenate([self.window_rows(Window(epoch, stream, n)) for n in range(first, last + 1)])
            parts.append(rows[start - first * self.window : stop - first * self.window])
        return np.concatenate(parts)

    def batches(self, first: int, last: int | None = None, ahead: bool = False) -> Iterator[Rows]:
        """The rank's share of the global batches from `first` up to `last`, without reading what was before.

        Without `last` they have no end. With `ahead`, Ray Data reads and decodes the windows to come in other
        processes, in order; else they are read here. The batches are the same.
        """
        windows = self._read_ahead(first, last) if ahead else map(self.read_window, self._windows(first, last))
        skip = first % self.batches_per_epoch * self.share % self.window
        waiting: list[Rows] = []
        for _ in range(first, last) if last is not None else itertools.count():
            while not waiting or len(waiting[0].ids) < self.share:
                # All streams are at the same place, so their next windows are needed together.
                fresh = [next(windows).cut(skip, None) for _ in self.own]
                waiting = [_joined(pair) for pair in zip(waiting, fresh, strict=True)] if waiting else fresh
                skip = 0
            yield _joined([rows.cut(0, self.share) for rows in waiting])
            waiting = [rows.cut(self.share, None) for rows in waiting]

    def window_rows(self, window: "Window") -> NDArray[np.int64]:
        """Row numbers of a window, in reading order."""
        epoch, stream, number = window
        order, ends = _epoch_order(self.layout, self.seed, epoch)
        total, length = int(ends[-1]), self.batches_per_epoch * self.share
        # The list is turned by a seeded amount, so that what falls off its end is not always from the same places.
        turn = int(np.random.default_rng([self.seed, epoch, self.streams]).integers(total))
        first, last = number * self.window, min((number + 1) * self.window, length)
        place = (stream * length + np.arange(first, last) - turn) % total
        at = np.searchsorted(ends, place, side="right")
        firsts, sizes = _groups(self.layout)
        rows = firsts[order[at]] + place - (ends[at] - sizes[order[at]])
        return np.random.default_rng([self.seed, epoch, stream, number, 1]).permutation(rows)

    def read_window(self, window: "Window") -> Rows:
        """The pictures of a window, in reading order; every row group that it touches is read once."""
        rows = self.window_rows(window)
        firsts, _ = _groups(self.layout)
        numbers = np.searchsorted(firsts, rows, side="right") - 1
        read = {n: self.dataset.read_group(self.split, self.layout.group(n)) for n in sorted(set(numbers.tolist()))}
        picked = [(read[n], int(row) - int(firsts[n])) for n, row in zip(numbers.tolist(), rows, strict=True)]
        return Rows(
            np.stack([group.pixels[at] for group, at in picked]),
            np.array([group.labels[at] for group, at in picked], dtype=np.int64),
            rows,
        )

    def _windows(self, first: int, last: int | None) -> Iterator["Window"]:
        """The windows that the batches from `first` up to `last` need, in the order in which they need them."""
        for epoch in itertools.count(first // self.batches_per_epoch):
            begin = max(first - epoch * self.batches_per_epoch, 0)
            end = self.batches_per_epoch if last is None else last - epoch * self.batches_per_epoch
            if end <= 0:
                return
            stop = min(end, self.batches_per_epoch) * self.share
            for number in range(begin * self.share // self.window, -(-stop // self.window)):
                yield from (Window(epoch, stream, number) for stream in self.own)

    def _read_ahead(self, first: int, last: int | None) -> Iterator[Rows]:
        """The windows read by Ray Data, a task each, a bounded number of them ahead of their use."""
        import ray.data

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.execution_options.preserve_order = True
        windows = self._windows(first, last)
        while some := list(itertools.islice(windows, _WINDOWS_IN_RUN)):
            specs = ray.data.from_items([window._asdict() for window in some], override_num_blocks=len(some))
            # Reading takes part of a core that a training process holds already: it must not wait for one of its own.
            blocks = specs.map_batches(
                _read_window, batch_size=1, batch_format="numpy", fn_kwargs={"stream": self}, num_cpus=0,
                compute=ray.data.TaskPoolStrategy(size=_WINDOWS_AHEAD),
            ).iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=_WINDOWS_AHEAD)  # fmt: skip
            yield from _whole(iter(blocks), [len(self.window_rows(window)) for window in some])


class Window(NamedTuple):
    """A stretch of one stream in one epoch that is read and permuted as one."""

    epoch: int
    stream: int
    number: int


def _read_window(batch: dict[str, NDArray[Any]], stream: SampleStream) -> dict[str, NDArray[Any]]:
    window = Window(*(int(batch[name][0]) for name in Window._fields))
    return stream.read_window(window)._asdict()


def _whole(blocks: Iterator[dict[str, NDArray[Any]]], lengths: list[int]) -> Iterator[Rows]:
    """Blocks as windows of these lengths: Ray Data cuts what is large."""
    kept: list[Rows] = []
    for length in lengths:
        while sum(len(rows.ids) for rows in kept) < length:
            kept.append(Rows(**next(blocks)))
        rows = _joined(kept)
        yield rows.cut(0, length)
        kept = [rows.cut(length, None)]


def _joined(parts: Sequence[Rows]) -> Rows:
    return parts[0] if len(parts) == 1 else Rows(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


@functools.lru_cache(maxsize=4)
def _groups(layout: Layout) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Number of the first row of each row group, and its rows; as arrays, since a dataset may have millions of them."""
    shards = np.array(layout.shards, dtype=np.int64)
    counts = -(-shards // layout.row_group)
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    firsts = np.repeat(np.cumsum(shards) - shards, counts) + number * layout.row_group
    return firsts, np.minimum(np.repeat(shards, counts) - number * layout.row_group, layout.row_group)


@functools.lru_cache(maxsize=4)
def _epoch_order(layout: Layout, seed: int, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The order of the row groups in an epoch, and where each ends in the list of rows that they make."""
    _, sizes = _groups(layout)
    order = np.random.default_rng([seed, epoch]).permutation(len(sizes))
    return order, np.cumsum(sizes[order])
