"""Published models with random weights and evaluations with given figures, as training and evaluation leave them."""

import dataclasses
import os

import torch

from diffusion_core.config import PRESETS, ModelConfig
from diffusion_core.unet import UNet
from pipelines import storage
from pipelines.config import TrainConfig, identity, what
from pipelines.model import Publication, model_digest, publish_model

SETTINGS = {"samples": 64, "extractor": "small"}


def publish(store, number, *, name="tiny", step=3, parent=None, finished=True, dataset="/gone/datasets/tiny/0", age=0):
    """URI of a model whose weights are keyed by `number`, of a run of its own, `age` seconds old."""
    run = f"{store}/models/{name}/{number:016x}"
    unet = dataclasses.replace(PRESETS["tiny"], resolution=8, classes=2)
    torch.manual_seed(number)
    weights = UNet(unet).state_dict()
    settings = what(TrainConfig(dataset=dataset, name=name, steps=step, preset="tiny", seed=number))
    told = {"settings": settings, "dataset": dataset, "dataset_digest": dataset.rsplit("/", 1)[1]}
    told["parent"] = None if parent is None else model_digest(storage.read_manifest(parent, "model"))
    run_json = {"kind": "run", "schema": 1, "code": "0", "algorithm": 3, **told}
    storage.create_bytes(f"{run}/run.json", storage.to_json(run_json))
    uri = f"{run}/published/step-{step:07}"
    lineage = {"kind": "train", "name": name, "step": step, **told}
    curves = {"curve": [[step, 0.9]], "validation": [[step, 0.5 + number / 100, 0.1]]}
    config = ModelConfig(unet, class_names=("cat", "dog"))
    publish_model(uri, Publication(config, {0.1: weights}, lineage, curves, b"no picture"))
    if finished:
        storage.create_bytes(f"{run}/result.json", storage.to_json({"step": step}))
    if age:
        make_older(uri, age)
    return uri


def make_older(uri, seconds):
    """Let a thing on disk seem to have been published so many seconds earlier."""
    then = storage.modified(f"{uri}/manifest.json") - seconds
    os.utime(f"{uri}/manifest.json", (then, then))


def evaluate(store, model, figures, *, name="tiny", settings=SETTINGS, dataset="0"):
    """URI of an evaluation of a model with these figures."""
    digest = model_digest(storage.read_manifest(model, "model"))
    manifest = {
        "kind": "evaluation", "schema": 2, "code": "0", "settings": settings, "figures": figures, "pictures": {},
        "model": {"uri": model, "digest": digest}, "dataset": {"uri": "/gone", "digest": dataset},
    }  # fmt: skip
    uri = f"{store}/evaluations/{name}/{identity('evaluate', 1, manifest, digest)}"
    storage.publish(uri, manifest)
    return uri


def figure(value, half=0.0):
    """A figure with an interval of `half` on each side."""
    return {"value": value, "low": value - half, "high": value + half, "count": 64}
