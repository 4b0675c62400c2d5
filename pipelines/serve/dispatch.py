"""From a request to an engine and back: tried again where an engine dies, which makes the same pictures."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from typing import Any

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException

from pipelines.serve.catalogue import Version
from pipelines.worker.loop import End, Event, Order, Preview, Refusal, late

_PAUSE_S = 0.2
# What an engine's own clock may be late by before its answer is no longer waited for.
_GRACE_S = 5.0

Call = Callable[[Version, Order], AsyncGenerator[Event, None]]


class EngineDiedError(Exception):
    """The engine that had an order is gone, or says that it failed."""


class Dispatcher:
    """Sends orders to engines by `call`; `retried` hears the model's name whenever one is sent again."""

    def __init__(self, call: Call, retries: int, retried: Callable[[str], None] = lambda _: None) -> None:
        self.call, self.retries, self.retried = call, retries, retried

    async def make(self, version: Version, order: Order) -> AsyncGenerator[Event, None]:
        """What becomes of an order, as `TickLoop.make` tells it, whatever engines die meanwhile."""
        until, shown = time.monotonic() + order.timeout, dict.fromkeys(range(len(order.requests)), 0)
        open_places, tries = list(shown), 0
        while open_places:
            rest = replace(order, requests=tuple(order.requests[at] for at in open_places))
            try:
                async with contextlib.aclosing(self._tried(version, rest, until)) as events:
                    async for event in events:
                        told = _renumbered(event, open_places, shown)
                        if told is not None:
                            yield told
                        if isinstance(told, Refusal):
                            return
                return
            except EngineDiedError as error:
                tries += 1
                if tries > self.retries:
                    yield Refusal("failed", str(error), 1.0)
                    return
            open_places = [at for at in open_places if shown[at] >= 0]
            self.retried(version.name)
            await asyncio.sleep(min(_PAUSE_S * 2**tries, max(0.0, until - time.monotonic())))

    async def _tried(self, version: Version, order: Order, until: float) -> AsyncGenerator[Event, None]:
        """One try, within what is left of the order's time. Raises EngineDiedError where it may be tried again."""
        rest, until = replace(order, timeout=max(0.0, until - time.monotonic())), until + _GRACE_S
        async with contextlib.aclosing(self.call(version, rest)) as events:
            while True:
                try:
                    event = await asyncio.wait_for(anext(events), max(0.0, until - time.monotonic()))
                except StopAsyncIteration:
                    return
                except TimeoutError:
                    yield Refusal("timeout", f"timeout: no engine answered within {order.timeout:.3g} s", 10.0)
                    return
                if isinstance(event, Refusal) and event.reason == "failed":
                    raise EngineDiedError(event.message)
                if isinstance(event, Refusal) and event.reason == "timeout":
                    event = event._replace(message=late(order.timeout))  # and not of the rest of it
                yield event


def _renumbered(event: Event, places: list[int], shown: dict[int, int]) -> Event | None:
    """An event by the order's own numbers; None for a preview no further than one before. -1 marks what has ended."""
    if isinstance(event, Refusal):
        return event
    at = places[event.place]
    if isinstance(event, Preview):
        if event.done <= shown[at]:
            return None
        shown[at] = event.done
    else:
        shown[at] = -1
    return event._replace(place=at)


def through_serve(handles: dict[str, Any]) -> Call:
    """Calls of the deployment of each model's engines, by the model's name."""

    async def call(version: Version, order: Order) -> AsyncGenerator[Event, None]:
        response = (
            handles[version.name].options(stream=True, method_name="make").remote(version.name, version.uri, order)
        )
        try:
            async for event in response:
                yield event
        except RayTaskError as error:
            raise EngineDiedError(f"engine: {type(error.cause).__name__}") from error
        except (BackPressureError, DeploymentUnavailableError) as error:
            yield Refusal("unavailable", f"engine: {type(error).__name__}", 5.0)
        except (RayError, RayServeException) as error:
            raise EngineDiedError(f"engine: {type(error).__name__}") from error
        finally:
            response.cancel()

    return call


async def pictures(events: AsyncGenerator[Event, None]) -> tuple[list[End], Refusal | None]:
    """All ends of an order in its own order, or the refusal that cut it off."""
    ends: list[End] = []
    async for event in events:
        if isinstance(event, Refusal):
            return ends, event
        if isinstance(event, End):
            ends.append(event)
    return sorted(ends, key=lambda end: end.place), None
