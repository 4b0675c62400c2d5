"""Step-level continuous batching: requests join and leave the running batch at any row of their own tables.

One `tick` makes one denoiser call for as many requests as there are lanes, whatever their samplers, lengths, guidance,
tasks and masks. No threads and no clock: whoever owns the engine calls `tick` until `idle`. A lane's numbers come from
its own request alone, so pictures do not depend on who else is there.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from diffusion_core.config import ModelConfig
from diffusion_core.denoiser import Denoiser, Guidance, guidance, guided
from diffusion_core.inpainting import KnownRegion, steered
from diffusion_core.noise import Purpose, nearby, normal
from diffusion_core.samplers import Plan, Row, State, new_state, step
from diffusion_core.tasks import Job, Request, prepare

Priority = Literal["interactive", "bulk"]
# Requests of one key may share a batch: their size, and the products of posterior guidance that they need
_Key = tuple[tuple[int, ...], int]
_COLUMNS = 7  # of a table, before those of its history
_ORDER: tuple[Priority, Priority] = ("interactive", "bulk")


class Finished(NamedTuple):
    """The end of a request: its picture [C, H, W] (not clipped), or the error that ended it."""

    ticket: int
    picture: Tensor | None
    error: str | None


class Progress(NamedTuple):
    """How far a request is: denoiser calls made and in all, and the current estimate of x0 [C, H, W], if any."""

    done: int
    calls: int
    preview: Tensor | None


class _Batch(NamedTuple):
    """What a row left of all that shared it: the state, the pull of posterior guidance, and D, each [B, C, H, W]."""

    state: State
    pull: Tensor
    denoised: Tensor


@dataclass(eq=False)
class _Lane:
    """A request on its way: its table [N, columns] and its place `at` in the batch of its last row.

    Of every row it is known whether it needs the unconditional pass too (`wide`), and fresh noise (`fresh`).
    """

    ticket: int
    job: Job
    key: _Key
    table: Tensor
    wide: list[bool]
    fresh: list[bool]
    row: int = 0
    batch: _Batch | None = None
    at: int = 0

    @property
    def last(self) -> bool:
        """Whether the next row is the last one."""
        return self.row == len(self.table) - 1

    @property
    def guided(self) -> bool:
        """Whether the next row needs the unconditional pass."""
        return self.wide[self.row]

    @property
    def width(self) -> int:
        """Network inputs of the next row."""
        return 2 if self.guided else 1


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
        self._given = None if widths is None else tuple(sorted(widths))
        self._widths: dict[tuple[int, ...], tuple[int, ...]] = {}
        self._pools: dict[tuple[Priority, _Key], dict[int, _Lane]] = {}
        self._where: dict[int, tuple[Priority, _Key]] = {}
        self._spent: dict[_Key, float] = {}
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
        self._enter(_new_lane(self._tickets, job, job.plan), priority)
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

    def cancel(self, ticket: int) -> bool:
        """Drop a request; its lanes are free at the next tick. False where it has ended or never was."""
        if ticket not in self._where:
            return False
        self._leave(ticket)
        return True

    def progress(self, ticket: int) -> Progress:
        """How far a request is. Raises KeyError where it has ended or never was."""
        lane = self._pools[self._where[ticket]][ticket]
        preview = lane.batch.denoised[lane.at] if lane.batch is not None and lane.row else None
        return Progress(lane.row, len(lane.table), preview)

    @torch.no_grad()
    def tick(self) -> list[Finished]:
        """Make one denoiser call for a batch of requests; returns those that have ended."""
        lanes = self._choose()
        ended = self._advance(lanes) if lanes else []
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

    def _enter(self, lane: _Lane, priority: Priority) -> None:
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

    def _choose(self) -> list[_Lane]:
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

    def _advance(self, lanes: list[_Lane]) -> list[Finished]:
        """One row for each lane; returns those that have ended."""
        count, solves = len(lanes), lanes[0].key[1]
        new = [lane for lane in lanes if lane.batch is None]
        if new:
            self._begin(new)
        filled = count if solves else sum(lane.width for lane in lanes)
        crowd = lanes + [lanes[0]] * self._padding(filled, lanes[0].key)
        sigma, sigma_next, row = self._coefficients(crowd)
        batch = _joined(crowd, count, row.c.shape[1])
        label, how = self._conditions(crowd, count)
        pull = batch.pull
        if solves:
            denoised, pull = self._steer(crowd, batch, sigma, label, how)
        else:
            denoised = guided(self.denoiser, batch.state.x, sigma, label, how)
        state = step(batch.state, row, denoised, self._fresh_noise(crowd, batch.state.x))
        state = state._replace(x=self._constrained(crowd, state.x, sigma_next))
        return _handed_out(lanes, _Batch(state, pull, denoised))

    def _begin(self, lanes: list[_Lane]) -> None:
        """The start of walks."""
        x = torch.stack([lane.job.origin for lane in lanes])
        level = self._tensor([lane.job.noise for lane in lanes], self.dtype)[:, None, None, None]
        x = _laid_out(x + level * self._noise(lanes, "start", 0, tuple(x.shape[1:])))
        memory = max(lane.table.shape[1] for lane in lanes) - _COLUMNS
        batch = _Batch(new_state(x, memory), torch.zeros_like(x), x)
        for at, lane in enumerate(lanes):
            lane.batch, lane.at = batch, at

    def _noise(self, lanes: Sequence[_Lane], purpose: Purpose, rows: int | Tensor, shape: tuple[int, ...]) -> Tensor:
        """Noise [B, *shape] of the lanes' own seeds; a variation's lies between two seeds'."""
        requests = [lane.job.request for lane in lanes]
        seeds = self._tensor([r.seed if r.parent is None else r.parent for r in requests], torch.int64)
        if all(request.parent is None for request in requests):
            return normal(seeds, purpose, rows, shape, self.dtype)
        others = self._tensor([request.seed for request in requests], torch.int64)
        share = self._tensor([0.0 if r.parent is None else r.strength or 0.0 for r in requests], torch.float64)
        return nearby(seeds, others, share, purpose, rows, shape).to(self.dtype)

    def _coefficients(self, lanes: list[_Lane]) -> tuple[Tensor, Tensor, Row]:
        """sigma [B], sigma_next [B] and the coefficients of every lane's next row, histories padded with zeros."""
        longest = max(lane.table.shape[1] for lane in lanes)
        rows = [functional.pad(lane.table[lane.row], (0, longest - lane.table.shape[1])) for lane in lanes]
        table = torch.stack(rows).to(self.device, self.dtype)
        sigma, sigma_next, a, b, s, alpha, beta = table[:, :_COLUMNS].unbind(1)
        return sigma, sigma_next, Row(a, b, table[:, _COLUMNS:], s, alpha, beta)

    def _conditions(self, lanes: list[_Lane], count: int) -> tuple[Tensor | None, Guidance]:
        """Labels [B] (None for a model without classes) and guidance; the padding is not guided."""
        requests = [lane.job.request for lane in lanes]
        scales = [
            lane.job.request.guidance_scale if lane.guided and at < count else 1.0 for at, lane in enumerate(lanes)
        ]
        rescales = [request.guidance_rescale for request in requests]
        how = guidance(self._tensor(scales, self.dtype), rescale=self._tensor(rescales, self.dtype))
        classes = self.model.unet.classes
        labels = [classes if request.label is None else request.label for request in requests]
        return (self._tensor(labels, torch.int64) if classes else None), how

    def _steer(
        self, lanes: list[_Lane], batch: _Batch, sigma: Tensor, label: Tensor | None, how: Guidance
    ) -> tuple[Tensor, Tensor]:
        """Posterior guidance with the Jacobian of the conditional pass: guidance sharpens D beyond any covariance."""
        with torch.enable_grad():
            at = batch.state.x.detach().requires_grad_()
            conditional = self.denoiser(at, sigma, label)
        denoised, needs = conditional.detach(), how.needs(sigma)
        if label is not None and bool(needs.any()):
            places = needs.nonzero()[:, 0]
            padded = torch.cat((places, places[:1].expand(self._padding(len(places), lanes[0].key))))
            null = torch.full_like(label[padded], self.model.unet.classes)
            denoised = how.mix(
                denoised, self.denoiser(batch.state.x[padded], sigma[padded], null)[: len(places)], needs
            )

        def product(vector: Tensor) -> Tensor:
            return torch.autograd.grad(conditional, at, vector, retain_graph=True)[0]

        return steered(denoised, product, sigma, self._known(lanes), batch.pull, lanes[0].key[1])

    def _known(self, lanes: Sequence[_Lane]) -> KnownRegion:
        """The known regions of inpainting lanes."""
        requests = [lane.job.request for lane in lanes]
        pictures = [request.picture for request in requests if request.picture is not None]
        masks = [request.mask for request in requests if request.mask is not None]
        seeds = self._tensor([request.seed for request in requests], torch.int64)
        return KnownRegion(_laid_out(torch.stack(pictures)), torch.stack(masks), seeds)

    def _fresh_noise(self, lanes: list[_Lane], x: Tensor) -> Tensor | None:
        """The sampler's noise for the lanes whose row asks for it, zeros for others; None where no row does."""
        places = [at for at, lane in enumerate(lanes) if lane.fresh[lane.row]]
        if not places:
            return None
        noisy = [lanes[at] for at in places]
        z = torch.zeros_like(x)
        z[places] = self._noise(noisy, "sampler", self._rows(noisy), tuple(x.shape[1:]))
        return z

    def _constrained(self, lanes: list[_Lane], x: Tensor, sigma_next: Tensor) -> Tensor:
        """x with known regions written in: after every row of replacement, after the last one always, without noise."""
        places = [
            at for at, lane in enumerate(lanes) if lane.job.request.task == "inpaint" and (lane.last or not lane.key[1])
        ]
        if not places:
            return x
        held = [lanes[at] for at in places]
        level = torch.where(self._tensor([lane.last for lane in held], torch.bool), 0.0, sigma_next[places])
        out = x.clone()
        out[places] = self._known(held)(x[places], level, self._rows(held))
        return out

    def _padding(self, count: int, key: _Key) -> int:
        """How many inputs `count` lack to the next batch size."""
        return next(width for width in self._widths[key[0]] if width >= count) - count

    def _rows(self, lanes: list[_Lane]) -> Tensor:
        """The number of every lane's next row [B]."""
        return self._tensor([lane.row for lane in lanes], torch.int64)

    def _tensor(self, values: Sequence[object], dtype: torch.dtype) -> Tensor:
        """Values on the engine's device."""
        return torch.tensor(values, dtype=dtype).to(self.device)


