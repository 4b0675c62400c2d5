"""The evaluate stage: makes pictures with a model, measures what came out, and shows it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from pipelines import __version__, storage
from pipelines.config import EvaluateConfig, Outcome, PipelineError, identity, narrow, what
from pipelines.dataset import Dataset, Rows, open_dataset
from pipelines.evaluate.editing import editing_figures, editing_grids
from pipelines.evaluate.heldout import HELDOUT, heldout_figures
from pipelines.evaluate.orders import edits_of, orders_of
from pipelines.evaluate.page import PAGE, write_page
from pipelines.evaluate.painting import paint
from pipelines.evaluate.quality import (
    Reference,
    cheapest,
    copies_of,
    figures_of,
    judge_bulk,
    reference_of,
    steps_curve,
)
from pipelines.features.extractors import Extractor, Judge, digest_of, open_extractor, own_judge
from pipelines.images import Pixels, to_png
from pipelines.model import Model, load_model, model_digest
from pipelines.report import by_class, grid
from pipelines.storage import to_json

VERSION = 3
_SHOWN = 64


def find(config: EvaluateConfig) -> Outcome | None:
    """The evaluation of this model with these settings, with the page that was asked for, if it is there."""
    uri = _uri(config)
    page = storage.join(uri, _page_name(config))
    return Outcome(uri=uri, found=True) if storage.is_published(uri) and storage.exists(page) else None


def run(config: EvaluateConfig) -> Outcome:
    """Make the pictures that are not there yet, measure them, and publish figures, grids and a page."""
    uri = _uri(config)
    if not storage.is_published(uri):
        _evaluate(config, uri)
    other = None
    if config.against:
        other = _uri(_against(config))
        if not storage.is_published(other):
            _evaluate(_against(config), other)
    page = write_page(uri, other, _page_name(config))
    print(f"evaluate: look at it: {page}", flush=True)
    return Outcome(uri=uri, found=False)


def _evaluate(config: EvaluateConfig, uri: str) -> None:
    """Measure, and publish the figures."""
    dataset, model = open_dataset(config.dataset), load_model(config.model)
    _check(config, dataset, model)
    edits = edits_of(config, dataset)
    classes = dataset.class_names if model.config.class_names else ()
    pictures, parts = paint(config, uri, orders_of(config, classes, edits))
    judge = own_judge(config.store, config.name, dataset, config.feature_steps, config.seed)
    extractor = open_extractor(config.features, judge.extractor, config.trust)
    reference = reference_of(dataset, extractor)
    figures, pairs = _figures(config, classes, judge, extractor, reference, pictures)
    figures |= editing_figures(config, edits, pictures)
    if dataset.rows("heldout"):
        heldout = _labelled_as(model, dataset.class_names, dataset.read("heldout", HELDOUT))
        figures |= heldout_figures(config, _on_device(model).denoiser, heldout)
    columns = max(len(dataset.class_names), 8)
    grids = {
        "samples": grid(pictures["samples"][:_SHOWN], columns),
        "training": grid(by_class(reference.rows, min(_SHOWN, config.samples)), columns),
        "closest pairs": grid(pairs, len(pairs) // 2),
        **editing_grids(edits, pictures),
    }
    _publish(config, uri, {"figures": figures, "features": extractor.lineage}, grids, parts)


def _figures(
    config: EvaluateConfig,
    classes: Sequence[str],
    judge: Judge,
    extractor: Extractor,
    reference: Reference,
    pictures: dict[str, Pixels],
) -> tuple[dict[str, Any], Pixels]:
    """Figures of generated pictures; and the samples that come closest to training pictures, over those."""
    figures = figures_of(config, classes, judge, extractor, reference, pictures["samples"])
    copies = copies_of(reference, pictures["samples"])
    curve = steps_curve(config, extractor, reference, pictures)
    figures |= {**copies.figures, "steps": curve, "cheapest": cheapest(curve)}
    if config.images and classes and judge.classifier is not None:
        figures["bulk"] = judge_bulk(config.images, classes, judge.classifier)
    return figures, copies.pairs


def _publish(
    config: EvaluateConfig, uri: str, measured: dict[str, Any], grids: dict[str, Pixels], parts: list[dict[str, Any]]
) -> None:
    """The grids, figures.json, and the manifest, written last."""
    shown = {name: storage.put_part(uri, name.replace(" ", "-"), ".png", to_png(own)) for name, own in grids.items()}
    dataset = open_dataset(config.dataset)
    manifest = {
        "kind": "evaluation", "schema": 2, "code": __version__, "settings": what(config),
        "model": {"uri": storage.normalise(config.model), "digest": _model_digest(config.model)},
        "dataset": {"uri": dataset.uri, "digest": dataset.digest, "classes": list(dataset.class_names)},
        **measured, "pictures": shown, "parts": parts,
    }  # fmt: skip
    storage.write_bytes(storage.join(uri, "figures.json"), to_json(measured))
    storage.publish(uri, manifest)


def _uri(config: EvaluateConfig) -> str:
    """Where the evaluation of this model on this dataset lies."""
    inputs = [
        open_dataset(config.dataset).digest,
        _model_digest(config.model),
        (config.images or "").split("/")[-1],
        digest_of(config.features),
    ]
    digest = identity("evaluate", VERSION, what(config), inputs)
    return storage.join(storage.normalise(config.store), "evaluations", config.name, digest)


def _against(config: EvaluateConfig) -> EvaluateConfig:
    """The same evaluation of the model to compare with, which no service at hand has and which made no bulk images."""
    return narrow(config, EvaluateConfig, model=config.against, against=None, images=None, url=None)


def _page_name(config: EvaluateConfig) -> str:
    return f"against-{_model_digest(config.against)[:16]}.html" if config.against else PAGE


def _model_digest(uri: str) -> str:
    return model_digest(storage.read_manifest(storage.normalise(uri), "model"))


def _check(config: EvaluateConfig, dataset: Dataset, model: Model) -> None:
    """Refuse a model and a dataset that do not belong together, before anything is made."""
    size, known = model.config.unet.resolution, set(model.config.class_names)
    unknown = set(dataset.class_names) - known if known else set()
    if size != dataset.resolution:
        raise PipelineError(
            f"evaluate: the model makes {size}x{size}, the dataset holds {dataset.resolution}x{dataset.resolution} "
            f"pictures; ingest them with --resolution {size}"
        )
    if unknown:
        raise PipelineError(
            f"evaluate: the dataset has classes that the model does not know: {', '.join(sorted(unknown))}; ingest it "
            f"with --labels ignored, or train on it"
        )


def _labelled_as(model: Model, classes: Sequence[str], rows: Rows) -> Rows:
    """Rows with the model's own labels in place of the dataset's."""
    known = model.config.class_names
    own = np.array([known.index(name) for name in classes] if known else [-1] * len(classes), dtype=np.int64)
    return Rows(rows.pixels, np.append(own, -1)[rows.labels], rows.ids)


def _on_device(model: Model) -> Model:
    """The model on a GPU where there is one."""
    if torch.cuda.is_available():
        model.denoiser.network.to("cuda")
    return model
