"""Pictures at a time, so that a step fits into memory; and what to say where it does not."""

import torch
import torch.distributed as dist

from diffusion_core.memory import USABLE, largest_micro_batch, memory_of
from diffusion_core.strategies import Ranks
from pipelines.config import PipelineError, TrainConfig
from pipelines.dataset import Dataset
from pipelines.train.plan import largest_share, model_config, optimisation


def micro_batch_of(config: TrainConfig, dataset: Dataset, ranks: Ranks, group: dist.ProcessGroup | None) -> int | None:
    """Pictures that every rank computes at a time; None for all of its share.

    Raises PipelineError, with "auto", where not even one picture fits.
    """
    if config.micro_batch != "auto":
        return None if config.micro_batch == "all" else int(config.micro_batch)
    model, settings = model_config(config, dataset), optimisation(config, ranks.world)
    share = largest_share(config, ranks.world)
    budget = int(memory_of(ranks.device, ranks.local_world) * USABLE)
    try:
        fits = largest_micro_batch(
            model, settings, config.strategy, ranks, share, budget, config.activation_checkpointing
        )
    except ValueError as error:
        raise PipelineError(f"{_network(config)} at {dataset.resolution} pixels: {error}") from error
    if group is not None:
        # Devices may differ; ranks must take equally many turns.
        least = torch.tensor(fits)
        dist.all_reduce(least, dist.ReduceOp.MIN, group=group)
        fits = int(least)
    return fits


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device or the machine had no more memory to give."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def advice(config: TrainConfig, ranks: Ranks) -> str:
    """What to change, by effect, where a step did not fit."""
    levers = [
        "--micro-batch auto (or a smaller number)" if config.micro_batch in ("all", "auto") else
        f"--micro-batch below {config.micro_batch}",
        *([] if config.activation_checkpointing else ["--activation-checkpointing"]),
        *([] if config.precision == "bfloat16" else ["--precision bfloat16"]),
        *(["--strategy fsdp"] if config.strategy == "ddp" and ranks.world > 1 else []),
        *(["fewer --ema widths"] if len(config.ema) > 1 else []),
        *([] if config.parent else ["a smaller --preset"]),
    ]  # fmt: skip
    shown = "" if config.parent else f"; python -m pipelines plan --preset {config.preset} shows what fits"
    return (
        f"train: out of memory on {ranks.device} (rank {ranks.rank} of {ranks.world}, {_network(config)}); use "
        f"{', '.join(levers)}{shown}"
    )


def _network(config: TrainConfig) -> str:
    """What people know the network by."""
    return f"parent {config.parent}" if config.parent else f"preset {config.preset}"
