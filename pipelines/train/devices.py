"""What there is to train on: how many processes, whether each has a GPU, and how many threads."""

import os

from pipelines.config import PipelineError, TrainOptions

_MAX_WORKERS = 2


def processes(config: TrainOptions) -> tuple[int, bool]:
    """How many processes the connected Ray can run for these settings, and whether each has a GPU.

    Raises PipelineError where more are asked for than there are.
    """
    import ray

    resources = ray.cluster_resources()
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
    wanted = config.workers or min(config.streams, gpus or min(cpus, _MAX_WORKERS))
    if min(wanted, config.min_workers or wanted) > (gpus or cpus):
        raise PipelineError(f"workers: {wanted} asked for, but Ray has {gpus} GPUs and {cpus} cores; lower --workers")
    return wanted, gpus > 0


def threads_of(asked: int, local_world: int) -> int:
    """CPU threads of one of `local_world` processes: as asked for, or its share of the cores."""
    return asked or max(1, (os.cpu_count() or 1) // local_world)
