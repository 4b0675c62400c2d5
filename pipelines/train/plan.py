"""What a run is to make: its model, its optimisation, where it lies, and what it has seen so far."""

import dataclasses
import itertools
import math
from dataclasses import dataclass, field
from typing import Any

from diffusion_core.config import PRESETS, ModelConfig, Timesteps
from diffusion_core.ema import Profile
from diffusion_core.schedules import SigmaDistribution, timestep_sigmas
from diffusion_core.strategies import Ranks
from diffusion_core.training import Optimisation
from pipelines import __version__, storage
from pipelines.config import PipelineError, TrainConfig, TrainOptions, identity, what
from pipelines.dataset import Dataset, SampleStream
from pipelines.model import model_digest
from pipelines.train.parent import DECIDES, check_parent, child_config

VERSION = 3


@dataclass
class Record:
    """What a run has seen, kept beside every checkpoint: curves, steps passed over, losses since the last point."""

    curve: list[list[float]] = field(default_factory=list)
    validation: list[list[float]] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    warned: bool = False

    @property
    def latest(self) -> float:
        """The last point of the loss curve; NaN before there is one."""
        return self.curve[-1][1] if self.curve else math.nan

    @property
    def since_best(self) -> int:
        """Validations after the best one."""
        return sum(row[0] > (self.best or 0) for row in self.validation)

    @property
    def overfits(self) -> bool:
        """Whether the held-out loss rose twice in a row while the training loss of these stretches fell."""
        if len(self.validation) < 3:
            return False
        steps, losses = zip(*(row[:2] for row in self.validation[-3:]), strict=True)
        first, second = (self._mean_loss(*pair) for pair in itertools.pairwise(steps))
        return losses[0] < losses[1] < losses[2] and second < first

    def _mean_loss(self, after: float, up_to: float) -> float:
        """The training loss of a stretch of steps."""
        losses = [loss for step, loss in self.curve if after < step <= up_to]
        return sum(losses) / max(1, len(losses))

    @property
    def best(self) -> int | None:
        """The step with the lowest validation loss."""
        return int(min(self.validation, key=lambda row: row[1])[0]) if self.validation else None


def model_config(config: TrainConfig, dataset: Dataset) -> ModelConfig:
    """The model that these settings make of this dataset. Raises PipelineError where no such network exists."""
    if config.parent:
        return child_config(config.parent, dataset)
    try:
        unet = dataclasses.replace(
            PRESETS[config.preset], resolution=dataset.resolution, classes=len(dataset.class_names),
            embedding="timestep" if config.timesteps else "log_sigma",
        )  # fmt: skip
    except ValueError as error:
        raise PipelineError(f"preset {config.preset} on {dataset.uri}: {error}") from error
    made = ModelConfig(
        unet, config.prediction, dataset.sigma_data, class_names=dataset.class_names, schedule=config.schedule
    )
    if config.timesteps is None:
        return made
    timesteps = Timesteps(config.timesteps)
    low, high = timestep_sigmas(timesteps)[[0, -1]].tolist()
    return dataclasses.replace(made, timesteps=timesteps, sigma_min=low, sigma_max=high)


def check(config: TrainConfig, dataset: Dataset) -> None:
    """Raise PipelineError where settings, dataset and parent do not fit one another: nothing is spent yet."""
    found = {"resolution": dataset.resolution, "classes": len(dataset.class_names)}
    for name, wanted in (("resolution", config.expect_resolution), ("classes", config.expect_classes)):
        if wanted is not None and wanted != found[name]:
            raise PipelineError(
                f"{dataset.uri}: {name} {found[name]}, but --expect-{name} {wanted}; choose another dataset"
            )
    check_parent(config)
    model_config(config, dataset)
    if config.workers > config.streams:
        raise PipelineError(
            f"workers: {config.workers} for {config.streams} streams; raise --streams or lower --workers"
        )
    if config.min_workers > (config.workers or config.min_workers):
        raise PipelineError(
            f"min_workers: {config.min_workers}, but workers {config.workers}; need min_workers <= workers"
        )
    stream_of(config, dataset, Ranks())


