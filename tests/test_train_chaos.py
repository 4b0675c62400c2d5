"""Training while processes die, nodes go, disks fill and the way to the store breaks: the weights come out the same."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
from conftest import ROOT

from pipelines import storage
from pipelines.config import AWAY_STATUS, TrainConfig
from pipelines.train import find, train_on_rank
from pipelines.train.session import Host

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]
STEPS, EVERY = 240, 20
# Settings by their names in TrainConfig.
NAMED = {
    "name": "tiny", "preset": "tiny", "global_batch_size": 8, "warmup": 10, "validate_every": 80, "threads": 1,
}  # fmt: skip
PATIENCE_S = 240.0


class Run:
    """`python -m pipelines STAGE`: a session of processes, and what it has printed."""

    program = ("-m", "pipelines")

    def __init__(self, folder, *flags, **environment):
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / f"log-{len(list(folder.glob('log-*')))}"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, *self.program, *map(str, flags)], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
                env={**os.environ, "RAY_AUTH_MODE": "disabled", **environment}, start_new_session=True,
            )  # fmt: skip

    @property
    def output(self):
        return self.log.read_text()

    @property
    def ended(self):
        return self.process.poll() is not None

    def wait_for(self, what, condition):
        """Until `condition()` holds; whatever it returns."""
        deadline = time.monotonic() + PATIENCE_S
        while not (found := condition()):
            assert not self.ended, f"ended before {what}:\n{self.output}"
            assert time.monotonic() < deadline, f"no {what} in {PATIENCE_S:g} s:\n{self.output}"
            time.sleep(0.005)
        return found

    def finish(self):
        """Exit status and output, once it has ended."""
        self.process.wait(2 * PATIENCE_S)
        return self.process.returncode, self.output

    def ranks(self):
        """Pids of the session's training processes."""
        return [pid for pid, title in processes(self.process.pid) if re.search(r"^ray::.*TrainWorker", title)]

    def kill(self):
        """SIGKILL everything in the session."""
        while found := [pid for pid, _ in processes(self.process.pid)]:
            for pid in found:
                kill(pid)
            self.process.poll()
            time.sleep(0.05)


def processes(session):
    """Pids and titles of a session's living processes."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(folder.name)) == session and (title := (folder / "cmdline").read_bytes()):
                found.append((int(folder.name), title.decode().replace("\0", " ")))
        except OSError:
            continue
    return found


def kill(pid):
    """SIGKILL, if it still lives."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, cartoon_shards):
    """URI of a dataset of 8x8 cartoons, made without a Ray of this process's own."""
    folder = tmp_path_factory.mktemp("dataset")
    place = ["--store", folder / "store", "--name", "tiny", "--heldout", "0.2"]
    code, output = Run(folder, "ingest", "--source", cartoon_shards, "--resolution", 8, *place).finish()
    assert code == 0, output
    return re.findall(r"^ingest: (\S+)$", output, flags=re.M)[-1]


@pytest.fixture(scope="module")
def settings(dataset):
    """Flags of the run that all trials repeat."""
    named = {**NAMED, "dataset": dataset, "steps": STEPS, "workers": 2}
    return ["train", *(text for name, value in named.items() for text in (f"--{name.replace('_', '-')}", value))]


@pytest.fixture(scope="module")
def undisturbed(settings, tmp_path_factory):
    """Store and result of a run that nothing disturbs, which has kept all its checkpoints."""
    store = tmp_path_factory.mktemp("undisturbed")
    run = Run(store / "logs", *settings, "--store", store, "--checkpoint-every", EVERY, "--keep-last", 100)
    code, output = run.finish()
    assert code == 0, output
    return Result(output)


@pytest.fixture
def train(settings, tmp_path):
    """Starts the run against a store; all of them are dead at the end."""
    runs = []

    def start(store, *flags, **environment):
        flags = ["--store", store, "--checkpoint-every", EVERY, *flags]
        runs.append(Run(tmp_path / "logs", *settings, *flags, **environment))
        return runs[-1]

    yield start
    for run in runs:
        run.kill()


class Result:
    """What a finished run has left in the store."""

    def __init__(self, output):
        self.model = re.findall(r"^train: (\S+/published/step-\d+)$", output, flags=re.M)[-1]
        self.run, self.step = self.model.rsplit("/published/", 1)

    @property
    def weights(self):
        return safetensors.torch.load(storage.read_bytes(f"{self.model}/model.safetensors"))

    @property
    def bits(self):
        """Digests of the model's files and of the state (weights, averages, optimiser), and the curves."""
        state = storage.read_manifest(f"{self.run}/checkpoints/{self.step}", "checkpoint")
        # The metadata of torch.distributed.checkpoint carry a random number of each writing.
        parts = {part["file"]: part["sha256"] for part in state["parts"] if part["file"] != ".metadata"}
        files = ("model.safetensors", "config.json", "curve.json", "samples.png")
        model = {name: storage.digest(storage.read_bytes(f"{self.model}/{name}")) for name in files}
        return {"state": parts, "record": state["record"], "model": model}


