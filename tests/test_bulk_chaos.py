"""Bulk generation while processes die and the way to the store breaks: every picture once, with the same bytes."""

import contextlib
import os
import re
import signal
import time
import uuid
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
from conftest import four_free_ports
from ray.cluster_utils import Cluster
from support import sessions
from support.models import publish

from pipelines import storage
from pipelines.config import PromoteConfig, VerifyConfig
from pipelines.images import to_png
from pipelines.lineage import verify
from pipelines.model import model_digest
from pipelines.registry import promote

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(400)]
ROWS, SHARD = 48, 4
SHARDS = ROWS // SHARD


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A table of edits and generations in turn, with its pictures beside it."""
    folder = tmp_path_factory.mktemp("table")
    rng = np.random.default_rng(0)
    lines = ["task,image,class,strength,seed"]
    for row in range(ROWS):
        (folder / f"{row}.png").write_bytes(to_png(rng.integers(256, size=(8, 8, 3), dtype=np.uint8)))
        lines.append(f"image_to_image,{row}.png,cat,0.7,{row}" if row % 2 else f"generate,,bear,,{row}")
    (folder / "t.csv").write_text("\n".join(lines) + "\n")
    return str(folder / "t.csv")


@pytest.fixture(scope="module")
def quiet(table, tiny_model, tmp_path_factory):
    """The files of a run that nothing disturbs."""
    output, code = finish(start(table, tiny_model, tmp_path_factory.mktemp("quiet") / "s"))
    assert code == 0, output
    return contents(uri_of(output))


def start(table, model, store, *flags, **environment):
    told = ["--model", model, "--table", table, "--store", store, "--name", "x", "--shard-size", SHARD]
    # Many steps, so that a shard takes long enough to be killed in.
    return sessions.start("generate", *told, "--steps", 200, "--workers", 2, *flags, **environment)


def finish(process):
    return sessions.finish(process, timeout=300)


def uri_of(output):
    return sessions.uri_of("generate", output)


def contents(uri):
    """All shards by name."""
    wanted = re.compile(r"/(part-|numerics)")
    return {
        info.uri.removeprefix(uri): storage.read_bytes(info.uri)
        for info in storage.list_objects(uri)
        if wanted.search(info.uri.removeprefix(uri))
    }


def records(store):
    return list(Path(store).glob("images/*/*/staging/shards/*.json"))


def wait_for(process, store, wanted):
    sessions.until_at_work(process, lambda: len(records(store)) >= wanted, f"{wanted} shards", 120, 0.01)


def test_a_run_killed_in_part_and_whole_interrupted_and_gone_on_with_twice_at_once_ends_with_the_same_bytes(
    table, tiny_model, quiet, tmp_path
):
    store = tmp_path / "store"
    process = start(table, tiny_model, store)
    wait_for(process, store, 2)
    assert sessions.kill_one(process.pid, "MapWorker"), "no worker was there to kill"
    wait_for(process, store, 4)
    sessions.kill_all(process)
    assert not list(store.glob("images/*/*/manifest.json")), "nobody sees half"
    done = {path.name for path in records(store)}
    kept = {path: path.stat().st_mtime_ns for path in store.glob("images/*/*/part-*")}
    assert 4 <= len(done) < SHARDS
    process = start(table, tiny_model, store)
    wait_for(process, store, len(done) + 1)
    os.kill(process.pid, signal.SIGINT)
    output, code = finish(process)
    assert code == 130, output
    assert re.search(rf"stopped; \d+ of {SHARDS} shards are done and kept at .*same command again", output)
    both = [finish(each) for each in [start(table, tiny_model, store) for _ in range(2)]]
    assert [code for _, code in both] == [0, 0], both
    (uri,) = {uri_of(output) for output, _ in both}
    assert contents(uri) == quiet
    redone = [path for path, time_ns in kept.items() if path.stat().st_mtime_ns != time_ns]
    assert redone == [], "what was committed is left alone"
    assert not list(store.glob("images/*/*/staging"))
    verify.run(VerifyConfig(uri=uri))


SIZE = {"object_store_memory": 150_000_000}


@pytest.mark.usefixtures("one_address_only")
def test_a_node_killed_in_the_middle_changes_nothing(table, tiny_model, quiet, tmp_path):
    store, cluster = tmp_path / "store", Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **SIZE})
    try:
        node = cluster.add_node(num_cpus=1, **SIZE)
        process = start(table, tiny_model, store, RAY_ADDRESS=cluster.address)
        wait_for(process, store, 2)
        cluster.remove_node(node, allow_graceful=False)
        assert len(records(store)) < SHARDS, "killed in the middle"
        output, code = finish(process)
    finally:
        cluster.shutdown()
    assert code == 0, output
    assert contents(uri_of(output)) == quiet


@pytest.fixture(scope="module")
def marked():
    """A text in the environment of all processes of the cluster."""
    name, text = "TRIAL_OF_BULK", uuid.uuid4().hex
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(name, text)
        yield f"{name}={text}"


@pytest.fixture(scope="module")
def cluster(marked):
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, **SIZE})
    yield made
    made.shutdown()


@pytest.fixture(scope="module")
def versions(tmp_path_factory):
    """Two models of a store, the first of which is live."""
    store = str(tmp_path_factory.mktemp("served"))
    found = publish(store, 1), publish(store, 2)
    promote(PromoteConfig(model=found[0], by="ada", force=True, reason="trial"))
    return found


class Service:
    """The service on a cluster, by a command that can be stopped and given again."""

    def __init__(self, cluster, store, port):
        self.cluster, self.url = cluster, f"http://127.0.0.1:{port}"
        self.flags = ["--store", store, "--name", "tiny", "--port", port, "--threads", 2, "--watch", 0.3, "--drain", 1]
        self.begin()

    def begin(self):
        self.process = sessions.start("serve", *self.flags, RAY_ADDRESS=self.cluster.address)

    def stop(self):
        self.process.terminate()
        self.process.communicate(timeout=100)

    def wait(self):
        end = time.monotonic() + 120
        while True:
            assert time.monotonic() < end
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/readyz", timeout=5).status_code == 200:
                    return
            assert self.process.poll() is None, self.process.communicate()[0]
            time.sleep(0.1)


@pytest.fixture(scope="module")
def service(cluster, versions):
    running = Service(cluster, versions[0].split("/models/")[0], four_free_ports())
    running.wait()
    yield running
    running.stop()


JOB = ["--name", "x", "--count", ROWS, "--shard-size", SHARD, "--steps", 200, "--seed", 3]


@pytest.fixture(scope="module")
def alone(versions, tmp_path_factory):
    """The shards of the first model by actors, with nothing in their way."""
    place = tmp_path_factory.mktemp("alone")
    output, code = finish(sessions.start("generate", "--model", versions[0], "--store", place, *JOB, "--workers", 1))
    assert code == 0, output
    return contents(uri_of(output))


def test_a_service_that_is_killed_promotes_and_restarts_meanwhile_makes_what_actors_make_alone(
    service, cluster, versions, alone, marked, tmp_path
):
    store, how = tmp_path / "store", ["--via", "serve", "--workers", 1]
    process = sessions.start(
        "generate", "--model", versions[0], "--store", store, *JOB, *how, RAY_ADDRESS=cluster.address
    )
    wait_for(process, store, 2)
    promote(PromoteConfig(model=versions[1], by="ada", force=True, reason="trial"))
    wait_for(process, store, 4)
    assert sessions.kill_marked(marked, "ServeReplica") >= 2, "an ingress and an engine"
    wait_for(process, store, 6)
    service.stop()
    assert len(records(store)) < SHARDS, "stopped in the middle"
    service.begin()
    output, code = finish(process)
    assert code == 0, output
    assert contents(uri_of(output)) == alone
    service.wait()
    live = httpx.get(f"{service.url}/v1/models").json()["data"][0]["digest"]
    assert live == model_digest(storage.read_manifest(versions[1], "model"))


def test_a_batch_whose_ingress_is_killed_goes_on(service, versions, marked):
    own, count = openai.OpenAI(base_url=f"{service.url}/v1", api_key="none"), 384
    rows = "".join(f"cat,{seed}\n" for seed in range(count))
    file = own.files.create(file=("t.csv", f"class,seed\n{rows}".encode()), purpose="batch")
    batch = own.batches.create(
        input_file_id=file.id, endpoint="/v1/images/generations", completion_window="24h", extra_body={"steps": 100}
    )
    place = Path(file_store(versions)) / "images/batches"
    sessions.until(lambda: list(place.glob("*/staging/shards/*.json")), "the first shard of the batch", 200, 0.01)
    assert sessions.kill_marked(marked, "ServeReplica:images:Ingress")
    assert not list(place.glob("*/manifest.json")), "killed in the middle"

    def ended():
        with contextlib.suppress(openai.APIError):
            found = own.batches.retrieve(batch.id)
            return found if found.status in ("completed", "failed") else None

    batch = sessions.until(ended, "the batch's end", 200, 0.2)
    assert batch.status == "completed", batch.errors
    assert batch.request_counts.completed == count
    verify.run(VerifyConfig(uri=batch.images))


def file_store(versions):
    return versions[0].split("/models/")[0]


WEATHER = [
    {"match": "GET .*", "kind": "slowdown", "prob": 0.1},
    {"match": "GET .*", "kind": "reset", "prob": 0.05},
    {"match": "GET .*", "kind": "truncate", "prob": 0.05, "after": 100},
    {"match": "GET .*", "kind": "corrupt", "prob": 0.05},
    {"match": "PUT .*", "kind": "slowdown", "prob": 0.1},
    {"match": "PUT .*", "kind": "lost_response", "prob": 0.1},
]


def test_bad_weather_on_the_way_to_s3_changes_nothing(table, tiny_model, quiet, bucket, fault_proxy):
    for path in Path(table).parent.iterdir():
        storage.write_bytes(f"{bucket}/in/{path.name}", path.read_bytes())
    fault_proxy.weather(WEATHER)
    output, code = finish(start(f"{bucket}/in/t.csv", tiny_model, f"{bucket}/store", AWS_ENDPOINT_URL=fault_proxy.url))
    faults = {kind for _, kind in fault_proxy.done()}
    fault_proxy.rules()
    assert code == 0, output
    assert faults == {rule["kind"] for rule in WEATHER}
    made = contents(uri_of(output))
    assert made["/numerics.json"] == quiet["/numerics.json"]
    assert len(made) == len(quiet)
    verify.run(VerifyConfig(uri=uri_of(output)))
