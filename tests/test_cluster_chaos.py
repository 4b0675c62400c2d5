"""Three nodes with addresses of their own, of which one is lost in every stage: what is made is that of a quiet run."""

import http.client
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import time
import uuid
from collections import defaultdict

import grpc
import pytest
import ray.core.generated
from conftest import SHARED, SWIFT, s3_server
from pydantic import SecretStr
from support import nodes
from test_bulk_chaos import contents
from test_train_chaos import Result, Run, distance, resumed_at, told

from pipelines import cluster as jobs
from pipelines import storage
from pipelines.cartoons import tar_shard
from pipelines.config import PipelineError
from pipelines.dataset import open_dataset
from pipelines.flow_config import Cluster, JobOptions

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]
STEPS, EVERY, ROWS, SHARD = 160, 10, 96, 6
NOTICE_S, PAUSE_S = 30.0, 0.2
# Settings by their names on the command line; those of a stage in a flow begin with its name.
INGEST = {"name": "three", "resolution": 16, "shard-size": 300}
TRAIN = {
    "preset": "tiny", "steps": STEPS, "global-batch-size": 8, "warmup": 10, "validate-every": 80, "threads": 1,
    "workers": 2, "checkpoint-every": EVERY, "keep-last": 1000,
}  # fmt: skip
GENERATE = {"count": ROWS, "shard-size": SHARD, "steps": 150, "workers": 2}
EVALUATE = {
    "samples": 8, "edits": 4, "steps": 3, "feature-steps": 20, "curve-samples": 0, "likelihood": 2,
    "likelihood-steps": 2, "bootstrap": 20,
}  # fmt: skip


def flags(settings, stage=""):
    return [word for name, value in settings.items() for word in (f"--{stage}{name}", str(value))]


class Flow(Run):
    """`python flows.py FLOW`, in the same way."""

    program = ("flows.py",)

    def job(self, stage):
        """The latest job of a stage that the flow has told of; None before."""
        return (re.findall(rf"^{stage}: job ({stage}-\w+-\d+) on", self.output, flags=re.M) or [None])[-1]


class Place:
    """What a trial works on: the pictures' folder and the store, both on S3."""

    def __init__(self, bucket):
        self.pictures, self.store, self.quiet = f"{bucket}/in", f"{bucket}/store", f"{bucket}/quiet"

    def units(self):
        """Sources that ingestion has read."""
        return len(found(f"{self.store}/datasets", r"/staging/units/(\d+)\.json$"))

    def shards(self):
        """Shards of images that bulk generation has made."""
        return len(found(f"{self.store}/images", r"/staging/shards/([^/]*)\.json$"))


def found(folder, pattern):
    """What of the objects' names is in the pattern's group, by URI; asked for in turns, not to load the endpoint."""
    time.sleep(PAUSE_S)
    return {info.uri: at[1] for info in storage.list_if_any(folder) if (at := re.search(pattern, info.uri))}


def checkpoints(store):
    """Steps of the checkpoints of a store that have their manifest, by URI."""
    named = found(f"{store}/models", r"/checkpoints/step-(\d+)/manifest\.json$")
    return {uri: int(step) for uri, step in named.items()}


@pytest.fixture(scope="module")
def network():
    """A network of this machine's own."""
    lacking = nodes.missing() or (None if SWIFT.exists() else "no S3 endpoint: run `make setup`")
    if lacking:
        pytest.skip(lacking)
    made = nodes.Network()
    yield made
    made.close()


@pytest.fixture(scope="module")
def endpoint(network, tmp_path_factory):
    """The environment of an S3 endpoint that all nodes reach."""
    import s3fs

    # Filesystems are kept by their settings, and the endpoint is not one of these.
    s3fs.S3FileSystem.clear_instance_cache()
    with s3_server(tmp_path_factory.mktemp("swift"), network.address) as environment:
        yield environment
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="module")
def place(endpoint):
    """Photographs of clothes, or cartoons where they are not there, in tars on S3."""
    import s3fs

    bucket = f"s3://three-{uuid.uuid4().hex[:8]}"
    s3fs.S3FileSystem().mkdir(bucket)
    made = Place(bucket)
    tars = sorted((SHARED / "data/clothing").glob("*.tar"))
    shards = {path.name: path.read_bytes() for path in tars} or {
        f"cartoons-{number}.tar": tar_shard(0, number * 100, 100, 64) for number in range(6)
    }
    for name, data in shards.items():
        storage.write_bytes(f"{made.pictures}/{name}", data)
    made.sources = len(shards)
    return made


