"""The items of a unit: each picture's bytes and what goes with them, or the reason why there is none."""

import dataclasses
import json
import os
import tarfile
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import storage
from pipelines.config import IngestConfig
from pipelines.images import OTHER_SUFFIXES, SUFFIXES
from pipelines.ingest.sources import TARS, Entry, Unit, check_field, resolve
from pipelines.storage import ObjectInfo

_READ_AT_A_TIME = 16
_ROWS_AT_A_TIME = 64
_BLOCK = 512
_MEMBER_BYTES = 1 << 30


@dataclass(frozen=True)
class Item:
    """One thing found in a source: a picture's bytes and what goes with them, or the reason why it is none."""

    source: str
    data: bytes = b""
    class_name: str | None = None
    caption: str = ""
    reason: str = ""
    error: str = ""


@dataclass
class Shard:
    """What a shard turned out to be, besides its items: where it broke off, and which fields its samples have."""

    uri: str
    read: int = 0
    incomplete: str = ""
    missing: int | None = None
    fields: set[str] = field(default_factory=set)
    told: bool = False

    def as_json(self) -> dict[str, Any]:
        """For the manifest; `missing` is None where nothing tells how many samples there should be."""
        return {"uri": self.uri, "read": self.read, "missing": self.missing, "error": self.incomplete}


def items(unit: Unit, config: IngestConfig, shard: Shard) -> Iterator[Item]:
    """All items of a unit, in their order; `shard` is filled in on the way.

    Raises StorageError where the storage fails: that is no reason to reject an item.
    """
    if unit.shard is None:
        return _entries(unit.entries)
    return (_tar if unit.kind == "tar" else _parquet)(unit.shard, config, shard)


def _entries(entries: tuple[Entry, ...]) -> Iterator[Item]:
    """Pictures by themselves; those in a bucket are read several at a time, for each is mostly waited for."""
    if not any(entry.uri.startswith("s3://") for entry in entries):
        yield from map(_entry, entries)
        return
    with ThreadPoolExecutor(_READ_AT_A_TIME) as pool:
        for start in range(0, len(entries), _READ_AT_A_TIME):
            yield from pool.map(_entry, entries[start : start + _READ_AT_A_TIME])


def _entry(entry: Entry) -> Item:
    place = entry.uri
    item = Item(place, class_name=entry.class_name, caption=entry.caption, reason=entry.reason, error=entry.error)
    if entry.reason:
        return item
    if entry.uri.lower().endswith(OTHER_SUFFIXES):
        return dataclasses.replace(item, reason="unsupported", error=f"take one of {' '.join(SUFFIXES)}")
    try:
        return dataclasses.replace(item, data=storage.read_bytes(entry.uri, entry.info))
    except storage.NotFoundError as error:
        if not entry.named_in:
            raise
        return dataclasses.replace(item, reason="missing_object", error=f"named in {entry.named_in}: {error}")


def _tar(info: ObjectInfo, config: IngestConfig, shard: Shard) -> Iterator[Item]:
    """The samples of a WebDataset shard; one that breaks off gives what stands before the break."""
    with ExitStack() as stack:
        path, broken = stack.enter_context(storage.local_copy(info)), ""
        if not info.uri.lower().endswith(".tar"):
            path, broken = stack.enter_context(_unpacked(path, "zstd" if info.uri.lower().endswith("zst") else "gzip"))
        file = stack.enter_context(open(path, "rb"))
        for item in _samples(info.uri, file, config, shard):
            shard.read += 1
            yield item
        shard.incomplete = broken or shard.incomplete
    if shard.incomplete:
        yield from _rest(shard)


class _unpacked:  # noqa: N801
    """Context: path of the decompressed file, and the error where the compressed one breaks off or is damaged."""

    def __init__(self, path: str, codec: str) -> None:
        self.path, self.codec, self.folder = path, codec, tempfile.TemporaryDirectory(prefix="shard-")

    def __enter__(self) -> tuple[str, str]:
        path, error = os.path.join(self.folder.name, "shard.tar"), ""
        with open(path, "wb") as out, pa.CompressedInputStream(pa.OSFile(self.path), self.codec) as stream:
            try:
                while block := stream.read(_BLOCK):  # what a larger block held before a break would be lost
                    out.write(block)
            except OSError as raised:
                error = f"{self.codec}: {raised}"
        return path, error

    def __exit__(self, *_: object) -> None:
        self.folder.cleanup()


