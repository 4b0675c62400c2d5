import gzip
import io
import json
import os
import re
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import SHARED
from PIL import Image
from support.damage import COUNT, damaged, encoded, noise, parquet_bytes, tar_bytes

from pipelines import ingest, storage
from pipelines.cartoons import CHARACTERS
from pipelines.config import IngestConfig, PipelineError
from pipelines.dataset import open_dataset

pytestmark = pytest.mark.usefixtures("ray_session")


def png(colour, size=(12, 12)):
    return encoded(Image.new("RGB", size, colour))


def config_of(place, *source, **settings):
    settings = {"resolution": 8, "name": "mine", **settings}
    return IngestConfig(store=str(place), source=[str(uri) for uri in source], **settings)


def run(tmp_path, *source, **settings):
    return open_dataset(ingest.run(config_of(tmp_path / "store", *source, **settings)).uri)


def lines(dataset, kind):
    parts = dataset.manifest[kind]
    return [json.loads(line) for part in parts for line in storage.read_part(dataset.uri, part).splitlines()]


def columns(dataset, *names):
    """Rows of all shards as tuples of columns, by the Parquet files alone."""
    rows = []
    for shards in dataset.manifest["shards"].values():
        for folder, shard in map(dataset.place, shards):
            table = pq.read_table(io.BytesIO(storage.read_part(folder, shard)))
            rows += zip(*(table[name].to_pylist() for name in names), strict=True)
    return rows


def all_pixels(dataset):
    splits = [split for split in ("train", "heldout") if dataset.rows(split)]
    return np.concatenate([dataset.read(split).pixels for split in splits])


def published(dataset):
    """Names (which carry digests) and sizes of all that the dataset's folder holds."""
    return {info.uri.removeprefix(dataset.uri): info.size for info in storage.list_objects(dataset.uri)}


# What is kept


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


def test_mean_and_sigma_data_are_those_of_the_training_pictures(tiny_dataset):
    dataset = open_dataset(tiny_dataset)
    values = dataset.read("train").pixels.astype(np.float64) / 127.5 - 1
    assert dataset.sigma_data == pytest.approx(values.std(), rel=1e-9)
    assert dataset.manifest["mean"] == pytest.approx(values.mean(), rel=1e-9)


PICTURES = {
    f"{name}-{index:02}": (name, png((index * 9, len(name) * 30, 5))) for index in range(8) for name in ("a", "bee")
}


def write_folder(folder):
    for key, (name, data) in PICTURES.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / f"{key}.png").write_bytes(data)
    return folder


def write_tar(folder, pack=bytes, suffix=".tar", label=".json"):
    members = []
    for key, (name, data) in PICTURES.items():
        members += [(f"{key}.png", data)]
        members += [(f"{key}.json", json.dumps({"class": name}).encode())] if label == ".json" else []
        members += [(f"{key}.cls", name.encode())] if label == ".cls" else []
    (folder / f"shard{suffix}").write_bytes(pack(tar_bytes(members)))
    return folder / f"shard{suffix}"


def zstd(data):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def write_parquet(folder, struct):
    rows = [
        {"image": {"bytes": data, "path": None} if struct else data, "class": name} for name, data in PICTURES.values()
    ]
    (folder / "part.parquet").write_bytes(parquet_bytes(rows))
    return folder / "part.parquet"


def write_hugging_face(folder):
    names = sorted({name for name, _ in PICTURES.values()})
    rows = [{"image": {"bytes": data, "path": "x"}, "class": names.index(name)} for name, data in PICTURES.values()]
    features = {"class": {"names": names, "_type": "ClassLabel"}}
    table = pa.Table.from_pylist(rows).replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )
    pq.write_table(table, folder / "part.parquet")
    return folder / "part.parquet"


