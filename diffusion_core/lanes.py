"""Requests on their way, and what one row of their own tables does to a batch of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from diffusion_core.denoiser import Denoiser, Guidance, guidance, guided
from diffusion_core.inpainting import KnownRegion, steered
from diffusion_core.noise import Purpose, nearby, normal
from diffusion_core.samplers import Plan, Row, State, new_state, step
from diffusion_core.tasks import Job, Key

_COLUMNS = 7  # of a table, before those of its history


class Finished(NamedTuple):
    """The end of a request: its picture [C, H, W] (not clipped), or the error that ended it."""

    ticket: int
    picture: Tensor | None
    error: str | None


class _Batch(NamedTuple):
    """What a row left of all that shared it: the state, the pull of posterior guidance, and D, each [B, C, H, W]."""

    state: State
    pull: Tensor
    denoised: Tensor


@dataclass(eq=False)
class Lane:
    """A request on its way: its table [N, columns] and its place `at` in the batch of its last row.

    Of every row it is known whether it needs the unconditional pass too (`wide`), and fresh noise (`fresh`).
    """

    ticket: int
    job: Job
    key: Key
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


@dataclass(frozen=True)
class Stepper:
    """Takes lanes of one key a row further, with one denoiser call of one of the batch sizes `widths`."""

    denoiser: Denoiser
    device: torch.device
    dtype: torch.dtype

    def advance(self, lanes: list[Lane], widths: Sequence[int]) -> list[Finished]:
        """One row for each lane; returns those that have ended."""
        count, solves = len(lanes), lanes[0].key[1]
        new = [lane for lane in lanes if lane.batch is None]
        if new:
            self._begin(new)
        filled = count if solves else sum(lane.width for lane in lanes)
        crowd = lanes + [lanes[0]] * _padding(filled, widths)
        sigma, sigma_next, row = self._coefficients(crowd)
        batch = _joined(crowd, count, row.c.shape[1])
        label, negative, how = self._conditions(crowd, count)
        pull = batch.pull
        if solves:
            denoised, pull = self._steer(crowd, batch, sigma, label, negative, how, widths)
        else:
            denoised = guided(self.denoiser, batch.state.x, sigma, label, how, negative)
        state = step(batch.state, row, denoised, self._fresh_noise(crowd, batch.state.x))
        state = state._replace(x=self._constrained(crowd, state.x, sigma_next))
        return _handed_out(lanes, _Batch(state, pull, denoised))

    def _begin(self, lanes: list[Lane]) -> None:
        """The start of walks."""
        x = torch.stack([lane.job.origin for lane in lanes])
        level = self._tensor([lane.job.noise for lane in lanes], self.dtype)[:, None, None, None]
        x = laid_out(x + level * self._noise(lanes, "start", 0, tuple(x.shape[1:])))
        memory = max(lane.table.shape[1] for lane in lanes) - _COLUMNS
        batch = _Batch(new_state(x, memory), torch.zeros_like(x), x)
        for at, lane in enumerate(lanes):
            lane.batch, lane.at = batch, at

    def _noise(self, lanes: Sequence[Lane], purpose: Purpose, rows: int | Tensor, shape: tuple[int, ...]) -> Tensor:
        """Noise [B, *shape] of the lanes' own seeds; a variation's lies between two seeds'."""
        requests = [lane.job.request for lane in lanes]
        seeds = self._tensor([r.seed if r.parent is None else r.parent for r in requests], torch.int64)
        if all(request.parent is None for request in requests):
            return normal(seeds, purpose, rows, shape, self.dtype)
        others = self._tensor([request.seed for request in requests], torch.int64)
        share = self._tensor([0.0 if r.parent is None else r.strength or 0.0 for r in requests], torch.float64)
        return nearby(seeds, others, share, purpose, rows, shape).to(self.dtype)

    def _coefficients(self, lanes: list[Lane]) -> tuple[Tensor, Tensor, Row]:
        """sigma [B], sigma_next [B] and the coefficients of every lane's next row, histories padded with zeros."""
        longest = max(lane.table.shape[1] for lane in lanes)
        rows = [functional.pad(lane.table[lane.row], (0, longest - lane.table.shape[1])) for lane in lanes]
        table = torch.stack(rows).to(self.device, self.dtype)
        sigma, sigma_next, a, b, s, alpha, beta = table[:, :_COLUMNS].unbind(1)
        return sigma, sigma_next, Row(a, b, table[:, _COLUMNS:], s, alpha, beta)

    def _conditions(self, lanes: list[Lane], count: int) -> tuple[Tensor | None, Tensor | None, Guidance]:
        """Labels [B] to lead to and away from (None for a model without classes), guidance; padding is not guided."""
        requests = [lane.job.request for lane in lanes]
        scales = [
            lane.job.request.guidance_scale if lane.guided and at < count else 1.0 for at, lane in enumerate(lanes)
        ]
        rescales = [request.guidance_rescale for request in requests]
        how = guidance(self._tensor(scales, self.dtype), rescale=self._tensor(rescales, self.dtype))
        classes = self.denoiser.config.unet.classes
        if not classes:
            return None, None, how
        label, negative = (
            self._tensor([classes if each is None else each for each in column], torch.int64)
            for column in zip(*((request.label, request.negative) for request in requests), strict=True)
        )
        return label, negative, how

    def _steer(
        self,
        lanes: list[Lane],
        batch: _Batch,
        sigma: Tensor,
        label: Tensor | None,
        negative: Tensor | None,
        how: Guidance,
        widths: Sequence[int],
    ) -> tuple[Tensor, Tensor]:
        """Posterior guidance with the Jacobian of the conditional pass: guidance sharpens D beyond any covariance."""
        with torch.enable_grad():
            at = batch.state.x.detach().requires_grad_()
            conditional = self.denoiser(at, sigma, label)
        denoised, needs = conditional.detach(), how.needs(sigma)
        if negative is not None and bool(needs.any()):
            places = needs.nonzero()[:, 0]
            padded = torch.cat((places, places[:1].expand(_padding(len(places), widths))))
            others = self.denoiser(batch.state.x[padded], sigma[padded], negative[padded])[: len(places)]
            denoised = how.mix(denoised, others, needs)

        def product(vector: Tensor) -> Tensor:
            return torch.autograd.grad(conditional, at, vector, retain_graph=True)[0]

        return steered(denoised, product, sigma, self._known(lanes), batch.pull, lanes[0].key[1])

    def _known(self, lanes: Sequence[Lane]) -> KnownRegion:
        """The known regions of inpainting lanes."""
        requests = [lane.job.request for lane in lanes]
        pictures = [request.picture for request in requests if request.picture is not None]
        masks = [request.mask for request in requests if request.mask is not None]
        seeds = self._tensor([request.seed for request in requests], torch.int64)
        return KnownRegion(laid_out(torch.stack(pictures)), torch.stack(masks), seeds)

    def _fresh_noise(self, lanes: list[Lane], x: Tensor) -> Tensor | None:
        """The sampler's noise for the lanes whose row asks for it, zeros for others; None where no row does."""
        places = [at for at, lane in enumerate(lanes) if lane.fresh[lane.row]]
        if not places:
            return None
        noisy = [lanes[at] for at in places]
        z = torch.zeros_like(x)
        z[places] = self._noise(noisy, "sampler", self._rows(noisy), tuple(x.shape[1:]))
        return z

    def _constrained(self, lanes: list[Lane], x: Tensor, sigma_next: Tensor) -> Tensor:
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

    def _rows(self, lanes: list[Lane]) -> Tensor:
        """The number of every lane's next row [B]."""
        return self._tensor([lane.row for lane in lanes], torch.int64)

    def _tensor(self, values: Sequence[object], dtype: torch.dtype) -> Tensor:
        """Values on the engine's device."""
        return torch.tensor(values, dtype=dtype).to(self.device)


