import json
import shutil

import pytest
import safetensors.torch
import torch
from conftest import TINY

from diffusion_core.config import ModelConfig
from diffusion_core.denoiser import Denoiser
from diffusion_core.unet import UNet
from pipelines import checkpoint, storage, train
from pipelines.config import PipelineError, TrainConfig
from pipelines.model import load_model, newest_model

CPU = torch.device("cpu")


def config(store, dataset, **settings):
    return TrainConfig(store=str(store), dataset=dataset, **{**TINY, "steps": 12, "checkpoint_every": 5, **settings})


def weights(uri):
    return load_model(uri).denoiser.network.state_dict()


def test_a_run_stopped_and_continued_ends_with_the_same_bits(tmp_path, tiny_dataset, monkeypatch):
    quiet = config(tmp_path / "quiet", tiny_dataset)
    train.train_on_rank(quiet, 0, 1, CPU, emit=lambda _: None)
    stopped = config(tmp_path / "stopped", tiny_dataset)
    real_step, calls = train.train_step, []

    def dies_at_the_eighth(*arguments):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return real_step(*arguments)

    monkeypatch.setattr(train, "train_step", dies_at_the_eighth)
    with pytest.raises(KeyboardInterrupt):
        train.train_on_rank(stopped, 0, 1, CPU, emit=lambda _: None)
    assert train.find(stopped) is None
    train.train_on_rank(stopped, 0, 1, CPU, emit=lambda _: None)
    assert len(calls) == 8 + (12 - 5), "training goes on at the checkpoint of step 5"
    first, second = (train.find(run) for run in (quiet, stopped))
    assert first is not None
    assert second is not None
    assert all(torch.equal(value, weights(second.uri)[name]) for name, value in weights(first.uri).items())
    curves = [storage.read_json(f"{found.uri}/curve.json") for found in (first, second)]
    assert curves[0][-1] == curves[1][-1]


@pytest.mark.parametrize("store_kind", ["disk", "s3"])
def test_two_workers_under_ray_train_learn_what_one_does(tmp_path, tiny_dataset, ray_session, request, store_kind):
    alone = config(tmp_path / "alone", tiny_dataset)
    train.train_on_rank(alone, 0, 1, CPU, emit=lambda _: None)
    store = str(tmp_path / "pair") if store_kind == "disk" else request.getfixturevalue("bucket")
    pair = train.run(config(store, tiny_dataset, workers=2))
    one, two = weights(train.find(alone).uri), weights(pair.uri)
    error = sum(float((one[name] - two[name]).square().sum()) for name in one)
    norm = sum(float(value.square().sum()) for value in one.values())
    assert (error / norm) ** 0.5 < 1e-4


def test_a_half_written_checkpoint_is_not_used_and_a_damaged_one_is_named(tmp_path, tiny_dataset):
    run = config(tmp_path, tiny_dataset)
    train.train_on_rank(run, 0, 1, CPU, emit=lambda _: None)
    uri = train.run_uri(run, train.open_dataset(tiny_dataset))
    assert checkpoint.steps(uri) == [10, 12]
    shutil.copytree(f"{uri}/checkpoints/step-0000012", f"{uri}/checkpoints/step-0000099")
    (tmp_path / uri / "checkpoints/step-0000099/manifest.json").unlink()
    assert checkpoint.steps(uri) == [10, 12]
    part = storage.read_manifest(f"{uri}/checkpoints/step-0000012", "checkpoint")["parts"][0]
    storage.write_bytes(f"{uri}/checkpoints/step-0000012/{part['name']}", b"damaged")
    shutil.rmtree(f"{uri}/published")
    with pytest.raises(storage.StorageError, match=r"step-0000012/state-.*: checksum"):
        train.train_on_rank(run, 0, 1, CPU, emit=lambda _: None)


def test_a_published_folder_loads_with_the_core_and_safetensors_alone(tiny_model, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes(storage.read_bytes(f"{tiny_model}/{name}"))
    model = ModelConfig.from_dict(json.loads((tmp_path / "config.json").read_text()))
    network = UNet(model.unet)
    network.load_state_dict(safetensors.torch.load_file(tmp_path / "model.safetensors"))
    x, sigma = torch.randn(4, 3, 8, 8), torch.full((4,), 0.5)
    ours = load_model(tiny_model).denoiser
    with torch.inference_mode():
        assert torch.equal(Denoiser(network.eval(), model)(x, sigma, None), ours(x, sigma, None))


def test_a_damaged_model_is_named(tiny_model, tmp_path):
    copy = str(tmp_path / "model")
    shutil.copytree(tiny_model, copy)
    storage.write_bytes(f"{copy}/model.safetensors", b"damaged")
    with pytest.raises(storage.StorageError, match=r"model\.safetensors: checksum"):
        load_model(copy)


def test_the_newest_model_of_a_name_is_found(tiny_model):
    store = tiny_model.split("/models/")[0]
    assert newest_model(store, "tiny") == tiny_model
    with pytest.raises(storage.StorageError, match="no published model here; run the train stage first"):
        newest_model(store, "other")


def test_what_does_not_fit_is_refused_before_any_worker_starts(tmp_path, tiny_dataset, ray_session):
    with pytest.raises(PipelineError, match="workers: 64 asked for, but Ray has"):
        train.run(config(tmp_path, tiny_dataset, workers=64))
    with pytest.raises(PipelineError, match="do not fill one global batch of 4000"):
        train.run(config(tmp_path, tiny_dataset, global_batch_size=4000))
    with pytest.raises(ValueError, match="no preset 'huge'"):
        config(tmp_path, tiny_dataset, preset="huge")


def test_mirroring_is_keyed_by_the_sample_and_changes_half_of_them(tiny_dataset):
    dataset = train.open_dataset(tiny_dataset)
    rows = dataset.read("train", 64)
    plain, _, _ = train._tensors(rows, CPU, config("/s", tiny_dataset), 3, 8)
    flipped, _, _ = train._tensors(rows, CPU, config("/s", tiny_dataset, flip=True), 3, 8)
    mirrored = [torch.equal(a.flip(-1), b) and not torch.equal(a, b) for a, b in zip(plain, flipped, strict=True)]
    same = [torch.equal(a, b) for a, b in zip(plain, flipped, strict=True)]
    assert all(a or b for a, b in zip(mirrored, same, strict=True))
    assert 16 < sum(mirrored) < 48
