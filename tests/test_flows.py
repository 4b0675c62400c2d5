"""The flows as Prefect sees them: their forms, deployments, and what they are made of."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import yaml
from conftest import ROOT
from jsonschema import Draft202012Validator
from prefect.states import Failed
from prefect.utilities.callables import parameter_schema

import flows
from pipelines.config import AwayError, PipelineError, TrainConfig, parse
from pipelines.flow_config import GenerateFlow, IngestFlow, JobOptions, NightlyConfig

DEPLOYMENTS = yaml.safe_load((ROOT / "infra/prefect.yaml").read_text())


def schema(name):
    return parameter_schema(flows.FLOWS[name][0]).model_dump_for_openapi()


@pytest.mark.parametrize("name", list(flows.FLOWS))
def test_every_flow_has_a_form_of_its_own_settings_and_a_deployment(name):
    form = schema(name)
    kind = flows.FLOWS[name][1]
    definition = form["definitions"][kind.__name__]
    assert set(definition["properties"]) == set(kind.model_fields)
    assert all("description" in field or "$ref" in field for field in definition["properties"].values())
    assert definition["additionalProperties"] is False, "a typo is an error"
    assert name in {each["name"] for each in DEPLOYMENTS["deployments"]}


@pytest.mark.parametrize("deployment", DEPLOYMENTS["deployments"], ids=lambda each: each["name"])
def test_deployments_give_only_settings_that_their_flow_has(deployment):
    file, name = deployment["entrypoint"].split(":")
    assert (ROOT / file).exists()
    form = schema(name)
    Draft202012Validator.check_schema({**form, "$defs": form["definitions"]})
    kind = flows.FLOWS[name][1]
    given = deployment["parameters"]["config"]
    assert set(given) <= set(kind.model_fields)
    assert deployment["work_pool"]["name"] == "image-diffusion"
    for schedule in deployment.get("schedules", []):
        assert schedule["slug"]
        assert len(schedule["cron"].split()) == 5


def test_nightly_runs_every_night_and_ingestion_every_hour_one_at_a_time():
    by_name = {each["name"]: each for each in DEPLOYMENTS["deployments"]}
    assert by_name["nightly"]["schedules"][0]["cron"].split()[1:] == ["2", "*", "*", "*"]
    assert by_name["ingest"]["schedules"][0]["cron"].split()[1:] == ["*", "*", "*", "*"]
    assert by_name["nightly"]["concurrency_limit"]["limit"] == by_name["ingest"]["concurrency_limit"]["limit"] == 1


def test_importing_the_flows_brings_neither_torch_nor_ray():
    code = "import sys, flows; print(sorted({'torch', 'ray'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")


def test_the_nights_order_has_the_dates_table_or_the_dates_seed():
    night = parse(NightlyConfig, "nightly", ["--source", "/in", "--table", "s3://bucket/orders/{date}.csv"])
    assert night.order("/model", "2026-11-25").table == "s3://bucket/orders/2026-11-25.csv"
    plain = parse(NightlyConfig, "nightly", ["--source", "/in", "--generate.count", "7"])
    order = plain.order("/model", "2026-11-25")
    assert (order.seed, order.count, order.model) == (20261125, 7, "/model")
    assert plain.order("/model", "2026-11-26").seed == 20261126
    fixed = parse(NightlyConfig, "nightly", ["--source", "/in", "--generate.seed", "3"])
    assert fixed.order("/model", "2026-11-25").seed == 3
    with pytest.raises(PipelineError, match=r"--date '25\.11\.2026': .*isoformat"):
        parse(NightlyConfig, "nightly", ["--source", "/in", "--date", "25.11.2026"])


@pytest.mark.parametrize(
    ("flow", "flags", "told"),
    [
        ("nightly", ["--table", "/o/{date}.csv", "--generate.count", "5"], "--count is for rows without a table"),
        ("nightly", ["--generate.carry", "order"], "--carry names columns of a --table, and there is none"),
        ("nightly", ["--date", "2026-W48-3"], "--date '2026-W48-3': .*need a date as 2026-11-25"),
        ("nightly", ["--date", "20261125"], "need a date as 2026-11-25"),
        ("pipeline", ["--generate.carry", "order"], "generate: --carry names columns of a --table"),
        ("demo", ["--generate.carry", "order"], "generate: --carry names columns of a --table"),
    ],
)
def test_a_wrong_order_is_refused_when_it_is_given(flow, flags, told):
    source = [] if flow == "demo" else ["--source", "/in"]
    with pytest.raises(PipelineError, match=told) as error:
        parse(flows.FLOWS[flow][1], flow, [*source, *flags])
    assert "\n" not in str(error.value)


def test_a_night_without_a_source_makes_its_order_alone(monkeypatch):
    made = []

    class Steps:
        def make(self, name, config):
            made.append((name, config))
            return "/images"

    monkeypatch.setattr("pipelines.registry.default_model", lambda store, name: f"/{name}")
    night = parse(NightlyConfig, "nightly", ["--name", "faces", "--date", "2026-11-25"])
    assert flows.run_night(night, Steps()) == "/images"
    ((name, order),) = made
    assert (name, order.model, order.seed) == ("generate", "/faces", 20261125)


def test_a_cluster_is_an_address_or_a_block():
    for wrong in ("head:8265", "block/Has Spaces", "ray://head:10001"):
        with pytest.raises(PipelineError, match="--cluster"):
            parse(IngestFlow, "ingest", ["--source", "/in", "--cluster", wrong])
    assert flows.cluster_at("https://head:8265", JobOptions(wait=1)).job.wait == 1
    assert parse(IngestFlow, "ingest", ["--source", "/in", "--cluster", ""]).cluster == "", "as an unset variable gives"


def test_the_job_of_a_flow_is_that_of_the_stage_and_knows_nothing_of_where_it_runs():
    config = parse(GenerateFlow, "generate", ["--model", "/m", "--cluster", "http://head:8265", "--job.cpus", "2"])
    order = flows.order_of(config)
    assert type(order).__name__ == "GenerateConfig"
    assert not {"cluster", "job", "pages", "tensorboard"} & set(type(order).model_fields)


def test_what_is_away_may_be_back_and_what_is_wrong_stays_wrong(monkeypatch):
    def fails(error):
        def run():
            raise error

        return flows.told(run)

    monkeypatch.setattr(flows.runtime, "deployment", SimpleNamespace(id="d"))
    assert flows.may_help(None, None, fails(AwayError("s3://bucket: no answer")))
    assert not flows.may_help(None, None, fails(PipelineError("--steps: too few")))
    assert not flows.may_help(None, None, Failed(message="anything else"))
    monkeypatch.setattr(flows.runtime, "deployment", SimpleNamespace(id=None))
    assert not flows.may_help(None, None, fails(AwayError("somebody sits in front of it")))


def test_only_training_takes_turns_and_only_in_deployments(monkeypatch):
    taken = []

    class Turn:
        def __init__(self, name, **options):
            taken.append((name, options["strict"]))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return False

    class Client:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            return False

        def create_global_concurrency_limit(self, limit):
            taken.append((limit.name, limit.limit))

    monkeypatch.setattr(flows, "concurrency", Turn)
    monkeypatch.setattr(flows, "get_client", lambda **_: Client())
    training = TrainConfig(dataset="/d", name="faces")
    with flows.alone(training):
        assert taken == [], "on a terminal nobody waits for a limit"
    monkeypatch.setattr(flows.runtime, "deployment", SimpleNamespace(id="d"))
    with flows.alone(training), flows.alone(parse(IngestFlow, "ingest", ["--source", "/in"])):
        assert taken == [("train-faces", 1), ("train-faces", True)]


def test_a_cancelled_run_stops_the_job_that_its_labels_name(monkeypatch):
    from pipelines import cluster

    stopped = []
    monkeypatch.setattr(cluster, "stop_job", lambda place, job: stopped.append((place, job)))
    labels = {"ray.cluster": "http://head:8265", "ray.job": "train-1-1", "ray.stop": "/store/stops/train-1-1"}
    run = SimpleNamespace(labels=labels, parameters={"config": {"job": {"grace": 7}}})
    flows.stop_job(None, run, None)
    flows.stop_job(None, SimpleNamespace(labels={}, parameters={"config": {}}), None)
    ((place, job),) = stopped
    assert (place.address, place.job.grace) == ("http://head:8265", 7)
    assert job == cluster.Job("train-1-1", "/store/stops/train-1-1")


def test_automations_are_what_prefect_takes():
    sys.path.insert(0, str(ROOT / "infra"))
    try:
        import automations
    finally:
        sys.path.remove(str(ROOT / "infra"))
    made = json.loads(automations.zombies().model_dump_json())
    assert made["trigger"]["posture"] == "Proactive"
    assert made["actions"][0]["type"] == "change-flow-run-state"
    beats = DEPLOYMENTS["definitions"]["pool"]["job_variables"]["env"]["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"]
    assert made["trigger"]["within"] >= 2 * int(beats), "a heartbeat that comes late is no end"