class Quiet:
    """Stages of this machine alone, that nothing disturbs."""

    def __init__(self, place, folder):
        self.place, self.folder = place, folder
        self.dataset = self.make("ingest", "--source", f"{place.pictures}/*.tar", *flags(INGEST))
        # How often a checkpoint is written is no part of what is made.
        settings = flags(TRAIN | {"checkpoint-every": STEPS})
        self.output = f"train: {self.make('train', '--dataset', self.dataset, '--name', 'three', *settings)}\n"

    def make(self, stage, *words):
        """The URI of what a stage has made."""
        code, output = Run(self.folder, stage, "--store", self.place.quiet, *words).finish()
        assert code == 0, output
        return re.findall(rf"^{stage}: (s3://\S+)$", output, flags=re.M)[-1]


@pytest.fixture(scope="module")
def quiet(place, tmp_path_factory):
    """What a run makes that nothing disturbs."""
    return Quiet(place, tmp_path_factory.mktemp("quiet"))


@pytest.fixture(scope="module")
def cluster(network, endpoint, tmp_path_factory):
    """A head and two nodes, that ask for a token."""
    made = None
    try:
        made = nodes.Cluster(network, tmp_path_factory.mktemp("nodes") / "ray", endpoint)
        made.add(2)
        yield made
    finally:
        if made:
            made.close()


@pytest.fixture
def flow(cluster, tmp_path):
    """Starts a flow that has its stages run on the cluster; all are dead at the end."""
    runs = []

    def start(name, *words):
        environment = {"PREFECT_HOME": str(tmp_path / "prefect"), "MPLCONFIGDIR": str(tmp_path), **cluster.opened}
        runs.append(Flow(tmp_path, name, "--cluster", cluster.job_server, *words, **environment))
        return runs[-1]

    yield start
    for run in runs:
        run.kill()


class Trial:
    """A flow whose nodes are lost, and for how long each loss was felt."""

    def __init__(self, cluster, run):
        self.cluster, self.run, self.figures = cluster, run, {}

    def lose(self, stage, what, goes_on, silently=False, drives=False):
        """Kill the node on which a stage's job is, or the other one; a fresh one joins; until `goes_on()`."""
        driver = self.cluster.node_of(self.run.job(stage))
        others = [node for node in self.cluster.nodes if node not in (self.cluster.head, driver)]
        since = time.monotonic()
        self.cluster.kill(driver if drives else others[0], silently)
        self.cluster.add()
        joined = time.monotonic() - since
        self.run.wait_for(what, goes_on)
        self.figures[stage] = f"fresh node after {joined:.0f} s, {what} after {time.monotonic() - since:.0f} s"


def test_nodes_lost_during_ingestion_training_and_bulk_work_change_no_byte(quiet, cluster, flow, place):
    began = time.monotonic()
    words = ["--source", f"{place.pictures}/*.tar", "--store", place.store, *flags(INGEST), *flags(TRAIN, "train.")]
    words += [*flags(GENERATE, "generate."), *flags(EVALUATE, "evaluate.")]
    # Jobs' own processes are on the nodes that come and go, so that they are lost as well.
    run = flow("pipeline", *words, "--job.resources", '{"worker": 0.1}')
    trial = Trial(cluster, run)

    run.wait_for("sources read", lambda: 0 < place.units() < place.sources)
    trial.lose("ingest", "job submitted again", lambda: run.job("ingest").endswith("-2"), drives=True)

    run.wait_for("checkpoint", lambda: max(checkpoints(place.store).values(), default=0) >= 30)
    trial.lose("train", "state read again", lambda: resumed_at(run.output), silently=True)
    assert resumed_at(run.output)[0] < STEPS

    run.wait_for("shards", lambda: place.shards() >= 2)
    before = place.shards()
    trial.lose("generate", "next shard", lambda: place.shards() > before + 2 or place.shards() == 0)
    assert before < ROWS // SHARD

    code, output = run.finish()
    assert code == 0, output
    told("three nodes", seconds=round(time.monotonic() - began), **trial.figures)
    assert len(re.findall("was lost .*submitting it again", output)) == 1
    same_datasets(open_dataset(uri_of("ingest", output)), open_dataset(quiet.dataset))
    assert Result(output).bits == Result(quiet.output).bits
    images = quiet.make("generate", "--model", Result(output).model, "--name", "three", *flags(GENERATE))
    assert contents(uri_of("generate", output)) == contents(images)


