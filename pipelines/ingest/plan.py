"""The plan of a dataset: which staged picture goes into which row of which shard, decided before any is written."""

import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import storage
from pipelines.config import IngestConfig
from pipelines.ingest.duplicates import Part, drop_exact, near_duplicates, sorted_keys, staged
from pipelines.ingest.units import KEYS, to_lines

SPLITS = ("train", "heldout")
_ROWS_IN_PART = 65_536
_LINES_IN_PART = 10_000
_SHOWN = 600
_MOST_SHOWN, _FEWEST_SHOWN, _SHOWN_WITHOUT_CLASS = 24, 2, 96


class Lines:
    """Rows written as JSON Lines parts of bounded size, in the order that they come."""

    def __init__(self, folder: str, stem: str) -> None:
        self.folder, self.stem = folder, stem
        self.rows: list[dict[str, Any]] = []
        self.parts: list[dict[str, Any]] = []

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Take rows; writes full parts."""
        self.rows += rows
        while len(self.rows) >= _LINES_IN_PART:
            self._write(self.rows[:_LINES_IN_PART])
            self.rows = self.rows[_LINES_IN_PART:]

    def close(self) -> list[dict[str, Any]]:
        """Write what is left; the parts for the manifest."""
        if self.rows:
            self._write(self.rows)
            self.rows = []
        return self.parts

    def _write(self, rows: list[dict[str, Any]]) -> None:
        part = storage.put_part(self.folder, f"{self.stem}-{len(self.parts):05}", ".jsonl", to_lines(rows))
        self.parts.append({**part, "rows": len(rows)})


@dataclass
class Plan:
    """What the shards will hold, and what became of every picture that decoded."""

    shards: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    classes: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    shown: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    sums: list[int] = field(default_factory=lambda: [0, 0])
    duplicates: list[dict[str, Any]] = field(default_factory=list)
    rare: list[dict[str, Any]] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """For the staging folder, from where a later run goes on."""
        return {**vars(self), "classes": dict(self.classes), "counts": dict(self.counts)}


def make_plan(
    config: IngestConfig, uri: str, staging: str, new: list[Part], old: list[Part], known: dict[str, int]
) -> Plan:
    """Decide on every staged picture. `known` counts the pictures by class of the dataset that this one extends."""
    plan = Plan()
    duplicates = Lines(uri, "rejected/duplicates")
    survivors = _drop_exact(plan, duplicates, staging, new + old)
    near: dict[str, tuple[str, int]] = {}
    if config.near_duplicates and survivors:
        parts = [Part(staging, part["name"], part["sha256"], old=False) for part in survivors]
        near = near_duplicates(parts + old, config.near_duplicates)
    counts = Counter(known)
    for table in _read(staging, survivors):
        counts.update(_alive(table, near)["class"].to_pylist())
    rare = {name for name, count in counts.items() if name and count < config.min_per_class}
    _assign(plan, config, uri, staging, survivors, near, rare, duplicates)
    plan.duplicates = duplicates.close()
    return plan


def shown_of(name: str, classes: int) -> int:
    """How many pictures the contact sheet of a class shows; of those without a class (an empty name) more."""
    return max(_FEWEST_SHOWN, min(_MOST_SHOWN, _SHOWN // max(classes, 1))) if name else _SHOWN_WITHOUT_CLASS


def _drop_exact(plan: Plan, duplicates: Lines, staging: str, parts: list[Part]) -> list[dict[str, Any]]:
    """Keep the first picture of every digest; staged parts of the survivors' keys, in digest order."""
    last, waiting, written = ("", ""), list[pa.Table](), list[dict[str, Any]]()
    for table in sorted_keys(parts) if parts else ():
        kept, dropped, last = drop_exact(table, last)
        duplicates.add(dropped)
        plan.counts["duplicates"] += len(dropped)
        waiting.append(kept)
        if sum(map(len, waiting)) >= _ROWS_IN_PART:
            written.append(staged(staging, f"survivors/{len(written):05}", waiting))
            waiting = []
    if sum(map(len, waiting)):
        written.append(staged(staging, f"survivors/{len(written):05}", waiting))
    return written


