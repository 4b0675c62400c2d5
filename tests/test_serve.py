import base64
import importlib
import io
import json
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import openai
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import ROOT
from PIL import Image
from support.models import publish
from test_worker import BOX, mask, picture

from pipelines import bulk, storage
from pipelines.config import GenerateConfig, PipelineError, PromoteConfig, RollbackConfig, ServeConfig
from pipelines.images import from_png, to_png
from pipelines.model import model_digest
from pipelines.registry import promote, roll_back
from pipelines.requests import ImageRequest
from pipelines.worker import load_worker, picture_seed


@pytest.fixture(scope="module")
def store(tmp_path_factory, tiny_model):
    """A store of its own that holds the model, and nothing promoted."""
    folder = tmp_path_factory.mktemp("served")
    shutil.copytree(tiny_model.split("/models/")[0], folder, dirs_exist_ok=True)
    return str(folder)


@pytest.fixture(scope="module")
def live(store, tiny_model):
    """URI of the same model in that store."""
    return f"{store}/models/{tiny_model.split('/models/')[1]}"


@pytest.fixture(scope="module")
def url(ray_session, store, live):
    from pipelines import serve

    yield serve.start(ServeConfig(store=store, name="tiny", also=[f"kept={live}"], port=0, watch=0.2, cpus=0.25))
    serve.stop()


@pytest.fixture(scope="module")
def client(url):
    with httpx.Client(base_url=url, timeout=60) as session:
        yield session


def pictures(answer):
    assert answer.status_code == 200, answer.text
    return [from_png(base64.b64decode(item["b64_json"])) for item in answer.json()["data"]]


def test_pictures_are_those_of_the_model_and_the_request_alone(client, tiny_model):
    body = {"prompt": "cat", "n": 3, "seed": 5, "steps": 4}
    with ThreadPoolExecutor(8) as pool:
        others = [{"prompt": "frog", "n": 2, "seed": seed, "steps": 3 + seed % 3} for seed in range(8)]
        crowd = [pool.submit(client.post, "/v1/images/generations", json=other) for other in others]
        served = pictures(client.post("/v1/images/generations", json=body))
        assert all(future.result().status_code == 200 for future in crowd)
    requests = [ImageRequest(prompt="cat", seed=picture_seed(5, index), steps=4) for index in range(3)]
    for ours, theirs in zip(load_worker(tiny_model).paint(requests), served, strict=True):
        assert np.array_equal(ours, theirs)


def test_a_seed_that_was_drawn_is_told_and_makes_the_picture_again(client):
    first = client.post("/v1/images/generations", json={"steps": 3})
    second = client.post("/v1/images/generations", json={"steps": 3, "seed": first.json()["seed"]})
    assert np.array_equal(pictures(first)[0], pictures(second)[0])
    other = client.post("/v1/images/generations", json={"steps": 3})
    assert other.json()["seed"] != first.json()["seed"]


def test_an_edit_keeps_every_byte_outside_the_mask(client):
    original = picture(5)
    files = {"image": to_png(original), "mask": mask(BOX)}
    painted = pictures(client.post("/v1/images/edits", data={"prompt": "cat", "steps": 3, "n": 2}, files=files))
    assert len(painted) == 2
    for result in painted:
        assert np.array_equal(result[~BOX], original[~BOX])
    assert not np.array_equal(painted[0][BOX], painted[1][BOX])


def test_denoising_answers_with_the_mean_unless_more_steps_are_asked_for(client, tiny_model):
    noisy = to_png(picture(6))
    form = {"noise_level": 0.3, "seed": 3}
    served = pictures(client.post("/v1/images/denoise", data=form, files={"image": noisy}))[0]
    asked = ImageRequest(task="denoise", seed=picture_seed(3, 0), image=noisy, noise_level=0.3, steps=1)
    assert np.array_equal(served, load_worker(tiny_model).paint([asked])[0])


def test_the_unmodified_openai_client_works(url):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["tiny", "kept"]
    made = client.images.generate(model="tiny", prompt="cat", n=2, size="auto", extra_body={"steps": 3, "seed": 1})
    assert [from_png(base64.b64decode(item.b64_json)).shape for item in made.data] == [(8, 8, 3)] * 2
    image, hole = io.BytesIO(to_png(picture())), io.BytesIO(mask(BOX))
    image.name, hole.name = "image.png", "mask.png"
    edited = client.images.edit(model="tiny", image=image, mask=hole, prompt="cat", extra_body={"steps": 3})
    assert np.array_equal(from_png(base64.b64decode(edited.data[0].b64_json))[~BOX], picture()[~BOX])
    with pytest.raises(openai.BadRequestError, match="no class 'dog'"):
        client.images.generate(model="tiny", prompt="dog")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"prompt": "dog"}, "prompt"),
        ({"n": 0}, "n"),
        ({"n": 65}, "n"),
        ({"size": "64x64"}, "size"),
        ({"model": "other"}, "model"),
        ({"sampler": "magic"}, "sampler"),
        ({"stepz": 3}, "stepz"),
        ({"seed": -1}, "seed"),
        ({"response_format": "file"}, "response_format"),
        ({"quality": "hd"}, "quality"),
    ],
)
def test_a_bad_request_names_its_field(client, body, field):
    answer = client.post("/v1/images/generations", json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == field
    assert field in error["message"]


def test_a_bad_file_names_its_field(client):
    whole = to_png(picture())
    for files, field in (
        ({"image": b"broken"}, "image"),
        ({"image": whole}, "image"),
        ({"image": whole, "mask": b"broken"}, "mask"),
        ({"mask": mask(BOX)}, "image"),
    ):
        answer = client.post("/v1/images/edits", data={"steps": 3}, files=files)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)
    answer = client.post("/v1/images/denoise", data={"steps": 3, "noise_level": 99}, files={"image": whole})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "noise_level")
    assert client.post("/v1/images/denoise", data={"steps": 3}, files={"image": whole}).status_code == 200, "estimated"


