import json
import math
import shutil
import subprocess

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import TINY
from support.ranks import stop_after, train_together

from diffusion_core.config import ModelConfig
from diffusion_core.denoiser import Denoiser
from diffusion_core.unet import UNet
from pipelines import storage, train
from pipelines.checkpoint import Retention, steps
from pipelines.config import PipelineError, TrainConfig
from pipelines.dataset import open_dataset
from pipelines.images import from_png
from pipelines.model import load_model, newest_model
from pipelines.train import batches, loop, memory
from pipelines.train.plan import Record, check, run_uri
from pipelines.train.tracking import Tracking

QUIET = stop_after(None)


def config(store, dataset, **settings):
    return TrainConfig(store=str(store), dataset=dataset, **{**TINY, "steps": 12, "checkpoint_every": 5, **settings})


def weights(uri):
    return load_model(uri).denoiser.network.state_dict()


def model_of(run):
    found = train.find(run)
    assert found is not None
    return found.uri


def folder_of(run):
    return run_uri(run, open_dataset(run.dataset))


def curves(run):
    return storage.read_json(f"{model_of(run)}/curve.json")


def same_bits(first, second):
    one, two = weights(model_of(first)), weights(model_of(second))
    return all(torch.equal(value, two[name]) for name, value in one.items()) and curves(first) == curves(second)


def distance(first, second):
    """Norm of the difference of all weights, relative to the norm of all weights."""
    one, two = weights(model_of(first)), weights(model_of(second))
    error = sum(float((one[name] - two[name]).square().sum()) for name in one)
    return math.sqrt(error / sum(float(value.square().sum()) for value in one.values()))


@pytest.fixture(scope="module")
def quiet(tmp_path_factory, tiny_dataset):
    """A run of twelve steps that nothing disturbs."""
    run = config(tmp_path_factory.mktemp("quiet"), tiny_dataset)
    train.train_on_rank(run, host=QUIET)
    return run


def test_a_run_that_breaks_off_and_goes_on_ends_with_the_same_bits(quiet, tmp_path, tiny_dataset, monkeypatch):
    broken = config(tmp_path, tiny_dataset)
    real_step, calls = loop.train_step, []

    def dies_at_the_eighth(*arguments):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return real_step(*arguments)

    monkeypatch.setattr(loop, "train_step", dies_at_the_eighth)
    with pytest.raises(KeyboardInterrupt):
        train.train_on_rank(broken, host=QUIET)
    assert train.find(broken) is None
    train.train_on_rank(broken, host=QUIET)
    assert len(calls) == 8 + (12 - 5), "training goes on at the checkpoint of step 5"
    assert same_bits(quiet, broken)


def test_a_run_that_is_asked_to_stop_saves_first_and_then_goes_on_with_the_same_bits(quiet, tmp_path, tiny_dataset):
    stopped = config(tmp_path, tiny_dataset)
    assert train.train_on_rank(stopped, host=stop_after(7)) == 7
    assert train.find(stopped) is None
    assert steps(folder_of(stopped)) == [5, 7]
    assert train.train_on_rank(stopped, host=QUIET) == 12
    assert same_bits(quiet, stopped)


def test_a_notice_that_a_node_goes_saves_at_once_and_training_goes_on(quiet, tmp_path, tiny_dataset, monkeypatch):
    monkeypatch.setattr(loop, "_LOOK_EVERY_S", 0.0)
    told, looks = [], []

    def notice():
        looks.append(1)
        return len(looks) == 3

    run = config(tmp_path, tiny_dataset, checkpoint_every=100, keep_last=3)
    train.train_on_rank(run, host=train.Host(emit=told.append, notice=notice))
    assert "train: a node is about to be taken away; saving step 3" in told
    assert steps(folder_of(run)) == [3, 12]
    assert same_bits(quiet, run)


LONG = {"steps": 60, "checkpoint_every": 50}
SHORT = {"steps": 24, "checkpoint_every": 20}


@pytest.fixture(scope="module")
def long_run(tmp_path_factory, tiny_dataset):
    """Sixty steps on one rank."""
    run = config(tmp_path_factory.mktemp("long"), tiny_dataset, **LONG)
    train.train_on_rank(run, host=QUIET)
    return run