def _read(staging: str, parts: list[dict[str, Any]]) -> Iterator[pa.Table]:
    for part in parts:
        yield pq.read_table(io.BytesIO(storage.read_part(staging, part)))


def _alive(table: pa.Table, near: dict[str, tuple[str, int]]) -> pa.Table:
    return table.filter(pa.array([digest not in near for digest in table["digest"].to_pylist()], pa.bool_()))


def _assign(
    plan: Plan, config: IngestConfig, uri: str, staging: str, survivors: list[dict[str, Any]],
    near: dict[str, tuple[str, int]], rare: set[str], duplicates: Lines,
) -> None:  # fmt: skip
    """Cut the pictures that stay into shards, split by split, in digest order: every shard is a fair sample."""
    cutters = {split: _Cutter(staging, split, config.shard_size) for split in SPLITS}
    too_few = Lines(uri, "rejected/rare")
    for table in _read(staging, survivors):
        rows = table.select(["digest", "source"]).to_pylist() if near else []
        alike = [(row["source"], *near[row["digest"]]) for row in rows if row["digest"] in near]
        duplicates.add([{"source": new, "same_as": kept, "distance": bits} for new, kept, bits in alike])
        plan.counts["duplicates"] += len(alike)
        alive = _alive(table, near)
        is_rare = pa.array([name in rare for name in alive["class"].to_pylist()], pa.bool_())
        dropped = alive.filter(is_rare).select(["source", "class"]).to_pylist()
        told = f"fewer than {config.min_per_class} pictures of this class: "
        too_few.add(
            [{"source": row["source"], "reason": "rare_class", "error": told + row["class"]} for row in dropped]
        )
        plan.counts["rare"] += len(dropped)
        kept = alive.filter(pa.array(~np.asarray(is_rare.to_pylist(), dtype=bool)))
        _count(plan, kept)
        for split in SPLITS:
            cutters[split].add(
                kept.filter(pa.array(np.asarray(kept["heldout"].to_pylist(), dtype=bool) == (split == "heldout")))
            )
    plan.shards = {split: cutter.close() for split, cutter in cutters.items()}
    plan.rare = too_few.close()


def _count(plan: Plan, kept: pa.Table) -> None:
    """Add pictures that stay to the counts, the statistics and the contact sheets."""
    plan.counts["kept"] += len(kept)
    plan.classes.update(name for name in kept["class"].to_pylist() if name)
    for row in kept.select(["heldout", "sum", "squares"]).to_pylist():
        if not row["heldout"]:
            plan.sums = [plan.sums[0] + row["sum"], plan.sums[1] + row["squares"]]
            plan.counts["train"] += 1
    for row in kept.select(["digest", "class", "blob", "offset", "length", "crc"]).to_pylist():
        shown = plan.shown.setdefault(row["class"], [])
        if len(shown) < shown_of(row["class"], classes=1):
            shown.append(row)


class _Cutter:
    """Cuts a stream of rows into staged plans of equal length, one for each shard to come."""

    def __init__(self, staging: str, split: str, rows: int) -> None:
        self.staging, self.split, self.rows = staging, split, rows
        self.waiting: pa.Table = KEYS.empty_table()
        self.plans: list[dict[str, Any]] = []

    def add(self, table: pa.Table) -> None:
        """Take rows; writes the plans of full shards."""
        self.waiting = pa.concat_tables([self.waiting, table.select(KEYS.names)]).combine_chunks()
        while len(self.waiting) >= self.rows:
            self._write(self.waiting.slice(0, self.rows))
            self.waiting = self.waiting.slice(self.rows)

    def close(self) -> list[dict[str, Any]]:
        """Write what is left; the plans in order."""
        if len(self.waiting):
            self._write(self.waiting)
        return self.plans

    def _write(self, table: pa.Table) -> None:
        self.plans.append(staged(self.staging, f"plan/{self.split}-{len(self.plans):05}", [table]))
