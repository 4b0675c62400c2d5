import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT, four_free_ports
from ray._private.runtime_env.packaging import PathSpec
from support import sessions
from support.jobserver import JobServer

from pipelines import cluster, stops
from pipelines.config import AwayError, DrawConfig, InterruptedRunError, PipelineError, TrainConfig
from pipelines.flow_config import Cluster, JobOptions

QUICK = JobOptions(code="image", wait=5, grace=2)


@pytest.fixture(autouse=True)
def _quick_looks(monkeypatch):
    monkeypatch.setattr(cluster, "_LOOK_S", 0.1)
    monkeypatch.setattr(cluster, "_FIRST_WAIT_S", 0.1)
    monkeypatch.setattr(stops, "_POLL_S", 0.1)


@pytest.fixture
def server():
    made = JobServer(four_free_ports())
    yield made
    made.close()


@pytest.fixture
def config(tmp_path):
    return DrawConfig(store=str(tmp_path / "store"), count=4, resolution=8)


def run(server, config, options=QUICK, **more):
    followed = []
    cluster.run_job("draw", config, Cluster(address=server.address, job=options, **more), followed.append)
    return followed


def in_thread(server, config, options=QUICK):
    """A follower in a thread, its outcome in a list."""
    outcome = []

    def follow():
        try:
            outcome.append(run(server, config, options))
        except PipelineError as error:
            outcome.append(error)

    thread = threading.Thread(target=follow)
    thread.start()
    return thread, outcome


def until(found):
    return sessions.until(found, "the server", 20, 0.02)


def test_a_stage_runs_as_a_job_and_its_log_is_printed_once_and_whole(server, config, capsys):
    lines = "\n".join(f"line {number} äöü" for number in range(500))
    server.commands = [f"printf '%s\\n' '{lines}'; sleep 0.3; printf 'the end'"]
    (job,) = run(server, config)
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"draw: job {job.id} on {server.address}"
    assert out[1:] == [*lines.splitlines(), "the end"]
    assert server.jobs[job.id].request["entrypoint"].startswith("python -m pipelines draw --store ")
    assert sum("logs/tail" in path for path in server.asked) == 1, "a log is read once"


def test_the_real_stage_as_a_job_leaves_its_result(server, config, monkeypatch):
    from pipelines.jobs import run_stage

    monkeypatch.setenv("PATH", f"{sys.executable.rsplit('/', 1)[0]}:/usr/bin:/bin")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    place = Cluster(address=server.address, job=QUICK)
    made = run_stage("draw", config, place)
    assert run_stage("draw", config, place) == made.model_copy(update={"found": True})
    assert len(server.jobs) == 1, "what is there already is not submitted"


def test_the_same_settings_find_the_running_job_and_others_do_not(server, config):
    server.commands = ["sleep 1; echo done"]
    first, _ = in_thread(server, config)
    until(lambda: server.jobs)
    second, outcome = in_thread(server, config)
    server.commands = ["true"]
    (other,) = run(server, config.model_copy(update={"count": 5}))
    first.join()
    second.join()
    assert len(server.jobs) == 2
    assert outcome[0][0].id != other.id
    server.commands = ["true"]
    (again,) = run(server, config)
    assert again.id == outcome[0][0].id[:-1] + "2", "a job that has ended is not taken for a running one"


def training(config, name, **more):
    return TrainConfig(store=config.store, dataset="/dataset", name=name, **more)


def train(server, config, outcome=None):
    """A follower of a training: in a thread with its outcome in a list where there is one."""
    place = Cluster(address=server.address, job=QUICK)
    if outcome is None:
        cluster.run_job("train", config, place, lambda _: None)
        return None
    thread = threading.Thread(target=lambda: cluster.run_job("train", config, place, outcome.append))
    thread.start()
    return thread


