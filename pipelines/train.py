"""The train stage: Ray Train runs one process per device; the store holds the truth that it resumes from."""

import dataclasses
import os
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from diffusion_core.config import PRESETS, ModelConfig
from diffusion_core.denoiser import Denoiser
from diffusion_core.ema import Profile
from diffusion_core.noise import derive_seeds, uniform
from diffusion_core.schedules import SigmaDistribution
from diffusion_core.training import Batch, Optimisation, TrainState, new_state, train_step
from diffusion_core.unet import UNet
from pipelines import checkpoint, storage
from pipelines.config import Outcome, PipelineError, TrainConfig, identity, what
from pipelines.dataset import Dataset, Rows, SampleStream, open_dataset
from pipelines.images import to_floats
from pipelines.model import publish_model
from pipelines.progress import Progress, print_line, printed_board

VERSION = 2
_LOG_EVERY = 10
_MAX_WORKERS = 2
_RESTARTS = 3


def find(config: TrainConfig) -> Outcome | None:
    """The model of these settings and this dataset, if it is published."""
    uri = _published(config, open_dataset(config.dataset))
    return Outcome(uri=uri, found=True) if storage.is_published(uri) else None


def run(config: TrainConfig) -> Outcome:
    """Train to the last step and publish the model; continues from the newest checkpoint of an earlier run.

    Raises PipelineError where dataset and settings do not fit, before any worker starts.
    """
    dataset = open_dataset(config.dataset)
    model_config(config, dataset)
    workers, use_gpu = _workers(config)
    SampleStream(dataset, "train", config.seed, config.global_batch_size, config.streams, 0, workers)
    _fit(config, workers, use_gpu)
    return Outcome(uri=_published(config, dataset), found=False)


def model_config(config: TrainConfig, dataset: Dataset) -> ModelConfig:
    """The model that these settings make of this dataset. Raises PipelineError where no such network exists."""
    try:
        unet = dataclasses.replace(
            PRESETS[config.preset], resolution=dataset.resolution, classes=len(dataset.class_names)
        )
    except ValueError as error:
        raise PipelineError(f"preset {config.preset} on {dataset.uri}: {error}") from error
    return ModelConfig(
        unet, config.prediction, dataset.sigma_data, class_names=dataset.class_names, schedule=config.schedule
    )


def optimisation(config: TrainConfig) -> Optimisation:
    """The core's view of the settings."""
    return Optimisation(
        steps=config.steps, learning_rate=config.learning_rate, warmup=config.warmup, clip=config.clip,
        weight_decay=config.weight_decay, label_dropout=config.label_dropout, ema=(Profile("power", config.ema),),
        seed=config.seed, global_batch_size=config.global_batch_size, weighting=config.weighting,
        sigma=SigmaDistribution(config.sigma, schedule=config.schedule), stratified=config.stratified,
        micro_batches=config.micro_batches, precision=config.precision,
    )  # fmt: skip


def run_uri(config: TrainConfig, dataset: Dataset) -> str:
    """Where the run's checkpoints and models lie."""
    digest = identity("train", VERSION, what(config), dataset.digest)
    return storage.join(storage.normalise(config.store), "models", config.name, digest)


def _published(config: TrainConfig, dataset: Dataset) -> str:
    return storage.join(run_uri(config, dataset), "published", f"step-{config.steps:07}")


def _workers(config: TrainConfig) -> tuple[int, bool]:
    """How many processes, and whether each has a GPU."""
    import ray

    resources = ray.cluster_resources()
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
    wanted = config.workers or gpus or min(cpus, _MAX_WORKERS)
    while not config.workers and config.streams % wanted:
        wanted -= 1
    if wanted > (gpus or cpus):
        raise PipelineError(f"workers: {wanted} asked for, but Ray has {gpus} GPUs and {cpus} cores; lower --workers")
    return wanted, gpus > 0


