import importlib
import re

from conftest import ROOT

from pipelines import storage
from pipelines.config import GenerateConfig
from pipelines.dataset import Dataset, Layout

scale = importlib.import_module("benchmarks.scale")


def test_the_model_of_scale_still_fits_the_code(tmp_path):
    assert scale.stream_of(3)["bytes"] > 3 * len(scale.manifest_of(1)["shards"]["train"][0]["name"])
    assert scale.plan_of(300)["seconds"] > 0
    assert scale.listing_of(3, str(tmp_path))["committed"] > 0


def test_the_manifest_of_bulk_work_is_reckoned_by_what_a_shard_takes(tmp_path):
    (row,) = re.findall(r"^\| manifest of bulk work .*", (ROOT / "docs/scale.md").read_text(), flags=re.M)
    profile = {"device": "cpu", "dtype": "float32", "lanes": 32, "threads": 2, "torch": "2.13.0+cpu"}
    part = storage.put_part(str(tmp_path), "part-15624", ".parquet", bytes(200_000))
    entry = {**part, "rows": 64, "numerics": profile}
    size = len(storage.to_json({"parts": [entry] * 1000})) / 1000
    told = int(re.findall(r"an entry of (\d+) bytes", row)[0])
    assert abs(size - told) < 0.1 * told
    held = float(re.findall(r"takes ([\d.]+) KB of the driver", row)[0]) * 1e3
    by_default, by_more = (10**9 // rows for rows in (GenerateConfig.model_fields["shard_size"].default, 10_000))
    for shown in (
        f"{by_default:,} shards, {told * by_default / 1e9:.1f} GB, and {held * by_default / 1e9:.0f} GB",
        f"{by_more:,} shards, {told * by_more / 1e6:.0f} MB, and {held * by_more / 1e9:.2f} GB",
    ):
        assert shown in row


def test_row_groups_are_found_by_arithmetic_as_by_counting():
    sizes = (5, 0, 8, 1, 4)
    dataset = Dataset("made up", {"shards": {"train": [{"rows": rows} for rows in sizes]}, "row_group": 4})
    layout = dataset.layout("train")
    assert layout == Layout(4, sizes)
    counted, first = [], 0
    for place, rows in enumerate(sizes):
        for number, start in enumerate(range(0, rows, 4)):
            counted.append((place, number, first + start, min(4, rows - start)))
        first += rows
    assert [tuple(layout.group(number)) for number in range(len(counted))] == counted
    assert dataset.rows("train") == sum(sizes)
