"""Pools of workers on a Ray cluster: how many, and on what."""

from typing import Any

from pipelines.capacity import capacity
from pipelines.worker.memory import keeping


def pool_of(workers: int, tasks: int) -> dict[str, Any]:
    """Arguments of a Ray Data map for a pool of so many workers as `pool_size` says, each as `one_of_a_pool` says."""
    import ray.data

    return {"compute": ray.data.ActorPoolStrategy(size=pool_size(workers, tasks)), **one_of_a_pool()}


def one_of_a_pool() -> dict[str, Any]:
    """Ray's options of a worker: a device, and memory that it keeps from its start."""
    return {"num_cpus": 1, "num_gpus": gpus_of_a_worker(), "runtime_env": keeping()}


def gpus_of_a_worker() -> int:
    """1 where the cluster has GPUs or may get some, else 0."""
    return int(capacity().usable_gpus >= 1)


def pool_size(workers: int, tasks: int) -> int:
    """`workers`, or one per GPU of the cluster, or one per two cores; not more than `tasks`."""
    there = capacity()
    return min(tasks, workers or there.usable_gpus or max(1, there.usable_cpus // 2))