@pytest.fixture(scope="module")
def short_run(tmp_path_factory, tiny_dataset):
    """Twenty-four steps on one rank."""
    run = config(tmp_path_factory.mktemp("short"), tiny_dataset, **SHORT)
    train.train_on_rank(run, host=QUIET)
    return run


@pytest.fixture(scope="module")
def many_ways(tmp_path_factory, tiny_dataset, long_run):
    """The same sixty steps in several ways of sharing them out."""
    place = tmp_path_factory.mktemp("ways")

    def way(name, **settings):
        return config(place / name, tiny_dataset, **LONG, **settings)

    pairs = {
        "ddp": way("ddp"),
        "fsdp": way("fsdp", strategy="fsdp"),
        "accumulated": way("accumulated", micro_batch="2"),
    }
    train_together(2, place, *((run, 2, None) for run in pairs.values()))
    alone = way("alone", micro_batch="2")
    train.train_on_rank(alone, host=QUIET)
    return pairs | {"alone, accumulated": alone}


def assert_alike(run, other, points):
    assert distance(run, other) < 1e-4
    ours, theirs = curves(run), curves(other)
    assert len(ours["curve"]) == points
    for name in ("curve", "validation"):
        assert np.allclose(ours[name], theirs[name], rtol=1e-4, atol=0)


@pytest.mark.parametrize("way", ["ddp", "fsdp", "accumulated", "alone, accumulated"])
def test_every_way_of_sharing_the_work_learns_the_same(long_run, many_ways, way):
    assert_alike(long_run, many_ways[way], 6)


@pytest.mark.parametrize(
    ("world", "local_world", "settings"),
    [
        (3, 3, {"strategy": "ddp"}),
        (4, 2, {"strategy": "hsdp"}),
        (2, 2, {"strategy": "fsdp", "micro_batch": "2", "activation_checkpointing": True}),
    ],
    ids=["ddp on 3", "hsdp on 2 x 2", "fsdp on 2, accumulated and checkpointed"],
)
def test_more_ranks_and_levers_learn_the_same(short_run, tmp_path, tiny_dataset, world, local_world, settings):
    run = config(tmp_path, tiny_dataset, **SHORT, **settings)
    train_together(world, tmp_path, (run, local_world, None))
    assert_alike(short_run, run, 3)
    assert folder_of(run).rsplit("/", 1)[1] == folder_of(short_run).rsplit("/", 1)[1]


def test_the_way_is_no_part_of_the_result(long_run, many_ways):
    assert {folder_of(run).rsplit("/", 1)[1] for run in many_ways.values()} == {folder_of(long_run).rsplit("/", 1)[1]}


def test_a_checkpoint_of_two_shards_goes_on_in_one_process_and_back_in_two(short_run, tmp_path, tiny_dataset, store):
    run = config(store, tiny_dataset, **SHORT, strategy="fsdp")
    train_together(2, tmp_path, (run, 2, 8))
    assert steps(folder_of(run)) == [8]
    train.train_on_rank(run, host=stop_after(8))
    assert steps(folder_of(run)) == [8, 16]
    (tmp_path / "again").mkdir()
    train_together(2, tmp_path / "again", (run, 2, None))
    assert distance(short_run, run) < 1e-4


def test_bfloat16_learns_nearly_the_same_and_keeps_full_weights(long_run, tmp_path, tiny_dataset):
    run = config(tmp_path, tiny_dataset, **LONG, precision="bfloat16")
    train.train_on_rank(run, host=QUIET)
    assert 1e-6 < distance(long_run, run) < 0.05
    assert {value.dtype for value in weights(model_of(run)).values()} == {torch.float32}


@pytest.mark.chaos
def test_compiled_blocks_learn_the_same(long_run, tmp_path, tiny_dataset):
    if shutil.which("g++") is None and shutil.which("c++") is None:
        pytest.skip("no C++ compiler here")
    run = config(tmp_path, tiny_dataset, **{**LONG, "steps": 60}, compiled=True, validate_every=0)
    alike = config(tmp_path, tiny_dataset, **LONG, validate_every=0)
    for each in (run, alike.model_copy(update={"store": str(tmp_path / "eager")})):
        train.train_on_rank(each, host=QUIET)
    assert distance(run, alike.model_copy(update={"store": str(tmp_path / "eager")})) < 1e-4


