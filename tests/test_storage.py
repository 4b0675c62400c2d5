import threading

import pytest

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
