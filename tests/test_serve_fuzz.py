"""Requests that are no requests: each is answered at once by an error that says what is wrong, and nothing piles up."""

import base64
import gc
import io
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from conftest import ROOT
from PIL import Image
from support import mangle
from support.models import publish
from support.service import local_service

pytestmark = pytest.mark.usefixtures("one_thread")
# Whatever is asked for here takes well under a second of work.
PATIENCE_S = 30.0
GROWTH_MB = 64
ROUND = 200
REFUSED = {400, 404, 405, 408, 413}


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    model = publish(tmp_path_factory.mktemp("store"), 1)
    with local_service(model, max_pixels=1_000_000, max_body=4 << 20, timeout=20.0) as running:
        yield running


@pytest.fixture(scope="module")
def client(service):
    with httpx.Client(base_url=service.url, timeout=PATIENCE_S) as session:
        yield session


def send(client, request):
    return client.request(request.method, request.path, content=request.body, headers=_sendable(request.headers))


def _sendable(headers):
    """Headers as bytes: some are no text."""
    return {name: value.encode("latin-1") for name, value in headers.items()}


def check(answer, request):
    """A status that is documented, and an error that says what is wrong."""
    told = f"{answer.status_code} {answer.text[:300]!r} for {mangle.as_text(request)}"
    if answer.status_code in REFUSED and request.method != "HEAD":
        if answer.headers.get("access-control-allow-origin") is None and "json" in answer.headers["content-type"]:
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}, told
        assert "Traceback" not in answer.text, told
        return
    if answer.status_code == 504:
        assert answer.json()["error"]["type"] == "timeout_error", told
        return
    assert answer.status_code in {200, 307, 503, *REFUSED}, told


def resident_mb():
    """Memory of this process, which is also the service's."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


def attack(client, seed, count):
    """Send so many requests, four at a time; statuses of the answers."""
    chance = random.Random(seed)

    def one(request):
        answer = send(client, request)
        check(answer, request)
        return answer.status_code

    with ThreadPoolExecutor(4) as pool:  # by rounds: all requests at once would be the memory that is measured
        rounds = (mangle.requests(chance, min(ROUND, count - first)) for first in range(0, count, ROUND))
        return [status for requests in rounds for status in pool.map(one, requests)]


def still_answers(client):
    answer = client.post("/v1/images/generations", json={"steps": 1, "seed": 1})
    assert answer.status_code == 200, answer.text


def test_malformed_requests_are_refused_one_by_one_and_nothing_piles_up(client, service):
    attack(client, 0, 200)
    before = resident_mb()
    statuses = attack(client, 1, 600)
    grown = resident_mb() - before
    assert statuses.count(200) > 20, "some are right, so that the rest of the way is gone too"
    assert statuses.count(400) > 200
    assert grown < GROWTH_MB
    assert service.loop.idle
    still_answers(client)


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_ten_thousand_malformed_requests_are_refused_and_memory_stays_flat(client, service):
    attack(client, 2, 1000)
    before = resident_mb()
    statuses = attack(client, 3, 10_000)
    grown = resident_mb() - before
    counts = {status: statuses.count(status) for status in sorted(set(statuses))}
    print(f"10,000 malformed requests: {counts}, memory {before:.0f} MB and {grown:+.1f} MB")
    assert grown < GROWTH_MB
    assert service.loop.idle
    still_answers(client)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ('{"\\ud800": 1}', None),
        ('{"prompt": "\\ud800"}', "prompt"),
        ('{"model": "\\ud800"}', "model"),
        ('{"timeout": NaN}', "timeout"),
        ('{"timeout": Infinity}', "timeout"),
        ('{"guidance_scale": NaN}', "guidance_scale"),
        ('{"guidance_high": NaN}', "guidance_high"),
        ('{"eta": NaN}', "eta"),
        ('{"seed": 4611686018427387904}', "seed"),
        ('{"seed": 1.5}', "seed"),
        ('{"seed": ' + "1" * 5000 + "}", None),
        ("[" * 100_000, None),
    ],
)
def test_values_that_json_or_python_allow_and_no_picture_can_have_are_refused_by_name(client, body, field):
    answer = client.post("/v1/images/generations", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    if field is not None:
        assert answer.json()["error"]["param"] == field


def post_file(client, path, files, **fields):
    return client.post(path, data={"steps": 1, **fields}, files=files)


def test_the_error_does_not_send_the_request_back(client):
    """An unknown field of a megabyte is named by its beginning."""
    answer = client.post("/v1/images/generations", json={"x" * 1_000_000: 1})
    assert answer.status_code == 400
    assert len(answer.content) < 2000


def test_a_picture_that_says_it_is_larger_than_the_limit_is_not_unpacked(client):
    bomb = mangle.png(1000, 1001)
    assert len(bomb) < 20_000
    before = resident_mb()
    for data in (bomb, mangle.png(1 << 30, 1 << 30, b"\0"), mangle.png(60_000, 60_000, b"\0")):
        answer = post_file(client, "/v1/images/denoise", {"image": data})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "image")
        assert "more than 1000000 pixels" in answer.json()["error"]["message"]
    assert resident_mb() - before < GROWTH_MB


@pytest.mark.parametrize(("kind", "most"), [("webp", 16_383), ("jpeg", 65_500)])
def test_a_format_that_cannot_hold_a_picture_of_this_size_is_refused_before_any_work(client, service, kind, most):
    ticks = len(service.ticks)
    image = {"image": mangle.png(most + 1, 1)}
    answer = post_file(client, "/v1/images/variations", image, output_format=kind)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "output_format")
    assert str(most) in answer.json()["error"]["message"]
    assert len(service.ticks) == ticks
    whole = post_file(client, "/v1/images/variations", {"image": mangle.png(most, 1)}, output_format=kind)
    data = base64.b64decode(whole.json()["data"][0]["b64_json"])
    assert Image.open(io.BytesIO(data)).size == (most, 1)


def test_pictures_of_the_callers_own_size_count_all_together(client):
    """Each of n pictures comes back in the size of the one that was sent, so n of them are n times as large."""
    image = {"image": mangle.png(1000, 1000)}
    answer = post_file(client, "/v1/images/variations", image, n=60)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "n")
    assert post_file(client, "/v1/images/variations", image, n=2).status_code == 200


def test_a_page_of_an_allowed_origin_may_post_and_no_other(tmp_path):
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    with (
        local_service(publish(tmp_path, 2), origin=["https://mine.example"]) as running,
        httpx.Client(base_url=running.url) as session,
    ):
        for origin, allowed in (("https://mine.example", True), ("https://other.example", False)):
            answer = session.options("/v1/images/generations", headers={"Origin": origin, **asks})
            assert (answer.status_code == 200) is allowed
            assert ("access-control-allow-origin" in answer.headers) is allowed


@pytest.mark.chaos
@pytest.mark.timeout(600)
def test_answers_are_those_that_the_openapi_document_says(service, tmp_path):
    command = [
        sys.executable, "-m", "schemathesis.cli", "--config-file", str(ROOT / "tests/support/schemathesis.toml"), "run",
        f"{service.url}/openapi.json", "--max-examples", "60", "--seed", "1", "--no-color",
        "--request-timeout", str(PATIENCE_S), "--suppress-health-check", "all",
        "--checks", "not_a_server_error,response_schema_conformance,status_code_conformance,content_type_conformance",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
