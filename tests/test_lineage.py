import io
import shlex
import shutil
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import TINY
from diffusers import UNet2DModel
from support.models import evaluate, figure, publish

from pipelines import bulk, ingest, registry, storage, train
from pipelines.__main__ import main
from pipelines.config import (
    GenerateConfig,
    IngestConfig,
    PipelineError,
    PromoteConfig,
    RetireConfig,
    TrainConfig,
    parse,
)
from pipelines.dataset import open_dataset
from pipelines.images import from_png, png_texts, to_png
from pipelines.jobs import STAGES, find_result, print_stage, settle
from pipelines.lineage import referenced
from pipelines.model import model_digest
from pipelines.requests import ImageRequest, metadata, request_of
from pipelines.worker import load_worker

GOOD = {"frechet": figure(10.0, 1.0), "memorisation": 0.01}


@pytest.fixture(scope="module")
def house(tmp_path_factory, tiny_dataset, cartoon_shards):
    """A store with a dataset of two shards, a model of it, its fine-tuned child, and pictures by the child."""
    store = str(tmp_path_factory.mktemp("house") / "store")
    dataset = tiny_dataset.replace(tiny_dataset.split("/datasets/")[0], store)
    shutil.copytree(tiny_dataset, dataset)
    model = trained(TrainConfig(store=store, dataset=dataset, **TINY))
    child = trained(TrainConfig(store=store, dataset=dataset, parent=model, **{**TINY, "seed": 3}))
    images = bulk.run(
        GenerateConfig(store=store, name="tiny", model=child, count=6, shard_size=4, steps=3, seed=7, workers=1)
    ).uri
    return SimpleNamespace(store=store, dataset=dataset, model=model, child=child, images=images, shards=cartoon_shards)


def trained(config):
    train.train_on_rank(config, host=train.Host(emit=lambda _: None))
    found = train.find(config)
    assert found is not None
    return found.uri


def told(capsys, stage, *flags):
    """What a command prints."""
    print_stage(stage, parse(STAGES[stage].flags, stage, list(map(str, flags))))
    return capsys.readouterr().out


def refused(stage, *flags):
    """The one line that a command fails with."""
    with pytest.raises(PipelineError) as raised:
        print_stage(stage, parse(STAGES[stage].flags, stage, list(map(str, flags))))
    assert "\n" not in str(raised.value)
    return str(raised.value)


def commands(text):
    """The commands in what was printed, each as its stage and its settings."""
    lines = [line[line.index("python -m") :] for line in text.splitlines() if "python -m pipelines" in line]
    words = [shlex.split(line)[3:] for line in lines]
    settings = [(stage, parse(STAGES[stage].flags, stage, flags)) for stage, *flags in words]
    return [(stage, settle(config) if stage == "train" else config) for stage, config in settings]


def row_of(images, number):
    parts = storage.read_manifest(images, "images")["parts"]
    rows = [row for part in parts for row in pq.read_table(io.BytesIO(storage.read_part(images, part))).to_pylist()]
    return rows[number]


def test_a_picture_leads_back_to_its_model_dataset_and_sources(house, capsys):
    out = told(capsys, "trace", house.images, "--row", 5)
    row = row_of(house.images, 5)
    assert f"seed {row['seed']}" in out
    numerics = storage.read_manifest(house.images, "images")["parts"][1]["numerics"]
    assert f"made on device {numerics['device']}, dtype float32, lanes 32, threads {numerics['threads']}" in out
    assert [line.split()[1] for line in out.splitlines() if line.startswith(("model ", "parent "))] == [
        house.child,
        house.model,
    ]
    assert f"dataset   {house.dataset}: 96 pictures" in out
    for number in range(2):
        shard = house.shards / f"cartoons-{number}.tar"
        assert f"{shard}  {shard.stat().st_size} bytes, version {shard.stat().st_mtime:.6f}" in out


def test_the_commands_that_are_told_make_the_very_things_again(house, capsys):
    made = commands(told(capsys, "trace", house.images, "--row", 5))
    assert [stage for stage, _ in made] == ["generate", "trace", "train", "train", "ingest"]
    found = [find(config) for find, (_, config) in zip(finds(), made, strict=True) if find]
    assert [outcome.uri for outcome in found] == [house.images, house.child, house.model, house.dataset]