def test_a_training_waits_for_another_of_its_name_whose_flow_is_gone_and_for_no_other(server, config, capsys):
    server.commands = ["while [ ! -e $IMAGE_DIFFUSION_STOP.end ]; do sleep 0.05; done", "true", "echo second"]
    first, second = [], []
    abandoned = train(server, training(config, "faces"), first)
    until(lambda: first and server.jobs)
    train(server, training(config, "hands"))
    assert len(server.jobs) == 2, "another name waits for nobody"
    waiting = train(server, training(config, "faces", steps=7), second)
    time.sleep(1)
    assert len(server.jobs) == 2
    assert not second, "a run that waits follows no job, so that to cancel it stops none"
    marker = Path(f"{stops.marker_of(config.store, first[0].id)}.end")
    marker.parent.mkdir(parents=True, exist_ok=True)
    marker.touch()
    abandoned.join(20)
    waiting.join(20)
    assert server.jobs[second[0].id].status == "SUCCEEDED"
    told = capsys.readouterr().out
    assert told.count(f"train: job {first[0].id} trains a model of the same name; waiting for its end") == 1
    assert server.jobs[second[0].id].request["metadata"] == {"stage": "train", "name": "faces"}


def test_an_error_of_the_stage_is_told_with_its_own_line_and_not_tried_again(server, config):
    server.commands = ["echo some; echo 'error: part-0: checksum' >&2; exit 1"]
    with pytest.raises(PipelineError, match=r"draw: job draw-.*-1 on http://.* failed: part-0: checksum$"):
        run(server, config)
    assert len(server.jobs) == 1


def test_a_store_that_is_away_inside_the_job_is_told_as_such(server, config):
    server.commands = ["echo 'error: s3://bucket/x: no answer' >&2; exit 75"]
    with pytest.raises(AwayError, match=r"-1 on http://.* failed: s3://bucket/x: no answer$"):
        run(server, config)
    assert len(server.jobs) == 1, "to try again later is the flow's part"


def test_a_job_that_is_lost_with_its_node_is_submitted_again(server, config, capsys):
    server.commands = ["sleep 60", "kill -9 $$", "echo fine"]
    thread, outcome = in_thread(server, config)
    until(lambda: [job for job in server.jobs.values() if job.process])
    server.lose(next(iter(server.jobs)))
    thread.join(20)
    assert [job.id[-2:] for job in outcome[0]] == ["-1", "-2", "-3"]
    told = capsys.readouterr().out
    assert told.count("submitting it again") == 2
    assert "its node was lost" in told
    assert told.endswith("fine\n")


def test_jobs_that_are_lost_again_and_again_end_the_run(server, config):
    server.commands = ["kill -9 $$"] * 3
    with pytest.raises(PipelineError, match="failed: Job entrypoint command failed with exit code"):
        run(server, config, QUICK.model_copy(update={"resubmits": 2}))
    assert len(server.jobs) == 3


def test_a_head_that_is_lost_is_waited_for_and_the_job_submitted_anew(server, config, capsys):
    server.commands = ["echo begun; sleep 60", "echo fine"]
    thread, outcome = in_thread(server, config)
    until(lambda: "begun" in "".join(job.log for job in server.jobs.values()))
    server.vanish()
    time.sleep(1)
    server.start()
    thread.join(20)
    assert outcome[0][-1].id.endswith("-1"), "a cluster that was made anew counts from one"
    told = capsys.readouterr().out
    assert "waiting for the cluster" in told
    assert told.endswith("fine\n")


def test_a_job_that_ran_longer_than_the_wait_is_followed_on_after_an_outage_and_its_log_goes_on(server, config, capsys):
    server.commands = ["echo first; sleep 2; echo second; sleep 2; echo third"]
    quick = QUICK.model_copy(update={"wait": 1.5})
    thread, outcome = in_thread(server, config, quick)
    until(lambda: "second" in "".join(job.log for job in server.jobs.values()))
    server.cut()
    time.sleep(0.7)
    server.mend()
    thread.join(20)
    assert [job.id[-2:] for job in outcome[0]] == ["-1", "-1"]
    told = capsys.readouterr().out.splitlines()
    assert any("waiting for the cluster" in line for line in told)
    assert [line for line in told if line in ("first", "second", "third")] == ["first", "second", "third"]


