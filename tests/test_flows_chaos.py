"""The whole product as `make up` starts it, driven from Prefect, while parts of it are killed."""

import contextlib
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT
from support import sessions

sys.path.insert(0, str(ROOT / "infra"))
import up

sys.path.remove(str(ROOT / "infra"))

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]
TINY = {
    "train": {"preset": "tiny", "steps": 20, "global_batch_size": 16, "workers": 1},
    "evaluate": {
        "samples": 8, "edits": 4, "steps": 3, "feature_steps": 20, "curve_samples": 8, "likelihood": 2,
        "likelihood_steps": 2, "bootstrap": 20,
    },
    "generate": {"count": 20, "shard_size": 8, "steps": 3},
    "promote": {"rule": ["frechet >= 0"]},
    "resolution": 8,
}  # fmt: skip
LONG = {"preset": "tiny", "steps": 100_000, "global_batch_size": 16, "workers": 1, "checkpoint_every": 50_000,
        "validate_every": 0}  # fmt: skip


class Site:
    """What `make up` has started: its addresses, its programs, its Prefect server."""

    def __init__(self, home, store):
        self.home, self.store = home, store
        self.first = self._free()
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PREFECT_", "AWS_"))},
            "PREFECT_API_URL": f"http://127.0.0.1:{self.first}/api", "PREFECT_HOME": str(home / "cli"),
            "RAY_AUTH_TOKEN_PATH": str(home / "ray-token"), "RAY_AUTH_MODE": "token", "DO_NOT_TRACK": "1",
        }  # fmt: skip
        self.cluster = f"http://127.0.0.1:{self.first + 1}"

    def _free(self):
        """The first of twenty ports that nothing takes, below those that the system hands out."""
        for first in range(21_000 + os.getpid() % 97 * 100, 31_000, 20):
            if all(up.PORTS and _is_free(first + place) for place in range(20)):
                return first
        raise RuntimeError("no twenty free ports")

    def up(self, do, *flags):
        command = [sys.executable, "infra/up.py", do, "--home", str(self.home), *flags]
        done = subprocess.run(command, cwd=ROOT, env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr + self.log("deploy")[-2000:]
        return done.stdout

    def log(self, program):
        path = self.home / f"{program}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def pid(self, program):
        """The process of a program, as the supervisor says."""
        config = str(self.home / "supervisord.conf")
        command = [str(Path(sys.executable).parent / "supervisorctl"), "-c", config, "pid", program]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    def kill(self, program):
        """SIGKILL a program with all that it started."""
        for each in sessions.family(self.pid(program)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)

    def ask(self, path, body=None, method=None):
        """What the Prefect server answers."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"{self.environment['PREFECT_API_URL']}/{path}", data, {"Content-Type": "application/json"}, method=method
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def deployment(self, name):
        return self.ask(f"deployments/name/{name}/{name}")

    def run(self, name, **settings):
        """Trigger a deployment; the run's id."""
        parameters = {"config": {**self.deployment(name)["parameters"]["config"], **settings}}
        made = self.ask(f"deployments/{self.deployment(name)['id']}/create_flow_run", {"parameters": parameters})
        return made["id"]

    def state(self, run):
        return self.ask(f"flow_runs/{run}")["state"]["name"]

    def artifacts(self, run):
        found = self.ask("artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [run]}}, "limit": 200})
        return {each["key"]: each["data"] for each in found}

    def lines(self, run):
        """The run's log, as Prefect shows it."""
        found = self.ask(
            "logs/filter", {"logs": {"flow_run_id": {"any_": [run]}}, "limit": 200, "sort": "TIMESTAMP_DESC"}
        )
        return [each["message"] for each in reversed(found)]

    def jobs(self):
        """Ray's jobs by id: status and exit status."""
        told = self.ray("jobs")
        return {
            each["submission_id"]: (each["status"], each["driver_exit_code"]) for each in told if each["submission_id"]
        }

    def at_work(self):
        """How many replicas of each deployment of the service run on the cluster."""
        deployments = self.ray("serve/applications")["applications"]["images"]["deployments"]
        return {
            name: sum(replica["state"] == "RUNNING" for replica in each["replicas"])
            for name, each in deployments.items()
        }

    def ray(self, path):
        """What the cluster's head answers."""
        token = (self.home / "ray-token").read_text()
        request = urllib.request.Request(f"{self.cluster}/api/{path}/", headers={"Authorization": f"Bearer {token}"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def job_of(self, run):
        return self.ask(f"flow_runs/{run}")["labels"].get("ray.job")


def _is_free(port):
    try:
        up.check_free("", port)
    except up.UpError:
        return False
    return True


def until(found, what, seconds=240):
    return sessions.until(found, what, seconds, 0.5)


@pytest.fixture(scope="module")
def site():
    """Everything up, over a store with some cartoons; and everything down again, by its supervisor."""
    home = Path(tempfile.mkdtemp(prefix="up-"))
    store = home / "store"
    source = home / "in"
    source.mkdir()
    draw(home, source, 0)
    made = Site(home, store)
    made.source = source
    try:
        flags = ["--store", str(store), "--name", "faces", "--source", str(source), "--first-port", str(made.first)]
        told = made.up("start", *flags)
        assert made.cluster in told
        yield made
        made.up("stop")
        gone = [port for port in range(made.first, made.first + 20) if not _is_free(port)]
        assert gone == [], "make down leaves nothing that listens"
    finally:
        subprocess.run([sys.executable, "infra/up.py", "stop", "--home", str(home)], cwd=ROOT, check=False)
        shutil.rmtree(home, ignore_errors=True)
        shutil.rmtree(up.scratch_of(home), ignore_errors=True)


def draw(home, source, number):
    """A shard of new pictures arrives."""
    from pipelines.cartoons import tar_shard

    (source / f"new-{number}.tar").write_bytes(tar_shard(number, 0, 96, 8))


def test_a_schedule_fires_and_the_night_leaves_its_pictures_and_a_live_model(site):
    nightly = site.deployment("nightly")
    settings = {**nightly["parameters"]["config"], **TINY}
    now = datetime.datetime.now(datetime.UTC)
    every = {"interval": 120.0, "anchor_date": (now + datetime.timedelta(seconds=15)).isoformat(), "timezone": "UTC"}
    (made,) = site.ask(
        f"deployments/{nightly['id']}/schedules",
        [{"schedule": every, "active": True, "parameters": {"config": settings}, "slug": "soon"}],
    )

    def runs():
        found = {
            "flow_runs": {"deployment_id": {"any_": [nightly["id"]]}, "state": {"type": {"not_any_": ["SCHEDULED"]}}}
        }
        return site.ask("flow_runs/filter", found)

    run = until(runs, "the schedule to fire")[0]
    site.ask(f"deployments/{nightly['id']}/schedules/{made['id']}", method="DELETE")
    until(lambda: site.state(run["id"]) in ("Completed", "Failed", "Crashed"), "the night to end", 400)
    assert site.state(run["id"]) == "Completed", site.lines(run["id"])[-20:]
    assert run["auto_scheduled"]
    kept = site.artifacts(run["id"])
    stages = ("ingest", "train", "evaluate", "generate")
    assert {f"{stage}-{what}" for stage in stages for what in ("figures", "pictures", "progress")} <= set(kept)
    assert {"ray-job", "tensorboard", "promotion"} <= set(kept)
    assert "](data:image/png;base64," in kept["generate-pictures"]
    (images,) = (site.store / "images/faces").iterdir()
    date = run["expected_start_time"][:10].replace("-", "")
    assert json.loads((images / "manifest.json").read_text())["settings"]["seed"] == int(date)
    ready = f"http://127.0.0.1:{site.first + 2}/readyz"
    until(lambda: _answers(ready), "the service to take the model that went live")
    page = re.search(r"\((http://[^)]*/images.html)\)", kept["generate-pictures"])[1]
    with urllib.request.urlopen(page, timeout=10) as answer:
        assert b"<html" in answer.read()


def _answers(url, within=5):
    try:
        with urllib.request.urlopen(url, timeout=within) as answer:
            return answer.status == 200
    except OSError:
        return False


def test_a_second_night_finds_what_is_done_and_takes_in_what_is_new(site):
    before = set(site.jobs())
    again = site.run("nightly", **TINY)
    until(lambda: site.state(again) in ("Completed", "Failed", "Crashed"), "the same night again")
    assert site.state(again) == "Completed"
    assert set(site.jobs()) == before, "nothing was new, so nothing was submitted"
    draw(site.home, site.source, 1)
    third = site.run("nightly", **TINY, date="2026-01-02")
    until(lambda: site.state(third) in ("Completed", "Failed", "Crashed"), "the night with new pictures", 400)
    assert site.state(third) == "Completed", site.lines(third)[-20:]
    assert any("ingest: builds on" in line for line in site.lines(third))
    newest = max((site.store / "models/faces").glob("*/run.json"), key=lambda path: path.stat().st_mtime)
    assert '"parent"' in newest.read_text()
    assert len(list((site.store / "models/faces/promotions").iterdir())) == 2


def test_trainings_take_turns_cancel_saves_and_a_killed_worker_loses_nothing(site):
    (dataset,) = list((site.store / "datasets/faces").glob("*/manifest.json"))[:1]
    settings = {**LONG, "dataset": str(dataset.parent), "job": {"grace": 60}}
    first = site.run("train", **settings)
    job = until(lambda: site.job_of(first), "the first training's job")
    second = site.run("train", **settings, seed=5)
    until(lambda: site.state(second) == "Running", "the second run to start")
    steps = until(lambda: _steps(site, first), "the first training's steps")
    assert site.job_of(second) is None, "the second one waits for its turn"
    site.ask(f"flow_runs/{second}/set_state", {"state": {"type": "CANCELLING"}})
    until(lambda: site.state(second) == "Cancelled", "the one that waits to be cancelled")

    # The worker dies with the flow that it ran; the job does not, and a new run of the same takes it over.
    site.kill("worker")
    time.sleep(3)
    assert site.jobs()[job] == ("RUNNING", None)
    again = site.run("train", **settings)
    assert until(lambda: site.job_of(again), "the run to take the job over", 300) == job
    until(lambda: any(f"job {job} runs on" in line for line in site.lines(again)), "its log")
    until(lambda: _steps(site, again) > steps, "the log to go on")
    until(lambda: site.state(first) == "Crashed", "the run without heartbeats to be called crashed", 300)

    site.ask(f"flow_runs/{again}/set_state", {"state": {"type": "CANCELLING"}})
    until(lambda: site.state(again) == "Cancelled", "the cancelled run", 120)
    assert site.jobs()[job] == ("FAILED", 130), "it ended by itself, after saving"
    run = next(path.parent for path in (site.store / "models/faces").glob("*/checkpoints") if _saved(path) > 100)
    assert _saved(run / "checkpoints") % 50_000, "between two checkpoints of its own"
    assert not list((site.store / "stops").iterdir()), "no marker stays"


def _steps(site, run):
    found = [re.search(r"train \[.*\] (\d+)/", line) for line in site.lines(run)]
    return max((int(match[1]) for match in found if match), default=0)


def _saved(checkpoints):
    return max((int(path.name.removeprefix("step-")) for path in checkpoints.iterdir()), default=0)


def test_a_head_that_dies_and_comes_back_does_not_end_the_flow(site):
    (dataset,) = list((site.store / "datasets/faces").glob("*/manifest.json"))[:1]
    settings = {**LONG, "steps": 600, "checkpoint_every": 50, "dataset": str(dataset.parent), "seed": 9}
    run = site.run("train", **settings)
    until(lambda: _steps(site, run) >= 100, "some checkpoints")
    site.kill("ray")
    until(lambda: site.state(run) in ("Completed", "Failed", "Crashed"), "the training to end", 400)
    assert site.state(run) == "Completed", site.lines(run)[-20:]
    told = site.lines(run)
    assert any("waiting for the cluster" in line for line in told)
    resumed = [int(match[1]) for line in told if (match := re.search(r"train: goes on at step (\d+) of 600", line))]
    assert resumed
    assert resumed[-1] >= 50, "from a checkpoint, not from the beginning"
    until(lambda: _answers(f"http://127.0.0.1:{site.first + 2}/readyz"), "the service to come back by itself")


def test_the_service_goes_onto_the_cluster_and_is_brought_up_to_date_there(site):
    up.control(site.home, "stop", "service")
    place = {"cpus": 0, "port": site.first + 2, "ready_within": 240}
    first = site.run("deploy", **place)
    until(lambda: site.state(first) in ("Completed", "Failed", "Crashed"), "the service on the cluster", 300)
    assert site.state(first) == "Completed", site.lines(first)[-20:]
    address = f"http://127.0.0.1:{site.first + 2}"
    assert f"]({address})" in site.artifacts(first)["service"]
    with urllib.request.urlopen(f"{address}/v1/models", timeout=30) as answer:
        assert [model["id"] for model in json.load(answer)["data"]] == ["faces"]
    one = _picture(address)
    assert set(site.at_work()) == {"Ingress", "engine"}
    with _watched(site.at_work) as counts, _watched(lambda: _answers(f"{address}/readyz", 60)) as ready:
        second = site.run("deploy", **place, queue=300, surge=100)
        while site.state(second) not in ("Completed", "Failed", "Crashed"):
            assert _picture(address) == one, "whichever engine makes it"
    assert site.state(second) == "Completed", site.lines(second)[-20:]
    assert _answers(f"{address}/readyz")
    assert all(ready)
    least = {name: min(each[name] for each in counts if name in each) for name in ("Ingress", "engine")}
    assert least == {"Ingress": 1, "engine": 1}, "the old ones answer until the new ones do"
    assert "'queue': 300" in str(site.ray("serve/applications")["applications"]["images"]["deployed_app_config"])


@contextlib.contextmanager
def _watched(look):
    """What `look` sees, four times a second, until the end; an error of it is raised there."""
    seen, done = [], threading.Event()

    def looks():
        while not done.wait(0.25):
            seen.append(look())

    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(looks)
        try:
            yield seen
        finally:
            done.set()
        watching.result()


def _picture(address):
    """A picture of the service."""
    body = json.dumps({"seed": 1, "steps": 2, "response_format": "b64_json"}).encode()
    request = urllib.request.Request(f"{address}/v1/images/generations", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["data"][0]["b64_json"]
