"""Bulk work from tables: what a row may say, what is refused, what comes out, and that it can be read by anyone."""

import csv
import io
import json
import tarfile
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines import bulk, storage
from pipelines.bulk.bill import Bill
from pipelines.bulk.engine import Shared
from pipelines.bulk.inputs import Rejection
from pipelines.bulk.numerics import pin
from pipelines.bulk.plan import job_uri, plan_job
from pipelines.bulk.rows import check_columns
from pipelines.bulk.stage import Done
from pipelines.config import GenerateCommand, GenerateConfig, PipelineError, TraceConfig, VerifyConfig, parse
from pipelines.image_sets import own_names, rejected_of, rows_of
from pipelines.images import from_png, to_png
from pipelines.lineage import trace, verify
from pipelines.model import load_model
from pipelines.requests import ImageRequest
from pipelines.worker import Worker, load_worker

pytestmark = pytest.mark.usefixtures("ray_session")
NAMES = ["class", "seed", "steps", "guidance_scale", "order"]
ROWS = [["cat", 5, 3, 1.5, "a-1"], ["bear", None, None, None, "a-2"], ["", 7, 2, None, "a-3"], ["cat", 8, 2, 3, "a-4"]]


def config(tmp_path, model, **settings):
    chosen = {"shard_size": 2, "steps": 3, "name": "t", "workers": 1, "lanes": 4, **settings}
    return GenerateConfig(store=str(tmp_path / "store"), model=model, **chosen)


@pytest.fixture(scope="module")
def worker(tiny_model):
    """A worker as a job's, whose pictures are compared with the job's."""
    return load_worker(tiny_model, lanes=4)


def csv_of(path, names=NAMES, rows=ROWS):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([names, *(["" if cell is None else cell for cell in row] for row in rows)])
    return str(path)


def jsonl_of(path, names=NAMES, rows=ROWS):
    lines = ({name: cell for name, cell in zip(names, row, strict=True) if cell is not None} for row in rows)
    path.write_text("".join(json.dumps(line) + "\n\n" for line in lines))
    return str(path)


def parquet_of(path, names=NAMES, rows=ROWS):
    pq.write_table(
        pa.table({name: list(cells) for name, cells in zip(names, zip(*rows, strict=True), strict=True)}), path
    )
    return str(path)


def rows(uri):
    manifest = storage.read_manifest(uri, "images")
    return [row for part in manifest["parts"] for row in rows_of(uri, manifest, part)]


def rejected(uri):
    return [row for part in storage.read_manifest(uri, "images")["parts"] for row in rejected_of(uri, part)]


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def test_a_table_of_any_kind_gives_the_pictures_that_its_rows_ask_for(worker, tmp_path, tiny_model):
    tables = [csv_of(tmp_path / "t.csv"), jsonl_of(tmp_path / "t.jsonl"), parquet_of(tmp_path / "t.parquet")]
    made = [rows(bulk.run(config(tmp_path, tiny_model, table=table, carry=["order"])).uri) for table in tables]
    assert made[0] == made[1] == made[2]
    table = made[0]
    assert [row["order"] for row in table] == ["a-1", "a-2", "a-3", "a-4"]
    assert [(row["prompt"], row["steps"], row["guidance_scale"]) for row in table] == [
        ("cat", 3, 1.5), ("bear", 3, 2.0), ("", 2, 2.0), ("cat", 2, 3.0),
    ]  # fmt: skip
    assert [row["seed"] for row in table][::2] == [5, 7]
    for row in table:
        asked = ImageRequest(**{name: row[name] for name in ("prompt", "seed", "steps", "guidance_scale")})
        assert (from_png(row["image"]["bytes"]) == worker.paint([asked])[0]).all()
        assert row["sha256"] == storage.digest(row["image"]["bytes"])