def new_lane(ticket: int, job: Job, plan: Plan) -> Lane:
    """A lane before its first row."""
    request = job.request
    columns = (plan.sigma, plan.sigma_next, plan.a, plan.b, plan.s, plan.alpha, plan.beta)
    within = (plan.sigma > request.guidance_low) & (plan.sigma <= request.guidance_high)
    return Lane(
        ticket=ticket,
        job=job,
        key=(tuple(job.origin.shape), request.solves),
        table=torch.cat((torch.stack(columns, dim=1), plan.c), dim=1),
        wide=[request.is_guided and each for each in within.tolist()],
        fresh=(plan.s != 0).tolist(),
    )


def _padding(count: int, widths: Sequence[int]) -> int:
    """How many inputs `count` lack to the next batch size."""
    return next(width for width in widths if width >= count) - count


def laid_out(x: Tensor) -> Tensor:
    """Pictures [B, C, H, W] in the layout that convolutions like."""
    return x.contiguous(memory_format=torch.channels_last)


def _joined(crowd: list[Lane], count: int, memory: int) -> _Batch:
    """Parts of last batches as one batch, with histories of `memory`; what follows the first `count` is padding."""
    places = [(lane.batch, lane.at) for lane in crowd if lane.batch is not None]
    first = places[0][0]
    same = all(batch is first and at == place for place, (batch, at) in enumerate(places[:count]))
    if same and len(first.state.x) == len(crowd) and len(first.state.history) == memory:
        return first  # nobody came or went

    def gathered(part: Callable[[_Batch], Tensor]) -> Tensor:
        return laid_out(torch.stack([part(batch)[at] for batch, at in places]))

    history = tuple(gathered(partial(_remembered, age=age)) for age in range(memory))
    state = State(gathered(lambda batch: batch.state.x), history)
    return _Batch(state, gathered(lambda batch: batch.pull), gathered(lambda batch: batch.denoised))


def _remembered(batch: _Batch, age: int) -> Tensor:
    """What a batch remembers of `age` rows before the last; zeros where that is nothing."""
    history = batch.state.history
    return history[age] if age < len(history) else torch.zeros_like(batch.state.x)


def _handed_out(lanes: list[Lane], batch: _Batch) -> list[Finished]:
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
