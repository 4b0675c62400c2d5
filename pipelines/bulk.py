"""The generate stage: a table of requests becomes image shards, each a pure function of the model and its rows."""

import io
import json
from collections import deque
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import __version__, storage
from pipelines.config import GenerateConfig, Outcome, PipelineError, SampleOptions, identity, narrow, what
from pipelines.images import Pixels, to_png
from pipelines.model import load_config, load_model, model_digest
from pipelines.progress import Progress
from pipelines.requests import ImageRequest, metadata
from pipelines.worker import Worker, load_worker, picture_seed, pool_of

VERSION = 3
_IN_FLIGHT = 2
Numerics = dict[str, str | int]


def find(config: GenerateConfig) -> Outcome | None:
    """The images of these settings and this model, if they are published."""
    uri = _uri(config)
    return Outcome(uri=uri, found=True) if storage.is_published(uri) else None


def run(config: GenerateConfig) -> Outcome:
    """Generate all shards that are not there yet and publish them. Raises PipelineError on an unknown class."""
    uri = _uri(config)
    shards = range(-(-config.count // config.shard_size))
    done = {number: part for number in shards if (part := _committed(uri, number)) is not None}
    missing = [number for number in shards if number not in done]
    requests_of(config, 0)
    progress = Progress("generate", config.count, "pictures", done=sum(part["rows"] for part in done.values()))
    paint = _through_service if config.via == "serve" else _through_actors
    for number, part in paint(config, uri, missing):
        done[number] = part
        progress.update(sum(part["rows"] for part in done.values()))
    return _publish(config, uri, [done[number] for number in shards])


def requests_of(config: GenerateConfig, shard: int) -> list[ImageRequest]:
    """The rows of one shard: classes in turn, a seed of its own for every picture."""
    classes = _classes(config)
    options = narrow(config, SampleOptions).model_dump()
    rows = range(shard * config.shard_size, min((shard + 1) * config.shard_size, config.count))
    return [
        ImageRequest(prompt=classes[row % len(classes)], seed=picture_seed(config.seed, row), **options) for row in rows
    ]


def commit_shard(
    config: GenerateConfig, uri: str, shard: int, pictures: list[Pixels], numerics: Numerics
) -> dict[str, Any]:
    """Write one shard; the same pictures on the same kind of device give the same bytes.

    `numerics` is the profile within which they repeat. Returns the shard's entry for the manifest.
    """
    requests, first = requests_of(config, shard), shard * config.shard_size
    model = model_digest(storage.read_manifest(storage.normalise(config.model), "model"))
    pngs = [to_png(picture, metadata(asked, model)) for asked, picture in zip(requests, pictures, strict=True)]
    columns: dict[str, list[Any]] = {
        "row": list(range(first, first + len(requests))),
        "image": [{"bytes": png, "path": f"{first + at:09}.png"} for at, png in enumerate(pngs)],
        "model": [model] * len(requests),
    }
    for name in ("task", "prompt", "seed", *SampleOptions.model_fields):
        columns[name] = [getattr(request, name) for request in requests]
    buffer = io.BytesIO()
    table = pa.table(columns).replace_schema_metadata({"numerics": json.dumps(numerics, sort_keys=True)})
    pq.write_table(table, buffer, compression="none")
    part = storage.put_part(uri, _stem(shard), ".parquet", buffer.getvalue())
    return {**part, "rows": len(requests), "numerics": numerics}


class ShardPainter:
    """A worker of the stage's own: makes and commits whole shards on its device."""

    def __init__(self, config: GenerateConfig, uri: str) -> None:
        self.config, self.uri = config, uri
        self.worker: Worker = load_worker(config.model, lanes=config.lanes)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Row with the number of a `shard` -> that number and the shard's entry for the manifest."""
        pictures = self.worker.paint(requests_of(self.config, row["shard"]))
        return {
            "shard": row["shard"],
            **commit_shard(self.config, self.uri, row["shard"], pictures, self.worker.profile),
        }


def _uri(config: GenerateConfig) -> str:
    """Where the images of these settings and this model lie."""
    model = model_digest(storage.read_manifest(storage.normalise(config.model), "model"))
    return storage.join(
        storage.normalise(config.store), "images", config.name, identity("generate", VERSION, what(config), model)
    )


def _classes(config: GenerateConfig) -> list[str]:
    """The classes asked for; one empty name for a model without classes. Raises PipelineError on an unknown one."""
    known = load_config(config.model).class_names
    if config.classes == "all":
        return list(known) or [""]
    wanted = [name.strip() for name in config.classes.split(",")]
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise PipelineError(f"classes: no class {unknown[0]!r}; there are {', '.join(known) or 'none'}")
    return wanted


def _stem(shard: int) -> str:
    return f"part-{shard:05}"


def _committed(uri: str, shard: int) -> dict[str, Any] | None:
    """The entry of a shard that an earlier run wrote."""
    found = storage.find_part(uri, _stem(shard), ".parquet")
    if found is None:
        return None
    part, data = found
    file = pq.ParquetFile(io.BytesIO(data))
    return {**part, "rows": file.metadata.num_rows, "numerics": json.loads(file.schema_arrow.metadata[b"numerics"])}


def _through_actors(config: GenerateConfig, uri: str, missing: list[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Shards made by a Ray Data pool of workers, one per device."""
    import ray.data

    if not missing:
        return
    load_model(config.model)  # a damaged model is an error here, in one line, and not of an actor that starts again
    ray.data.DataContext.get_current().enable_progress_bars = False
    shards = ray.data.from_items([{"shard": number} for number in missing], override_num_blocks=len(missing))
    painted = shards.map(ShardPainter, fn_constructor_args=(config, uri), **pool_of(config.workers, len(missing)))
    for row in painted.iter_rows():
        yield int(row.pop("shard")), row


def _through_service(config: GenerateConfig, uri: str, missing: list[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Shards made by the running service, a few in flight at once, and committed here."""
    from ray import serve

    service = serve.get_app_handle(config.app)
    numerics = service.describe_model.remote(config.model).result()["numerics"]
    flying: deque[tuple[int, Any]] = deque()
    todo = deque(missing)
    while todo or flying:
        while todo and len(flying) < _IN_FLIGHT:
            number = todo.popleft()
            flying.append((number, service.paint_rows.remote(requests_of(config, number), config.model)))
        number, answer = flying.popleft()
        pictures = answer.result()
        failed = next((each for each in pictures if isinstance(each, str)), None)
        if failed is not None:
            raise PipelineError(f"{_stem(number)}: {failed}")
        yield number, commit_shard(config, uri, number, pictures, numerics)


def _publish(config: GenerateConfig, uri: str, parts: list[dict[str, Any]]) -> Outcome:
    """The manifest, written last."""
    model = storage.read_manifest(storage.normalise(config.model), "model")
    manifest = {
        "kind": "images", "schema": 1, "name": config.name, "code": __version__, "settings": what(config),
        "rows": config.count, "parts": parts, "model": {"uri": config.model, "digest": model_digest(model)},
    }  # fmt: skip
    storage.publish(uri, manifest)
    print(f"generate: {config.count} pictures in {len(parts)} shards at {uri}", flush=True)
    return Outcome(uri=uri, found=False)
