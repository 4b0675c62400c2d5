import base64
import io
import json
import re
import shutil
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
import requests as requests_library
from PIL import Image
from support.service import local_service
from test_worker import BOX, mask, picture

from pipelines.config import KeyConfig
from pipelines.images import from_png, to_png
from pipelines.requests import ImageRequest
from pipelines.serve.keys import make_key
from pipelines.worker import load_worker, picture_seed

GENERATIONS, EDITS, DENOISE = "/v1/images/generations", "/v1/images/edits", "/v1/images/denoise"


@pytest.fixture(scope="module")
def service(tiny_model):
    with local_service(tiny_model) as running:
        yield running


@pytest.fixture(scope="module")
def client(service):
    with httpx.Client(base_url=service.url, timeout=60) as session:
        yield session


@pytest.fixture(scope="module")
def worker(tiny_model):
    return load_worker(tiny_model, lanes=8)


def pictures(answer):
    assert answer.status_code == 200, answer.text
    return [from_png(base64.b64decode(item["b64_json"])) for item in answer.json()["data"]]


def events(client, path=GENERATIONS, **how):
    """The events of a stream as (name, data)."""
    with client.stream("POST", path, **how) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        parts = "".join(answer.iter_text()).strip().split("\n\n")
    return [re.fullmatch(r"event: (\S+)\ndata: (.*)", part).groups() for part in parts]


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def test_every_task_gives_what_the_model_and_the_request_alone_say(client, worker):
    image, hole = to_png(picture(5)), mask(BOX)
    asked = [
        (GENERATIONS, {"json": {"prompt": "cat", "steps": 4}}, {"prompt": "cat"}),
        (GENERATIONS, {"json": {"prompt": "cat", "negative_prompt": "frog", "steps": 4}},
         {"prompt": "cat", "negative_prompt": "frog"}),
        (GENERATIONS, {"json": {"parent": 77, "strength": 0.3, "steps": 4}},
         {"task": "vary", "parent": 77, "strength": 0.3}),
        (EDITS, {"data": {"steps": 4}, "files": {"image": image, "mask": hole}},
         {"task": "inpaint", "image": image, "mask": hole}),
        (EDITS, {"data": {"steps": 4, "strength": 0.5}, "files": {"image": image}},
         {"task": "image_to_image", "image": image, "strength": 0.5}),
        ("/v1/images/variations", {"data": {"steps": 4}, "files": {"image": image}},
         {"task": "image_to_image", "image": image, "strength": 0.6}),
        (DENOISE, {"data": {"steps": 4, "noise_level": 0.4}, "files": {"image": image}},
         {"task": "denoise", "image": image, "noise_level": 0.4, "guidance_scale": 1.0}),
    ]  # fmt: skip
    for _, how, _ in asked:
        how.get("json", how.get("data")).update(seed=9, n=2)
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda one: client.post(one[0], **one[1]), asked))
    for (_, _, fields), answer in zip(asked, answers, strict=True):
        expected = worker.paint([ImageRequest(seed=picture_seed(9, n), steps=4, **fields) for n in range(2)])
        for ours, theirs in zip(expected, pictures(answer), strict=True):
            assert np.array_equal(ours, theirs), fields


def test_an_edit_of_any_size_comes_back_in_that_size_and_keeps_what_is_not_masked(client):
    original = np.random.default_rng(1).integers(256, size=(13, 20, 3), dtype=np.uint8)
    hole = np.zeros((13, 20), dtype=bool)
    hole[3:9, 5:15] = True
    answer = client.post(EDITS, data={"steps": 3}, files={"image": to_png(original), "mask": mask(hole)})
    (painted,) = pictures(answer)
    assert (painted.shape, answer.json()["size"]) == ((13, 20, 3), "20x13")
    assert np.array_equal(painted[~hole], original[~hole])
    assert not np.array_equal(painted[hole], original[hole])
    (clean,) = pictures(client.post(DENOISE, files={"image": to_png(original)}))
    assert clean.shape == (13, 20, 3)


def test_a_mask_of_another_size_than_its_image_is_refused(client):
    files = {"image": to_png(picture()), "mask": mask(np.ones((4, 4)))}
    answer = client.post(EDITS, data={"steps": 3}, files=files)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "mask: 4x4 pixels, but the image has 8x8"


