"""Where a source went: the datasets that hold it, what was trained on these, and what came out of that."""

from dataclasses import dataclass, field

from pipelines.lineage.contents import Contents

# Pictures that these name lie elsewhere, and are not among a dataset's objects themselves.
_TABLES = (".jsonl", ".ndjson", ".csv", ".tsv")
_NAMING = (*_TABLES, ".parquet")


@dataclass
class Spread:
    """What a source has a part in, by URI; of a dataset, in words, which part."""

    datasets: dict[str, str] = field(default_factory=dict)
    runs: list[str] = field(default_factory=list)
    models: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    evaluations: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        """Number of things, so that nothing is false."""
        return sum(map(len, vars(self).values()))


def spread_of(contents: Contents, source: str) -> Spread:
    """Follow a source through a store: through fine-tuned children, and through pictures that were ingested again."""
    spread = Spread()
    while True:
        before = len(spread)
        for uri in contents.datasets:
            if uri not in spread.datasets and (part := _part(contents, uri, source, spread.images)):
                spread.datasets[uri] = part
        _follow(contents, spread)
        if len(spread) == before:
            return spread


def _follow(contents: Contents, spread: Spread) -> None:
    """Add what was made of the datasets and models that are in already."""
    datasets = {uri.rsplit("/", 1)[1] for uri in spread.datasets}
    digests = {contents.digests[uri] for uri in spread.models}
    for uri, manifest in contents.models.items():
        lineage = manifest["lineage"]
        if uri not in spread.models and (lineage.get("dataset_digest") in datasets or lineage.get("parent") in digests):
            spread.models.append(uri)
    for uri, run in contents.runs.items():
        if uri not in spread.runs and (run.told["dataset_digest"] in datasets or run.told["parent"] in digests):
            spread.runs.append(uri)
    for things, found in ((contents.images, spread.images), (contents.evaluations, spread.evaluations)):
        made = (uri for uri, manifest in things.items() if manifest.get("model", {}).get("digest") in digests)
        found += [uri for uri in made if uri not in found]


def _part(contents: Contents, dataset: str, source: str, images: list[str]) -> str:
    """Which part of a dataset comes from a source or from affected image sets, in words; empty where none does.

    A source is an object, or one picture in a shard: `SHARD#NAME`.
    """
    opened = contents.open(dataset)
    objects = {info.uri for info in opened.sources()}
    wholes = {uri for uri in objects if uri == source or any(uri.startswith(f"{folder}/") for folder in images)}
    inside = source not in objects and source.rpartition("#")[0] in objects
    if not (wholes or inside or any(uri.lower().endswith(_NAMING) for uri in objects)):
        return ""
    count = sum(origin == source or _object(origin, objects) in wholes for origin in opened.origins())
    if count:
        return f"{count} of its {opened.manifest['counts']['kept']} pictures"
    if source in wholes and source.lower().endswith(_TABLES):
        return "pictures that it names"
    return "none of its pictures: they were rejected, or duplicates of others" if wholes or inside else ""


def _object(origin: str, objects: set[str]) -> str:
    """The object that a picture was read from; names of pictures and of objects may both have a `#`."""
    while origin not in objects and "#" in origin:
        origin = origin.rpartition("#")[0]
    return origin
