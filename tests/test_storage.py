import os
import signal
import subprocess
import sys
import threading
import zlib

import numpy as np
import pytest
from conftest import ROOT

from pipelines import storage


def test_what_was_written_is_read_back_and_listed(store):
    storage.write_bytes(f"{store}/a/one", b"1")
    storage.write_bytes(f"{store}/a/b/two", b"22")
    assert storage.read_bytes(f"{store}/a/one") == b"1"
    assert [(info.uri.removeprefix(store), info.size) for info in storage.list_objects(store)] == [
        ("/a/b/two", 2),
        ("/a/one", 1),
    ]
    assert [info.size for info in storage.list_objects(f"{store}/a/b/t*")] == [2]
    assert [info.size for info in storage.list_objects(f"{store}/a/one")] == [1]
    assert [info.size for info in storage.list_objects(f"{store}/a/*")] == [2, 1], (
        "a folder that matches, with all in it"
    )
    storage.write_bytes(f"{store}/c [1]/three", b"333")
    assert [info.size for info in storage.list_objects(f"{store}/c [1]")] == [3]
    assert storage.list_folders(f"{store}/a") == ["b"]
    assert storage.exists(f"{store}/a/one")
    assert not storage.exists(f"{store}/a/none")
    assert not storage.exists(f"{store}/a")


def test_the_version_of_an_object_changes_with_its_content(store):
    storage.write_bytes(f"{store}/x", b"old")
    before = storage.list_objects(f"{store}/x")
    storage.write_bytes(f"{store}/x", b"new")
    assert storage.list_objects(f"{store}/x") != before
    assert storage.read_bytes(f"{store}/x") == b"new"


def test_create_never_changes_what_is_there(store):
    assert storage.create_bytes(f"{store}/manifest", b"first") == "created"
    assert storage.create_bytes(f"{store}/manifest", b"second") == "other"
    assert storage.create_bytes(f"{store}/manifest", b"first") == "same"
    assert storage.read_bytes(f"{store}/manifest") == b"first"


