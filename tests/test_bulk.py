import io

import pyarrow.parquet as pq
import pytest

from pipelines import bulk, storage
from pipelines.bulk.inputs import read_requests
from pipelines.bulk.numerics import pin
from pipelines.bulk.service import ServiceAwayError
from pipelines.bulk.shards import commit_shard
from pipelines.config import GenerateConfig, PipelineError
from pipelines.images import from_png
from pipelines.requests import ImageRequest
from pipelines.worker import load_worker

pytestmark = pytest.mark.usefixtures("ray_session")


def config(store, model, **settings):
    chosen = {"count": 22, "shard_size": 8, "steps": 3, "name": "tiny", "lanes": 4, **settings}
    return GenerateConfig(store=str(store), model=model, **chosen)


def contents(uri):
    """All files by name, but for those that tell how long it took."""
    found = {info.uri.removeprefix(uri): storage.read_bytes(info.uri) for info in storage.list_objects(uri)}
    return {name: data for name, data in found.items() if name not in ("/bill.json", "/images.html")}


def rows(uri):
    parts = storage.read_manifest(uri, "images")["parts"]
    return [row for part in parts for row in pq.read_table(io.BytesIO(storage.read_part(uri, part))).to_pylist()]


def test_every_row_is_there_once_and_is_the_picture_that_was_asked_for(store, tiny_model):
    uri = bulk.run(config(store, tiny_model)).uri
    table = rows(uri)
    assert [row["row"] for row in table] == list(range(22))
    assert len({row["seed"] for row in table}) == 22
    worker = load_worker(tiny_model, lanes=4)
    for row in (table[0], table[13], table[21]):
        asked = {name: row[name] for name in ("prompt", "seed", "steps", "sampler", "grid", "guidance_scale")}
        assert (from_png(row["image"]["bytes"]) == worker.paint([ImageRequest(**asked)])[0]).all()


def test_a_run_that_was_cut_off_ends_with_the_same_files_and_redoes_only_what_was_missing(tmp_path, tiny_model):
    quiet = bulk.run(config(tmp_path / "quiet", tiny_model)).uri
    again = config(tmp_path / "again", tiny_model)
    uri = bulk.run(again.model_copy(update={"workers": 2})).uri
    written = {info.uri: info.version for info in storage.list_objects(uri)}
    parts = sorted(name for name in written if "/part-" in name)
    (tmp_path / uri / "manifest.json").unlink()
    (tmp_path / parts[1]).unlink()
    storage.write_bytes(parts[2], b"half of a shard")
    assert bulk.find(again) is None
    assert bulk.run(again).uri == uri
    assert contents(uri) == {name: data.replace(b"/again/", b"/quiet/") for name, data in contents(quiet).items()}
    kept = {info.uri: info.version for info in storage.list_objects(uri)}
    assert kept[parts[0]] == written[parts[0]]


def test_the_same_job_is_found_and_another_model_or_table_is_another_job(tmp_path, tiny_model):
    base = config(tmp_path, tiny_model)
    uri = bulk.run(base).uri
    found = bulk.find(base.model_copy(update={"workers": 2, "via": "serve"}))
    assert found is not None
    assert found.uri == uri
    for change in ({"seed": 9}, {"classes": "cat"}, {"steps": 4}, {"count": 23}):
        assert bulk.find(base.model_copy(update=change)) is None


def test_an_unknown_class_is_refused_before_anything_is_made(tmp_path, tiny_model):
    with pytest.raises(PipelineError, match="classes: no class 'dog'; there are bear"):
        bulk.run(config(tmp_path, tiny_model, classes="cat, dog"))
    assert storage.list_if_any(str(tmp_path)) == []


class Fleeting:
    """A service whose engines have lanes and threads of their own; it answers for two shards, and is gone then."""

    def __init__(self, job):
        self.worker = load_worker(job.config.model, lanes=8, threads=1)
        self.model, self.numerics, self.asked = self.worker.model.config, self.worker.profile, []

    def ask(self, requests):
        self.asked.append(len(requests))
        return len(self.asked)

    def ends(self, requests, answer):
        if answer > 2:
            raise ServiceAwayError("the service is away")
        return self.worker.paint(requests)


@pytest.mark.usefixtures("one_thread")
def test_a_service_that_does_not_come_back_is_gone_on_without_and_what_others_made_is_not_asked_of_it(
    tmp_path, tiny_model, monkeypatch, capsys
):
    quiet = bulk.run(config(tmp_path / "quiet", tiny_model, count=32, lanes=8, threads=1)).uri
    begun = config(tmp_path / "begun", tiny_model, count=32, via="serve", lanes=4, threads=2)
    asked = []

    def service(job):
        orders, requests = job.orders(0), read_requests(job.orders(0))
        found = Fleeting(job)
        pin(job.uri, found.numerics)
        spent = {"calls": 0, "seconds": 0.0}
        commit_shard(job, 0, orders, requests, found.worker.paint(requests), found.numerics, spent)
        asked.append(found.asked)
        return found

    monkeypatch.setattr("pipelines.bulk.service.Service", service)
    uri = bulk.run(begun).uri
    assert {name: data for name, data in contents(uri).items() if "part-" in name} == {
        name: data for name, data in contents(quiet).items() if "part-" in name
    }
    assert asked == [[8, 8, 8]]
    assert "the service is away; going on with workers of the job's own" in capsys.readouterr().out


@pytest.mark.usefixtures("one_thread")
def test_workers_take_the_lanes_and_threads_that_a_job_was_begun_with_unless_a_flag_says_others(tmp_path, tiny_model):
    begun = GenerateConfig(store=str(tmp_path), model=tiny_model, count=8, steps=1, workers=1)
    profile = load_worker(tiny_model, lanes=6, threads=1).profile
    pin(bulk.plan.job_uri(begun), profile)
    for other, told in (({"lanes": 8}, "lanes 6 there, 8 here"), ({"threads": 2}, "threads 1 there, 2 here")):
        with pytest.raises(PipelineError, match=told):
            bulk.run(begun.model_copy(update=other))
    uri = bulk.run(begun.model_copy(update={"lanes": 0})).uri
    assert [part["numerics"] for part in storage.read_manifest(uri, "images")["parts"]] == [profile]
