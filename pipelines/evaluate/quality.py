"""How good generated pictures are: distances to the training pictures, classes, copies, and what steps buy."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines import storage
from pipelines.config import EvaluateConfig
from pipelines.dataset import Dataset, Rows
from pipelines.evaluate.orders import curve_name, in_turn
from pipelines.features import distances
from pipelines.features.distances import Features, Figure
from pipelines.features.extractors import Extractor, Judge
from pipelines.features.learned import Classifier, predict
from pipelines.image_sets import rows_of
from pipelines.images import Pixels, from_png

# Of the dataset, to measure distances to.
_REFERENCE = 10_000
# A picture is called a copy where its nearest training picture is so much nearer than the second (Yoon et al. 2023).
_COPY = 1 / 3
_PAIRS = 8


class Reference(NamedTuple):
    """Training and held-out pictures with their features; the latter None where nothing is held out."""

    rows: Rows
    features: Features
    heldout: Rows | None
    heldout_features: Features | None


def reference_of(dataset: Dataset, extractor: Extractor) -> Reference:
    """The first 10,000 pictures of each split, and their features."""
    rows = dataset.read("train", _REFERENCE)
    heldout = dataset.read("heldout", _REFERENCE) if dataset.rows("heldout") else None
    return Reference(
        rows, extractor.embed(rows.pixels), heldout, None if heldout is None else extractor.embed(heldout.pixels)
    )


def between(real: Features, made: Features, config: EvaluateConfig) -> dict[str, Any]:
    """Every distance between two sets, with intervals."""
    rng = np.random.default_rng(config.seed)
    lie = distances.manifolds(real, made)
    return {
        "frechet": distances.frechet_figure(real, made, config.bootstrap, rng),
        "kernel": distances.kernel_figure(real, made, config.bootstrap, rng),
        "precision": distances.share(lie.precision),
        "recall": distances.share(lie.recall),
        "density": distances.mean(lie.density, config.bootstrap, rng),
        "coverage": distances.share(lie.coverage),
    }


def figures_of(
    config: EvaluateConfig,
    classes: Sequence[str],
    judge: Judge,
    extractor: Extractor,
    reference: Reference,
    samples: Pixels,
) -> dict[str, Any]:
    """Figures of the samples over all `classes` that were asked for, and by class."""
    features = extractor.embed(samples)
    figures = between(reference.features, features, config)
    if reference.heldout_features is not None:
        figures["heldout_pictures"] = between(reference.features, reference.heldout_features, config)
    if judge.classifier is None:
        return figures
    if reference.heldout is not None:
        right = predict(judge.classifier, reference.heldout.pixels) == reference.heldout.labels
        figures["classifier"] = distances.share(right[reference.heldout.labels >= 0])
    if classes:
        labels = np.array([classes.index(name) for name in in_turn(classes, len(samples))])
        named = predict(judge.classifier, samples) == labels
        figures["class_accuracy"] = distances.share(named)
        figures["per_class"] = {
            name: _of_class(config, reference, features, labels, label, named) for label, name in enumerate(classes)
        }
    return figures


def _of_class(
    config: EvaluateConfig,
    reference: Reference,
    features: Features,
    labels: NDArray[np.int64],
    label: int,
    named: NDArray[np.bool_],
) -> dict[str, Any]:
    """The figures of one class against its own training pictures; only its count where there are too few."""
    own, real = labels == label, reference.rows.labels == label
    figures: dict[str, Any] = {"count": int(own.sum()), "training_pictures": int(real.sum())}
    if min(figures.values()) > 1:
        figures |= between(reference.features[real], features[own], config)
    return {**figures, "class_accuracy": distances.share(named[own])}


def steps_curve(
    config: EvaluateConfig, extractor: Extractor, reference: Reference, pictures: dict[str, Pixels]
) -> list[dict[str, Any]]:
    """Fréchet distance by sampler and denoiser calls, always of equally many pictures from the same seeds."""
    return [
        {"sampler": sampler, "steps": steps, "frechet": distances.frechet_figure(
            reference.features, extractor.embed(pictures[curve_name(sampler, steps)]), config.bootstrap,
            np.random.default_rng(config.seed))}
        for sampler in config.curve_samplers for steps in config.curve_steps if config.curve_samples
    ]  # fmt: skip


def cheapest(curve: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The fewest steps that are as good as any, within the interval of the best."""
    if not curve:
        return None
    best: Figure = min((point["frechet"] for point in curve), key=lambda figure: figure["value"])
    good = [point for point in curve if point["frechet"]["value"] <= best["high"]]
    chosen = min(good, key=lambda point: (point["steps"], point["frechet"]["value"]))
    return {"sampler": chosen["sampler"], "steps": chosen["steps"]}


def judge_bulk(uri: str, classes: Sequence[str], classifier: Classifier) -> Figure:
    """How many pictures of a bulk job are recognised as the class that was asked for, of those that ask for one."""
    manifest = storage.read_manifest(uri, "images")
    hits = [np.empty(0, dtype=np.bool_)]
    for part in manifest["parts"]:
        rows = [row for row in rows_of(uri, manifest, part) if row["prompt"] in classes]
        if rows:
            pixels = np.stack([from_png(row["image"]["bytes"]) for row in rows])
            hits.append(predict(classifier, pixels) == [classes.index(row["prompt"]) for row in rows])
    return distances.share(np.concatenate(hits))


class Copies(NamedTuple):
    """Figures of how near samples come to training pictures; the closest pairs, samples over their nearest."""

    figures: dict[str, Any]
    pairs: Pixels


def copies_of(reference: Reference, samples: Pixels) -> Copies:
    """Whether the model has learned pictures by heart, by distances between pixels."""
    train, made = (_flat(pixels) for pixels in (reference.rows.pixels, samples))
    apart, which = distances.nearest(made, train, 2)
    ratio = apart[:, 0] / np.maximum(apart[:, 1], 1e-12)
    figures: dict[str, Any] = {"memorisation": distances.share(ratio < _COPY)}
    if reference.heldout is not None:
        theirs, _ = distances.nearest(_flat(reference.heldout.pixels), train, 1)
        figures["data_copying"] = distances.data_copying(apart[:, 0], theirs[:, 0])
    closest = np.argsort(ratio, kind="stable")[:_PAIRS]
    figures["closest_pairs"] = [
        {"sample": int(at), "training_row": int(reference.rows.ids[which[at, 0]]), "ratio": float(ratio[at])}
        for at in closest
    ]
    return Copies(figures, np.concatenate((samples[closest], reference.rows.pixels[which[closest, 0]])))


def _flat(pixels: Pixels) -> NDArray[np.float64]:
    """Pictures as rows of values in [0, 1]."""
    return pixels.reshape(len(pixels), -1) / 255.0