def distance(first, second):
    """Relative norm of the difference of two models' weights."""
    one, two = first.weights, second.weights
    assert one.keys() == two.keys()
    error = sum(float((one[name].double() - two[name].double()).square().sum()) for name in one)
    return (error / sum(float(value.double().square().sum()) for value in one.values())) ** 0.5


def saved(store):
    """Steps whose checkpoints have their manifest, in a store on disk."""
    return sorted(int(path.parent.name[5:]) for path in Path(store).glob("models/tiny/*/checkpoints/*/manifest.json"))


def half_written(store):
    """Steps whose checkpoints have a folder and no manifest."""
    folders = Path(store).glob("models/tiny/*/checkpoints/step-*")
    return [int(path.name[5:]) for path in folders if not (path / "manifest.json").exists()]


def resumed_at(output):
    """Steps at which a run has gone on."""
    return [int(step) for step in re.findall(r"^train: goes on at step (\d+) of", output, flags=re.M)]


def told(name, **figures):
    """A line of the trial's figures, shown by `-rP` or `-s`."""
    print(f"{name}: " + ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in figures.items()))


def test_workers_killed_at_random_and_a_session_in_the_midst_of_a_checkpoint_leave_the_bits_the_same(
    train, undisturbed, tmp_path
):
    chance, store, kills, waits = random.Random(1), tmp_path / "store", [], []
    run = train(store)
    for least in (40, 100):
        run.wait_for(f"checkpoint of step {least}", lambda least=least: max(saved(store), default=0) >= least)
        time.sleep(chance.uniform(0, 0.3))
        rank, before, since = chance.choice(run.ranks()), set(saved(store)), time.time()
        assert kill(rank)
        kills.append(max(before))
        run.wait_for("another start", lambda: len(resumed_at(run.output)) == len(kills))
        goes_on = time.time() - since
        at = resumed_at(run.output)[-1]
        run.wait_for("checkpoint after the kill", lambda at=at: max(saved(store)) > at)
        waits.append((round(goes_on, 1), round(time.time() - since, 1)))
    run.wait_for("checkpoint half written", lambda: half_written(store))
    run.kill()
    told("killed", workers_after_steps=kills, seconds_to_state_and_checkpoint=waits, half_written=half_written(store))
    last = max(saved(store))
    # A half-written checkpoint of a later step, whether or not the kill has left one.
    folder = next(Path(store).glob(f"models/tiny/*/checkpoints/step-{last:07}"))
    shutil.copytree(folder, folder.with_name(f"step-{last + 5:07}"), ignore=shutil.ignore_patterns("manifest.json"))
    code, output = train(store).finish()
    assert code == 0, output
    assert resumed_at(output) == [last]
    assert Result(output).bits == undisturbed.bits


WEATHER = [
    {"match": "PUT .*", "kind": "reset_upload", "prob": 0.1, "times": 1000},
    {"match": "PUT .*", "kind": "slowdown", "prob": 0.1, "times": 1000},
    {"match": "PUT .*", "kind": "lost_response", "prob": 0.1, "times": 1000},
    {"match": "(GET|HEAD) .*", "kind": "slowdown", "prob": 0.1, "times": 1000},
    {"match": ".*", "kind": "latency", "prob": 0.2, "ms": 50, "times": 1000},
]


def test_a_store_that_stays_broken_is_named_a_slow_upload_killed_and_through_bad_weather_the_bits_are_the_same(
    train, undisturbed, bucket, fault_proxy
):
    store, way = f"{bucket}/store", {"AWS_ENDPOINT_URL": fault_proxy.url}
    fault_proxy.rules({"match": "PUT .*/step-0000060/manifest.json", "kind": "reset_upload", "times": 1000})
    began = time.monotonic()
    code, output = train(store, **way).finish()
    last = output.strip().splitlines()[-1]
    told("a store that stays broken", said=last, seconds=round(time.monotonic() - began))
    assert code == AWAY_STATUS, output
    assert re.match(rf"error: {store}/models/tiny/\w+/checkpoints/step-0000060/manifest\.json: ", last)

    fault_proxy.rules({"match": "PUT .*/step-0000120/manifest.json", "kind": "latency", "ms": 60_000, "times": 1000})
    run = train(store, **way)
    run.wait_for("slow upload", fault_proxy.done)
    run.kill()
    assert resumed_at(run.output) == [40]

    fault_proxy.weather(WEATHER)
    code, output = train(store, **way).finish()
    faults = [kind for _, kind in fault_proxy.done()]
    fault_proxy.rules()
    told("bad weather", **{kind: faults.count(kind) for kind in sorted(set(faults))})
    assert code == 0, output
    assert set(faults) == {rule["kind"] for rule in WEATHER}
    assert resumed_at(output) == [100]
    assert Result(output).bits == undisturbed.bits