def finds():
    return [bulk.find, None, train.find, train.find, ingest.find]


def test_a_picture_made_again_has_the_same_bytes(house, capsys):
    out = told(capsys, "trace", house.images, "--remake")
    assert "remake: equal" in out
    assert "bytes of 6 pictures" in out
    assert "no row 6; there are 0 to 5" in refused("trace", house.images, "--row", 6)


def test_an_imported_model_leads_back_to_the_folder_that_it_came_from(tmp_path, capsys):
    folder, store = tmp_path / "theirs", tmp_path / "store"
    shape = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
             "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}  # fmt: skip
    UNet2DModel(**shape).save_pretrained(folder)
    flags = ["--from", folder, "--store", store, "--name", "theirs", "--prediction", "eps", "--betas", "linear"]
    assert main(["import", *map(str, flags)]) == 0
    model = capsys.readouterr().out.strip().rsplit(" ", 1)[1]
    text = told(capsys, "trace", model)
    assert f"imported  {folder}, digest of what was read " in text
    ((stage, again),) = commands(text)
    assert find_result(stage, again).uri == model
    assert "is not there any more" not in text


def test_a_png_says_itself_what_made_it(house, tmp_path, capsys):
    data = row_of(house.images, 5)["image"]["bytes"]
    (tmp_path / "kept.png").write_bytes(data)
    place = ("--store", house.store)
    out = told(capsys, "trace", tmp_path / "kept.png", *place, "--remake")
    assert house.child in out
    assert f"remake: equal, {len(data)} bytes" in out
    changed = from_png(data).copy()
    changed[0, 0, 0] ^= 4
    (tmp_path / "changed.png").write_bytes(to_png(changed, png_texts(data)))
    out = told(capsys, "trace", tmp_path / "changed.png", *place, "--remake")
    assert "1 of 192 values differ, by 4 at most" in out
    assert "does not say on what device" in out
    assert "lies in no store" in refused("trace", tmp_path / "kept.png")


def test_a_row_that_differs_on_the_same_kind_of_device_is_an_error(house, tmp_path):
    store = tmp_path / "store"
    shutil.copytree(house.images, store / "images/tiny/0123456789abcdef")
    images = str(store / "images/tiny/0123456789abcdef")
    manifest = storage.read_manifest(images, "images")
    table = pq.read_table(io.BytesIO(storage.read_part(images, manifest["parts"][0]))).to_pydict()
    table["seed"][1] += 1
    part = {**manifest["parts"][0], **rewritten(images, table)}
    storage.write_bytes(
        f"{images}/manifest.json", storage.to_json({**manifest, "parts": [part, *manifest["parts"][1:]]})
    )
    error = refused("trace", images, "--store", house.store, "--row", 1, "--remake")
    assert "1 of 1 pictures differ, though made on the same kind of device" in error


def rewritten(images, table):
    buffer = io.BytesIO()
    pq.write_table(pa.table(table), buffer)
    return storage.put_part(images, "part-00000", ".parquet", buffer.getvalue())


def test_an_edit_is_made_again_from_the_picture_that_was_edited(house, tmp_path, capsys):
    worker = load_worker(house.model)
    noisy = to_png(np.random.default_rng(0).integers(256, size=(8, 8, 3), dtype=np.uint8))
    asked = ImageRequest(task="denoise", seed=5, image=noisy, noise_level=0.3, steps=2)
    (tmp_path / "noisy.png").write_bytes(noisy)
    made = to_png(worker.paint([asked])[0], metadata(asked, worker.model.digest))
    (tmp_path / "denoised.png").write_bytes(made)
    trace = ("trace", tmp_path / "denoised.png", "--store", house.store, "--remake")
    assert storage.digest(noisy) in refused(*trace)
    assert "remake: equal" in told(capsys, *trace, "--image", tmp_path / "noisy.png")


def test_a_source_leads_to_all_that_it_went_into(house, capsys):
    shard = f"{house.shards}/cartoons-0.tar"
    out = told(capsys, "trace", shard, "--store", house.store)
    assert f"dataset   {house.dataset}: 48 of its 96 pictures" in out
    assert f"model     {house.model}\n" in out
    assert f"model     {house.child} (child of {house.model})" in out
    assert f"images    {house.images}: 6 pictures" in out
    name = next(origin for origin in open_dataset(house.dataset).origins() if origin.startswith(shard))
    assert "1 of its 96 pictures" in told(capsys, "trace", name, "--store", house.store)
    assert "no dataset of" in refused("trace", f"{house.shards}/cartoons-9.tar", "--store", house.store)


