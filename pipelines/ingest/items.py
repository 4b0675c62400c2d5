"""The items of a unit: each picture's bytes and what goes with them, or the reason why there is none."""

import dataclasses
import errno
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
from pipelines.cells import printable, resolve, word
from pipelines.config import IngestConfig
from pipelines.images import OTHER_SUFFIXES, SUFFIXES, Limits
from pipelines.ingest.sources import TARS, Entry, Unit, check_field
from pipelines.storage import ObjectInfo, StorageError

_READ_AT_A_TIME = 16
_ROWS_AT_A_TIME = 64
_BLOCK = 512
_WORDS = (".json", ".cls", ".txt")
# What tarfile raises on damaged headers, by its source and by trying.
_TAR_ERRORS = (tarfile.TarError, EOFError, ValueError, LookupError, ArithmeticError, RecursionError)
_MOST = Limits.max_bytes


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
        told = {"uri": printable(self.uri), "error": printable(self.incomplete)}
        return {**told, "read": self.read, "missing": self.missing}


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
        info = entry.info or storage.stat(entry.uri)
        if info.size > _MOST:
            return dataclasses.replace(item, reason="too_large", error=f"{info.size} bytes are more than {_MOST}")
        return dataclasses.replace(item, data=storage.read_bytes(entry.uri, info))
    except storage.NotFoundError as error:
        if not entry.named_in and not os.path.islink(entry.uri):
            raise
        told = f"named in {entry.named_in}: {error}" if entry.named_in else f"a link to nowhere: {error}"
        return dataclasses.replace(item, reason="missing_object", error=told)


def _tar(info: ObjectInfo, config: IngestConfig, shard: Shard) -> Iterator[Item]:
    """The samples of a WebDataset shard; one that breaks off gives what stands before the break."""
    with ExitStack() as stack:
        path, broken = stack.enter_context(storage.local_copy(info)), ""
        if not info.uri.lower().endswith(".tar"):
            path, broken = stack.enter_context(_unpacked(path, "zstd" if info.uri.lower().endswith("zst") else "gzip"))
        file = stack.enter_context(open(path, "rb"))
        yield from _samples(info.uri, file, config, shard)
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
            block: bytes | None = None
            while block != b"":
                try:
                    block = stream.read(_BLOCK)  # what a larger block held before a break would be lost
                except OSError as raised:
                    if raised.errno is not None:  # the disk's fault and not the shard's
                        raise
                    block, error = b"", f"{self.codec}: {raised}"
                out.write(block or b"")
        return path, error

    def __exit__(self, *_: object) -> None:
        self.folder.cleanup()


def _samples(uri: str, file: IO[bytes], config: IngestConfig, shard: Shard) -> Iterator[Item]:
    """Samples of a tar: neighbouring members that share a key. Where it breaks off, says so in `shard`."""
    sample, shapes = _Sample(), set[frozenset[str]]()
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header it has read
                key, suffix = _key_and_suffix(member.name)
                if not member.isfile():
                    yield from _link(uri, member, suffix)
                    continue
                if sample.members and (key != sample.key or suffix in sample.members):
                    shapes.add(frozenset(sample.members))
                    yield from _sample(uri, sample, config, shard)
                    sample = _Sample()
                sample.key, sample.members[suffix] = key, None
                sample.members[suffix] = _content(tar, member, suffix)
            _check_end(file, tar.offset)
    except _TAR_ERRORS as error:
        shard.incomplete = f"{type(error).__name__}: {error}"
    except OSError as error:
        if error.errno != errno.EINVAL:  # which a damaged header that points before the file's start gives
            raise StorageError(f"{uri}: {error}") from error
        shard.incomplete = f"damaged header: {error}"
    if not sample.members:
        return
    if shard.incomplete and (frozenset(sample.members) not in shapes or None in sample.members.values()):
        # Not all that such a sample has came before the break: kept, it would lack its class or half of its picture.
        shard.read += 1
        yield Item(f"{uri}#{sample.key}", reason="truncated_shard", error=shard.incomplete)
        shard.told = True
    else:
        yield from _sample(uri, sample, config, shard)


@dataclass
class _Sample:
    """Members of a tar that share a key, by suffix: bytes, their number where they are too many, None at a break."""

    key: str = ""
    members: dict[str, bytes | int | None] = field(default_factory=dict)


def _key_and_suffix(path: str) -> tuple[str, str]:
    """A member's key and suffix, which begins at the first dot that is not the name's first character."""
    folder, slash, name = path.rpartition("/")
    dots = len(name) - len(name.lstrip("."))
    stem, dot, suffix = name[dots:].partition(".")
    return f"{folder}{slash}{name[:dots]}{stem}".lstrip("/"), f"{dot}{suffix.lower()}"


def _link(uri: str, member: tarfile.TarInfo, suffix: str) -> Iterator[Item]:
    """A picture's name that stands for no bytes of its own."""
    if member.name.lower().endswith(SUFFIXES) and not member.isdir():
        what = f"a link to {member.linkname}" if member.islnk() or member.issym() else "no file"
        yield Item(f"{uri}#{member.name.lstrip('/')}", reason="unsupported", error=f"{what}; store the picture itself")


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo, suffix: str) -> bytes | int:
    """A member's bytes, or their number where they are too many. Raises ReadError where the file ends before."""
    if not suffix.endswith(SUFFIXES + _WORDS):
        return b""  # of no use here; whether it is whole is seen at the next header
    if member.size > _MOST:
        return member.size
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
    while block := file.read(_BLOCK * _BLOCK):
        if block.strip(b"\0"):
            raise tarfile.ReadError(f"an end mark at byte {offset}, and more behind it (joined tars? lost blocks?)")