@pytest.mark.parametrize(
    ("names", "carry", "message"),
    [
        (["class", "seeed"], [], r"column 'seeed' means nothing here; did you mean 'seed'\? .*--carry seeed"),
        (["class", "prompt"], [], "columns 'class' and 'prompt' are the same thing"),
        (["class", "seed"], ["order"], "--carry order: no such column; there are class, seed"),
        (["class", "seed"], ["seed"], "--carry seed: the output has such a column anyway; leave the flag out"),
        (["class", "sha256"], ["sha256"], "--carry sha256: the output has one of its own; rename the table's column"),
        (["class", "reason"], ["reason"], "--carry reason: the output has one of its own"),
    ],
)
@pytest.mark.parametrize("write", [csv_of, jsonl_of, parquet_of])
def test_columns_that_mean_nothing_are_refused_with_the_nearest_name(
    tmp_path, tiny_model, write, names, carry, message
):
    suffix = {csv_of: "csv", jsonl_of: "jsonl", parquet_of: "parquet"}[write]
    table = write(tmp_path / f"t.{suffix}", names, [["cat", "1"]])
    with pytest.raises(PipelineError, match=message):
        bulk.run(config(tmp_path, tiny_model, table=table, carry=carry))
    assert storage.list_if_any(str(tmp_path / "store")) == []


def test_what_is_carried_never_takes_the_place_of_what_the_output_says_itself(tmp_path, tiny_model):
    table = csv_of(tmp_path / "t.csv", ["class", "order"], [["cat", "a"]])
    for format in ("parquet", "webdataset", "png"):
        uri = bulk.run(config(tmp_path, tiny_model, table=table, carry=["order"], format=format)).uri
        (part,) = storage.read_manifest(uri, "images")["parts"]
        said = set(storage.read_part(uri, part).splitlines()) if format == "png" else []
        names = {name for line in said for name in json.loads(line)} | set(rows(uri)[0])
        assert names - {"order"} <= own_names()
    for name in sorted(own_names() | {"error", "file_name"}):
        with pytest.raises(PipelineError, match=f"t: --carry {name}: the output has"):
            check_columns("t", ["class", name], [name])


BAD = [["cat", 1, "3"], ["dog", 2, "3"], ["cat", 3, "many"], ["cat", -4, "3"], ["bear", 5, "3"]]


def test_all_rows_that_are_wrong_are_told_before_anything_is_made(tmp_path, tiny_model):
    table = csv_of(tmp_path / "t.csv", ["class", "seed", "steps"], BAD)
    with pytest.raises(PipelineError) as raised:
        bulk.run(config(tmp_path, tiny_model, table=table))
    told = str(raised.value)
    assert "3 of 5 rows (the first is 0) are wrong: row 1: prompt: no class 'dog'" in told
    assert "row 2: steps: 'many': " in told
    assert "row 3: seed: '-4': " in told
    assert "\n" not in told
    assert storage.list_if_any(str(tmp_path / "store")) == []


def test_many_rows_that_are_wrong_are_all_listed_in_the_store_and_no_reason_is_long(tmp_path, tiny_model, monkeypatch):
    monkeypatch.setattr("pipelines.bulk.plan._BYTES_OF_LIST", 1000)
    names = [f"dog{row}" for row in range(30)]
    table = csv_of(tmp_path / "t.csv", ["class", "seed"], [["cat", 1], *([name, 1] for name in names), ["x" * 9999, 1]])
    job = config(tmp_path, tiny_model, table=table, shard_size=4)
    folder = f"{job_uri(job)}/staging/wrong"
    for _ in range(2):
        with pytest.raises(PipelineError, match=rf"31 of 32 rows .*; and 11 more \(all are listed in {folder}\); mend"):
            bulk.run(job)
        parts = sorted(info.uri for info in storage.list_objects(folder))
        told = [json.loads(line) for part in parts for line in storage.read_bytes(part).splitlines()]
        assert len(parts) > 1
        assert [each["row"] for each in told] == list(range(1, 32))
        assert all(f"'{name}'" in each["reason"] for name, each in zip(names, told, strict=False))
        assert len(told[-1]["reason"]) < 600
        assert told[-1]["reason"].startswith("prompt: no class 'xxx")
    with pytest.raises(PipelineError, match=r"and 11 more \(a run lists all\)"):
        bulk.rehearse(GenerateCommand(**job.model_dump(exclude_unset=True), dry_run=True))
    uri = bulk.run(job.model_copy(update={"skip_bad": True})).uri
    assert [row["reason"] for row in rejected(uri)] == ["bad_row"] * 31