def test_a_cluster_that_stays_away_after_a_job_has_begun_ends_the_run(server, config):
    server.commands = ["sleep 60"]
    thread, outcome = in_thread(server, config, QUICK.model_copy(update={"wait": 0.5}))
    until(lambda: [job for job in server.jobs.values() if job.process])
    server.vanish()
    thread.join(20)
    assert isinstance(outcome[0], AwayError)


def test_a_cluster_that_stays_away_is_told_as_such(config):
    place = Cluster(address=f"http://127.0.0.1:{four_free_ports()}", job=QUICK.model_copy(update={"wait": 0.5}))
    with pytest.raises(AwayError, match=r"no answer .* check the address, and that it runs"):
        cluster.run_job("draw", config, place, lambda _: None)


def test_a_token_opens_the_cluster_and_without_it_the_error_says_what_to_do(config, monkeypatch):
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    server = JobServer(four_free_ports(), token="secret-token")
    try:
        server.commands = ["true"]
        run(server, config, token="secret-token")
        with pytest.raises(PipelineError, match="the token is refused or missing; set RAY_AUTH_TOKEN") as error:
            run(server, config, token="another-token")
        assert "another-token" not in str(error.value)
        assert "secret-token" not in repr(Cluster(address=server.address, token="secret-token"))
    finally:
        server.close()


def test_what_a_job_holds_and_how_code_travels_is_asked_of_the_cluster(server, config):
    server.commands = ["true"]
    options = JobOptions(code="image", cpus=1, gpus=0.5, memory="2GB", resources={"driver": 1})
    (job,) = run(server, config, options)
    request = server.jobs[job.id].request
    assert (request["entrypoint_num_cpus"], request["entrypoint_num_gpus"]) == (1, 0.5)
    assert request["entrypoint_memory"] == 2_000_000_000
    assert request["entrypoint_resources"] == {"driver": 1}
    assert "working_dir" not in request["runtime_env"]


def test_a_stop_lets_the_stage_save_first_and_leaves_no_marker(server, config, tmp_path):
    saves = 'while [ ! -e "$IMAGE_DIFFUSION_STOP" ]; do sleep 0.05; done; echo saved; exit 130'
    server.commands = [saves]
    thread, outcome = in_thread(server, config)
    job = until(lambda: next((job for job in server.jobs.values() if job.process), None))
    name = job.request["submission_id"]
    marker = stops.marker_of(config.store, name)
    cluster.stop_job(Cluster(address=server.address, job=QUICK), cluster.Job(name, marker))
    thread.join(20)
    assert job.log == "saved\n"
    assert isinstance(outcome[0], InterruptedRunError)
    assert f"/api/jobs/{name}/stop" not in server.asked
    assert not (tmp_path / "store/stops" / name).exists()


def test_a_job_that_does_not_heed_the_marker_is_stopped_after_its_grace(server, config):
    server.commands = ["sleep 60"]
    thread, outcome = in_thread(server, config)
    job = until(lambda: next((job for job in server.jobs.values() if job.process), None))
    name = job.request["submission_id"]
    began = time.monotonic()
    cluster.stop_job(Cluster(address=server.address, job=QUICK), cluster.Job(name, stops.marker_of(config.store, name)))
    thread.join(20)
    assert time.monotonic() - began >= QUICK.grace
    assert "was stopped; what it had done is kept" in str(outcome[0])


def test_a_marker_interrupts_the_process_that_heeds_it_once(tmp_path, request):
    marker = stops.marker_of(str(tmp_path), "job-1")
    stops.ask(marker)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with pytest.raises(KeyboardInterrupt), stops.heeded(marker):
        time.sleep(20)
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    with stops.heeded(stops.marker_of(str(tmp_path), "job-2")), stops.heeded(None):
        time.sleep(0.3)
    stops.forget(marker)
    stops.forget(marker)


def test_a_file_of_secrets_goes_along_with_no_job_no_image_and_no_commit():
    for lines in (cluster._EXCLUDED, (ROOT / ".gitignore").read_text().splitlines()):
        left_out = PathSpec.from_lines("gitwildmatch", lines)
        assert left_out.match_file("infra/.env")
        assert not left_out.match_file("infra/prefect.yaml")
    assert (ROOT / ".dockerignore").read_text().splitlines()[-1] == "**/.env", "after what lets infra in"
