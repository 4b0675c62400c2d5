"""Tables that callers uploaded for batches: kept in the store, each owner's apart, under ids made of their content."""

import contextlib
import csv
import io
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from pipelines import storage
from pipelines.requests import RequestError
from pipelines.serve.keys import Key, anybody
from pipelines.serve.schemas import GenerationBody

GENERATIONS = "/v1/images/generations"
CUSTOM_ID = "custom_id"
# What OpenAI's clients send, and others' rows have no such columns
_LINE = {CUSTOM_ID, "method", "url", "body"}
_KINDS = (".csv", ".tsv", ".jsonl", ".parquet")
_DIGITS = 24
_LONGEST_NAME = 200
# Fields of a line's body that are the answer's shape, and no part of what is asked of the model
_SHAPE = {
    "n", "size", "response_format", "output_format", "output_compression", "stream", "partial_images", "background",
    "quality", "moderation", "user", "priority", "timeout", "model",
}  # fmt: skip


@dataclass(frozen=True)
class Upload:
    """An uploaded table: its name as it was sent, its bytes, when it came, its rows and columns, and where it lies.

    Requests as OpenAI's clients send them are made rows of a table: `sent` is where they lie as they came, `model` the
    one that they name.
    """

    id: str
    filename: str
    bytes: int
    created_at: int
    rows: int
    columns: list[str]
    table: str
    sent: str
    model: str | None = None

    def as_file(self) -> dict[str, Any]:
        """As OpenAI's API describes a file."""
        return file_object(self.id, self.filename, self.bytes, self.created_at, "batch")


def file_object(identity: str, filename: str, size: int, created_at: int, purpose: str) -> dict[str, Any]:
    """A file as OpenAI's API describes one."""
    return {
        "id": identity, "object": "file", "bytes": size, "created_at": created_at, "filename": filename,
        "purpose": purpose, "status": "processed",
    }  # fmt: skip


def owner_of(key: Key) -> str:
    """The folder of all that a key's holder uploads; a holder may have several keys, one after the other.

    Without keys all is everybody's.
    """
    return "anybody" if key.sha256 == anybody("").sha256 else storage.digest(key.name.encode())[:_DIGITS]


def damaged(place: str, error: TypeError) -> storage.DamagedError:
    """The error of a record that has other fields than this version's."""
    return storage.DamagedError(f"{place}: not as this version writes it ({error})")


@contextlib.contextmanager
def left_out(identity: str, tell: Callable[[str], None]) -> Iterator[None]:
    """Passes over a record that is damaged, which `tell` hears of. Raises StoreAwayError: nothing is known then."""
    try:
        yield
    except storage.StoreAwayError:
        raise
    except storage.StorageError as error:
        tell(f"{identity} is left out: {error}")


class Uploads:
    """The uploaded tables in a store, each with `max_rows` rows at most."""

    def __init__(self, store: str, max_rows: int) -> None:
        self.folder, self.max_rows = storage.join(store, "batches"), max_rows

    def add(self, owner: str, filename: str, data: bytes) -> Upload:
        """Keep a table; the same one again is found. Raises RequestError on what is none."""
        name = filename.rsplit("/", 1)[-1]
        kind = next((kind for kind in _KINDS if name.lower().endswith(kind)), None)
        if kind is None:
            raise RequestError("file", f"{name[-40:]!r} is no table; there are {', '.join(_KINDS)}")
        identity = f"file-{storage.digest(kind.encode() + data)[:_DIGITS]}"
        found = self.find(owner, identity)
        return found or self._keep(owner, identity, name, data, kind)

    def find(self, owner: str, identity: str) -> Upload | None:
        """An owner's upload; None where there is no such. Raises StorageError on one that is damaged."""
        place = storage.join(self._place(owner, identity), "file.json")
        try:
            return Upload(**storage.read_json(place))
        except storage.NotFoundError:
            return None
        except TypeError as error:
            raise damaged(place, error) from error

    def all_of(self, owner: str, tell: Callable[[str], None] = lambda _: None) -> list[Upload]:
        """All uploads of an owner, the newest first; `tell` hears of those that are damaged."""
        found: list[Upload] = []
        for name in storage.list_folders(storage.join(self.folder, owner, "files")):
            with left_out(name, tell):
                upload = self.find(owner, name)
                if upload is not None:
                    found.append(upload)
        return sorted(found, key=lambda each: (-each.created_at, each.id))

    def remove(self, owner: str, identity: str) -> None:
        """Delete an owner's upload."""
        storage.remove_object(storage.join(self._place(owner, identity), "file.json"))
        storage.remove_folder(self._place(owner, identity))

    def _place(self, owner: str, identity: str) -> str:
        return storage.join(self.folder, owner, "files", identity)

    def _keep(self, owner: str, identity: str, name: str, data: bytes, kind: str) -> Upload:
        try:
            own, model = _rows_of_lines(data) if kind == ".jsonl" and _is_of_lines(data) else (data, None)
            rows, columns = _shape_of(own, kind)
        except (ValueError, csv.Error, pa.ArrowException, OSError) as error:
            raise RequestError("file", f"not readable as {kind} ({str(error).splitlines()[0]})") from error
        if not 0 < rows <= self.max_rows:
            raise RequestError("file", f"{rows} rows; this service takes 1 to {self.max_rows} a file")
        sent, table = (storage.join(self._place(owner, identity), f"{stem}{kind}") for stem in ("sent", "table"))
        if own is data:
            table = sent
        upload = Upload(identity, name[-_LONGEST_NAME:], len(data), int(time.time()), rows, columns, table, sent, model)
        for place, content in {table: own, sent: data}.items():
            storage.write_bytes(place, content)
        storage.create_bytes(storage.join(self._place(owner, identity), "file.json"), storage.to_json(asdict(upload)))
        return upload


