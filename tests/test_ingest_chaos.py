"""Ingestion while processes die and the way to the store breaks: nothing is lost, and the bytes are the same."""

import io
import re
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from ray.cluster_utils import Cluster
from support import sessions
from support.damage import encoded, noise, tar_bytes

from pipelines import storage
from pipelines.config import AWAY_STATUS
from pipelines.dataset import open_dataset

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]
TARS, PICTURES = 8, 60


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Folder with tars of photographs of noise, of which some are there twice."""
    folder = tmp_path_factory.mktemp("shards")
    for number in range(TARS):
        members = [
            (f"{number}-{at:03}.jpg", encoded(noise((number * PICTURES + at) % 450, (500, 400)), "JPEG"))
            for at in range(PICTURES)
        ]
        (folder / f"noise-{number}.tar").write_bytes(tar_bytes(members))
    return folder


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory):
    """The dataset of a run that nothing disturbs."""
    output, code = finish(start(shards, tmp_path_factory.mktemp("store") / "s"))
    assert code == 0, output
    dataset = open_dataset(uri_of(output))
    assert dataset.manifest["counts"] == {"found": 480, "kept": 450, "rejected": 0, "duplicates": 30}
    return dataset


@pytest.fixture
def expected(undisturbed):
    """Its manifest."""
    return undisturbed.manifest


def start(source, store, *flags, **environment):
    told = ["--source", source, "--store", store, "--name", "x", "--resolution", 16, "--shard-size", 100]
    return sessions.start("ingest", *told, *flags, **environment)


def finish(process):
    return sessions.finish(process, timeout=400)


def uri_of(output):
    return sessions.uri_of("ingest", output)


def records(store):
    return list(Path(store).glob("datasets/*/*/staging/units/*.json"))


def same(dataset, expected):
    for key in ("shards", "counts", "mean", "sigma_data", "thumbnails", "duplicates", "contact"):
        assert dataset.manifest[key] == expected[key], key


def wait_for(process, store, wanted):
    """Wait until so many units are read, of a run that is at work."""
    sessions.until_at_work(process, lambda: len(records(store)) >= wanted, f"{wanted} units", 200, 0.02)


def kill_workers(process, most):
    """Kill workers that read; how many there were, `most` at most."""
    killed = 0
    deadline = time.monotonic() + 200
    while killed < most and process.poll() is None and time.monotonic() < deadline:
        killed += sessions.kill_one(process.pid, r"ray::.*[Mm]ap")
        time.sleep(0.02)
    return killed


def test_a_run_whose_processes_are_all_killed_twice_and_whose_workers_are_ends_with_the_same_bytes(
    shards, expected, tmp_path
):
    store = tmp_path / "store"
    for wanted, workers in ((1, 0), (TARS, 2)):
        process = start(shards, store)
        # What they were at is read by workers in their place.
        assert kill_workers(process, workers) == workers, "no worker was there to kill"
        wait_for(process, store, wanted)
        sessions.kill_all(process)
        assert not list(store.glob("datasets/*/*/manifest.json")), "nobody sees half"
    assert len(records(store)) == TARS
    output, code = finish(start(shards, store))
    assert code == 0, output
    assert not re.search(r"^ingest \[", output, re.M), "nothing is read again"
    same(open_dataset(uri_of(output)), expected)
    assert not list(store.glob("datasets/*/*/staging"))


@pytest.mark.usefixtures("one_address_only")
def test_a_killed_node_changes_nothing(shards, expected, tmp_path):
    size = {"num_cpus": 1, "object_store_memory": 150_000_000}
    cluster = Cluster(initialize_head=True, head_node_args=size)
    try:
        node = cluster.add_node(**size)
        process = start(shards, tmp_path / "store", RAY_ADDRESS=cluster.address)
        deadline = time.monotonic() + 120
        while not records(tmp_path / "store") and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert 0 < len(records(tmp_path / "store")) < TARS, "killed in the middle"
        cluster.remove_node(node, allow_graceful=False)
        output, code = finish(process)
    finally:
        cluster.shutdown()
    assert code == 0, output
    same(open_dataset(uri_of(output)), expected)


WEATHER = [
    {"match": "GET .*", "kind": "slowdown", "prob": 0.1},
    {"match": "GET .*", "kind": "reset", "prob": 0.05},
    {"match": "GET .*\\.tar", "kind": "reset_body", "prob": 0.1, "after": 200_000},
    {"match": "GET .*\\.tar", "kind": "truncate", "prob": 0.1, "after": 300_000},
    {"match": "GET .*", "kind": "corrupt", "prob": 0.05},
    {"match": "PUT .*", "kind": "slowdown", "prob": 0.1},
    {"match": "PUT .*", "kind": "lost_response", "prob": 0.1},
    {"match": ".*", "kind": "latency", "prob": 0.2, "ms": 100},
]


@pytest.fixture
def shards_in_bucket(shards, bucket):
    for path in sorted(shards.iterdir()):
        storage.write_bytes(f"{bucket}/in/{path.name}", path.read_bytes())
    return f"{bucket}/in"


def test_bad_weather_on_the_way_to_s3_changes_nothing_and_a_fault_that_stays_stops_a_run_that_the_next_one_ends(
    shards_in_bucket, bucket, undisturbed, fault_proxy
):
    fault_proxy.weather(WEATHER, {"match": "GET .*noise-3.tar", "kind": "slowdown"})
    output, code = finish(start(shards_in_bucket, f"{bucket}/store", AWS_ENDPOINT_URL=fault_proxy.url))
    faults = fault_proxy.done()
    fault_proxy.rules()
    assert code == AWAY_STATUS, output
    assert "1 units could not be done" in output
    assert f"{shards_in_bucket}/noise-3.tar" in output
    assert not [info for info in storage.list_objects(f"{bucket}/store") if info.uri.endswith("manifest.json")]
    every_tar = {"match": "GET .*\\.tar", "kind": "latency", "ms": 1}
    fault_proxy.weather(WEATHER, every_tar)
    output, code = finish(start(shards_in_bucket, f"{bucket}/store", AWS_ENDPOINT_URL=fault_proxy.url))
    later = fault_proxy.done()
    fault_proxy.rules()
    assert code == 0, output
    assert {kind for _, kind in faults + later} == {rule["kind"] for rule in WEATHER}
    assert set(re.findall(r"noise-\d\.tar", str(later))) == {"noise-3.tar"}, "the others were read before"
    dataset = open_dataset(uri_of(output))
    assert dataset.manifest["counts"] == undisturbed.manifest["counts"]
    assert rows_of(dataset) == rows_of(undisturbed)


def rows_of(dataset):
    """Everything in the shards but the sources' addresses."""
    rows = []
    for shards in dataset.manifest["shards"].values():
        for folder, shard in map(dataset.place, shards):
            table = pq.read_table(io.BytesIO(storage.read_part(folder, shard)))
            rows += table.drop_columns(["source"]).to_pylist()
    return rows


def test_of_two_runs_at_once_both_end_with_one_dataset(shards, expected, tmp_path):
    both = [finish(process) for process in [start(shards, tmp_path / "store") for _ in range(2)]]
    for output, code in both:
        assert code == 0, output
    assert len({uri_of(output) for output, _ in both}) == 1
    same(open_dataset(uri_of(both[0][0])), expected)
    made = ["ingest: found 480" in output for output, _ in both]
    found = [re.search("another run published|^ingest: found /", output, re.M) is not None for output, _ in both]
    assert sorted(made) == sorted(found) == [False, True]
    assert made != found
