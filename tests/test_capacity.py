import contextlib

import pytest
import ray
from ray._raylet import GcsClient
from ray.core.generated.autoscaler_pb2 import ClusterConfig

from pipelines.capacity import capacity
from pipelines.config import PipelineError, TrainConfig
from pipelines.train.devices import processes, tell_of_growth
from pipelines.worker import gpus_of_a_worker, pool_size

pytestmark = pytest.mark.usefixtures("ray_session")


@contextlib.contextmanager
def autoscaler(nodes, **resources):
    """Ray is told of a kind of nodes that are not there yet, as an autoscaler tells it."""
    config = ClusterConfig()
    group = config.node_group_configs.add()
    group.name, group.max_count = "gpu", nodes
    group.resources.update(resources)
    client = GcsClient(address=ray.get_runtime_context().gcs_address)
    client.report_cluster_config(config.SerializeToString())
    try:
        yield
    finally:
        client.report_cluster_config(ClusterConfig().SerializeToString())


def config_of(**settings):
    return TrainConfig(dataset="x", streams=8, **settings)


def test_a_cluster_without_an_autoscaler_is_what_it_has():
    there = capacity()
    assert (there.gpus, there.most_gpus) == (0, 0)
    assert there.cpus == there.most_cpus == int(ray.cluster_resources()["CPU"])
    assert gpus_of_a_worker() == 0
    assert processes(config_of(workers=1)) == (1, False)


def test_work_is_planned_for_the_gpus_that_a_cluster_would_bring(capsys):
    with autoscaler(6, CPU=4, GPU=1):
        assert capacity().usable_gpus == 6
        assert gpus_of_a_worker() == 1
        assert pool_size(0, 100) == 6
        assert processes(config_of(workers=4)) == (4, True)
        assert processes(config_of()) == (6, True)
        tell_of_growth(4, True)
        assert "train: 0 of 4 GPUs are there; waiting for the cluster to grow" in capsys.readouterr().out
        with pytest.raises(PipelineError, match="workers: 8 asked for, but Ray has 6 GPUs"):
            processes(config_of(workers=8))
    assert gpus_of_a_worker() == 0


def test_more_cores_may_come_than_there_are():
    here = capacity().cpus
    with autoscaler(3, CPU=4):
        assert (capacity().usable_cpus, capacity().most_cpus) == (here, 12)
        assert processes(config_of(workers=8)) == (8, False)
    with pytest.raises(PipelineError, match="at most; lower --workers"):
        processes(config_of(workers=here + 1))
