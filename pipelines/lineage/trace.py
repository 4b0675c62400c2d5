"""The trace command: from a picture back to its source objects, or from a source onwards to what it went into."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipelines import storage
from pipelines.config import (
    GenerateConfig,
    ImportConfig,
    IngestConfig,
    PipelineError,
    SampleOptions,
    TraceConfig,
    TrainConfig,
)
from pipelines.dataset import Dataset, open_dataset
from pipelines.image_sets import FILES, rejected_of, rows_of
from pipelines.images import ImageError, png_texts
from pipelines.lineage.contents import Contents, command, read_contents, run_of, store_of
from pipelines.lineage.remake import Record, remake
from pipelines.lineage.spread import spread_of
from pipelines.progress import print_line
from pipelines.requests import ImageRequest, metadata


@dataclass(frozen=True)
class Traced:
    """What was found at a URI: lines about it, the digest and URI of its model, its pictures, and its dataset."""

    lines: list[str]
    digest: str | None = None
    model: str | None = None
    dataset: str | None = None
    records: tuple[Record, ...] = ()


def run(config: TraceConfig) -> None:
    """Print where a thing came from, or what a source went into, and make pictures again where that is asked for.

    Raises PipelineError where nothing is known of it, or a picture does not come out as it was on such a machine.
    """
    store = config.store or store_of(config.uri)
    if store is None:
        raise PipelineError(f"{config.uri}: lies in no store, so say with --store where to look")
    contents, traced = read_contents(store), _open(config)
    if (config.remake or config.row is not None) and not (traced and traced.records):
        raise PipelineError(f"{config.uri}: no picture or set of pictures of ours, so --row and --remake do not apply")
    if traced is None:
        print_line("\n".join(_onwards(contents, config.uri)))
        return
    model = _model(contents, traced)
    if model and store_of(model) not in (None, contents.store):
        contents = read_contents(str(store_of(model)))
    print_line("\n".join([*traced.lines, *_back(contents, traced, model, config.sources)]))
    if not config.remake:
        return
    if model is None:
        raise PipelineError(f"{config.uri}: its model {(traced.digest or '')[:12]} is not in {store}; give its --store")
    files = {"image": config.image, "mask": config.mask}
    remake(
        model, traced.records, {name: None if uri is None else storage.read_bytes(uri) for name, uri in files.items()}
    )


def _open(config: TraceConfig) -> Traced | None:
    """What lies at the URI, if it is something that this project made."""
    if storage.is_published(config.uri):
        manifest = storage.read_json(storage.join(config.uri, storage.MANIFEST))
        kind = manifest.get("kind")
        if kind == "images":
            return _images(config, manifest)
        if kind == "model":
            return Traced([], model=config.uri)
        if kind == "dataset":
            return Traced([], dataset=config.uri)
        if kind == "evaluation" and "model" in manifest:
            told = f"judged    {config.uri}: {json.dumps(manifest['figures'], sort_keys=True)}"
            return Traced([told], manifest["model"]["digest"], manifest["model"]["uri"])
        raise PipelineError(f"{config.uri}: holds a {kind} that names no model; trace a picture, model or dataset")
    return _png(config.uri) if config.uri.lower().endswith(".png") and storage.exists(config.uri) else None


def _png(uri: str) -> Traced | None:
    """A PNG that says what made it; None for any other."""
    data = storage.read_bytes(uri)
    try:
        texts = png_texts(data)
    except ImageError:
        return None
    if not {"model", "seed", "settings"} <= set(texts):
        return None
    record = Record(uri, data, texts, None, {})
    return Traced([f"picture   {uri}", *_told(record)], texts["model"], records=(record,))


def _images(config: TraceConfig, manifest: dict[str, Any]) -> Traced:
    """An image set, or one row of it."""
    if config.row is not None and config.row >= manifest["rows"]:
        raise PipelineError(f"{config.uri}: no row {config.row}; there are 0 to {manifest['rows'] - 1}")
    records = tuple(_records(config, manifest)) if config.row is not None or config.remake else ()
    if config.row is not None and not records:
        raise PipelineError(f"{config.uri}: row {config.row} was rejected: {_why_rejected(config, manifest)}")
    made = manifest.get("counts", {}).get("made", manifest["rows"])
    lines = [f"images    {config.uri}: {made} pictures, code {manifest['code']}"]
    if config.row is not None:
        lines = [f"picture   row {config.row} of {config.uri}", *_told(records[0])]
    again = {"model": manifest["model"]["uri"], "store": store_of(config.uri), "name": manifest["name"]}
    if manifest.get("table"):
        again["table"] = manifest["table"]["uri"]
        lines.append(f"  table   {manifest['table']['uri']}, SHA-256 {manifest['table']['digest']}")
    lines.append(f"  again   {command('generate', GenerateConfig, manifest['settings'], **again)}")
    if config.row is not None:
        lines.append(f"          python -m pipelines trace {config.uri} --row {config.row} --remake")
    return Traced(lines, manifest["model"]["digest"], manifest["model"]["uri"], records=records)


def _why_rejected(config: TraceConfig, manifest: dict[str, Any]) -> str:
    """Why a row has no picture."""
    part = manifest["parts"][(config.row or 0) // manifest["settings"]["shard_size"]]
    return next((row["error"] for row in rejected_of(config.uri, part) if row["row"] == config.row), "unknown")


def _records(config: TraceConfig, manifest: dict[str, Any]) -> Iterator[Record]:
    """The rows that are asked for, with what their manifest says of the device that made them."""
    size = manifest["settings"]["shard_size"]
    parts = manifest["parts"] if config.row is None else [manifest["parts"][config.row // size]]
    for part in parts:
        for row in rows_of(config.uri, manifest, part):
            if config.row in (None, row["row"]):
                files = {name: row.get(f"{name}_uri") for name in FILES}
                yield Record(f"row {row['row']}", row["image"]["bytes"], _texts(row), part["numerics"], files)


def _texts(row: dict[str, Any]) -> dict[str, str]:
    """What the row's PNG says; sets of schema 1 have no column of it."""
    if "settings" in row:
        return {"model": row["model"], "seed": str(row["seed"]), "settings": row["settings"]}
    columns = ("task", "prompt", "seed", *SampleOptions.model_fields)
    return metadata(ImageRequest(**{name: row[name] for name in columns}), row["model"])