def test_of_many_that_create_at_once_one_wins(store):
    outcomes = {}

    def create(writer):
        outcomes[writer] = storage.create_bytes(f"{store}/race", writer.encode())

    threads = [threading.Thread(target=create, args=(f"writer {number}",)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [writer for writer, outcome in outcomes.items() if outcome == "created"]
    assert len(outcomes) == 8
    assert [storage.read_bytes(f"{store}/race").decode()] == winners


def test_a_folder_exists_once_its_manifest_does_and_not_after_it_is_removed(store):
    part = storage.put_part(f"{store}/thing", "part-0", ".bin", b"payload")
    assert not storage.is_published(f"{store}/thing")
    assert storage.publish(f"{store}/thing", {"kind": "thing", "parts": [part]}) == "created"
    assert storage.read_manifest(f"{store}/thing", "thing")["parts"] == [part]
    assert storage.read_part(f"{store}/thing", part) == b"payload"
    storage.remove_folder(f"{store}/thing")
    assert not storage.is_published(f"{store}/thing")
    assert storage.list_if_any(f"{store}/thing") == []


def test_a_folder_that_others_write_to_and_delete_at_the_same_time_is_deleted(tmp_path, monkeypatch):
    folder = tmp_path / "thing"
    for name in ("a", "b", "c"):
        storage.write_bytes(f"{folder}/{name}", b"1")
    unlink, rmdir, late = os.unlink, os.rmdir, iter(["d", "e"])

    def unlinked_before(name, **place):
        unlink(name, **place)
        unlink(name, **place)  # as another does that comes first

    def written_before(name, **place):
        for written in late:
            (folder / written).write_bytes(b"1")
            break
        rmdir(name, **place)

    monkeypatch.setattr(os, "unlink", unlinked_before)
    monkeypatch.setattr(os, "rmdir", written_before)
    monkeypatch.setattr(storage, "_FIRST_WAIT_S", 0.01)
    storage.remove_folder(str(folder))
    assert next(late, None) is None
    assert not folder.exists()


KILLED = """
import os, signal, sys
from pipelines import storage
os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
storage.write_bytes(sys.argv[1], b"second")
"""


def test_what_a_killed_writer_leaves_is_no_object(tmp_path):
    place = str(tmp_path / "records/000000001.json")
    storage.write_bytes(place, b"first")
    killed = subprocess.run([sys.executable, "-c", KILLED, place], cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(list((tmp_path / "records").iterdir())) == 2, "a file that nobody will finish"
    for uri in (tmp_path, f"{tmp_path}/records/*", f"{tmp_path}/**"):
        assert [info.uri for info in storage.list_objects(str(uri))] == [place]
    assert storage.read_bytes(place) == b"first"
    storage.remove_folder(str(tmp_path / "records"))
    assert not (tmp_path / "records").exists()


def test_an_object_that_is_replaced_while_it_is_read_is_read_again(store, monkeypatch):
    storage.write_bytes(f"{store}/x", b"first")
    stat, later = storage._stat, iter([b"later", b"at the end"])

    def replaced_after(uri):
        info = stat(uri)
        for data in later:
            storage.write_bytes(uri, data)
            break
        return info

    monkeypatch.setattr(storage, "_stat", replaced_after)
    monkeypatch.setattr(storage, "_FIRST_WAIT_S", 0.01)
    assert storage.read_bytes(f"{store}/x") == b"at the end"


class Replaced:
    """A store with one object of two blocks, that another version of as many bytes takes the place of after a read."""

    def __init__(self, *versions):
        self.versions = list(versions)

    def info(self, _):
        data = self.versions[0]
        return {"name": "b/x", "type": "file", "size": len(data), "ETag": f'"{storage.digest(data)[:32]}-2"'}

    def cat_file(self, _, start, end):
        data = self.versions[0][start:end]
        if len(self.versions) > 1:
            self.versions.pop(0)
        return data


def test_an_object_in_parts_that_is_replaced_while_it_is_fetched_is_not_taken_for_one(monkeypatch):
    monkeypatch.setattr(storage, "_BLOCK_BYTES", 2)
    for versions in ([b"aabb"], [b"aabb", b"ccdd"]):
        monkeypatch.setattr(storage, "_filesystem", dict.fromkeys(["s3://b/x"], Replaced(*versions)).get)
        copying = storage.local_copy(storage.stat("s3://b/x"))
        if len(versions) > 1:
            with pytest.raises(storage.StorageError, match="s3://b/x: changed since it was listed; run again"), copying:
                pass
        else:
            with copying as path, open(path, "rb") as copy:
                assert copy.read() == b"aabb"


def test_a_damaged_part_is_named_with_both_checksums(store):
    part = storage.put_part(store, "part-0", ".bin", b"payload")
    storage.write_bytes(f"{store}/{part['name']}", b"paYload")
    with pytest.raises(storage.StorageError, match=rf"part-0-.*: checksum .* but manifest says {part['sha256'][:8]}"):
        storage.read_part(store, part)


def test_what_is_missing_is_named(store):
    with pytest.raises(storage.StorageError, match=r"nowhere: not found"):
        storage.read_bytes(f"{store}/nowhere")
    with pytest.raises(storage.StorageError, match=r"nowhere: nothing there"):
        storage.list_objects(f"{store}/nowhere")
    with pytest.raises(storage.StorageError, match=r"nowhere: no dataset here"):
        storage.read_manifest(f"{store}/nowhere", "dataset")


def test_a_manifest_of_another_kind_is_refused(store):
    storage.publish(f"{store}/thing", {"kind": "model"})
    with pytest.raises(storage.StorageError, match="holds a model, not a dataset"):
        storage.read_manifest(f"{store}/thing", "dataset")


def test_refused_access_is_an_error_and_never_an_absence(bucket, monkeypatch):
    import s3fs

    storage.write_bytes(f"{bucket}/x", b"1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        for call in (storage.exists, storage.read_bytes, storage.list_objects, storage.is_published):
            with pytest.raises(storage.StorageError, match="access refused") as raised:
                call(f"{bucket}/x")
            assert "not-the-secret" not in str(raised.value)
    finally:
        s3fs.S3FileSystem.clear_instance_cache()


def test_an_unknown_kind_of_address_is_refused():
    with pytest.raises(storage.StorageError, match="ftp://host/x: unknown kind of address"):
        storage.list_objects("ftp://host/x")


# Faults on the way to the store


@pytest.fixture
def faulty(bucket, fault_proxy, monkeypatch):
    """A bucket behind the fault proxy, with an object of 300 kB; waits are short."""
    import s3fs

    storage.write_bytes(f"{bucket}/object", DATA)
    monkeypatch.setenv("AWS_ENDPOINT_URL", fault_proxy.url)
    monkeypatch.setattr(storage, "_FIRST_WAIT_S", 0.01)
    s3fs.S3FileSystem.clear_instance_cache()
    yield bucket
    fault_proxy.rules()
    s3fs.S3FileSystem.clear_instance_cache()


DATA = np.random.default_rng(0).bytes(300_000)
GET, PUT = "GET /test-[^/]+/.+", "PUT /test-[^/]+/.+"
RULES = {
    "503 burst": {"kind": "slowdown"},
    "500": {"kind": "error500"},
    "reset before the body": {"kind": "reset"},
    "reset in the body": {"kind": "reset_body", "after": 70_000},
    "truncated body": {"kind": "truncate", "after": 70_000},
    "corrupted body": {"kind": "corrupt"},
    "latency": {"kind": "latency", "ms": 150},
}


@pytest.mark.parametrize("fault", RULES)
def test_what_is_read_through_faults_is_what_was_written(faulty, fault_proxy, fault):
    rule = {"match": GET, "times": 2, **RULES[fault]}
    fault_proxy.rules(rule)
    assert storage.read_bytes(f"{faulty}/object") == DATA
    fault_proxy.rules(rule)
    ranges = [(at, 1000, zlib.crc32(DATA[at : at + 1000])) for at in (0, 150_000, 299_000)]
    assert storage.read_ranges(f"{faulty}/object", ranges) == [DATA[at : at + n] for at, n, _ in ranges]
    fault_proxy.rules(rule)
    with storage.local_copy(storage.stat(f"{faulty}/object")) as path, open(path, "rb") as copy:
        assert copy.read() == DATA
    assert len(fault_proxy.done()) == (1 if fault == "latency" else 2), "the faults took place"


@pytest.mark.parametrize("kind", ["slowdown", "error500", "reset", "reset_upload", "lost_response"])
def test_what_is_written_through_faults_is_there_once(faulty, fault_proxy, kind):
    fault_proxy.rules({"match": PUT, "times": 2, "kind": kind})
    storage.write_bytes(f"{faulty}/new", DATA)
    assert len(fault_proxy.done()) == 2
    fault_proxy.rules({"match": PUT, "times": 2, "kind": kind})
    assert storage.create_bytes(f"{faulty}/created", DATA) == "created"
    assert storage.create_bytes(f"{faulty}/created", b"other") == "other"
    fault_proxy.rules()
    assert storage.read_bytes(f"{faulty}/new") == storage.read_bytes(f"{faulty}/created") == DATA


@pytest.mark.parametrize("kind", ["slowdown", "reset", "truncate", "corrupt"])
def test_when_retries_are_spent_the_object_is_named(faulty, fault_proxy, kind, monkeypatch):
    monkeypatch.setattr(storage, "_TRIES", 3)
    fault_proxy.rules({"match": GET, "kind": kind})
    with pytest.raises(storage.StorageError, match=f"{faulty}/object: "):
        storage.read_bytes(f"{faulty}/object")
    assert len(fault_proxy.done()) >= 3


def test_an_answer_of_the_store_is_not_asked_for_again(faulty, fault_proxy):
    fault_proxy.rules({"match": ".*", "kind": "latency", "ms": 1})
    with pytest.raises(storage.NotFoundError, match="nowhere: not found"):
        storage.read_bytes(f"{faulty}/nowhere")
    assert len([line for line, _ in fault_proxy.done() if "/nowhere" in line]) <= 1


def test_an_object_that_changed_since_it_was_listed_is_named(store):
    storage.write_bytes(f"{store}/x", b"old")
    (listed,) = storage.list_objects(f"{store}/x")
    storage.write_bytes(f"{store}/x", b"new")
    with pytest.raises(storage.StorageError, match="changed since it was listed"):
        storage.read_bytes(f"{store}/x", listed)
