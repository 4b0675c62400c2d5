"""Objects by URI, on local disk or S3: atomic writes, create-if-absent, listing. The same calls serve both."""

import contextlib
import errno
import functools
import glob as globbing
import hashlib
import io
import json
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, Any, Literal, TypeVar

import aiohttp
import botocore.exceptions
import botocore.parsers
import fsspec
import tenacity
from fsspec import AbstractFileSystem

from pipelines.config import AwayError, PipelineError, absolute

MANIFEST = "manifest.json"
# What S3 answers to a create-if-absent write: there is an object, or another writer is at it.
_EXISTS = ("PreconditionFailed", "ConditionalRequestConflict")
_GLOB = ("*", "?", "[")
# Full jitter around 0.2, 0.4, 0.8 … 8 s: half a minute in the mean, then the run stops and can be resumed.
_TRIES = 10
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.2, 8.0
_THROTTLED = ("SlowDown", "RequestTimeout", "Throttling", "ThrottlingException", "RequestLimitExceeded")
# A folder is not empty where somebody writes into it while it is deleted.
_TRANSIENT_ERRNO = (
    errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EBUSY, errno.ETIMEDOUT, errno.ECONNRESET, errno.ENOTEMPTY,
)  # fmt: skip
_BROKEN_WAY = (
    botocore.exceptions.HTTPClientError,
    botocore.exceptions.ConnectionError,
    botocore.parsers.ResponseParserError,
)
_NO_NAME = (errno.ENAMETOOLONG, errno.ELOOP)
_PERMANENT = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
# A file that is being written on a disk, as mkstemp names it
_TEMPORARY_PREFIX = ".part-"
_TEMPORARY = re.compile(re.escape(_TEMPORARY_PREFIX) + "[a-z0-9_]{8}")
_BLOCK_BYTES = 16 * 2**20
_GAP_BYTES = 64 * 2**10
_AT_A_TIME = 16
_CLIENT = {"retries": {"total_max_attempts": 1}, "connect_timeout": 10, "read_timeout": 30}
_T = TypeVar("_T")
Creation = Literal["created", "same", "other"]


class StorageError(PipelineError):
    """An object that cannot be read or written, by its URI and the reason."""


class StoreAwayError(StorageError, AwayError):
    """An object that could not be reached for as long as that is tried; it may be later."""


class NotFoundError(StorageError):
    """There is no object at this URI."""


class DamagedError(StorageError):
    """An object whose bytes are not those that a manifest promised."""


class _TakenError(StorageError):
    """There is an object already where one was to be created."""


class _ChangedError(StorageError):
    """An object that is no longer what was listed."""


class _GarbledError(OSError):
    """Bytes that arrived are not those that were sent, or others were sent meanwhile."""


@dataclass(frozen=True)
class ObjectInfo:
    """One object: its URI, its size in bytes, and a token that changes when its content does."""

    uri: str
    size: int
    version: str


def normalise(uri: str) -> str:
    """As `config.absolute`, with StorageError on an address of an unknown kind."""
    try:
        return absolute(uri)
    except ValueError as error:
        raise StorageError(str(error)) from error


def join(uri: str, *parts: str) -> str:
    """`uri` with more path parts behind it."""
    return "/".join((uri.rstrip("/"), *parts))


def exists(uri: str) -> bool:
    """Whether there is an object at `uri`."""
    try:
        return bool(_retried(uri, lambda: _filesystem(uri).info(_path(uri)))["type"] == "file")
    except NotFoundError:
        return False  # any other failure, such as refused access, is an error and no answer


def read_bytes(uri: str, info: ObjectInfo | None = None) -> bytes:
    """The whole object, its size and (where the store tells one) its MD5 verified; `info` spares a request.

    Raises NotFoundError where there is none, StorageError where it cannot be read or is no longer what `info` says.
    """
    return _retried(uri, lambda: _read(uri, info) if info else _read_as_it_is(uri))


def read_ranges(uri: str, ranges: Sequence[tuple[int, int, int]]) -> list[bytes]:
    """Parts of an object, each given as (offset, length, CRC-32) and verified; they must come in ascending order.

    Near ones are fetched together, and each fetch is retried by itself. Raises StorageError as `read_bytes` does.
    """
    spans = _spans(ranges)
    if _is_local(uri):
        with _named(uri):
            parts = [_read_span(uri, span) for span in spans]
    else:
        with ThreadPoolExecutor(_AT_A_TIME) as pool:
            parts = list(pool.map(lambda span: _retried(uri, lambda: _read_span(uri, span)), spans))
    return [data for part in parts for data in part]