def uri_of(stage, output):
    return re.findall(rf"^{stage}: (s3://\S+)$", output, flags=re.M)[-1]


def same_datasets(one, other):
    """Whether all but the sources' addresses is the same, the shards by their digests."""
    for key in ("shards", "counts", "mean", "sigma_data", "thumbnails", "duplicates", "contact"):
        assert one.manifest[key] == other.manifest[key], key


def newest_world(store):
    """Workers that wrote the newest checkpoint; 0 before there is one."""
    saved = checkpoints(store)
    return storage.read_json(max(saved, key=saved.get))["world"] if saved else 0


def test_a_node_that_will_be_taken_away_has_its_work_saved_and_one_that_joins_is_used(quiet, cluster, flow, place):
    store, going = f"{place.store}-elastic", cluster.nodes[-1]
    # Validation is a brake: on a quick machine the run would be over before the fresh node is there.
    settings = TRAIN | {"validate-every": 2, "min-workers": 1, "resize-every": 2}
    run = flow("train", "--dataset", quiet.dataset, "--store", store, "--name", "three", *flags(settings))
    run.wait_for("progress", lambda: re.search(r"^train \[.* \d+/", run.output, flags=re.M))
    deadline = time.monotonic() + NOTICE_S
    drain(cluster, going)
    saving = run.wait_for("notice", lambda: re.search(r"taken away; saving step (\d+)", run.output))
    run.wait_for("checkpoint", lambda: int(saving[1]) in checkpoints(store).values())
    left, since = deadline - time.monotonic(), time.monotonic()
    cluster.kill(going)  # sooner than was announced
    run.wait_for("checkpoint of one worker", lambda: newest_world(store) == 1)
    alone = time.monotonic() - since
    cluster.add()
    run.wait_for("checkpoint of two workers again", lambda: newest_world(store) == 2)
    both = time.monotonic() - since
    code, output = run.finish()
    assert code == 0, output
    apart = distance(Result(output), Result(quiet.output))
    told(
        "notice, and elastic", saved=saving[1], seconds_before_deadline=round(left, 1), went_on_at=resumed_at(output),
        seconds_to_one_worker=round(alone), seconds_to_two=round(both), distance=apart,
    )  # fmt: skip
    assert left > 0
    assert resumed_at(output)[0] >= int(saving[1])
    assert apart < 1e-4


