"""Batches made by commands in place of the bulk stage's, without a service: what befalls one, and what is heard."""

import asyncio
import json
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest

from diffusion_core.config import PRESETS, ModelConfig
from pipelines import storage
from pipelines.serve.batches import BatchBody, Batches, State
from pipelines.serve.callbacks import call_back
from pipelines.serve.catalogue import Version
from pipelines.serve.runner import Runner
from pipelines.serve.uploads import GENERATIONS, Upload


@pytest.fixture
def batches(tmp_path):
    return Batches(str(tmp_path / "store"))


def order(batches, **how):
    """Order a batch of one row."""
    upload = Upload("file-1", "t.csv", 9, 0, 1, ["class"], f"{batches.folder}/t.csv", f"{batches.folder}/t.csv")
    version = Version("tiny", f"{batches.store}/model", "0" * 64, ModelConfig(PRESETS["tiny"]))
    body = BatchBody(input_file_id="file-1", endpoint=GENERATIONS, **how)
    return batches.order("ann", body, upload, version, "images")


def watched(batches, command, until, seconds=20.0):
    """Have open batches made until that is so."""
    runner = Runner(batches, 2, 0.02, {}, command=command)

    async def watch():
        watching = asyncio.create_task(runner.watch())
        end = time.monotonic() + seconds
        while not until():
            assert time.monotonic() < end
            assert not watching.done()
            await asyncio.sleep(0.01)
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)

    asyncio.run(watch())


def script(text):
    return lambda _: [sys.executable, "-c", text]


def closed(batches):
    return lambda: not batches.unfinished()


def test_a_line_of_any_length_is_heard_as_far_as_it_is_kept_and_the_next_one_whole(batches):
    ordered = order(batches)
    watched(batches, script("print('x' * 300_000, flush=True)\nraise SystemExit('error: no space')"), closed(batches))
    assert batches.state(ordered).error == "no space"
    other = order(batches, seed=2)
    watched(batches, script("import sys\nsys.stdout.write('y' * 300_000); sys.exit(1)"), closed(batches))
    told = batches.state(other)
    assert (told.status, set(told.error)) == ("failed", {"y"})
    assert len(told.error) < 20_000


def test_a_batch_that_fails_as_nobody_expected_ends_with_its_error_in_the_log_and_is_made_when_ordered_again(
    batches, monkeypatch
):
    ordered, runs, logged = order(batches), [], []
    monkeypatch.setattr("pipelines.serve.runner._log.error", lambda *told, **how: logged.append((told[1], how)))

    def broken(_):
        runs.append(1)
        raise ZeroDivisionError("division\nby zero")

    watched(batches, broken, closed(batches))
    told = batches.state(ordered)
    assert (told.status, told.error, len(runs)) == ("failed", "ZeroDivisionError: division by zero", 1)
    assert [(name, type(how["exc_info"])) for name, how in logged] == [(ordered.id, ZeroDivisionError)]
    order(batches)
    watched(batches, script("raise SystemExit('error: no')"), closed(batches))
    assert batches.state(ordered).error == "no"


def test_a_batch_whose_record_no_longer_fits_the_settings_fails_and_says_so(batches):
    ordered = order(batches)
    place = f"{batches.folder}/ann/batches/{ordered.id}/batch.json"
    told = storage.read_json(place)
    storage.write_bytes(place, json.dumps({**told, "job": {**told["job"], "stepz": 1}}).encode())
    watched(batches, script(""), closed(batches))
    assert "stepz" in batches.state(ordered).error


def test_a_batch_waits_for_a_store_that_is_away(batches, monkeypatch):
    ordered, tries, note = order(batches), [], batches.note

    def away(told, state):
        tries.append(1)
        if len(tries) < 3:
            raise storage.StoreAwayError("away")
        note(told, state)

    monkeypatch.setattr(batches, "note", away)
    watched(batches, script("raise SystemExit('error: no')"), closed(batches))
    assert batches.state(ordered).error == "no"


def test_a_batch_that_is_ordered_again_while_its_end_is_told_is_made_again(batches, monkeypatch):
    ordered, called, runs = order(batches, callback="http://x/"), [], []

    def tell(_, name, status):
        if not called:
            assert order(batches, callback="http://x/").id == name
        called.append(status)
        return True

    def command(_):
        runs.append(1)
        return [sys.executable, "-c", f"raise SystemExit('error: {len(runs)}')"]

    monkeypatch.setattr("pipelines.serve.runner.call_back", tell)
    watched(batches, command, closed(batches))
    assert (called, len(runs), batches.state(ordered).error) == (["failed", "failed"], 2, "2")


def test_a_batch_that_is_ordered_again_while_it_is_closed_stays_open(batches, monkeypatch):
    ordered, remove = order(batches), storage.remove_object
    batches.note(ordered, State("failed"))

    def removed(uri):
        if uri.endswith(ordered.id):
            monkeypatch.setattr(storage, "remove_object", remove)
            order(batches)
        remove(uri)

    monkeypatch.setattr(storage, "remove_object", removed)
    batches.close(ordered)
    assert [each.id for each in batches.unfinished()] == [ordered.id]
    batches.note(ordered, State("failed"))
    batches.close(ordered)
    assert batches.unfinished() == []


def test_whoever_answers_a_callback_with_no_http_is_nobody():
    class Garbled(BaseHTTPRequestHandler):
        def do_POST(self):
            self.wfile.write(b"no status line\r\n\r\n")

    with HTTPServer(("127.0.0.1", 0), Garbled) as listener:
        Thread(target=listener.handle_request, daemon=True).start()
        assert not call_back(f"http://127.0.0.1:{listener.server_port}/", "x", "failed", waits=())
    assert not call_back("http://127.0.0.1/a b", "x", "failed", waits=())