def _samples(uri: str, file: IO[bytes], config: IngestConfig, shard: Shard) -> Iterator[Item]:
    """Samples of a tar: neighbouring members that share a key. Where it breaks off, says so in `shard`."""
    key, members = "", dict[str, bytes]()
    shapes = set[frozenset[str]]()
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header it has read
                if not member.isfile():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                if members and f"{folder}/{stem}" != key:
                    shapes.add(frozenset(members))
                    yield _sample(uri, key, members, config, shard)
                    members = {}
                key = f"{folder}/{stem}"
                members[f".{suffix.lower()}"] = b""
                members[f".{suffix.lower()}"] = _content(tar, member)
            _check_end(file, tar.offset)
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        shard.incomplete = f"{type(error).__name__}: {error}"
    if not members:
        return
    if shard.incomplete and (frozenset(members) not in shapes or not all(members.values())):
        # Not all that such a sample has came before the break: kept, it would lack its class or half of its picture.
        yield Item(f"{uri}#{key.lstrip('/')}", reason="truncated_shard", error=shard.incomplete)
        shard.told = True
    else:
        yield _sample(uri, key, members, config, shard)


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """A member's bytes. Raises ReadError where the file ends before they do."""
    if member.size > _MEMBER_BYTES:
        raise tarfile.ReadError(f"{member.name}: {member.size} bytes claimed")
    reader = tar.extractfile(member)
    data = b"" if reader is None else reader.read()
    if len(data) != member.size:
        raise tarfile.ReadError(f"{member.name}: {len(data)} of {member.size} bytes, then the file ends")
    return data


def _check_end(file: IO[bytes], offset: int) -> None:
    """Raise ReadError where the tar does not end in its end mark; tarfile takes any damage for the end."""
    file.seek(offset)
    block = file.read(_BLOCK)
    if len(block) < _BLOCK:
        raise tarfile.ReadError(f"no end mark at byte {offset}: the file was cut")
    if block.strip(b"\0"):
        raise tarfile.ReadError(f"damaged header at byte {offset}")


def _sample(uri: str, key: str, members: dict[str, bytes], config: IngestConfig, shard: Shard) -> Item:
    """One sample of a shard from its members by suffix."""
    source = f"{uri}#{key.lstrip('/')}"
    picture = next((suffix for suffix in members if suffix in SUFFIXES), None)
    if picture is None:
        other = next((suffix for suffix in members if suffix in OTHER_SUFFIXES), None)
        told = f"members: {', '.join(sorted(members))}"
        return Item(source, reason="unsupported" if other else "no_picture", error=told)
    try:
        meta = json.loads(members.get(".json", b"{}"))
        if not isinstance(meta, dict):
            raise ValueError("not an object")
        label = meta.get(config.class_field, _text(members, ".cls"))
        caption = meta.get(config.caption_field, _text(members, ".txt"))
    except ValueError as error:
        return Item(source + picture, reason="bad_row", error=f".json, .cls or .txt: {error}")
    if len(shard.fields) < _ROWS_AT_A_TIME:
        shard.fields |= set(meta)
    named = None if label is None or label == "" else str(label)
    return Item(source + picture, members[picture], named, "" if caption is None else str(caption))


def _text(members: dict[str, bytes], suffix: str) -> str | None:
    data = members.get(suffix)
    return None if data is None else data.decode("utf-8").strip()


def _rest(shard: Shard) -> Iterator[Item]:
    """What an index says should follow the break, one by one; without an index, the shard itself as one item."""
    names = _indexed(shard.uri)
    if names is None:
        if not shard.told:
            yield Item(shard.uri, reason="truncated_shard", error=f"{shard.incomplete}; how many follow is unknown")
        return
    shard.missing = max(len(names) - shard.read, 0)
    for name in names[shard.read :]:
        yield Item(f"{shard.uri}#{name}", reason="truncated_shard", error=shard.incomplete)