def test_ranks_that_do_not_fill_their_nodes_cannot_shard_within_them(tmp_path, tiny_dataset):
    run = config(tmp_path, tiny_dataset, strategy="hsdp")
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="--strategy hsdp: 3 workers do not fill"):
        train_together(3, tmp_path, (run, 2, None))


def test_a_half_written_checkpoint_is_not_used_and_a_damaged_one_is_named(quiet, tmp_path, tiny_dataset):
    run, told = config(tmp_path, tiny_dataset, keep_last=9), []
    train.train_on_rank(run, host=stop_after(11))
    uri = folder_of(run)
    assert steps(uri) == [5, 10, 11]
    shutil.copytree(f"{uri}/checkpoints/step-0000011", f"{uri}/checkpoints/step-0000099")
    (tmp_path / uri / "checkpoints/step-0000099/manifest.json").unlink()
    for step, damage in ((11, b"damaged"), (10, None)):
        folder = f"{uri}/checkpoints/step-00000{step}"
        part = storage.read_manifest(folder, "checkpoint")["parts"][-1]["name"]
        if damage:
            storage.write_bytes(f"{folder}/{part}", damage)
        else:
            (tmp_path / folder / part).unlink()
    train.train_on_rank(run, host=train.Host(emit=told.append))
    assert "checkpoint of step 11 is damaged and removed, taking the one before it: " in told[0]
    assert "step-0000011/" in told[0]
    assert "checksum" in told[0]
    assert "step 10 is damaged" in told[1]
    assert told[2] == "train: goes on at step 5 of 12"
    assert same_bits(quiet, run)


def test_the_pickle_in_a_checkpoint_is_not_opened_when_it_was_changed(tmp_path, tiny_dataset):
    run, told = config(tmp_path, tiny_dataset), []
    train.train_on_rank(run, host=stop_after(6))
    folder = f"{folder_of(run)}/checkpoints/step-0000006"
    (name,) = [p["name"] for p in storage.read_manifest(folder, "checkpoint")["parts"] if p["file"] == ".metadata"]
    evil = b"cos\nsystem\n(S'touch " + str(tmp_path / "opened").encode() + b"'\ntR."
    storage.write_bytes(f"{folder}/{name}", evil)
    train.train_on_rank(run, host=train.Host(emit=told.append))
    assert "step 6 is damaged" in told[0]
    assert not (tmp_path / "opened").exists()


def test_the_last_few_every_nth_and_the_best_checkpoint_stay():
    known = [10, 20, 30, 40, 50, 60]
    assert Retention(last=2).keeps(known, None) == {50, 60}
    assert Retention(last=1, every=20).keeps(known, 30) == {20, 30, 40, 60}
    assert Retention(last=1).keeps(known, 35) == {60}


def test_checkpoints_that_need_not_stay_are_removed(tmp_path, tiny_dataset):
    run = config(tmp_path, tiny_dataset, checkpoint_every=2, keep_last=1, keep_every=4)
    train.train_on_rank(run, host=QUIET)
    assert steps(folder_of(run)) == [4, 8, 12]


def infinite_at(monkeypatch, *bad):
    """Steps whose losses are not finite, and which steps were tried."""
    real, tried = loop.train_step, []

    def step(state, *others):
        tried.append(state.step)
        if state.step in bad:
            raise FloatingPointError(f"loss: nan, gradient norm nan at step {state.step}")
        return real(state, *others)

    monkeypatch.setattr(loop, "train_step", step)
    return tried


def test_single_infinite_losses_are_passed_over_and_told(tmp_path, tiny_dataset, monkeypatch):
    infinite_at(monkeypatch, 3, 4, 7)
    run, told = config(tmp_path, tiny_dataset), []
    assert train.train_on_rank(run, host=train.Host(emit=told.append)) == 12
    assert [line.split(":")[1] for line in told if "passed over" in line] == [
        f" step {n} is passed over" for n in (3, 4, 7)
    ]


