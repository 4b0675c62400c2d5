"""Several ranks of a training run on this machine: plain processes that meet over gloo in a folder."""

import multiprocessing
import os

import torch
import torch.distributed as dist

from diffusion_core.strategies import Ranks
from pipelines.config import TrainConfig
from pipelines.train import Host, train_on_rank

# What a run imports only when it comes to it.
_LATER = (
    "torch.distributed.fsdp", "torch.distributed.checkpoint", "torch.distributed.tensor", "torch.utils.tensorboard",
    "matplotlib.figure", "matplotlib.backends.backend_agg", "matplotlib.backends.backend_svg",
)  # fmt: skip


def train_together(world, meeting, *runs):
    """Train each of `runs` (settings, ranks on a node, steps after which to stop or None) on `world` ranks."""
    jobs = [(config.model_dump(mode="json"), local_world, stop_after) for config, local_world, stop_after in runs]
    # What all ranks import is imported once, and then forked.
    multiprocessing.set_forkserver_preload(["support.ranks", *_LATER])
    torch.multiprocessing.start_processes(
        _rank, (world, str(meeting), jobs, dict(os.environ)), nprocs=world, start_method="forkserver"
    )


def stop_after(steps):
    """A host that asks to stop once so many steps were done, and says nothing."""
    calls = []

    def asked():
        calls.append(1)
        return steps is not None and len(calls) >= steps

    return Host(emit=lambda _: None, asked=asked)


def _rank(rank, world, meeting, jobs, environment):
    os.environ.update(environment)
    dist.init_process_group("gloo", init_method=f"file://{meeting}/meeting-{world}", rank=rank, world_size=world)
    for settings, local_world, stop in jobs:
        train_on_rank(TrainConfig.model_validate(settings), Ranks(rank, world, local_world), stop_after(stop))
    dist.destroy_process_group()
