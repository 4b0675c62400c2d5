"""What a Ray cluster has to work with, and what it may grow to."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Capacity:
    """GPUs and cores that the nodes of the connected Ray have, and that they may have at most by its autoscaler."""

    gpus: int
    cpus: int
    most_gpus: int
    most_cpus: int

    @property
    def usable_gpus(self) -> int:
        """GPUs to plan with: those that are there, or where none is, those that work would bring."""
        return self.gpus or self.most_gpus

    @property
    def usable_cpus(self) -> int:
        """Cores to plan with, one at least."""
        return self.cpus or self.most_cpus or 1


def capacity() -> Capacity:
    """The capacity of the connected Ray."""
    import ray
    from ray._private.state import state

    here = ray.cluster_resources()
    # What Ray Train itself goes by: an autoscaler's own node types, which have no public call
    most = state.get_max_resources_from_cluster_config() or {}
    gpus, cpus = (int(here.get(name, 0)) for name in ("GPU", "CPU"))
    return Capacity(gpus, cpus, max(gpus, int(most.get("GPU", 0))), max(cpus, int(most.get("CPU", 0))))
