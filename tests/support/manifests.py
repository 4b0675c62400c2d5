"""Checks of a folder like infra/: against the schemas of those who read its files, and against the code."""

import ast
import fnmatch
import functools
import ipaddress
import itertools
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import kubernetes_validate
import yaml
from support import kuberay

from pipelines.config import parse
from pipelines.jobs import STAGES

ROOT = Path(__file__).resolve().parent.parent.parent
PROGRAMS = Path(sys.executable).parent
# What infra/compose.yaml must be told, beside what it has defaults for.
SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "RAY_AUTH_TOKEN", "PREFECT_AUTH", "GRAFANA_PASSWORD")
# Images of others: their commands and environment are theirs.
FOREIGN = {"chrislusf/seaweedfs", "prom/prometheus", "grafana/grafana"}
SECRET_NAME = re.compile(r"KEY|SECRET|TOKEN|PASSWORD|AUTH_STRING")
# Third parties' fixed ports: Ray's GCS, Kubernetes' API, DNS, TLS, SeaweedFS' S3, Prometheus, Grafana.
FIXED = {6379, 6443, 53, 443, 8333, 9090, 3000}


def kubernetes_objects(folder):
    """(file name, object) of every document."""
    for path in sorted((folder / "kuberay").glob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text()):
            yield path.name, document


def check_kubernetes(folder):
    for _, document in kubernetes_objects(folder):
        if document["kind"] in kuberay.SPECS:
            kuberay.validate(document)
        else:
            kubernetes_validate.validate(document, kuberay.KUBERNETES, strict=True)


def check_launcher(folder):
    from ray.autoscaler._private.util import validate_config

    config = yaml.safe_load((folder / "ray-cluster.yaml").read_text())
    validate_config(config)
    nodes = config["available_node_types"]
    assert nodes[config["head_node_type"]]["node_config"].get("InstanceMarketOptions") is None, "the head is on demand"
    workers = [node["node_config"] for name, node in nodes.items() if name != config["head_node_type"]]
    assert all(node["InstanceMarketOptions"]["MarketType"] == "spot" for node in workers)
    assert all(node["node_config"].get("ImageId") for node in nodes.values()), "Ray's own choice has an old driver"
    assert "--gpus all" in config["docker"].get("worker_run_options", ()), "containers see no GPU"
    registry, region = config["docker"]["image"].partition("/")[0], config["provider"]["region"]
    assert registry.endswith(f".{region}.amazonaws.com"), f"{registry} is not in {region}"
    assert config["initialization_commands"] == [
        f"aws ecr get-login-password --region {region} | docker login --username AWS --password-stdin {registry}"
    ]