def test_a_picture_that_a_table_named_leads_to_its_dataset(house, tmp_path, capsys):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(6):
        pixels = np.random.default_rng(number).integers(256, size=(8, 8, 3), dtype=np.uint8)
        (pictures / f"{number}.png").write_bytes(to_png(pixels))
    table = tmp_path / "table.csv"
    table.write_text("uri\n" + "".join(f"pictures/{number}.png\n" for number in range(6)))
    store = str(tmp_path / "store")
    made = ingest.run(IngestConfig(store=store, name="named", source=[str(table)], resolution=8, heldout=0)).uri
    assert f"dataset   {made}: 1 of its 6 pictures" in told(capsys, "trace", pictures / "3.png", "--store", store)
    assert f"dataset   {made}: pictures that it names" in told(capsys, "trace", table, "--store", store)


def test_forgetting_is_planned_in_order_and_nothing_is_changed(house, capsys):
    with_promotions(house)
    before = {info.uri: info.version for info in storage.list_objects(house.store)}
    shard = f"{house.shards}/cartoons-0.tar"
    out = told(capsys, "forget", shard, "--store", house.store)
    assert {info.uri: info.version for info in storage.list_objects(house.store)} == before
    lines = [line.strip() for line in out.splitlines() if "python -m pipelines" in line]
    stages = [line.split()[3] for line in lines]
    assert stages == ["ingest", "train", "train", "generate", "evaluate", "promote", "retire"]
    first, second = lines[1:3]
    assert "--dataset DATASET_1" in first
    assert "--dataset DATASET_1" in second
    assert "--parent" not in first
    assert "--parent MODEL_1 --dataset DATASET_1" in second
    assert lines[3].endswith("--model MODEL_2")
    assert f"MODEL_1  in place of {house.model.split('/published')[0]}" in out
    assert lines[4].endswith("--model MODEL_1")
    assert "--samples 128" in lines[4], "judged as it was judged"
    assert " promote --model MODEL_1 " in lines[5]
    assert f"retire --model {house.model}" in lines[6]
    last = out[out.index("last, delete") :]
    assert all(uri in last for uri in (house.dataset, house.images, house.model.split("/published")[0]))
    assert "nothing to forget" in refused("forget", "/elsewhere.png", "--store", house.store)


def with_promotions(house):
    """The model live, once."""
    if registry.live_model(house.store, "tiny") is None:
        evaluate(house.store, house.model, GOOD, settings={"samples": 128, "name": "tiny"})
        registry.promote(PromoteConfig(model=house.model, by="ada"))


def test_following_the_plan_makes_a_dataset_without_the_source(house, tmp_path, capsys):
    shard = house.shards / "cartoons-0.tar"
    out = told(capsys, "forget", shard, "--store", house.store)
    stage, config = commands(next(line for line in out.splitlines() if "pipelines ingest" in line))[0]
    assert stage == "ingest"
    elsewhere = config.model_copy(update={"store": str(tmp_path / "store")})
    shard.rename(tmp_path / "aside.tar")
    try:
        origins = set(open_dataset(ingest.run(elsewhere).uri).origins())
    finally:
        (tmp_path / "aside.tar").rename(shard)
    assert len(origins) == 48
    assert not any(origin.startswith(str(shard)) for origin in origins)


@pytest.fixture
def old_models(tmp_path):
    """A store with seven models of one name, the oldest first, an unfinished run's and a folder that is unknown."""
    store = str(tmp_path / "store")
    parent = publish(store, 1, age=700)
    models = [parent, publish(store, 2, age=600, parent=parent)]
    models += [publish(store, number, age=100 * (8 - number)) for number in range(3, 8)]
    running = publish(store, 8, age=900, finished=False, parent=models[3])
    for uri in (*models, running):
        folder = uri.replace("/published/", "/checkpoints/")
        storage.write_bytes(f"{folder}/manifest.json", b"{}")
        storage.write_bytes(f"{folder}/shard.distcp", bytes(1000))
    storage.write_bytes(f"{store}/models/tiny/notes/published/mine/weights.bin", b"mine")
    return SimpleNamespace(store=store, models=models, running=running)