def test_a_stream_shows_previews_and_ends_with_the_pictures_of_the_plain_answer(client):
    body = {"prompt": "cat", "n": 2, "seed": 3, "steps": 8}
    told = [
        (name, json.loads(data)) for name, data in events(client, json={**body, "stream": True, "partial_images": 3})
    ]
    assert all(name == data["type"] for name, data in told)
    for place in range(2):
        own = [data for _, data in told if data["index"] == place]
        assert [data["type"].rsplit(".")[-1] for data in own] == ["partial_image"] * 3 + ["completed"]
        assert [data["partial_image_index"] for data in own[:3]] == [0, 1, 2]
        assert [(data["step"], data["steps"]) for data in own[:3]] == [(2, 8), (4, 8), (6, 8)]
    plain = client.post(GENERATIONS, json=body).json()
    done = {data["index"]: data for name, data in told if name == "image_generation.completed"}
    assert [done[n]["b64_json"] for n in range(2)] == [item["b64_json"] for item in plain["data"]]
    assert plain["usage"]["denoiser_calls"] == sum(done[n]["usage"]["denoiser_calls"] for n in range(2)) == 16


def test_the_openai_client_streams_generations_and_edits(service):
    own = openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0)
    stream = own.images.generate(prompt="cat", stream=True, partial_images=2, extra_body={"steps": 6})
    assert [type(each).__name__ for each in stream] == ["ImageGenPartialImageEvent"] * 2 + ["ImageGenCompletedEvent"]
    image, hole = ("image.png", to_png(picture())), ("mask.png", mask(BOX))
    stream = own.images.edit(
        image=image, mask=hole, prompt="cat", stream=True, partial_images=1, extra_body={"steps": 4}
    )
    kinds = [type(each).__name__ for each in stream]
    assert kinds == ["ImageEditPartialImageEvent", "ImageEditCompletedEvent"]
    made = own.images.generate(prompt="cat", response_format="url", extra_body={"steps": 2})
    assert from_png(base64.b64decode(made.data[0].url.removeprefix("data:image/png;base64,"))).shape == (8, 8, 3)


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl on this machine")
def test_curl_and_requests_get_the_same_bytes(service):
    body = {"prompt": "cat", "seed": 1, "steps": 3}
    ours = requests_library.post(service.url + GENERATIONS, json=body, timeout=30).json()["data"]
    command = ["curl", "-sS", service.url + GENERATIONS, "-H", "Content-Type: application/json", "-d", json.dumps(body)]
    theirs = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=30).stdout)["data"]
    assert ours == theirs


@pytest.mark.parametrize(("kind", "magic"), [("jpeg", b"\xff\xd8"), ("webp", b"RIFF"), ("png", b"\x89PNG")])
def test_files_of_every_format_tell_what_made_them(client, kind, magic):
    body = {"prompt": "cat", "seed": 4, "steps": 3, "output_format": kind}
    answer = client.post(GENERATIONS, json=body).json()
    file = base64.b64decode(answer["data"][0]["b64_json"])
    assert file.startswith(magic)
    image = Image.open(io.BytesIO(file))
    told = image.text if kind == "png" else json.loads(image.getexif()[0x010E])
    assert told["model"] == answer["version"]
    assert (told["seed"], json.loads(told["settings"])["prompt"]) == (str(picture_seed(4, 0)), "cat")


def test_a_client_that_goes_away_frees_its_lanes(service, client):
    body = {"n": 64, "steps": 1000, "stream": True, "partial_images": 100}
    with client.stream("POST", GENERATIONS, json=body) as answer:
        next(answer.iter_text())
        assert service.loop.pending_calls > 0
    until(lambda: service.loop.pending_calls == 0)
    for more in ({}, {"stream": True}):
        with pytest.raises(httpx.ReadTimeout), httpx.Client(base_url=service.url, timeout=0.3) as impatient:
            impatient.post(GENERATIONS, json={"n": 64, "steps": 1000, **more})
        until(lambda: service.loop.pending_calls == 0)


def test_a_deadline_is_kept(service, client):
    answer = client.post(GENERATIONS, json={"n": 8, "steps": 1000, "timeout": 0.2})
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
    until(lambda: service.loop.pending_calls == 0)