def test_an_answer_tells_what_made_it(client, tiny_model):
    answer = client.post("/v1/images/generations", json={"prompt": "cat", "seed": 4, "steps": 3}).json()
    told = Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"]))).text
    assert told["seed"] == str(answer["data"][0]["seed"]) == str(picture_seed(4, 0))
    assert told["model"] == answer["version"] == client.get("/v1/models").json()["data"][0]["digest"]


def test_bulk_through_the_service_has_the_same_bytes_as_through_actors(url, tmp_path, live):
    shards = []
    for via in ("serve", "actors"):
        job = GenerateConfig(store=str(tmp_path / via), model=live, name="t", count=20, shard_size=8, steps=3, via=via)
        uri = bulk.run(job).uri
        shards.append([storage.read_part(uri, part) for part in storage.read_manifest(uri, "images")["parts"]])
    assert shards[0] == shards[1]


def test_an_answer_of_the_service_and_a_row_of_bulk_are_the_same_file(client, tmp_path, tiny_model):
    job = GenerateConfig(store=str(tmp_path), model=tiny_model, name="t", count=3, classes="cat", steps=3, seed=6)
    uri = bulk.run(job).uri
    (part,) = storage.read_manifest(uri, "images")["parts"]
    rows = pq.read_table(io.BytesIO(storage.read_part(uri, part)))["image"].to_pylist()
    answer = client.post("/v1/images/generations", json={"prompt": "cat", "n": 3, "seed": 6, "steps": 3}).json()
    assert [base64.b64decode(item["b64_json"]) for item in answer["data"]] == [row["bytes"] for row in rows]


def test_bulk_refuses_a_service_that_runs_another_model(url, tmp_path, tiny_model):
    other = str(tmp_path / "model")
    shutil.copytree(tiny_model, other)
    job = GenerateConfig(store=str(tmp_path), model=other, name="t", count=4, steps=3, via="serve")
    with pytest.raises(PipelineError, match=r"this service runs .* serve that one"):
        bulk.run(job)


def test_the_batch_that_is_shown_is_made_beside_the_service_and_fetched(url, live, tmp_path, monkeypatch):
    page = (ROOT / "docs/bulk.md").read_text()
    (block,) = [text for text in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL) if "openai" in text]
    (tmp_path / "orders.csv").write_text("class,seed,steps,order\n" + "".join(f"cat,{n},2,A-{n}\n" for n in range(5)))
    monkeypatch.chdir(tmp_path)
    told = {}
    exec(block.replace("http://127.0.0.1:8000", url).replace("sleep(5)", "sleep(0.2)"), told)
    batch = told["batch"]
    assert batch.status == "completed", batch.errors
    assert (batch.request_counts.completed, batch.request_counts.failed, batch.error_file_id) == (5, 0, None)
    made = [json.loads(line) for line in (tmp_path / "pictures.jsonl").read_text().splitlines()]
    assert [line["custom_id"] for line in made] == ["0", "1", "2", "3", "4"]
    expected = load_worker(live).paint([ImageRequest(prompt="cat", seed=row, steps=2) for row in range(5)])
    for line, pixels in zip(made, expected, strict=True):
        (picture,) = line["response"]["body"]["data"]
        assert np.array_equal(from_png(base64.b64decode(picture["b64_json"])), pixels)
    manifest = storage.read_manifest(batch.images, "images")
    assert manifest["model"]["uri"] == live
    (part,) = manifest["parts"]
    orders = pq.read_table(io.BytesIO(storage.read_part(batch.images, part)))["order"].to_pylist()
    assert orders == [f"A-{n}" for n in range(5)]


def test_a_port_in_use_is_refused(url, tiny_model):
    from pipelines import serve

    port = int(url.rsplit(":", 1)[1])
    with pytest.raises(PipelineError, match=f"127.0.0.1:{port} cannot be used"):
        serve.start(ServeConfig(model=tiny_model, port=port))


def test_a_missing_model_is_refused(tmp_path):
    from pipelines import serve

    with pytest.raises(storage.StorageError, match="no published model here"):
        serve.start(ServeConfig(store=str(tmp_path), name="none"))


