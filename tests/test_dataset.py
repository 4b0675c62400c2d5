import itertools
from collections import Counter, OrderedDict

import numpy as np
import pytest
from PIL import Image

from pipelines import storage
from pipelines.config import PipelineError
from pipelines.dataset import Dataset, SampleStream, open_dataset


def dataset(*shards):
    """A dataset's manifest with shards of these numbers of rows; enough for everything but pixels."""
    entries = [{"name": f"shard-{number}", "rows": rows, "sha256": ""} for number, rows in enumerate(shards)]
    return Dataset("/store/datasets/x/abc", {"shards": {"train": entries}, "classes": {}, "row_group": 256})


@pytest.fixture(scope="module", params=[40, 700], ids=["one row group", "several shards"])
def numbered(request, tmp_path_factory, ray_session):
    """A dataset whose pictures carry a number of their own in their first pixel, with that many pictures."""
    from pipelines import ingest
    from pipelines.config import IngestConfig

    folder = tmp_path_factory.mktemp("numbered")
    for number in range(request.param):
        pixels = np.zeros((8, 8, 3), dtype=np.uint8)
        pixels[0, 0] = (*divmod(number, 256), 9)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    config = IngestConfig(store=str(folder), source=[str(folder)], resolution=8, heldout=0.0, shard_size=300)
    return open_dataset(ingest.run(config).uri), request.param


def numbers(rows):
    return (rows.pixels[:, 0, 0, 0].astype(int) * 256 + rows.pixels[:, 0, 0, 1]).tolist()


@pytest.mark.parametrize("ahead", [False, True], ids=["read here", "read ahead by Ray Data"])
def test_recount_of_two_epochs_over_ranks_with_stops_in_the_middle(numbered, ahead):
    """Every picture at most once an epoch, all but the remainder once, the same batches on 1, 2 and 4 ranks."""
    data, total = numbered
    per_epoch = total // 8
    whole = [sorted(numbers(rows)) for rows in stream(data).batches(0, 2 * per_epoch)]
    assert len(whole) == 2 * per_epoch
    for epoch in range(2):
        seen = Counter(number for batch in whole[epoch * per_epoch : (epoch + 1) * per_epoch] for number in batch)
        assert set(seen.values()) == {1}
        assert len(seen) == per_epoch * 8
    stops = [0, 3, per_epoch - 1, per_epoch + 1, 2 * per_epoch]
    for world in (2,) if ahead else (1, 2, 4):
        batches = [[] for _ in whole]
        for rank in range(world):
            for first, last in itertools.pairwise(stops):
                for batch, rows in enumerate(stream(data, rank=rank, world=world).batches(first, last, ahead), first):
                    batches[batch] += numbers(rows)
        assert [sorted(batch) for batch in batches] == whole


def test_a_shard_is_verified_once_and_let_go_of_it_is_read_in_part(numbered, monkeypatch):
    data, total = numbered
    monkeypatch.setattr("pipelines.dataset._verified", set())
    monkeypatch.setattr("pipelines.dataset._open", OrderedDict())
    monkeypatch.setattr("pipelines.dataset._SHARDS_OPEN", 1)
    read = []
    part = storage.read_part
    monkeypatch.setattr(storage, "read_part", lambda folder, shard: read.append(shard["name"]) or part(folder, shard))
    batches = [numbers(rows) for rows in stream(data).batches(0, 3 * (total // 8))]
    assert sorted(read) == sorted(shard["name"] for shard in data.manifest["shards"]["train"])
    assert max(Counter(number for batch in batches for number in batch).values()) == 3


def test_a_resumed_stream_reads_nothing_that_was_passed(numbered, monkeypatch):
    data, total = numbered
    windows = []
    read = SampleStream.read_window
    monkeypatch.setattr(SampleStream, "read_window", lambda self, window: windows.append(window) or read(self, window))
    next(stream(data).batches(total // 8 - 1))
    assert windows == [(0, number, (total // 8 - 1) * 2 // 1024) for number in range(4)]


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
        ({"world": 5}, "at least the 5 workers"),
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