def write_table(folder, suffix):
    write_folder(folder / "pictures")
    rows = [(f"pictures/{name}/{key}.png", name) for key, (name, _) in PICTURES.items()]
    text = "\n".join(json.dumps({"uri": uri, "class": name}) for uri, name in rows)
    if suffix != ".jsonl":
        comma = "\t" if suffix == ".tsv" else ","
        text = "\n".join([f"uri{comma}class", *(f"{uri}{comma}{name}" for uri, name in rows)])
    (folder / f"table{suffix}").write_text(text)
    return folder / f"table{suffix}"


SOURCES = {
    "folder": write_folder,
    "glob": lambda folder: f"{write_folder(folder)}/*/*.png",
    "tar": write_tar,
    "tar with .cls": lambda folder: write_tar(folder, label=".cls"),
    "tar.gz": lambda folder: write_tar(folder, gzip.compress, ".tar.gz"),
    "tar.zst": lambda folder: write_tar(folder, zstd, ".tar.zst"),
    "parquet of bytes": lambda folder: write_parquet(folder, struct=False),
    "parquet of structs": lambda folder: write_parquet(folder, struct=True),
    "parquet with class numbers": write_hugging_face,
    "jsonl": lambda folder: write_table(folder, ".jsonl"),
    "csv": lambda folder: write_table(folder, ".csv"),
    "tsv": lambda folder: write_table(folder, ".tsv"),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_the_same_pictures_are_the_same_dataset_from_every_kind_of_source(tmp_path, kind):
    dataset = run(tmp_path, SOURCES[kind](tmp_path))
    expected = {(name, Image.open(io.BytesIO(data)).getpixel((0, 0))) for name, data in PICTURES.values()}
    assert {(name, tuple(pixels["bytes"][:3])) for name, pixels in columns(dataset, "class", "image")} == expected
    assert dataset.manifest["counts"] == {"found": 16, "kept": 16, "rejected": 0, "duplicates": 0}
    assert dataset.manifest["classes"] == {"a": 8, "bee": 8}


@pytest.mark.parametrize("kind", ["folder", "tar.gz", "parquet of structs", "jsonl"])
def test_sources_and_store_in_a_bucket_give_the_same_shards_as_on_disk(tmp_path, bucket, kind):
    (tmp_path / "in").mkdir()
    source = str(SOURCES[kind](tmp_path / "in"))
    for info in storage.list_objects(str(tmp_path / "in")):
        storage.write_bytes(f"{bucket}{info.uri.removeprefix(str(tmp_path))}", Path(info.uri).read_bytes())
    config = config_of(f"{bucket}/store", source.replace(str(tmp_path), bucket))
    there, here = open_dataset(ingest.run(config).uri), run(tmp_path, source)
    assert columns(there, "digest", "image", "class") == columns(here, "digest", "image", "class")
    assert ingest.find(config) is not None


def test_captions_fields_and_classes_are_taken_as_named(tmp_path, capsys):
    rows = [{"image": png((i, 0, 0)), "label": i % 3, "text": f"words {i}"} for i in range(12)]
    (tmp_path / "x.parquet").write_bytes(parquet_bytes(rows))
    dataset = run(tmp_path, tmp_path / "x.parquet", class_field="label", caption_field="text")
    assert dataset.manifest["classes"] == {"0": 4, "1": 4, "2": 4}
    assert sorted(caption for (caption,) in columns(dataset, "caption")) == sorted(row["text"] for row in rows)
    capsys.readouterr()
    plain = run(tmp_path, tmp_path / "x.parquet", class_field="label", labels="ignored")
    assert plain.class_names == ()
    assert "no picture has a class" not in capsys.readouterr().out
    run(tmp_path, tmp_path / "x.parquet")
    assert "no picture has a class; --class-field may name one of label, text" in capsys.readouterr().out


def test_a_field_that_was_named_but_is_nowhere_is_an_error(tmp_path):
    (tmp_path / "x.parquet").write_bytes(parquet_bytes([{"picture": png("red"), "class": "a"}]))
    with pytest.raises(PipelineError, match=r"x.parquet: no column 'image'; there are picture, class; .*--image-field"):
        run(tmp_path, tmp_path / "x.parquet")
    with pytest.raises(PipelineError, match=r"no column 'clazz'; .*--class-field"):
        run(tmp_path, tmp_path / "x.parquet", image_field="picture", class_field="clazz")
    with pytest.raises(PipelineError, match=r"--class-field clazz: no sample has this field; there are class"):
        run(tmp_path, write_tar(tmp_path), class_field="clazz")
    (tmp_path / "t.csv").write_text("file_name,class\nx.png,a\n")
    with pytest.raises(PipelineError, match=r"t.csv: no column 'uri'; there are file_name, class; .*--uri-field"):
        run(tmp_path, tmp_path / "t.csv")


@pytest.mark.parametrize("encoding", ["raw", "png", "webp", "jpeg"])
def test_pixels_are_stored_as_chosen(tmp_path, encoding):
    for index in range(6):
        (tmp_path / f"{index}.png").write_bytes(encoded(noise(index).resize((4, 4)).resize((64, 64))))
    dataset = run(tmp_path, tmp_path, resolution=16, encoding=encoding)
    plain = run(tmp_path, tmp_path, resolution=16, name="plain")
    assert dataset.manifest["encoding"] == encoding
    first = columns(dataset, "image")[0][0]
    starts = {"raw": b"", "png": b"\x89PNG", "webp": b"RIFF", "jpeg": b"\xff\xd8"}[encoding]
    assert first["bytes"].startswith(starts)
    assert first["path"].endswith(f".{encoding}")
    worst = np.abs(all_pixels(dataset).astype(int) - all_pixels(plain)).mean()
    assert worst == 0 if encoding in ("raw", "png") else worst < 8


@pytest.mark.parametrize(("fit", "corner"), [("crop", (0, 0, 255)), ("pad", (0, 255, 0)), ("stretch", (255, 0, 0))])
def test_oblong_pictures_are_cropped_padded_or_stretched(tmp_path, fit, corner):
    image = Image.new("RGB", (96, 32), "red")
    image.paste("blue", (32, 0, 64, 32))
    (tmp_path / "x.png").write_bytes(encoded(image))
    dataset = run(tmp_path, tmp_path / "x.png", fit=fit, background="lime", heldout=0.0)
    assert dataset.read("train").pixels[0, 0, 0].astype(int) == pytest.approx(corner, abs=20), (
        "Lanczos rings a little at edges"
    )


def test_nothing_of_a_photographs_metadata_reaches_the_dataset(tmp_path):
    exif = Image.Exif()
    exif[0x010F] = "SecretCamera"
    exif.get_ifd(0x8825)[2] = (52.0, 31.0, 7.0)
    (tmp_path / "x.jpg").write_bytes(encoded(noise(1), "JPEG", exif=exif, comment=b"SecretWords"))
    for encoding in ("raw", "png", "webp", "jpeg"):
        dataset = run(tmp_path, tmp_path / "x.jpg", encoding=encoding, heldout=0.0)
        for info in storage.list_objects(dataset.uri):
            data = storage.read_bytes(info.uri)
            assert b"Secret" not in data
            assert b"Exif" not in data


# What is not kept


def real_source(kind, tmp_path, cartoon_shards):
    if kind == "drawn":
        return cartoon_shards, 96, 0
    if not (SHARED / "data").exists():
        pytest.skip("the real pictures are not beside this checkout")
    return (SHARED / "data/emoji", 3583, 10) if kind == "emoji" else (f"{SHARED}/data/clothing/*.tar", 3409, 0)


@pytest.mark.parametrize("kind", ["drawn", "emoji", pytest.param("clothing", marks=pytest.mark.chaos)])
def test_two_hundred_damaged_items_are_each_listed_with_the_right_reason(tmp_path, cartoon_shards, kind):
    source, found, duplicates = real_source(kind, tmp_path, cartoon_shards)
    sources, expected, good = damaged(tmp_path / "bad")
    dataset = run(tmp_path, source, *sources)
    told = {row["source"]: row["reason"] for row in lines(dataset, "rejected")}
    assert told == expected
    counts = dataset.manifest["counts"]
    assert counts == {
        "found": found + COUNT + good, "kept": found - duplicates + good, "rejected": COUNT, "duplicates": duplicates,
    }  # fmt: skip
    assert dataset.manifest["reasons"] == dict(Counter(expected.values()))
    assert sum(dataset.rows(split) for split in ("train", "heldout")) == counts["kept"]
    incomplete = {Path(shard["uri"]).name: shard["missing"] for shard in dataset.manifest["incomplete"]}
    assert incomplete == {"indexed.tar": 8, "headless.tar": None, "short.tar.gz": None, "part.parquet": 10}
    sources = [source for (source,) in columns(dataset, "source")]
    assert len(set(sources)) == counts["kept"]
    assert not set(sources) & set(told)


def test_of_equal_pictures_the_smallest_address_stays(tmp_path):
    for name in ("c", "a", "b"):
        (tmp_path / f"{name}.png").write_bytes(png("red"))
        (tmp_path / f"{name}.bmp").write_bytes(encoded(Image.new("RGB", (12, 12), "blue"), "BMP"))
    dataset = run(tmp_path, tmp_path, heldout=0.0)
    assert sorted(Path(source).name for (source,) in columns(dataset, "source")) == ["a.bmp", "a.png"]
    told = {(Path(row["source"]).name, Path(row["same_as"]).name) for row in lines(dataset, "duplicates")}
    assert told == {("b.png", "a.png"), ("c.png", "a.png"), ("b.bmp", "a.bmp"), ("c.bmp", "a.bmp")}


def test_pictures_that_look_alike_are_dropped_on_request(tmp_path):
    for index in range(12):
        image = noise(index).resize((16, 16)).resize((64, 64), Image.Resampling.BICUBIC)
        (tmp_path / f"{index:02}.png").write_bytes(encoded(image))
        (tmp_path / f"{index:02}-again.jpg").write_bytes(encoded(image, "JPEG", quality=80))
    (tmp_path / "red.png").write_bytes(png("red"))
    (tmp_path / "blue.png").write_bytes(png("blue"))
    kept = run(tmp_path, tmp_path, resolution=32, near_duplicates=6)
    assert run(tmp_path, tmp_path, resolution=32).manifest["counts"]["kept"] == 26
    names = sorted(Path(source).name for (source,) in columns(kept, "source"))
    assert names == sorted([f"{index:02}-again.jpg" for index in range(12)] + ["red.png", "blue.png"])
    told = {Path(row["source"]).name: Path(row["same_as"]).name for row in lines(kept, "duplicates")}
    assert told == {f"{index:02}.png": f"{index:02}-again.jpg" for index in range(12)}


def test_labels_can_be_required_and_rare_classes_left_out(tmp_path):
    write_folder(tmp_path / "in")
    (tmp_path / "in" / "alone.png").write_bytes(png("white"))
    (tmp_path / "in" / "rare").mkdir()
    (tmp_path / "in" / "rare" / "one.png").write_bytes(png("black"))
    dataset = run(tmp_path, tmp_path / "in", labels="required", min_per_class=2)
    told = {Path(row["source"]).name: row["reason"] for row in lines(dataset, "rejected")}
    assert told == {"alone.png": "missing_label", "one.png": "rare_class"}
    assert dataset.manifest["counts"] == {"found": 18, "kept": 16, "rejected": 2, "duplicates": 0}
    assert run(tmp_path, tmp_path / "in").manifest["counts"]["kept"] == 18


@pytest.mark.parametrize(("limit", "fails"), [("1", True), ("2", False), ("9%", True), ("10%", False)])
def test_more_rejected_than_allowed_publishes_nothing(tmp_path, limit, fails):
    (tmp_path / "in").mkdir()
    for index in range(18):
        (tmp_path / "in" / f"{index}.png").write_bytes(png((index, 0, 0)))
    for index in range(2):
        (tmp_path / "in" / f"bad-{index}.png").write_bytes(b"bad")
    if not fails:
        assert run(tmp_path, tmp_path / "in", max_rejected=limit).manifest["counts"]["rejected"] == 2
        return
    with pytest.raises(PipelineError, match=rf"2 of 20 items are rejected.*; --max-rejected {limit} allows"):
        run(tmp_path, tmp_path / "in", max_rejected=limit)
    assert not [info for info in storage.list_objects(str(tmp_path / "store")) if info.uri.endswith("manifest.json")]


def test_a_finished_dataset_with_more_rejected_than_allowed_is_not_passed_on(tmp_path):
    """Nor is one that builds on it: it is the dataset that is judged, however it came about."""
    source = many(tmp_path / "in", 18)
    (source / "bad-0.png").write_bytes(b"bad")
    (source / "bad-1.png").write_bytes(b"bad")
    config = config_of(tmp_path / "store", source)
    ingest.run(config)
    strict = config.model_copy(update={"max_rejected": "1"})
    with pytest.raises(PipelineError, match=r"2 of 20 items are rejected, 2 undecodable; --max-rejected 1 allows 1;"):
        ingest.find(strict)
    many(source, 10, start=18)
    with pytest.raises(PipelineError, match=r"2 of 30 items are rejected, .*; nothing was published"):
        ingest.run(strict)
    assert ingest.run(strict.model_copy(update={"max_rejected": "7%"})).found is False


def test_names_and_words_in_another_encoding_are_kept_and_found_again(tmp_path):
    source = many(tmp_path / "in", 3)
    Path(os.fsdecode(os.fsencode(source) + b"/caf\xe9.png")).write_bytes(png("red"))
    Path(os.fsdecode(os.fsencode(source) + b"/na\xefve.png")).write_bytes(b"bad")
    members = [("a.png", png("blue")), ("a.json", b'{"class": "\\ud83d", "caption": "\\udc00 x"}')]
    (tmp_path / "x.tar").write_bytes(tar_bytes(members))
    dataset = run(tmp_path, source, tmp_path / "x.tar")
    assert dataset.class_names == (r"\ud83d",)
    assert r"caf\udce9.png" in {Path(source).name for (source,) in columns(dataset, "source")}
    assert [Path(row["source"]).name for row in lines(dataset, "rejected")] == [r"na\udcefve.png"]
    many(source, 2, start=3)
    assert run(tmp_path, source, tmp_path / "x.tar").manifest["parent"] == dataset.digest


def test_of_rows_that_give_one_picture_several_captions_the_first_stays(tmp_path):
    """The order of rows that are alike in all else must not be left to chance: it decides the bytes."""
    many(tmp_path / "in", 40)
    rows = [{"uri": f"in/{index:05}.png", "caption": f"words {n}"} for n in (3, 1, 4, 0, 2) for index in range(40)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    dataset = run(tmp_path, tmp_path / "t.jsonl")
    assert {caption for (caption,) in columns(dataset, "caption")} == {"words 0"}
    assert dataset.manifest["counts"] == {"found": 200, "kept": 40, "rejected": 0, "duplicates": 160}


def test_objects_that_are_neither_pictures_nor_shards_are_told_of(tmp_path, capsys):
    write_folder(tmp_path / "in")
    (tmp_path / "in" / "LICENSE").write_text("free")
    dataset = run(tmp_path, tmp_path / "in")
    assert dataset.manifest["ignored"]["rows"] == 1
    assert "1 objects are neither pictures nor shards" in capsys.readouterr().out
    assert dataset.manifest["counts"]["found"] == 16


def test_a_source_without_pictures_is_refused_by_name(tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(PipelineError, match=r"1 objects, but no picture"):
        run(tmp_path, tmp_path / "notes.txt")
    (tmp_path / "bad.png").write_bytes(b"broken")
    with pytest.raises(PipelineError, match=r"no picture to train on \(1 undecodable\)"):
        run(tmp_path, tmp_path / "bad.png")
    with pytest.raises(PipelineError, match=r"nowhere: nothing there"):
        run(tmp_path, tmp_path / "nowhere")


# The same again, more of it, and on other workers


def many(folder, count=700, start=0):
    folder.mkdir(exist_ok=True)
    for index in range(start, start + count):
        (folder / f"{index:05}.png").write_bytes(png((index % 251, index // 251, 77)))
    return folder


def test_the_dataset_does_not_depend_on_the_number_of_readers(tmp_path):
    source = many(tmp_path / "in")
    one = run(tmp_path / "1", source, readers=1, shard_size=100)
    many_at_once = run(tmp_path / "5", source, readers=5, shard_size=100)
    assert one.digest == many_at_once.digest
    assert published(one) == published(many_at_once)
    assert [shard["rows"] for shard in one.manifest["shards"]["train"]][:-1] == [100] * 6


def test_what_was_read_is_not_read_again(tmp_path):
    source = many(tmp_path / "in")
    (source / "bad.png").write_bytes(b"bad")
    config = config_of(tmp_path / "store", source, max_rejected="0")
    with pytest.raises(PipelineError, match="nothing was published"):
        ingest.run(config)
    staged = {info.uri: info for info in storage.list_objects(str(tmp_path / "store")) if "/units/" in info.uri}
    assert len([uri for uri in staged if uri.endswith(".json")]) == 3
    # One unit's record is lost, as by a worker's death; a mark in another's stays only if that one is left alone.
    records = sorted(uri for uri in staged if uri.endswith(".json"))
    marked = json.loads(Path(records[0]).read_text())
    Path(records[0]).write_text(json.dumps({**marked, "notes": {"marked": 1}}))
    Path(records[1]).unlink()
    again = open_dataset(ingest.run(config.model_copy(update={"max_rejected": None})).uri)
    assert again.manifest["notes"] == {"marked": 1}
    fresh = run(tmp_path / "fresh", source)
    assert again.manifest["shards"] == fresh.manifest["shards"]
    assert not [name for name in published(again) if "staging" in name]


def test_the_same_again_is_found_and_a_changed_setting_or_source_is_not(tmp_path, cartoon_shards):
    copy = tmp_path / "in"
    copy.mkdir()
    for shard in cartoon_shards.iterdir():
        (copy / shard.name).write_bytes(shard.read_bytes())
    config = config_of(tmp_path / "store", copy)
    uri = ingest.run(config).uri
    found = ingest.find(config)
    assert found is not None
    assert found.uri == uri
    assert ingest.find(config.model_copy(update={"resolution": 16})) is None
    (copy / "more.png").write_bytes(png("red"))
    assert ingest.find(config) is None


def test_new_objects_extend_the_dataset_and_only_they_are_read(tmp_path, capsys):
    source = many(tmp_path / "in", 300)
    first = run(tmp_path, source)
    many(tmp_path / "in", 200, start=300)
    (source / "0-again.png").write_bytes((source / "00007.png").read_bytes())
    (source / "x-again.png").write_bytes((source / "00400.png").read_bytes())
    capsys.readouterr()
    second = run(tmp_path, source)
    assert "300 objects known, 202 to read" in capsys.readouterr().out
    assert second.manifest["parent"] == first.digest
    assert second.manifest["counts"] == {"found": 502, "kept": 500, "rejected": 0, "duplicates": 2}
    pairs = {(Path(row["source"]).name, Path(row["same_as"]).name) for row in lines(second, "duplicates")}
    assert pairs == {("0-again.png", "00007.png"), ("x-again.png", "00400.png")}
    # The old rows stay where they were, and nobody changes sides between training and held-out.
    scratch = run(tmp_path, source, extend=False)
    assert scratch.manifest["parent"] is None
    for split in ("train", "heldout"):
        old = first.read(split)
        assert np.array_equal(second.read(split).pixels[: len(old.ids)], old.pixels)
        both = [{picture.tobytes() for picture in made.read(split).pixels} for made in (second, scratch)]
        assert both[0] == both[1]
    for name in ("mean", "sigma_data", "classes", "train"):
        assert second.manifest[name] == pytest.approx(scratch.manifest[name])
    assert ingest.find(config_of(tmp_path / "store", source)).uri in (second.uri, scratch.uri)
    third = many(tmp_path / "in", 50, start=500) and run(tmp_path, source)
    assert third.manifest["parent"] in (second.digest, scratch.digest)
    assert third.manifest["counts"]["kept"] == 550 == third.rows("train") + third.rows("heldout")
    assert len({picture.tobytes() for picture in all_pixels(third)}) == 550


def test_a_source_that_was_changed_or_taken_away_is_not_built_upon(tmp_path):
    source = many(tmp_path / "in", 30)
    run(tmp_path, source)
    (source / "00003.png").unlink()
    many(tmp_path / "in", 5, start=30)
    dataset = run(tmp_path, source)
    assert dataset.manifest["parent"] is None
    assert dataset.manifest["counts"]["kept"] == 34


def test_the_same_objects_below_another_source_have_other_classes_and_are_another_dataset(tmp_path):
    source = write_folder(tmp_path / "in")
    names = sorted({name for name, _ in PICTURES.values()})
    by_class = run(tmp_path, source)
    assert list(by_class.manifest["classes"]) == names
    apart = config_of(tmp_path / "store", *(source / name for name in names))
    assert ingest.find(apart) is None
    flat = open_dataset(ingest.run(apart).uri)
    assert flat.manifest["classes"] == {}
    assert flat.manifest["parent"] is None
    unlabelled = {"labels": "ignored"}
    first = run(tmp_path, source, **unlabelled)
    found = ingest.find(apart.model_copy(update=unlabelled))
    assert found is not None
    assert found.uri == first.uri, "without classes it does not matter"


def test_a_run_that_comes_second_reports_the_first(tmp_path, capsys, monkeypatch):
    source = many(tmp_path / "in", 20)
    config = config_of(tmp_path / "store", source)
    publish = storage.publish

    def overtaken(folder, manifest):
        assert publish(folder, manifest) == "created"
        return publish(folder, manifest)

    monkeypatch.setattr(storage, "publish", overtaken)
    outcome = ingest.run(config)
    assert outcome.found
    assert "another run published" in capsys.readouterr().out
    assert not [name for name in published(open_dataset(outcome.uri)) if "staging" in name]


def test_pictures_cannot_be_told_apart_by_their_place_in_the_dataset(tmp_path):
    """Shards are in digest order, so classes that come one after the other at the source are mixed in every shard."""
    for name, level in (("dark", 0), ("light", 120)):
        (tmp_path / "in" / name).mkdir(parents=True)
        for index in range(300):
            (tmp_path / "in" / name / f"{index}.png").write_bytes(png((index % 120 + level, index // 120, 1)))
    dataset = run(tmp_path, tmp_path / "in", shard_size=150, heldout=0.0)
    for start in range(0, 600, 150):
        labels = dataset.read("train").labels[start : start + 150]
        assert 45 <= labels.sum() <= 105, "six standard deviations are 37"


# What people look at


def test_the_page_shows_the_accounts_and_every_class(tmp_path):
    write_folder(tmp_path / "in")
    (tmp_path / "in" / "a" / "<b>bad.png").write_bytes(b"bad")
    dataset = run(tmp_path, tmp_path / "in")
    page = storage.read_bytes(f"{dataset.uri}/dataset.html").decode()
    assert "17</b><span>items found" in page
    assert "undecodable" in page
    assert page.count("<img ") == 2 == len(dataset.manifest["contact"])
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page), "the page needs nothing but itself"
    sheet = Image.open(io.BytesIO(storage.read_part(dataset.uri, dataset.manifest["contact"]["a"])))
    assert sheet.size == (8 * 12 + 2 * 11, 8) or sheet.size[1] == 8
