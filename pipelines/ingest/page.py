"""What a person looks at before training: a contact sheet per class, and the page dataset.html."""

import io
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipelines import storage
from pipelines.dataset import Dataset
from pipelines.images import from_png, stored, to_png
from pipelines.ingest.plan import shown_of
from pipelines.ingest.shards import pictures
from pipelines.ingest.units import to_parquet
from pipelines.report import Showing, bytes_told, data_uri, grid, render

_THUMBNAIL = 64
_COLUMNS = 12
_SHEETS = 100
_SHOWN = 4
PAGE = "dataset.html"
_REASONS = {
    "undecodable": "the bytes are no picture, are damaged or cut short",
    "too_small": "a side is shorter than --min-side",
    "too_large": "more pixels than --max-pixels, or over 256 MB of bytes",
    "unsupported": "a format, colour mode or address that is not taken",
    "missing_label": "no class, and --labels required",
    "missing_object": "a table names an object that is not there",
    "bad_row": "a table's row or a sample's JSON cannot be read",
    "no_picture": "a sample without a picture",
    "second_picture": "a sample has one picture; this is a further one",
    "truncated_shard": "the shard breaks off",
    "damaged_shard": "this part of a Parquet file cannot be read",
    "rare_class": "its class has fewer pictures than --min-per-class",
}
_THUMBNAILS = pa.schema([("class", pa.string()), ("digest", pa.string()), ("png", pa.binary())])


def add_pages(
    manifest: dict[str, Any], uri: str, staging: str, shown: dict[str, list[dict[str, Any]]], parent: Dataset | None
) -> dict[str, Any]:
    """Write contact sheets and page; the manifest with them."""
    thumbnails = _thumbnails(manifest, staging, shown, parent)
    part = storage.put_part(uri, "contact/thumbnails", ".parquet", to_parquet(thumbnails, compression="none"))
    largest = sorted(manifest["classes"], key=lambda name: (-manifest["classes"][name], name))[:_SHEETS]
    sheets = {}
    for number, name in enumerate([*largest, ""]):
        pngs = thumbnails.filter(pa.array([row == name for row in thumbnails["class"].to_pylist()], pa.bool_()))["png"]
        if len(pngs):
            picture = to_png(grid(np.stack([from_png(png) for png in pngs.to_pylist()]), _COLUMNS))
            sheets[name] = (storage.put_part(uri, f"contact/class-{number:03}", ".png", picture), picture)
    manifest = {**manifest, "thumbnails": part, "contact": {name: sheet for name, (sheet, _) in sheets.items()}}
    html = _page(manifest, uri, {name: png for name, (_, png) in sheets.items()})
    storage.write_bytes(storage.join(uri, PAGE), html.encode())
    return manifest


def show(uri: str) -> Showing:
    """What of a dataset is worth a look: its accounts, and contact sheets of its largest classes."""
    manifest = storage.read_manifest(uri, "dataset")
    counts = {name: f"{number:,}" for name, number in manifest["counts"].items()}
    side = f"{manifest['resolution']} x {manifest['resolution']}"
    figures = {**counts, "classes": str(len(manifest["classes"])), "pixels": side}
    shown = list(manifest["contact"].items())[:_SHOWN]
    pictures = {name or "without a class": storage.read_part(uri, part) for name, part in shown}
    return Showing(figures, pictures, storage.join(uri, PAGE))


def _thumbnails(
    manifest: dict[str, Any], staging: str, shown: dict[str, list[dict[str, Any]]], parent: Dataset | None
) -> pa.Table:
    """Small copies of the pictures with the smallest digests of every class: a fair sample that adding keeps fair."""
    rows = [row for name in sorted(shown) for row in shown[name]]
    images = pictures(staging, pa.Table.from_pylist(rows)) if rows else []
    made = [
        {"class": row["class"], "digest": row["digest"], "png": _small(data, manifest)}
        for row, data in zip(rows, images, strict=True)
    ]
    if parent:
        data = storage.read_part(parent.uri, parent.manifest["thumbnails"])
        made += pq.read_table(io.BytesIO(data)).to_pylist()
    kept: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(made, key=lambda row: (row["class"], row["digest"])):
        if len(kept.setdefault(row["class"], [])) < shown_of(row["class"], len(manifest["classes"])):
            kept[row["class"]].append(row)
    return pa.Table.from_pylist([row for name in sorted(kept) for row in kept[name]], schema=_THUMBNAILS)


def _small(data: bytes, manifest: dict[str, Any]) -> bytes:
    pixels = stored(data, manifest["encoding"], manifest["resolution"])
    if len(pixels) > _THUMBNAIL:
        small = Image.fromarray(pixels).resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.LANCZOS)
        pixels = np.asarray(small, dtype=np.uint8)
    return to_png(pixels)


def _page(manifest: dict[str, Any], uri: str, sheets: dict[str, bytes]) -> str:
    filters = {"size": bytes_told, "count": lambda number: f"{number:,}"}
    rows = {split: sum(shard["rows"] for shard in shards) for split, shards in manifest["shards"].items()}
    data = {name: data_uri(png) for name, png in sheets.items()}
    stored_bytes = sum(shard["bytes"] for shards in manifest["shards"].values() for shard in shards)
    return render(
        "pipelines", "dataset.html.j2", filters, **manifest, uri=uri, rows=rows,
        sheets=data, explained=_REASONS, stored_bytes=stored_bytes,
        digest=uri.rsplit("/", 1)[1], largest=max(manifest["classes"].values(), default=1),
    )  # fmt: skip
