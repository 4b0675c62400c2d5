"""The service while engines die, clients dawdle or vanish, the store goes away and models change: no answer is wrong.

Every answer is held against `Worker.paint` of the same requests by the version that the answer names.
"""

import base64
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import ray
import s3fs
from conftest import ROOT
from support.models import publish

from pipelines import registry, serve
from pipelines.config import PromoteConfig, RollbackConfig, ServeConfig
from pipelines.images import from_png
from pipelines.model import load_model
from pipelines.requests import ImageRequest
from pipelines.serve.catalogue import open_version
from pipelines.worker import Worker, picture_seed

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600), pytest.mark.usefixtures("one_thread", "ray_session")]
PATIENCE_S = 60.0
# An engine is another process that imports torch: what waits for one to start waits so long at most.
START_S = 90.0
SETTINGS = {"name": "tiny", "lanes": 8, "threads": 1, "watch": 0.3, "port": 0, "drain": 30.0}
LONG = {"steps": 1000, "n": 16, "seed": 1}


class Store:
    """A store on disk with two versions of a model, the first of which is live."""

    def __init__(self, folder):
        self.folder = folder
        self.first, self.second = publish(folder, 1, age=10), publish(folder, 2)
        self.promote(self.first)

    def promote(self, uri):
        registry.promote(PromoteConfig(model=uri, by="ada", force=True, reason="trial"))

    def roll_back(self):
        registry.roll_back(RollbackConfig(store=str(self.folder), name="tiny", by="ada"))


def digest_of(uri):
    return open_version("tiny", uri).digest


@contextlib.contextmanager
def running(store, **settings):
    """URL of a service of a store."""
    url = serve.start(ServeConfig(store=str(store.folder), **{**SETTINGS, **settings}))
    try:
        yield url
    finally:
        serve.stop()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def pair(store):
    """URL of a service with two engines."""
    with running(store, replicas=2) as url:
        yield url


@pytest.fixture
def steady(pair, store):
    """The same, with both engines there, nothing to do, and the first version live."""
    wait_for("two engines", lambda: len(engines()) == 2, START_S)
    wait_for("the first version", lambda: live_digest(pair) == digest_of(store.first))
    wait_for("idle engines", lambda: pending() == 0)
    return pair


def wait_for(what, condition, patience=PATIENCE_S):
    """Until `condition()` holds; whatever it returns."""
    deadline = time.monotonic() + patience
    while not (found := condition()):
        assert time.monotonic() < deadline, f"no {what} in {patience:g} s"
        time.sleep(0.05)
    return found


def engines():
    """The actors of all engines that can be asked, by their pids."""

    def pid_if_ready(self):
        engine = self._replica_impl._user_callable_wrapper._callable
        return os.getpid() if hasattr(engine, "_watching") else None  # what its start ends with

    found = {}
    for told in ray.util.list_named_actors(all_namespaces=True):
        if told["namespace"] == "serve" and "#engine#" in told["name"]:
            with contextlib.suppress(ValueError, ray.exceptions.RayError):
                actor = ray.get_actor(told["name"], namespace="serve")
                pid = ray.get(actor.__ray_call__.remote(pid_if_ready), timeout=START_S)
                if pid is not None:
                    found[pid] = actor
    return found


def pending():
    """Denoiser calls still to make, by all engines."""

    def load(self):
        replica = self._replica_impl._user_callable_wrapper._callable
        return sum(each.loop.pending_calls for each in replica._loaded.values())

    return sum(ray.get([actor.__ray_call__.remote(load) for actor in engines().values()]))


def break_engines(actor):
    """Have the next tick of all versions of an engine raise."""

    def broken(self):
        def tick():
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        replica = self._replica_impl._user_callable_wrapper._callable
        for each in replica._loaded.values():
            each.loop.engine.tick = tick

    ray.get(actor.__ray_call__.remote(broken))


def live_digest(url):
    return httpx.get(f"{url}/v1/models").json()["data"][0]["digest"]


