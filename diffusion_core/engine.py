"""Step-level continuous batching: requests join and leave the running batch at any row of their own tables.

One `tick` makes one denoiser call for as many requests as there are lanes, whatever their samplers, lengths, guidance,
tasks and masks. No threads and no clock: whoever owns the engine calls `tick` until `idle`. A lane's numbers come from
its own request alone, so pictures do not depend on who else is there.
"""

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from diffusion_core.config import ModelConfig
from diffusion_core.denoiser import Denoiser
from diffusion_core.lanes import Finished, Lane, Stepper, new_lane
from diffusion_core.tasks import Key, Request, key_of, prepare
from diffusion_core.widths import agreeing_widths

Priority = Literal["interactive", "bulk"]
_ORDER: tuple[Priority, Priority] = ("interactive", "bulk")


class Progress(NamedTuple):
    """How far a request is: denoiser calls made and in all, and the current estimate of x0 [C, H, W], if any."""

    done: int
    calls: int
    preview: Tensor | None


class Engine:
    """A model that answers many requests at once, `lanes` network inputs a tick; a guided request takes two.

    Every network call has one of the batch sizes `widths`, the largest of which is then the number of lanes. Left out,
    they are found for each picture size when it is first asked for (`agreeing_widths`), so that a request's bits depend
    on nobody else. Every `patience`-th tick serves bulk requests first, so that they never starve.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        widths: Sequence[int] | None = None,
        lanes: int = 32,
        patience: int = 8,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        lanes = lanes if widths is None else max(widths, default=0)
        if lanes < 2 or patience < 2 or (widths is not None and min(widths) < 1):
            raise ValueError(
                f"lanes {lanes}, widths {widths}, patience {patience}; need lanes and patience of 2 or more"
            )
        self.denoiser, self.lanes, self.patience = denoiser, lanes, patience
        self.device, self.dtype = torch.device(device), dtype
        self._stepper = Stepper(denoiser, self.device, dtype)
        self._given = None if widths is None else tuple(sorted(widths))
        self._widths: dict[tuple[int, ...], tuple[int, ...]] = {}
        self._pools: dict[tuple[Priority, Key], dict[int, Lane]] = {}
        self._where: dict[int, tuple[Priority, Key]] = {}
        self._spent: dict[Key, float] = {}
        self._ready: list[Finished] = []
        self._tickets = self._ticks = 0

    @property
    def model(self) -> ModelConfig:
        """What the denoiser is."""
        return self.denoiser.config

    @property
    def idle(self) -> bool:
        """Whether nothing is left to do."""
        return not self._where and not self._ready

    @property
    def pending_calls(self) -> int:
        """Denoiser calls still to make for all requests: the engine's load."""
        return sum(len(lane.table) - lane.row for pool in self._pools.values() for lane in pool.values())

    def submit(self, request: Request, priority: Priority = "interactive") -> int:
        """Admit a request and return its ticket. Raises ValueError, by the field's name, on what cannot be done."""
        if priority not in _ORDER:
            raise ValueError(f"priority: {priority!r}; there are {', '.join(_ORDER)}")
        job = prepare(request, self.model, self.dtype, self.device)
        self._tickets += 1
        if job.plan is None:
            self._ready.append(Finished(self._tickets, job.origin, None))
            return self._tickets
        self.prepare_for(job.origin.shape)
        self._enter(new_lane(self._tickets, job, job.plan), priority)
        return self._tickets

    def prepare_for(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The batch sizes for pictures of `shape` (C, H, W), found now where they are not known yet.

        Raises ValueError where no batch of 2 or more gives the same bits at every place.
        """
        if tuple(shape) not in self._widths:
            found = self._given or agreeing_widths(self.denoiser, shape, self.device, self.lanes, self.dtype)
            if found[-1] < 2:
                raise ValueError(
                    f"widths: no batch of pictures {list(shape)} has the same bits at every place; "
                    "run with one thread, or give widths"
                )
            self._widths[tuple(shape)] = found
        return self._widths[tuple(shape)]

    def has_room_for(self, request: Request, priority: Priority = "interactive") -> bool:
        """Whether a request, once submitted, would be in the next batch of its kind.

        Requests of less priority do not count. Raises ValueError as `prepare_for` does.
        """
        key = key_of(request, self.model)
        before = _ORDER[: _ORDER.index(priority) + 1]
        taken = sum(lane.width for each in before for lane in self._pools.get((each, key), {}).values())
        return taken + request.width <= self.prepare_for(key[0])[-1]

    def cancel(self, ticket: int) -> bool:
        """Drop a request; its lanes are free at the next tick. False where it has ended or never was."""
        if ticket not in self._where:
            return False
        self._leave(ticket)
        return True

    def calls_of(self, ticket: int) -> int:
        """Denoiser calls that a request takes in all; 0 where it has ended, or needs none."""
        place = self._where.get(ticket)
        return 0 if place is None else len(self._pools[place][ticket].table)

    def progress(self, ticket: int) -> Progress:
        """How far a request is. Raises KeyError where it has ended or never was."""
        lane = self._pools[self._where[ticket]][ticket]
        preview = lane.batch.denoised[lane.at] if lane.batch is not None and lane.row else None
        return Progress(lane.row, len(lane.table), preview)

    @torch.no_grad()
    def tick(self) -> list[Finished]:
        """Make one denoiser call for a batch of requests; returns those that have ended."""
        lanes = self._choose()
        ended = self._stepper.advance(lanes, self._widths[lanes[0].key[0]]) if lanes else []
        for end in ended:
            self._leave(end.ticket)
        finished, self._ready = self._ready + ended, []
        return finished

    def run(self, requests: Iterable[Request]) -> list[Tensor]:
        """Pictures of `requests`, in order, by an idle engine.

        Raises ValueError where one is refused (then none is begun), one fails, or the engine is busy.
        """
        if not self.idle:
            raise ValueError(f"engine: busy with {len(self._where)} requests; tick it until idle, or submit to it")
        tickets: list[int] = []
        try:
            tickets.extend(self.submit(request) for request in requests)
        except ValueError:
            self._clear()
            raise
        pictures: dict[int, Tensor] = {}
        while len(pictures) < len(tickets):
            for end in self.tick():
                if end.picture is None:
                    self._clear()
                    raise ValueError(f"request {tickets.index(end.ticket)}: {end.error}")
                pictures[end.ticket] = end.picture
        return [pictures[ticket] for ticket in tickets]

    def _clear(self) -> None:
        """Drop everything."""
        self._ready = []
        for ticket in list(self._where):
            self._leave(ticket)

    def _enter(self, lane: Lane, priority: Priority) -> None:
        """Queue a lane. A key that was idle starts level with the least served, and claims no past."""
        busy = [self._spent[key] for _, key in self._pools]
        if not any(key == lane.key for _, key in self._pools):
            self._spent[lane.key] = max(self._spent.get(lane.key, 0.0), min(busy, default=0.0))
        self._where[lane.ticket] = (priority, lane.key)
        self._pools.setdefault((priority, lane.key), {})[lane.ticket] = lane

    def _leave(self, ticket: int) -> None:
        """Take a lane out of its queue."""
        place = self._where.pop(ticket)
        del self._pools[place][ticket]
        if not self._pools[place]:
            del self._pools[place]

    def _choose(self) -> list[Lane]:
        """The lanes of the next batch: of the key served least so far, the first come first, bulk after interactive."""
        self._ticks += 1
        order = _ORDER[::-1] if self._ticks % self.patience == 0 else _ORDER
        urgent = next((priority for priority in order if any(priority == each for each, _ in self._pools)), None)
        if urgent is None:
            return []
        key = min((key for each, key in self._pools if each == urgent), key=lambda key: self._spent[key])
        most = self._widths[key[0]][-1]
        chosen, free = [], most
        for lane in (lane for priority in order for lane in self._pools.get((priority, key), {}).values()):
            if lane.width > free:
                break
            chosen.append(lane)
            free -= lane.width
        self._spent[key] += (most - free) * (1 + key[1]) * key[0][1] * key[0][2]
        return chosen
