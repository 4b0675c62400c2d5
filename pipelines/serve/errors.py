"""Errors as OpenAI's API words them, and none that tells of the inside."""

import logging
from typing import Any

import fastapi
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from pipelines.requests import RequestError
from pipelines.worker.loop import Refusal

_log = logging.getLogger("ray.serve")
# Refusal reason -> status, type, what is told in place of the inside (None: its own message)
_REFUSALS: dict[str, tuple[int, str, str | None]] = {
    "overloaded": (503, "overloaded_error", None),
    "timeout": (504, "timeout_error", None),
    "failed": (503, "server_error", "the engines failed at this request; try again"),
    "unavailable": (503, "server_error", "no engine can answer for this model now; try again"),
    "rate_limit": (429, "rate_limit_error", None),
}
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
_SECONDS_AT_MOST = 3600
_SHOWN = 100


class RefusedError(Exception):
    """A request that is not answered now."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


def error_body(message: str, kind: str, field: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The JSON of an error."""
    return {"error": {"message": message, "type": kind, "param": field, "code": code}}


def refusal_body(refusal: Refusal) -> dict[str, Any]:
    """The JSON of a refusal."""
    _, kind, told = _REFUSALS[refusal.reason]
    return error_body(told or refusal.message, kind, code=refusal.reason)


def refusal_answer(refusal: Refusal) -> JSONResponse:
    """A refusal with its status, and after how many seconds to try again."""
    if _REFUSALS[refusal.reason][2] is not None:
        _log.error("serve: %s: %s", refusal.reason, refusal.message)
    wait = str(min(_SECONDS_AT_MOST, max(1, round(refusal.retry_after))))
    return JSONResponse(refusal_body(refusal), _REFUSALS[refusal.reason][0], {"Retry-After": wait})


def status_answer(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """An error by its HTTP status."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return JSONResponse(error_body(message, kind), status, headers)


def _shown(field: str) -> str:
    """The name of a field as it can be sent back: it is the caller's, of any length, and JSON's may be no Unicode."""
    return field[:_SHOWN].encode("utf-8", "backslashreplace").decode()


def add_handlers(api: fastapi.FastAPI) -> None:
    """Have the API answer with these errors."""

    @api.exception_handler(RequestValidationError)
    async def refuse_invalid(_: fastapi.Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
        field = _shown(".".join(place)) if first["type"] != "json_invalid" and place else "body"
        return JSONResponse(error_body(f"{field}: {first['msg']}", "invalid_request_error", field), 400)

    @api.exception_handler(RequestError)
    async def refuse_request(_: fastapi.Request, error: RequestError) -> JSONResponse:
        return JSONResponse(error_body(str(error), "invalid_request_error", error.field), 400)

    @api.exception_handler(RefusedError)
    async def refuse(_: fastapi.Request, error: RefusedError) -> JSONResponse:
        return refusal_answer(error.refusal)

    @api.exception_handler(HTTPException)
    async def refuse_by_status(_: fastapi.Request, error: HTTPException) -> JSONResponse:
        return status_answer(error.status_code, str(error.detail), dict(error.headers or {}))

    @api.exception_handler(Exception)
    async def hide(_: fastapi.Request, error: Exception) -> JSONResponse:
        _log.error("serve: an error of the service itself", exc_info=error)
        return status_answer(500, "the service failed at this request; its log says why")