def agreeing_widths(
    denoiser: Denoiser,
    shape: Sequence[int],
    device: torch.device | str = "cpu",
    most: int = 32,
    dtype: torch.dtype = torch.float32,
) -> tuple[int, ...]:
    """Batch sizes, at most `most`, that give a picture of `shape` (C, H, W) the same bits at every place of the batch.

    Libraries choose kernels by shape and share the work of a batch between threads, so this is found by trying: the
    forward pass and the vector-Jacobian product of one picture, as many times as the batch has places. The largest
    size whose places agree is the reference for the others. Takes the time of about 6·`most` single calls.
    """
    threads = torch.get_num_threads()
    sizes = sorted({1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, threads, 2 * threads, 4 * threads, most})
    reference, agreeing = None, []
    for width in reversed([size for size in sizes if size <= most]):
        answers = _answers(denoiser, shape, width, torch.device(device), dtype)
        alike = bool((answers == answers[:1]).all())
        if alike and (reference is None or torch.equal(answers[0], reference)):
            reference = answers[0]
            agreeing.append(width)
    return tuple(reversed(agreeing))


def measure_lanes(
    denoiser: Denoiser, shape: tuple[int, int, int], widths: Sequence[int], device: torch.device | str = "cpu"
) -> int:
    """The smallest of `widths` whose denoiser calls on pictures of `shape` come within 5 % of the best rate here."""
    rates = {width: width / _seconds_per_call(denoiser, shape, torch.device(device), width) for width in widths}
    return min(width for width, rate in rates.items() if rate >= 0.95 * max(rates.values()))


