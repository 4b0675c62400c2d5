import subprocess
import sys

import pytest
from conftest import ROOT

import flows
from pipelines import __main__ as stages
from pipelines import jobs
from pipelines.config import AWAY_STATUS, AwayError, PipelineError
from pipelines.jobs import STAGES
from pipelines.storage import StoreAwayError


def test_a_stage_runs_finds_its_result_and_makes_another_for_another_setting(tmp_path, capsys):
    flags = ["--store", str(tmp_path), "--count", "8", "--resolution", "8"]
    assert stages.main(["draw", *flags]) == 0
    first = capsys.readouterr().out
    assert stages.main(["draw", *flags]) == 0
    assert "draw: found" in capsys.readouterr().out
    assert stages.main(["draw", *flags, "--seed", "5"]) == 0
    second = capsys.readouterr().out
    assert "found" not in second
    assert first.splitlines()[-1] != second.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["ingset"], "no stage 'ingset'; there are draw, ingest, plan, train"),
        (["ingest", "--source", "/nowhere/at/all"], "/nowhere/at/all: nothing there"),
        (["ingest", "--source", "x", "--resolutoin", "8"], "--resolutoin"),
        (["train", "--dataset", "/nowhere/at/all"], "/nowhere/at/all: no dataset here"),
        (["generate", "--model", "/nowhere/at/all"], "/nowhere/at/all: no model here"),
        (["serve", "--store", "/nowhere/at/all"], "no published model here"),
    ],
)
def test_an_error_is_one_line_and_a_failing_status(arguments, told, capsys):
    assert stages.main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert told in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "status"), [(StoreAwayError("s3://x: no answer"), AWAY_STATUS), (PipelineError("x: wrong"), 1)]
)
def test_what_may_be_back_later_has_a_status_of_its_own(error, status, monkeypatch, capsys):
    def fails(*_):
        raise error

    monkeypatch.setattr(stages, "run_stage", fails)
    monkeypatch.setattr(flows, "run_here", fails)
    assert (stages.main(["draw"]), flows.main(["cleanup"])) == (status, status)
    assert capsys.readouterr().err == 2 * f"error: {error}\n"


def test_a_refused_bucket_is_one_line(bucket, capsys, monkeypatch):
    import s3fs

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        assert stages.main(["ingest", "--source", f"{bucket}/pictures"]) == 1
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
    captured = capsys.readouterr().err
    assert "access refused" in captured
    assert "not-the-secret" not in captured


@pytest.mark.parametrize("stage", STAGES)
def test_help_of_a_stage_describes_every_setting(stage, capsys):
    with pytest.raises(SystemExit) as raised:
        stages.main([stage, "--help"])
    assert raised.value.code == 0
    told = capsys.readouterr().out
    for name, field in STAGES[stage].flags.model_fields.items():
        assert f"--{name.replace('_', '-')}" in told
        assert field.description
        assert field.description.split()[0] in told


def test_a_flow_refuses_an_unknown_name_or_setting_before_it_starts(capsys):
    assert flows.main(["demmo"]) == 1
    assert "no flow 'demmo'; there are demo, pipeline" in capsys.readouterr().err
    assert flows.main(["pipeline", "--source", "x", "--train.stepz", "3"]) == 1
    assert "--train.stepz" in capsys.readouterr().err


def test_starting_a_flow_loads_neither_torch_nor_ray():
    code = "import flows, sys; print(sorted({'torch', 'ray'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_a_command_leaves_a_ray_that_was_there_before_it(ray_session, tmp_path, capsys):
    import ray

    session = ray.get_runtime_context().get_node_id()
    assert stages.main(["plan", "--preset", "tiny"]) == 0
    assert stages.main(["models", "--store", str(tmp_path)]) == 1
    assert ray.is_initialized()
    assert ray.get_runtime_context().get_node_id() == session


@pytest.mark.parametrize(
    ("error", "raised"), [(Exception("timed out during startup"), AwayError), (OSError("no"), OSError)]
)
def test_a_ray_that_does_not_start_in_time_may_be_tried_again(error, raised, monkeypatch):
    import ray

    def fails(**_):
        raise error

    monkeypatch.setattr(ray, "init", fails)
    with pytest.raises(raised, match=str(error)):
        jobs._start({})