class Load:
    """Threads that ask for pictures one after another, until they are told to stop; all that they were answered."""

    def __init__(self, url, senders=6, steps=(20, 40)):
        self.url, self.steps, self.answers, self.failures = url, steps, [], []
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(senders)]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        self.more(2)
        return self

    def __exit__(self, *_):
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    def more(self, count):
        """Wait until so many more answers have come."""
        wanted = len(self.answers) + count
        wait_for("answers", lambda: len(self.answers) >= wanted or self.failures, START_S)

    def _ask(self, number):
        with httpx.Client(base_url=self.url, timeout=START_S) as client:
            for count in range(10_000):
                if self._stopped.is_set():
                    return
                body = body_of(number * 10_000 + count, self.steps[count % len(self.steps)])
                answer = client.post("/v1/images/generations", json=body)
                if answer.status_code == 200:
                    self.answers.append((body, answer.json()))
                else:
                    self.failures.append((body, answer.status_code, answer.text))


def body_of(seed, steps):
    """A request that differs in all that a batch may hold."""
    kinds = (
        {"prompt": "cat"},
        {"prompt": "dog", "n": 2},
        {"sampler": "ddpm"},
        {"prompt": "cat", "guidance_scale": 1.0},
    )
    return {"seed": seed, "steps": steps, **kinds[seed % 4]}


def check(answers, *versions):
    """Every answer has the bytes of the version that it names, which is one of these; how many each has answered."""
    counts = []
    for uri in versions:
        worker, own = Worker(load_model(uri), lanes=8, threads=1), []
        for body, answer in answers:
            if answer["version"] == worker.model.digest:
                own.append((body, [from_png(base64.b64decode(item["b64_json"])) for item in answer["data"]]))
        requests = [request for body, _ in own for request in requests_of(body)]
        painted = iter(worker.paint(requests))
        for body, pictures in own:
            assert len(pictures) == body.get("n", 1)
            for picture in pictures:
                assert np.array_equal(picture, next(painted)), body
        counts.append(len(own))
    assert sum(counts) == len(answers), "an answer by a version that was never live"
    return counts


def requests_of(body):
    """The pictures that a body asks for."""
    fields = {name: value for name, value in body.items() if name not in ("seed", "n")}
    return [ImageRequest(seed=picture_seed(body["seed"], index), **fields) for index in range(body.get("n", 1))]


def test_an_engine_killed_under_load_loses_no_request(steady, store):
    with Load(steady) as load:
        for _ in range(2):
            wait_for("two engines", lambda: len(engines()) == 2, START_S)
            wait_for("work", lambda: pending() > 100)
            os.kill(next(iter(engines())), signal.SIGKILL)
            load.more(12)
    assert not load.failures
    check(load.answers, store.first)


def test_an_engine_that_fails_loses_no_request_and_is_replaced(steady, store):
    before = set(engines())
    with Load(steady) as load:
        wait_for("work", lambda: pending() > 100)
        broken = next(iter(engines().items()))
        break_engines(broken[1])
        load.more(12)
        wait_for("another engine", lambda: broken[0] not in engines() and len(engines()) == 2, START_S)
        load.more(12)
    assert not load.failures
    assert before - set(engines()) == {broken[0]}
    check(load.answers, store.first)


def raw_request(url, body, path="/v1/images/generations"):
    """A connection, and the bytes of a request."""
    host, port = re.fullmatch(r"http://(.+):(\d+)", url).groups()
    data = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    return socket.create_connection((host, int(port)), timeout=PATIENCE_S), head.encode() + data


def read_until(connection, end, at_a_time=4096):
    """What comes until these bytes have come."""
    data = b""
    while end not in data:
        more = connection.recv(at_a_time)
        assert more, f"closed after {data[-300:]!r}"
        data += more
    return data


def read_answer(connection):
    """Status and body of an answer after which the connection stays open."""
    head, _, data = read_until(connection, b"\r\n\r\n").partition(b"\r\n\r\n")
    length = int(re.search(rb"(?i)content-length: (\d+)", head).group(1))
    while len(data) < length:
        data += connection.recv(65536)
    return int(head.split()[1]), json.loads(data)