def read_json(uri: str) -> Any:
    """The object's JSON value. Raises StorageError where it is missing or is no JSON."""
    try:
        return json.loads(read_bytes(uri))
    except ValueError as error:
        raise StorageError(f"{uri}: not valid JSON ({error})") from error


@contextlib.contextmanager
def local_copy(info: ObjectInfo) -> Iterator[str]:
    """Path of a file on this machine's disk with the object's verified bytes, whatever its size.

    A local object is its own copy; another is fetched block by block and removed afterwards. Raises StorageError.
    """
    if _is_local(info.uri):
        yield info.uri
        with _named(info.uri):
            _check_unchanged(info)
        return
    with tempfile.TemporaryDirectory(prefix="object-") as folder:
        path = os.path.join(folder, "copy")
        _retried(info.uri, lambda: _fetch(info, path))
        yield path


@contextlib.contextmanager
def open_random(uri: str) -> Iterator[IO[bytes]]:
    """The object as a file to seek in; only what is read is fetched. Raises StorageError as `read_bytes` does."""
    with _named(uri), _filesystem(uri).open(_path(uri), "rb", cache_type="readahead") as file:
        yield file


def write_bytes(uri: str, data: bytes) -> None:
    """Write the object, replacing an older one; a reader sees the old bytes or the new, never a part."""
    _retried(uri, lambda: _write(uri, data))


def create_bytes(uri: str, data: bytes) -> Creation:
    """Write the object unless there is one: it was `created`, another writer's is the `same`, or it is an `other`.

    After a lost answer the write is tried again and then refused although it was done: that is `created` as well.
    """
    tries = 0

    def create() -> None:
        nonlocal tries
        tries += 1
        _create(uri, data)

    try:
        _retried(uri, create)
        return "created"
    except _TakenError:
        if read_bytes(uri) != data:
            return "other"
        return "created" if tries > 1 else "same"


def to_json(value: Any) -> bytes:
    """The JSON text that is stored: sorted keys, indented, so that equal values have equal bytes."""
    text = io.StringIO()  # json.dumps would hold each word as a string of its own, and manifests grow long
    json.dump(value, text, indent=2, sort_keys=True, ensure_ascii=False)
    return (text.getvalue() + "\n").encode()


def publish(folder: str, manifest: dict[str, Any]) -> Creation:
    """Make `folder` exist, by its manifest written last; what `create_bytes` says of it."""
    return create_bytes(join(folder, MANIFEST), to_json(manifest))


def is_published(folder: str) -> bool:
    """Whether `folder` has its manifest, and so is whole."""
    return exists(join(folder, MANIFEST))


def read_manifest(folder: str, kind: str) -> dict[str, Any]:
    """The manifest at `folder` of a `kind` (dataset, model, …). Raises StorageError where there is none of it."""
    uri = join(folder, MANIFEST)
    if not exists(uri):
        raise StorageError(f"{folder}: no {kind} here ({MANIFEST} is missing); check the URI, or run its stage again")
    manifest: dict[str, Any] = read_json(uri)
    if manifest.get("kind") != kind:
        raise StorageError(f"{folder}: holds a {manifest.get('kind')}, not a {kind}")
    return manifest


def digest(data: bytes) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(data).hexdigest()


def put_part(folder: str, stem: str, suffix: str, data: bytes) -> dict[str, Any]:
    """Write `data` into `folder` under a name that carries its digest; returns its entry for the manifest."""
    checksum = digest(data)
    name = f"{stem}-{checksum[:12]}{suffix}"
    write_bytes(join(folder, name), data)
    return {"name": name, "bytes": len(data), "sha256": checksum}


def find_part(folder: str, stem: str, suffix: str) -> tuple[dict[str, Any], bytes] | None:
    """The part that an earlier run wrote by `put_part`, its bytes checked against the digest in its name."""
    for info in list_if_any(join(folder, f"{stem}-*{suffix}")):
        data, name = read_bytes(info.uri), info.uri.rsplit("/", 1)[1]
        checksum = digest(data)
        if name == f"{stem}-{checksum[:12]}{suffix}":
            return {"name": name, "bytes": len(data), "sha256": checksum}, data
    return None


def read_part(folder: str, part: dict[str, Any]) -> bytes:
    """The bytes of a part that `put_part` described. Raises DamagedError where they are not those of the manifest."""
    uri = join(folder, part["name"])
    data = read_bytes(uri)
    if digest(data) != part["sha256"]:
        raise DamagedError(f"{uri}: checksum {digest(data)[:8]}… but manifest says {part['sha256'][:8]}…; make it anew")
    return data


