"""Batches in a store: what was ordered, by whom, how far it is, and what came of it. Files alone say all of it."""

import base64
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from diffusion_core.config import Task
from pipelines import storage
from pipelines.config import GenerateConfig, SampleOptions, narrow
from pipelines.image_sets import Row, rejected_of, rows_of
from pipelines.requests import RequestError
from pipelines.serve.catalogue import Version
from pipelines.serve.uploads import CUSTOM_ID, GENERATIONS, Upload, damaged, left_out

Endpoint = Literal["/v1/images/generations", "/v1/images/edits", "/v1/images/variations", "/v1/images/denoise"]
# What is done for rows that name no task
_TASKS: dict[str, Task] = {
    GENERATIONS: "generate", "/v1/images/edits": "inpaint", "/v1/images/variations": "image_to_image",
    "/v1/images/denoise": "denoise",
}  # fmt: skip
_DIGITS = 24
_VERSION = 2
OUTPUT, ERRORS = "-output", "-errors"
ENDED = ("completed", "failed", "cancelled")
Status = Literal["validating", "in_progress", "cancelling", "completed", "failed", "cancelled"]


# It comes to stand on a command line, where it must be no flag and no list
Column = Annotated[str, Field(pattern=r"^\w[\w .:/-]*$", max_length=200)]


class BatchBody(SampleOptions):
    """A table whose rows are made at bulk priority; the settings are those of rows that say nothing."""

    model_config = ConfigDict(allow_inf_nan=False)

    input_file_id: str = Field(max_length=100, description="id of a table that was uploaded by POST /v1/files")
    endpoint: Endpoint = Field(description="what is done for rows that name no task")
    completion_window: Literal["24h"] = Field("24h", description="taken for OpenAI's sake; nothing is given up")
    metadata: dict[str, str] | None = Field(None, max_length=16, description="kept beside the batch")
    model: str | None = Field(None, max_length=200, description="name of the model; see GET /v1/models")
    seed: int = Field(1, ge=0, lt=2**62, description="a row without a seed has one derived from this and its number")
    carry: list[Column] = Field([], description="columns of the table that go along to the images")
    callback: str | None = Field(None, max_length=1000, description="address to call when it has ended, where allowed")


@dataclass(frozen=True)
class Ordered:
    """What was ordered: all that does not change. `job` are the settings of the bulk stage, as JSON values."""

    id: str
    owner: str
    created_at: int
    endpoint: str
    completion_window: str
    input_file_id: str
    metadata: dict[str, str] | None
    model: str
    version: str
    rows: int
    callback: str | None
    job: dict[str, Any]


@dataclass(frozen=True)
class State:
    """How far a batch is: rows made and rejected, when it came to what, its images, and what went wrong."""

    status: Status = "validating"
    completed: int = 0
    failed: int = 0
    at: dict[str, int] = field(default_factory=dict)
    images: str | None = None
    error: str | None = None


def now() -> int:
    """Seconds since 1970."""
    return int(time.time())


