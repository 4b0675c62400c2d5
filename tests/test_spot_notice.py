import http.server
import os
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta

import pytest
from conftest import ROOT

PROGRAM = ROOT / "infra/spot_notice.py"


class Metadata(http.server.BaseHTTPRequestHandler):
    """AWS' metadata address (IMDSv2): a token first, then the notice once there is one."""

    looks = 0
    notice = ""

    def do_PUT(self):
        self.answer(200 if "X-aws-ec2-metadata-token-ttl-seconds" in self.headers else 400, "token")

    def do_GET(self):
        if self.headers["X-aws-ec2-metadata-token"] != "token":
            self.answer(401, "")
            return
        assert self.path == "/latest/meta-data/spot/instance-action"
        type(self).looks += 1
        self.answer(200 if self.notice else 404, self.notice)

    def answer(self, status, text):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def metadata():
    handler = type("Told", (Metadata,), {})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield handler, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def ray(tmp_path):
    """A `ray` that writes down how it was called."""
    script = tmp_path / "ray"
    script.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/called\n')
    script.chmod(0o755)
    return tmp_path


def test_a_notice_of_aws_drains_the_node_by_words_that_ray_takes(metadata, ray):
    from ray.scripts.scripts import cli

    handler, url = metadata
    goes = (datetime.now(UTC) + timedelta(seconds=120)).strftime("%Y-%m-%dT%H:%M:%SZ")
    handler.notice = f'{{"action": "terminate", "time": "{goes}"}}'
    run = subprocess.run(
        [sys.executable, PROGRAM, "--metadata", url], env={**os.environ, "PATH": f"{ray}:{os.environ['PATH']}"},
        capture_output=True, text=True, check=False, timeout=30,
    )  # fmt: skip
    assert (run.returncode, run.stderr) == (0, "")
    assert goes in run.stdout
    name, *flags = (ray / "called").read_text().splitlines()
    told = cli.commands[name].make_context(name, flags).params
    assert told["reason"] == "DRAIN_NODE_REASON_PREEMPTION"
    assert 60 < told["deadline_remaining_seconds"] <= 120


def test_without_a_notice_nothing_is_drained(metadata, ray):
    handler, url = metadata
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run(
            [sys.executable, PROGRAM, "--metadata", url], env={**os.environ, "PATH": f"{ray}:{os.environ['PATH']}"},
            check=False, timeout=2,
        )  # fmt: skip
    assert handler.looks >= 1
    assert not (ray / "called").exists()