def list_objects(uri: str) -> list[ObjectInfo]:
    """All objects at a URI, sorted: the object itself, those that a glob matches, or those below a folder.

    Raises StorageError where there is nothing.
    """
    found = list_if_any(uri)
    if not found:
        raise StorageError(f"{normalise(uri)}: nothing there; check the address, or the credentials that may list it")
    return found


def list_if_any(uri: str) -> list[ObjectInfo]:
    """As `list_objects`, but empty where there is nothing."""
    uri = normalise(uri)
    pattern = is_pattern(uri)
    find = _glob if pattern else _find
    return _retried(uri, lambda: sorted((_info(uri, each) for each in find(uri)), key=lambda item: item.uri))


def is_pattern(uri: str) -> bool:
    """Whether a URI is a glob: it has `*`, `?` or `[`, and there is nothing whose name it is letter by letter."""
    if not any(mark in uri for mark in _GLOB):
        return False
    return not _retried(uri, lambda: _filesystem(uri).exists(_path(normalise(uri))))


def list_folders(uri: str) -> list[str]:
    """Names of the folders directly below `uri`, sorted; empty where there is none."""
    try:
        below = _retried(uri, lambda: _filesystem(uri).ls(_path(uri), detail=True))
    except NotFoundError:
        return []
    return sorted(item["name"].rstrip("/").rsplit("/", 1)[1] for item in below if item["type"] == "directory")


def modified(uri: str) -> float:
    """When the object was last written, in seconds since 1970."""
    return float(_retried(uri, lambda: _filesystem(uri).modified(_path(uri))).timestamp())


def remove_object(uri: str) -> None:
    """Delete an object; one that is gone already is no error."""
    with contextlib.suppress(NotFoundError):
        _retried(uri, lambda: _filesystem(uri).rm_file(_path(uri)))


def remove_folder(uri: str) -> None:
    """Delete a folder, its manifest first, so that nobody takes the rest for whole; others may be at it as well."""
    remove_object(join(uri, MANIFEST))
    with contextlib.suppress(NotFoundError):
        _retried(uri, lambda: _remove(uri))


def _remove(uri: str) -> None:
    if _is_local(uri):
        shutil.rmtree(uri, onerror=_unless_gone)
    else:
        _filesystem(uri).rm(_path(uri), recursive=True)


def _unless_gone(_: object, __: str, raised: tuple[type[BaseException], BaseException, Any]) -> None:
    """What another deletes at the same time is deleted as well."""
    if not isinstance(raised[1], FileNotFoundError):
        raise raised[1]


def _retried(uri: str, call: Callable[[], _T]) -> _T:
    """What `call` returns; transient faults are tried again with backoff and jitter, then named as a StorageError."""
    tries = tenacity.Retrying(
        retry=tenacity.retry_if_exception(_is_transient),
        wait=tenacity.wait_random_exponential(_FIRST_WAIT_S, _LONGEST_WAIT_S),
        stop=tenacity.stop_after_attempt(_TRIES),
        reraise=True,
    )
    with _named(uri):
        return tries(call)


def _is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed a little later: a busy or broken way to the store, not an answer of it."""
    if isinstance(error, (PipelineError, *_PERMANENT)):
        return False
    answer = getattr(error.__cause__, "response", None) or getattr(error, "response", None)
    if isinstance(answer, dict):
        status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return status >= 500 or status in (408, 429) or answer.get("Error", {}).get("Code") in _THROTTLED
    if isinstance(error, _BROKEN_WAY):
        return True
    if isinstance(error, (_GarbledError, ConnectionError, TimeoutError, aiohttp.ClientError)):
        return True
    return isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNO


def _read(uri: str, info: ObjectInfo) -> bytes:
    data: bytes = b""
    if _is_local(uri):
        with open(uri, "rb") as file:
            data = file.read()
    elif info.size:
        data = _filesystem(uri).cat_file(_path(uri), start=0, end=info.size)
    _check(info, len(data), lambda: hashlib.md5(data).hexdigest())
    return data


def _read_as_it_is(uri: str) -> bytes:
    """The bytes of an object of which nobody was told anything: one that is replaced meanwhile is read again."""
    try:
        return _read(uri, _stat(uri))
    except _ChangedError as error:
        raise _GarbledError("replaced again and again while it was read") from error


def _spans(ranges: Sequence[tuple[int, int, int]]) -> list[list[tuple[int, int, int]]]:
    """The ranges in groups that are fetched as one: neighbours with little between them."""
    spans: list[list[tuple[int, int, int]]] = []
    for item in ranges:
        last = spans[-1] if spans else []
        if last and item[0] - sum(last[-1][:2]) <= _GAP_BYTES and sum(item[:2]) - last[0][0] <= _BLOCK_BYTES:
            last.append(item)
        else:
            spans.append([item])
    return spans


def _read_span(uri: str, span: list[tuple[int, int, int]]) -> list[bytes]:
    start, end = span[0][0], sum(span[-1][:2])
    if _is_local(uri):
        with open(uri, "rb") as file:
            file.seek(start)
            data = file.read(end - start)
    else:
        data = _filesystem(uri).cat_file(_path(uri), start=start, end=end)
    parts = [data[offset - start : offset - start + length] for offset, length, _ in span]
    for part, (offset, length, checksum) in zip(parts, span, strict=True):
        if len(part) != length or zlib.crc32(part) != checksum:
            raise _GarbledError(f"bytes {offset} to {offset + length} are not those that were written")
    return parts


def _fetch(info: ObjectInfo, path: str) -> None:
    """Write the object's bytes to a local file, block by block; a block that fails is fetched again by itself."""
    md5 = hashlib.md5()
    with open(path, "wb") as file:
        for start in range(0, info.size, _BLOCK_BYTES):
            end = min(start + _BLOCK_BYTES, info.size)
            block = _retried(info.uri, functools.partial(_block, info.uri, start, end))
            md5.update(block)
            file.write(block)
    _check(info, info.size, md5.hexdigest)
    if not _is_md5(info.version):  # of an object written in parts: it may be two, one after the other
        _retried(info.uri, lambda: _check_unchanged(info))