def test_clients_that_send_or_read_slowly_hold_up_nobody(steady, store):
    slow = [raw_request(steady, body_of(seed, 20)) for seed in range(20)]
    stream = {"steps": 200, "seed": 7, "n": 4, "stream": True, "partial_images": 50}
    connection, data = raw_request(steady, stream)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.sendall(data)
    for sender, sent in slow:
        sender.sendall(sent[:-10])
    began = time.monotonic()
    with Load(steady, steps=(20,)) as load:
        load.more(30)
    assert not load.failures
    assert time.monotonic() - began < PATIENCE_S / 2
    answers = []
    for number, (sender, sent) in enumerate(slow):
        sender.sendall(sent[-10:])
        status, answer = read_answer(sender)
        assert status == 200, answer
        answers.append((body_of(number, 20), answer))
        sender.close()
    told = read_until(connection, b"\r\n0\r\n\r\n", 1000).decode()
    connection.close()
    events = [json.loads(data) for data in re.findall(r"^data: (.*)$", told, flags=re.M)]
    ends = sorted((event for event in events if event["type"].endswith("completed")), key=lambda event: event["index"])
    answers.append((stream_body(stream), {"version": ends[0]["version"], "data": ends}))
    check([*load.answers, *answers], store.first)


def stream_body(body):
    """What a streamed body asks for, as one that is not streamed."""
    return {name: value for name, value in body.items() if name not in ("stream", "partial_images")}


@pytest.mark.parametrize("kind", ["while it waits", "in its stream", "while it sends"])
def test_a_client_that_vanishes_frees_its_lanes_at_once(steady, kind):
    stream = {"stream": True, "partial_images": 100} if kind == "in its stream" else {}
    connection, data = raw_request(steady, {**LONG, **stream})
    if kind == "while it sends":
        connection.sendall(data[:-1])
        connection.close()
        assert httpx.post(f"{steady}/v1/images/generations", json={"steps": 2}, timeout=5).status_code == 200
        return
    connection.sendall(data)
    wait_for("work", lambda: pending() > 4000)
    if stream:
        read_until(connection, b"partial_image")
    connection.close()
    began = time.monotonic()
    wait_for("idle engines", lambda: pending() == 0, 5)
    assert time.monotonic() - began < 3


def test_a_promotion_and_a_roll_back_under_load_lose_no_request_and_each_answer_names_its_version(steady, store):
    first, second = digest_of(store.first), digest_of(store.second)
    with Load(steady) as load:
        for change, digest in ((lambda: store.promote(store.second), second), (store.roll_back, first)) * 2:
            change()
            began = time.monotonic()
            wait_for("the change", lambda digest=digest: live_digest(steady) == digest)
            print(f"followed after {time.monotonic() - began:.1f} s")
            load.more(12)
    assert not load.failures
    assert all(check(load.answers, store.first, store.second))


def test_a_damaged_model_is_not_served_the_one_before_is_and_it_is_told(steady, store):
    third = publish(store.folder, 3)
    weights = Path(third) / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    with Load(steady) as load:
        store.promote(third)
        told = wait_for("a word of it", lambda: httpx.get(f"{steady}/readyz").json()["waiting"])
        assert told == ["tiny"]
        assert httpx.get(f"{steady}/readyz").status_code == 200
        load.more(6)
        os.kill(next(iter(engines())), signal.SIGKILL)  # the next engine finds the damaged version live
        wait_for("two engines", lambda: len(engines()) == 2, START_S)
        load.more(12)
        store.roll_back()
        wait_for("an end of it", lambda: not httpx.get(f"{steady}/readyz").json()["waiting"])
    assert not load.failures
    assert check(load.answers, store.first) == [len(load.answers)]


def test_while_the_store_is_away_the_version_that_is_there_answers_and_afterwards_changes_are_followed(steady, store):
    away = store.folder.with_name("away")
    with Load(steady) as load:
        store.folder.rename(away)
        try:
            wait_for("a word of it", lambda: httpx.get(f"{steady}/readyz").json()["waiting"])
            load.more(12)
        finally:
            away.rename(store.folder)
        wait_for("an end of it", lambda: not httpx.get(f"{steady}/readyz").json()["waiting"])
        store.promote(store.second)
        wait_for("the change", lambda: live_digest(steady) == digest_of(store.second))
        load.more(12)
        store.promote(store.first)
    assert not load.failures
    assert all(check(load.answers, store.first, store.second))


@pytest.fixture
def alone():
    """No other service holds the machine's two CPUs."""
    serve.stop()


