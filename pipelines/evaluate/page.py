"""The page of an evaluation: every figure with its interval, curves and pictures; one model, or two side by side."""

import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from pipelines import storage
from pipelines.report import Showing, data_uri, drawn, inline, plot, render

Better = Literal["less", "more", ""]
PAGE = "evaluation.html"
_SHOWN = ("training", "samples", "inpainted-box")
_HEIGHT = 3.2  # of plots, inches
# Path of a figure, what it is called, and which way is better.
_ROWS: tuple[tuple[str, str, Better], ...] = (
    ("frechet", "Fréchet distance", "less"),
    ("kernel", "kernel distance", "less"),
    ("precision", "precision: share of samples among the training pictures", "more"),
    ("recall", "recall: share of training pictures among the samples", "more"),
    ("density", "density: how thickly training pictures lie around samples", "more"),
    ("coverage", "coverage: share of training pictures with a sample near", "more"),
    ("class_accuracy", "recognised as the class that was asked for", "more"),
    ("bulk", "the same, of the pictures generated in bulk", "more"),
    ("memorisation", "share that copies a training picture", "less"),
    ("data_copying", "nearness to training pictures against held-out ones (far below 0: copying)", ""),
    ("heldout_loss", "loss on held-out pictures", "less"),
    ("bits_per_dimension", "bits per dimension", "less"),
)


class Row(NamedTuple):
    """A line of the table: texts for each model, which of the two is surely better (0, 1), or None."""

    title: str
    texts: list[str]
    best: int | None


def write_page(uri: str, other: str | None, name: str) -> str:
    """Write the page into the folder of an evaluation, beside `other` where given; returns its address."""
    uris = [uri, *([other] if other else [])]
    evaluations = [storage.read_manifest(each, "evaluation") for each in uris]
    pictures = [
        {shown: data_uri(storage.read_part(each, part)) for shown, part in evaluation["pictures"].items()}
        for each, evaluation in zip(uris, evaluations, strict=True)
    ]
    page = render(
        "pipelines.evaluate",
        "evaluation.html.j2",
        {"figure": figure_text},
        evaluations=evaluations,
        pictures=pictures,
        rows=list(_rows(evaluations)),
        classes=_classes(evaluations),
        is_fid=evaluations[0]["features"]["kind"] == "inception",
        steps=[inline(drawn(_steps_plot(each))) for each in evaluations if each["figures"]["steps"]],
        levels=inline(drawn(_levels_plot(evaluations))) if "heldout_loss_by_level" in evaluations[0]["figures"] else "",
        denoising=inline(drawn(_denoising_plot(evaluations[0]))),
    )
    address = storage.join(uri, name)
    storage.write_bytes(address, page.encode())
    return address


def show(uri: str) -> Showing:
    """What of an evaluation is worth a look: its figures with their intervals, and its pictures."""
    evaluation = storage.read_manifest(uri, "evaluation")
    figures = {row.title: row.texts[0] for row in _rows([evaluation])}
    pictures = {name: storage.read_part(uri, evaluation["pictures"][name]) for name in _SHOWN}
    return Showing(figures, pictures, storage.join(uri, PAGE))


def figure_text(figure: Any) -> str:
    """A figure with its interval, in as many digits as it has."""
    if not isinstance(figure, dict):
        return f"{figure:.3g}"
    if math.isnan(figure["value"]):
        return "none"
    digits = max(0, 2 - math.floor(math.log10(max(abs(figure["high"] - figure["low"]), 1e-9))))
    low, value, high = (f"{figure[key]:.{min(digits, 6)}f}" for key in ("low", "value", "high"))
    return f"{value} ({low} to {high})"


def _rows(evaluations: list[dict[str, Any]]) -> Iterator[Row]:
    """The figures that any of the evaluations has."""
    for path, title, better in _ROWS:
        found = [evaluation["figures"].get(path) for evaluation in evaluations]
        if any(figure is not None for figure in found):
            texts = ["" if figure is None else figure_text(figure) for figure in found]
            yield Row(title, texts, _surely_better(found, better))


def _surely_better(found: list[Any], better: Better) -> int | None:
    """Which of two figures is better by more than both intervals."""
    if len(found) < 2 or not better or not all(isinstance(figure, dict) for figure in found):
        return None
    one, two = found
    for first, second, index in ((one, two, 0), (two, one, 1)):
        if (first["high"] < second["low"]) if better == "less" else (first["low"] > second["high"]):
            return index
    return None


def _classes(evaluations: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Figures by class, of every evaluation."""
    first = evaluations[0]["figures"].get("per_class", {})
    return [(name, [each["figures"].get("per_class", {}).get(name, {}) for each in evaluations]) for name in first]


def _bars(axes: Any, places: list[float], figures: list[dict[str, float]], label: str, style: str = "-") -> None:
    """A line through figures with their intervals."""
    values = [figure["value"] for figure in figures]
    below = [max(0.0, figure["value"] - figure["low"]) for figure in figures]
    above = [max(0.0, figure["high"] - figure["value"]) for figure in figures]
    axes.errorbar(places, values, yerr=(below, above), label=label, marker="o", markersize=3, capsize=2,
                  linewidth=1.5, linestyle=style)  # fmt: skip


def _steps_plot(evaluation: dict[str, Any]) -> Any:
    """Fréchet distance by denoiser calls, a line a sampler."""
    figure, axes = plot(_HEIGHT, xlabel="denoiser calls for a picture", ylabel="Fréchet distance")
    points = evaluation["figures"]["steps"]
    for sampler in dict.fromkeys(point["sampler"] for point in points):
        own = [point for point in points if point["sampler"] == sampler]
        _bars(axes, [point["steps"] for point in own], [point["frechet"] for point in own], sampler)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return figure


def _levels_plot(evaluations: list[dict[str, Any]]) -> Any:
    """Held-out loss by noise level, a line a model."""
    figure, axes = plot(_HEIGHT, xlabel="sigma", ylabel="loss on held-out pictures", xscale="log")
    for number, evaluation in enumerate(evaluations):
        levels = evaluation["figures"]["heldout_loss_by_level"]
        label = ("this model", "the other")[number]
        _bars(axes, [float(level) for level in levels], list(levels.values()), label, ("-", "--")[number])
    if len(evaluations) > 1:
        axes.legend(frameon=False)
    return figure


def _denoising_plot(evaluation: dict[str, Any]) -> Any:
    """Signal-to-noise ratio by noise level, a line a method."""
    figure, axes = plot(_HEIGHT, xlabel="sigma of the noise, for values in [-1, 1]", ylabel="PSNR, dB", xscale="log")
    levels = evaluation["figures"]["denoising"]
    for method in next(iter(levels.values())):
        own = [each[method] for each in levels.values()]
        _bars(axes, [float(level) for level in levels], own, method, "-" if method == "model" else "--")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.set_xticks([float(level) for level in levels])
    axes.legend(frameon=False)
    return figure
