import io
import json
import re

import numpy as np
import pytest
import torch

from pipelines import evaluate, storage
from pipelines.config import EvaluateConfig, PipelineError
from pipelines.dataset import open_dataset
from pipelines.evaluate.editing import classical, psnr
from pipelines.evaluate.heldout import heldout_figures
from pipelines.evaluate.orders import edits_of, masks, orders_of
from pipelines.evaluate.page import figure_text
from pipelines.evaluate.quality import cheapest, copies_of, reference_of
from pipelines.features.extractors import Extractor
from pipelines.images import from_png
from pipelines.model import load_model
from pipelines.worker import load_worker

pytestmark = pytest.mark.usefixtures("ray_session", "one_thread")
SMALL = {
    "name": "tiny", "samples": 24, "steps": 2, "edits": 3, "noise_levels": [0.2, 0.5], "feature_steps": 40,
    "curve_samples": 8, "curve_samplers": ["ddim", "angular_3"], "curve_steps": [1, 3], "likelihood": 4,
    "likelihood_steps": 2, "bootstrap": 20,
}  # fmt: skip
FLAT = Extractor("flat", "own", "0" * 64, torch.nn.Flatten())


def config(store, dataset, model, **settings):
    return EvaluateConfig(store=str(store), dataset=dataset, model=model, **{**SMALL, **settings})


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluated")


@pytest.fixture(scope="module")
def evaluated(place, tiny_dataset, tiny_model, ray_session):
    """URI of an evaluation of the tiny model."""
    return evaluate.run(config(place, tiny_dataset, tiny_model)).uri


@pytest.fixture(scope="module")
def figures(evaluated):
    return storage.read_manifest(evaluated, "evaluation")["figures"]


def test_every_figure_is_there_with_its_interval_and_count(figures):
    for name in ("frechet", "kernel", "precision", "recall", "density", "coverage", "class_accuracy", "memorisation",
                 "heldout_loss", "bits_per_dimension", "classifier"):  # fmt: skip
        figure = figures[name]
        assert figure["low"] <= figure["value"] <= figure["high"], name
        assert figure["count"] > 0
    assert figures["frechet"]["count"] == 24
    assert figures["recall"]["count"] == figures["coverage"]["count"] > 24
    assert set(figures["inpainting"]) == {"box", "half", "strokes", "lines"}
    assert {each["known_bytes_changed"] for each in figures["inpainting"].values()} == {0}
    assert set(figures["denoising"]["0.5"]) == {"noisy", "model", "non-local means", "total variation"}
    assert [(point["sampler"], point["steps"]) for point in figures["steps"]] == [
        ("ddim", 1), ("ddim", 3), ("angular_3", 1), ("angular_3", 3)]  # fmt: skip
    assert sum(each["count"] for each in figures["per_class"].values()) == 24


def test_held_out_pictures_come_nearer_than_the_samples_of_a_model_that_has_learned_nothing(figures):
    assert figures["heldout_pictures"]["frechet"]["high"] < figures["frechet"]["low"]


def test_the_samples_are_those_of_the_model_and_their_requests(evaluated, place, tiny_dataset, tiny_model):
    settings, dataset = config(place, tiny_dataset, tiny_model), open_dataset(tiny_dataset)
    orders = orders_of(settings, dataset.class_names, edits_of(settings, dataset))
    kept = {part["name"].rsplit("-", 2)[0]: part for part in storage.read_manifest(evaluated, "evaluation")["parts"]}
    assert set(kept) == set(orders)
    worker = load_worker(tiny_model)
    for name in ("samples", "angular_3-in-3", "inpainted-strokes", "denoised-0.5"):
        pictures = np.load(io.BytesIO(storage.read_part(evaluated, kept[name])))
        assert np.array_equal(pictures[:3], np.stack(worker.paint(orders[name][:3])))


def test_it_is_found_again_and_goes_on_where_it_was_cut_off(tmp_path, tiny_dataset, tiny_model, evaluated):
    settings = config(tmp_path, tiny_dataset, tiny_model, curve_samples=0, likelihood=0, workers=2)
    uri = evaluate.run(settings).uri
    assert evaluate.find(settings).uri == uri
    manifest = (tmp_path / uri / "manifest.json").read_bytes()
    parts = {part["name"] for part in json.loads(manifest)["parts"]}
    lost, *others = sorted(parts)
    before = {name: storage.stat(f"{uri}/{name}").version for name in others}
    for name in (lost, "manifest.json"):
        (tmp_path / uri / name).unlink()
    assert evaluate.find(settings) is None
    assert evaluate.run(settings.model_copy(update={"workers": 1})).uri == uri
    assert (tmp_path / uri / "manifest.json").read_bytes() == manifest
    assert {name: storage.stat(f"{uri}/{name}").version for name in others} == before


def test_another_seed_is_another_evaluation_and_another_address_is_not(place, tiny_dataset, tiny_model, evaluated):
    settings = config(place, tiny_dataset, tiny_model)
    assert evaluate.find(settings.model_copy(update={"workers": 2, "url": "http://127.0.0.1:1"})).uri == evaluated
    assert evaluate.find(settings.model_copy(update={"seed": 3})) is None
    assert evaluate.find(settings.model_copy(update={"noise_levels": [0.2]})) is None


