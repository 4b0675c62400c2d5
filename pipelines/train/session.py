"""A rank's part of a run: what surrounds it, what it is to make, and how far it is."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from diffusion_core.denoiser import Denoiser
from diffusion_core.strategies import Ranks, control_group, distribute
from diffusion_core.training import Optimisation, TrainState, new_state
from diffusion_core.unet import UNet
from pipelines.checkpoint import Retention, Writer, restore
from pipelines.config import PipelineError, TrainConfig
from pipelines.dataset import Dataset, open_dataset
from pipelines.images import Pixels
from pipelines.model import load_model
from pipelines.progress import print_line
from pipelines.train.curves import Events, Watch
from pipelines.train.devices import threads_of
from pipelines.train.memory import micro_batch_of
from pipelines.train.parent import inherited
from pipelines.train.plan import Record, describe, micro_batches, model_config, optimisation, run_uri


def _nothing(_: dict[str, Any]) -> None:
    """What becomes of figures that nobody asks for."""


@dataclass(frozen=True)
class Host:
    """What surrounds a rank: where its lines and figures go, whether it is to stop, and whether a node will go.

    `figures` takes what is watched, by the names that TensorBoard shows, from rank 0 alone.

    `asked` is read by rank 0 in every step. `notice` is called by all ranks together, every few seconds, and is true
    when a node is newly about to be taken away. With `read_ahead` Ray Data reads in other processes.
    """

    emit: Callable[[str], None] = print_line
    asked: Callable[[], bool] = bool
    notice: Callable[[], bool] = bool
    report: Callable[[dict[str, Any]], None] = _nothing
    figures: Callable[[dict[str, float]], None] = _nothing
    read_ahead: bool = False


@dataclass
class Session:
    """All that a rank holds while it trains. What is below `state` changes from step to step."""

    config: TrainConfig
    dataset: Dataset
    ranks: Ranks
    host: Host
    uri: str
    settings: Optimisation
    group: dist.ProcessGroup | None
    writer: Writer
    state: TrainState
    record: Record = field(default_factory=Record)
    watch: Watch = field(default_factory=Watch)
    events: Events | None = None
    saved: int = -1
    drawn: dict[int, Pixels] = field(default_factory=dict)
    not_finite: list[int] = field(default_factory=list)
    rollbacks: int = 0
    looked: float = 0.0
    stops_early: bool = False
    leaves: bool = False

    @property
    def leads(self) -> bool:
        """Whether this rank speaks for all."""
        return self.ranks.rank == 0

    @property
    def ended(self) -> bool:
        """Whether there is no further step to take here and now."""
        return self.leaves or self.stops_early or self.state.step >= self.config.steps

    def tell(self, line: str) -> None:
        """A line for people, once and not once a rank."""
        if self.leads:
            self.host.emit(line)

    def show(self, values: dict[str, float]) -> None:
        """Figures of this step for whoever watches, once and not once a rank."""
        if self.events:
            self.events.scalars(values, self.state.step)
            self.host.figures(values)

    def over_ranks(self, values: list[float]) -> list[float]:
        """Sums over all ranks; each must call it."""
        if self.group is None:
            return values
        sums = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums, group=self.group)
        return [float(value) for value in sums]


def open_session(config: TrainConfig, ranks: Ranks, host: Host) -> Session:
    """The run as far as the store has it. Raises PipelineError where settings, dataset and devices do not fit."""
    if ranks.device.type == "cpu":
        torch.set_num_threads(threads_of(config.threads, ranks.local_world))
    dataset = open_dataset(config.dataset)
    uri, group = run_uri(config, dataset), control_group(ranks)
    parts = micro_batches(config, ranks.world, micro_batch_of(config, dataset, ranks, group))
    settings = optimisation(config, ranks.world, parts, model_config(config, dataset))
    state = first_state(config, dataset, settings, ranks)
    writer = Writer(uri, ranks, Retention(config.keep_last, config.keep_every))
    session = Session(config, dataset, ranks, host, uri, settings, group, writer, state)
    resume(session)
    if session.leads:
        describe(config, dataset, uri)
        session.events = Events(uri, state.step, config.mlflow, config.model_dump(mode="json"), session.tell)
    return session


def first_state(config: TrainConfig, dataset: Dataset, settings: Optimisation, ranks: Ranks) -> TrainState:
    """The state before the first step, the same on every rank; with the weights of the parent where there is one."""
    model = model_config(config, dataset)
    torch.manual_seed(config.seed)
    network = UNet(model.unet, config.activation_checkpointing)
    if config.parent:
        parent = load_model(config.parent)
        network.load_state_dict(inherited(parent.denoiser.network.state_dict(), parent.config, model))
    try:
        wrapped = distribute(network, config.strategy, ranks, config.precision, config.compiled)
    except ValueError as error:
        raise PipelineError(f"--strategy {error}") from error
    return new_state(Denoiser(wrapped, model), network, settings)


def resume(session: Session, newest: int | None = None) -> None:
    """Put the newest checkpoint, or the newest up to step `newest`, into the session where there is one."""
    found = restore(session.uri, session.state, session.ranks, session.group, session.tell, newest)
    session.record = Record(**found) if found else Record()
    session.saved = session.state.step if found else -1
    if found:
        session.tell(f"train: goes on at step {session.state.step} of {session.config.steps}")


def save(session: Session, waits: bool = False) -> None:
    """A checkpoint of the state's step, once; `waits` until it is in the store."""
    if session.saved != session.state.step:
        best = session.record.best if session.config.patience else None
        session.writer.save(session.state, dataclasses.asdict(session.record), best)
        session.saved = session.state.step
        session.host.report({"step": session.state.step, "loss": session.record.latest})
    if waits:
        session.writer.wait()