def test_overload_is_refused_with_the_time_to_wait_and_what_was_taken_is_answered(tiny_model):
    with local_service(tiny_model, queue=4, max_pictures=4) as busy, ThreadPoolExecutor(8) as pool:
        body = {"n": 4, "steps": 40, "seed": 1}
        answers = list(pool.map(lambda _: httpx.post(busy.url + GENERATIONS, json=body, timeout=60), range(8)))
    codes = [answer.status_code for answer in answers]
    assert set(codes) == {200, 503}
    for answer in answers:
        if answer.status_code == 503:
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]["type"] == "overloaded_error"


def test_too_much_is_refused_before_it_is_read_or_decoded(tiny_model):
    limits = {"max_body": 20_000, "max_pixels": 100, "max_pictures": 3}
    with local_service(tiny_model, **limits) as small, httpx.Client(base_url=small.url, timeout=30) as own:
        large = {"image": to_png(np.random.default_rng(0).integers(256, size=(99, 99, 3), dtype=np.uint8))}
        answer = own.post(DENOISE, files=large)
        assert (answer.status_code, answer.json()["error"]["message"][:38]) == (
            413, "the request is larger than 20000 bytes",
        )  # fmt: skip
        kind = {"Content-Type": "application/json"}
        assert own.post(GENERATIONS, content=iter([b" " * 9000] * 3), headers=kind).status_code == 413
        bomb = to_png(np.zeros((1000, 11, 3), dtype=np.uint8))
        refused = own.post(DENOISE, files={"image": bomb})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "image")
        assert "100 pixels" in refused.json()["error"]["message"]
        refused = own.post(GENERATIONS, json={"n": 4})
        assert refused.json()["error"]["message"] == "n: 4; this service makes up to 3 pictures a request"


def test_an_engine_that_fails_is_told_without_its_inside(tiny_model):
    with local_service(tiny_model, retries=1) as broken, httpx.Client(base_url=broken.url, timeout=30) as own:

        def fail():
            raise RuntimeError("secret path /etc/model")

        broken.worker.engine.tick = fail
        answer = own.post(GENERATIONS, json={"steps": 3})
        assert answer.status_code == 503
        assert answer.json()["error"]["message"] == "the engines failed at this request; try again"
        assert own.get("/healthz").status_code == 200


@pytest.fixture
def keys(tmp_path, capsys):
    """A file of keys, and the secret of each by name."""
    uri, secret = str(tmp_path / "keys.json"), {}
    for name, limits in (("ann", {}), ("bob", {"pictures_per_minute": 2}), ("eve", {"requests_at_once": 1})):
        make_key(KeyConfig(key_file=uri, name=name, **limits))
        secret[name] = capsys.readouterr().out.split()[-1]
    return uri, secret


def bearer(secret):
    return {"Authorization": f"Bearer {secret}"}


def test_keys_are_asked_for_and_limits_kept(tiny_model, keys):
    uri, secret = keys
    with local_service(tiny_model, key_file=uri) as locked, httpx.Client(base_url=locked.url, timeout=30) as own:
        assert own.get("/healthz").status_code == own.get("/readyz").status_code == 200
        for headers in ({}, bearer("sk-wrong"), {"Authorization": secret["ann"]}):
            answer = own.get("/v1/models", headers=headers)
            assert (answer.status_code, answer.json()["error"]["type"]) == (401, "authentication_error")
        assert own.get("/v1/models", headers=bearer(secret["ann"])).status_code == 200
        body = {"n": 2, "steps": 2}
        assert own.post(GENERATIONS, json=body, headers=bearer(secret["bob"])).status_code == 200
        limited = own.post(GENERATIONS, json=body, headers=bearer(secret["bob"]))
        assert (limited.status_code, limited.json()["error"]["code"]) == (429, "rate_limit")
        assert 30 <= int(limited.headers["retry-after"]) <= 60
        assert own.post(GENERATIONS, json=body, headers=bearer(secret["ann"])).status_code == 200
        stream = {"n": 64, "steps": 1000, "stream": True, "partial_images": 100}
        with own.stream("POST", GENERATIONS, json=stream, headers=bearer(secret["eve"])) as first:
            parts = first.iter_text()  # kept: an iterator that goes hangs up
            next(parts)
            assert own.get("/v1/models", headers=bearer(secret["eve"])).status_code == 429
        until(lambda: own.get("/v1/models", headers=bearer(secret["eve"])).status_code == 200)