def test_rows_that_are_wrong_are_left_out_where_that_is_asked_for_and_the_others_stay_as_they_are(
    worker, tmp_path, tiny_model
):
    table = csv_of(tmp_path / "t.csv", ["class", "seed", "steps"], BAD)
    uri = bulk.run(config(tmp_path, tiny_model, table=table, skip_bad=True)).uri
    manifest = storage.read_manifest(uri, "images")
    assert manifest["counts"] == {"rows": 5, "made": 2, "rejected": 3}
    assert manifest["reasons"] == {"bad_row": 3}
    assert [row["row"] for row in rows(uri)] == [0, 4]
    assert [row["row"] for row in rejected(uri)] == [1, 2, 3]
    (alone,) = worker.paint([ImageRequest(prompt="bear", seed=5, steps=3)])
    assert (from_png(rows(uri)[1]["image"]["bytes"]) == alone).all()
    verify.run(VerifyConfig(uri=uri))


def test_a_run_that_another_one_overtakes_while_it_reads_its_plan_ends_with_the_others_images(
    tmp_path, tiny_model, monkeypatch, capsys
):
    job = config(tmp_path, tiny_model, table=csv_of(tmp_path / "t.csv"), carry=["order"])
    read_json, others = storage.read_json, []

    def overtaken(uri):
        if uri.endswith("staging/plan.json") and not others:
            others.append("begun")
            others[0] = bulk.run(job)
        return read_json(uri)

    monkeypatch.setattr(storage, "read_json", overtaken)
    own = bulk.run(job)
    assert (own.found, others[0].found, own.uri) == (True, False, others[0].uri)
    late = bulk.run(job)
    assert late.found
    assert capsys.readouterr().out.count("another run published") == 2
    assert len(rows(own.uri)) == len(ROWS)
    assert not [info for info in storage.list_objects(own.uri) if "/staging/" in info.uri]


@pytest.fixture
def edits(tmp_path):
    """A table of pictures to inpaint from its own folder on: two good ones, one missing, one with a damaged mask."""
    (tmp_path / "in").mkdir()
    rng = np.random.default_rng(0)
    for name in ("one", "two", "four"):
        (tmp_path / f"in/{name}.png").write_bytes(to_png(rng.integers(256, size=(8, 8, 3), dtype=np.uint8)))
    hole = np.full((8, 8, 4), 255, dtype=np.uint8)
    hole[2:6, 2:6, 3] = 0
    (tmp_path / "in/hole.png").write_bytes(png(hole))
    (tmp_path / "in/damaged.png").write_bytes(png(hole)[:60])
    named = [["one.png", "hole.png"], ["two.png", "hole.png"], ["three.png", "hole.png"], ["four.png", "damaged.png"]]
    return csv_of(tmp_path / "in/t.csv", ["image", "mask"], named)


def test_a_folder_is_inpainted_and_what_can_never_be_is_rejected_by_itself(tmp_path, tiny_model, edits, capsys):
    job = config(tmp_path, tiny_model, table=edits, task="inpaint", inpainting="replacement", max_rejected="2")
    uri = bulk.run(job).uri
    table = rows(uri)
    assert [row["row"] for row in table] == [0, 1]
    for row, name in zip(table, ("one", "two"), strict=True):
        before, after = from_png((tmp_path / f"in/{name}.png").read_bytes()), from_png(row["image"]["bytes"])
        changed = (before != after).any(axis=-1)
        assert changed[2:6, 2:6].any()
        changed[2:6, 2:6] = False
        assert not changed.any()
        assert row["image_sha256"] == storage.digest((tmp_path / f"in/{name}.png").read_bytes())
    assert [(row["row"], row["reason"]) for row in rejected(uri)] == [(2, "missing_object"), (3, "refused")]
    assert "three.png: not found" in rejected(uri)[0]["error"]
    assert rejected(uri)[1]["error"].startswith("mask: ")
    verify.run(VerifyConfig(uri=uri))
    assert "4 rows = 2 pictures + 2 rejected, in 2 shards" in capsys.readouterr().out
    page = (tmp_path / uri / "images.html").read_text()
    assert "Before and after" in page
    assert "three.png: not found" in page


