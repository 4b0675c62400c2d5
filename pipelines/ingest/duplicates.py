"""Duplicates among all staged pictures, and against an earlier dataset: found by Ray Data's shuffle of their keys."""

import io
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines import storage
from pipelines.ingest.hashing import COLOUR_DISTANCE
from pipelines.ingest.units import KEYS, to_parquet

_ROWS = 8192
_COLUMNS = [*KEYS.names, "old"]
_HASH_BITS = 64


@dataclass(frozen=True)
class Part:
    """A Parquet part with keys: staged ones, or the columns of an earlier dataset's shard (`old`)."""

    folder: str
    name: str
    sha256: str
    old: bool

    def to_row(self) -> dict[str, Any]:
        """As a row for Ray Data."""
        return {"folder": self.folder, "name": self.name, "sha256": self.sha256, "old": self.old}


def sorted_keys(parts: list[Part]) -> Iterator[pa.Table]:
    """All keys, by (digest, old before new, source): Ray Data sorts, this process sees a batch at a time.

    The rest of the order tells apart rows of one source, such as a table that gives a picture five captions.
    """
    order = ["digest", "old", "source", "class", "caption", "heldout"]
    rows = _keys(parts).sort(order, descending=[name == "old" for name in order])
    for batch in rows.iter_batches(batch_size=_ROWS, batch_format="pyarrow"):
        yield batch.select(_COLUMNS)


def drop_exact(table: pa.Table, last: tuple[str, str]) -> tuple[pa.Table, list[dict[str, Any]], tuple[str, str]]:
    """Of rows in digest order, the new ones that come first of their digest, and the others with what they repeat.

    `last` is the digest before the table and the source that was kept for it; the last value is the same for what
    follows.
    """
    digests = np.asarray(table["digest"].to_pylist(), dtype=object)
    before = np.concatenate([[last[0]], digests[:-1]])
    first = digests != before
    old = table["old"].to_numpy(zero_copy_only=False)
    sources = table["source"].to_pylist()
    owner = np.maximum.accumulate(np.where(first, np.arange(len(digests)), -1))
    kept = [last[1] if at < 0 else sources[at] for at in owner]
    dropped = [
        {"source": sources[at], "same_as": kept[at], "distance": 0} for at in np.flatnonzero(~first & ~old).tolist()
    ]
    return table.filter(pa.array(first & ~old)), dropped, (str(digests[-1]), kept[-1])


def near_duplicates(parts: list[Part], below: int) -> dict[str, tuple[str, int]]:
    """Digests of new pictures to drop -> (source of the picture each looks like, bits of difference).

    Two pictures that differ in fewer than `below` bits agree in one of `below` stretches of the hash (pigeonhole), so
    only pictures that share a stretch are compared, each stretch's in one task. Linked pictures make a group, of
    which an old picture or else the smallest source stays. Memory here grows with the near duplicates alone.
    """
    rows = _keys(parts).map_batches(_stretches, batch_format="pyarrow", batch_size=_ROWS, fn_kwargs={"count": below})
    links = rows.groupby("stretch").map_groups(_links, batch_format="pyarrow", fn_kwargs={"below": below})
    groups = _Groups()
    for link in links.iter_rows():
        a, b = ((not link[f"old_{side}"], link[f"source_{side}"], link[f"digest_{side}"]) for side in "ab")
        groups.join(a, b, link["distance"])
    return groups.dropped()


class _Groups:
    """Linked pictures; the representative of a group is its smallest member (old ones come first)."""

    def __init__(self) -> None:
        self.parent: dict[tuple[bool, str, str], tuple[bool, str, str]] = {}
        self.distance: dict[tuple[bool, str, str], int] = {}

    def root(self, node: tuple[bool, str, str]) -> tuple[bool, str, str]:
        """The representative of a picture's group."""
        while self.parent.setdefault(node, node) != node:
            self.parent[node] = self.parent[self.parent[node]]
            node = self.parent[node]
        return node

    def join(self, a: tuple[bool, str, str], b: tuple[bool, str, str], distance: int) -> None:
        """Make one group of two pictures' groups; `distance` is kept for telling."""
        for node in (a, b):
            self.distance[node] = min(distance, self.distance.get(node, distance))
        first, second = sorted((self.root(a), self.root(b)))
        self.parent[second] = first

    def dropped(self) -> dict[str, tuple[str, int]]:
        """The new pictures that are not their group's representative."""
        kept = {node: self.root(node) for node in list(self.parent)}
        return {node[2]: (root[1], self.distance[node]) for node, root in kept.items() if node != root and node[0]}


