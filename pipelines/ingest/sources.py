"""What lies at the sources: the objects to read, and the units of work that they are read in."""

import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from pipelines import storage
from pipelines.cells import printable, resolve, word
from pipelines.config import IngestConfig, PipelineError
from pipelines.images import OTHER_SUFFIXES, SUFFIXES
from pipelines.storage import ObjectInfo

TARS = (".tar", ".tar.gz", ".tgz", ".tar.zst")
PARQUETS = (".parquet",)
TABLES = (".jsonl", ".ndjson", ".csv", ".tsv")
_MANY = TARS + PARQUETS + TABLES
INDEXES = (".idx", "index.json")
_PICTURES_IN_UNIT = 256
# Where a store keeps results, below it: each in a folder whose name is a digest.
_RESULT = re.compile(r"/(cartoons|(datasets|models|images|evaluations)/[^/]+)/[0-9a-f]{16}/")


Fingerprint = tuple[str, int, str, str]


@dataclass(frozen=True)
class Entry:
    """A picture that stands by itself: its URI, its class by folder or table, and where a table named it."""

    uri: str
    size: int = -1
    version: str = ""
    class_name: str | None = None
    caption: str = ""
    named_in: str = ""
    reason: str = ""
    error: str = ""

    @property
    def info(self) -> ObjectInfo | None:
        """The object as listed; None where only a table names it."""
        return ObjectInfo(self.uri, self.size, self.version) if self.size >= 0 else None


@dataclass(frozen=True)
class Unit:
    """A unit of work, read by one task and recorded as one: a shard, or some pictures."""

    number: int
    kind: str
    bytes: int
    shard: ObjectInfo | None = None
    entries: tuple[Entry, ...] = ()

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return self.shard.uri if self.shard else f"{self.entries[0].uri} and {len(self.entries) - 1} more"

    def to_row(self) -> dict[str, Any]:
        """As a row for Ray Data."""
        return {"unit": json.dumps(asdict(self))}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "Unit":
        """Inverse of `to_row`."""
        fields = json.loads(row["unit"])
        shard = ObjectInfo(**fields["shard"]) if fields["shard"] else None
        return cls(**{**fields, "shard": shard, "entries": tuple(Entry(**entry) for entry in fields["entries"])})


@dataclass(frozen=True)
class Listing:
    """All objects of all sources, sorted by URI, and the classes of those that lie in one folder per class."""

    classes: dict[str, str] = field(default_factory=dict)
    taken: tuple[ObjectInfo, ...] = ()
    ignored: tuple[ObjectInfo, ...] = ()

    def fingerprint(self, info: ObjectInfo) -> Fingerprint:
        """What an object is known by in later runs: URI, size, version, and its class by folder.

        That is another one where the same object is found below another source.
        """
        return printable(info.uri), info.size, info.version, printable(self.classes.get(info.uri, ""))

    def without(self, known: set[Fingerprint]) -> "Listing":
        """The listing less the objects that are known already."""
        taken = tuple(info for info in self.taken if self.fingerprint(info) not in known)
        return Listing(self.classes, taken, self.ignored)


def list_sources(config: IngestConfig) -> Listing:
    """List all sources. Raises StorageError where one does not exist, PipelineError where none has a picture."""
    classes: dict[str, str] = {}
    objects: dict[str, ObjectInfo] = {}
    explicit: set[str] = set()
    for source in config.source:
        found = [info for info in storage.list_objects(source) if not _is_result(config.store, source, info.uri)]
        pattern = storage.is_pattern(source)
        if pattern or [info.uri for info in found] == [storage.normalise(source)]:
            explicit |= {info.uri for info in found}
        root = _root(source) if pattern else storage.normalise(source)
        for info in found:
            if info.uri not in objects and config.labels != "ignored":
                classes[info.uri] = _folder_class(root, info.uri)
            objects.setdefault(info.uri, info)
    ordered = [objects[uri] for uri in sorted(objects)]
    taken = tuple(info for info in ordered if _is_taken(info.uri, info.uri in explicit))
    if not taken:
        raise PipelineError(
            f"{', '.join(config.source)}: {len(ordered)} objects, but no picture ({' '.join(SUFFIXES)}), "
            f"no shard ({' '.join(TARS + PARQUETS)}) and, named itself, no table ({' '.join(TABLES)})"
        )
    left = {info.uri for info in taken}
    ignored = tuple(info for info in ordered if info.uri not in left and not info.uri.endswith(INDEXES))
    return Listing(classes, taken, ignored)


def units(config: IngestConfig, listing: Listing) -> Iterator[Unit]:
    """Units of work in a fixed order: every shard one, pictures and tables' rows by the hundred."""
    number = 0
    for info in listing.taken:
        kind = "tar" if _ends(info.uri, TARS) else "parquet" if _ends(info.uri, PARQUETS) else ""
        if kind:
            yield Unit(number, kind, info.size, info)
            number += 1
    for kind, entries in (("files", _files(listing)), ("rows", _rows(config, listing))):
        group: list[Entry] = []
        for entry in entries:
            group.append(entry)
            if len(group) == _PICTURES_IN_UNIT:
                yield _group(number, kind, group)
                number, group = number + 1, []
        if group:
            yield _group(number, kind, group)
            number += 1