class Batches:
    """The batches in a store; every change is one object, so that any process may go on from them."""

    def __init__(self, store: str) -> None:
        self.store, self.folder = store, storage.join(store, "batches")
        self._open = storage.join(self.folder, "open")

    def order(self, owner: str, body: BatchBody, upload: Upload, version: Version, app: str) -> Ordered:
        """Order a batch. The same again is found; where it was cancelled or failed, it goes on. Raises RequestError."""
        carry = [CUSTOM_ID] * (CUSTOM_ID in upload.columns and CUSTOM_ID not in body.carry) + body.carry
        missing = [name for name in carry if name not in upload.columns]
        if missing:
            raise RequestError("carry", f"no column {missing[0]!r}; there are {', '.join(upload.columns)}")
        job = narrow(
            body, GenerateConfig, store=self.store, name="batches", model=version.uri, table=upload.table, carry=carry,
            task=_TASKS[body.endpoint], via="serve", app=app, skip_bad=True, max_rejected="100%", addresses=False,
        ).model_dump(mode="json", exclude_unset=True)  # fmt: skip
        said = body.model_dump(mode="json")
        text = storage.to_json([_VERSION, owner, said, upload.id, version.uri, version.digest])
        ordered = Ordered(
            f"batch_{storage.digest(text)[:_DIGITS]}", owner, now(), body.endpoint, body.completion_window, upload.id,
            body.metadata, version.name, version.digest, upload.rows, body.callback, job,
        )  # fmt: skip
        storage.create_bytes(self._place(ordered, "batch.json"), storage.to_json(asdict(ordered)))
        if self.state(ordered).status in ("cancelled", "failed"):
            storage.remove_object(self._place(ordered, "cancel"))
            storage.remove_object(self._place(ordered, "state.json"))
        if self.state(ordered).status != "completed":
            storage.create_bytes(self._marker(ordered), b"")
        return self.find(owner, ordered.id) or ordered

    def find(self, owner: str, identity: str) -> Ordered | None:
        """An owner's batch; None where there is no such. Raises StorageError on one that is damaged."""
        place = storage.join(self.folder, owner, "batches", identity, "batch.json")
        try:
            return Ordered(**storage.read_json(place))
        except storage.NotFoundError:
            return None
        except TypeError as error:
            raise damaged(place, error) from error

    def all_of(self, owner: str, tell: Callable[[str], None] = lambda _: None) -> list[Ordered]:
        """All batches of an owner, the newest first; `tell` hears of those that are damaged."""
        names = storage.list_folders(storage.join(self.folder, owner, "batches"))
        return sorted(
            self._whole(((owner, name) for name in names), tell), key=lambda each: (-each.created_at, each.id)
        )

    def unfinished(self, tell: Callable[[str], None] = lambda _: None) -> list[Ordered]:
        """The batches of all owners that are to be made, the oldest first; `tell` hears of those that are damaged."""
        names = (info.uri.rsplit("/", 1)[1].partition(".") for info in storage.list_if_any(self._open))
        found = self._whole(((owner, identity) for owner, _, identity in names), tell)
        return sorted(found, key=lambda each: (each.created_at, each.id))

    def _whole(self, names: Iterable[tuple[str, str]], tell: Callable[[str], None]) -> Iterator[Ordered]:
        """Those of the owners' batches that are not damaged. Raises StoreAwayError."""
        for owner, identity in names:
            with left_out(identity, tell):
                found = self.find(owner, identity)
                if found is not None:
                    self.state(found)
                    yield found

    def state(self, ordered: Ordered) -> State:
        """How far a batch is. Raises StorageError where that is damaged."""
        place = self._place(ordered, "state.json")
        try:
            state = State(**storage.read_json(place))
        except storage.NotFoundError:
            state = State()
        except TypeError as error:
            raise damaged(place, error) from error
        if state.status in ENDED or not self.is_cancelled(ordered):
            return state
        return State(**{**asdict(state), "status": "cancelling"})

    def note(self, ordered: Ordered, state: State) -> None:
        """Write down how far a batch is."""
        storage.write_bytes(self._place(ordered, "state.json"), storage.to_json(asdict(state)))

    def close(self, ordered: Ordered) -> None:
        """There is nothing left to do for a batch, unless it was ordered again after its end."""
        if self.state(ordered).status in ENDED:
            storage.remove_object(self._marker(ordered))
            # Whoever orders it again takes its end away first: it is seen here, or their marker comes after this.
            if self.state(ordered).status not in ENDED:
                storage.create_bytes(self._marker(ordered), b"")

    def cancel(self, ordered: Ordered) -> None:
        """Have a batch stopped by whoever makes it."""
        storage.create_bytes(self._place(ordered, "cancel"), b"")

    def is_cancelled(self, ordered: Ordered) -> bool:
        """Whether somebody wants it stopped."""
        return storage.exists(self._place(ordered, "cancel"))

    def _marker(self, ordered: Ordered) -> str:
        """What says that a batch is to be made."""
        return storage.join(self._open, f"{ordered.owner}.{ordered.id}")

    def _place(self, ordered: Ordered, name: str) -> str:
        return storage.join(self.folder, ordered.owner, "batches", ordered.id, name)


def batch_object(ordered: Ordered, state: State) -> dict[str, Any]:
    """A batch as OpenAI's API describes one; beside that `version`, the model's, and `images`, their URI."""
    stem, at, done = f"file-{ordered.id.removeprefix('batch_')}", state.at, state.status == "completed"
    errors = None
    if state.error is not None:
        told = {"code": "batch_failed", "message": state.error, "param": None, "line": None}
        errors = {"object": "list", "data": [told]}
    times = {f"{name}_at": at.get(name) for name in ("in_progress", "completed", "failed", "cancelling", "cancelled")}
    return {
        "id": ordered.id, "object": "batch", "endpoint": ordered.endpoint, "errors": errors,
        "input_file_id": ordered.input_file_id, "completion_window": ordered.completion_window,
        "status": state.status, "output_file_id": stem + OUTPUT if done else None,
        "error_file_id": stem + ERRORS if done and state.failed else None, "created_at": ordered.created_at,
        "expires_at": None, "finalizing_at": None, "expired_at": None, **times,
        "request_counts": {"total": ordered.rows, "completed": state.completed, "failed": state.failed},
        "metadata": ordered.metadata, "model": ordered.model, "version": ordered.version, "images": state.images,
    }  # fmt: skip


def output_lines(ordered: Ordered, images: str) -> Iterator[bytes]:
    """A line for every picture, as OpenAI's batches answer: its row's `custom_id` (or number), and the body."""
    manifest = storage.read_manifest(images, "images")
    for part in manifest["parts"]:
        for row in rows_of(images, manifest, part):
            picture = base64.b64encode(row["image"]["bytes"]).decode()
            body = {
                "created": ordered.created_at, "model": ordered.model, "version": row["model"],
                "data": [{"b64_json": picture, "seed": row["seed"]}],
            }  # fmt: skip
            yield _line(ordered, row, {"status_code": 200, "request_id": row["sha256"], "body": body}, None)


def error_lines(ordered: Ordered, images: str) -> Iterator[bytes]:
    """A line for every row that could not be made, with the reason."""
    for part in storage.read_manifest(images, "images")["parts"]:
        for row in rejected_of(images, part):
            yield _line(ordered, row, None, {"code": row["reason"], "message": row["error"]})


def _line(ordered: Ordered, row: Row, response: dict[str, Any] | None, error: dict[str, Any] | None) -> bytes:
    identity = f"{ordered.id.replace('batch_', 'batch_req_')}_{row['row']}"
    own = row.get(CUSTOM_ID)
    name = str(row["row"] if own in (None, "") else own)
    told = {"id": identity, CUSTOM_ID: name, "response": response, "error": error}
    return json.dumps(told).encode() + b"\n"