def _keys(parts: list[Part]) -> Any:
    """The keys of all parts as a Ray dataset."""
    import ray.data

    return ray.data.from_items([part.to_row() for part in parts], override_num_blocks=len(parts)).map_batches(
        _read_keys, batch_size=1, batch_format="numpy"
    )


def _read_keys(batch: dict[str, NDArray[Any]]) -> pa.Table:
    """The keys of one part; of an earlier dataset's shard only the columns that are needed are fetched."""
    folder, name, old = str(batch["folder"][0]), str(batch["name"][0]), bool(batch["old"][0])
    if old:
        with storage.open_random(storage.join(folder, name)) as file:
            table = pq.read_table(file, columns=["digest", "source", "hash", "colours"])
        for column in KEYS:
            if column.name not in table.column_names:
                empty = pa.array([_NOTHING[column.type]] * len(table), type=column.type)
                table = table.append_column(column, empty)
    else:
        data = storage.read_part(folder, {"name": name, "sha256": str(batch["sha256"][0])})
        table = pq.read_table(io.BytesIO(data))
    return table.select(KEYS.names).cast(KEYS).append_column("old", pa.array([old] * len(table)))


_NOTHING = {pa.string(): "", pa.bool_(): False, pa.int64(): 0, pa.uint64(): 0, pa.binary(): b""}


def _stretches(table: pa.Table, count: int) -> pa.Table:
    """Every picture once for each stretch of its hash."""
    hashes = np.asarray(table["hash"].to_numpy(), dtype=np.uint64)
    edges = np.linspace(0, _HASH_BITS, count + 1).astype(int)
    slim = table.select(["digest", "source", "old", "hash", "colours"])
    parts = []
    for number, (start, stop) in enumerate(itertools.pairwise(edges.tolist())):
        mask = np.uint64((1 << (stop - start)) - 1)
        value = (hashes >> np.uint64(start)) & mask
        name = pc.binary_join_element_wise(pa.array([str(number)] * len(slim)), pa.array(value).cast(pa.string()), ":")
        parts.append(slim.append_column("stretch", name))
    return pa.concat_tables(parts)


def _links(table: pa.Table, below: int) -> pa.Table:
    """Pairs of one stretch that look alike, as few as link all that belong together."""
    order = pc.sort_indices(table, [("old", "descending"), ("source", "ascending")])
    table = table.take(order)
    hashes = np.asarray(table["hash"].to_numpy(), dtype=np.uint64)
    colours = np.frombuffer(b"".join(table["colours"].to_pylist()), np.uint8).reshape(len(table), -1).astype(np.int16)
    first, second, distances = [], [], []
    group = np.arange(len(table))
    for at in range(1, len(table)):
        bits = np.bitwise_count(hashes[:at] ^ hashes[at])
        alike = (bits < below) & (np.abs(colours[:at] - colours[at]).max(axis=1) <= COLOUR_DISTANCE)
        for other in np.flatnonzero(alike).tolist():
            if group[other] != group[at]:
                group[group == max(group[other], group[at])] = min(group[other], group[at])
                first.append(other)
                second.append(at)
                distances.append(int(bits[other]))
    a, b = table.take(pa.array(first, pa.int64())), table.take(pa.array(second, pa.int64()))
    names = ("digest", "source", "old")
    return pa.table(
        {f"{name}_a": a[name] for name in names} | {f"{name}_b": b[name] for name in names} | {"distance": distances},
        schema=_LINKS,
    )


_LINKS = pa.schema(
    [(f"{name}_{side}", kind) for side in "ab" for name, kind in
     (("digest", pa.string()), ("source", pa.string()), ("old", pa.bool_()))] + [("distance", pa.int64())]
)  # fmt: skip


def staged(folder: str, stem: str, tables: list[pa.Table]) -> dict[str, Any]:
    """Write tables as one staged Parquet part; its entry."""
    table = pa.concat_tables(tables)
    return {**storage.put_part(folder, stem, ".parquet", to_parquet(table)), "rows": len(table)}
