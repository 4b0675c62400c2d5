import pytest

from pipelines import jobs
from pipelines.config import PipelineError, TrainCommand, TrainConfig, parse
from pipelines.train import budget


def command(store, **settings):
    """What was asked for; the settings named here count as given on the command line."""
    return TrainCommand(store=str(store), name="wish", threads=1, workers=1, **settings)


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("45m", 2700), ("1h30m", 5400), ("1d2h", 93_600)])
def test_a_budget_is_a_time(text, seconds):
    assert command("/s", dataset="/d", budget=text).budget_seconds == seconds


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset", "d", "--budget", "2 hours"], "need a time such as 90s, 45m, 2h or 1h30m"),
        (["--budget", "2h"], "need --dataset or --source, and not both"),
        (["--dataset", "d", "--source", "s"], "need --dataset or --source, and not both"),
        (["--dataset", "d", "--resolution", "32"], "a dataset has its own"),
    ],
)
def test_wishes_that_make_no_sense_are_told(flags, message):
    with pytest.raises(PipelineError, match=message):
        parse(TrainCommand, "train", flags)


def test_candidates_come_with_the_least_work_first_and_rates_of_the_literature():
    found = budget.candidates(command("/s", source=["/p"]), None, 0)
    assert [each.preset for each in found][:3] == ["cpu-small", "small", "ddpm-32"]
    assert {each.preset: each.unet.resolution for each in found}["adm-64"] == 64
    rates = {each.preset: each.learning_rate for each in found}
    assert rates["cpu-small"] == 2e-3
    # Ho et al. 2020 trained 36 M parameters with 2e-4, Dhariwal & Nichol 2021 296 M with 1e-4.
    assert 2e-4 <= rates["ddpm-32"] <= 4e-4
    assert rates["adm-64"] == 1e-4
    assert found[0].wanted == pytest.approx(900 * 32, rel=0.05)


def test_a_resolution_or_a_preset_that_is_named_stays():
    at_64 = budget.candidates(command("/s", source=["/p"]), 64, 3)
    assert {each.unet.resolution for each in at_64} == {64}
    assert {each.unet.classes for each in at_64} == {3}
    (only,) = budget.candidates(command("/s", source=["/p"], preset="small"), None, 0)
    assert only.preset == "small"
    with pytest.raises(PipelineError, match="preset adm-256 at 8 pixels: resolution: 8 cannot be halved"):
        budget.candidates(command("/s", source=["/p"], preset="adm-256"), 8, 0)


def test_pictures_and_a_time_become_a_training_run_and_the_same_wish_the_same_run(
    cartoon_shards, tmp_path, ray_session, capsys
):
    wish = command(tmp_path, source=[str(cartoon_shards)], resolution=8, preset="tiny", budget="2m", seed=3)
    first = jobs.settle(wish)
    told = capsys.readouterr().out
    assert "s a step" in told
    assert "train: chosen: preset tiny, steps" in told
    assert isinstance(first, TrainConfig)
    assert (first.preset, first.seed, first.micro_batch) == ("tiny", 3, "auto")
    assert first.steps > 100
    assert jobs.settle(wish) == first
    told = capsys.readouterr().out
    assert "as chosen before for this command" in told
    assert f"ingest: found {first.dataset}" in told


def test_a_flag_that_names_a_default_makes_a_choice_of_its_own(tiny_dataset, tmp_path, ray_session):
    free = command(tmp_path, dataset=tiny_dataset, preset="tiny", budget="10m")
    named = command(tmp_path, dataset=tiny_dataset, preset="tiny", budget="10m", learning_rate=2e-3, warmup=50)
    assert jobs.settle(free).learning_rate == 2e-3
    assert jobs.settle(named).warmup == 50
    rare = command(tmp_path, dataset=tiny_dataset, preset="tiny", budget="10m", global_batch_size=32)
    assert jobs.settle(rare).global_batch_size == 32
    assert len(list((tmp_path / "choices/wish").iterdir())) == 3


def test_what_the_flags_say_is_not_chosen(tiny_dataset, tmp_path, ray_session, capsys):
    wish = command(tmp_path, dataset=tiny_dataset, preset="tiny", budget="1m", steps=50_000, learning_rate=1e-5)
    settled = jobs.settle(wish)
    assert (settled.steps, settled.learning_rate, settled.dataset) == (50_000, 1e-5, tiny_dataset)
    assert "train: warning: 50000 steps need about" in capsys.readouterr().out


def test_a_time_in_which_nothing_fits_is_told(tiny_dataset, tmp_path, ray_session):
    wish = command(tmp_path, dataset=tiny_dataset, preset="tiny", budget="1s", global_batch_size=512)
    with pytest.raises(PipelineError, match=r"--budget 1s: nothing fits: .*not even 100 steps would fit the time"):
        jobs.settle(wish)


def test_pictures_without_a_time_are_ingested_at_the_networks_size(cartoon_shards, tmp_path, ray_session):
    settled = jobs.settle(command(tmp_path, source=[str(cartoon_shards)], preset="tiny"))
    assert settled.steps == TrainConfig.model_fields["steps"].default
    assert jobs.settle(command(tmp_path, source=[str(cartoon_shards)], preset="tiny")) == settled


def test_pictures_that_are_not_there_are_told_before_anything_is_measured(tmp_path, capsys):
    command = TrainCommand(source=[str(tmp_path / "none")], budget="2h", store=str(tmp_path), name="t")
    with pytest.raises(PipelineError, match="none: nothing there; check the address"):
        jobs.settle(command)
    assert "measuring" not in capsys.readouterr().out
