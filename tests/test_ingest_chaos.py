"""Ingestion while processes die and the way to the store breaks: nothing is lost, and the bytes are the same."""

import io
import threading
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from ray.cluster_utils import Cluster
from support import sessions
from support.damage import encoded, noise, tar_bytes

from pipelines import storage
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


def test_a_run_whose_processes_are_all_killed_three_times_ends_with_the_same_bytes(shards, expected, tmp_path):
    store = tmp_path / "store"
    for wanted in (1, 4, TARS):
        process = start(shards, store)
        deadline = time.monotonic() + 120
        while len(records(store)) < wanted and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert process.poll() is None, process.communicate()[0]
        sessions.kill_all(process)
        assert not list(store.glob("datasets/*/*/manifest.json")), "nobody sees half"
        done = {path: path.stat().st_mtime_ns for path in records(store)}
    output, code = finish(start(shards, store))
    assert code == 0, output
    assert len(done) >= TARS
    dataset = open_dataset(uri_of(output))
    same(dataset, expected)
    assert not list(store.glob("datasets/*/*/staging"))


def test_killed_workers_are_replaced_and_change_nothing(shards, expected, tmp_path):
    process = start(shards, tmp_path / "store")
    killed = 0
    deadline = time.monotonic() + 200
    while process.poll() is None and time.monotonic() < deadline:
        if 0 < len(records(tmp_path / "store")) < TARS and killed < 3:
            killed += sessions.kill_one(process.pid, r"ray::.*[Mm]ap")
            time.sleep(0.5)
        time.sleep(0.02)
    output, code = finish(process)
    assert code == 0, output
    assert killed, "no worker was there to kill"
    same(open_dataset(uri_of(output)), expected)


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
# Each kind once for certain, and then by chance.
WEATHER = [{**rule, "prob": 1, "times": 1} for rule in WEATHER] + WEATHER


@pytest.fixture
def shards_in_bucket(shards, bucket):
    for path in sorted(shards.iterdir()):
        storage.write_bytes(f"{bucket}/in/{path.name}", path.read_bytes())
    return f"{bucket}/in"


def test_bad_weather_on_the_way_to_s3_changes_nothing(shards_in_bucket, bucket, undisturbed, fault_proxy):
    fault_proxy.rules(*WEATHER)
    output, code = finish(start(shards_in_bucket, f"{bucket}/store", AWS_ENDPOINT_URL=fault_proxy.url))
    faults = {kind for _, kind in fault_proxy.done()}
    fault_proxy.rules()
    assert code == 0, output
    assert faults == {rule["kind"] for rule in WEATHER}
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


def test_a_fault_that_stays_stops_the_run_names_the_object_and_the_next_run_goes_on(
    shards_in_bucket, bucket, expected, fault_proxy
):
    fault_proxy.rules({"match": "GET .*noise-3.tar", "kind": "slowdown"})
    output, code = finish(start(shards_in_bucket, f"{bucket}/store", AWS_ENDPOINT_URL=fault_proxy.url))
    fault_proxy.rules()
    assert code == 1
    assert "1 units could not be done" in output
    assert f"{shards_in_bucket}/noise-3.tar" in output
    assert not [info for info in storage.list_objects(f"{bucket}/store") if info.uri.endswith("manifest.json")]
    output, code = finish(start(shards_in_bucket, f"{bucket}/store", AWS_ENDPOINT_URL=fault_proxy.url))
    assert code == 0, output
    assert len([line for line, _ in fault_proxy.done() if ".tar" in line]) == 0
    assert open_dataset(uri_of(output)).manifest["counts"] == expected["counts"]


def test_of_two_runs_at_once_both_end_with_one_dataset(shards, expected, tmp_path):
    outputs = {}

    def one(number):
        outputs[number] = finish(start(shards, tmp_path / "store"))

    threads = [threading.Thread(target=one, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [code for _, code in outputs.values()] == [0, 0], outputs
    assert len({uri_of(output) for output, _ in outputs.values()}) == 1
    same(open_dataset(uri_of(outputs[0][0])), expected)
    told = [("ingest: found 480" in output, "another run published" in output) for output, _ in outputs.values()]
    assert sorted(told) == [(False, True), (True, False)]
