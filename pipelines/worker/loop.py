"""One task that runs an engine for many who ask at once: they join and leave between ticks."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import NamedTuple

from diffusion_core.engine import Engine, Priority
from diffusion_core.lanes import Finished
from diffusion_core.tasks import Request
from pipelines.images import Pixels
from pipelines.worker.queue import PRIORITIES, FairQueue
from pipelines.worker.worker import pixels_of

# Every so many times bulk is let in before interactive requests that wait, so that it never starves.
_PATIENCE = 8
_SMOOTHING = 0.1


@dataclass(frozen=True)
class Order:
    """Pictures to make for one sender: `timeout` seconds at most, with so many `previews` of each on the way."""

    requests: tuple[Request, ...]
    priority: Priority = "interactive"
    sender: str = ""
    timeout: float = 600.0
    previews: int = 0


class Preview(NamedTuple):
    """The estimate of picture `place` of an order after `done` of its `calls`: uint8 [H, W, 3]."""

    place: int
    done: int
    calls: int
    pixels: Pixels


class End(NamedTuple):
    """The end of picture `place` of an order, uint8 [H, W, 3], or the error in words, and the calls that it took."""

    place: int
    pixels: Pixels | None
    calls: int
    error: str | None = None


class Refusal(NamedTuple):
    """Why an order was not taken, or not finished, and after how many seconds to try again."""

    reason: str  # "overloaded", "timeout", "failed", "unavailable" or "rate_limit"
    message: str
    retry_after: float = 0.0


Event = Preview | End | Refusal


def late(timeout: float) -> str:
    """What is told of an order that was not done within its seconds."""
    return f"timeout: not done after {timeout:g} s; ask for fewer pictures or steps, or later"


class Tick(NamedTuple):
    """What one tick did: its seconds, denoiser calls made, pictures ended, calls still to make, pictures that wait."""

    seconds: float
    calls: int
    ended: int
    pending_calls: int
    queued: int


@dataclass(eq=False)
class _Seat:
    """One picture of an order: its place among those asked for, and in the engine."""

    place: int
    request: Request
    order: Order
    until: float
    events: asyncio.Queue[Event]
    ticket: int | None = None
    calls: int = 0
    shown: int = 0
    left: bool = False


@dataclass(eq=False)
class TickLoop:
    """Runs `engine` in one task; each tick runs in `executor`, and `told` hears of it.

    At most `limit` pictures of a priority wait for a place in the engine. After an error the loop is over: `error` says
    why, all orders are refused as "failed", and the engine is not to be used again.
    """

    engine: Engine
    executor: Executor
    limit: int = 256
    told: Callable[[Tick], None] = lambda _: None
    error: BaseException | None = None
    _queue: FairQueue[_Seat] = field(init=False)
    _seats: dict[int, _Seat] = field(default_factory=dict)
    _left: list[_Seat] = field(default_factory=list)
    _wake: asyncio.Event = field(default_factory=asyncio.Event)
    _calls: int = 0
    _admissions: int = 0
    _pace: float = 0.0

    def __post_init__(self) -> None:
        self._queue = FairQueue(self.limit)

    @property
    def pending_calls(self) -> int:
        """Denoiser calls still to make for all that were taken: the load."""
        # The engine itself is not asked: it may be busy in another thread.
        return self._calls + sum(seat.request.sampler.steps for seat in self._queue.items())

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return self.engine.idle and not len(self._queue)

    async def make(self, order: Order) -> AsyncGenerator[Event, None]:
        """What becomes of an order, as it comes: previews, and one end for every picture; or a refusal, and no more.

        Whoever stops listening gives up the order's places at the next tick.
        """
        if self.error is not None:
            yield self._failure()
            return
        if not self._queue.has_room(order.priority, order.sender, len(order.requests)):
            yield self._overload(order)
            return
        events: asyncio.Queue[Event] = asyncio.Queue()
        until = time.monotonic() + order.timeout
        seats = [_Seat(place, request, order, until, events) for place, request in enumerate(order.requests)]
        for seat in seats:
            self._queue.put(order.priority, order.sender, seat, seat.request.width * seat.request.sampler.steps)
        self._wake.set()
        try:
            open_seats = len(seats)
            while open_seats:
                event = await events.get()
                yield event
                if isinstance(event, Refusal):
                    return
                open_seats -= isinstance(event, End)
        finally:
            self._leave(seats)

    async def run(self) -> None:
        """Tick while there is something to do, and wait while there is not; ends at an error of a tick."""
        try:
            while self.error is None:
                await self._turn()
        except BaseException as error:
            self.error = error
            raise
        finally:
            for seat in [*self._seats.values(), *self._queue.items()]:
                seat.events.put_nowait(self._failure())

    async def _turn(self) -> None:
        """Let people out and in, and tick once; or wait where nobody is there."""
        self._clear_left()
        self._expire()
        self._admit()
        self._calls = self.engine.pending_calls
        if self.engine.idle:
            await self._wake.wait()
            self._wake.clear()
            return
        began = time.perf_counter()
        ticking = self.executor.submit(self.engine.tick)
        await asyncio.wait([asyncio.wrap_future(ticking)])
        self.error = ticking.exception()
        if self.error is None:
            made, self._calls = self._calls - self.engine.pending_calls, self.engine.pending_calls
            self._hand_out(ticking.result(), made, time.perf_counter() - began)

    def _hand_out(self, ended: list[Finished], made: int, seconds: float) -> None:
        """Tell of pictures that ended or have a preview due, after `made` denoiser calls for them."""
        for end in ended:
            seat = self._seats.pop(end.ticket)
            pixels = None if end.picture is None else pixels_of(end.picture)
            seat.events.put_nowait(End(seat.place, pixels, seat.calls, end.error))
        for ticket, seat in self._seats.items():
            if seat.order.previews:
                self._preview(ticket, seat)
        self._pace += (made / seconds - self._pace) * (_SMOOTHING if self._pace else 1.0)
        self.told(Tick(seconds, made, len(ended), self.pending_calls, len(self._queue)))

    def _preview(self, ticket: int, seat: _Seat) -> None:
        """Show a picture on its way where it has come far enough since the last time."""
        progress = self.engine.progress(ticket)
        due = progress.calls * (seat.shown + 1) // (seat.order.previews + 1)
        if progress.preview is None or progress.done < max(1, due) or seat.shown >= seat.order.previews:
            return
        seat.shown += 1
        shown = pixels_of(progress.preview.clamp(-1.0, 1.0))
        seat.events.put_nowait(Preview(seat.place, progress.done, progress.calls, shown))

    def _admit(self) -> None:
        """Let in those who wait while the next batch of their kind has room."""
        while self._admit_one():
            self._admissions += 1

    def _admit_one(self) -> bool:
        order: Iterable[Priority] = PRIORITIES if (self._admissions + 1) % _PATIENCE else PRIORITIES[::-1]
        for priority in order:
            seat = self._queue.first(priority)
            if seat is not None and self.engine.has_room_for(seat.request, priority):
                self._queue.take(priority)
                self._seat(seat, priority)
                return True
        return False

    def _seat(self, seat: _Seat, priority: Priority) -> None:
        """Give a request to the engine; what the engine refuses ends that request alone."""
        try:
            seat.ticket = self.engine.submit(seat.request, priority)
        except ValueError as error:
            seat.events.put_nowait(End(seat.place, None, 0, str(error)))
            return
        seat.calls = self.engine.calls_of(seat.ticket)
        self._seats[seat.ticket] = seat

    def _expire(self) -> None:
        """Refuse what took longer than it may."""
        now = time.monotonic()
        for seat in [*self._seats.values(), *self._queue.items()]:
            if seat.until <= now and not seat.left:
                seat.events.put_nowait(Refusal("timeout", late(seat.order.timeout), self._wait()))
                self._left.append(seat)
        self._clear_left()

    def _leave(self, seats: list[_Seat]) -> None:
        """Give up places, at the next tick: the engine may be busy in another thread."""
        self._left += seats
        self._wake.set()

    def _clear_left(self) -> None:
        """Take those that left out of the engine and the queue."""
        for seat in self._left:
            seat.left = True
            if seat.ticket is None:
                self._queue.drop(seat)
            elif self._seats.pop(seat.ticket, None) is not None:
                self.engine.cancel(seat.ticket)
        self._left = []

    def _wait(self) -> float:
        """Seconds until what is here now will be done, as far as can be known."""
        return max(1.0, self.pending_calls / self._pace) if self._pace else 1.0

    def _overload(self, order: Order) -> Refusal:
        waiting = self._queue.count(order.priority)
        told = f"overloaded: {waiting} pictures wait already, the limit is {self.limit}; try again later"
        return Refusal("overloaded", told, self._wait())

    def _failure(self) -> Refusal:
        return Refusal("failed", f"engine: {type(self.error).__name__}: {self.error}", 1.0)