def _shape_of(data: bytes, kind: str) -> tuple[int, list[str]]:
    """Rows and columns of a table; of JSON those of its first row. Rows of text are counted by their lines."""
    if kind == ".parquet":
        file = pq.ParquetFile(io.BytesIO(data))
        return file.metadata.num_rows, file.schema_arrow.names
    lines = [number for number, line in enumerate(data.splitlines()) if line.strip()]
    first = data.splitlines()[lines[0]].decode("utf-8-sig") if lines else ""
    if kind == ".jsonl":
        row = json.loads(first or "{}")
        return len(lines), list(row) if isinstance(row, dict) else []
    return max(0, len(lines) - 1), next(csv.reader([first], delimiter="\t" if kind == ".tsv" else ","), [])


def _is_of_lines(data: bytes) -> bool:
    """Whether a file has requests as OpenAI's clients send them, and not rows of a table."""
    first = json.loads(next((line for line in data.splitlines() if line.strip()), b"{}"))
    return isinstance(first, dict) and set(first) >= _LINE


def _rows_of_lines(data: bytes) -> tuple[bytes, str | None]:
    """Requests of OpenAI's clients as rows of a table, and the model that they name. Raises RequestError."""
    rows, models = [], set()
    for number, line in enumerate(data.splitlines(), 1):
        if line.strip():
            row, model = _row_of_line(number, json.loads(line))
            rows.append(json.dumps(row))
            models.add(model)
    if len(models) > 1:
        raise RequestError("file", f"its lines name {len(models)} models; make a file for each")
    return "".join(f"{row}\n" for row in rows).encode(), models.pop()


def _row_of_line(number: int, line: Any) -> tuple[dict[str, Any], str | None]:
    """A request as a row, and the model that it names. Raises RequestError where it asks for what no row can."""
    if not isinstance(line, dict) or set(line) != _LINE or not isinstance(line[CUSTOM_ID], str):
        raise RequestError("file", f"line {number}: need exactly {', '.join(sorted(_LINE))}")
    if line["url"] != GENERATIONS:
        raise RequestError("file", f"line {number}: url {line['url']!r}; lines of requests are for {GENERATIONS}")
    try:
        body = GenerationBody.model_validate(line["body"])
    except ValidationError as error:
        first = error.errors()[0]
        told = ".".join(map(str, first["loc"])) or "body"
        raise RequestError("file", f"line {number}: {told}: {first['msg'].removeprefix('Value error, ')}") from error
    if body.n != 1 or body.output_format != "png" or body.stream:
        raise RequestError("file", f"line {number}: one PNG a line; leave n, output_format and stream out")
    asked = {name: value for name, value in body.model_dump(exclude_unset=True).items() if name not in _SHAPE}
    return {CUSTOM_ID: line[CUSTOM_ID], "task": body.task, **asked}, body.model