def _told(record: Record) -> list[str]:
    """What is known of one picture's making."""
    lines = [
        f"  request seed {record.texts['seed']}, {record.texts['settings']}",
        f"  bytes   {len(record.data)}, SHA-256 {storage.digest(record.data)}",
    ]
    if record.numerics:
        lines.append(f"  made on {', '.join(f'{name} {value}' for name, value in record.numerics.items())}")
    return lines


def _model(contents: Contents, traced: Traced) -> str | None:
    """The URI of the model: as recorded where it is still there, else by its digest in this store."""
    recorded = traced.model
    if recorded and (recorded in contents.models or storage.is_published(recorded)):
        return recorded
    return next(iter(contents.models_of(traced.digest)), None) if traced.digest else None


def _back(contents: Contents, traced: Traced, model: str | None, sources: int) -> list[str]:
    """Model, run, parents, dataset and source objects, each in a paragraph."""
    if traced.dataset:
        return _dataset(open_dataset(traced.dataset), sources)
    if model not in contents.models:
        return [f"model     {traced.model or traced.digest}: not in {contents.store}; give the --store that holds it"]
    lines: list[str] = []
    datasets: dict[str, Dataset] = {}
    for each in (model, *contents.parents(model)):
        lines += _of_model(contents, each, "model " if each == model else "parent")
        dataset = contents.dataset_of(each)
        if dataset is None and contents.models[each]["lineage"].get("kind") != "import":
            lines.append(f"dataset   {contents.models[each]['lineage'].get('dataset')}: is not there any more")
        elif dataset is not None:
            datasets[dataset.uri] = dataset
    return [*lines, *(line for dataset in datasets.values() for line in _dataset(dataset, sources))]


def _of_model(contents: Contents, uri: str, label: str) -> list[str]:
    """A model and the run that made it."""
    manifest, digest = contents.models[uri], contents.digests[uri]
    lineage = manifest["lineage"]
    live = [f"live as {name}" for name, head in contents.live().items() if head["model"]["digest"] == digest]
    lines = [f"{label}    {uri}", f"  digest  {digest}{''.join(f' ({told})' for told in live)}"]
    if lineage.get("kind") == "import":
        again = {"source": lineage["source"], "store": store_of(uri) or contents.store, "name": lineage["name"]}
        lines.append(f"imported  {lineage['source']}, digest of what was read {lineage['digest']}")
        lines.append(f"  again   {command('import', ImportConfig, lineage['settings'], **again)}")
    else:
        parents = contents.models_of(lineage.get("parent"))
        if lineage.get("parent") and not parents:
            lines.append(f"  parent  {lineage['parent']}: not in {contents.store}")
        again = {"dataset": lineage["dataset"], "store": store_of(uri) or contents.store, "name": lineage["name"]}
        if parents:
            again["parent"] = parents[0]
        lines.append(f"run       {run_of(uri)}: step {lineage['step']}, code {manifest['code']}")
        lines.append(f"  again   {command('train', TrainConfig, lineage['settings'], **again)}")
    return lines


def _dataset(dataset: Dataset, limit: int) -> list[str]:
    """A dataset and the objects that it was read from."""
    manifest, sources = dataset.manifest, dataset.sources()
    again = {"source": manifest["inputs"]["source"], "store": store_of(dataset.uri), "name": manifest["name"]}
    shown = sources[: limit or None]
    left, size, listed = len(sources) - len(shown), manifest["inputs"]["bytes"], manifest["sources"]["sha256"]
    return [
        f"dataset   {dataset.uri}: {manifest['counts']['kept']} pictures, code {manifest['code']}",
        f"  again   {command('ingest', IngestConfig, manifest['settings'], **again)}",
        f"sources   {len(sources)} objects, {size} bytes, list SHA-256 {listed}",
        *(f"  {info.uri}  {info.size} bytes, version {info.version}" for info in shown),
        *([f"  and {left} more; --sources 0 lists all"] if left else []),
    ]


def _onwards(contents: Contents, uri: str) -> list[str]:
    """What a source went into. Raises PipelineError where that is nothing."""
    spread = spread_of(contents, uri)
    if not spread:
        raise PipelineError(
            f"{uri}: no dataset of {contents.store} was read from it, and it is no picture, model or dataset of ours"
        )
    lines = [f"source    {uri}"]
    lines += [f"dataset   {dataset}: {part}" for dataset, part in spread.datasets.items()]
    done = {run_of(model) for model in spread.models}
    lines += [f"run       {run}: no model yet" for run in spread.runs if run not in done]
    live = {head["model"]["digest"]: name for name, head in contents.live().items()}
    for model in spread.models:
        digest = contents.digests[model]
        parents = [parent for parent in contents.parents(model) if parent in spread.models]
        told = [f"child of {parents[0]}"] if parents else []
        told += [f"live as {live[digest]}"] if digest in live else []
        lines.append(f"model     {model}" + (f" ({', '.join(told)})" if told else ""))
    lines += [f"images    {images}: {contents.images[images]['rows']} pictures" for images in spread.images]
    return lines + [f"judged    {evaluation}" for evaluation in spread.evaluations]
