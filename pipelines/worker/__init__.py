"""A model on a device with its engine: alone, in a loop that many share, or in a pool over a cluster."""

from pipelines.worker.pool import gpus_of_a_worker, one_of_a_pool, pool_of, pool_size
from pipelines.worker.worker import LANES, Worker, load_worker, picture_seed

__all__ = [
    "LANES", "Worker", "gpus_of_a_worker", "load_worker", "one_of_a_pool", "picture_seed", "pool_of", "pool_size",
]  # fmt: skip