def test_an_edit_is_traced_and_made_again_from_the_files_that_its_row_names(tmp_path, tiny_model, edits, capsys):
    store = tiny_model.split("/models/")[0]
    job = config(tmp_path, tiny_model, table=edits, task="inpaint", max_rejected="2").model_copy(
        update={"store": store}
    )
    uri = bulk.run(job).uri
    trace.run(TraceConfig(uri=uri, row=1, remake=True))
    out = capsys.readouterr().out
    assert f"--table {edits}" in out
    assert "remake: equal" in out
    with pytest.raises(PipelineError, match=r"row 2 was rejected: image: .*three.png: not found"):
        trace.run(TraceConfig(uri=uri, row=2))
    (tmp_path / "in/two.png").write_bytes((tmp_path / "in/one.png").read_bytes())
    with pytest.raises(PipelineError, match="made of a file with SHA-256"):
        trace.run(TraceConfig(uri=uri, row=1, remake=True))


def test_more_impossible_rows_than_are_allowed_stop_the_run_which_goes_on_where_more_are(tmp_path, tiny_model, edits):
    job = config(tmp_path, tiny_model, table=edits, task="inpaint", inpainting="replacement")
    with pytest.raises(PipelineError, match="rows cannot be made, more than --max-rejected 10%"):
        bulk.run(job)
    assert bulk.find(job) is None
    assert storage.is_published(bulk.run(job.model_copy(update={"max_rejected": "50%"})).uri)


def test_pictures_may_stand_in_a_parquet_table_as_bytes_and_as_datasets_store_them(worker, tmp_path, tiny_model):
    pixels = np.random.default_rng(1).integers(256, size=(8, 8, 3), dtype=np.uint8)
    data = to_png(pixels)
    for number, image in enumerate((data, {"bytes": data, "path": "x.png"})):
        table = tmp_path / f"{number}.parquet"
        pq.write_table(pa.table({"image": [image], "noise_level": [0.3], "id": [7]}), table)
        job = config(tmp_path, tiny_model, table=str(table), task="denoise", carry=["id"], seed=3)
        (row,) = rows(bulk.run(job).uri)
        asked = ImageRequest(task="denoise", image=data, noise_level=0.3, seed=row["seed"], steps=3, guidance_scale=1)
        assert (from_png(row["image"]["bytes"]) == worker.paint([asked])[0]).all()
        assert (row["id"], row["guidance_scale"], row["image_sha256"]) == (7, 1.0, storage.digest(data))


def test_a_changed_table_is_another_job(tmp_path, tiny_model):
    job = config(tmp_path, tiny_model, table=csv_of(tmp_path / "t.csv"), carry=["order"])
    uri = job_uri(job)
    csv_of(tmp_path / "t.csv", rows=ROWS[::-1])
    assert job_uri(job) != uri


def test_a_table_that_is_replaced_after_the_job_was_named_by_it_is_not_made_under_that_name(tmp_path, tiny_model):
    job = config(tmp_path, tiny_model, table=csv_of(tmp_path / "t.csv"), carry=["order"])
    uri = job_uri(job)
    csv_of(tmp_path / "t.csv", rows=ROWS[::-1])
    with pytest.raises(PipelineError, match=r"t\.csv: replaced meanwhile; run the same command again"):
        plan_job(job, uri)
    assert storage.list_if_any(uri) == []
    assert plan_job(job, job_uri(job)).rows == len(ROWS)
    csv_of(tmp_path / "t.csv")
    assert plan_job(job, uri).rows == len(ROWS)


def test_the_same_rows_have_the_same_pictures_in_every_format(tmp_path, tiny_model):
    made = {}
    for kind in ("parquet", "webdataset", "png"):
        uri = bulk.run(config(tmp_path, tiny_model, count=5, format=kind)).uri
        verify.run(VerifyConfig(uri=uri))
        made[kind] = (uri, rows(uri))
    pictures = {kind: [row["image"]["bytes"] for row in table] for kind, (_, table) in made.items()}
    assert pictures["parquet"] == pictures["webdataset"] == pictures["png"]
    tars = sorted((tmp_path / made["webdataset"][0]).glob("*.tar"))
    with tarfile.open(tars[0]) as tar:
        assert tar.getnames() == ["000000000.png", "000000000.json", "000000001.png", "000000001.json"]
        told = json.loads(tar.extractfile("000000001.json").read())
    assert (told["row"], told["seed"]) == (1, made["parquet"][1][1]["seed"])
    folder = tmp_path / made["png"][0]
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert [(folder / line["file_name"]).read_bytes() for line in lines] == pictures["parquet"]


