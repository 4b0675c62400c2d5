from collections import Counter

import numpy as np
import pytest

from pipelines import storage
from pipelines.config import PipelineError
from pipelines.dataset import Dataset, SampleStream, open_dataset


def dataset(*shards):
    """A dataset's manifest with shards of these numbers of rows; enough for everything but pixels."""
    entries = [{"name": f"shard-{number}", "rows": rows, "sha256": ""} for number, rows in enumerate(shards)]
    return Dataset("/store/datasets/x/abc", {"shards": {"train": entries}, "classes": {}, "row_group": 256})


def stream(data, batch=8, streams=4, rank=0, world=1, seed=0):
    return SampleStream(data, "train", seed, batch, streams, rank, world)


SHAPES = [(1000, 1000, 300), (40,), (257, 3), (8,)]


@pytest.mark.parametrize("shards", SHAPES)
def test_an_epoch_reads_each_row_at_most_once_and_all_but_the_remainder(shards):
    data, total = dataset(*shards), sum(shards)
    whole = stream(data)
    for epoch in range(3):
        first = epoch * whole.batches_per_epoch
        rows = Counter(
            int(row) for batch in range(first, first + whole.batches_per_epoch) for row in whole.indices(batch)
        )
        assert max(rows.values()) == 1
        assert len(rows) == total // 8 * 8
        assert set(rows) <= set(range(total))


@pytest.mark.parametrize("world", [2, 4])
def test_a_global_batch_is_the_same_set_on_any_number_of_workers(world):
    data = dataset(1000, 500)
    for batch in (0, 5, 186, 187, 400):
        parts = [stream(data, rank=rank, world=world).indices(batch) for rank in range(world)]
        assert {len(part) for part in parts} == {8 // world}
        assert sorted(np.concatenate(parts)) == sorted(stream(data).indices(batch))


def test_the_order_follows_the_seed_and_changes_from_epoch_to_epoch():
    data = dataset(300, 300)
    epoch = [stream(data).indices(batch).tolist() for batch in range(75)]
    assert epoch == [stream(data).indices(batch).tolist() for batch in range(75)]
    assert epoch != [stream(data, seed=1).indices(batch).tolist() for batch in range(75)]
    assert epoch != [stream(data).indices(batch).tolist() for batch in range(75, 150)]


def test_what_is_left_over_differs_between_epochs():
    data = dataset(260, 259)
    left = []
    for epoch in range(4):
        rows = {int(row) for batch in range(64) for row in stream(data).indices(epoch * 64 + batch)}
        left.append(frozenset(set(range(519)) - rows))
    assert {len(missing) for missing in left} == {7}
    assert len(set(left)) == 4


def test_resuming_in_the_middle_reads_what_would_have_come_next(tiny_dataset):
    whole = stream(open_dataset(tiny_dataset))
    batches = whole.batches(0)
    expected = [next(batches) for _ in range(30)]
    resumed = whole.batches(17)
    for rows in expected[17:]:
        again = next(resumed)
        assert np.array_equal(again.ids, rows.ids)
        assert np.array_equal(again.pixels, rows.pixels)


def test_the_pictures_of_a_batch_are_those_of_its_row_numbers(tiny_dataset):
    data = open_dataset(tiny_dataset)
    everything = data.read("train")
    rows = next(stream(data).batches(3))
    assert np.array_equal(rows.pixels, everything.pixels[rows.ids])
    assert np.array_equal(rows.labels, everything.labels[rows.ids])


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"batch": 9}, "streams: 4 must divide global_batch_size=9"),
        ({"world": 3}, "multiple of the 3 workers"),
        ({"batch": 2000}, "do not fill one global batch of 2000"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, told):
    with pytest.raises(PipelineError, match=told):
        stream(dataset(100), **settings)


def test_a_damaged_shard_is_named_and_not_read(tiny_dataset, tmp_path):
    copy = str(tmp_path / "copy")
    for info in storage.list_objects(tiny_dataset):
        storage.write_bytes(copy + info.uri.removeprefix(tiny_dataset), storage.read_bytes(info.uri))
    shard = open_dataset(copy).manifest["shards"]["train"][0]["name"]
    data = bytearray(storage.read_bytes(f"{copy}/{shard}"))
    data[100] ^= 1
    storage.write_bytes(f"{copy}/{shard}", bytes(data))
    with pytest.raises(storage.StorageError, match=rf"{shard}: checksum"):
        open_dataset(copy).read("train")


def test_an_unknown_split_is_refused(tiny_dataset):
    with pytest.raises(PipelineError, match="no split 'test'; there are heldout, train"):
        open_dataset(tiny_dataset).rows("test")
