"""The cleanup command: what may be deleted of a store, why the rest stays, and on demand the deleting."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from pipelines import storage
from pipelines.config import CleanupConfig
from pipelines.lineage.contents import Contents, read_contents, run_of
from pipelines.lineage.references import reasons
from pipelines.progress import aligned, print_line
from pipelines.registry import read_log

_STEP = re.compile(r"step-\d{7}")


class Item(NamedTuple):
    """A folder that may go: what it is, where, how large, and why nobody needs it."""

    kind: str
    uri: str
    bytes: int
    why: str


@dataclass(frozen=True)
class Plan:
    """What may go, and why the other models and evaluations stay, by URI."""

    goes: list[Item]
    stays: dict[str, str]


def run(config: CleanupConfig) -> None:
    """Print what may go and why the rest stays; delete it where that is asked for."""
    contents = read_contents(config.store)
    plan = make_plan(contents, config)
    print_line("\n".join(_told(plan, config)))
    if not config.delete:
        return
    for item in plan.goes:
        _delete(contents, item)


def make_plan(contents: Contents, config: CleanupConfig) -> Plan:
    """What may go: old models that nothing refers to, checkpoints of finished runs, evaluations of models gone.

    Nothing else is ever deleted: no dataset, no pictures, nothing of a run that goes on, nothing unknown.
    """
    stays = dict.fromkeys(_newest(contents, config), "among the newest")
    stays |= {uri: why for uri in contents.models if (why := _untouchable(contents, uri, config))}
    stays |= reasons(contents, stays)
    models = [uri for uri in contents.models if uri not in stays]
    # Checkpoints first: a run whose model goes must not be gone on with from what would be left of it.
    goes = list(_checkpoints(contents, config))
    goes += [_item("model", uri, "old, and nothing refers to it") for uri in models]
    for uri, manifest in contents.evaluations.items():
        why = _evaluation_stays(contents, uri, manifest, set(models), config)
        if why and uri not in stays:
            stays[uri] = why
        if uri not in stays:
            goes.append(_item("evaluation", uri, "its model is gone, or goes"))
    known = {*contents.models, *contents.evaluations}
    return Plan(goes, {uri: why for uri, why in stays.items() if uri in known})


def _newest(contents: Contents, config: CleanupConfig) -> Iterator[str]:
    """The newest models of every name."""
    names = dict.fromkeys(_name(uri) for uri in contents.models)
    for name in names:
        own = [uri for uri in contents.models if _name(uri) == name]
        own.sort(key=lambda uri: (storage.modified(storage.join(uri, storage.MANIFEST)), uri))
        yield from own[len(own) - min(config.keep, len(own)) :]


def _untouchable(contents: Contents, model: str, config: CleanupConfig) -> str | None:
    """Why a model is not looked at; None where it may be."""
    run = contents.runs.get(run_of(model))
    if config.name and _name(model) != config.name:
        return f"not of the name {config.name}"
    if run is None:
        return "of no run that is known"
    return "its run is not finished" if run.step is None else None


def _checkpoints(contents: Contents, config: CleanupConfig) -> Iterator[Item]:
    """Checkpoints of finished runs: longer training is a run of its own, which begins with a published model."""
    for run in contents.runs.values():
        if run.step is not None and config.name in (None, _name(run.uri)):
            base = storage.join(run.uri, "checkpoints")
            for step in filter(_STEP.fullmatch, storage.list_folders(base)):
                yield _item("checkpoint", storage.join(base, step), "its run is finished")


def _evaluation_stays(
    contents: Contents, uri: str, manifest: dict[str, Any], going: set[str], config: CleanupConfig
) -> str | None:
    """Why an evaluation stays; None where its model was one of this store and is gone, or goes."""
    model = manifest.get("model")
    if config.name and _name(uri) != config.name:
        return f"not of the name {config.name}"
    if model is None:
        return "names no model"
    if any(each not in going for each in contents.models_of(model["digest"])):
        return "its model stays"
    return None if model["uri"].startswith(f"{contents.store}/models/") else "its model lies elsewhere"


def _delete(contents: Contents, item: Item) -> None:
    """Delete a folder, unless it is a model that was promoted since the plan was made."""
    if item.kind == "model":
        log, digest = read_log(contents.store, _name(item.uri)), contents.digests[item.uri]
        if log.promotions_of(digest) and not log.is_retired(digest):
            print_line(f"cleanup: {item.uri} stays, it was promoted meanwhile")
            return
        run = contents.runs[run_of(item.uri)]
        if item.uri == f"{run.uri}/published/step-{run.step:07}":
            # Else the same training command would find a finished run without its model.
            storage.remove_object(storage.join(run.uri, "result.json"))
    storage.remove_folder(item.uri)
    print_line(f"cleanup: deleted {item.uri}")


def _told(plan: Plan, config: CleanupConfig) -> Iterator[str]:
    """The plan for people."""
    total = sum(item.bytes for item in plan.goes)
    yield f"{len(plan.goes)} things with {total} bytes {'go' if config.delete else 'would go'} of {config.store}"
    if plan.goes:
        rows = [[item.uri, item.kind, str(item.bytes), item.why] for item in plan.goes]
        yield from aligned([["goes", "", "bytes", "why"], *rows], left=(0, 1, 3))
    if plan.stays:
        yield ""
        yield from aligned([["stays", "why"], *map(list, plan.stays.items())], left=(0, 1))
    if plan.goes and not config.delete:
        yield ""
        yield "nothing was deleted; give --delete for that"


def _item(kind: str, uri: str, why: str) -> Item:
    return Item(kind, uri, sum(info.size for info in storage.list_if_any(uri)), why)


def _name(uri: str) -> str:
    """The name that a model, a run or an evaluation lies under."""
    parts = uri.split("/")
    return parts[-4] if parts[-2] == "published" else parts[-2]
