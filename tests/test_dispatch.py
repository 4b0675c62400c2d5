import asyncio

import numpy as np
import pytest

from diffusion_core.tasks import Request
from pipelines.serve.catalogue import Version
from pipelines.serve.dispatch import Dispatcher, EngineDiedError, pictures
from pipelines.worker.loop import End, Order, Preview, Refusal

VERSION = Version("tiny", "/models/tiny", "d" * 64, None)


def paint(seed):
    return np.full((2, 2, 3), seed, np.uint8)


class Engines:
    """Engines that show one preview of each picture and then end it; `deaths` are the events after which they die."""

    def __init__(self, deaths=(), refusal=None):
        self.deaths, self.refusal, self.asked, self.closed = list(deaths), refusal, [], 0

    async def call(self, version, order):
        assert version is VERSION
        self.asked.append([request.seed for request in order.requests])
        left = self.deaths.pop(0) if self.deaths else 99
        try:
            for kind in ("preview", "end"):
                for place, request in enumerate(order.requests):
                    if left == 0:
                        raise EngineDiedError("engine: gone")
                    left -= 1
                    if self.refusal and kind == "end":
                        yield self.refusal
                        return
                    made = paint(request.seed)
                    yield Preview(place, 1, 2, made) if kind == "preview" else End(place, made, 2)
        finally:
            self.closed += 1


def events_of(engines, seeds=(5, 6, 7), retries=3, timeout=60.0, told=lambda _: None):
    order = Order(tuple(Request(seed) for seed in seeds), timeout=timeout)

    async def main():
        return [event async for event in Dispatcher(engines.call, retries, told).make(VERSION, order)]

    return asyncio.run(main())


def test_every_picture_comes_once_whatever_dies_and_only_what_is_missing_is_made_again():
    engines, told = Engines(deaths=[4, 2, 3]), []
    events = events_of(engines, told=told.append)
    ends = {event.place: event.pixels[0, 0, 0] for event in events if isinstance(event, End)}
    assert ends == {0: 5, 1: 6, 2: 7}
    assert len([event for event in events if isinstance(event, End)]) == 3
    assert len([event for event in events if isinstance(event, Preview)]) == 3, "a preview is not shown again"
    # one ended before the first death; in the second try nothing; in the third one more
    assert engines.asked == [[5, 6, 7], [6, 7], [6, 7], [7]]
    assert (told, engines.closed) == (["tiny"] * 3, 4)


def test_when_tries_are_spent_the_order_is_refused():
    engines = Engines(deaths=[0, 0, 0])
    assert events_of(engines, retries=2) == [Refusal("failed", "engine: gone", 1.0)]
    assert len(engines.asked) == 3


@pytest.mark.parametrize("reason", ["overloaded", "unavailable"])
def test_a_refusal_is_handed_on_and_not_tried_again(reason):
    engines = Engines(refusal=Refusal(reason, "no", 7.0))
    assert events_of(engines)[-1] == Refusal(reason, "no", 7.0)
    assert len(engines.asked) == 1


def test_a_deadline_that_passed_is_told_as_it_was_set_and_not_as_what_was_left_of_it():
    engines = Engines(refusal=Refusal("timeout", "not done after 1.2 s", 7.0))
    (event,) = [event for event in events_of(engines, timeout=60.0) if isinstance(event, Refusal)]
    assert event == Refusal("timeout", "timeout: not done after 60 s; ask for fewer pictures or steps, or later", 7.0)
    assert len(engines.asked) == 1


def test_an_engine_that_never_answers_is_waited_for_no_longer_than_the_order_may_take(monkeypatch):
    monkeypatch.setattr("pipelines.serve.dispatch._GRACE_S", 0.0)

    async def silent(_, order):
        await asyncio.sleep(3600)
        yield End(0, paint(1), 1)

    engines = Engines()
    engines.call = silent
    (event,) = events_of(engines, seeds=(1,), timeout=0.1)
    assert (event.reason, event.message) == ("timeout", "timeout: no engine answered within 0.1 s")


def test_who_stops_listening_stops_the_engine():
    engines = Engines()
    order = Order(tuple(Request(seed) for seed in (1, 2)))

    async def main():
        events = Dispatcher(engines.call, 3).make(VERSION, order)
        await anext(events)
        assert engines.closed == 0
        await events.aclose()

    asyncio.run(main())
    assert engines.closed == 1


def test_ends_are_put_into_the_orders_own_order():
    async def shuffled():
        for place in (2, 0, 1):
            yield End(place, paint(place), 1)

    ends, refusal = asyncio.run(pictures(shuffled()))
    assert ([end.place for end in ends], refusal) == ([0, 1, 2], None)
