"""What is done where losses are not finite, memory is not enough, or the model learns its pictures by heart."""

from pipelines.checkpoint import latest_step
from pipelines.config import PipelineError
from pipelines.train.plan import stream_of
from pipelines.train.session import Session, first_state, resume

_ROLLBACKS = 10


def pass_over(session: Session, error: FloatingPointError) -> None:
    """A step without an update; after several in a row the run goes back and leaves those batches out, or stops.

    Raises PipelineError where it stops.
    """
    step, config = session.state.step, session.config
    session.not_finite.append(step)
    session.tell(f"train: step {step} is passed over: {error}")
    if len(session.not_finite) < config.nonfinite_limit:
        session.state.step += 1
        return
    session.writer.wait()
    if config.nonfinite == "stop" or session.rollbacks == _ROLLBACKS:
        raise PipelineError(_not_finite(session, error))
    skipped = sorted({*session.record.skipped, *session.not_finite})
    session.state = first_state(config, session.dataset, session.settings, session.ranks)
    resume(session)
    session.record.skipped, session.not_finite = skipped, []
    session.rollbacks += 1
    session.tell(f"train: back at step {session.state.step}; leaving out the batches of steps {skipped}")


def watch_heldout(session: Session) -> None:
    """Warn, once, where the held-out loss rises while the training loss falls; end the run where patience is over."""
    record, patience = session.record, session.config.patience
    session.tell(f"train: step {session.state.step}: held-out loss {record.validation[-1][1]:.4f}")
    if record.overfits and not record.warned:
        record.warned = True
        session.tell(
            "train: warning: the held-out loss rises while the training loss falls; more pictures, --flip or fewer "
            "--steps may help, and --patience ends a run at its best"
        )
    if patience and record.since_best >= patience:
        session.stops_early = True
        session.tell(f"train: no better held-out loss since step {record.best}; taking the model of that step")


def _not_finite(session: Session, error: FloatingPointError) -> str:
    """The steps, the pictures and the last good checkpoint, in a line."""
    whole = stream_of(session.config, session.dataset, session.ranks.alone())
    ids = ", ".join(str(row) for row in whole.indices(session.state.step))
    saved = latest_step(session.uri)
    good = f"the checkpoint of step {saved} is good" if saved is not None else "there is no checkpoint yet"
    return (
        f"{session.uri}: {len(session.not_finite)} steps in a row are not finite, the last at step "
        f"{session.state.step} ({error}) with rows {ids} of split train; {good}: lower --learning-rate, "
        "or leave such batches out with --nonfinite skip"
    )