def test_a_run_asked_to_stop_saves_says_how_to_go_on_and_ends_with_the_same_bits(train, undisturbed, tmp_path):
    store, last = tmp_path / "store", 0
    for number in (signal.SIGINT, signal.SIGTERM):
        run = train(store, "--checkpoint-every", 10_000)
        sign = r"^train: goes on at" if last else r"^train \[.* \d+/"
        run.wait_for("progress", lambda run=run, sign=sign: re.search(sign, run.output, flags=re.M))
        asked = time.monotonic()
        if number == signal.SIGINT:
            os.killpg(run.process.pid, number)  # as a terminal does
        else:
            run.process.send_signal(number)
        code, output = run.finish()
        before, last = last, max(saved(store))
        told(number.name, saved=last, seconds=round(time.monotonic() - asked, 1), said=output.strip().splitlines()[-1])
        assert code == 130, output
        assert resumed_at(output) == ([before] if before else [])
        assert before < last < STEPS
        assert f"train: stopped and saved at step {last} of {STEPS}; run the same command to go on" in output
    code, output = train(store).finish()
    assert code == 0, output
    assert resumed_at(output) == [last]
    assert Result(output).bits == undisturbed.bits


def flip(path, at):
    """Another bit in one byte of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_damaged_checkpoints_are_named_and_the_one_before_is_taken(train, undisturbed, tmp_path):
    store = tmp_path / "store"
    base = Path(store) / Path(undisturbed.run).relative_to(Path(undisturbed.run).parents[2])
    for step in (40, 60, 80, 100, 120):
        name = f"checkpoints/step-{step:07}"
        shutil.copytree(Path(undisturbed.run) / name, base / name)
    described = [base / f"checkpoints/step-{step:07}/manifest.json" for step in (120, 100)]
    flipped = sorted(base.glob("checkpoints/step-0000080/*.distcp"))[0]
    flip(described[0], 0)  # no JSON any more
    flip(described[1], described[1].read_bytes().index(b"0.") + 2)  # JSON of another loss
    flip(flipped, flipped.stat().st_size // 2)
    deleted = sorted(base.glob("checkpoints/step-0000060/*.distcp"))[-1]
    deleted.unlink()
    code, output = train(store).finish()
    damaged = re.findall(r"^checkpoint of step .* is damaged.*$", output, flags=re.M)
    told("damaged", said=damaged, went_on_at=resumed_at(output))
    assert code == 0, output
    for said, path in zip(damaged, [*described, flipped, deleted], strict=True):
        assert f"{path}: " in said
    assert resumed_at(output) == [40]
    assert Result(output).bits == undisturbed.bits


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 64 MiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_disk_that_fills_is_named_keeps_the_last_checkpoint_and_goes_on_once_there_is_space(
    train, undisturbed, small_disk
):
    store = small_disk / "store"
    size = sum(path.stat().st_size for path in Path(undisturbed.run).glob("checkpoints/step-0000020/*"))
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes((64 << 20) - int(3.5 * size) - (1 << 20)))
    code, output = train(store, "--keep-last", 100).finish()
    last = output.strip().splitlines()[-1]
    told("a disk that fills", saved=saved(store), said=last)
    assert code == 1, output
    assert re.match(rf"error: {store}/models/tiny/\S+: no space left to write it", last)
    newest = max(saved(store))
    folder = str(next(store.glob(f"models/tiny/*/checkpoints/step-{newest:07}")))
    for part in storage.read_manifest(folder, "checkpoint")["parts"]:
        storage.read_part(folder, part)
    ballast.unlink()
    code, output = train(store).finish()
    assert code == 0, output
    assert resumed_at(output) == [newest]
    assert Result(output).bits == undisturbed.bits


def test_workers_that_die_again_and_again_end_the_run_after_the_restarts_allowed(train, tmp_path):
    store, killed = tmp_path / "store", 0
    run = train(store, "--restarts", 2, "--checkpoint-every", 10_000, "--steps", 100_000)
    deadline = time.monotonic() + PATIENCE_S
    while not run.ended and time.monotonic() < deadline:
        ranks = run.ranks()
        if ranks and kill(ranks[0]):
            killed += 1
            time.sleep(1)
        time.sleep(0.1)
    assert run.ended, f"still alive after {killed} kills:\n{run.output}"
    code, output = run.finish()
    told("workers that die again and again", killed=killed, said=output.strip().splitlines()[-1])
    assert code == 1, output
    assert killed >= 3
    assert re.search(r"^error: train: workers died 3 times without a new checkpoint after step 0; ", output, flags=re.M)


LONG = 600


@pytest.fixture(scope="module")
def alone(dataset, tmp_path_factory, one_thread):
    """Result of a longer run that nothing disturbs, by a single process without Ray."""
    folder = tmp_path_factory.mktemp("alone")
    config = TrainConfig(store=str(folder), dataset=dataset, **NAMED, steps=LONG, workers=1, checkpoint_every=LONG)
    train_on_rank(config, host=Host(emit=lambda _: None))
    return Result(f"train: {find(config).uri}\n")


@pytest.fixture
def cluster():
    """A head and a node of one core each, of which the second can go."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.add_node(num_cpus=1)
    yield made
    made.shutdown()


