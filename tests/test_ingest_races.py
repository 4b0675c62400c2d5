"""Two ingestions of the same sources into one store at the same time, step by step: without Ray, in one process."""

import builtins
import functools
import os
import random
import shutil
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from support.damage import encoded, noise, tar_bytes

from pipelines import ingest, storage
from pipelines.config import IngestConfig, PipelineError
from pipelines.ingest import duplicates, plan, stage

CALLS = ("open", "stat", "scandir", "mkdir", "replace", "link", "unlink", "rmdir", "remove")
STEPS = [(builtins, "open"), *((os, name) for name in CALLS)]
EVERY, SEEDS = 13, 18


@pytest.fixture
def config(tmp_path):
    """The work: seven pictures of a folder and a tar, of which two are the same, in three shards."""
    (tmp_path / "in").mkdir()
    for number in range(5):
        (tmp_path / "in" / f"{number}.png").write_bytes(encoded(noise(number, (8, 8))))
    members = [(f"{number}.png", encoded(noise(number, (8, 8)))) for number in (4, 5)]
    (tmp_path / "in" / "a.tar").write_bytes(tar_bytes(members))
    return IngestConfig(
        store=str(tmp_path / "store"), source=[str(tmp_path / "in")], resolution=8, name="x", shard_size=2, heldout=0.0
    )


@pytest.fixture
def before_each_step(monkeypatch, config):
    """A list whose last function is called before each call of the system that concerns the store."""
    hooks = []
    for module, name in STEPS:
        monkeypatch.setattr(module, name, heralded(getattr(module, name), hooks, config.store))
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(storage, "_FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(stage, "_on_ray", one_by_one)
    monkeypatch.setattr(plan, "sorted_keys", sorted_here)
    return hooks


def heralded(real, hooks, store):
    @functools.wraps(real)
    def call(path, *args, **kwargs):
        if hooks and ("dir_fd" in kwargs or str(path).startswith(store)):
            hooks[-1]()
        return real(path, *args, **kwargs)

    return call


def one_by_one(call, rows, kwargs, at_once):
    yield from (call(row, **kwargs) for row in rows)


def sorted_here(parts):
    """As Ray Data sorts the keys."""
    batches = [{name: np.array([value]) for name, value in part.to_row().items()} for part in parts]
    table = pa.concat_tables([duplicates._read_keys(batch) for batch in batches])
    yield table.sort_by([("digest", "ascending"), ("old", "descending"), ("source", "ascending")])


def contents(store):
    return {str(path.relative_to(store)): path.read_bytes() for path in Path(store).rglob("*") if path.is_file()}


@pytest.fixture
def alone(config, before_each_step):
    """All files of a store in which one run was alone, and how many steps it took; the store is empty again."""
    steps = []
    before_each_step.append(lambda: steps.append(1))
    assert not ingest.run(config).found
    before_each_step.clear()
    files = contents(config.store)
    assert len([name for name in files if name.endswith("manifest.json")]) == 1
    assert len([name for name in files if "/shards/" in name]) == 3
    assert not [name for name in files if "/staging/" in name]
    shutil.rmtree(config.store)
    return files, len(steps)


def test_a_run_that_another_one_overtakes_at_any_step_ends_with_the_others_dataset(config, before_each_step, alone):
    files, steps = alone
    for overtaken in range(1, steps, EVERY):
        left, ends = iter(range(1, overtaken)), []

        def other(left=left, ends=ends):
            if next(left, None) is None:
                before_each_step.clear()
                ends.append(ingest.run(config))

        before_each_step.append(other)
        ends.insert(0, ingest.run(config))
        assert len({end.uri for end in ends}) == 1, overtaken
        assert sorted(end.found for end in ends) == [False, True], overtaken
        assert contents(config.store) == files, overtaken
        shutil.rmtree(config.store)


def test_two_runs_in_turns_of_any_length_end_with_one_dataset(config, before_each_step, alone):
    files, _ = alone
    for seed in range(SEEDS):
        turns = Turns(seed, share=(0.5, 0.1, 0.02)[seed % 3])
        before_each_step.append(turns.step)
        ends = turns.run(lambda: ingest.run(config))
        before_each_step.clear()
        assert sorted(end.found for end in ends) == [False, True], seed
        assert contents(config.store) == files, seed
        shutil.rmtree(config.store)


class Turns:
    """Two threads of which the first in `alive` goes on; before a step it hands over with a chance of `share`."""

    def __init__(self, seed, share):
        self.random, self.share = random.Random(seed), share
        self.alive, self.ends, self.errors, self.handed = [], [], [], threading.Condition()

    def run(self, call):
        """What both calls return."""
        threads = [threading.Thread(target=self._one, args=(call,), daemon=True) for _ in range(2)]
        self.alive += threads
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for error in self.errors:
            raise error
        return self.ends

    def step(self):
        """Hand over, or not; threads that one of the two has started work in its turn."""
        if threading.current_thread() in self.alive and self.random.random() < self.share:
            with self.handed:
                self.alive.reverse()
                self.handed.notify_all()
                self._wait()

    def _wait(self):
        self.handed.wait_for(lambda: self.alive[0] is threading.current_thread())

    def _one(self, call):
        try:
            with self.handed:
                self._wait()
            self.ends.append(call())
        except Exception as error:  # noqa: BLE001 - raised again in the thread of the test
            self.errors.append(error)
        with self.handed:
            self.alive.remove(threading.current_thread())
            self.handed.notify_all()


def test_a_run_that_allows_less_than_the_one_before_it_rejected_says_so(config, before_each_step, tmp_path):
    (tmp_path / "in" / "bad.png").write_bytes(b"bad")
    strict = config.model_copy(update={"max_rejected": "0"})

    def other():
        before_each_step.clear()
        assert not ingest.run(config).found

    before_each_step.append(other)
    with pytest.raises(PipelineError, match=r"1 of 8 items are rejected.*--max-rejected 0 allows 0; they are listed"):
        ingest.run(strict)
