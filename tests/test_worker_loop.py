import asyncio
import contextlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from diffusion_core.config import SamplerConfig
from diffusion_core.tasks import Request
from pipelines.model import load_model
from pipelines.worker import Worker
from pipelines.worker.loop import End, Order, Preview, Refusal, TickLoop
from pipelines.worker.worker import pixels_of


@pytest.fixture(scope="module")
def worker(tiny_model):
    return Worker(load_model(tiny_model), lanes=4, threads=1)


def requests(*seeds, steps=4, **fields):
    return tuple(Request(seed, sampler=SamplerConfig(steps=steps), **fields) for seed in seeds)


async def all_of(generator):
    return [event async for event in generator]


def running(worker, work, **settings):
    """The result of `work(loop)` beside the loop's own task, which is told afterwards to be idle."""

    async def main():
        with ThreadPoolExecutor(1) as executor:
            loop = TickLoop(worker.engine, executor, **settings)
            task = asyncio.create_task(loop.run())
            try:
                return await asyncio.wait_for(work(loop), 60)
            finally:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task

    return asyncio.run(main())


def test_orders_that_come_and_go_get_what_they_get_alone(worker):
    orders = [Order(requests(n, n + 100, steps=3 + n % 4), sender=f"s{n % 3}") for n in range(9)]

    async def work(loop):
        tasks = []
        for order in orders:
            tasks.append(asyncio.create_task(all_of(loop.make(order))))
            await asyncio.sleep(0.004)
        return await asyncio.gather(*tasks)

    for order, events in zip(orders, running(worker, work), strict=True):
        ends = sorted(events, key=lambda end: end.place)
        assert [(end.place, end.calls, end.error) for end in ends] == [
            (place, order.requests[0].sampler.steps, None) for place in range(2)
        ]
        for request, end in zip(order.requests, ends, strict=True):
            assert np.array_equal(end.pixels, pixels_of(worker.engine.run([request])[0]))


def test_previews_come_in_order_evenly_and_in_the_number_asked_for(worker):
    events = running(worker, lambda loop: all_of(loop.make(Order(requests(1, steps=12), previews=3))))
    assert [type(event) for event in events] == [Preview, Preview, Preview, End]
    assert [(event.done, event.calls) for event in events[:3]] == [(3, 12), (6, 12), (9, 12)]
    gaps = [np.abs(event.pixels.astype(int) - events[3].pixels).mean() for event in events[:3]]
    assert gaps[0] > gaps[2], "they approach the picture"


def test_more_previews_than_steps_show_every_step_but_the_last(worker):
    events = running(worker, lambda loop: all_of(loop.make(Order(requests(1, steps=4), previews=50))))
    assert [event.done for event in events[:-1]] == [1, 2, 3]


def test_who_stops_listening_frees_its_places_at_the_next_tick(worker):
    async def work(loop):
        gone = loop.make(Order(requests(*range(8), steps=1000), previews=1000))
        await anext(gone)
        assert loop.pending_calls > 7000
        await gone.aclose()
        events = await all_of(loop.make(Order(requests(50, steps=2))))
        return events, loop.pending_calls

    events, pending = running(worker, work)
    assert [type(event) for event in events] == [End]
    assert pending == 0


def test_an_order_that_takes_too_long_is_refused_and_frees_its_places(worker):
    async def work(loop):
        events = await all_of(loop.make(Order(requests(1, 2, steps=1000), timeout=0.1)))
        after = await all_of(loop.make(Order(requests(3))))
        return events, after, loop.pending_calls

    events, after, pending = running(worker, work)
    assert [event.reason for event in events] == ["timeout"]
    assert "not done after 0.1 s" in events[0].message
    assert (type(after[0]), pending) == (End, 0)


def test_a_full_queue_refuses_and_says_when_to_come_again(worker):
    async def work(loop):
        first = [asyncio.create_task(all_of(loop.make(Order(requests(n, steps=40), sender="hog")))) for n in range(12)]
        await asyncio.sleep(0)
        refused = await all_of(loop.make(Order(requests(99), sender="hog")))
        guest = await all_of(loop.make(Order(requests(98), sender="guest")))
        left = sum(not task.done() for task in first)
        return refused, guest, left, await asyncio.gather(*first)

    refused, guest, left, first = running(worker, work, limit=12)
    assert [event.reason for event in refused] == ["overloaded"]
    assert refused[0].retry_after >= 1.0
    assert type(guest[0]) is End
    assert left > 0, "a guest need not wait until the one who filled the queue is done"
    assert all(type(event) is End for events in first for event in events)


def test_bulk_yields_to_interactive_and_goes_on(worker):
    async def work(loop):
        bulk = asyncio.create_task(all_of(loop.make(Order(requests(*range(20), steps=30), "bulk", "b"))))
        while not loop.pending_calls or loop.engine.idle:
            await asyncio.sleep(0.001)
        before = loop.pending_calls
        await all_of(loop.make(Order(requests(90, 91, 92, 93, steps=10))))
        return before - loop.pending_calls, await bulk

    meanwhile, bulk = running(worker, work)
    # 10 rows of 4 interactive lanes: of every 8 ticks one is bulk's, and one bulk tick may have been under way
    assert meanwhile <= 4 * (10 / 7 + 3)
    assert len(bulk) == 20


def test_what_the_engine_refuses_ends_that_picture_alone(worker):
    bad = Request(3, sampler=SamplerConfig(steps=4), label=99)
    events = running(worker, lambda loop: all_of(loop.make(Order((*requests(1), bad, *requests(2))))))
    ends = sorted(events, key=lambda end: end.place)
    assert [end.error is None for end in ends] == [True, False, True]
    assert "label: 99" in ends[1].error


def test_an_error_of_a_tick_refuses_all_and_ends_the_loop(tiny_model):
    own = Worker(load_model(tiny_model), lanes=4, threads=1)

    def broken():
        raise MemoryError("no memory left on the device")

    async def work(loop):
        orders = [asyncio.create_task(all_of(loop.make(Order(requests(n, steps=500))))) for n in range(6)]
        await asyncio.sleep(0.05)
        own.engine.tick = broken
        told = [events[-1] for events in await asyncio.gather(*orders)]
        return told, await all_of(loop.make(Order(requests(9)))), loop.error

    told, after, error = running(own, work)
    assert {(type(event), event.reason) for event in [*told, *after]} == {(Refusal, "failed")}
    assert isinstance(error, MemoryError)


def test_a_request_that_needs_no_call_ends_at_once(worker):
    import torch

    picture = torch.zeros(3, 8, 8)
    same = Request(1, "image_to_image", SamplerConfig(steps=4), picture=picture, strength=0.0)
    (end,) = running(worker, lambda loop: all_of(loop.make(Order((same,)))))
    assert (end.calls, end.pixels.tolist()) == (0, np.full((8, 8, 3), 128).tolist())


def test_every_tick_is_told(worker):
    ticks = []
    running(worker, lambda loop: all_of(loop.make(Order(requests(*range(6), steps=5)))), told=ticks.append)
    assert sum(tick.calls for tick in ticks) == 30
    assert sum(tick.ended for tick in ticks) == 6
    assert ticks[0].queued == 2
    assert ticks[-1].pending_calls == ticks[-1].queued == 0
    assert all(tick.seconds > 0 for tick in ticks)
