import base64
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import pytest
from conftest import ROOT, four_free_ports

PROGRAMS = Path(sys.executable).parent

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1200)]


@contextlib.contextmanager
def started(words, url, **environment):
    """A program that runs while it is used, once `url` answers; ended by its own id."""
    with tempfile.NamedTemporaryFile() as log:
        process = subprocess.Popen(
            [PROGRAMS / words[0], *words[1:]], env={**os.environ, **environment}, stdout=log, stderr=log
        )
        try:
            until = time.monotonic() + 240
            while not answers(url):
                assert process.poll() is None, Path(log.name).read_text()[-2000:]
                assert time.monotonic() < until, f"{url} does not answer"
                time.sleep(0.5)
            yield process
        finally:
            process.terminate()
            process.wait(60)


def answers(url):
    """Whether an address answers with 200."""
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def status(method, url, **headers):
    """The status of an answer; 0 where there is none."""
    try:
        return httpx.request(
            method, url, headers=headers, json={} if method == "POST" else None, timeout=20
        ).status_code
    except httpx.HTTPError:
        return 0


@pytest.mark.usefixtures("one_address_only")
def test_no_port_of_a_ray_node_does_anything_without_the_token(tmp_path):
    gcs, dashboard, agent, metrics, client = (four_free_ports() for _ in range(5))
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 32}
    folder = tempfile.TemporaryDirectory(
        prefix="ray-", dir="/tmp", ignore_cleanup_errors=True
    )  # sockets need short names
    words = [
        "ray", "start", "--head", "--block", "--num-cpus=0", f"--port={gcs}", f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={metrics}",
        f"--ray-client-server-port={client}", f"--temp-dir={folder.name}", "--disable-usage-stats",
        "--object-store-memory=100000000",
    ]  # fmt: skip
    here = f"http://127.0.0.1:{dashboard}"
    with folder, started(words, f"{here}/api/gcs_healthz", **token):
        job = [("GET", f"{here}/api/jobs/"), ("POST", f"{here}/api/jobs/"), ("GET", f"{here}/api/serve/applications/"),
               ("PUT", f"{here}/api/serve/applications/"), ("GET", f"{here}/nodes?view=summary"),
               ("GET", f"http://127.0.0.1:{agent}/api/job_agent/jobs/"),
               ("POST", f"http://127.0.0.1:{agent}/api/job_agent/jobs/")]  # fmt: skip
        until = time.monotonic() + 60
        while not answers(f"http://127.0.0.1:{agent}/api/local_raylet_healthz"):
            assert time.monotonic() < until, "the agent does not answer"
            time.sleep(0.5)
        assert {call: status(*call) for call in job} == dict.fromkeys(job, 401)
        assert status("GET", f"{here}/api/jobs/") in (401, 403)
        wrong = {"authorization": f"Bearer {'b' * 32}"}
        assert status("GET", f"{here}/api/jobs/", **wrong) in (401, 403)
        assert status("GET", f"{here}/api/jobs/", authorization=f"Bearer {'a' * 32}") == 200
        without = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "b" * 32, "HOME": str(tmp_path)}
        joins = subprocess.run(
            [PROGRAMS / "ray", "status", f"--address=127.0.0.1:{gcs}"], env=without, capture_output=True, text=True,
            check=False, timeout=120,
        )  # fmt: skip
        assert joins.returncode != 0, joins.stdout
        figures = httpx.get(f"http://127.0.0.1:{metrics}/metrics", timeout=20).text
        assert "ray_" in figures, "figures are open, as docs/security.md says"


def deployed(**environment):
    """Whether the command of infra/compose.yaml puts the flows onto the server."""
    run = subprocess.run(
        [PROGRAMS / "prefect", "deploy", "--all", "--prefect-file", "infra/prefect.yaml"], cwd=ROOT,
        env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    return run.returncode == 0


def test_prefect_does_nothing_without_its_password_and_takes_the_flows_with_it(tmp_path):
    port = four_free_ports()
    settings = {"PREFECT_SERVER_API_AUTH_STRING": "images:secret", "PREFECT_API_AUTH_STRING": "images:secret",
                "PREFECT_HOME": str(tmp_path)}  # fmt: skip
    words = ["prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    here = f"http://127.0.0.1:{port}/api"
    with started(words, f"{here}/health", **settings):
        assert status("POST", f"{here}/flows/filter") == 401
        assert status("POST", f"{here}/deployments/filter") == 401
        told = "Basic " + base64.b64encode(b"images:secret").decode()
        assert status("POST", f"{here}/flows/filter", authorization=told) == 200
        place = {"PROJECT": str(ROOT), "STORE": "s3://images/store", "MODEL_NAME": "cartoons", "CLUSTER": "http://head:8265",
                 "SOURCE": "s3://images/incoming", "PREFECT_CLI_PROMPT": "false", "PREFECT_API_URL": here}  # fmt: skip
        pool = ["work-pool", "create", "image-diffusion", "--type", "process"]
        subprocess.run([PROGRAMS / "prefect", *pool], env={**os.environ, **place, **settings}, check=True, timeout=240)
        assert not deployed(**place, **{**settings, "PREFECT_API_AUTH_STRING": "images:wrong"})
        assert deployed(**place, **settings)
        answer = httpx.post(f"{here}/deployments/filter", json={}, headers={"authorization": told}, timeout=20).json()
        assert {"nightly", "train", "pipeline"} <= {deployment["name"] for deployment in answer}
