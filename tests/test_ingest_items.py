"""What the readers of ingestion make of odd sources: everything there is an item, kept or with a reason."""

import errno
import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.damage import encoded, noise, tar_bytes

from pipelines.cells import printable
from pipelines.config import AwayError, IngestConfig, PipelineError
from pipelines.ingest import items as readers
from pipelines.ingest import stage
from pipelines.ingest.items import Shard, items
from pipelines.ingest.sources import list_sources, units
from pipelines.ingest.units import read_unit
from pipelines.storage import StorageError

PNGS = [encoded(noise(number)) for number in range(6)]


def found(source, **settings):
    """Every item of a source as (name, number of its picture, class, caption, reason), and the shards as they ended."""
    config = IngestConfig(store=f"{source}-store", source=[str(source)], **settings)
    told, shards = [], []
    for unit in units(config, list_sources(config)):
        shards.append(Shard(unit.name))
        for item in items(unit, config, shards[-1]):
            number = PNGS.index(item.data) if item.data in PNGS else None
            told.append((Path(item.source).name, number, item.class_name, item.caption, item.reason))
    return told, shards


def tar(tmp_path, *members):
    path = tmp_path / "x.tar"
    path.write_bytes(tar_bytes(members))
    return path


def reasons(told):
    return {name: reason for name, _, _, _, reason in told}


# Tars


def test_a_suffix_may_have_several_parts_and_a_further_picture_is_told_of(tmp_path):
    label = b'{"class": "k", "caption": "c"}'
    members = [("x.image.png", PNGS[0]), ("x.json", label), ("y.mask.png", PNGS[1]), ("y.png", PNGS[2])]
    told, _ = found(tar(tmp_path, *members, ("./d/._z.PNG", PNGS[3])))
    assert told == [
        ("x.tar#x.image.png", 0, "k", "c", ""),
        ("x.tar#y.png", 2, None, "", ""),
        ("x.tar#y.mask.png", None, None, "", "second_picture"),
        ("._z.png", 3, None, "", ""),
    ]


def test_a_name_that_comes_twice_is_two_items(tmp_path):
    told, _ = found(tar(tmp_path, ("x.png", PNGS[0]), ("x.png", PNGS[1]), ("x.PNG", PNGS[2])))
    assert [number for _, number, *_ in told] == [0, 1, 2]


@pytest.mark.parametrize("damage", ["joined", "zeroed"])
def test_what_lies_behind_an_end_mark_is_not_passed_over(tmp_path, damage):
    data = tar_bytes([(f"{number}.png", PNGS[number]) for number in range(4)])
    with tarfile.open(fileobj=io.BytesIO(data)) as shard:
        third = shard.getmembers()[2].offset
    joined = tar_bytes([("0.png", PNGS[0]), ("1.png", PNGS[1])]) + data
    zeroed = data[:third] + bytes(512) + data[third + 512 :]
    (tmp_path / "x.tar").write_bytes(joined if damage == "joined" else zeroed)
    told, (shard,) = found(tmp_path / "x.tar")
    assert [number for _, number, *_ in told] == [0, 1, None]
    assert told[-1][-1] == "truncated_shard"
    assert "more behind it" in shard.incomplete


