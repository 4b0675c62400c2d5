"""Calls back when a batch has ended: its id and nothing else, to addresses that whoever runs the service allows."""

import http.client
import json
import time
import urllib.request
from collections.abc import Sequence
from typing import IO, Any

from pipelines.requests import RequestError

_TIMEOUT_S = 10.0
_WAITS_S = (1.0, 5.0, 25.0)


def check_callback(address: str, allowed: Sequence[str]) -> None:
    """Raise RequestError on an address that does not begin as one of those allowed."""
    if not any(address.startswith(prefix) for prefix in allowed):
        told = "this service calls nobody back" if not allowed else f"it begins as none of {', '.join(allowed)}"
        raise RequestError("callback", f"{address!r}: {told}; ask for the batch from time to time")


def call_back(address: str, batch: str, status: str, waits: Sequence[float] = _WAITS_S) -> bool:
    """POST that a batch has ended, as OpenAI's webhooks word it; tried again after `waits`. Whether anybody took it."""
    told = {"object": "event", "type": f"batch.{status}", "created_at": int(time.time()), "data": {"id": batch}}
    request = urllib.request.Request(address, json.dumps(told).encode(), {"Content-Type": "application/json"})
    opener = urllib.request.build_opener(_StayHere)
    for wait in (*waits, None):
        try:
            with opener.open(request, timeout=_TIMEOUT_S):
                return True
        except (OSError, ValueError, http.client.HTTPException):  # urllib's own errors are OSErrors
            if wait is not None:
                time.sleep(wait)
    return False


class _StayHere(urllib.request.HTTPRedirectHandler):
    """Follows nobody to an address that was not allowed."""

    def redirect_request(self, req: Any, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str) -> None:
        """There is no other request."""
