"""What people look at: grids of pictures, plots, and the report page with everything in it."""

import base64
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2
import markupsafe
import numpy as np
from PIL import Image

from pipelines import storage
from pipelines.dataset import Rows
from pipelines.images import Pixels
from pipelines.model import read_file
from pipelines.progress import duration

_GAP = 2
_WORTH_IT = 2


@dataclass(frozen=True)
class Showing:
    """What of a stage's result is worth a look: figures in words, pictures as PNGs, the address of its page."""

    figures: dict[str, str]
    pictures: dict[str, bytes]
    page: str | None = None


def grid(pictures: Pixels, columns: int) -> Pixels:
    """Pictures [N, H, W, 3] in rows of `columns`, on white with a small gap: uint8 [H', W', 3]."""
    count, height, width, _ = pictures.shape
    rows = -(-count // columns)
    sheet = np.full((rows * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP, 3), 255, dtype=np.uint8)
    for index, picture in enumerate(pictures):
        top, left = (index // columns) * (height + _GAP), (index % columns) * (width + _GAP)
        sheet[top : top + height, left : left + width] = picture
    return sheet


def loss_curve(curve: list[list[float]], validation: Sequence[list[float]] = (), kind: str = "svg") -> bytes:
    """The training loss by step, and the held-out loss where there is one, as a drawing ("svg" or "png")."""
    figure, axes = plot(2.8, xlabel="step", ylabel="loss", yscale="log")
    steps, losses = zip(*curve, strict=True) if curve else ((), ())
    axes.plot(steps, losses, color="#b9c6e4", linewidth=1, label="training, mean of 10 steps")
    axes.plot(steps, _smooth(np.array(losses)), color="#2f5cc9", linewidth=2, label="smoothed")
    if validation:
        axes.plot([row[0] for row in validation], [row[1] for row in validation], color="#d1495b", marker="o",
                  markersize=3, linewidth=1.5, label="held out, averaged weights")  # fmt: skip
    axes.legend(frameon=False)
    return drawn(figure, kind)


def plot(height: float, **labels: str) -> tuple[Any, Any]:
    """A matplotlib figure of `height` inches with plain axes; `labels` are matplotlib's, as xlabel and xscale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, height), layout="constrained")
    axes = figure.subplots()
    axes.set(**labels)
    axes.grid(color="#8884", linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def drawn(figure: Any, kind: str = "svg") -> bytes:
    """A matplotlib figure as a file ("svg" or "png"), the same bytes for the same drawing."""
    buffer = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else {"Software": None}
    figure.savefig(buffer, format=kind, transparent=kind == "svg", metadata=metadata, dpi=150)
    return buffer.getvalue()


def collect(
    uris: dict[str, str], seconds: dict[str, float], promotion: dict[str, Any], settings: dict[str, Any]
) -> dict[str, Any]:
    """All figures of a pipeline's run, from the manifests that its stages left. `uris` names each stage's result."""
    dataset = storage.read_manifest(uris["ingest"], "dataset")
    model = storage.read_manifest(uris["train"], "model")
    evaluation = storage.read_manifest(uris["evaluate"], "evaluation")
    images = storage.read_manifest(uris["generate"], "images")
    return {
        "name": dataset["name"], "uris": uris, "seconds": seconds, "promotion": promotion, "settings": settings,
        "dataset": {key: dataset[key] for key in ("counts", "reasons", "classes", "resolution", "mean", "sigma_data")},
        "rows": {split: sum(shard["rows"] for shard in shards) for split, shards in dataset["shards"].items()},
        "training": {"settings": model["lineage"]["settings"], "curves": json.loads(
            read_file(uris["train"], model, "curve.json"))},
        "figures": evaluation["figures"], "bulk": {"rows": images["counts"]["made"], "shards": len(images["parts"])},
    }  # fmt: skip


def write_report(store: str, report: dict[str, Any]) -> str:
    """Write report.html (one file, no outside links) and report.json into the store; returns the page's URI."""
    evaluation = storage.read_manifest(report["uris"]["evaluate"], "evaluation")
    pictures = {
        name: data_uri(storage.read_part(report["uris"]["evaluate"], part))
        for name, part in evaluation["pictures"].items()
    }
    filters = {"duration": duration, "percent": lambda share: f"{100 * share:.1f} %"}
    curve = inline(loss_curve(**report["training"]["curves"]))
    page = render("pipelines", "report.html.j2", filters, **report, pictures=pictures, curve=curve)
    storage.write_bytes(storage.join(store, "report.json"), storage.to_json(report))
    storage.write_bytes(storage.join(store, "report.html"), page.encode())
    return storage.join(store, "report.html")


def by_class(rows: Rows, count: int) -> Pixels:
    """The first `count` pictures with the classes in turn."""
    rank = np.zeros(len(rows.labels), dtype=np.int64)
    for label in np.unique(rows.labels):
        members = np.flatnonzero(rows.labels == label)
        rank[members] = np.arange(len(members))
    return rows.pixels[np.lexsort((rows.labels, rank))][:count]


def render(package: str, template: str, filters: dict[str, Callable[[Any], str]], **values: Any) -> str:
    """A page by a template of a package; a value that the template misses is an error (jinja2.UndefinedError)."""
    text = resources.files(package).joinpath(template).read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters |= filters
    return environment.from_string(text).render(**values)


def inline(svg: bytes) -> markupsafe.Markup:
    """An SVG drawing as part of a page."""
    text = svg.decode()
    return markupsafe.Markup(text[text.index("<svg") :])


def data_uri(png: bytes) -> str:
    """A picture as an address that holds it."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def enlarged(png: bytes, width: int) -> bytes:
    """A picture with every pixel made a square of several, so that it is about `width` wide; a larger one as it is."""
    with Image.open(io.BytesIO(png)) as picture:
        times = width // picture.width
        if times < _WORTH_IT:
            return png
        large = picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    large.save(buffer, "png")
    return buffer.getvalue()


def bytes_told(size: float) -> str:
    """Bytes in the unit that reads best."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def _smooth(values: np.ndarray[Any, np.dtype[np.float64]], keep: float = 0.8) -> list[float]:
    """Exponential mean, without its bias towards the first value."""
    out, total, weight = list[float](), 0.0, 0.0
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        out.append(total / weight)
    return out