def _ends(uri: str, suffixes: tuple[str, ...]) -> bool:
    return uri.lower().endswith(suffixes)


def _is_taken(uri: str, explicit: bool) -> bool:
    """Whether an object is read; a table among pictures is only read where it was named itself."""
    return _ends(uri, SUFFIXES + OTHER_SUFFIXES + TARS + PARQUETS) or (explicit and _ends(uri, TABLES))


def _is_result(store: str, source: str, uri: str) -> bool:
    """Whether an object is a result that the store keeps among the pictures; a result named itself is a source."""
    found = _RESULT.match(uri, len(store)) if uri.startswith(store) else None
    return found is not None and not f"{source}/".startswith(f"{store}/{found[1].partition('/')[0]}/")


def _root(source: str) -> str:
    """The folder that classes are folders of: of a pattern the part before its first mark."""
    first = min(source.index(mark) for mark in "*?[" if mark in source)
    return storage.normalise(source[:first].rpartition("/")[0] or ".")


def _group(number: int, kind: str, entries: list[Entry]) -> Unit:
    return Unit(number, kind, sum(max(entry.size, 0) for entry in entries), entries=tuple(entries))


def _files(listing: Listing) -> Iterator[Entry]:
    for info in listing.taken:
        if not _ends(info.uri, _MANY):
            yield Entry(info.uri, info.size, info.version, listing.classes.get(info.uri) or None)


def _folder_class(root: str, uri: str) -> str:
    """The class of a picture in one folder per class: the first folder below the source; empty for what has none."""
    below = uri.removeprefix(root).lstrip("/") if uri.startswith(root) and not _ends(uri, _MANY) else ""
    return below.split("/")[0] if "/" in below else ""


def _rows(config: IngestConfig, listing: Listing) -> Iterator[Entry]:
    """The rows of all tables."""
    for info in listing.taken:
        if _ends(info.uri, TABLES):
            try:
                text = storage.read_bytes(info.uri, info).decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise PipelineError(f"{info.uri}: no UTF-8 text ({error}); save the table as UTF-8") from error
            rows = _csv_rows if _ends(info.uri, (".csv", ".tsv")) else _json_rows
            for number, row, unreadable in rows(info.uri, text, config):
                yield _entry(info.uri, f"{info.uri}#{number}", row, unreadable, config)


def _csv_rows(uri: str, text: str, config: IngestConfig) -> Iterator[tuple[int, dict[str, Any], str]]:
    comma = "\t" if _ends(uri, (".tsv",)) else ","
    # Strict: a quote that is never closed would else make one caption of all rows that follow.
    reader = csv.DictReader(io.StringIO(text, newline=""), restkey="", delimiter=comma, strict=True)
    try:
        columns = list(reader.fieldnames or [])
        _check_fields(uri, config, columns)
        for row in reader:
            told = f"{len(columns) + len(row[''])} fields, {len(columns)} expected" if "" in row else ""
            yield reader.line_num, row, told
    except csv.Error as error:
        raise PipelineError(f"{uri}: after line {reader.line_num}: {error}; mend the table's quotes") from error


def _json_rows(uri: str, text: str, config: IngestConfig) -> Iterator[tuple[int, dict[str, Any], str]]:
    there: set[str] = set()
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield number, {}, f"no JSON: {error}"
            continue
        if not isinstance(row, dict):
            yield number, {}, "no JSON object"
            continue
        there |= set(row)
        yield number, row, ""
    if there:
        _check_fields(uri, config, sorted(there))


def _check_fields(uri: str, config: IngestConfig, there: list[str]) -> None:
    check_field(uri, "uri_field", config.uri_field, there, required=True)
    check_field(uri, "class_field", config.class_field, there)
    check_field(uri, "caption_field", config.caption_field, there)


def _entry(table: str, place: str, row: dict[str, Any], error: str, config: IngestConfig) -> Entry:
    """One row of a table; a row that cannot be used is rejected by itself."""
    if error:
        return Entry(place, named_in=place, reason="bad_row", error=error)
    address = word(row.get(config.uri_field))
    if not address:
        return Entry(place, named_in=place, reason="missing_object", error=f"no address in {config.uri_field}")
    try:
        uri = resolve(table, address)
    except ValueError as refused:
        return Entry(place, named_in=place, reason="unsupported", error=str(refused))
    caption = word(row.get(config.caption_field)) or ""
    return Entry(uri, class_name=word(row.get(config.class_field)), caption=caption, named_in=place)


def check_field(uri: str, setting: str, wanted: str, there: list[str], required: bool = False) -> None:
    """Raise PipelineError where a field that was asked for by name is not there."""
    default = IngestConfig.model_fields[setting].default
    if wanted not in there and (required or wanted != default):
        raise PipelineError(
            f"{uri}: no column {wanted!r}; there are {', '.join(there)}; say which with --{setting.replace('_', '-')}"
        )
