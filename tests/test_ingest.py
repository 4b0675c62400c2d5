import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from pipelines import ingest, storage
from pipelines.cartoons import CHARACTERS
from pipelines.config import IngestConfig, PipelineError
from pipelines.dataset import open_dataset

pytestmark = pytest.mark.usefixtures("ray_session")


def png(colour, size=(12, 12)):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, format="PNG")
    return buffer.getvalue()


def tar(path, members):
    with tarfile.open(path, "w") as shard:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            shard.addfile(info, io.BytesIO(data))


def run(tmp_path, *source, **settings):
    config = IngestConfig(store=str(tmp_path / "store"), source=[str(uri) for uri in source], resolution=8, **settings)
    return ingest.run(config).uri


def test_every_picture_of_tar_shards_is_kept_with_its_class_and_bytes(tiny_dataset, cartoon_shards):
    dataset = open_dataset(tiny_dataset)
    counts = dataset.manifest["counts"]
    assert counts["found"] == counts["kept"] + counts["duplicates"] == 96
    assert dataset.class_names == tuple(sorted(CHARACTERS))
    originals = {}
    for shard in sorted(cartoon_shards.iterdir()):
        with tarfile.open(shard) as members:
            for name in members.getnames():
                if name.endswith(".png"):
                    label = json.load(members.extractfile(name.replace(".png", ".json")))["class"]
                    originals[np.asarray(Image.open(members.extractfile(name))).tobytes()] = label
    read = [dataset.read(split) for split in ("train", "heldout")]
    seen = {
        picture.tobytes(): dataset.class_names[label]
        for rows in read
        for picture, label in zip(rows.pixels, rows.labels, strict=True)
    }
    assert seen == originals


def test_sigma_data_is_the_standard_deviation_of_the_training_pictures(tiny_dataset):
    dataset = open_dataset(tiny_dataset)
    values = dataset.read("train").pixels.astype(np.float64) / 127.5 - 1
    assert dataset.sigma_data == pytest.approx(values.std(), rel=1e-6)
    assert dataset.manifest["mean"] == pytest.approx(values.mean(), rel=1e-6)


def test_what_is_broken_is_listed_with_its_reason_and_takes_nothing_else_along(tmp_path):
    whole = [(f"{index}.png", png((index, 7 * index, 90))) for index in range(40)]
    broken = [
        ("a.png", b"no picture"),
        ("b.png", png("red", (90, 2))),
        ("c.txt", b"only text"),
        ("d.png", png((200, 0, 0))),
        ("d.json", b"{broken"),
        ("e.png", whole[3][1]),
    ]
    tar(tmp_path / "shard.tar", [*whole[:20], *broken, *whole[20:]])
    tar(tmp_path / "short.tar", [(f"{index}.png", png((index, index, 200))) for index in range(9)])
    data = (tmp_path / "short.tar").read_bytes()
    (tmp_path / "short.tar").write_bytes(data[: 3 * 1024 + 700])
    uri = run(tmp_path, tmp_path / "*.tar")
    manifest = storage.read_manifest(uri, "dataset")
    rejected = {row["source"].rsplit("/", 1)[1]: row["reason"] for row in lines(uri, manifest["rejected"])}
    assert rejected == {
        "shard.tar#a.png": "undecodable",
        "shard.tar#b.png": "too_small",
        "shard.tar#c": "no_picture",
        "shard.tar#d.png": "bad_row",
        "short.tar": "truncated_shard",
    }
    duplicates = lines(uri, manifest["duplicates"])
    assert [(row["source"][-15:], row["same_as"][-15:]) for row in duplicates] == [
        ("shard.tar#e.png", "shard.tar#3.png")
    ]
    counts = manifest["counts"]
    assert counts["kept"] == 40 + 4
    assert counts["found"] == counts["kept"] + counts["rejected"] + counts["duplicates"]
    assert counts["rejected"] == len(rejected)


def lines(uri, parts):
    return [json.loads(line) for part in parts for line in storage.read_part(uri, part).splitlines()]


def test_a_folder_per_class_names_the_classes_and_a_flat_folder_has_none(tmp_path):
    for index in range(12):
        for name in ("apple", "pear"):
            (tmp_path / "classes" / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / "classes" / name / f"{index}.png").write_bytes(png((index, len(name), 0)))
        (tmp_path / "flat").mkdir(exist_ok=True)
        (tmp_path / "flat" / f"{index}.png").write_bytes(png((index, 99, 0)))
    (tmp_path / "flat" / "notes.txt").write_text("not a picture")
    classes = open_dataset(run(tmp_path, tmp_path / "classes")).manifest
    assert classes["classes"] == {"apple": 12, "pear": 12}
    flat = open_dataset(run(tmp_path, tmp_path / "flat")).manifest
    assert (flat["classes"], flat["counts"]["kept"]) == ({}, 12)


def test_a_dataset_on_s3_has_the_same_shards_as_on_disk(tmp_path, bucket, cartoon_shards):
    for shard in cartoon_shards.iterdir():
        storage.write_bytes(f"{bucket}/in/{shard.name}", shard.read_bytes())
    config = IngestConfig(store=f"{bucket}/store", source=[f"{bucket}/in/*.tar"], resolution=8)
    there = open_dataset(ingest.run(config).uri)
    here = open_dataset(run(tmp_path, cartoon_shards))
    images = [there.read(split).pixels.tobytes() for split in ("train", "heldout")]
    assert images == [here.read(split).pixels.tobytes() for split in ("train", "heldout")]
    assert ingest.find(config) is not None


def test_the_same_again_is_found_and_a_changed_setting_or_source_is_not(tmp_path, cartoon_shards):
    copy = tmp_path / "in"
    copy.mkdir()
    for shard in cartoon_shards.iterdir():
        (copy / shard.name).write_bytes(shard.read_bytes())
    config = IngestConfig(store=str(tmp_path / "store"), source=[str(copy)], resolution=8)
    uri = ingest.run(config).uri
    found = ingest.find(config)
    assert found is not None
    assert found.uri == uri
    assert ingest.find(config.model_copy(update={"resolution": 16})) is None
    (copy / "more.png").write_bytes(png("red"))
    assert ingest.find(config) is None


def test_a_source_without_pictures_is_refused_by_name(tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(PipelineError, match=r"1 objects, but no picture"):
        run(tmp_path, tmp_path / "notes.txt")
    (tmp_path / "bad.png").write_bytes(b"broken")
    with pytest.raises(PipelineError, match=r"no picture to train on \(1 undecodable\)"):
        run(tmp_path, tmp_path / "bad.png")
    with pytest.raises(PipelineError, match=r"nowhere: nothing there"):
        run(tmp_path, tmp_path / "nowhere")