def test_a_promotion_and_a_roll_back_change_the_answers_without_a_restart(client, store, live):
    other = publish(store, 7)
    body = {"seed": 3, "steps": 3, "guidance_scale": 1.0}
    expected = {
        uri: load_worker(uri).paint([ImageRequest(seed=picture_seed(3, 0), steps=3, guidance_scale=1.0)])[0]
        for uri in (live, other)
    }

    def answered_by(uri):
        end = time.monotonic() + 60
        while True:
            answer = client.post("/v1/images/generations", json=body)
            made = pictures(answer)[0]
            (digest,) = (model["digest"] for model in client.get("/v1/models").json()["data"] if model["id"] == "tiny")
            assert any(np.array_equal(made, expected[each]) for each in expected)
            if digest == model_digest(storage.read_manifest(uri, "model")) == answer.json()["version"]:
                return np.array_equal(made, expected[uri])
            assert time.monotonic() < end, "the service did not follow"

    promote(PromoteConfig(model=live, force=True, reason="test"))
    promote(PromoteConfig(model=other, force=True, reason="test"))
    assert answered_by(other)
    kept = client.post("/v1/images/generations", json={**body, "model": "kept"})
    assert np.array_equal(pictures(kept)[0], expected[live])
    roll_back(RollbackConfig(store=store, name="tiny"))
    assert answered_by(live)


def test_who_hangs_up_at_the_proxy_frees_the_engine(url, client):
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/images/generations", json={"n": 64, "steps": 1000}, timeout=1)
    began = time.monotonic()
    pictures(client.post("/v1/images/generations", json={"steps": 3}))
    assert time.monotonic() - began < 20, "64,000 calls would take minutes"


def test_every_metric_of_the_dashboards_is_exported(client, ray_session):
    import ray

    from pipelines.bulk.bill import Bill
    from pipelines.bulk.metrics import BulkMetrics
    from pipelines.train.metrics import _METRICS, TrainMetrics

    body = {"steps": 3, "stream": True, "partial_images": 1}
    assert client.post("/v1/images/generations", json=body).status_code == 200
    assert client.post("/v1/images/generations", json={"n": 64, "steps": 900, "timeout": 0.01}).status_code == 504
    TrainMetrics("told").tell(dict.fromkeys(_METRICS, 0.25))
    BulkMetrics("told").tell(Bill(pictures=40, rejected=2, calls=720, seconds=9.5, bytes=12), 100)
    names = ("serving", "training", "bulk")
    dashboards = [(ROOT / f"infra/grafana/{name}.json").read_text() for name in names]
    pages = [(ROOT / f"docs/{name}.md").read_text() for name in ("load", "cluster-training", "bulk")]
    # Tries after a death come with the first death: there is none here
    wanted = set(re.findall(r"ray_diffusion_\w+", "".join(dashboards))) - {"ray_diffusion_retries_total"}
    assert {"ray_diffusion_pictures_total", "ray_diffusion_tick_seconds_bucket", "ray_diffusion_train_loss"} <= wanted
    (node,) = ray.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    end = time.monotonic() + 60
    while wanted - set(re.findall(r"^(ray_diffusion_\w+)", httpx.get(address).text, flags=re.M)):
        assert time.monotonic() < end, wanted
        time.sleep(0.5)
    told = dict(re.findall(r'^(ray_diffusion_bulk_\w+){.*job="told".*} (\S+)$', httpx.get(address).text, flags=re.M))
    rows = ("done", "left", "rejected")
    assert [float(told[f"ray_diffusion_bulk_rows_{name}"]) for name in rows] == [42, 58, 2]
    for dashboard, page in zip(dashboards, pages, strict=True):
        for panel in json.loads(dashboard)["panels"]:
            assert f"| {panel['title']} |" in page


def test_the_written_configuration_is_the_same_application_and_a_typo_in_it_is_an_error(url, tmp_path, store):
    from ray.serve.schema import ServeDeploySchema

    from pipelines import serve

    path = str(tmp_path / "service.yaml")
    config = ServeConfig(store=store, name="tiny", max_replicas=3, key_file="s3://bucket/keys.json", to=path)
    assert serve.run(config).uri == path
    with open(path) as file:
        written = yaml.safe_load(file)
    ServeDeploySchema.model_validate(written)
    (application,) = written["applications"]
    module, _, name = application["import_path"].partition(":")
    made = getattr(importlib.import_module(module), name)
    assert type(made(application["args"])) is type(made({"store": store, "name": "tiny"}))
    with pytest.raises(ValueError, match="max_replica"):
        made({**application["args"], "max_replica": 3})


def test_engines_have_all_models_or_each_model_its_own(ray_session, store, live):
    from pipelines.serve.stage import application

    shared = application(ServeConfig(store=store, name="tiny", also=[f"kept={live}"]))
    apart = application(ServeConfig(store=store, name="tiny", also=[f"kept={live}"], share=False))
    names = [{engine._bound_deployment.name for engine in made._bound_deployment.init_args[1].values()}
             for made in (shared, apart)]  # fmt: skip
    assert names == [{"engine"}, {"engine-tiny", "engine-kept"}]