def _indexed(uri: str) -> list[str] | None:
    """Names of a shard's samples by its index: wds2idx's `.idx`, or the counts of an `index.json`; None without one."""
    stem = next(uri[: -len(suffix)] for suffix in sorted(TARS, key=len, reverse=True) if uri.lower().endswith(suffix))
    for name in (f"{stem}.idx", f"{uri}.idx"):
        try:
            lines = storage.read_bytes(name).decode("utf-8", "replace").splitlines()
        except storage.NotFoundError:
            continue
        return [_idx_name(line, number) for number, line in enumerate(lines[1:], start=1) if line.strip()]
    try:
        listed = storage.read_json(storage.join(uri.rsplit("/", 1)[0], "index.json"))["shardlist"]
        count = next(
            int(shard["nsamples"]) for shard in listed if shard["url"].rsplit("/", 1)[-1] == uri.rsplit("/", 1)[-1]
        )
    except (storage.NotFoundError, LookupError, TypeError, StopIteration):
        return None
    return [f"sample {number}" for number in range(1, count + 1)]


def _idx_name(line: str, number: int) -> str:
    """Name of a sample in a `.idx` line: `ext offset size [name] …`, from version 1.2 on with the member's name."""
    words = line.split()
    return words[3] if len(words) > 3 else f"sample {number}"


def _parquet(info: ObjectInfo, config: IngestConfig, shard: Shard) -> Iterator[Item]:
    """The rows of a Parquet shard; a damaged row group rejects its own rows."""
    with storage.local_copy(info) as path:
        try:
            file = pq.ParquetFile(path)
        except (pa.ArrowException, OSError) as error:
            shard.incomplete = str(error).splitlines()[0]
            yield Item(info.uri, reason="damaged_shard", error=f"{shard.incomplete}; how many rows is unknown")
            return
        with file:
            names = file.schema_arrow.names
            check_field(info.uri, "image_field", config.image_field, names, required=True)
            check_field(info.uri, "class_field", config.class_field, names)
            check_field(info.uri, "caption_field", config.caption_field, names)
            columns = [name for name in (config.image_field, config.class_field, config.caption_field) if name in names]
            shard.fields |= set(columns)
            for group in range(file.num_row_groups):
                yield from _row_group(info.uri, file, group, columns, config, shard)


def _row_group(
    uri: str, file: pq.ParquetFile, group: int, columns: list[str], config: IngestConfig, shard: Shard
) -> Iterator[Item]:
    first, rows = shard.read, file.metadata.row_group(group).num_rows
    classes = _class_names(file, config.class_field)
    done = 0
    try:
        for batch in file.iter_batches(_ROWS_AT_A_TIME, row_groups=[group], columns=columns):
            for row in batch.to_pylist():
                done += 1
                shard.read += 1
                yield _parquet_row(uri, first + done, row, classes, config)
    except (pa.ArrowException, OSError) as error:
        shard.incomplete = str(error).splitlines()[0]
        shard.missing = (shard.missing or 0) + rows - done
        shard.read += rows - done
        for number in range(done + 1, rows + 1):
            yield Item(f"{uri}#{first + number}", reason="damaged_shard", error=shard.incomplete)


def _class_names(file: pq.ParquetFile, column: str) -> list[str]:
    """Names of integer classes as Hugging Face's datasets store them in the schema; empty where there are none."""
    try:
        told = json.loads(file.schema_arrow.metadata[b"huggingface"])
        return list(told["info"]["features"][column]["names"])
    except (TypeError, LookupError, ValueError):
        return []


def _parquet_row(uri: str, number: int, row: dict[str, Any], classes: list[str], config: IngestConfig) -> Item:
    source, image = f"{uri}#{number}", row[config.image_field]
    label, caption = row.get(config.class_field), row.get(config.caption_field)
    if isinstance(label, int) and 0 <= label < len(classes):
        label = classes[label]
    named = None if label is None or label == "" else str(label)
    rest = {"class_name": named, "caption": "" if caption is None else str(caption)}
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, bytes) and image:
        return Item(source, image, **rest)  # type: ignore[arg-type]
    if not image:
        return Item(source, reason="no_picture", error=f"column {config.image_field} is empty")
    try:
        entry = Entry(resolve(uri, str(image)), named_in=source)
    except ValueError as refused:
        return Item(source, reason="unsupported", error=str(refused))
    return dataclasses.replace(_entry(entry), source=source, **rest)  # type: ignore[arg-type]
