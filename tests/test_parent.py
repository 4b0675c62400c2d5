import dataclasses

import pytest
import torch
from conftest import TINY
from support.folders import discrete, export, flip_a_bit, published, shaken
from support.ranks import stop_after

from diffusion_core.config import PRESETS
from diffusion_core.unet import UNet
from pipelines import storage, train
from pipelines.config import PipelineError, TrainCommand, TrainConfig, parse
from pipelines.dataset import open_dataset
from pipelines.jobs import settle
from pipelines.model import load_config, load_model
from pipelines.train.parent import check_parent, inherited
from pipelines.train.plan import check, run_uri

QUIET = stop_after(None)
ALONE = {name: value for name, value in TINY.items() if name != "preset"}


def network_of(config, weights=None):
    network = shaken(UNet(config.unet))
    if weights:
        network.load_state_dict(weights)
    return network


def answers(network, config, label):
    torch.manual_seed(1)
    x, t = torch.randn(4, 3, 8, 8), torch.tensor([0.0, 3.0, 500.0, 999.0])
    with torch.no_grad():
        return network(x, t, torch.full((4,), label) if config.class_names else None)


def child_of(parent, names):
    child = discrete("v", classes=names)
    return child, network_of(child, inherited(network_of(parent).state_dict(), parent, child))


def test_classes_that_the_parent_knows_keep_their_rows_and_new_ones_begin_as_its_null_class():
    parent = discrete("v", classes=("cat", "dog", "fox"))
    child, network = child_of(parent, ("ant", "dog", "cat", "owl"))
    theirs = network_of(parent)
    for label, origin in ((0, 3), (1, 1), (2, 0), (3, 3), (4, 3)):
        assert torch.equal(answers(network, child, label), answers(theirs, parent, origin))


def test_every_class_of_an_unconditional_parents_child_begins_with_what_the_parent_draws():
    parent = discrete("v")
    child, network = child_of(parent, ("cat", "dog"))
    for label in range(3):
        assert torch.equal(answers(network, child, label), answers(network_of(parent), parent, None))


def test_an_unconditional_child_begins_with_what_the_null_class_draws():
    parent = discrete("v", classes=("cat", "dog"))
    child, network = child_of(parent, ())
    assert torch.allclose(answers(network, child, None), answers(network_of(parent), parent, 2), atol=1e-5)


@pytest.fixture
def parent(tmp_path):
    """A published model that predicts v and is told cosine timesteps, of 16x16 pictures of bears and zebras."""
    config = discrete("v", "cosine", ("bear", "zebra"))
    config = dataclasses.replace(config, unet=dataclasses.replace(config.unet, resolution=16), schedule="cosine")
    return published(tmp_path / "parent", config, shaken(UNet(config.unet)).state_dict())


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"prediction": "eps"}, "its prediction is v, but --prediction eps was given; leave --prediction out"),
        ({"schedule": "linear"}, "its schedule is cosine, but --schedule linear was given"),
        ({"timesteps": "linear"}, "its timesteps is cosine, but --timesteps linear was given"),
        ({"preset": "small"}, r"its widths is \(16, 32\), but --preset small was given"),
    ],
)
def test_a_setting_that_contradicts_the_parent_is_refused_by_both_names(parent, settings, told, capsys):
    with pytest.raises(PipelineError, match=f"parent {parent}: {told}"):
        check_parent(TrainConfig(dataset="/d", parent=parent, **settings))
    ((name, value),) = settings.items()
    command = parse(TrainCommand, "train", ["--from", parent, "--dataset", "/d", f"--{name}", value])
    with pytest.raises(PipelineError, match=told):
        check_parent(settle(command))


def test_what_was_not_set_or_agrees_does_not_contradict(parent):
    check_parent(TrainConfig(dataset="/d", parent=parent))
    check_parent(settle(parse(TrainCommand, "train", ["--from", parent, "--dataset", "/d"])))
    same = {"prediction": "v", "schedule": "cosine", "timesteps": "cosine", "preset": "tiny"}
    check_parent(TrainConfig(dataset="/d", parent=parent, **same))


def test_a_child_is_what_its_parent_is_at_the_size_and_with_the_classes_of_its_data(parent, tmp_path, tiny_dataset):
    dataset = open_dataset(tiny_dataset)
    config = TrainConfig(
        store=str(tmp_path / "store"), dataset=tiny_dataset, parent=parent, learning_rate=1e-12, sigma="uniform_t",
        **ALONE,
    )  # fmt: skip
    check(config, dataset)
    train.train_on_rank(config, host=QUIET)
    child = train.find(config).uri
    theirs, ours = load_config(parent), load_config(child)
    kept = ("prediction", "sigma_data", "sigma_min", "sigma_max", "schedule", "timesteps")
    assert [getattr(ours, name) for name in kept] == [getattr(theirs, name) for name in kept]
    assert ours.unet == dataclasses.replace(theirs.unet, resolution=8, classes=len(dataset.class_names))
    assert ours.class_names == dataset.class_names
    rows, old = (load_model(uri).denoiser.network.classes.weight for uri in (child, parent))
    expected = torch.stack([old[0] if name == "bear" else old[2] for name in (*dataset.class_names, "none")])
    assert torch.allclose(rows, expected, atol=1e-6)
    lineage = storage.read_manifest(child, "model")["lineage"]
    assert lineage["parent"] == load_model(parent).digest
    assert not {"prediction", "preset", "schedule", "timesteps"} & set(lineage["settings"])
    assert export(child, tmp_path / "out")


def test_another_parent_makes_another_run_and_naming_what_it_says_anyhow_the_same(parent, tmp_path, tiny_dataset):
    other = published(tmp_path / "other", load_config(parent), shaken(UNet(load_config(parent).unet), 0.2).state_dict())
    dataset = open_dataset(tiny_dataset)
    runs = [
        run_uri(TrainConfig(dataset=tiny_dataset, **settings), dataset)
        for settings in ({}, {"parent": parent}, {"parent": other}, {"parent": parent, "prediction": "v"})
    ]
    assert len(set(runs)) == 3
    assert runs[3] == runs[1]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_changed_byte_of_the_parent_ends_the_run_by_its_name(parent, tmp_path, tiny_dataset, name):
    flip_a_bit(tmp_path / "parent" / name)
    with pytest.raises(storage.DamagedError, match=f"{name}: checksum"):
        train.train_on_rank(TrainConfig(store=str(tmp_path), dataset=tiny_dataset, parent=parent, **ALONE), host=QUIET)


def test_a_model_that_is_told_its_timesteps_trains_and_samples_over_all_of_them(tmp_path, tiny_dataset):
    told = {"prediction": "eps", "timesteps": "linear", "schedule": "linear", "sigma": "uniform_t"}
    config = TrainConfig(store=str(tmp_path / "store"), dataset=tiny_dataset, **TINY, **told)
    train.train_on_rank(config, host=QUIET)
    made = load_config(train.find(config).uri)
    assert (made.sigma_min, made.sigma_max) == pytest.approx((0.01, 157.4), rel=1e-3)
    assert made.unet == dataclasses.replace(PRESETS["tiny"], classes=made.unet.classes, embedding="timestep")
    assert export(train.find(config).uri, tmp_path / "out")