def optimisation(
    config: TrainOptions, world: int = 1, micro_batches: int = 1, model: ModelConfig | None = None
) -> Optimisation:
    """The core's view of the settings, for one of `world` ranks that cuts its share into `micro_batches`.

    The noise levels that are drawn uniformly are those between which `model` samples.
    """
    sigma = SigmaDistribution(config.sigma, schedule=config.schedule)
    if model:
        sigma = dataclasses.replace(sigma, schedule=model.schedule, low=model.sigma_min, high=model.sigma_max)
    return Optimisation(
        steps=config.steps, learning_rate=config.learning_rate, warmup=config.warmup, clip=config.clip,
        weight_decay=config.weight_decay, label_dropout=config.label_dropout,
        ema=tuple(Profile("power", width) for width in config.ema), seed=config.seed,
        global_batch_size=config.global_batch_size, weighting=config.weighting,
        sigma=sigma, stratified=config.stratified,
        micro_batches=micro_batches, precision=config.precision, decay=config.decay, world=world,
    )  # fmt: skip


def largest_share(config: TrainOptions, world: int) -> int:
    """Pictures of a global batch that fall to the rank with the most streams."""
    return -(-config.streams // world) * (config.global_batch_size // config.streams)


def micro_batches(config: TrainConfig, world: int, micro_batch: int | None) -> int:
    """Parts that every rank cuts its share into so that none has more than `micro_batch` pictures (None: no limit)."""
    most, fewest = largest_share(config, world), config.streams // world * (config.global_batch_size // config.streams)
    # Ranks gather sharded weights together, so all must take the same number of turns.
    return min(-(-most // (micro_batch or most)), fewest)


def stream_of(config: TrainConfig, dataset: Dataset, ranks: Ranks) -> SampleStream:
    """The rank's part of the sample stream. Raises PipelineError where settings and pictures do not fit."""
    return SampleStream(
        dataset, "train", config.seed, config.global_batch_size, config.streams, ranks.rank, ranks.world
    )


def run_uri(config: TrainConfig, dataset: Dataset) -> str:
    """Where the run's checkpoints and models lie."""
    inputs = [dataset.digest, parent_digest(config)] if config.parent else dataset.digest
    digest = identity("train", VERSION, made_by(config), inputs)
    return storage.join(storage.normalise(config.store), "models", config.name, digest)


def made_by(config: TrainConfig) -> dict[str, Any]:
    """The settings that say what is made, without those that a parent decides."""
    told = what(config)
    return {name: value for name, value in told.items() if not (config.parent and name in DECIDES)}


def parent_digest(config: TrainConfig) -> str | None:
    """The digest of the model that the run begins with."""
    return model_digest(storage.read_manifest(config.parent, "model")) if config.parent else None


def describe(config: TrainConfig, dataset: Dataset, run: str) -> None:
    """Say in the run's folder what it is to make, and of what."""
    text = {
        "kind": "run", "schema": 1, "code": __version__, "algorithm": VERSION, "settings": made_by(config),
        "dataset": dataset.uri, "dataset_digest": dataset.digest, "parent": parent_digest(config),
    }  # fmt: skip
    storage.create_bytes(storage.join(run, "run.json"), storage.to_json(text))


def published(run: str, step: int) -> str:
    """Where the model of a step lies."""
    return storage.join(run, "published", f"step-{step:07}")


def result(run: str) -> str | None:
    """The model that a finished run made, or None."""
    uri = storage.join(run, "result.json")
    try:
        found: dict[str, Any] = storage.read_json(uri)
    except storage.NotFoundError:
        return None
    return published(run, int(found["step"]))


def finish(run: str, step: int) -> None:
    """Say that the run is done and which step's model it made."""
    storage.create_bytes(storage.join(run, "result.json"), storage.to_json({"step": step}))
