"""Long orders over HTTP: a table is uploaded, ordered, made by the bulk stage beside the service, and fetched."""

import asyncio
import base64
import contextlib
import http.server
import io
import json
import sys
import threading
import time
from typing import ClassVar

import httpx
import openai
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.service import local_service

from pipelines import bulk, storage
from pipelines.config import GenerateConfig, KeyConfig, PipelineError
from pipelines.images import from_png
from pipelines.progress import Progress, counts_of
from pipelines.requests import ImageRequest
from pipelines.serve.callbacks import call_back
from pipelines.serve.keys import make_key
from pipelines.serve.runner import bulk_command
from pipelines.worker import load_worker

GENERATIONS = "/v1/images/generations"
TABLE = b"class,seed,steps,order\ncat,1,2,a\nbear,2,2,b\n,3,2,c\n"
LINES = b"".join(
    json.dumps({"custom_id": f"row-{row}", "method": "POST", "url": GENERATIONS, "body": body}).encode() + b"\n"
    for row, body in enumerate([{"prompt": "cat", "seed": 5, "steps": 2, "n": 1}, {"seed": 6, "steps": 3}])
)


@pytest.fixture(scope="module")
def service(tiny_model, tmp_path_factory):
    with local_service(tiny_model, store=str(tmp_path_factory.mktemp("store")), max_rows=50) as running:
        yield running


@pytest.fixture(scope="module")
def client(service):
    return openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0)


@contextlib.contextmanager
def making(service, command):
    """The service's batches made by this command in place of the bulk stage's."""
    service.runner.command = command
    loop = asyncio.new_event_loop()

    async def work():
        await asyncio.gather(service.runner.watch(), return_exceptions=True)

    task = loop.create_task(work())
    thread = threading.Thread(target=lambda: loop.run_until_complete(asyncio.gather(task, return_exceptions=True)))
    thread.start()
    try:
        yield
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join(20)


def script(text):
    """A command in place of the bulk stage's, which prints as it does."""
    return lambda _: [sys.executable, "-uc", f"import sys, time\n{text}"]


def upload(client, data=TABLE, name="t.csv"):
    return client.files.create(file=(name, data), purpose="batch")


def order(client, data=TABLE, name="t.csv", **how):
    return client.batches.create(
        input_file_id=upload(client, data, name).id, endpoint=GENERATIONS, completion_window="24h", **how
    )


def until(client, batch, *wanted, seconds=60):
    end = time.monotonic() + seconds
    while (found := client.batches.retrieve(batch.id)).status not in wanted:
        assert time.monotonic() < end, found
        time.sleep(0.05)
    return found


def test_an_uploaded_table_is_kept_and_found_again(client):
    first = upload(client)
    assert (first.bytes, first.filename, first.purpose, first.status) == (len(TABLE), "t.csv", "batch", "processed")
    assert upload(client).id == first.id
    assert client.files.content(first.id).read() == TABLE
    assert first.id in [each.id for each in client.files.list()]
    other = upload(client, LINES, "lines.jsonl")
    assert client.files.content(other.id).read() == LINES
    assert client.files.delete(other.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(other.id)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("t.txt", TABLE, r"'t.txt' is no table; there are .csv"),
        ("t.csv", b"class\n" + b"cat\n" * 51, "51 rows; this service takes 1 to 50 a file"),
        ("t.csv", b"class\n", "0 rows"),
        ("t.parquet", b"PAR1", "not readable as .parquet"),
        ("t.jsonl", b"{", "not readable as .jsonl"),
        ("t.jsonl", LINES.replace(b'"n": 1', b'"n": 2'), "line 1: one PNG a line"),
        ("t.jsonl", LINES.replace(b'"steps": 3', b'"stepz": 3'), "line 2: stepz: "),
        ("t.jsonl", LINES.replace(b"generations", b"edits"), "line 1: url"),
    ],
)
def test_what_is_no_table_is_refused_at_its_upload(client, name, data, message):
    with pytest.raises(openai.BadRequestError, match=message) as raised:
        upload(client, data, name)
    assert raised.value.param == "file"


