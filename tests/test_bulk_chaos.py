"""Bulk generation while processes die and the way to the store breaks: every picture once, with the same bytes."""

import os
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from support import sessions

from pipelines import storage
from pipelines.config import VerifyConfig
from pipelines.images import to_png
from pipelines.lineage import verify

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
    deadline = time.monotonic() + 120
    while len(records(store)) < wanted and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()[0]


def test_a_run_whose_worker_and_then_whole_session_are_killed_ends_with_the_same_bytes(
    table, tiny_model, quiet, tmp_path
):
    store = tmp_path / "store"
    process = start(table, tiny_model, store)
    wait_for(process, store, 2)
    assert sessions.kill_one(process.pid, "MapWorker"), "no worker was there to kill"
    wait_for(process, store, 5)
    sessions.kill_all(process)
    assert not list(store.glob("images/*/*/manifest.json")), "nobody sees half"
    done = {path.name for path in records(store)}
    kept = {path: path.stat().st_mtime_ns for path in store.glob("images/*/*/part-*")}
    assert 5 <= len(done) < SHARDS
    output, code = finish(start(table, tiny_model, store))
    assert code == 0, output
    uri = uri_of(output)
    assert contents(uri) == quiet
    redone = [path for path, time_ns in kept.items() if path.stat().st_mtime_ns != time_ns]
    assert redone == [], "what was committed is left alone"
    assert not list(store.glob("images/*/*/staging"))
    verify.run(VerifyConfig(uri=uri))


def test_a_run_that_is_interrupted_says_how_to_go_on_and_two_at_once_do_no_harm(table, tiny_model, quiet, tmp_path):
    store = tmp_path / "store"
    process = start(table, tiny_model, store)
    wait_for(process, store, 2)
    os.kill(process.pid, signal.SIGINT)
    output, code = finish(process)
    assert code == 130, output
    assert re.search(rf"stopped; \d+ of {SHARDS} shards are done and kept at .*same command again", output)
    both = [finish(each) for each in [start(table, tiny_model, store) for _ in range(2)]]
    assert [code for _, code in both] == [0, 0], both
    assert len({uri_of(output) for output, _ in both}) == 1
    assert contents(uri_of(both[0][0])) == quiet


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
    fault_proxy.rules(*[{**rule, "prob": 1, "times": 1} for rule in WEATHER], *WEATHER)
    output, code = finish(start(f"{bucket}/in/t.csv", tiny_model, f"{bucket}/store", AWS_ENDPOINT_URL=fault_proxy.url))
    faults = {kind for _, kind in fault_proxy.done()}
    fault_proxy.rules()
    assert code == 0, output
    assert faults == {rule["kind"] for rule in WEATHER}
    made = contents(uri_of(output))
    assert made["/numerics.json"] == quiet["/numerics.json"]
    assert len(made) == len(quiet)
    verify.run(VerifyConfig(uri=uri_of(output)))
