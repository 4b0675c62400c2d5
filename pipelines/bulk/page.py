"""What a person looks at after a job: a contact sheet, what was edited beside what came out, and the page."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from pipelines import storage
from pipelines.bulk.bill import Bill
from pipelines.config import PipelineError
from pipelines.image_sets import Row, rejected_of, rows_of
from pipelines.images import Limits, Pixels, decode, decode_alpha, fit, to_png
from pipelines.progress import duration
from pipelines.report import Showing, bytes_told, data_uri, grid, render

PAGE = "images.html"
_COLUMNS, _PARTS, _ROWS_OF_PART = 12, 12, 8
_PAIRS = 12
_THUMBNAIL = 64
_REJECTED = 20
_LIMITS = Limits(64_000_000)


def write_page(uri: str, manifest: dict[str, Any], bill: Bill) -> None:
    """Write the page with its contact sheet inside: a sheet beside the shards would be read as one of the pictures."""
    rows = list(_shown(uri, manifest))
    sheets: dict[str, tuple[str, int] | None] = {"sheet": None, "edits": None}
    if rows:
        side = _side(rows)
        sheets["sheet"] = data_uri(_contact(rows, side)), min(_COLUMNS, len(rows))
        found = (pair for row in rows if (pair := _pair(row, side)) is not None)
        if pairs := list(itertools.islice(found, _PAIRS)):
            before, after = zip(*pairs, strict=True)
            sheets["edits"] = data_uri(_grid([*before, *after], len(pairs))), len(pairs)
    storage.write_bytes(storage.join(uri, PAGE), _page(uri, manifest, bill, sheets).encode())


def show(uri: str) -> Showing:
    """What of a job is worth a look: its accounts and cost, and a contact sheet."""
    manifest, bill = storage.read_manifest(uri, "images"), storage.read_json(storage.join(uri, "bill.json"))
    figures = {name: f"{number:,}" for name, number in manifest["counts"].items()}
    figures |= {"denoiser calls": f"{bill['calls']:,}", "device seconds": f"{bill['seconds']:,.1f}"}
    figures |= {"stored": bytes_told(bill["bytes"])}
    if bill["cost"] is not None:
        figures["cost"] = f"{bill['cost']:.2f}"
    rows = list(_shown(uri, manifest))
    pictures = {"pictures": _contact(rows, _side(rows))} if rows else {}
    return Showing(figures, pictures, storage.join(uri, PAGE))


def _side(rows: list[Row]) -> int:
    return min(_THUMBNAIL, max(decode(rows[0]["image"]["bytes"], _LIMITS).image.size))


def _contact(rows: list[Row], side: int) -> bytes:
    """The contact sheet of some rows as a PNG."""
    return _grid([_small(row["image"]["bytes"], side) for row in rows], min(_COLUMNS, len(rows)))


def _grid(pictures: list[Pixels], columns: int) -> bytes:
    return to_png(grid(np.stack(pictures), columns))


def _shown(uri: str, manifest: dict[str, Any]) -> Iterator[Row]:
    """Some rows from parts that are spread evenly over the job."""
    parts = [part for part in manifest["parts"] if part["rows"]]
    for at in sorted({round(place) for place in np.linspace(0, len(parts) - 1, _PARTS)} if parts else ()):
        rows = list(rows_of(uri, manifest, parts[at]))
        yield from rows[: _ROWS_OF_PART if len(parts) > 1 else _PARTS * _ROWS_OF_PART]


def _pair(row: Row, side: int) -> tuple[Pixels, Pixels] | None:
    """What was edited and what came out; None where the row has no file that still lies there."""
    if row["image_uri"] is None:
        return None
    try:
        data = storage.read_bytes(row["image_uri"])
        mask = None if row["mask_uri"] is None else storage.read_bytes(row["mask_uri"])
        before = _small(data, side)
        return _masked(before, mask, side), _small(row["image"]["bytes"], side)
    except PipelineError:
        return None


def _masked(before: Pixels, mask: bytes | None, side: int) -> Pixels:
    """The picture with what the mask repaints in grey; without a mask file the picture's own transparency is white."""
    if mask is None:
        return before
    decode(mask, _LIMITS)
    alpha = decode_alpha(mask)
    rows, columns = (np.arange(side) * size // side for size in alpha.shape)
    keep = alpha[rows[:, None], columns][..., None] / 255.0
    return np.asarray(np.rint(before * keep + 160 * (1 - keep)), dtype=np.uint8)


def _small(data: bytes, side: int) -> Pixels:
    return fit(decode(data, _LIMITS).image, side, "pad")


def _page(uri: str, manifest: dict[str, Any], bill: Bill, sheets: dict[str, tuple[str, int] | None]) -> str:
    """The page; of each sheet the address that holds it and its columns."""
    rejected: list[Row] = []
    for part in manifest["parts"]:
        rejected += rejected_of(uri, part)[: _REJECTED - len(rejected)] if len(rejected) < _REJECTED else []
    filters = {"count": lambda number: f"{number:,}", "duration": duration, "size": bytes_told}
    return render(
        "pipelines.bulk", "images.html.j2", filters, **manifest, uri=uri, digest=uri.rsplit("/", 1)[1],
        **sheets, rejected=rejected, bill=bill.as_json(), stored=sum(part["bytes"] for part in manifest["parts"]),
        numerics=manifest["parts"][0]["numerics"],
    )  # fmt: skip
