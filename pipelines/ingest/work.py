"""What a run is to make: the listing of its sources, and the earlier dataset that it builds on."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipelines import storage
from pipelines.config import IngestConfig, identity, what
from pipelines.dataset import Dataset
from pipelines.ingest.sources import Fingerprint, Listing, list_sources
from pipelines.ingest.units import to_parquet

VERSION = 4
_SOURCES = pa.schema([("uri", pa.string()), ("size", pa.int64()), ("version", pa.string()), ("class", pa.string())])


@dataclass(frozen=True)
class Work:
    """What a run is to make: a dataset of a listing, built on an earlier one or from nothing."""

    config: IngestConfig
    listing: Listing
    parent: Dataset | None
    new: Listing
    uri: str

    @property
    def before(self) -> dict[str, Any]:
        """The manifest of the earlier dataset; empty where there is none."""
        return self.parent.manifest if self.parent else {}

    @property
    def staging(self) -> str:
        """Where the work lies until it is published."""
        return storage.join(self.uri, "staging")


def plan_work(config: IngestConfig) -> Work:
    """What is to be made, and on which earlier dataset it can build: the one that has most of the sources.

    One that has all of them, because another run has just published it, is what was to be made.
    """
    listing = list_sources(config)
    here = {listing.fingerprint(info) for info in listing.taken}
    parent, known = None, set[Fingerprint]()
    for dataset in earlier(config) if config.extend else ():
        if dataset.manifest["sources"]["rows"] <= len(known) or dataset.manifest["reasons"].get("rare_class"):
            continue  # a class that was too rare may not be so any more: all of it has to be read again
        has = {tuple(row.values()) for row in dataset.sources_table().to_pylist()}
        if has <= here:
            parent, known = dataset, has
    new = listing.without(known)
    if parent and not new.taken:
        return Work(config, listing, None, new, parent.uri)
    made = [list(new.fingerprint(info)) for info in new.taken]
    digest = identity("ingest", VERSION, what(config), [parent.digest if parent else "", made])
    uri = storage.join(storage.normalise(config.store), "datasets", config.name, digest)
    return Work(config, listing, parent, new, uri)


def earlier(config: IngestConfig) -> Iterator[Dataset]:
    """Finished datasets of the same name and settings: from scratch first, then by digest; extended ones if wanted."""
    base = storage.join(storage.normalise(config.store), "datasets", config.name)
    found = []
    for name in storage.list_folders(base):
        uri = storage.join(base, name)
        if storage.is_published(uri):
            manifest = storage.read_manifest(uri, "dataset")
            if manifest.get("version") == VERSION and manifest["settings"] == what(config):
                found.append(Dataset(uri, manifest))
    for dataset in sorted(found, key=lambda dataset: (dataset.manifest["parent"] or "", dataset.digest)):
        if config.extend or not dataset.manifest["parent"]:
            yield dataset


def sources_table(listing: Listing) -> bytes:
    """The listing as a part of the dataset, the same bytes for the same objects."""
    columns = zip(*map(listing.fingerprint, listing.taken), strict=True)
    return to_parquet(pa.table([pa.array(column) for column in columns], schema=_SOURCES), compression="zstd")


def listing_digest(listing: Listing) -> str:
    """Digest of the objects of a listing."""
    return storage.digest(sources_table(listing))
