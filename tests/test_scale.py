import importlib

from pipelines.dataset import Dataset, Layout

scale = importlib.import_module("benchmarks.scale")


def test_the_model_of_scale_still_fits_the_code(tmp_path):
    assert scale.stream_of(3)["bytes"] > 3 * len(scale.manifest_of(1)["shards"]["train"][0]["name"])
    assert scale.plan_of(300)["seconds"] > 0
    assert scale.listing_of(3, str(tmp_path))["committed"] > 0


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