def test_links_in_a_tar_are_told_of(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as shard:
        for name, kind in (("hard.png", tarfile.LNKTYPE), ("soft.png", tarfile.SYMTYPE), ("d.png", tarfile.DIRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.png"
            shard.addfile(info)
    told, _ = found(tmp_path / "x.tar")
    assert reasons(told) == {"x.tar#hard.png": "unsupported", "x.tar#soft.png": "unsupported"}


def test_members_that_are_too_large_do_not_end_the_shard(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_MOST", 50_000)
    film = [("film.mp4", bytes(90_000)), ("film.png", PNGS[0])]
    told, (shard,) = found(tar(tmp_path, ("huge.png", bytes(60_000)), *film, ("z.png", PNGS[1])))
    assert reasons(told) == {"x.tar#huge.png": "too_large", "x.tar#film.png": "", "x.tar#z.png": ""}
    assert not shard.incomplete


def test_json_as_deep_as_a_well_spoils_its_own_sample_alone(tmp_path):
    told, _ = found(tar(tmp_path, ("a.png", PNGS[0]), ("a.json", b"[" * 200_000), ("b.png", PNGS[1])))
    assert reasons(told) == {"x.tar#a.png": "bad_row", "x.tar#b.png": ""}


def test_no_damage_to_a_tar_is_more_than_a_reason(tmp_path):
    """Random damage: the readers neither raise nor lose count, for what they say is read is what they gave."""
    whole = bytearray(tar_bytes([(f"{number}.png", PNGS[number]) for number in range(4)]))
    generator = np.random.default_rng(0)
    for _ in range(300):
        data = bytearray(whole)
        start = int(generator.choice([0, 4608, 9216])) // 512 * 512
        for at in generator.integers(512, size=generator.integers(1, 6)):
            data[start + int(at)] = int(generator.integers(256))
        if generator.random() < 0.5:  # a header whose sum is right although its fields are not
            header = data[start : start + 512]
            data[start + 148 : start + 156] = b"%06o\0 " % (sum(header) - sum(header[148:156]) + 8 * 32)
        (tmp_path / "x.tar").write_bytes(bytes(data))
        told, (shard,) = found(tmp_path / "x.tar")
        assert shard.read == len([row for row in told if "#" in row[0] and row[4] != "second_picture"])
        kept = [number for _, number, *_ in told if number is not None]
        assert shard.incomplete or len(kept) == 4 or any(row[4] for row in told) or len(told) == 4


def test_a_disk_that_fails_is_no_reason_to_reject(tmp_path, monkeypatch):
    def fails(*_):
        raise OSError(errno.EIO, "Input/output error")

    path = tar(tmp_path, ("a.png", PNGS[0]))
    monkeypatch.setattr(readers, "_content", fails)
    with pytest.raises(StorageError, match=r"x.tar: .*Input/output error"):
        found(path)


def test_a_full_disk_is_a_fault_of_the_run_and_not_of_the_shard(tmp_path, monkeypatch):
    import gzip

    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(tar_bytes([("a.png", PNGS[0])])))
    config = IngestConfig(store=str(tmp_path / "s"), source=[str(tmp_path / "x.tar.gz")], resolution=8)
    (unit,) = units(config, list_sources(config))

    class Full(io.BytesIO):
        def write(self, _):
            raise OSError(errno.ENOSPC, "No space left on device")

    real = open
    monkeypatch.setattr(readers, "open", lambda path, mode: Full() if mode == "wb" else real(path, mode), raising=False)
    told = read_unit(unit.to_row(), config, str(tmp_path / "staging"))
    assert "x.tar.gz: [Errno 28] No space left" in told["fault"]
    assert told["status"] == 1, "a full disk does not empty itself"
    assert not (tmp_path / "staging").exists(), "no record: the next run does this unit again"


# Tables


def table(tmp_path, name, text):
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(PNGS[number])
    (tmp_path / name).write_bytes(text.encode())
    return tmp_path / name


def test_lines_of_a_table_end_at_line_feeds_alone(tmp_path):
    rows = [{"uri": "0.png", "caption": "a\u2028b\x85c"}, {"uri": "1.png"}]
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    told, _ = found(table(tmp_path, "t.jsonl", text))
    assert told == [("0.png", 0, None, "a\u2028b\x85c", ""), ("1.png", 1, None, "", "")]


def test_a_quote_that_is_never_closed_does_not_swallow_the_rows_behind_it(tmp_path):
    path = table(tmp_path, "t.csv", 'uri,caption\n0.png,"oh\n1.png,x\n')
    with pytest.raises(PipelineError, match=r"t.csv: after line 1: unexpected end of data; mend the table's quotes"):
        found(path)


def test_rows_that_cannot_be_used_are_rejected_one_by_one(tmp_path):
    rows = ["uri,caption", "0.png,one, two", "1.png,fine", "x\0.png,a", "s3://,a", "0.png/y.png,a", "n" * 300 + ",a"]
    told, _ = found(table(tmp_path, "t.csv", "\n".join([*rows, "n" * 2000 + ",a"])))
    expected = ["bad_row", "", "unsupported", "unsupported", "missing_object", "missing_object", "unsupported"]
    assert [reason for *_, reason in told] == expected


def test_a_field_that_no_row_of_a_json_table_has_is_an_error(tmp_path):
    path = table(tmp_path, "t.jsonl", '{"uri": "0.png", "class": "a"}')
    with pytest.raises(PipelineError, match=r"t.jsonl: no column 'clazz'; there are class, uri; .*--class-field"):
        found(path, class_field="clazz")
    assert found(path)[0] == [("0.png", 0, "a", "", "")]


# Parquet


def parquet(tmp_path, **columns):
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    return tmp_path / "x.parquet"


def test_classes_read_the_same_where_some_are_missing(tmp_path):
    """pandas writes whole numbers as floating-point ones as soon as one is missing, which is then no number."""
    label = pa.array([1.0, float("nan"), 2.5])
    told, _ = found(parquet(tmp_path, image=pa.array(PNGS[:3]), **{"class": label}))
    assert [name for _, _, name, *_ in told] == ["1", None, "2.5"]


def test_text_that_is_no_utf8_rejects_its_row_alone(tmp_path):
    offsets = pa.array([0, 2, 4], pa.int32()).buffers()[1]
    text = pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"\xff\xfeab")])
    told, _ = found(parquet(tmp_path, image=pa.array(PNGS[:2]), **{"class": text}))
    assert told == [("x.parquet#1", None, None, "", "bad_row"), ("x.parquet#2", 1, "ab", "", "")]