@pytest.fixture
def elastic(train, cluster):
    """Starts the longer run on the cluster, on two nodes or on one."""

    def start(store, *flags):
        flags = ["--steps", LONG, "--min-workers", 1, "--resize-every", 2, *flags]
        return train(store, *flags, RAY_ADDRESS=cluster.address, RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S="30")

    return start


def newest_world(store, seen):
    """Workers that wrote the newest checkpoint of a store on disk, noted in `seen` by its step."""
    for path in sorted(Path(store).glob("models/tiny/*/checkpoints/*/manifest.json"), reverse=True):
        with contextlib.suppress(FileNotFoundError):  # gone meanwhile, for a newer one
            return seen.setdefault(int(path.parent.name[5:]), json.loads(path.read_text())["world"])
    return 0


@pytest.mark.usefixtures("one_address_only")
def test_a_node_that_will_be_taken_away_has_its_work_saved_before(elastic, cluster, alone, tmp_path):
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    store, node = tmp_path / "store", next(iter(cluster.worker_nodes))
    run = elastic(store, "--checkpoint-every", 10_000)
    run.wait_for("progress", lambda: re.search(r"^train \[.* \d+/", run.output, flags=re.M))
    deadline = time.time() + 25
    reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    assert GcsClient(address=cluster.gcs_address).drain_node(node.node_id, reason, "trial", int(deadline * 1000))[0]
    run.wait_for("checkpoint", lambda: saved(store))
    left, step = deadline - time.time(), saved(store)[0]
    run.wait_for("deadline", lambda: time.time() > deadline)
    cluster.remove_node(node, allow_graceful=False)
    code, output = run.finish()
    apart = distance(Result(output), alone)
    told("notice", saved=step, seconds_before_deadline=round(left, 1), went_on_at=resumed_at(output), distance=apart)
    assert code == 0, output
    assert left > 0
    assert step < LONG
    assert f"train: a node is about to be taken away; saving step {step}" in output
    assert resumed_at(output) == [step]
    assert apart < 1e-4


@pytest.mark.usefixtures("one_address_only")
def test_a_run_goes_on_with_one_worker_when_a_node_is_lost_and_grows_back(elastic, cluster, alone, tmp_path):
    store, seen = tmp_path / "store", {}
    # So many checkpoints are a brake: on a quick machine the run would be over before the node is back.
    run = elastic(store, "--checkpoint-every", 3)
    run.wait_for("checkpoint", lambda: newest_world(store, seen) == 2 and max(seen) >= 40)
    since = time.monotonic()
    cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
    run.wait_for("checkpoint of one worker", lambda: newest_world(store, seen) == 1)
    shrunk, at = time.monotonic() - since, max(seen)
    cluster.add_node(num_cpus=1)
    run.wait_for("checkpoint of two workers again", lambda: newest_world(store, seen) == 2)
    grown = time.monotonic() - since
    code, output = run.finish()
    apart = distance(Result(output), alone)
    told(
        "elastic", went_on_at=resumed_at(output), one_worker_by_step=at, two_by_step=max(seen), distance=apart,
        seconds_to_one_worker=round(shrunk), seconds_to_two=round(grown),
    )  # fmt: skip
    assert code == 0, output
    assert apart < 1e-4
