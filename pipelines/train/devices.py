"""What there is to train on: how many processes, whether each has a GPU, and how many threads."""

import os

from pipelines.capacity import capacity
from pipelines.config import PipelineError, TrainOptions
from pipelines.progress import print_line

_MAX_WORKERS = 2


def processes(config: TrainOptions) -> tuple[int, bool]:
    """How many processes the connected Ray can run for these settings, and whether each has a GPU.

    Raises PipelineError where more are asked for than there are, or may come to be.
    """
    there = capacity()
    gpus, cpus = there.usable_gpus, there.usable_cpus
    wanted = config.workers or min(config.streams, gpus or min(cpus, _MAX_WORKERS))
    least = min(wanted, config.min_workers or wanted)
    if least > (there.most_gpus or max(there.most_cpus, 1)):
        raise PipelineError(
            f"workers: {wanted} asked for, but Ray has {there.most_gpus} GPUs and {there.most_cpus} cores at most; "
            "lower --workers"
        )
    return wanted, gpus > 0


def tell_of_growth(workers: int, use_gpu: bool) -> None:
    """Say where a cluster has to grow before so many processes can start."""
    there = capacity()
    here, what = (there.gpus, "GPUs") if use_gpu else (there.cpus, "cores")
    if here < workers:
        print_line(f"train: {here} of {workers} {what} are there; waiting for the cluster to grow")


def threads_of(asked: int, local_world: int) -> int:
    """CPU threads of one of `local_world` processes: as asked for, or its share of the cores."""
    return asked or max(1, (os.cpu_count() or 1) // local_world)