def drain(cluster, node):
    """Give notice of a node, as a cloud's spot notice is passed on."""
    ray = os.path.join(os.path.dirname(sys.executable), "ray")
    words = ["drain-node", "--address", cluster.gcs, "--node-id", cluster.alive()[node.address]]
    words += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "trial"]
    words = cluster.head.command(ray, *words, "--deadline-remaining-seconds", int(NOTICE_S))
    done = subprocess.run(words, env=cluster.environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# What anybody may read: the dashboard's page without its data, whether a token is asked for, whether it lives, metrics.
OPEN_PAGES = {"/", "/favicon.ico", "/api/authentication_mode", "/api/gcs_healthz"}
OPEN_AGENT = {"/api/local_raylet_healthz", "/api/healthz"}
PAGES = OPEN_PAGES | OPEN_AGENT | {
    "/api/version", "/api/jobs/", "/api/job_agent/jobs/", "/nodes?view=summary", "/api/v0/nodes", "/api/v0/tasks",
    "/api/v0/logs", "/logs", "/metrics", "/api/cluster_status", "/api/serve/applications/", "/worker/traceback",
    "/api/actors/kill", "/api/packages/gcs/x", "/log_proxy", "/memory_profile", "/usage_stats_enabled",
}  # fmt: skip
OBJECT_MANAGER = [f"/ray.rpc.ObjectManagerService/{name}" for name in ("Push", "Pull", "FreeObjects")]
WORKS = """
import ray, time
ray.init(address="auto", logging_level="error")
@ray.remote(num_cpus=1)
class Held:
    def answer(self):
        return 1
held = Held.remote()
print("answered", ray.get(held.answer.remote()), flush=True)
time.sleep(600)
"""


@pytest.fixture
def held(cluster):
    """A process of a node that has the token and holds an actor there, so that workers' ports are open."""
    node = cluster.nodes[-1]
    words = node.command(sys.executable, "-c", WORKS)
    with subprocess.Popen(words, env=cluster.environment, stdout=subprocess.PIPE, text=True) as process:
        yield process.stdout.readline().strip()
        process.kill()


def asked(address, port, path, method="GET", body=None, token=None):
    """Status and the first bytes of an HTTP server's answer; 0 where it speaks something else."""
    connection = http.client.HTTPConnection(address, port, timeout=10)
    try:
        connection.request(method, path, body, {"Authorization": f"Bearer {token}"} if token else {})
        answer = connection.getresponse()
        return answer.status, answer.read(40)
    except (http.client.HTTPException, OSError):
        return 0, b""
    finally:
        connection.close()


def every_method():
    """All methods of Ray's services, as gRPC calls them."""
    methods = set()
    for each in pkgutil.iter_modules(ray.core.generated.__path__):
        if each.name.endswith("_pb2"):
            described = importlib.import_module(f"ray.core.generated.{each.name}").DESCRIPTOR
            for service in described.services_by_name.values():
                methods |= {f"/{service.full_name}/{method.name}" for method in service.methods}
    return sorted(methods) + OBJECT_MANAGER


def called(address, port, methods):
    """What a gRPC server answers to each method without a token: methods by status."""
    answers = defaultdict(list)
    with grpc.insecure_channel(f"{address}:{port}", options=[("grpc.enable_retries", 0)]) as channel:
        for method in methods:
            try:
                channel.unary_unary(method)(b"", timeout=10)
                answers["OK"].append(method)
            except grpc.RpcError as error:
                answers[error.code().name].append(method)
    return answers


def kind_of(address, port, methods):
    """What a port is, by what it answers somebody without a token."""
    status, first = asked(address, port, "/")
    if status == 200 and first.startswith(b"# HELP"):
        return "metrics"
    if status:
        opened = {path for path in PAGES if asked(address, port, path)[0] not in (401, 404, 405)}
        return f"HTTP, open {sorted(opened)}"
    answers = called(address, port, methods)
    refused = len(answers.pop("UNAUTHENTICATED", []))
    answers.pop("UNIMPLEMENTED", None)
    return f"gRPC, open {dict(answers)}" if answers else f"gRPC, {'all refused' if refused else 'no service known'}"


def test_without_the_token_nothing_that_listens_on_a_node_does_anything(cluster, held):
    assert held == "answered 1", "with the token a node's own process works"
    methods, kinds = every_method(), defaultdict(list)
    assert len(methods) > 100
    for node in cluster.nodes:
        for address, port, name in node.listening():
            if "127.0.0.1" not in address:
                kinds[kind_of(node.address, port, methods)].append(f"{node.number}:{name}")
    for kind, ports in sorted(kinds.items()):
        told(kind, ports=" ".join(ports))
    assert set(kinds) == {
        "gRPC, all refused", "metrics", f"HTTP, open {sorted(OPEN_PAGES)}", f"HTTP, open {sorted(OPEN_AGENT)}",
        "HTTP, open []",
    }  # fmt: skip


def test_without_the_token_no_job_is_submitted_and_nobody_joins(cluster, tmp_path):
    before, owned = known_jobs(cluster), tmp_path / "owned"
    job = json.dumps({"entrypoint": f"touch {owned}"})
    for path, port in (("/api/jobs/", nodes.DASHBOARD), ("/api/job_agent/jobs/", 52365)):
        assert asked(cluster.head.address, port, path, "POST", job)[0] == 401
        assert asked(cluster.head.address, port, path, "POST", job, token="0" * 64)[0] == 403
    wrong = Cluster(address=cluster.job_server, token=SecretStr("0" * 64), job=JobOptions(wait=0))
    with pytest.raises(PipelineError, match="the token is refused or missing; set RAY_AUTH_TOKEN"):
        jobs.connect(wrong)
    for token in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}):
        known = {name: value for name, value in cluster.environment.items() if not name.startswith("RAY_AUTH")}
        words = cluster.nodes[-1].command(sys.executable, "-c", WORKS)
        done = subprocess.run(words, env=known | token, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 1
        assert "answered" not in done.stdout
    assert known_jobs(cluster) == before
    assert not owned.exists()


def known_jobs(cluster):
    """Ids of all jobs, submitted ones and others."""
    return {(job["submission_id"], job["job_id"]) for job in cluster.ask("/api/jobs/")}