def test_strangers_open_the_shards(tmp_path, tiny_model):
    datasets = pytest.importorskip("datasets")
    webdataset = pytest.importorskip("webdataset")
    expected = [from_png(row["image"]["bytes"]) for row in rows(bulk.run(config(tmp_path, tiny_model, count=5)).uri)]
    uri = bulk.run(config(tmp_path, tiny_model, count=5)).uri
    table = datasets.load_dataset("parquet", data_files=f"{uri}/*.parquet", split="train", cache_dir=tmp_path / "c")
    assert all((np.asarray(row["image"]) == pixels).all() for row, pixels in zip(table, expected, strict=True))
    uri = bulk.run(config(tmp_path, tiny_model, count=5, format="png")).uri
    folder = datasets.load_dataset("imagefolder", data_dir=uri, split="train", cache_dir=tmp_path / "c")
    assert len(folder) == 5
    uri = bulk.run(config(tmp_path, tiny_model, count=5, format="webdataset")).uri
    tars = [str(path) for path in sorted((tmp_path / uri).glob("*.tar"))]
    samples = list(webdataset.WebDataset(tars, shardshuffle=False).decode("rgb8"))
    assert all((sample["png"] == pixels).all() for sample, pixels in zip(samples, expected, strict=True))


def test_verify_notices_every_byte_and_every_row(tmp_path, tiny_model):
    uri = bulk.run(config(tmp_path, tiny_model, count=5)).uri
    manifest = storage.read_manifest(uri, "images")
    place = f"{uri}/{manifest['parts'][1]['name']}"
    data = storage.read_bytes(place)
    storage.write_bytes(place, data[:100] + bytes([data[100] ^ 1]) + data[101:])
    with pytest.raises(PipelineError, match=r"faults: .*part-00001.*checksum"):
        verify.run(VerifyConfig(uri=uri))
    table = pq.read_table(io.BytesIO(data)).slice(1)
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    part = {**manifest["parts"][1], **storage.put_part(uri, "part-00001", ".parquet", buffer.getvalue())}
    parts = [manifest["parts"][0], part, manifest["parts"][2]]
    storage.write_bytes(f"{uri}/manifest.json", storage.to_json({**manifest, "parts": parts}))
    with pytest.raises(PipelineError, match=r"row 2 is missing; 4 rows made, but the manifest says 5"):
        verify.run(VerifyConfig(uri=uri))


def test_a_job_that_was_begun_on_another_kind_of_device_is_not_mixed(worker, tmp_path, tiny_model):
    job = config(tmp_path, tiny_model, count=4)
    profile = worker.profile
    pin(job_uri(job), {**profile, "torch": "0.1"})
    with pytest.raises(PipelineError, match=r"torch 0.1 there, .* here.*another --name"):
        bulk.run(job)


def test_a_dry_run_tells_rows_time_and_cost_and_writes_nothing(tmp_path, tiny_model, edits, capsys):
    flags = [
        "--lanes",
        "4",
        "--model",
        tiny_model,
        "--store",
        str(tmp_path / "store"),
        "--price",
        "2.5",
        "--dry-run",
        "--steps",
        "3",
    ]
    bulk.rehearse(parse(GenerateCommand, "generate", [*flags, "--count", "100"]))
    out = capsys.readouterr().out
    assert "100 rows in 2 shards of 64" in out
    assert "3.0 denoiser calls a picture" in out
    assert "at 2.5 a device hour" in out
    bulk.rehearse(parse(GenerateCommand, "generate", [*flags, "--table", edits, "--task", "inpaint"]))
    assert "4 rows in 1 shards" in capsys.readouterr().out
    assert storage.list_if_any(str(tmp_path / "store")) == []


def test_flags_that_a_table_has_no_use_for_are_refused(tmp_path, tiny_model):
    for wrong, message in (
        ({"table": "t.csv", "count": 5}, "--count is for rows without a table"),
        ({"carry": ["order"]}, "--carry names columns of a --table"),
    ):
        with pytest.raises(ValueError, match=message):
            config(tmp_path, tiny_model, **wrong)


class Counting:
    """An engine that counts its ticks, and says when the first is done."""

    def __init__(self, engine):
        self.engine, self.ticks, self.begun = engine, 0, threading.Event()

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def tick(self):
        ended = self.engine.tick()
        self.ticks += 1
        self.begun.set()
        return ended


