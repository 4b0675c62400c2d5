import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
import uuid
from pathlib import Path

import pytest
from support import nodes

os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"
os.environ["DO_NOT_TRACK"] = "1"

# Files that take longest, in the order in which they begin, so that two workers end together.
LONGEST = (
    "test_train", "test_ingest", "test_end_to_end", "test_docs", "test_serve", "test_bulk", "test_budget", "test_page",
    "test_exchange", "test_service", "test_evaluate", "test_memory", "test_cluster", "test_engine", "test_lineage",
)  # fmt: skip

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
SWIFT = ROOT / ".venv-s3/bin/python"


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(scope="module")
def one_thread():
    """Tensors of a few numbers: a second thread would only be waited for, on a busy machine for long."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def one_address_only():
    """Skips what test_cluster_chaos tries on nodes with addresses of their own, where there can be such nodes."""
    if nodes.missing() is None and SWIFT.exists():
        pytest.skip("tried by test_cluster_chaos on nodes with addresses of their own")


@pytest.fixture(scope="session")
def ray_session(s3_environment):
    """One Ray for all tests that need it, whose workers know the S3 endpoint where there is one."""
    from pipelines import jobs

    jobs.connect()
    yield
    jobs.disconnect()


@pytest.fixture(scope="session")
def s3_environment(tmp_path_factory):
    """A real S3 endpoint on loopback, its environment set for this process and what it starts; None without Swift."""
    if not SWIFT.exists():
        yield None
        return
    with s3_server(tmp_path_factory.mktemp("swift")) as environment:
        yield environment


@contextlib.contextmanager
def s3_server(folder, address="127.0.0.1"):
    """A real S3 endpoint that listens on an address; its environment is set for this process and what it starts."""
    port = four_free_ports()
    command = [str(SWIFT), str(ROOT / "tests/support/swift_s3.py"), str(folder), str(port), address]
    environment = {
        "AWS_ACCESS_KEY_ID": "test:tester",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_ENDPOINT_URL": f"http://{address}:{port}",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process, pytest.MonkeyPatch.context() as patch:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("ready"), "the S3 endpoint did not start"
            for name, value in environment.items():
                patch.setenv(name, value)
            yield environment
        finally:
            process.send_signal(signal.SIGTERM)


@pytest.fixture(scope="session")
def s3_endpoint(s3_environment):
    """The environment of a real S3 endpoint."""
    if s3_environment is None:
        pytest.skip("no S3 endpoint: run `make setup`, which installs it into .venv-s3")
    return s3_environment


class FaultProxy:
    """A proxy before the S3 endpoint that does to requests what its rules say."""

    def __init__(self, port):
        self.url = f"http://127.0.0.1:{port}"

    def rules(self, *rules):
        """Take these rules instead of any before; each is a dict with match, kind, times …"""
        self._ask(json.dumps(rules).encode())

    def weather(self, rules, *first):
        """Take `first` and these rules, each of which does its harm once for certain, and then by chance."""
        self.rules(*first, *({**rule, "prob": 1, "times": 1} for rule in rules), *rules)

    def done(self):
        """The faults done since, as [request, kind]."""
        return self._ask(None)["log"]

    def _ask(self, data):
        with urllib.request.urlopen(f"{self.url}/__faults", data=data, timeout=10) as answer:
            return json.load(answer)


@pytest.fixture(scope="session")
def fault_proxy(s3_endpoint):
    """A fault-injecting proxy before the S3 endpoint."""
    upstream, port = s3_endpoint["AWS_ENDPOINT_URL"].rsplit(":", 1)[1], four_free_ports()
    command = [sys.executable, str(ROOT / "tests/support/faultproxy.py"), str(port), upstream]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("ready"), "the fault proxy did not start"
        yield FaultProxy(port)
        process.terminate()


@pytest.fixture
def bucket(s3_endpoint):
    """A new bucket's URI."""
    import s3fs

    name = f"test-{uuid.uuid4().hex[:12]}"
    s3fs.S3FileSystem().mkdir(name)
    return f"s3://{name}"


@pytest.fixture(params=["disk", "s3"])
def store(request, tmp_path):
    """A store's URI, on disk and in a real S3 bucket."""
    return str(tmp_path / "store") if request.param == "disk" else request.getfixturevalue("bucket") + "/store"


@pytest.fixture(scope="session")
def cartoon_shards(tmp_path_factory):
    """Folder with two tar shards of 8x8 cartoons, 96 pictures in all."""
    from pipelines.cartoons import tar_shard

    folder = tmp_path_factory.mktemp("cartoons")
    for number in range(2):
        (folder / f"cartoons-{number}.tar").write_bytes(tar_shard(0, number * 48, 48, 8))
    return folder


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory, cartoon_shards, ray_session):
    """URI of a dataset of 8x8 cartoons."""
    from pipelines import ingest
    from pipelines.config import IngestConfig

    store = str(tmp_path_factory.mktemp("store"))
    return ingest.run(
        IngestConfig(store=store, name="tiny", source=[str(cartoon_shards)], resolution=8, heldout=0.2)
    ).uri


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, tiny_dataset):
    """URI of a model of 8x8 cartoons after three steps."""
    from pipelines.config import TrainConfig
    from pipelines.train import Host, find, train_on_rank

    config = TrainConfig(store=str(tmp_path_factory.mktemp("models")), dataset=tiny_dataset, **TINY)
    train_on_rank(config, host=Host(emit=lambda _: None))
    found = find(config)
    assert found is not None
    return found.uri


TINY = {"name": "tiny", "preset": "tiny", "steps": 3, "global_batch_size": 8, "warmup": 1, "threads": 1}


def four_free_ports():
    """First of four neighbouring ports that nothing listens on."""
    for _ in range(100):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            first = probe.getsockname()[1]
        if first < 65000 and all(_is_free(first + number) for number in range(4)):
            return first
    raise RuntimeError("no four neighbouring free ports in 100 tries")


def _is_free(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0