def _answers(denoiser: Denoiser, shape: Sequence[int], width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """What one picture gives at each of `width` places: D and its vector-Jacobian product, [width, 2·C·H·W]."""
    x = normal(torch.zeros(1, dtype=torch.int64), "start", 0, shape, dtype).to(device)
    at = _laid_out(x.repeat(width, 1, 1, 1)).requires_grad_()
    with torch.enable_grad():
        denoised = denoiser(at, torch.ones(width, device=device, dtype=dtype), _first_label(denoiser, width, device))
    product = torch.autograd.grad(denoised, at, at.detach())[0]
    return torch.cat((denoised.detach().flatten(1), product.flatten(1)), dim=1)


@torch.no_grad()
def _seconds_per_call(denoiser: Denoiser, shape: tuple[int, int, int], device: torch.device, width: int) -> float:
    """The best of three calls after one to warm up."""
    x, sigma = _laid_out(torch.zeros(width, *shape, device=device)), torch.ones(width, device=device)
    times = []
    for _ in range(4):
        begun = time.perf_counter()
        float(denoiser(x, sigma, _first_label(denoiser, width, device)).sum())  # reading a number waits for the device
        times.append(time.perf_counter() - begun)
    return min(times[1:])


def _first_label(denoiser: Denoiser, width: int, device: torch.device) -> Tensor | None:
    """Labels for a trial."""
    return torch.zeros(width, dtype=torch.int64, device=device) if denoiser.config.unet.classes else None


def _new_lane(ticket: int, job: Job, plan: Plan) -> _Lane:
    """A lane before its first row."""
    request = job.request
    columns = (plan.sigma, plan.sigma_next, plan.a, plan.b, plan.s, plan.alpha, plan.beta)
    within = (plan.sigma > request.guidance_low) & (plan.sigma <= request.guidance_high)
    guided_at_all = request.label is not None and request.guidance_scale != 1
    return _Lane(
        ticket=ticket,
        job=job,
        key=(tuple(job.origin.shape), job.solves),
        table=torch.cat((torch.stack(columns, dim=1), plan.c), dim=1),
        wide=[guided_at_all and each for each in within.tolist()],
        fresh=(plan.s != 0).tolist(),
    )


def _laid_out(x: Tensor) -> Tensor:
    """Pictures [B, C, H, W] in the layout that convolutions like."""
    return x.contiguous(memory_format=torch.channels_last)


def _joined(crowd: list[_Lane], count: int, memory: int) -> _Batch:
    """Parts of last batches as one batch, with histories of `memory`; what follows the first `count` is padding."""
    places = [(lane.batch, lane.at) for lane in crowd if lane.batch is not None]
    first = places[0][0]
    same = all(batch is first and at == place for place, (batch, at) in enumerate(places[:count]))
    if same and len(first.state.x) == len(crowd) and len(first.state.history) == memory:
        return first  # nobody came or went

    def gathered(part: Callable[[_Batch], Tensor]) -> Tensor:
        return _laid_out(torch.stack([part(batch)[at] for batch, at in places]))

    history = tuple(gathered(partial(_remembered, age=age)) for age in range(memory))
    state = State(gathered(lambda batch: batch.state.x), history)
    return _Batch(state, gathered(lambda batch: batch.pull), gathered(lambda batch: batch.denoised))


def _remembered(batch: _Batch, age: int) -> Tensor:
    """What a batch remembers of `age` rows before the last; zeros where that is nothing."""
    history = batch.state.history
    return history[age] if age < len(history) else torch.zeros_like(batch.state.x)


def _handed_out(lanes: list[_Lane], batch: _Batch) -> list[Finished]:
    """Tell every lane its place; returns those that ended, by a value that is no number or at their end."""
    x = batch.state.x
    finite = torch.isfinite(x[: len(lanes)]).flatten(1).all(dim=1).tolist()
    ends = []
    for at, lane in enumerate(lanes):
        lane.batch, lane.at, lane.row = batch, at, lane.row + 1
        if not finite[at]:
            told = f"row {lane.row} of {len(lane.table)}: the picture has values that are NaN or infinite"
            ends.append(Finished(lane.ticket, None, told))
        elif lane.row == len(lane.table):
            ends.append(Finished(lane.ticket, x[at].clone(), None))
    return ends
