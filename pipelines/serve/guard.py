"""What stands before every request: its key, its size, and the time that it may take to arrive."""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipelines.serve.errors import refusal_answer, status_answer
from pipelines.serve.keys import Key, KeyRing, anybody
from pipelines.worker.loop import Refusal

# Seconds in which the whole of a request must have arrived, and of an upload
_ARRIVAL_S, _UPLOAD_S = 60.0, 600.0
UPLOADS = "/v1/files"
# What anybody may see: whether the service is there, and the files of its page
_OPEN, _OPEN_BELOW = ("/", "/healthz", "/readyz"), "/page/"
_SENDER = "sender"


@dataclass(frozen=True)
class Guard:
    """Lets through what has a known key and is not too large; ASGI middleware.

    Without keys everybody may ask, and is told apart by address. Uploaded tables may have `max_file` bytes.
    """

    app: ASGIApp
    ring: KeyRing
    max_body: int
    max_file: int

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it with what is wrong."""
        if scope["type"] != "http" or _is_open(scope["path"]):
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        is_upload = scope["path"] == UPLOADS
        limit, patience = (self.max_file, _UPLOAD_S) if is_upload else (self.max_body, _ARRIVAL_S)
        key = self.ring.find(headers.get("authorization")) if self.ring.keys else _nobody(scope)
        if key is None:
            told = "the API key is missing or wrong; send it as Authorization: Bearer KEY"
            await status_answer(401, told, {"WWW-Authenticate": "Bearer"})(scope, receive, send)
        elif _length(headers) > limit:
            await status_answer(413, _too_large(limit))(scope, receive, send)
        elif (forbidden := self.ring.enter(key)) is not None:
            await refusal_answer(Refusal("rate_limit", forbidden, 1.0))(scope, receive, send)
        else:
            scope.setdefault("state", {})[_SENDER] = key
            try:
                await self.app(scope, _Counted(receive, limit, patience), send)
            finally:
                self.ring.leave(key)


def sender(scope: Mapping[str, Any]) -> Key:
    """The key that a request came with."""
    key: Key = scope["state"][_SENDER]
    return key


class _Counted:
    """The parts of a body as they come. Raises HTTPException where they are too many, or late."""

    def __init__(self, receive: Receive, limit: int, patience: float) -> None:
        self.receive, self.limit, self.patience = receive, limit, patience
        self.until = time.monotonic() + patience
        self.taken, self.whole = 0, False

    async def __call__(self) -> Message:
        if self.whole:
            return await self.receive()
        try:
            message = await asyncio.wait_for(self.receive(), max(0.0, self.until - time.monotonic()))
        except TimeoutError as error:
            raise HTTPException(408, f"the request did not arrive within {self.patience:g} s") from error
        self.taken += len(message.get("body", b""))
        if self.taken > self.limit:
            raise HTTPException(413, _too_large(self.limit))
        self.whole = not message.get("more_body", False)
        return message


def _is_open(path: str) -> bool:
    """Whether a path is answered without a key."""
    return path in _OPEN or path.startswith(_OPEN_BELOW)


def _nobody(scope: Scope) -> Key:
    """Whoever asks where no keys are asked for: an address."""
    host = (scope.get("client") or ("unknown", 0))[0]
    return anybody(str(host))


def _length(headers: Mapping[str, str]) -> int:
    """Bytes that a request says it has."""
    told = headers.get("content-length", "0")
    return int(told) if told.isdecimal() else 0


def _too_large(limit: int) -> str:
    return f"the request is larger than {limit} bytes; send smaller pictures, or fewer rows"