def test_the_only_engine_dies_or_fails_and_its_requests_wait_for_the_next_one(alone, store):
    with running(store, replicas=1) as url:
        for harm in ("killed", "broken"):
            with Load(url, senders=3) as load:
                wait_for("work", lambda: pending() > 50)
                pid, actor = next(iter(engines().items()))
                if harm == "killed":
                    os.kill(pid, signal.SIGKILL)
                else:
                    break_engines(actor)
                load.more(6)
            assert not load.failures, harm
            assert pid not in engines()
            check(load.answers, store.first)


def test_engines_come_with_the_load_from_none_and_go_again(alone, store):
    with running(store, replicas=0, max_replicas=2, calls_per_replica=100, rest_after=1.0) as url:
        assert not engines()
        answers = []
        body = body_of(1, 20)
        answers.append((body, httpx.post(f"{url}/v1/images/generations", json=body, timeout=START_S).json()))
        assert len(engines()) == 1
        with Load(url, senders=8, steps=(60, 80)) as load:
            wait_for("two engines", lambda: len(engines()) == 2, START_S)
        assert not load.failures
        wait_for("no engines", lambda: not engines(), START_S)
        check([*answers, *load.answers], store.first)


class Service:
    """`python -m pipelines serve` in a process of its own."""

    def __init__(self, folder, *flags, **environment):
        self.log = folder / "log"
        settings = {**SETTINGS, "drain": 60.0}
        given = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pipelines", "serve", *given, *map(str, flags)], cwd=ROOT, stdout=log,
                stderr=subprocess.STDOUT, env={**os.environ, **environment}, start_new_session=True,
            )  # fmt: skip

    def url(self):
        """Where it listens, once it does."""

        def told():
            assert self.process.poll() is None, self.log.read_text()
            return re.search(r"^serve: (http\S+)", self.log.read_text(), flags=re.M)

        return wait_for("service", told, START_S).group(1)


@pytest.fixture(scope="module")
def apart(s3_endpoint, fault_proxy, tmp_path_factory):
    """A service in a process of its own, whose store is S3 behind a proxy, and its versions: the first one is live."""
    bucket = f"s3://test-{uuid.uuid4().hex[:12]}"
    s3fs.S3FileSystem().mkdir(bucket)
    fault_proxy.rules()
    versions = publish(bucket, 1), publish(bucket, 2)
    registry.promote(PromoteConfig(model=versions[0], by="ada", force=True, reason="trial"))
    service = Service(tmp_path_factory.mktemp("apart"), "--store", bucket, AWS_ENDPOINT_URL=fault_proxy.url)
    try:
        yield service, versions
    finally:
        fault_proxy.rules()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(service.process.pid, signal.SIGKILL)


def test_while_s3_is_broken_the_version_that_is_there_answers_and_afterwards_changes_are_followed(apart, fault_proxy):
    service, (first, second) = apart
    url = service.url()
    with Load(url, senders=3) as load:
        fault_proxy.rules({"match": ".*", "kind": "slowdown"}, {"match": ".*", "kind": "reset", "prob": 0.5})
        registry.promote(PromoteConfig(model=second, by="ada", force=True, reason="trial"))
        wait_for("faults", lambda: len(fault_proxy.done()) > 5)
        load.more(12)
        assert live_digest(url) == digest_of(first)
        fault_proxy.rules()
        wait_for("the change", lambda: live_digest(url) == digest_of(second))
        load.more(6)
    assert not load.failures
    assert all(check(load.answers, first, second))


def test_a_service_asked_to_stop_answers_what_runs_and_ends_well(apart):
    service, versions = apart
    url, body = service.url(), {"steps": 1000, "n": 8, "seed": 3, "prompt": "cat"}
    connection, data = raw_request(url, {**body, "stream": True, "partial_images": 10})
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(httpx.post, f"{url}/v1/images/generations", json=body, timeout=START_S)
        connection.sendall(data)
        told = read_until(connection, b"partial_image")  # of two requests that are under way
        assert not answer.done()
        service.process.send_signal(signal.SIGTERM)
        told += read_until(connection, b"\r\n0\r\n\r\n")
        assert answer.result().status_code == 200, answer.result().text
    connection.close()
    assert told.count(b"event: image_generation.completed") == body["n"]
    assert service.process.wait(PATIENCE_S) == 0, service.log.read_text()
    check([(body, answer.result().json())], *versions)