def test_a_file_of_keys_holds_no_secret_and_a_broken_one_is_told_without_its_content(keys, tmp_path):
    uri, secret = keys
    text = Path(uri).read_text()
    assert not any(each in text or each.removeprefix("sk-") in text for each in secret.values())
    (tmp_path / "broken.json").write_text('[{"name": "x", "sha256": "hunter2"}]')
    with pytest.raises(Exception, match=r"broken.json: no file of keys \(0.sha256") as caught:
        make_key(KeyConfig(key_file=str(tmp_path / "broken.json"), name="ann"))
    assert "hunter2" not in str(caught.value)


def test_a_revoked_key_opens_nothing(tiny_model, keys):
    uri, secret = keys
    make_key(KeyConfig(key_file=uri, name="ann", revoke=True))
    with local_service(tiny_model, key_file=uri) as locked:
        assert httpx.get(f"{locked.url}/v1/models", headers=bearer(secret["ann"])).status_code == 401
        assert httpx.get(f"{locked.url}/v1/models", headers=bearer(secret["eve"])).status_code == 200


def test_pages_of_other_origins_may_call_only_where_that_is_allowed(tiny_model, client):
    asks = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in client.get("/v1/models", headers=asks).headers
    with local_service(tiny_model, origin=["https://example.org"]) as opened:
        told = httpx.get(f"{opened.url}/v1/models", headers=asks).headers
        assert told["access-control-allow-origin"] == "https://example.org"
        other = httpx.get(f"{opened.url}/v1/models", headers={"Origin": "https://evil.org"}).headers
        assert "access-control-allow-origin" not in other


def test_the_openapi_document_has_all_paths_and_its_examples_run(client):
    document = client.get("/openapi.json").json()
    assert {path for path in document["paths"] if path.startswith("/v1/images")} == {
        GENERATIONS, EDITS, DENOISE, "/v1/images/variations",
    }  # fmt: skip
    body = document["components"]["schemas"]["GenerationBody"]
    assert all(client.post(GENERATIONS, json=example).status_code == 200 for example in body["examples"])
    assert body["additionalProperties"] is False
    for path in document["paths"].values():
        for operation in path.values():
            assert "422" not in operation["responses"]


@pytest.mark.parametrize(
    ("path", "how", "status"),
    [
        ("/v1/models/none", {"method": "GET"}, 404),
        ("/nowhere", {"method": "GET"}, 404),
        (GENERATIONS, {"method": "GET"}, 405),
        (GENERATIONS, {"method": "POST", "content": b"{"}, 400),
        (GENERATIONS, {"method": "POST", "json": {"seed": 1.5}}, 400),
        (GENERATIONS, {"method": "POST", "json": {"partial_images": 2}}, 400),
        (GENERATIONS, {"method": "POST", "json": {"strength": 0.5}}, 400),
        (EDITS, {"method": "POST", "data": {"image": "/etc/passwd"}}, 400),
        (EDITS, {"method": "POST", "files": {"image": to_png(picture()), "mask": mask(BOX)},
                 "data": {"strength": "0.5"}}, 400),
        (EDITS, {"method": "POST", "files": {"image": b"broken"}}, 400),
    ],
)  # fmt: skip
def test_errors_are_worded_as_openais(client, path, how, status):
    answer = client.request(url=path, **how)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]


def test_a_request_arriving_in_pieces_holds_up_nobody(service, client):
    import socket

    host, port = service.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as slow:
        slow.sendall(f"POST {GENERATIONS} HTTP/1.1\r\nHost: x\r\nContent-Length: 12\r\n".encode())
        slow.sendall(b"Content-Type: application/json\r\n\r\n{")
        assert client.post(GENERATIONS, json={"steps": 2}).status_code == 200
        slow.sendall(b'"steps": 2}')
        assert b"200 OK" in slow.recv(99)


def test_many_at_once_are_all_answered_and_right(client, worker):
    bodies = [{"prompt": "cat", "seed": n, "steps": 2 + n % 5, "n": 1 + n % 3} for n in range(40)]
    barrier = threading.Barrier(20)

    def ask(body):
        barrier.wait(20)
        return pictures(client.post(GENERATIONS, json=body))

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(ask, bodies))
    for body, answer in zip(bodies, answers, strict=True):
        asked = [
            ImageRequest(prompt="cat", seed=picture_seed(body["seed"], n), steps=body["steps"])
            for n in range(body["n"])
        ]
        for ours, theirs in zip(worker.paint(asked), answer, strict=True):
            assert np.array_equal(ours, theirs)
