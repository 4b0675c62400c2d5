"""Objects by URI, on local disk or S3: atomic writes, create-if-absent, listing. The same calls serve both."""

import contextlib
import glob as globbing
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

import botocore.exceptions
import fsspec
from fsspec import AbstractFileSystem

from pipelines.config import PipelineError, absolute

MANIFEST = "manifest.json"
# What S3 answers to a create-if-absent write: there is an object, or another writer is at it.
_EXISTS = ("PreconditionFailed", "ConditionalRequestConflict")
_GLOB = ("*", "?", "[")


class StorageError(PipelineError):
    """An object that cannot be read or written, by its URI and the reason."""


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
    with _named(uri):
        try:
            return bool(_filesystem(uri).info(_path(uri))["type"] == "file")
        except FileNotFoundError:
            return False  # any other failure, such as refused access, is an error and no answer


def read_bytes(uri: str) -> bytes:
    """The whole object. Raises StorageError where there is none or it cannot be read."""
    with _named(uri):
        data: bytes = _filesystem(uri).cat_file(_path(uri))
        return data


def read_json(uri: str) -> Any:
    """The object's JSON value. Raises StorageError where it is missing or is no JSON."""
    try:
        return json.loads(read_bytes(uri))
    except ValueError as error:
        raise StorageError(f"{uri}: not valid JSON ({error})") from error


@contextlib.contextmanager
def open_read(uri: str) -> Iterator[IO[bytes]]:
    """The object as a file to read from its start, in blocks. Raises StorageError as `read_bytes` does."""
    with _named(uri), _filesystem(uri).open(_path(uri), "rb", cache_type="readahead") as file:
        yield file


def write_bytes(uri: str, data: bytes) -> None:
    """Write the object, replacing an older one; a reader sees the old bytes or the new, never a part."""
    with _named(uri):
        if not _is_local(uri):
            _filesystem(uri).pipe_file(_path(uri), data)
            return
        with _temporary_beside(uri, data) as temporary:
            os.replace(temporary, uri)


def create_bytes(uri: str, data: bytes) -> bool:
    """Write the object unless there is one. True where it now holds `data`, False where another writer's bytes do."""
    with _named(uri):
        try:
            _create(uri, data)
            return True
        except FileExistsError:
            # A lost answer is retried by the client and then refused although the first try was written.
            return read_bytes(uri) == data


def to_json(value: Any) -> bytes:
    """The JSON text that is stored: sorted keys, indented, so that equal values have equal bytes."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def publish(folder: str, manifest: dict[str, Any]) -> bool:
    """Make `folder` exist, by its manifest written last. False where another writer published other content first."""
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


def read_part(folder: str, part: dict[str, Any]) -> bytes:
    """The bytes of a part that `put_part` described. Raises StorageError where they are not those of the manifest."""
    uri = join(folder, part["name"])
    data = read_bytes(uri)
    if digest(data) != part["sha256"]:
        raise StorageError(f"{uri}: checksum {digest(data)[:8]}… but manifest says {part['sha256'][:8]}…; make it anew")
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
    with _named(uri):
        found = _glob(uri) if any(mark in uri for mark in _GLOB) else _find(uri)
    return sorted((_info(uri, details) for details in found), key=lambda item: item.uri)


def list_folders(uri: str) -> list[str]:
    """Names of the folders directly below `uri`, sorted; empty where there is none."""
    with _named(uri):
        try:
            below = _filesystem(uri).ls(_path(uri), detail=True)
        except FileNotFoundError:
            return []
    return sorted(item["name"].rstrip("/").rsplit("/", 1)[1] for item in below if item["type"] == "directory")


def modified(uri: str) -> float:
    """When the object was last written, in seconds since 1970."""
    with _named(uri):
        return float(_filesystem(uri).modified(_path(uri)).timestamp())


def remove_folder(uri: str) -> None:
    """Delete a folder, its manifest first, so that nobody takes the rest for whole."""
    with _named(uri), contextlib.suppress(FileNotFoundError):
        _filesystem(uri).rm_file(_path(join(uri, MANIFEST)))
    with _named(uri), contextlib.suppress(FileNotFoundError):
        _filesystem(uri).rm(_path(uri), recursive=True)


def _create(uri: str, data: bytes) -> None:
    """Write a new object whole. Raises FileExistsError where there is one."""
    if _is_local(uri):
        with _temporary_beside(uri, data) as temporary:
            os.link(temporary, uri)
        return
    try:
        _filesystem(uri).pipe_file(_path(uri), data, mode="create")
    except OSError as error:
        answer = getattr(error.__cause__, "response", {})
        if answer.get("Error", {}).get("Code") in _EXISTS:
            raise FileExistsError(uri) from error
        raise


def _is_local(uri: str) -> bool:
    return not uri.startswith("s3://")


def _path(uri: str) -> str:
    return uri.removeprefix("s3://")


def _filesystem(uri: str) -> AbstractFileSystem:
    """The filesystem of a URI; endpoint and credentials come from the usual environment of S3 clients."""
    if _is_local(uri):
        return fsspec.filesystem("file")
    return fsspec.filesystem("s3", use_listings_cache=False)


def _glob(uri: str) -> list[dict[str, Any]]:
    if _is_local(uri):
        return [_local_details(path) for path in globbing.glob(uri, recursive=True) if os.path.isfile(path)]
    matched: dict[str, dict[str, Any]] = _filesystem(uri).glob(_path(uri), detail=True)
    return [item for item in matched.values() if item["type"] == "file"]


def _find(uri: str) -> list[dict[str, Any]]:
    filesystem = _filesystem(uri)
    try:
        details = filesystem.info(_path(uri))
    except FileNotFoundError:
        return []
    if details["type"] == "file":
        return [details]
    below: dict[str, dict[str, Any]] = filesystem.find(_path(uri), detail=True)
    return [item for item in below.values() if item["type"] == "file"]


def _local_details(path: str) -> dict[str, Any]:
    return fsspec.filesystem("file").info(path)  # type: ignore[no-any-return]


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
    handle, temporary = tempfile.mkstemp(prefix=".part-", dir=folder)
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
    except FileNotFoundError as error:
        raise StorageError(f"{uri}: not found; check the address (bucket, folder, spelling)") from error
    except PermissionError as error:
        raise StorageError(f"{uri}: access refused; check the credentials and what they may do there") from error
    except botocore.exceptions.NoCredentialsError as error:
        raise StorageError(f"{uri}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") from error
    except (OSError, botocore.exceptions.BotoCoreError) as error:
        reason = getattr(error, "strerror", None) or str(error) or repr(error)
        raise StorageError(f"{uri}: {type(error).__name__}: {reason.splitlines()[0]}") from error
