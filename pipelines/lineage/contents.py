"""Everything that a store holds, by its manifests, and how one thing leads to another."""

import json
import re
import shlex
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pydantic import ValidationError

from pipelines import storage
from pipelines.config import PipelineError, Settings, to_flags
from pipelines.dataset import Dataset, open_dataset
from pipelines.model import model_digest
from pipelines.registry import Entry, read_log

Manifest = dict[str, Any]
_AT_A_TIME = 16
_IN_STORE = re.compile(
    r"(?P<store>.+?)/(datasets|models|images|evaluations)/[A-Za-z0-9][A-Za-z0-9._-]*/[0-9a-f]{16}(/|$)"
)


@dataclass(frozen=True)
class Run:
    """A training run: what it is to make, and the step of its model once it is finished."""

    uri: str
    told: Manifest
    step: int | None


@dataclass(frozen=True)
class Contents:
    """The finished things of a store by URI, its training runs, and its promotions by name."""

    store: str
    datasets: dict[str, Manifest]
    runs: dict[str, Run]
    models: dict[str, Manifest]
    images: dict[str, Manifest]
    evaluations: dict[str, Manifest]
    promotions: dict[str, tuple[Entry, ...]]

    @cached_property
    def digests(self) -> dict[str, str]:
        """Digest of every model by its URI."""
        return {uri: model_digest(manifest) for uri, manifest in self.models.items()}

    def models_of(self, digest: str | None) -> list[str]:
        """URIs of the models with a digest: none where they are gone or lie elsewhere."""
        return [uri for uri, own in self.digests.items() if own == digest]

    def parents(self, model: str) -> list[str]:
        """URIs of the models whose weights a model began with, its parent first."""
        found: list[str] = []
        ahead = [model]
        while ahead:
            lineage = self.models[ahead.pop()]["lineage"]
            fresh = [uri for uri in self.models_of(lineage.get("parent")) if uri not in found]
            found += fresh
            ahead += fresh
        return found

    def dataset_of(self, model: str) -> Dataset | None:
        """The dataset that a model was trained on, wherever it lies; None where it is gone."""
        lineage = self.models[model]["lineage"]
        recorded, digest = lineage.get("dataset"), lineage.get("dataset_digest")
        if recorded and recorded not in self.datasets and storage.is_published(recorded):
            return open_dataset(recorded)
        own = [uri for uri in self.datasets if uri == recorded or uri.rsplit("/", 1)[1] == digest]
        return self.open(own[0]) if own else None

    def open(self, dataset: str) -> Dataset:
        """A dataset of the store, without reading its manifest once more."""
        return Dataset(dataset, self.datasets[dataset])

    def live(self) -> dict[str, Entry]:
        """The entry that says what is live, by name, where anything is."""
        heads = {name: entries[-1] for name, entries in self.promotions.items() if entries}
        return {name: head for name, head in heads.items() if head["model"]}


def store_of(uri: str) -> str | None:
    """The store that a result lies in; None where its URI is not that of a result."""
    match = _IN_STORE.match(uri)
    return match["store"] if match else None


def run_of(model: str) -> str:
    """URI of the run that published a model."""
    return model.rsplit("/published/", 1)[0]


def read_contents(store: str) -> Contents:
    """Read what a store holds. Raises StorageError where there is none of it, or it cannot be read."""
    store = storage.normalise(store)
    runs = list(_folders(store, "models"))
    published = [
        storage.join(run, "published", step)
        for run in runs
        for step in storage.list_folders(storage.join(run, "published"))
    ]
    names = storage.list_folders(storage.join(store, "models"))
    contents = Contents(
        store,
        _manifests(_folders(store, "datasets"), "dataset"),
        {run.uri: run for run in _mapped(_run, runs) if run},
        _manifests(published, "model"),
        _manifests(_folders(store, "images"), "images"),
        _manifests(_folders(store, "evaluations"), "evaluation"),
        {name: read_log(store, name).entries for name in names},
    )
    if not (contents.datasets or contents.runs or contents.models or contents.images):
        raise PipelineError(f"{store}: holds no dataset, run, model or images; give the right --store")
    return contents


def command(
    stage: str, kind: type[Settings], settings: Manifest, names: dict[str, str] | None = None, **more: Any
) -> str:
    """The command line that makes a thing again, without defaults; `names` stand in for the URIs that are keys.

    The settings as JSON where they are those of another version, that this one takes no more.
    """
    try:
        config = kind.model_validate({**settings, **more})
    except ValidationError:
        return f"(by another version's {stage}) {json.dumps({**settings, **more}, sort_keys=True)}"
    words = [_renamed(word, names or {}) for word in to_flags(config, changed=True)]
    return shlex.join(["python", "-m", "pipelines", stage, *words])


def _renamed(word: str, names: dict[str, str]) -> str:
    """A URI, or one below it, by the name that stands for it; of several the nearest."""
    inside = max((uri for uri in names if f"{word}/".startswith(f"{uri}/")), key=len, default=None)
    return word if inside is None else names[inside] + word.removeprefix(inside)


def _folders(store: str, kind: str) -> Iterator[str]:
    """Folders of a kind of result under all names."""
    base = storage.join(store, kind)
    for name in storage.list_folders(base):
        yield from (storage.join(base, name, folder) for folder in storage.list_folders(storage.join(base, name)))


def _manifests(folders: Iterable[str], kind: str) -> dict[str, Manifest]:
    """Manifests of the folders that are finished and hold this kind, by URI."""
    found = {}
    listed = list(folders)
    for uri, manifest in zip(listed, _mapped(_manifest, listed), strict=True):
        if manifest is not None and manifest.get("kind") == kind:
            found[uri] = manifest
    return found


def _manifest(folder: str) -> Manifest | None:
    return _json(storage.join(folder, storage.MANIFEST))


def _run(uri: str) -> Run | None:
    """A run, or None where the folder is none."""
    told, result = _json(storage.join(uri, "run.json")), _json(storage.join(uri, "result.json"))
    return Run(uri, told, int(result["step"]) if result else None) if told else None


def _json(uri: str) -> Manifest | None:
    """A JSON object of the store, or None where there is none."""
    try:
        found: Manifest = storage.read_json(uri)
    except storage.NotFoundError:
        return None
    return found


def _mapped(call: Any, values: list[str]) -> list[Any]:
    """`call` of every value, several at a time: in a bucket each is mostly waited for."""
    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        return list(pool.map(call, values))
