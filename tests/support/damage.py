"""Two hundred damaged items of every kind, each with the reason that it must be rejected for."""

import gzip
import io
import itertools
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

COUNT = 200


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def noise(seed, size=(40, 30)):
    pixels = np.random.default_rng([7, seed]).integers(256, size=(size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def tar_bytes(members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as shard:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            shard.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def parquet_bytes(rows, **options):
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer, **options)
    return buffer.getvalue()


def flipped(data, at):
    return data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :]


def lone_files():
    """Endless (suffix, bytes, reason) of files that are no good by themselves."""
    bomb = encoded(Image.new("1", (20_000, 20_000)))
    large = encoded(Image.new("1", (8_100, 8_100)))
    for seed in itertools.count():
        png, jpeg = encoded(noise(seed)), encoded(noise(seed), "JPEG")
        yield ".jpg", bytes(np.random.default_rng(seed).integers(1, 255, 500, dtype=np.uint8)), "undecodable"
        yield ".png", b"", "undecodable"
        yield ".png", png[: len(png) // 2], "undecodable"
        yield ".jpg", jpeg[: len(jpeg) // 2], "undecodable"
        yield ".png", flipped(png, len(png) // 2), "undecodable"
        yield ".gif", b"<html><body>404 Not Found</body></html>", "undecodable"
        yield ".bmp", encoded(noise(seed), "BMP")[:-900], "undecodable"
        yield ".webp", encoded(noise(seed), "WEBP")[:-300], "undecodable"
        yield ".png", encoded(noise(seed, (90, 3))), "too_small"
        yield ".tiff", encoded(noise(seed, (2, 2)), "TIFF"), "too_small"
        yield ".png", bomb, "too_large"
        yield ".png", large, "too_large"
        yield ".tif", encoded(Image.new("F", (30, 30)), "TIFF"), "unsupported"
        yield ".heic", b"\0\0\0\x18ftypheic" + bytes(50), "unsupported"
        yield ".jpg", b"\0\0\0\x18ftypheic" + bytes(50), "unsupported"
        yield ".png", b"<?xml version='1.0'?>\n<svg xmlns='http://www.w3.org/2000/svg'/>", "unsupported"


def damaged(folder):
    """Write damaged items into the new `folder` (a Path): sources, {item: reason} of 200, and how many are good."""
    folder.mkdir(parents=True)
    shards, good = _cut_shards(folder)
    expected = _tables(folder) | shards
    files = lone_files()
    members = []
    for number, (suffix, data, reason) in zip(range(32), files, strict=False):
        members += [(f"bad-{number:03}{suffix}", data), (f"bad-{number:03}.json", b"{}")]
        # Of a sample whose picture has a suffix that is not taken, no member is named.
        expected[f"{folder}/bad.tar#bad-{number:03}{'' if suffix == '.heic' else suffix}"] = reason
    members += [("words.txt", b"no picture"), ("list.png", encoded(noise(900))), ("list.json", b"[]")]
    expected |= {f"{folder}/bad.tar#words": "no_picture", f"{folder}/bad.tar#list.png": "bad_row"}
    (folder / "bad.tar").write_bytes(tar_bytes(members))
    (folder / "files").mkdir()
    for number, (suffix, data, reason) in zip(range(COUNT - len(expected)), files, strict=False):
        path = folder / "files" / f"bad-{number:03}{suffix}"
        path.write_bytes(data)
        expected[str(path)] = reason
    names = ("files", "*.tar", "*.tar.gz", "*.jsonl", "*.parquet")
    return [str(folder / name) for name in names], expected, good


def _tables(folder):
    rows = [json.dumps({"uri": f"gone-{number}.png"}) for number in range(12)]
    rows += ["{broken", "[1, 2]", json.dumps({"uri": ""}), json.dumps({"uri": "https://example.com/x.png"})]
    (folder / "table.jsonl").write_text("\n".join(rows))
    expected = {f"{folder}/gone-{number}.png": "missing_object" for number in range(12)}
    reasons = ("bad_row", "bad_row", "missing_object", "unsupported")
    return expected | {f"{folder}/table.jsonl#{13 + at}": reason for at, reason in enumerate(reasons)}


def _cut_shards(folder):
    """Shards that break off, with an index and without, packed, and in the middle; a Parquet with a damaged part."""
    good = [encoded(noise(1000 + number)) for number in range(50)]
    whole = tar_bytes([(f"cut-{number:02}.png", data) for number, data in enumerate(good[:20])])
    with tarfile.open(fileobj=io.BytesIO(whole)) as shard:
        members = shard.getmembers()
    cut = members[11].offset_data + 100
    (folder / "indexed.tar").write_bytes(whole[:cut])
    lines = [f"png {member.offset_data} {member.size} {member.name}" for member in members]
    (folder / "indexed.idx").write_text("\n".join(["v1.2 20", *lines]) + "\n")
    expected = {f"{folder}/indexed.tar#cut-{at:02}.png": "truncated_shard" for at in range(12, 20)}
    expected[f"{folder}/indexed.tar#cut-11"] = "truncated_shard"
    whole = tar_bytes([(f"head-{number}.png", data) for number, data in enumerate(good[20:24])])
    with tarfile.open(fileobj=io.BytesIO(whole)) as shard:
        (folder / "headless.tar").write_bytes(flipped(whole, shard.getmembers()[2].offset + 10))
    expected[f"{folder}/headless.tar"] = "truncated_shard"
    packed = gzip.compress(tar_bytes([(f"gz-{number}.png", data) for number, data in enumerate(good[24:28])]))
    (folder / "short.tar.gz").write_bytes(packed[:-2000])
    expected[f"{folder}/short.tar.gz#gz-3"] = "truncated_shard"
    rows = [{"image": data} for data in good[30:50]]
    data = parquet_bytes(rows, row_group_size=10, compression="none", use_dictionary=False)
    start = pq.ParquetFile(io.BytesIO(data)).metadata.row_group(1).column(0).data_page_offset
    (folder / "part.parquet").write_bytes(data[:start] + b"\xff" * 64 + data[start + 64 :])
    expected |= {f"{folder}/part.parquet#{number}": "damaged_shard" for number in range(11, 21)}
    return expected, 11 + 2 + 3 + 10