@pytest.mark.parametrize("identity", ["file-0", "file-../../x", "batch_0", "x", "file-0-output", "file-a-errors"])
def test_an_id_of_nothing_is_not_found_whatever_it_looks_like(service, identity):
    for path in (f"/v1/files/{identity}", f"/v1/files/{identity}/content", f"/v1/batches/{identity}"):
        answer = httpx.get(service.url + path)
        assert answer.status_code == 404, path
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_wrong_order_names_its_field(client, service):
    with pytest.raises(openai.BadRequestError, match="input_file_id: no file 'file-0'"):
        client.batches.create(input_file_id="file-0", endpoint=GENERATIONS, completion_window="24h")
    for more, field in (
        ({"carry": ["ordr"]}, "carry"), ({"carry": ["--table=/etc/passwd"]}, "carry.0"),
        ({"model": "dall-e-3"}, "model"), ({"stepz": 1}, "stepz"),
    ):  # fmt: skip
        with pytest.raises(openai.BadRequestError) as raised:
            order(client, extra_body=more)
        assert raised.value.param == field
    assert httpx.get(f"{service.url}/v1/batches").json()["data"] == []


def test_the_settings_of_the_bulk_stage_are_those_of_the_order(client, service, tiny_model):
    batch = order(client, LINES, "lines.jsonl", extra_body={"guidance_scale": 3.5, "seed": 9}, metadata={"a": "b"})
    assert (batch.status, batch.request_counts.total, batch.metadata) == ("validating", 2, {"a": "b"})
    (ordered,) = [each for each in service.runner.batches.unfinished() if each.id == batch.id]
    config = GenerateConfig.model_validate(ordered.job)
    assert (config.model, config.via, config.addresses, config.carry) == (tiny_model, "serve", False, ["custom_id"])
    assert (config.guidance_scale, config.seed, config.task) == (3.5, 9, "generate")
    rows = [json.loads(line) for line in storage.read_bytes(config.table).splitlines()]
    assert rows[0] == {"custom_id": "row-0", "task": "generate", "prompt": "cat", "seed": 5, "steps": 2}
    assert "--no-addresses" in bulk_command(config)
    assert order(client, LINES, "lines.jsonl", extra_body={"guidance_scale": 3.5, "seed": 9}, metadata={"a": "b"}) == (
        batch
    )
    client.batches.cancel(batch.id)
    with making(service, script("raise SystemExit('never begun')")):
        assert until(client, batch, "cancelled").errors is None


@pytest.fixture(scope="module")
def images(ray_session, tiny_model, tmp_path_factory):
    """Images of two rows that were made, and one that was not."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "t.csv").write_text("class,seed,steps,custom_id\ncat,1,2,a\ndog,2,2,b\n,3,2,\n")
    config = GenerateConfig(
        store=str(folder), name="t", model=tiny_model, table=str(folder / "t.csv"), carry=["custom_id"], skip_bad=True
    )
    return bulk.run(config).uri


def by_actors(config):
    """The bulk stage's own command, without Ray and its service."""
    return bulk_command(config.model_copy(update={"via": "actors", "workers": 1, "lanes": 4}))


def test_a_batch_is_made_and_its_pictures_and_errors_are_fetched(client, service, tiny_model, monkeypatch):
    monkeypatch.delitem(service.runner.environment, "RAY_ADDRESS", raising=False)
    table = b"class,seed,steps,custom_id\ncat,1,2,a\ndog,2,2,b\n,3,2,\n"
    batch, wrong = order(client, table), order(client, b"class,seed\ndog,1\ncat,many\n")
    with making(service, by_actors):
        assert until(client, batch, "in_progress", "completed").in_progress_at
        done, none = (until(client, each, "completed", "failed", seconds=120) for each in (batch, wrong))
    assert (done.status, done.request_counts.completed, done.request_counts.failed) == ("completed", 2, 1)
    lines = [json.loads(line) for line in client.files.content(done.output_file_id).read().splitlines()]
    assert [line["custom_id"] for line in lines] == ["a", "2"]
    (expected,) = load_worker(tiny_model, lanes=4).paint([ImageRequest(prompt="cat", seed=1, steps=2)])
    picture = lines[0]["response"]["body"]["data"][0]
    assert picture["seed"] == 1
    assert (from_png(base64.b64decode(picture["b64_json"])) == expected).all()
    (failed,) = [json.loads(line) for line in client.files.content(done.error_file_id).read().splitlines()]
    assert (failed["custom_id"], failed["error"]["code"]) == ("b", "bad_row")
    assert "no class 'dog'" in failed["error"]["message"]
    assert client.files.retrieve(done.output_file_id).purpose == "batch_output"
    assert order(client, table).status == "completed"
    assert (none.status, none.request_counts.completed, none.request_counts.failed) == ("completed", 0, 2)
    told = [json.loads(line) for line in client.files.content(none.error_file_id).read().splitlines()]
    assert [(line["custom_id"], line["error"]["code"]) for line in told] == [("0", "bad_row"), ("1", "bad_row")]
    assert client.files.content(none.output_file_id).read() == b""