def compose(folder, without=()):
    """(the file as Docker Compose resolves it, as JSON; what it complains of). This build of it always exits with 0."""
    environment = {name: "told" for name in SECRETS if name not in without} | {"HOME": "/nonexistent"}
    command = [str(PROGRAMS / "docker-compose"), "--file", str(folder / "compose.yaml"), "--profile", "*"]
    run = subprocess.run(
        [*command, "config", "--format", "json"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return run.stdout, run.stderr


@functools.lru_cache(maxsize=4)
def composed(folder):
    """compose.yaml as Compose has resolved it."""
    told, trouble = compose(folder)
    assert not trouble, trouble
    return json.loads(told)


def services(folder):
    """The services as Compose has resolved them."""
    return composed(folder)["services"]


def check_compose(folder):
    found = services(folder)
    for name, service in found.items():
        repository, _, tag = service["image"].rpartition(":")
        assert repository in FOREIGN | {"images"}, f"{name}: {service['image']}: who is that?"
        assert repository == "images" or re.match(r"v?\d+\.\d+", tag), f"{name}: {service['image']} has no version"
        assert service.get("healthcheck"), f"{name} has no healthcheck"
        for port in service.get("ports", ()):
            assert port.get("host_ip") == "127.0.0.1", f"{name} listens for the world on {port['published']}"
        for volume in service.get("volumes", ()):
            assert volume["type"] == "volume" or Path(volume["source"]).is_file(), f"{name}: {volume['source']}"
        for other, how in service.get("depends_on", {}).items():
            checked = not found[other].get("healthcheck", {}).get("disable")
            assert checked, f"{name} waits for {other}, which has no healthcheck"
            assert how["condition"] == "service_healthy", f"{name} does not wait for {other}"


def check_networks(folder):
    """Ray's nodes take addresses of the network that all of them are on, and whoever names a service reaches it."""
    found, cluster = services(folder), composed(folder)["networks"]["cluster"]
    head = found["ray-head"]["networks"]["cluster"]["ipv4_address"]
    (pool,) = cluster["ipam"]["config"]
    assert ipaddress.ip_address(head) in ipaddress.ip_network(pool["subnet"])
    assert ipaddress.ip_address(head) not in ipaddress.ip_network(pool["ip_range"]), "another could take it first"
    for name, service in found.items():
        command = service.get("command") or []
        if command[:2] == ["ray", "start"]:
            flag, told = ("--node-ip-address", head) if "--head" in command else ("--address", f"{head}:6379")
            assert command[command.index(flag) + 1] == told, f"{name}: {flag} is not {told}"
            assert "cluster" in service["networks"], f"{name} is not on the network of the cluster"
        for asker, url in _asked(name, service):
            shared = found[asker]["networks"].keys() & found.get(url.hostname, service)["networks"].keys()
            assert shared, f"{asker} shares no network with {url.hostname}"


def _asked(name, service):
    """(who asks, address) of the services that a service is told of; flows ask for CLUSTER where they run."""
    for word in service.get("command") or ():
        yield from ((name, urlsplit(url)) for url in re.findall(r"http://[^\s\"]+", word))
    for variable, value in (service.get("environment") or {}).items():
        if value.startswith("http://"):
            yield "prefect-worker" if variable == "CLUSTER" else name, urlsplit(value)


STORE_FLAGS = {
    "-master.telemetry=false", "-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0",
}  # fmt: skip


def check_store(folder):
    """The store opens what is used of it, and sends nothing home."""
    missing = STORE_FLAGS - set(services(folder)["store"]["command"])
    assert not missing, f"store: without {missing}"


def check_dockerfile(folder):
    path = folder / "Dockerfile"
    run = subprocess.run([PROGRAMS / "hadolint", "--no-color", path], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout
    stages, steps = set(), instructions(path)
    for name, rest in steps:
        if name == "FROM":
            image, _, alias = rest.partition(" AS ")
            assert image in stages or re.search(r":\d+\.\d+", image), f"{image} has no version"
            stages.add(alias)
        if name == "COPY" and not rest.startswith("--from"):
            for source in shlex.split(rest)[:-1]:
                assert (ROOT / source).exists(), f"COPY {source}: there is no such file"
                assert f"!{source}" in (ROOT / ".dockerignore").read_text().splitlines(), f"{source} is ignored"
    last = [rest for name, rest in steps if name == "USER"][-1]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", last), f"USER {last}: need a number, and not root's"
    environment = dict(pair.split("=", 1) for name, rest in steps if name == "ENV" for pair in shlex.split(rest))
    assert environment["PIP_CONSTRAINT"] == "/build/constraints.txt"
    runs = " ".join(rest for name, rest in steps if name == "RUN")
    path = environment["PATH"].replace("$", r"\$")
    login = f'echo "export PATH={path}" > /etc/profile.d/venv.sh'
    assert login in runs, "login shells, in which Ray's launcher runs commands, would not find ray"
    assert {"rsync", "openssh-client"} <= set(runs.split()), (
        "Ray's launcher copies by rsync, and reaches workers by ssh"
    )
    assert not [name for name in environment if SECRET_NAME.search(name)], "secrets have no place in an image"


def instructions(path):
    """(name, rest) of a Dockerfile's instructions, their lines joined."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    return [tuple(re.sub(r" +", " ", line).split(" ", 1)) for line in joined.splitlines() if line.strip()]


def commands(folder):
    """(where, words) of every command that runs a program of ours, of Ray's or of Prefect's."""
    for name, service in services(folder).items():
        if service["image"].rpartition(":")[0] not in FOREIGN:
            yield name, service["command"]
    launcher = yaml.safe_load((folder / "ray-cluster.yaml").read_text())
    for line in launcher["head_start_ray_commands"] + launcher["worker_start_ray_commands"]:
        yield "ray-cluster.yaml", shlex.split(line)
    for name, document in kubernetes_objects(folder):
        spec = document["spec"]
        if document["kind"] == "RayJob":
            yield name, shlex.split(spec["entrypoint"])
        for container in containers(document):
            if "command" in container:
                yield name, container["command"]
        for group in ray_groups(document):
            words = [f"--{flag}={value}" for flag, value in group["rayStartParams"].items()]
            yield name, ["ray", "start", "--address=head:6379", *words]
    (line,) = re.findall(r"^# (python .*)$", (folder / "kuberay/service.yaml").read_text(), flags=re.M)
    yield "service.yaml", shlex.split(line)
    for name, rest in instructions(folder / "Dockerfile"):
        if name == "CMD":
            yield "Dockerfile", json.loads(rest)


def ray_groups(document):
    """Head and workers of a custom resource."""
    spec = document["spec"]
    cluster = spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]] if "headGroupSpec" in cluster else []


def containers(document):
    """All containers of an object."""
    templates = [group["template"] for group in ray_groups(document)]
    templates += [document["spec"]["template"]] if document["kind"] == "Deployment" else []
    return [container for template in templates for container in template["spec"]["containers"]]


def check_commands(folder):
    seen = set()
    for where, words in commands(folder):
        for part in _parts(words):
            try:
                _check_command(part)
            except Exception as error:
                raise AssertionError(f"{where}: {' '.join(part)}: {error}") from error
            seen.add(part[0])
    assert seen == {"python", "ray", "serve", "prefect"}


def check_submitters(folder):
    """The network policy lets in the pods that submit the RayJobs, by the names of these."""
    documents = [document for _, document in kubernetes_objects(folder)]
    jobs = {document["metadata"]["name"] for document in documents if document["kind"] == "RayJob"}
    (policy,) = [document["spec"] for document in documents if document["kind"] == "NetworkPolicy"]
    selected = [
        (expression["values"], rule["ports"])
        for rule in policy["ingress"]
        for peer in rule["from"]
        for expression in peer.get("podSelector", {}).get("matchExpressions", ())
        if (expression["key"], expression["operator"]) == ("batch.kubernetes.io/job-name", "In")
    ]
    ((names, ports),) = selected
    assert set(names) == jobs, f"let in are {names}, but the RayJobs are {jobs}"
    assert [port["port"] for port in ports] == [8265]


def check_pools(folder):
    """Workers poll the pool that the deployments are in; the files that commands name are in the image."""
    pool = yaml.safe_load((folder / "prefect.yaml").read_text())["definitions"]["pool"]["name"]
    polled = {words[words.index("--pool") + 1] for _, words in commands(folder) if "--pool" in words}
    assert polled == {pool}, f"workers poll {polled}, but deployments are in {pool}"


def _parts(words):
    """The commands of a line, those of `sh -c` one by one."""
    if words[0] == "nohup":
        return [list(itertools.takewhile(lambda word: not word.startswith((">", "2>", "&")), words[1:]))]
    if words[:2] != ["sh", "-c"]:
        return [words]
    return [shlex.split(part) for part in words[2].split("&&")]


def _check_command(words):
    """Raises where a program would not take these words."""
    match words:
        case ["python", "-m", "pipelines", "--help"]:
            return
        case ["python", script] if script.startswith("/app/"):
            assert (ROOT / script.removeprefix("/app/")).is_file(), f"no file {script}"
        case ["python", "-m", "pipelines", stage, *flags]:
            parse(STAGES[stage].flags, "pipelines", flags)
        case ["ray", name, *flags]:
            from ray.scripts.scripts import cli

            cli.commands[name].make_context(name, flags)
        case ["serve", name, *flags]:
            from ray.serve.scripts import cli as serve

            serve.commands[name].make_context(name, flags)
        case ["prefect", *flags]:
            from prefect.cli._app import _app

            _app.parse_args(flags, exit_on_error=False, print_error=False)
        case _:
            raise AssertionError("a program that nobody knows")


def environments(folder):
    """(where, name, value or reference) of every variable that is set."""
    raw = yaml.safe_load((folder / "compose.yaml").read_text())["services"]
    for service, resolved in services(folder).items():
        if resolved["image"].rpartition(":")[0] not in FOREIGN:
            for name in resolved.get("environment") or {}:
                yield service, name, _merged(raw[service]["environment"])[name]
    for name, rest in instructions(folder / "Dockerfile"):
        if name == "ENV":
            for pair in shlex.split(rest):
                yield ("Dockerfile", *pair.split("=", 1))
    for where, document in kubernetes_objects(folder):
        for container in containers(document):
            for variable in container.get("env", ()):
                yield where, variable["name"], variable.get("value", variable.get("valueFrom"))


def _merged(environment):
    """A mapping with `<<` whose value is a list of mappings, which YAML leaves to its reader."""
    more = environment.get("<<", {})
    parts = more if isinstance(more, list) else [more]
    return {name: value for part in [*parts, environment] for name, value in part.items() if name != "<<"}


def known_variables():
    """Names that something reads: Python, pip, botocore, Prefect, Ray."""
    from botocore.configprovider import BOTOCORE_DEFAUT_SESSION_VARIABLES
    from botocore.credentials import EnvProvider
    from prefect.settings import Settings
    from prefect.settings.legacy import _get_settings_fields
    from ray._common.usage.usage_constants import USAGE_STATS_ENABLED_ENV_VAR

    names = {"PATH", "PYTHONPATH", "PYTHONUNBUFFERED", "DO_NOT_TRACK", "AWS_ENDPOINT_URL", USAGE_STATS_ENABLED_ENV_VAR}
    names |= {"PIP_NO_CACHE_DIR", "PIP_DISABLE_PIP_VERSION_CHECK", "PIP_CONSTRAINT"}
    for _, told, *_ in BOTOCORE_DEFAUT_SESSION_VARIABLES.values():
        names |= set(told if isinstance(told, list) else [told])
    names |= {EnvProvider.ACCESS_KEY, EnvProvider.SECRET_KEY}
    names |= set(re.findall(r"\$([A-Z_]+) ", (ROOT / "infra/prefect.yaml").read_text()))
    return names | set(_get_settings_fields(Settings)) | {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"}


def check_environment(folder):
    known = known_variables()
    for where, name, value in environments(folder):
        assert name in known, f"{where}: nothing reads {name}"
        if SECRET_NAME.search(name):
            by_reference = "secretKeyRef" in value if isinstance(value, dict) else re.match(r"\$\{\w+:\?", value)
            assert by_reference, f"{where}: {name} stands there in clear"


def ports_of_the_code():
    """Ports that the programs of the manifests listen on, by what they are told and what is their default."""
    from prefect.settings import Settings
    from ray._private import ray_constants

    from pipelines.config import ServeConfig

    settings = Settings()
    return FIXED | {
        ray_constants.DEFAULT_DASHBOARD_PORT, ray_constants.DEFAULT_DASHBOARD_AGENT_LISTEN_PORT,
        settings.server.api.port, settings.worker.webserver.port, ServeConfig.model_fields["port"].default,
    }  # fmt: skip


def ports(folder):
    """(where, port) of every port that is named."""
    for name, service in services(folder).items():
        yield from ((name, port["target"]) for port in service.get("ports", ()))
    for where, url in urls(folder):
        if url.port is not None:
            yield where, url.port
    for where, document in kubernetes_objects(folder):
        for container in containers(document):
            yield from ((where, port["containerPort"]) for port in container.get("ports", ()))
        for rule in document["spec"].get("ingress", []) + document["spec"].get("egress", []):
            yield from ((where, port["port"]) for port in rule.get("ports", ()))
        for group in ray_groups(document):
            yield where, int(group["template"]["metadata"]["annotations"]["prometheus.io/port"])
    for job in yaml.safe_load((folder / "prometheus.yaml").read_text())["scrape_configs"]:
        yield from (("prometheus.yaml", found["port"]) for found in job["dns_sd_configs"])


def urls(folder):
    """(where, parts) of every http address."""
    for path in sorted(folder.rglob("*")):
        if path.name in ("compose.yaml", "Dockerfile", "datasources.yaml"):
            for url in re.findall(r"https?://[^\s\"'\]]+", path.read_text()):
                yield path.name, urlsplit(url)


def check_ports(folder):
    known = ports_of_the_code()
    for where, port in ports(folder):
        assert port in known, f"{where}: nothing listens on {port}"
    exporters = {
        flag for _, words in commands(folder) for flag in re.findall(r"metrics-export-port[ =](\d+)", " ".join(words))
    }
    scraped = {port for where, port in ports(folder) if where == "prometheus.yaml"}
    assert {str(port) for port in scraped} == exporters == {"8080"}


def check_addresses(folder):
    """Hosts are services of the Compose file, paths are ones that their programs answer without a token."""
    from ray.dashboard import http_server_agent, http_server_head

    answered = Path(http_server_head.__file__).read_text() + Path(http_server_agent.__file__).read_text()
    answered += '"/api/health" "/health" "/healthz" "/-/healthy" "/api" ""'
    hosts = {*services(folder), "127.0.0.1", "download.pytorch.org"}
    for where, url in urls(folder):
        assert url.hostname in hosts, f"{where}: {url.hostname} is nobody"
        assert url.hostname == "download.pytorch.org" or f'"{url.path}"' in answered, f"{where}: no path {url.path}"
    for job in yaml.safe_load((folder / "prometheus.yaml").read_text())["scrape_configs"]:
        for found in job["dns_sd_configs"]:
            assert set(found["names"]) <= hosts, found["names"]


def exported_metrics():
    """Names under which Ray exports the metrics that the code makes."""
    suffixes = {"Gauge": [""], "Counter": ["_total"], "Histogram": ["_bucket", "_sum", "_count"]}
    names = set()
    for path in (ROOT / "pipelines").rglob("metrics.py"):
        tree = ast.parse(path.read_text())
        for call in ast.walk(tree):
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") in suffixes:
                for name in _names_made(call, tree):
                    names |= {f"ray_{name}{suffix}" for suffix in suffixes[call.func.id]}
    return names


def _names_made(call, tree):
    """The metric's name; all of the module's where a table gives it."""
    if isinstance(call.args[0], ast.Constant):
        return [call.args[0].value]
    texts = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return [text for text in texts if re.fullmatch(r"diffusion_\w+", text)]


def check_dashboards(folder):
    exported, shown = exported_metrics(), set()
    for path in (folder / "grafana").glob("*.json"):
        dashboard = json.loads(path.read_text())
        assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
        for panel in dashboard["panels"]:
            assert panel["targets"], f"{path.name}: {panel['title']} shows nothing"
            for target in panel["targets"]:
                named = set(re.findall(r"ray_\w+", target["expr"]))
                assert named, f"{path.name}: {target['expr']}"
                assert named <= exported, f"{path.name}: nothing exports {named - exported}"
                shown |= named
    bases = {re.sub(r"_(bucket|sum|count)$", "", name) for name in exported}
    missing = bases - {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown}
    assert not missing, f"no panel shows {missing}"


def check_policy(folder):
    policy = json.loads((folder / "bucket-policy.json").read_text())
    for statement in policy["Statement"]:
        assert set(statement) <= {"Sid", "Effect", "Action", "Resource", "Condition"}
        for resource in statement["Resource"]:
            assert re.fullmatch(r"arn:aws:s3:::(BUCKET|SOURCES)(/store/\*|/\*)?", resource), resource
            objects = "/" in resource
            assert all(objects != (action == "s3:ListBucket") for action in statement["Action"]), statement["Sid"]
            if "SOURCES" in resource:
                assert set(statement["Action"]) <= {"s3:GetObject", "s3:ListBucket"}, "sources are only read"


def check_least(folder):
    """The policy reaches the store and the sources and nothing else; what of it only reads is enough for a service."""
    policy = json.loads((folder / "bucket-policy.json").read_text())
    reader = {"Statement": [each for each in policy["Statement"] if not WRITING & set(each["Action"])]}
    assert allows(policy, Asked("s3:ListBucket", "SOURCES"))
    assert allows(policy, Asked("s3:GetObject", "SOURCES/a.tar"))
    assert allows(reader, Asked("s3:ListBucket", "BUCKET", "store/models/"))
    assert allows(reader, Asked("s3:ListBucket", "BUCKET")), "who may not list is not told that an object is missing"
    assert not allows(policy, Asked("s3:ListBucket", "BUCKET", "other/"))
    for config in served(folder):
        for uri in (config.key_file, f"{config.store}/models/cartoons/promotions/000001.json"):
            place = uri.replace("s3://images/", "BUCKET/")
            assert allows(reader, Asked("s3:GetObject", place)), f"a service that only reads may not read {uri}"
    for action in {"s3:GetObject", *WRITING}:
        assert allows(policy, Asked(action, "BUCKET/store/object"))
        assert not allows(policy, Asked(action, "BUCKET/other/object")), f"{action} outside the store"


WRITING = {"s3:PutObject", "s3:AbortMultipartUpload", "s3:DeleteObject"}


class Asked(NamedTuple):
    """What a request of S3 needs: an action on a bucket or an object, and the prefix that a listing names."""

    action: str
    place: str
    prefix: str | None = None


def allows(policy, asked):
    """Whether one of the policy's statements lets this be done."""
    return any(
        asked.action in statement["Action"]
        and any(fnmatch.fnmatchcase(f"arn:aws:s3:::{asked.place}", pattern) for pattern in statement["Resource"])
        and all(_holds(*condition, asked.prefix) for condition in statement.get("Condition", {}).items())
        for statement in policy["Statement"]
    )


def _holds(operator, wanted, prefix):
    """Whether a condition on the prefix holds; where none is named, as for an object, only an IfExists one does."""
    assert operator in ("StringLike", "StringLikeIfExists"), operator
    if prefix is None:
        return operator.endswith("IfExists")
    return any(fnmatch.fnmatchcase(prefix, pattern) for pattern in wanted["s3:prefix"])


def served(folder):
    """The settings of every service that a command starts."""
    for _, words in commands(folder):
        for part in _parts(words):
            if part[:4] == ["python", "-m", "pipelines", "serve"]:
                yield parse(STAGES["serve"].flags, "pipelines", part[4:])


def check_service(folder):
    """serveConfigV2 is what the command above it writes."""
    from pipelines.serve.stage import deployed

    text = (folder / "kuberay/service.yaml").read_text()
    (line,) = re.findall(r"^# python -m pipelines serve (.*)$", text, flags=re.M)
    wanted = deployed(parse(STAGES["serve"].flags, "pipelines", shlex.split(line)))
    assert yaml.safe_load(yaml.safe_load(text)["spec"]["serveConfigV2"]) == wanted


def check_versions(folder):
    """Ray of the manifests is Ray of the image, whose Python is Debian's."""
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    for where, document in kubernetes_objects(folder):
        for version in re.findall(r"'rayVersion': '([^']*)'", str(document)):
            assert version == pinned["ray"], f"{where}: rayVersion {version}, but constraints.txt has {pinned['ray']}"


def check_grafana(folder):
    """What Grafana is given is where it looks."""
    grafana = services(folder)["grafana"]
    targets = {
        volume["target"]: Path(volume["source"]).name for volume in grafana["volumes"] if volume["type"] == "bind"
    }
    provider = yaml.safe_load((folder / "grafana/provisioning/dashboards.yaml").read_text())["providers"][0]
    shown = {name for target, name in targets.items() if target.startswith(provider["options"]["path"])}
    assert shown == {path.name for path in (folder / "grafana").glob("*.json")}
    (source,) = yaml.safe_load((folder / "grafana/provisioning/datasources.yaml").read_text())["datasources"]
    assert source["type"] == "prometheus"


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]