def test_the_page_shows_two_models_side_by_side_and_asks_nothing_of_the_network(
    place, tiny_dataset, tiny_model, evaluated
):
    settings = config(place, tiny_dataset, tiny_model, against=tiny_model)
    assert evaluate.find(settings) is None
    assert evaluate.run(settings).uri == evaluated
    assert evaluate.find(settings) is not None
    (page,) = [info.uri for info in storage.list_objects(f"{evaluated}/against-*.html")]
    alone, pair = (storage.read_bytes(uri).decode() for uri in (f"{evaluated}/evaluation.html", page))
    for text in (alone, pair):
        assert text.count("data:image/png;base64,") >= 9
        assert not re.search(r'(src|href)="http', text)
        assert "Fréchet distance" in text
    assert "FID" not in alone
    assert pair.count("the other") >= 3
    assert 'class="best"' not in pair, "no model is better than itself"


def test_a_dataset_that_does_not_fit_is_refused_before_anything_is_made(tmp_path, tiny_model, tiny_dataset):
    dataset = open_dataset(tiny_dataset)
    other = {**dataset.manifest, "classes": {**dataset.manifest["classes"], "dragon": 1}}
    storage.publish(str(tmp_path / "dragons"), other)
    with pytest.raises(PipelineError, match="classes that the model does not know: dragon; ingest it with --labels"):
        evaluate.run(config(tmp_path, str(tmp_path / "dragons"), tiny_model))
    storage.publish(str(tmp_path / "large"), {**dataset.manifest, "resolution": 16})
    with pytest.raises(PipelineError, match="makes 8x8, the dataset holds 16x16 pictures; ingest them with --resol"):
        evaluate.run(config(tmp_path, str(tmp_path / "large"), tiny_model))


def test_copies_are_found_and_their_pairs_shown(tiny_dataset):
    reference = reference_of(open_dataset(tiny_dataset), FLAT)
    noise = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    copied = reference.rows.pixels[[5, 9]]
    found = copies_of(reference, np.concatenate((noise, copied)))
    assert found.figures["memorisation"]["value"] == 2 / 8
    assert {pair["training_row"] for pair in found.figures["closest_pairs"][:2]} == {5, 9}
    assert np.array_equal(found.pairs[:2], found.pairs[8:10])
    assert copies_of(reference, noise).figures["memorisation"]["value"] == 0


def test_the_cheapest_are_the_fewest_steps_within_the_interval_of_the_best():
    def point(sampler, steps, value):
        return {"sampler": sampler, "steps": steps, "frechet": {"value": value, "low": value - 1, "high": value + 1}}

    curve = [point("a", 5, 9.0), point("a", 10, 4.5), point("b", 10, 4.8), point("b", 30, 4.0)]
    assert cheapest(curve) == {"sampler": "a", "steps": 10}
    assert cheapest([]) is None


def test_masks_cover_what_they_say():
    found = masks(16)
    assert {name: int(mask.sum()) for name, mask in found.items() if name != "strokes"} == {
        "box": 8 * 8, "half": 16 * 8, "lines": 16 * 8}  # fmt: skip
    assert found["strokes"][5:8].all()
    assert 0.3 < found["strokes"].mean() < 0.7


def test_classical_denoisers_help_and_psnr_is_that_of_a_known_error():
    smooth = np.tile(np.linspace(40, 220, 16).astype(np.uint8)[None, :, None], (2, 16, 1, 3)).reshape(2, 16, 16, 3)
    noisy = np.clip(smooth + np.random.default_rng(0).normal(0, 25.5, smooth.shape), 0, 255).astype(np.uint8)
    for cleaned in classical(smooth, noisy, 0.2).values():
        assert psnr(cleaned, smooth).mean() > psnr(noisy, smooth).mean() + 3
    a = np.zeros((2, 4, 4, 3), dtype=np.uint8)
    assert psnr(a, a + 16) == pytest.approx([20 * np.log10(255 / 16)] * 2)


def test_the_held_out_loss_is_the_mean_over_levels_and_the_same_for_any_batch(tiny_model, tiny_dataset, tmp_path):
    denoiser = load_model(tiny_model).denoiser
    rows = open_dataset(tiny_dataset).read("heldout")
    settings = config(tmp_path, tiny_dataset, tiny_model, likelihood=0)
    found = heldout_figures(settings, denoiser, rows)
    levels = [each["value"] for each in found["heldout_loss_by_level"].values()]
    assert found["heldout_loss"]["value"] == pytest.approx(np.mean(levels))
    few = heldout_figures(settings, denoiser, rows.cut(0, 5))
    assert few["heldout_loss"]["count"] == 5
    assert "bits_per_dimension" not in found


@pytest.mark.parametrize(
    ("figure", "text"),
    [
        ({"value": 12.3456, "low": 11.0, "high": 14.0}, "12.35 (11.00 to 14.00)"),
        ({"value": 0.12345, "low": 0.1, "high": 0.13}, "0.1235 (0.1000 to 0.1300)"),
        ({"value": 400.0, "low": 300.0, "high": 500.0}, "400 (300 to 500)"),
        ({"value": float("nan"), "low": 0.0, "high": 1.0}, "none"),
        (0.51234, "0.512"),
    ],
)
def test_figures_have_as_many_digits_as_their_interval_allows(figure, text):
    assert figure_text(figure) == text


def test_grids_are_pictures(evaluated):
    manifest = storage.read_manifest(evaluated, "evaluation")
    assert set(manifest["pictures"]) >= {"samples", "training", "closest pairs", "inpainted-box", "denoised-0.2"}
    for part in manifest["pictures"].values():
        assert from_png(storage.read_part(evaluated, part)).ndim == 3