def _is_md5(version: str) -> bool:
    """Whether a version looks like the MD5 of an object's bytes."""
    return re.fullmatch("[0-9a-f]{32}", version) is not None


def _block(uri: str, start: int, end: int) -> bytes:
    data: bytes = _filesystem(uri).cat_file(_path(uri), start=start, end=end)
    if len(data) != end - start:
        raise _GarbledError(f"bytes {start} to {end}: {len(data)} arrived")
    return data


def _check(info: ObjectInfo, size: int, md5: Callable[[], str]) -> None:
    """Compare what was read with what was listed. The ETag of most S3 objects written in one piece is their MD5."""
    if _is_local(info.uri):
        _check_unchanged(info)
        return
    if size != info.size:
        raise _GarbledError(f"{size} bytes arrived, {info.size} expected")
    if _is_md5(info.version) and md5() != info.version:
        _explain_mismatch(info)


def _check_unchanged(info: ObjectInfo) -> None:
    if _stat(info.uri) != info:
        raise _ChangedError(f"{info.uri}: changed since it was listed; run again to take it as it is now")


def _explain_mismatch(info: ObjectInfo) -> None:
    """Raise where the bytes were damaged or the object has changed; an encrypted object's ETag is no MD5."""
    _check_unchanged(info)
    bucket, _, key = _path(info.uri).partition("/")
    head = _filesystem(info.uri).call_s3("head_object", Bucket=bucket, Key=key)
    if not (str(head.get("ServerSideEncryption", "")).startswith("aws:kms") or "SSECustomerAlgorithm" in head):
        raise _GarbledError(f"MD5 of what arrived is not {info.version[:8]}… as the store says")


def _stat(uri: str) -> ObjectInfo:
    details = _filesystem(uri).info(_path(uri))
    if details["type"] != "file":
        raise FileNotFoundError(uri)
    return _info(uri, details)


def stat(uri: str) -> ObjectInfo:
    """What is known of the object at `uri`. Raises NotFoundError where there is none."""
    return _retried(uri, lambda: _stat(uri))


def _write(uri: str, data: bytes) -> None:
    if _is_local(uri):
        with _temporary_beside(uri, data) as temporary:
            os.replace(temporary, uri)
        return
    _check_written(uri, data, _filesystem(uri).pipe_file(_path(uri), data))


def _check_written(uri: str, data: bytes, answer: Any) -> None:
    """Compare the ETag that the store answers a write with."""
    etag = str((answer or {}).get("ETag", "")).strip('"')
    info = ObjectInfo(uri, len(data), etag)
    _check(info, len(data), lambda: hashlib.md5(data).hexdigest())


def _create(uri: str, data: bytes) -> None:
    """Write a new object whole. Raises _TakenError where there is one."""
    try:
        if _is_local(uri):
            with _temporary_beside(uri, data) as temporary:
                os.link(temporary, uri)
        else:
            _check_written(uri, data, _filesystem(uri).pipe_file(_path(uri), data, mode="create"))
    except FileExistsError as error:
        raise _TakenError(uri) from error
    except OSError as error:
        answer = getattr(error.__cause__, "response", {})
        if answer.get("Error", {}).get("Code") in _EXISTS:
            raise _TakenError(uri) from error
        raise