def test_losses_that_stay_infinite_stop_the_run_which_names_step_pictures_and_checkpoint(tmp_path, tiny_dataset):
    run = config(tmp_path, tiny_dataset, steps=40, learning_rate=1e30, warmup=0, checkpoint_every=1)
    with pytest.raises(PipelineError) as caught:
        train.train_on_rank(run, host=QUIET)
    text = str(caught.value)
    assert "3 steps in a row are not finite" in text
    assert "with rows" in text
    assert len(text[text.index("rows ") : text.index(" of split")].split(",")) == 8
    assert f"the checkpoint of step {steps(folder_of(run))[-1]} is good" in text
    assert "--nonfinite skip" in text


def test_batches_with_infinite_losses_are_left_out_by_setting(tmp_path, tiny_dataset, monkeypatch):
    tried = infinite_at(monkeypatch, 6, 7, 8)
    run, told = config(tmp_path, tiny_dataset, nonfinite="skip"), []
    train.train_on_rank(run, host=train.Host(emit=told.append))
    assert "train: back at step 5; leaving out the batches of steps [6, 7, 8]" in told
    assert tried == [0, 1, 2, 3, 4, 5, 6, 7, 8, 5, 9, 10, 11]
    again = config(tmp_path / "again", tiny_dataset, nonfinite="skip")
    assert train.train_on_rank(again, host=stop_after(7)) < 12
    train.train_on_rank(again, host=QUIET)
    assert same_bits(run, again)


def test_what_does_not_fit_is_refused_before_any_worker_starts(tmp_path, tiny_dataset, tiny_model, ray_session):
    for settings, message in (
        ({"workers": 4, "streams": 8}, "workers: 4 asked for, but Ray has"),
        ({"workers": 8}, "workers: 8 for 4 streams"),
        ({"min_workers": 3, "workers": 2}, "min_workers: 3, but workers 2"),
        ({"global_batch_size": 4000}, "do not fill one global batch of 4000"),
        ({"global_batch_size": 6}, "streams: 4 must divide global_batch_size=6"),
        ({"expect_resolution": 64}, "resolution 8, but --expect-resolution 64"),
        ({"expect_classes": 3}, "classes 8, but --expect-classes 3"),
        ({"preset": "adm-256"}, "preset adm-256 on .*: resolution: 8 cannot be halved 5 times"),
        ({"preset": "cpu-small", "parent": tiny_model}, r"its widths is \(16, 32\), but --preset cpu-small was"),
        ({"prediction": "v", "parent": tiny_model}, "parent .*: its prediction is edm, but --prediction v was given"),
    ):
        with pytest.raises(PipelineError, match=message):
            train.run(config(tmp_path, tiny_dataset, **settings))
    with pytest.raises(ValueError, match="no preset 'huge'"):
        config(tmp_path, tiny_dataset, preset="huge")
    with pytest.raises(ValueError, match="micro_batch"):
        config(tmp_path, tiny_dataset, micro_batch="few")


def test_a_run_that_names_its_parent_begins_with_its_weights(tmp_path, tiny_dataset, tiny_model):
    child = config(tmp_path, tiny_dataset, parent=tiny_model, steps=1, learning_rate=1e-12)
    check(child, open_dataset(tiny_dataset))
    train.train_on_rank(child, host=QUIET)
    assert all(torch.allclose(value, weights(tiny_model)[name]) for name, value in weights(model_of(child)).items())
    manifest = storage.read_manifest(model_of(child), "model")
    assert manifest["lineage"]["parent"] == load_model(tiny_model).digest
    assert folder_of(child) != folder_of(config(tmp_path, tiny_dataset, steps=1, learning_rate=1e-12))


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


def test_models_of_several_widths_are_published_on_the_way_with_card_curves_and_samples(tmp_path, tiny_dataset):
    run = config(tmp_path, tiny_dataset, ema=[0.1, 0.02], publish_every=5, validate_every=6)
    train.train_on_rank(run, host=QUIET)
    models = sorted((tmp_path / folder_of(run) / "published").iterdir())
    assert [folder.name for folder in models] == ["step-0000005", "step-0000010", "step-0000012"]
    last = models[-1]
    tensors = [safetensors.torch.load_file(last / name) for name in ("model.safetensors", "ema-0.02.safetensors")]
    assert any(not torch.equal(value, tensors[1][name]) for name, value in tensors[0].items())
    card = (last / "README.md").read_text()
    for told in ("![samples](samples.png)", "| steps | 12 |", open_dataset(tiny_dataset).digest, "0.1, 0.02",
                 "on held-out pictures", "bear"):  # fmt: skip
        assert told in card
    assert from_png((last / "samples.png").read_bytes()).shape == (2 * 10 - 2, 8 * 10 - 2, 3)
    assert [row[0] for row in json.loads((last / "curve.json").read_text())["validation"]] == [6, 12]
    named = {part["name"] for part in storage.read_manifest(str(last), "model")["parts"]}
    assert named == {path.name for path in last.iterdir()} - {"manifest.json"}


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