def test_how_far_a_batch_is_stands_in_what_its_command_prints(client, service, images):
    told = Progress("generate", 3, "rows", emit=lambda _: None).line(1.0, "", 1, "rows").replace(" 0/3", " 2/3")
    assert counts_of(told) == (2, 3)
    batch = order(client, metadata={"number": "1"})
    with making(service, script(f"print({told!r}); time.sleep(1); print('generate: {images}')")):
        while (found := until(client, batch, "in_progress", "completed")).status == "in_progress":
            seen = found.request_counts.completed
        assert seen == 2
    assert (found.request_counts.completed, found.request_counts.failed, found.images) == (2, 1, images)


def test_a_batch_that_fails_says_why_and_goes_on_when_it_is_ordered_again(client, service, images):
    batch = order(client, metadata={"number": "2"})
    with making(service, script("raise SystemExit('error: 1 of 3 rows are wrong')")):
        failed = until(client, batch, "failed")
    assert [each.message for each in failed.errors.data] == ["1 of 3 rows are wrong"]
    with making(service, script(f"print('generate: {images}')")):
        assert order(client, metadata={"number": "2"}).id == batch.id
        assert until(client, batch, "completed").errors is None


@pytest.mark.chaos
def test_a_command_that_is_killed_is_run_again_and_a_cancelled_one_is_interrupted(client, service, images, tmp_path):
    once = f"""
import os, pathlib
if not pathlib.Path({str(tmp_path / "was")!r}).exists():
    pathlib.Path({str(tmp_path / "was")!r}).touch()
    os.kill(os.getpid(), 9)
print('generate: {images}')"""
    batch = order(client, metadata={"number": "3"})
    with making(service, script(once)):
        assert until(client, batch, "completed").request_counts.completed == 2
    stopped = order(client, metadata={"number": "4"})
    with making(service, script("time.sleep(60)")):
        until(client, stopped, "in_progress")
        assert client.batches.cancel(stopped.id).status == "cancelling"
        assert until(client, stopped, "cancelled").cancelled_at


def test_a_batch_whose_store_is_away_waits_and_is_made_when_it_is_back(client, service, images, tmp_path):
    away = f"""
import pathlib
if not pathlib.Path({str(tmp_path / "was")!r}).exists():
    pathlib.Path({str(tmp_path / "was")!r}).touch()
    print("error: s3://bucket/x: no answer")
    sys.exit(75)
print('generate: {images}')"""
    batch = order(client, metadata={"number": "6"})
    with making(service, script(away)):
        assert until(client, batch, "completed").errors is None


def test_a_damaged_record_holds_up_no_other(client, service, images):
    batch = order(client, metadata={"number": "5"})
    folder = service.runner.batches.folder
    (owner,) = {info.uri.rsplit("/", 1)[1].partition(".")[0] for info in storage.list_objects(f"{folder}/open")}
    broken = [f"{folder}/{owner}/batches/batch_broken{number}" for number in (1, 2, 3)]
    whole = storage.read_bytes(f"{folder}/{owner}/batches/{batch.id}/batch.json")
    for number, place in enumerate(broken, start=1):
        storage.write_bytes(f"{folder}/open/{owner}.batch_broken{number}", b"")
        if number == 1:
            storage.write_bytes(f"{place}/batch.json", b"{}")
        else:  # older, so that they would come first
            old = json.loads(whole) | {"id": f"batch_broken{number}", "created_at": 1}
            storage.write_bytes(f"{place}/batch.json", json.dumps(old).encode())
            storage.write_bytes(f"{place}/state.json", b'{"percent": 3}' if number == 2 else b"no JSON")
    file = f"{folder}/{owner}/files/file-broken"
    storage.write_bytes(f"{file}/file.json", b"{}")
    with making(service, script(f"print('generate: {images}')")):
        until(client, batch, "completed")
    listed = [each.id for each in client.batches.list()]
    assert batch.id in listed
    assert not [each for each in listed if "broken" in each]
    assert "file-broken" not in [each.id for each in client.files.list()]
    for place in (*broken, file):
        storage.remove_folder(place)
    for number in (1, 2, 3):
        storage.remove_object(f"{folder}/open/{owner}.batch_broken{number}")