def _sample(uri: str, sample: _Sample, config: IngestConfig, shard: Shard) -> Iterator[Item]:
    """A sample of a shard: its picture with class and caption; any further picture is rejected."""
    shard.read += 1
    source = f"{uri}#{sample.key}"
    pictures = sorted((suffix for suffix in sample.members if suffix.endswith(SUFFIXES)), key=lambda s: s.count("."))
    if not pictures:
        other = any(suffix.endswith(OTHER_SUFFIXES) for suffix in sample.members)
        told = f"members: {', '.join(sorted(sample.members))}"
        yield Item(source, reason="unsupported" if other else "no_picture", error=told)
        return
    yield _picture(source + pictures[0], sample.members[pictures[0]], sample.members, config, shard)
    for suffix in pictures[1:]:
        yield Item(source + suffix, reason="second_picture", error=f"the sample's picture is its {pictures[0]}")


def _picture(
    source: str, data: bytes | int | None, members: dict[str, bytes | int | None], config: IngestConfig, shard: Shard
) -> Item:
    if not isinstance(data, bytes):
        return Item(source, reason="too_large", error=f"{data} bytes are more than {_MOST}")
    try:
        meta = json.loads(_text(members, ".json") or "{}")
        if not isinstance(meta, dict):
            raise ValueError("not an object")
        label = meta.get(config.class_field, _text(members, ".cls"))
        caption = meta.get(config.caption_field, _text(members, ".txt"))
    except (ValueError, RecursionError) as error:
        return Item(source, reason="bad_row", error=f".json, .cls or .txt: {error}")
    if len(shard.fields) < _ROWS_AT_A_TIME:
        shard.fields |= set(map(printable, meta))
    return Item(source, data, word(label), word(caption) or "")


def _text(members: dict[str, bytes | int | None], suffix: str) -> str | None:
    data = members.get(suffix)
    if data is None:
        return None
    if isinstance(data, int):
        raise ValueError(f"{data} bytes are more than {_MOST}")
    return data.decode("utf-8-sig").strip()


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
            _raise_fault(info.uri, error)
            shard.incomplete = str(error).splitlines()[0]
            yield Item(info.uri, reason="damaged_shard", error=f"{shard.incomplete}; how many rows is unknown")
            return
        with file:
            names = file.schema_arrow.names
            check_field(info.uri, "image_field", config.image_field, names, required=True)
            check_field(info.uri, "class_field", config.class_field, names)
            check_field(info.uri, "caption_field", config.caption_field, names)
            columns = [name for name in (config.image_field, config.class_field, config.caption_field) if name in names]
            shard.fields |= set(map(printable, names))
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
            for row in _rows(batch):
                done += 1
                shard.read += 1
                yield _parquet_row(uri, first + done, row, classes, config)
    except (pa.ArrowException, OSError) as error:
        _raise_fault(uri, error)
        shard.incomplete = str(error).splitlines()[0]
        shard.missing = (shard.missing or 0) + rows - done
        shard.read += rows - done
        for number in range(done + 1, rows + 1):
            yield Item(f"{uri}#{first + number}", reason="damaged_shard", error=shard.incomplete)


def _raise_fault(uri: str, error: Exception) -> None:
    """Raise StorageError where the disk failed; what Arrow says of damaged bytes has no number."""
    if isinstance(error, OSError) and error.errno is not None:
        raise StorageError(f"{uri}: {error}") from error


def _rows(batch: pa.RecordBatch) -> list[dict[str, Any] | str]:
    """The rows of a batch; of one whose text is no UTF-8, the error."""
    try:
        return batch.to_pylist()  # type: ignore[no-any-return]
    except UnicodeDecodeError as error:
        if len(batch) == 1:
            return [str(error)]
        return [row for at in range(len(batch)) for row in _rows(batch.slice(at, 1))]


def _class_names(file: pq.ParquetFile, column: str) -> list[str]:
    """Names of integer classes as Hugging Face's datasets store them in the schema; empty where there are none."""
    try:
        told = json.loads(file.schema_arrow.metadata[b"huggingface"])
        return list(told["info"]["features"][column]["names"])
    except (TypeError, LookupError, ValueError):
        return []


def _parquet_row(uri: str, number: int, row: dict[str, Any] | str, classes: list[str], config: IngestConfig) -> Item:
    source = f"{uri}#{number}"
    if isinstance(row, str):
        return Item(source, reason="bad_row", error=row)
    image, label = row[config.image_field], row.get(config.class_field)
    if isinstance(label, int) and 0 <= label < len(classes):
        label = classes[label]
    rest = {"class_name": word(label), "caption": word(row.get(config.caption_field)) or ""}
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, bytes) and image:
        return Item(source, image, **rest)  # type: ignore[arg-type]
    if not image:
        return Item(source, reason="no_picture", error=f"column {config.image_field} is empty")
    if not isinstance(image, str):
        told = f"column {config.image_field} holds {type(image).__name__}, not bytes or an address"
        return Item(source, reason="unsupported", error=told)
    try:
        entry = Entry(resolve(uri, image), named_in=source)
    except ValueError as refused:
        return Item(source, reason="unsupported", error=str(refused))
    return dataclasses.replace(_entry(entry), source=source, **rest)  # type: ignore[arg-type]