def test_early_stopping_takes_the_model_of_the_best_step(tmp_path, tiny_dataset):
    run, told = config(tmp_path, tiny_dataset, steps=40, learning_rate=1e-12, validate_every=4, patience=2), []
    assert train.train_on_rank(run, host=train.Host(emit=told.append)) < 40
    rows = curves(run)["validation"]
    best = min(rows, key=lambda row: row[1])
    assert len([row for row in rows if row[0] > best[0]]) == 2
    assert model_of(run).endswith(f"step-{int(best[0]):07}")
    assert f"train: no better held-out loss since step {int(best[0])}; taking the model of that step" in told
    train.train_on_rank(run, host=QUIET)
    assert model_of(run).endswith(f"step-{int(best[0]):07}"), "a finished run stays finished"


def test_held_out_losses_that_rise_while_training_losses_fall_are_noticed():
    falling = [[float(step), 1 / step] for step in range(1, 31)]
    rising = [[10.0, 0.5], [20.0, 0.6], [30.0, 0.7]]
    assert Record(curve=falling, validation=rising).overfits
    assert not Record(curve=falling, validation=rising[::-1]).overfits
    assert not Record(curve=falling, validation=rising[:2]).overfits
    assert not Record(curve=[[s, 1.0] for s, _ in falling], validation=rising).overfits
    assert Record(validation=[[1, 0.3], [2, 0.1], [3, 0.2], [4, 0.2]]).since_best == 2


def test_the_held_out_loss_is_the_same_for_runs_of_other_seeds_and_batches(tmp_path, tiny_dataset):
    first, second = (
        config(tmp_path, tiny_dataset, steps=1, learning_rate=1e-30, seed=0, global_batch_size=size, streams=1)
        for size in (8, 3)
    )
    for run in (first, second):
        train.train_on_rank(run, host=QUIET)
    assert curves(first)["validation"] == curves(second)["validation"]


