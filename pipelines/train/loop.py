"""The training loop as one rank runs it: read, step, look, save; the same with Ray Train and without."""

import time
from collections.abc import Iterator

import torch
import torch.distributed as dist

from diffusion_core.strategies import Ranks
from diffusion_core.training import Batch, learning_rate, rehearse, sigmas_of, train_step
from pipelines.checkpoint import whole
from pipelines.config import PipelineError, TrainConfig
from pipelines.progress import Progress
from pipelines.train.batches import fetched, to_batch
from pipelines.train.curves import Watch, level_scalars, level_sums, memory_bytes, utilisation, validation_scalars
from pipelines.train.guards import pass_over, watch_heldout
from pipelines.train.memory import advice, is_out_of_memory
from pipelines.train.plan import finish, result, stream_of
from pipelines.train.publication import draw, publish
from pipelines.train.session import Host, Session, open_session, resume, save
from pipelines.train.validation import by_level, heldout_share, loss_sums

_LOG_EVERY = 10
_LOOK_EVERY_S = 2.0


def train_on_rank(config: TrainConfig, ranks: Ranks | None = None, host: Host | None = None) -> int:
    """The whole training as one rank sees it; a process group exists where there are several. Returns the last step.

    It goes on at the newest whole checkpoint, and ends with `config.steps`, by early stopping, or when the host asks:
    what is done is then saved. Raises PipelineError where losses stay infinite, or memory or storage is not enough.
    """
    ranks = ranks or Ranks()
    try:
        session = open_session(config, ranks, host or Host())
        try:
            with session.writer:
                if result(session.uri) is None:
                    _train(session)
            return session.state.step
        finally:
            if session.events:
                session.events.close()
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise PipelineError(advice(config, ranks)) from error
        raise


def _train(session: Session) -> None:
    """Step by step to the end; a new reading position after every return to an earlier checkpoint."""
    while not session.ended:
        rollbacks, first = session.rollbacks, session.state.step
        progress = Progress("train", session.config.steps, "steps", done=first, emit=session.tell)
        batches = _batches(session)
        session.watch = Watch()
        while session.rollbacks == rollbacks and not session.ended:
            _advance(session, batches, progress)
    _close(session)


def _batches(session: Session) -> Iterator[Batch]:
    """The rank's batches from the session's step on."""
    config, first, classes = session.config, session.state.step, len(session.dataset.class_names)
    stream = stream_of(config, session.dataset, session.ranks)
    place = torch.from_numpy(stream.places()).to(session.ranks.device)
    rows = stream.batches(first, config.steps, ahead=session.host.read_ahead)
    made = (to_batch(each, place, config, step, classes) for step, each in enumerate(rows, start=first))
    for step, batch in enumerate(fetched(made, place.device) if session.host.read_ahead else made, start=first):
        if step == first and session.ranks.world > 1 and config.strategy == "ddp":
            rehearse(session.state, batch, session.settings)
        yield batch


def _advance(session: Session, batches: Iterator[Batch], progress: Progress) -> None:
    """One step, and what is due after it."""
    began = time.perf_counter()
    batch = next(batches)
    session.watch.waited += time.perf_counter() - began
    if session.state.step in session.record.skipped:
        session.state.step += 1
        return
    wishes = _Wishes(session)
    try:
        session.state, told = train_step(session.state, batch, session.settings, wishes.sum_with)
    except FloatingPointError as error:
        pass_over(session, error)
        return
    session.not_finite = []
    session.record.losses.append(told.loss)
    session.watch.count(level_sums(told.losses, sigmas_of(batch, session.state.step - 1, session.settings)))
    if session.state.step % _LOG_EVERY == 0 or session.state.step == session.config.steps:
        _log(session, told.norm, progress)
    _look_and_save(session, wishes)


class _Wishes:
    """What rank 0 wants beside the step, told to all ranks along with the loss: to look for notices, or to stop."""

    def __init__(self, session: Session) -> None:
        now = time.monotonic()
        self.session = session
        self.looks = session.leads and now - session.looked > _LOOK_EVERY_S
        self.stops = session.leads and session.host.asked()
        session.looked = now if self.looks else session.looked

    def sum_with(self, loss: float) -> float:
        """The sum of `loss` over all ranks."""
        total, looks, stops = self.session.over_ranks([loss, float(self.looks), float(self.stops)])
        self.looks, self.stops = looks > 0, stops > 0
        return total


def _look_and_save(session: Session, wishes: _Wishes) -> None:
    """Validation, checkpoints and publication, where they are due."""
    config, step = session.config, session.state.step
    last = step == config.steps
    if config.validate_every and (step % config.validate_every == 0 or last):
        _validate(session)
    goes = wishes.looks and session.host.notice()
    if goes:
        session.tell(f"train: a node is about to be taken away; saving step {step}")
    best = config.patience > 0 and session.record.best == step
    if step % config.checkpoint_every == 0 or best or goes or wishes.stops:
        save(session, waits=goes or wishes.stops)
    session.writer.check()
    session.leaves = wishes.stops and not last
    if config.publish_every and step % config.publish_every == 0 and not last:
        publish(session)


def _log(session: Session, norm: float, progress: Progress) -> None:
    """A point of the curve, a progress line, and the figures that are watched."""
    config, record, watch, step = session.config, session.record, session.watch, session.state.step
    record.curve.append([float(step), sum(record.losses) / len(record.losses)])
    record.losses = []
    levels = session.over_ranks(watch.sums)
    seconds = max(time.perf_counter() - watch.began, 1e-9)
    rate, waiting = watch.steps * config.global_batch_size / seconds, watch.waited / seconds
    if session.events:
        scalars = {
            "loss": record.latest, "gradient norm": norm, "pictures a second": rate,
            "learning rate": learning_rate(step - 1, session.settings), "data wait share": waiting,
            "memory bytes": float(memory_bytes(session.ranks)), **level_scalars(levels),
            **utilisation(session.state.denoiser.config.unet, session.ranks, rate),
            "checkpoint seconds": session.writer.seconds,
        }  # fmt: skip
        session.show(scalars)
        session.host.figures({"step": float(step), "steps left": float(config.steps - step)})
        figures = f"loss {record.latest:.4f}  data wait {waiting:.1%}"
        progress.update(step, figures, config.global_batch_size, "pictures")
    session.watch = Watch()


def _validate(session: Session) -> None:
    """The held-out loss, and a sample grid."""
    share = heldout_share(session.dataset, session.ranks)
    if share is not None:
        sums = loss_sums(session.state, share, session.ranks.device)
        session.record.validation.append([float(session.state.step), *by_level(session.over_ranks(sums))])
        watch_heldout(session)
    weights = whole(session.state.ema[0])
    if session.events:
        if session.record.validation:
            session.show(validation_scalars(session.record.validation[-1]))
        session.events.picture("samples", draw(session, weights), session.state.step)
        session.events.keep(session.state.step, session.record)
    session.watch = Watch()


def _close(session: Session) -> None:
    """What is left to do at the end: the last checkpoint, the model, the curves."""
    if not session.leaves:
        save(session, waits=True)
        if session.stops_early:
            record = session.record
            resume(session, record.best)
            session.record = record
        publish(session)
    if session.events:
        session.events.keep(session.state.step, session.record)
        if not session.leaves:
            finish(session.uri, session.state.step)
    if session.group is not None:
        dist.barrier(group=session.group)