def _fit(config: TrainConfig, workers: int, use_gpu: bool) -> None:
    """Run `_loop` on all workers under Ray Train, which starts them again when one dies."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    # Ray Train's own folder holds nothing that is read again: checkpoints go to the store.
    with tempfile.TemporaryDirectory(prefix="ray-train-") as scratch, printed_board() as board:
        trainer = TorchTrainer(
            _loop,
            train_loop_config={"config": config.model_dump(mode="json"), "use_gpu": use_gpu, "board": board},
            scaling_config=ScalingConfig(num_workers=workers, use_gpu=use_gpu),
            torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
            run_config=RunConfig(
                name=config.name, storage_path=scratch, failure_config=FailureConfig(max_failures=_RESTARTS)
            ),
        )
        trainer.fit()


def _loop(arguments: dict[str, Any]) -> None:
    """What every worker does: restore, train to the end, checkpoint on the way, publish."""
    from ray import train

    config = TrainConfig.model_validate(arguments["config"])
    context = train.get_context()
    device = train.torch.get_device() if arguments["use_gpu"] else torch.device("cpu")
    board = arguments["board"]

    def emit(line: str) -> None:
        board.post.remote(line)

    train_on_rank(config, context.get_world_rank(), context.get_world_size(), device, emit, read_ahead=True)


def train_on_rank(
    config: TrainConfig, rank: int, world: int, device: torch.device, emit: Callable[[str], None] = print_line,
    read_ahead: bool = False,
) -> None:  # fmt: skip
    """The whole training as one rank of `world` sees it; a process group exists where world > 1.

    With `read_ahead` Ray Data reads the pictures in other processes; needs a connection to Ray.
    """
    if device.type == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    dataset, settings = open_dataset(config.dataset), optimisation(config)
    uri = run_uri(config, dataset)
    state = _new_run(config, dataset, settings, device, world)
    state, curve = checkpoint.restore(uri, state)
    stream = SampleStream(dataset, "train", config.seed, config.global_batch_size, config.streams, rank, world)
    progress = Progress("train", config.steps, "steps", done=state.step, emit=emit)
    losses: list[float] = []
    batches = stream.batches(state.step, config.steps, ahead=read_ahead)
    place = torch.from_numpy(stream.places()).to(device)
    classes = len(dataset.class_names)
    while state.step < config.steps:
        batch = Batch(*_tensors(next(batches), device, config, state.step, classes), place)
        state, loss = train_step(state, batch, settings)
        losses.append(loss)
        if state.step % _LOG_EVERY == 0 or state.step == config.steps:
            curve.append([float(state.step), _mean_over_ranks(losses, world, device)])
            losses = []
            if rank == 0:
                progress.update(state.step, f"loss {curve[-1][1]:.4f}", config.global_batch_size, "pictures")
        if rank == 0 and (state.step % config.checkpoint_every == 0 or state.step == config.steps):
            checkpoint.save(uri, state, curve)
    if rank == 0:
        _publish(config, dataset, state, curve)
    if world > 1:
        dist.barrier()


def _new_run(
    config: TrainConfig, dataset: Dataset, settings: Optimisation, device: torch.device, world: int
) -> TrainState:
    """The state before the first step, the same on every rank."""
    model = model_config(config, dataset)
    torch.manual_seed(config.seed)
    network = UNet(model.unet, config.activation_checkpointing)
    network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    wrapped = DistributedDataParallel(network) if world > 1 else network
    return new_state(Denoiser(wrapped, model), network, settings)


def _tensors(
    rows: Rows, device: torch.device, config: TrainConfig, step: int, classes: int
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """A batch as x0 in [-1, 1], labels (the null class where a picture has none), and sample ids."""
    x0, ids = torch.from_numpy(to_floats(rows.pixels)), torch.from_numpy(rows.ids)
    if config.flip:
        flips = uniform(derive_seeds(config.seed, ids), "train_flip", step) < 0.5
        x0 = torch.where(flips[:, None, None, None], x0.flip(-1), x0)
    label = torch.from_numpy(np.where(rows.labels < 0, classes, rows.labels)).to(device) if classes else None
    return x0.to(device, memory_format=torch.channels_last), label, ids.to(device)


def _mean_over_ranks(losses: list[float], world: int, device: torch.device) -> float:
    """Mean of the losses since the last log line, over all ranks."""
    total = torch.tensor([sum(losses), float(len(losses))], dtype=torch.float64, device=device)
    if world > 1:
        dist.all_reduce(total)
    return float(total[0] / total[1])


def _publish(config: TrainConfig, dataset: Dataset, state: TrainState, curve: list[list[float]]) -> None:
    """The EMA as a model folder."""
    lineage = {"name": config.name, "settings": what(config), "dataset": dataset.uri, "dataset_digest": dataset.digest}
    publish_model(_published(config, dataset), state.denoiser.config, state.ema[0], lineage, curve)
