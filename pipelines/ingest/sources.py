"""What lies at the sources: the objects to read, and the units of work that they are read in."""

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from pipelines import storage
from pipelines.config import IngestConfig, PipelineError
from pipelines.images import OTHER_SUFFIXES, SUFFIXES
from pipelines.storage import ObjectInfo

TARS = (".tar", ".tar.gz", ".tgz", ".tar.zst")
PARQUETS = (".parquet",)
TABLES = (".jsonl", ".ndjson", ".csv", ".tsv")
INDEXES = (".idx", "index.json")
_PICTURES_IN_UNIT = 256
_RESULTS = ("cartoons", "datasets", "models", "images", "evaluations")


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
    """All objects of all sources, sorted by URI, each with the root that it was found under."""

    roots: dict[str, str] = field(default_factory=dict)
    taken: tuple[ObjectInfo, ...] = ()
    ignored: tuple[ObjectInfo, ...] = ()

    def without(self, known: set[tuple[str, int, str]]) -> "Listing":
        """The listing less the objects that are known already."""
        taken = tuple(info for info in self.taken if (info.uri, info.size, info.version) not in known)
        return Listing(self.roots, taken, self.ignored)


def list_sources(config: IngestConfig) -> Listing:
    """List all sources. Raises StorageError where one does not exist, PipelineError where none has a picture."""
    roots: dict[str, str] = {}
    objects: dict[str, ObjectInfo] = {}
    explicit: set[str] = set()
    for source in config.source:
        found = [info for info in storage.list_objects(source) if not _is_result(config.store, source, info.uri)]
        if any(mark in source for mark in "*?[") or [info.uri for info in found] == [storage.normalise(source)]:
            explicit |= {info.uri for info in found}
        for info in found:
            roots.setdefault(info.uri, _root(source))
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
    return Listing(roots, taken, ignored)


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


def resolve(base: str, address: str) -> str:
    """The URI that a table or shard at `base` means. Raises ValueError on an address of a kind that is not read."""
    if "://" in address or address.startswith("/"):
        if not address.startswith(("s3://", "file://", "/")):
            raise ValueError(f"{address}: only paths and s3:// are read; fetch it into a folder or bucket first")
        return storage.normalise(address)
    return storage.join(base.rsplit("/", 1)[0], address)


def _ends(uri: str, suffixes: tuple[str, ...]) -> bool:
    return uri.lower().endswith(suffixes)


def _is_taken(uri: str, explicit: bool) -> bool:
    """Whether an object is read; a table among pictures is only read where it was named itself."""
    return _ends(uri, SUFFIXES + OTHER_SUFFIXES + TARS + PARQUETS) or (explicit and _ends(uri, TABLES))


def _is_result(store: str, source: str, uri: str) -> bool:
    """Whether an object is a result that the store keeps among the pictures; a result named itself is a source."""
    folders = (f"{storage.join(store, name)}/" for name in _RESULTS)
    return any(uri.startswith(folder) and not f"{source}/".startswith(folder) for folder in folders)


def _root(source: str) -> str:
    """The folder that classes are folders of: the source, or of a glob the part before its first mark."""
    marks = [source.index(mark) for mark in "*?[" if mark in source]
    return storage.normalise(source[: min(marks)].rpartition("/")[0] or "." if marks else source)


def _group(number: int, kind: str, entries: list[Entry]) -> Unit:
    return Unit(number, kind, sum(max(entry.size, 0) for entry in entries), entries=tuple(entries))


def _files(listing: Listing) -> Iterator[Entry]:
    for info in listing.taken:
        if not _ends(info.uri, TARS + PARQUETS + TABLES):
            yield Entry(info.uri, info.size, info.version, _folder_class(listing.roots[info.uri], info.uri))


def _folder_class(root: str, uri: str) -> str | None:
    """The class of a picture in one folder per class: the first folder below the source; None in a flat folder."""
    below = uri.removeprefix(root).lstrip("/") if uri.startswith(root) else ""
    return below.split("/")[0] if "/" in below else None


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
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if _ends(uri, (".tsv",)) else ",")
    columns = list(reader.fieldnames or [])
    check_field(uri, "uri_field", config.uri_field, columns, required=True)
    check_field(uri, "class_field", config.class_field, columns)
    check_field(uri, "caption_field", config.caption_field, columns)
    for row in reader:
        yield reader.line_num, row, ""


def _json_rows(uri: str, text: str, config: IngestConfig) -> Iterator[tuple[int, dict[str, Any], str]]:
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            yield number, {}, f"no JSON: {error}"
            continue
        if not isinstance(row, dict):
            yield number, {}, "no JSON object"
            continue
        if number == 1:
            check_field(uri, "uri_field", config.uri_field, list(row), required=True)
        yield number, row, ""


def _entry(table: str, place: str, row: dict[str, Any], error: str, config: IngestConfig) -> Entry:
    """One row of a table; a row that cannot be used is rejected by itself."""
    if error:
        return Entry(place, named_in=place, reason="bad_row", error=error)
    address, label = row.get(config.uri_field), row.get(config.class_field)
    if not address:
        return Entry(place, named_in=place, reason="missing_object", error=f"no address in {config.uri_field}")
    try:
        uri = resolve(table, str(address))
    except ValueError as refused:
        return Entry(place, named_in=place, reason="unsupported", error=str(refused))
    caption = row.get(config.caption_field)
    named = None if label is None or label == "" else str(label)
    return Entry(uri, class_name=named, caption="" if caption is None else str(caption), named_in=place)


def check_field(uri: str, setting: str, wanted: str, there: list[str], required: bool = False) -> None:
    """Raise PipelineError where a field that was asked for by name is not there."""
    default = IngestConfig.model_fields[setting].default
    if wanted not in there and (required or wanted != default):
        raise PipelineError(
            f"{uri}: no column {wanted!r}; there are {', '.join(there)}; say which with --{setting.replace('_', '-')}"
        )