def test_a_store_that_is_away_is_no_damage(service, monkeypatch):
    def away(_):
        raise storage.StoreAwayError("s3://x: no answer")

    batches = service.runner.batches
    storage.write_bytes(f"{batches.folder}/open/anybody.batch_x", b"")
    monkeypatch.setattr(storage, "read_json", away)
    with pytest.raises(storage.StoreAwayError):
        batches.unfinished()
    storage.remove_object(f"{batches.folder}/open/anybody.batch_x")


def test_a_key_sees_its_own_alone(tiny_model, tmp_path, capsys):
    secrets = []
    for name in ("ann", "bob"):
        make_key(KeyConfig(key_file=str(tmp_path / "keys.json"), name=name))
        secrets.append(capsys.readouterr().out.strip().rsplit(" ", 1)[1])
    with local_service(tiny_model, store=str(tmp_path / "s"), key_file=str(tmp_path / "keys.json")) as guarded:
        ann, bob = (openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=secret, max_retries=0) for secret in secrets)
        batch = order(ann)
        assert [each.id for each in ann.batches.list()] == [batch.id]
        assert list(bob.batches.list()) == list(bob.files.list()) == []
        for ask in (bob.batches.retrieve, bob.batches.cancel):
            with pytest.raises(openai.NotFoundError):
                ask(batch.id)
        with pytest.raises(openai.NotFoundError):
            bob.files.content(batch.input_file_id)
        with pytest.raises(openai.BadRequestError, match="an open batch needs it"):
            ann.files.delete(batch.input_file_id)
        assert order(bob).id != batch.id


def test_a_table_that_is_larger_than_allowed_is_refused_and_may_be_larger_than_a_picture(tiny_model, tmp_path):
    rows = b"class,seed\n" + b"cat,1\n" * 400
    with local_service(tiny_model, store=str(tmp_path), max_body=1000, max_file=4000) as small:
        send = {"data": {"purpose": "batch"}}
        assert httpx.post(f"{small.url}/v1/files", files={"file": ("t.csv", rows)}, **send).status_code == 200
        assert httpx.post(f"{small.url}/v1/files", files={"file": ("t.csv", 2 * rows)}, **send).status_code == 413
        assert httpx.post(small.url + GENERATIONS, json={"prompt": "x" * 2000}).status_code == 413


def test_pictures_of_a_batch_come_as_bytes_and_no_address_is_opened(tiny_model, tmp_path, ray_session):
    (tmp_path / "secret.png").write_bytes(b"")
    buffer = io.BytesIO()
    pq.write_table(pa.table({"image": [{"bytes": None, "path": str(tmp_path / "secret.png")}]}), buffer)
    (tmp_path / "t.parquet").write_bytes(buffer.getvalue())
    (tmp_path / "t.csv").write_text(f"image\n{tmp_path}/secret.png\n")
    for name in ("t.parquet", "t.csv"):
        config = GenerateConfig(
            store=str(tmp_path), model=tiny_model, table=str(tmp_path / name), task="denoise", addresses=False
        )
        with pytest.raises(PipelineError, match="image: an address; here pictures come as bytes"):
            bulk.run(config)


class _Heard(http.server.BaseHTTPRequestHandler):
    """Writes down what is posted, and leads elsewhere whoever comes to /away."""

    heard: ClassVar = []

    def do_POST(self):
        told = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.heard.append((self.path, told["type"], told["data"]))
        self.send_response(302 if self.path == "/away" else 200)
        self.send_header("Location", "/elsewhere")
        self.end_headers()

    def log_message(self, *_):
        pass


def test_whoever_wants_is_called_when_a_batch_has_ended_and_no_other_address(tiny_model, tmp_path):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Heard) as listener:
        threading.Thread(target=listener.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{listener.server_port}/"
        with local_service(tiny_model, store=str(tmp_path), callback=[address]) as calling:
            own = openai.OpenAI(base_url=f"{calling.url}/v1", api_key="none", max_retries=0)
            with pytest.raises(openai.BadRequestError, match=r"callback: .*begins as none of"):
                order(own, extra_body={"callback": "http://169.254.169.254/"})
            batch = order(own, extra_body={"callback": f"{address}hook"})
            with making(calling, script("raise SystemExit('error: no')")):
                until(own, batch, "failed")
                end = time.monotonic() + 20
                while calling.runner.batches.unfinished():
                    assert time.monotonic() < end
                    time.sleep(0.02)
        assert not call_back(f"{address}away", "x", "failed", waits=())
        listener.shutdown()
    assert _Heard.heard == [("/hook", "batch.failed", {"id": batch.id}), ("/away", "batch.failed", {"id": "x"})]