def test_a_column_of_something_else_is_unsupported(tmp_path):
    told, _ = found(parquet(tmp_path, image=pa.array([[1, 2], [3]])))
    assert set(reasons(told).values()) == {"unsupported"}


# Folders


def test_links_in_a_folder_are_followed_and_dead_ones_told_of(tmp_path):
    folder, other = tmp_path / "in", tmp_path / "elsewhere"
    folder.mkdir()
    other.mkdir()
    (folder / "a.png").write_bytes(PNGS[0])
    (other / "b.png").write_bytes(PNGS[1])
    (folder / "cat").symlink_to(other)
    (folder / "circle").symlink_to(folder)
    (folder / "c.png").symlink_to(other / "b.png")
    (folder / "dead.png").symlink_to(tmp_path / "nowhere")
    told, _ = found(folder)
    assert told == [
        ("a.png", 0, None, "", ""),
        ("c.png", 1, None, "", ""),
        ("b.png", 1, "cat", "", ""),
        ("dead.png", None, None, "", "missing_object"),
    ]


def test_a_folder_with_brackets_in_its_name_is_no_pattern(tmp_path):
    for name in ("trip [2020]/cat", "trip 2/dog"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a.png").write_bytes(PNGS[0])
    assert found(tmp_path / "trip [2020]")[0] == [("a.png", 0, "cat", "", "")]
    assert found(tmp_path / "trip [0-9]")[0] == [("a.png", 0, "trip 2", "", "")], "as for any pattern"


def test_pictures_beside_the_results_of_a_store_are_taken_and_the_results_are_not(tmp_path):
    for name in (
        "images/a.png",
        "models/b.png",
        "images/mine/0123456789abcdef/c.png",
        "cartoons/0123456789abcdef/d.png",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(PNGS[0])
    config = IngestConfig(store=str(tmp_path), source=[str(tmp_path)])
    assert [Path(info.uri).name for info in list_sources(config).taken] == ["a.png", "b.png"]
    named = config.model_copy(update={"source": [str(tmp_path / "cartoons/0123456789abcdef")]})
    assert [Path(info.uri).name for info in list_sources(named).taken] == ["d.png"]


def test_a_file_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_MOST", 1000)
    (tmp_path / "a.png").write_bytes(PNGS[0])
    told, _ = found(table(tmp_path, "t.jsonl", '{"uri": "a.png"}'))
    assert reasons(told) == {"a.png": "too_large"}


def test_a_name_in_another_encoding_is_spelled_out():
    assert printable(os.fsdecode(b"caf\xe9.png")) == r"caf\udce9.png"
    assert printable("café.png") == "café.png"


@pytest.mark.parametrize(("statuses", "kind"), [([75, 75], AwayError), ([75, 1], PipelineError)])
def test_a_run_may_be_tried_again_where_all_that_it_met_may_pass(statuses, kind):
    with pytest.raises(PipelineError, match="2 units could not be done") as raised:
        stage._raise_faults("ingest", list(zip("ba", statuses, strict=True)))
    assert type(raised.value) is kind
    assert str(raised.value).endswith("go on from here. a; b")
