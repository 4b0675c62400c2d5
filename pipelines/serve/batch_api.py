"""Files and batches as OpenAI's API has them: a table is uploaded and ordered, and what was made of it is fetched."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import fastapi
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from pipelines import storage
from pipelines.requests import RequestError
from pipelines.serve.batches import (
    ENDED,
    ERRORS,
    OUTPUT,
    BatchBody,
    Batches,
    Ordered,
    batch_object,
    error_lines,
    output_lines,
)
from pipelines.serve.callbacks import check_callback
from pipelines.serve.catalogue import Catalogue
from pipelines.serve.guard import UPLOADS, sender
from pipelines.serve.uploads import Upload, Uploads, file_object, owner_of

_log = logging.getLogger("ray.serve")
T = TypeVar("T", Upload, Ordered)
Lines = Callable[[Ordered, str], Iterator[bytes]]
_LINES: dict[str, Lines] = {OUTPUT: output_lines, ERRORS: error_lines}
_PAGE, _LONGEST_PAGE = 20, 100
# Batches of one holder that may be open at a time
_MOST_OPEN = 100
_JSON_LINES = "application/jsonl"
Limit = Annotated[int, fastapi.Query(ge=1, le=_LONGEST_PAGE)]


class UploadForm(BaseModel):
    """A table."""

    model_config = ConfigDict(extra="forbid")

    file: fastapi.UploadFile = Field(description="table of requests: .csv, .tsv, .jsonl or .parquet")
    purpose: Literal["batch"] = Field(description="what it is for")


@dataclass(frozen=True)
class Desk:
    """Where batches are ordered: their tables and themselves, by which models, and whose application makes them."""

    uploads: Uploads
    batches: Batches
    catalogue: Catalogue
    app: str
    callbacks: Sequence[str] = ()

    def order(self, owner: str, body: BatchBody) -> Ordered:
        """Order a batch of the live version of a model. Raises RequestError."""
        upload = self.uploads.find(owner, _checked(body.input_file_id, "file-"))
        if upload is None:
            raise RequestError("input_file_id", f"no file {body.input_file_id!r}; upload it by POST {UPLOADS}")
        if len([each for each in self.batches.unfinished() if each.owner == owner]) >= _MOST_OPEN:
            raise RequestError("batch", f"{_MOST_OPEN} batches are open; wait for one, or cancel it")
        if body.callback is not None:
            check_callback(body.callback, self.callbacks)
        version = self.catalogue.find(body.model or upload.model)
        return self.batches.order(owner, body, upload, version, self.app)

    def made(self, owner: str, identity: str) -> tuple[Ordered, str, Lines] | None:
        """Batch, images and lines of a file that a batch has come to; None where there is no such."""
        for suffix, lines in _LINES.items():
            if identity.endswith(suffix):
                name = identity.removeprefix("file-").removesuffix(suffix)
                ordered = self.batches.find(owner, _checked(f"batch_{name}", "batch_"))
                images = None if ordered is None else self.batches.state(ordered).images
                return None if ordered is None or images is None else (ordered, images, lines)
        return None


def add_batches(api: fastapi.FastAPI, desk: Desk) -> None:
    """Have the API take tables and make them."""
    _add_files(api, desk)
    _add_batches(api, desk)


def _add_files(api: fastapi.FastAPI, desk: Desk) -> None:
    uploads = desk.uploads

    @api.post(UPLOADS)
    def upload(request: fastapi.Request, form: Annotated[UploadForm, fastapi.Form()]) -> dict[str, Any]:
        """Upload a table for a batch; the same one again is found."""
        return uploads.add(_owner(request), form.file.filename or "", form.file.file.read()).as_file()

    @api.get(UPLOADS)
    def files(request: fastapi.Request, limit: Limit = _PAGE, after: str = "") -> dict[str, Any]:
        """Your tables, the newest first."""
        shown, more = _page(uploads.all_of(_owner(request), _log.warning), limit, after)
        return _list([each.as_file() for each in shown], more)

    @api.get(UPLOADS + "/{identity}")
    def file(request: fastapi.Request, identity: str) -> dict[str, Any]:
        """One file: a table, or what a batch has come to."""
        owner = _owner(request)
        made = desk.made(owner, identity)
        if made is None:
            return _found(uploads.find(owner, _checked(identity, "file-")), identity).as_file()
        ordered, images, _ = made
        size = sum(part["bytes"] for part in storage.read_manifest(images, "images")["parts"])
        return file_object(identity, f"{ordered.id}.jsonl", size, ordered.created_at, "batch_output")

    @api.get(UPLOADS + "/{identity}/content", response_class=Response)
    def content(request: fastapi.Request, identity: str) -> Response:
        """The bytes of a file; of a batch a line of JSON for each row."""
        owner = _owner(request)
        made = desk.made(owner, identity)
        if made is None:
            found = _found(uploads.find(owner, _checked(identity, "file-")), identity)
            return Response(storage.read_bytes(found.sent), media_type="application/octet-stream")
        ordered, images, lines = made
        return StreamingResponse(lines(ordered, images), media_type=_JSON_LINES)

    @api.delete(UPLOADS + "/{identity}")
    def delete(request: fastapi.Request, identity: str) -> dict[str, Any]:
        """Delete a table that no open batch needs."""
        owner, found = _owner(request), uploads.find(_owner(request), _checked(identity, "file-"))
        if any(each.owner == owner and each.input_file_id == identity for each in desk.batches.unfinished()):
            raise RequestError("file", f"{identity}: an open batch needs it; cancel that first")
        uploads.remove(owner, _found(found, identity).id)
        return {"id": identity, "object": "file", "deleted": True}


def _add_batches(api: fastapi.FastAPI, desk: Desk) -> None:
    batches = desk.batches

    def told(ordered: Ordered) -> dict[str, Any]:
        return batch_object(ordered, batches.state(ordered))

    @api.post("/v1/batches")
    def order(request: fastapi.Request, body: BatchBody) -> dict[str, Any]:
        """Have the rows of a table made. The same batch again is found; one that failed or was cancelled goes on."""
        return told(desk.order(_owner(request), body))

    @api.get("/v1/batches")
    def ordered(request: fastapi.Request, limit: Limit = _PAGE, after: str = "") -> dict[str, Any]:
        """Your batches, the newest first."""
        shown, more = _page(batches.all_of(_owner(request), _log.warning), limit, after)
        return _list([told(each) for each in shown], more)

    @api.get("/v1/batches/{identity}")
    def batch(request: fastapi.Request, identity: str) -> dict[str, Any]:
        """How far a batch is."""
        return told(_found(batches.find(_owner(request), _checked(identity, "batch_")), identity))

    @api.post("/v1/batches/{identity}/cancel")
    def cancel(request: fastapi.Request, identity: str) -> dict[str, Any]:
        """Stop a batch; what is made of it is kept, and the same batch ordered again goes on."""
        found = _found(batches.find(_owner(request), _checked(identity, "batch_")), identity)
        if batches.state(found).status not in ENDED:
            batches.cancel(found)
        return told(found)


def _owner(request: fastapi.Request) -> str:
    return owner_of(sender(request.scope))


def _checked(identity: str, prefix: str) -> str:
    """An id that may stand in an address of the store. Raises HTTPException on what can be none."""
    digits = identity.removeprefix(prefix)
    if not identity.startswith(prefix) or not digits.isalnum() or not digits.isascii():
        raise fastapi.HTTPException(404, f"no {prefix[:-1]} {identity[:_LONGEST_PAGE]!r}")
    return identity


def _found(thing: T | None, identity: str) -> T:
    if thing is None:
        raise fastapi.HTTPException(404, f"no {identity.split('-')[0].split('_')[0]} {identity!r}")
    return thing


def _page(things: Sequence[T], limit: int, after: str) -> tuple[Sequence[T], bool]:
    """So many things after the one with an id, and whether there are more."""
    first = next((at + 1 for at, each in enumerate(things) if each.id == after), 0)
    return things[first : first + limit], len(things) > first + limit


def _list(data: list[dict[str, Any]], more: bool) -> dict[str, Any]:
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
    return {"object": "list", "data": data, **ends, "has_more": more}