def _is_local(uri: str) -> bool:
    return not uri.startswith("s3://")


def _path(uri: str) -> str:
    return uri.removeprefix("s3://")


def _filesystem(uri: str) -> AbstractFileSystem:
    """The filesystem of a URI; endpoint and credentials come from the usual environment of S3 clients."""
    if _is_local(uri):
        return fsspec.filesystem("file")
    filesystem = fsspec.filesystem("s3", use_listings_cache=False, config_kwargs=_CLIENT)
    filesystem.retries = 1  # `_retried` alone decides how often
    return filesystem


def _glob(uri: str) -> Iterable[dict[str, Any]]:
    if _is_local(uri):
        matches = globbing.glob(uri, recursive=True)
        return _local_details({path for match in matches for path in (_paths_below(match) or [match])})
    matched: dict[str, dict[str, Any]] = _filesystem(uri).glob(_path(uri), detail=True)
    folders = [] if "**" in uri else [item for item in matched.values() if item["type"] == "directory"]
    for folder in folders:
        matched |= _filesystem(uri).find(folder["name"], detail=True)
    return [item for item in matched.values() if item["type"] == "file"]


def _find(uri: str) -> Iterable[dict[str, Any]]:
    if _is_local(uri):
        return _local_details(_paths_below(uri) or [uri])
    filesystem = _filesystem(uri)
    try:
        details = filesystem.info(_path(uri))
    except FileNotFoundError:
        return []
    if details["type"] == "file":
        return [details]
    below: dict[str, dict[str, Any]] = filesystem.find(_path(uri), detail=True)
    return [item for item in below.values() if item["type"] == "file"]


def _local_details(paths: Iterable[str]) -> Iterator[dict[str, Any]]:
    """What is known of files and of links that lead nowhere.

    Folders are left out, what is gone meanwhile, and what is no object yet, or never will be: its writer was killed.
    """
    for path in paths:
        if _TEMPORARY.fullmatch(os.path.basename(path)):
            continue
        with contextlib.suppress(FileNotFoundError):
            if os.path.isfile(path):
                yield fsspec.filesystem("file").info(path)
            elif os.path.islink(path) and not os.path.exists(path):
                yield {"name": path, "size": 0, "mtime": os.lstat(path).st_mtime}


def _paths_below(folder: str, above: frozenset[str] = frozenset()) -> list[str]:
    """Everything but folders below a folder, through links as well, but not in circles; nothing below a file."""
    above, paths = above | {os.path.realpath(folder)}, []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        for entry in entries:
            if not entry.is_dir():
                paths.append(entry.path)
            elif not entry.is_symlink() or os.path.realpath(entry.path) not in above:
                paths += _paths_below(entry.path, above)
    return paths


def _info(uri: str, details: dict[str, Any]) -> ObjectInfo:
    """What a listing says of one object; the ETag is S3's content token, the time of change the disk's."""
    if _is_local(uri):
        return ObjectInfo(details["name"], int(details["size"]), f"{details['mtime']:.6f}")
    return ObjectInfo(f"s3://{details['name']}", int(details["size"]), str(details.get("ETag", "")).strip('"'))


@contextlib.contextmanager
def _temporary_beside(uri: str, data: bytes) -> Iterator[str]:
    """A file with `data`, synced, in the folder of `uri` and gone afterwards."""
    folder = os.path.dirname(uri)
    os.makedirs(folder, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=_TEMPORARY_PREFIX, dir=folder)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        yield temporary
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


@contextlib.contextmanager
def _named(uri: str) -> Iterator[None]:
    """Turns what clients raise into one line with the URI; credentials never stand in it."""
    try:
        yield
    except PipelineError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFoundError(f"{uri}: not found; check the address (bucket, folder, spelling)") from error
    except PermissionError as error:
        raise StorageError(f"{uri}: access refused; check the credentials and what they may do there") from error
    except botocore.exceptions.NoCredentialsError as error:
        raise StorageError(f"{uri}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") from error
    except (OSError, botocore.exceptions.BotoCoreError, aiohttp.ClientError) as error:
        if getattr(error, "errno", None) in _NO_NAME:
            raise NotFoundError(f"{uri}: not found; no object can have this name") from error
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(
                f"{uri}: no space left to write it; free some (du -sh on the store) and run the same command again"
            ) from error
        reason = getattr(error, "strerror", None) or str(error) or repr(error)
        kind = StoreAwayError if _is_transient(error) else StorageError
        raise kind(f"{uri}: {type(error).__name__}: {reason.splitlines()[0]}") from error
