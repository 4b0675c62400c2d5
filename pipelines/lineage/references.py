"""What must stay, because something that counts leads back to it."""

from collections.abc import Iterable, Iterator

from pipelines.lineage.contents import Contents, read_contents
from pipelines.registry import Entry


def referenced(store: str) -> set[str]:
    """URIs and digests of all that is live, was promoted, made pictures, or is where any of these came from."""
    contents = read_contents(store)
    uris = set(reasons(contents))
    return uris | {contents.digests[uri] for uri in uris if uri in contents.digests}


def reasons(contents: Contents, kept: Iterable[str] = ()) -> dict[str, str]:
    """Why each thing stays, by URI; `kept` are models that stay for a reason of their own.

    Models that were promoted stay, for a roll-back may go to them, unless they are retired.
    """
    why: dict[str, str] = {}
    for uri, reason in (*_by_promotions(contents), *_by_images(contents), *_by_runs(contents)):
        why.setdefault(uri, reason)
    for model in [uri for uri in (*why, *kept) if uri in contents.models]:
        for uri, reason in _behind(contents, model):
            why.setdefault(uri, reason)
    return why


def _by_promotions(contents: Contents) -> Iterator[tuple[str, str]]:
    """What is live, first; then what a roll-back may go to; and the evaluations that they were judged by."""
    for name, head in contents.live().items():
        yield from _of_entry(contents, head, f"live as {name}")
    for name, entries in contents.promotions.items():
        for entry in reversed(entries):
            if entry["model"] and entry["model"]["digest"] not in entries[-1]["retired"]:
                yield from _of_entry(contents, entry, f"promotion {entry['number']} of {name}")


def _of_entry(contents: Contents, entry: Entry, reason: str) -> Iterator[tuple[str, str]]:
    model, evaluation = entry["model"], entry["evaluation"]
    yield from ((uri, reason) for uri in dict.fromkeys([model["uri"], *contents.models_of(model["digest"])]))
    if evaluation:
        yield evaluation["uri"], f"{reason} was judged by it"


def _by_images(contents: Contents) -> Iterator[tuple[str, str]]:
    """The models that image sets were made with."""
    for images, manifest in contents.images.items():
        for uri in contents.models_of(manifest["model"]["digest"]):
            yield uri, f"made the pictures of {images}"


def _by_runs(contents: Contents) -> Iterator[tuple[str, str]]:
    """The models that unfinished runs began with: they read them again when they go on."""
    for run in contents.runs.values():
        for uri in contents.models_of(run.told.get("parent")) if run.step is None else ():
            yield uri, f"parent of the unfinished run {run.uri}"


def _behind(contents: Contents, model: str) -> Iterator[tuple[str, str]]:
    """What a model came from: its parents, their datasets, and the datasets that these build on."""
    for each in (model, *contents.parents(model)):
        if each != model:
            yield each, f"parent of {model}"
        dataset = contents.dataset_of(each)
        if dataset:
            beside = dataset.uri.rsplit("/", 1)[0]
            shards = [shard for parts in dataset.manifest["shards"].values() for shard in parts]
            # Those of an extended dataset lie in the folders of the ones that it builds on.
            earlier = {f"{beside}/{shard['folder']}" for shard in shards if "folder" in shard}
            yield from ((uri, f"{each} was trained on it") for uri in (dataset.uri, *sorted(earlier)))
