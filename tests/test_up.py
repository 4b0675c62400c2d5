"""`make up`: what it would start, and what keeps it from starting. That it all runs is tried in test_flows_chaos.py."""

import configparser
import os
import shlex
import socket
import stat
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT, four_free_ports
from prefect.utilities.templating import apply_values

from pipelines.config import ServeConfig, parse
from pipelines.flow_config import NightlyConfig

sys.path.insert(0, str(ROOT / "infra"))
import up

sys.path.remove(str(ROOT / "infra"))

_DONE = subprocess.CompletedProcess([], 0)


def options(*flags):
    return up.flags().parse_args(["start", *map(str, flags)])


def test_every_program_has_a_port_of_its_own_and_listens_on_this_machine_alone(tmp_path):
    ports = up.ports_of(20000)
    assert len(set(ports.values())) == len(up.PORTS)
    told = up.programs(options("--store", tmp_path / "store"), tmp_path, ports)
    assert list(told) == ["ray", "prefect", "worker", "service", "tensorboard", "pages"]
    for name, command in told.items():
        assert "0.0.0.0" not in command
        assert os.access(shlex.split(command)[0], os.X_OK), name
    serve = shlex.split(told["service"])
    config = parse(ServeConfig, "serve", serve[serve.index("serve") + 1 :])
    assert (config.port, config.cpus, config.wait) == (ports["service"], 0, True)


def test_the_programs_agree_on_addresses_and_the_ray_token_stays_with_its_owner(tmp_path):
    chosen = options("--store", tmp_path, "--name", "faces", "--source", "s3://in/x")
    told = up.environment(chosen, tmp_path, up.ports_of(21000))
    assert told["PREFECT_API_URL"] == "http://127.0.0.1:21000/api"
    assert told["CLUSTER"] == "http://127.0.0.1:21001"
    assert (told["STORE"], told["MODEL_NAME"], told["SOURCE"]) == (str(tmp_path), "faces", "s3://in/x")
    assert told["RAY_AUTH_MODE"] == "token"
    up.make_token(tmp_path / "ray-token")
    token = (tmp_path / "ray-token").read_text()
    up.make_token(tmp_path / "ray-token")
    assert (tmp_path / "ray-token").read_text() == token, "a cluster that is up keeps its token"
    assert stat.S_IMODE((tmp_path / "ray-token").stat().st_mode) == 0o600
    assert token not in str(told)


@pytest.mark.parametrize("source", ["", "s3://in/x"])
def test_without_a_source_hourly_ingestion_rests_and_the_night_still_can_make_its_order(source, tmp_path, monkeypatch):
    chosen, ports = options("--source", source), up.ports_of(0)
    told = yaml.safe_load(up.deployments(chosen, tmp_path).read_text())
    for name, value in up.environment(chosen, tmp_path, ports).items():
        monkeypatch.setenv(name, value)
    by_name = {each["name"]: apply_values(each, {}) for each in told["deployments"]}
    assert by_name["ingest"]["schedules"][0]["active"] is bool(source)
    assert by_name["nightly"]["schedules"][0]["active"] is True
    night = NightlyConfig(**by_name["nightly"]["parameters"]["config"])
    assert night.source == ([source] if source else [])
    assert ("none (--source names where)" in up.addresses(chosen, tmp_path, ports)) is (not source)


def test_a_step_that_fails_is_named_without_the_webhooks_address(tmp_path, monkeypatch, capsys):
    failing = subprocess.CompletedProcess([], 1)
    monkeypatch.setattr(up.subprocess, "run", lambda step, **_: failing if "--webhook" in step else _DONE)
    with pytest.raises(up.UpError, match=r"^infra/automations\.py failed; .*deploy\.log says why$"):
        up.deploy(options("--webhook", "https://hooks.example.org/secret"), {}, tmp_path)
    assert "secret" not in capsys.readouterr().out


def test_a_bucket_has_neither_pages_nor_tensorboard(tmp_path):
    chosen = options("--store", "s3://bucket/store")
    assert list(up.programs(chosen, tmp_path, up.ports_of(0))) == ["ray", "prefect", "worker", "service"]
    told = up.environment(chosen, tmp_path, up.ports_of(0))
    assert (told["PAGES"], told["TENSORBOARD"], told["STORE"]) == ("", "", "s3://bucket/store")


def test_supervisord_reads_the_file_and_stops_whole_groups(tmp_path):
    path = up.supervisor_file(tmp_path, {"one": "echo 100%"}, {"one": {"environment": 'A="b"'}})
    parser = configparser.RawConfigParser()
    parser.read(path)
    section = parser["program:one"]
    assert section["command"] == "echo 100%%"
    assert (section["stopasgroup"], section["killasgroup"], section["environment"]) == ("true", "true", 'A="b"')


def test_a_taken_port_a_long_path_and_a_second_start_are_refused(tmp_path, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert up.main(["start", "--home", "/tmp/" + "x" * 90]) == 1
        with pytest.raises(up.UpError, match=rf"port {port} \(prefect\) is taken .* give --first-port"):
            up.check_free("prefect", port)
    up.check_free("prefect", four_free_ports())
    (tmp_path / "supervisord.pid").write_text(str(os.getpid()))
    assert up.main(["start", "--home", str(tmp_path)]) == 1
    told = capsys.readouterr().err
    assert "sockets need one of 80 or fewer" in told
    assert "runs already; python infra/up.py stop" in told
    (tmp_path / "supervisord.pid").unlink()
    assert up.main(["stop", "--home", str(tmp_path)]) == 0
    assert up.main(["status", "--home", str(tmp_path)]) == 1
