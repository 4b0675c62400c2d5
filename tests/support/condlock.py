"""Paste filters for the S3 endpoint of the tests: atomic conditional writes, and a cache in place of memcached."""

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from eventlet.semaphore import Semaphore

Application = Callable[[dict[str, Any], Any], Iterable[bytes]]


class CondLock:
    """Serialises conditional writes to one path, so that `If-None-Match: *` has one winner (with one proxy worker)."""

    def __init__(self, app: Application) -> None:
        self.app = app
        self.locks: defaultdict[str, Any] = defaultdict(Semaphore)

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if "HTTP_IF_NONE_MATCH" not in environ or environ["REQUEST_METHOD"] not in ("PUT", "POST"):
            return self.app(environ, start_response)
        with self.locks[environ["PATH_INFO"]]:
            return list(self.app(environ, start_response))  # the whole answer is made while the lock is held


class LocalCache:
    """What Swift asks of memcached, in this process: enough for one proxy worker."""

    def __init__(self) -> None:
        self.values: dict[str, tuple[str, float]] = {}

    def get(self, key: str, raise_on_error: bool = False) -> Any:
        text, until = self.values.get(key, ("null", 0.0))
        return None if until and until < time.time() else json.loads(text)

    def set(self, key: str, value: Any, serialize: bool = True, time: float = 0, **_: Any) -> None:
        self.values[key] = (json.dumps(value), now() + time if time else 0.0)

    def delete(self, key: str, server_key: str | None = None) -> None:
        self.values.pop(key, None)

    def incr(self, key: str, delta: int = 1, time: float = 0) -> int:
        value = max(0, (self.get(key) or 0) + delta)
        self.set(key, value, time=time)
        return value

    def decr(self, key: str, delta: int = 1, time: float = 0) -> int:
        return self.incr(key, -delta, time)

    def set_multi(
        self, mapping: dict[str, Any], server_key: str, serialize: bool = True, time: float = 0, **_: Any
    ) -> None:
        for key, value in mapping.items():
            self.set(key, value, time=time)

    def get_multi(self, keys: Iterable[str], server_key: str) -> list[Any]:
        return [self.get(key) for key in keys]


def now() -> float:
    return time.time()


def filter_factory(_: dict[str, str], **__: str) -> Callable[[Application], Application]:
    return CondLock


def cache_factory(_: dict[str, str], **__: str) -> Callable[[Application], Application]:
    cache = LocalCache()

    def wrap(app: Application) -> Application:
        def answer(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
            environ["swift.cache"] = cache
            return app(environ, start_response)

        return answer

    return wrap