def test_tensorboard_shows_every_figure_once_though_the_run_was_stopped(tmp_path, tiny_dataset):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = config(tmp_path, tiny_dataset, steps=40, validate_every=20, checkpoint_every=8)
    train.train_on_rank(run, host=stop_after(25))
    train.train_on_rank(run, host=QUIET)
    events = EventAccumulator(f"{folder_of(run)}/tensorboard").Reload()
    names = set(events.Tags()["scalars"])
    assert names >= {"loss", "gradient norm", "learning rate", "pictures a second", "memory bytes", "held-out loss",
                     "data wait share", "loss at sigma/0.1 to 0.3"}  # fmt: skip
    assert [event.step for event in events.Scalars("loss")] == [10, 20, 30, 40]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([row[1] for row in curves(run)["curve"]])
    assert {event.step for event in events.Images("samples")} == {20, 40}
    assert (tmp_path / folder_of(run) / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_prometheus_is_told_every_figure_that_it_has_a_name_for(tmp_path, tiny_dataset):
    from pipelines.train.metrics import _METRICS

    told = {}
    run = config(tmp_path, tiny_dataset, steps=20, validate_every=10, checkpoint_every=5)
    train.train_on_rank(run, host=train.Host(emit=lambda _: None, figures=told.update))
    assert _METRICS.keys() <= told.keys()
    assert (told["step"], told["steps left"]) == (20, 0)
    assert told["loss"] == curves(run)["curve"][-1][1]
    assert told["checkpoint seconds"] > 0


def test_mlflow_hears_the_figures_by_setting(tmp_path, tiny_dataset, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    address = f"file://{tmp_path}/mlflow"
    run = config(tmp_path, tiny_dataset, steps=20, mlflow=address)
    train.train_on_rank(run, host=stop_after(10))
    train.train_on_rank(run, host=QUIET)
    client = MlflowClient(tracking_uri=address)
    (kept,) = client.search_runs([client.get_experiment_by_name("image-diffusion").experiment_id])
    assert kept.data.params["preset"] == "tiny"
    assert [metric.step for metric in client.get_metric_history(kept.info.run_id, "loss")] == [10, 20]


def test_figures_wait_for_an_mlflow_that_is_away_and_come_once_it_is_back(tmp_path, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    address = f"file://{tmp_path}/mlflow"
    tracking = Tracking(address, "models/tiny/0123", {"preset": "tiny"})
    (home,) = (tmp_path / "mlflow").glob(f"*/{tracking.run_id}")
    home.rename(tmp_path / "away")
    assert tracking.log({"loss": 1.0}, 10) == ""
    tracking.sending.result(timeout=60)
    assert "2 figures wait: " in tracking.log({"loss": 0.5}, 20)
    tracking.sending.result(timeout=60)
    (tmp_path / "away").rename(home)
    assert tracking.close() == ""
    history = MlflowClient(tracking_uri=address).get_metric_history(tracking.run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == [(10, 1.0), (20, 0.5)]


def test_an_mlflow_that_is_not_there_is_told(tmp_path, tiny_dataset):
    with pytest.raises(PipelineError, match=r"--mlflow nowhere://: "):
        train.train_on_rank(config(tmp_path, tiny_dataset, mlflow="nowhere://"), host=QUIET)


def test_mirroring_is_keyed_by_the_sample_and_changes_half_of_them(tiny_dataset):
    rows, place = open_dataset(tiny_dataset).read("train", 64), torch.arange(64)
    plain = batches.to_batch(rows, place, config("/s", tiny_dataset), 3, 8).x0
    flipped = batches.to_batch(rows, place, config("/s", tiny_dataset, flip=True), 3, 8).x0
    mirrored = [torch.equal(a.flip(-1), b) and not torch.equal(a, b) for a, b in zip(plain, flipped, strict=True)]
    same = [torch.equal(a, b) for a, b in zip(plain, flipped, strict=True)]
    assert all(a or b for a, b in zip(mirrored, same, strict=True))
    assert 16 < sum(mirrored) < 48


def test_want_of_memory_is_told_with_what_to_change(tmp_path, tiny_dataset, monkeypatch):
    def hungry(*_):
        torch.empty(2**55, dtype=torch.uint8)

    monkeypatch.setattr(loop, "train_step", hungry)
    with pytest.raises(PipelineError, match=r"out of memory on cpu .*--micro-batch auto.*--activation-checkpointing"):
        train.train_on_rank(config(tmp_path, tiny_dataset), host=QUIET)
    assert not memory.is_out_of_memory(RuntimeError("anything else"))


@pytest.fixture
def small_disk(tmp_path):
    """A folder with room for a few checkpoints."""
    place = tmp_path / "small"
    place.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", place], capture_output=True, check=False)
    if mount.returncode:
        pytest.skip(f"no small disk here: {mount.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_disk_that_fills_keeps_the_last_checkpoint_and_says_so(quiet, small_disk, tiny_dataset):
    run = config(small_disk, tiny_dataset, keep_last=9, checkpoint_every=5)
    train.train_on_rank(run, host=stop_after(6))
    (small_disk / "filler").write_bytes(b"0" * (storage_left(small_disk) - 200_000))
    with pytest.raises(PipelineError, match="no space left to write it; free some"):
        train.train_on_rank(run, host=QUIET)
    (small_disk / "filler").unlink()
    assert steps(folder_of(run))[-1] >= 6
    train.train_on_rank(run, host=QUIET)
    assert same_bits(quiet, run)


def storage_left(place):
    return shutil.disk_usage(place).free


def test_two_workers_under_ray_train_learn_what_one_does(quiet, tiny_dataset, ray_session, bucket):
    pair = config(bucket, tiny_dataset, workers=2)
    assert train.run(pair).uri == model_of(pair)
    assert distance(quiet, pair) < 1e-4


def test_an_error_in_a_worker_under_ray_train_is_told_in_its_own_words(tmp_path, tiny_dataset, ray_session):
    run = config(tmp_path, tiny_dataset, steps=40, learning_rate=1e30, warmup=0, workers=1)
    with pytest.raises(PipelineError, match="3 steps in a row are not finite"):
        train.run(run)