@pytest.mark.usefixtures("one_thread")
def test_rows_that_come_while_others_are_made_share_their_ticks_and_every_row_gets_its_own_picture(tiny_model):
    steps = 100
    asked = [[ImageRequest(seed=10 * batch + row, steps=steps) for row in range(3)] for batch in range(2)]
    worker = Worker(load_model(tiny_model), lanes=8, threads=1)
    expected = [worker.paint(batch) for batch in asked]
    worker.engine = Counting(worker.engine)
    shared = Shared(worker)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(shared.paint, asked[0])
        assert worker.engine.begun.wait(60)
        second = pool.submit(shared.paint, [*asked[1], Rejection("missing_object", "gone")])
        made = [first.result(), second.result()]
    assert worker.engine.ticks < 2 * steps, "one after the other would take so many"
    assert [painted.calls for painted in made] == [3 * steps, 3 * steps]
    assert made[1].ends.pop() == Rejection("missing_object", "gone")
    for painted, pictures in zip(made, expected, strict=True):
        assert all((end == picture).all() for end, picture in zip(painted.ends, pictures, strict=True))
    assert 0 < shared.take_seconds() < 60
    assert shared.take_seconds() == 0


@pytest.mark.usefixtures("one_thread")
def test_while_a_shard_is_made_the_next_one_has_no_more_than_the_places_that_it_leaves_free(tiny_model):
    worker = Worker(load_model(tiny_model), lanes=8, threads=1)
    worker.engine = engine = Counting(worker.engine)
    shared, own, others = Shared(worker), range(1, 11), range(11, 31)  # tickets
    begun, count = [], engine.tick

    def is_begun(ticket):
        try:
            return engine.progress(ticket).done > 0
        except KeyError:
            return True

    def tick():
        ended = count()
        if any(end.ticket in own for end in ended):
            begun.append(sum(map(is_begun, others)))
        return ended

    engine.tick = tick
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(shared.paint, [ImageRequest(seed=row, steps=50) for row in own])
        assert engine.begun.wait(60)
        pool.submit(shared.paint, [ImageRequest(seed=row, steps=50) for row in others]).result()
        first.result()
    assert begun == [0, 6]  # its own ten rows took all eight places, and then two


@pytest.mark.usefixtures("one_thread")
def test_an_engine_that_breaks_tells_all_who_wait_and_goes_on_for_the_next(tiny_model):
    worker = Worker(load_model(tiny_model), lanes=8, threads=1)
    (expected,) = worker.paint([ImageRequest(seed=1, steps=2)])
    engine, breaks = Counting(worker.engine), [True]

    def tick():
        if breaks.pop() if breaks else False:
            raise RuntimeError("out of memory")
        return engine.engine.tick()

    engine.tick, worker.engine = tick, engine
    shared = Shared(worker)
    with pytest.raises(RuntimeError, match="out of memory"):
        shared.paint([ImageRequest(seed=1, steps=2)])
    (end,) = shared.paint([ImageRequest(seed=1, steps=2)]).ends
    assert (end == expected).all()


def test_the_drivers_memory_does_not_grow_with_the_table(tmp_path, tiny_model, monkeypatch):
    monkeypatch.setattr("pipelines.bulk.plan._ROWS_IN_PART", 256)
    peaks = []
    for rows in (1_500, 4_500):
        table = csv_of(tmp_path / f"{rows}.csv", ["class", "order"], [["cat", f"{row:01000}"] for row in range(rows)])
        job = config(tmp_path, tiny_model, table=table, carry=["order"], shard_size=64)
        tracemalloc.start()
        assert plan_job(job, job_uri(job)).rows == rows
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 300_000  # the 3,000 rows more are 3 MB of text


def test_a_shard_that_is_done_is_kept_in_few_bytes():
    profile = {"device": "cpu", "torch": "2.13.0", "precision": "float32"}
    record = {"part": {"name": "", "numerics": profile}, "spent": {"pictures": 1, "calls": 2, "seconds": 1, "bytes": 3}}
    done = Done(Bill())
    tracemalloc.start()
    for shard in range(1000):
        told = json.loads(json.dumps(record))
        told["part"] |= {"name": f"part-{shard:05}-0123456789ab.parquet", "sha256": f"{shard:064}", "bytes": 9999}
        done.add(shard, told)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert held / 1000 < 1000
    assert (done.bill.pictures, done.bill.calls, len(done.parts)) == (1000, 2000, 1000)
    assert done.parts[999]["numerics"] == profile