def cleanup(capsys, store, *flags):
    """What may go, as it is told."""
    out = told(capsys, "cleanup", "--store", store, "--keep", "2", *flags)
    lines = [line.split() for line in out.split("\nstays")[0].splitlines()]
    return {words[0] for words in lines if words[1:] and words[1] in ("model", "checkpoint", "evaluation")}


def test_a_cleanup_takes_what_nothing_refers_to_and_only_when_told_to(old_models, capsys):
    store, models = old_models.store, old_models.models
    judged = [evaluate(store, uri, {**GOOD, "kernel": number}) for number, uri in enumerate(models)]
    registry.promote(PromoteConfig(model=models[1], by="ada"))
    digest = model_digest(storage.read_manifest(models[2], "model"))
    images = f"{store}/images/tiny/0123456789abcdef"
    storage.publish(images, {"kind": "images", "rows": 0, "parts": [], "model": {"uri": models[2], "digest": digest}})
    assert {models[0], models[1], models[2], judged[1], digest} <= referenced(store)
    before = sorted(info.uri for info in storage.list_objects(store))
    goes = cleanup(capsys, store)
    checkpoints = {uri.replace("/published/", "/checkpoints/") for uri in models}
    # 1 is 2's parent, 2 is live, 3 made pictures, 4 is the parent of an unfinished run, 6 and 7 are the newest
    assert goes == {models[4], judged[4], *checkpoints}
    assert cleanup(capsys, store, "--dry-run") == goes
    assert sorted(info.uri for info in storage.list_objects(store)) == before
    told(capsys, "cleanup", "--store", store, "--keep", "2", "--delete")
    left = sorted(info.uri for info in storage.list_objects(store))
    gone = [uri for uri in before if any(uri.startswith(f"{folder}/") for folder in goes)]
    assert left == sorted(set(before) - set(gone) - {f"{models[4].split('/published')[0]}/result.json"})
    assert cleanup(capsys, store) == set()


def test_a_cleanup_says_why_the_rest_stays(old_models, capsys):
    store, models = old_models.store, old_models.models
    evaluate(store, models[1], GOOD)
    registry.promote(PromoteConfig(model=models[1], by="ada"))
    out = told(capsys, "cleanup", "--store", store, "--keep", "2")
    reasons = {line.split("  ")[0].strip(): line for line in out.split("\nstays")[1].splitlines()}
    for uri, why in (
        (models[0], "parent of"), (models[1], "live as tiny"), (models[6], "among the newest"),
        (old_models.running, "its run is not finished"),
    ):  # fmt: skip
        assert why in reasons[uri]
    assert "0 things" in told(capsys, "cleanup", "--store", store, "--name", "other")


def test_a_retired_model_may_go_although_it_was_promoted(old_models, capsys):
    store, models = old_models.store, old_models.models
    for number in (4, 5):
        evaluate(store, models[number], GOOD)
        registry.promote(PromoteConfig(model=models[number], by="ada"))
    assert models[4] not in cleanup(capsys, store), "a roll-back may go to it"
    registry.retire(RetireConfig(model=models[4], by="ada"))
    assert models[4] in cleanup(capsys, store)


def test_a_run_whose_model_was_cleaned_up_is_trained_again_and_not_found(house, tmp_path, capsys):
    config = TrainConfig(store=str(tmp_path / "store"), dataset=house.dataset, **TINY)
    first = trained(config)
    newer = trained(config.model_copy(update={"seed": 9}))
    told(capsys, "cleanup", "--store", config.store, "--keep", "1", "--delete")
    assert train.find(config) is None
    assert storage.is_published(newer)
    assert trained(config) == first


def test_the_names_of_a_request_and_back():
    for asked in (
        ImageRequest(seed=3, prompt="café", steps=7),
        ImageRequest(seed=4, task="vary", parent=3, strength=0.5),
    ):
        texts = metadata(asked, "abc")
        assert request_of(png_texts(to_png(np.zeros((2, 2, 3), np.uint8), texts))) == asked
