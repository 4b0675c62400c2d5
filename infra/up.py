"""The whole product on one machine, without Docker: `python infra/up.py start`, `status` and `stop`.

A supervisor (supervisord) keeps a Prefect server and a worker with all deployments, a Ray cluster, the service and its
page, TensorBoard and a web server over the store, and starts again what dies. All of them listen on 127.0.0.1 alone.
"""

import argparse
import configparser
import hashlib
import os
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
# What listens, and where unless --first-port says otherwise; the S3 endpoint takes three more ports after its own.
PORTS = {
    "prefect": 4200, "ray": 8265, "service": 8000, "tensorboard": 6006, "pages": 8080, "gcs": 6379, "agent": 52365,
    "agent-grpc": 52366, "runtime-env": 52367, "metrics": 52368, "client": 10001, "s3": 8333,
}  # fmt: skip
_READY_S = 180.0
_STOP_S = 120.0
_SOCKET_BYTES = 100
_HEARTBEAT_S = 30


class UpError(Exception):
    """What keeps it from starting or stopping, in a line that says what to do."""


def flags() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python infra/up.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("do", choices=["start", "status", "stop"])
    parser.add_argument("--home", default="runs/up", help="folder of logs, Prefect's database and the Ray token")
    parser.add_argument("--store", default="runs/demo", help="folder or s3://bucket/prefix that holds all results")
    parser.add_argument("--name", default="cartoons", help="name of dataset, model and service")
    parser.add_argument("--source", default="", help="where new pictures arrive: what nightly and ingest read")
    parser.add_argument("--first-port", type=int, default=0, help="take ports from here on, in place of the usual ones")
    parser.add_argument("--s3", action="store_true", help="a real S3 endpoint as the store (needs .venv-s3)")
    parser.add_argument("--webhook", default="", help="address to post to when a flow fails")
    return parser


def ports_of(first: int) -> dict[str, int]:
    """The port of everything that listens."""
    return {name: first + place for place, name in enumerate(PORTS)} if first else dict(PORTS)


def environment(options: argparse.Namespace, home: Path, ports: dict[str, int]) -> dict[str, str]:
    """What all programs have in their environment beside this process's own."""
    own = {
        "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}",
        "PREFECT_HOME": str(home / "prefect"),
        "PREFECT_API_URL": f"http://127.0.0.1:{ports['prefect']}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(_HEARTBEAT_S),
        "DO_NOT_TRACK": "1",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(home / "ray-token"),
        "RAY_TMPDIR": str(scratch_of(home)),
        "PYTHONUNBUFFERED": "1",
        "PROJECT": str(ROOT),
        "STORE": store_of(options),
        "MODEL_NAME": options.name,
        "SOURCE": options.source,
        "CLUSTER": f"http://127.0.0.1:{ports['ray']}",
        "TENSORBOARD": "",
        "PAGES": "",
    }
    if "://" not in own["STORE"]:
        own |= {name: f"http://127.0.0.1:{ports[name.lower()]}" for name in ("TENSORBOARD", "PAGES")}
    if options.s3:
        own |= {
            "AWS_ACCESS_KEY_ID": "test:tester", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{ports['s3']}",
        }  # fmt: skip
    return own


def scratch_of(home: Path) -> Path:
    """Ray's folder of logs and sockets: its own, for jobs look there for their cluster; short, for sockets' names."""
    return Path(tempfile.gettempdir()) / f"ray-{hashlib.sha256(str(home).encode()).hexdigest()[:8]}"


def store_of(options: argparse.Namespace) -> str:
    """The store's URI, whatever folder programs run in."""
    if options.s3:
        return "s3://pictures/store"
    return str(options.store) if "://" in options.store else str(Path(options.store).resolve())


def programs(options: argparse.Namespace, home: Path, ports: dict[str, int]) -> dict[str, str]:
    """Command of each program by its name, in the order of starting."""
    store, own = store_of(options), str(BIN / "python")
    ray = {
        "--port": ports["gcs"], "--dashboard-port": ports["ray"], "--ray-client-server-port": ports["client"],
        "--dashboard-agent-listen-port": ports["agent"], "--dashboard-agent-grpc-port": ports["agent-grpc"],
        "--runtime-env-agent-port": ports["runtime-env"], "--metrics-export-port": ports["metrics"],
        "--object-store-memory": 400_000_000, "--node-ip-address": "127.0.0.1",
    }  # fmt: skip
    named: dict[str, list[str]] = {
        "ray": [str(BIN / "ray"), "start", "--head", "--block", "--disable-usage-stats",
                *(f"{flag}={value}" for flag, value in ray.items())],
        "prefect": [str(BIN / "prefect"), "server", "start", "--host", "127.0.0.1", "--port", str(ports["prefect"])],
        "worker": [str(BIN / "prefect"), "worker", "start", "--pool", "image-diffusion", "--type", "process"],
        # It holds no CPU of Ray's: on a small machine training could not start beside it.
        "service": [own, "-m", "pipelines", "serve", "--store", store, "--name", options.name,
                    "--port", str(ports["service"]), "--cpus", "0", "--wait"],
    }  # fmt: skip
    if options.s3:
        python = ROOT / ".venv-s3/bin/python"
        if not python.exists():
            raise UpError("--s3: no S3 endpoint is installed; run make setup, or leave --s3 out for a folder")
        serve = [str(python), str(ROOT / "tests/support/swift_s3.py"), str(home / "s3"), str(ports["s3"])]
        named = {"s3": serve, **named}
    elif "://" not in store:
        os.makedirs(store, exist_ok=True)
        listens = ["--host", "127.0.0.1", "--port", str(ports["tensorboard"])]
        named["tensorboard"] = [str(BIN / "tensorboard"), "--logdir", f"{store}/models", *listens]
        named["pages"] = [own, "-m", "http.server", "--bind", "127.0.0.1", "--directory", store, str(ports["pages"])]
    return {name: shlex.join(command) for name, command in named.items()}


def supervisor_file(home: Path, named: dict[str, str], more: dict[str, dict[str, str]]) -> Path:
    """Write what supervisord reads; its path."""
    parser = configparser.RawConfigParser()
    socket_file = home / "supervisor.sock"
    parser["unix_http_server"] = {"file": str(socket_file), "chmod": "0700"}
    parser["supervisord"] = {
        "logfile": str(home / "supervisord.log"), "pidfile": str(home / "supervisord.pid"),
        "childlogdir": str(home), "directory": str(ROOT), "identifier": "image-diffusion",
    }  # fmt: skip
    parser["rpcinterface:supervisor"] = {
        "supervisor.rpcinterface_factory": "supervisor.rpcinterface:make_main_rpcinterface"
    }
    parser["supervisorctl"] = {"serverurl": f"unix://{socket_file}"}
    for place, (name, command) in enumerate(named.items()):
        parser[f"program:{name}"] = {
            "command": command.replace("%", "%%"), "priority": str(place), "redirect_stderr": "true",
            "stdout_logfile": str(home / f"{name}.log"), "stdout_logfile_maxbytes": "10MB",
            "stdout_logfile_backups": "2", "autorestart": "true", "startsecs": "5", "startretries": "1000",
            "stopasgroup": "true", "killasgroup": "true", "stopwaitsecs": "60", **more.get(name, {}),
        }  # fmt: skip
    path = home / "supervisord.conf"
    with path.open("w") as file:
        parser.write(file)
    return path


def start(options: argparse.Namespace, home: Path) -> None:
    """Start everything and put the deployments in place. Raises UpError where something is in the way."""
    if is_up(home):
        raise UpError(f"{home}: runs already; python infra/up.py stop --home {home} first")
    if len(str(home / "supervisor.sock")) > _SOCKET_BYTES:
        raise UpError(f"--home {home}: a path of {len(str(home))} characters; sockets need one of 80 or fewer")
    ports = ports_of(options.first_port)
    for name, port in ports.items():
        check_free(name, port)
    home.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(scratch_of(home), ignore_errors=True)
    scratch_of(home).mkdir(mode=0o700)
    make_token(home / "ray-token")
    shared = {**os.environ, **environment(options, home, ports)}
    # The service joins the Ray cluster; the flows must not, for they submit jobs to it.
    more = {
        "service": {"environment": f'RAY_ADDRESS="127.0.0.1:{ports["gcs"]}"'},
        "worker": {"autostart": "false"},  # once there is a server: it listens to it only if it can at its start
    }
    path = supervisor_file(home, programs(options, home, ports), more)
    subprocess.run([str(BIN / "supervisord"), "-c", str(path)], env=shared, cwd=ROOT, check=True)
    try:
        if options.s3:
            make_bucket(shared, home)
        wait_for("Prefect", f"{shared['PREFECT_API_URL']}/health", home, "prefect")
        wait_for("Ray", f"{shared['CLUSTER']}/api/version", home, "ray", token=(home / "ray-token").read_text())
        deploy(options, shared, home)
        control(home, "start", "worker")
    except UpError:
        stop(home)
        raise
    print(addresses(options, home, ports))


def make_bucket(shared: dict[str, str], home: Path) -> None:
    """Make the bucket of the store. Raises UpError where the endpoint does not come up."""
    import s3fs

    wait_for("S3", f"{shared['AWS_ENDPOINT_URL']}/healthcheck", home, "s3")
    files = s3fs.S3FileSystem(
        key=shared["AWS_ACCESS_KEY_ID"], secret=shared["AWS_SECRET_ACCESS_KEY"],
        endpoint_url=shared["AWS_ENDPOINT_URL"],
        client_kwargs={"region_name": shared["AWS_DEFAULT_REGION"]},
    )  # fmt: skip
    bucket = shared["STORE"].removeprefix("s3://").split("/")[0]
    if not files.exists(bucket):
        files.mkdir(bucket)


def deploy(options: argparse.Namespace, shared: dict[str, str], home: Path) -> None:
    """Work pool, deployments and automations on the server. Raises UpError that names what failed."""
    prefect = str(BIN / "prefect")
    webhook = ["--webhook", options.webhook] if options.webhook else []
    file = str(deployments(options, home))
    # Their arguments are not told: a webhook's address is a secret.
    steps = {
        "prefect work-pool": [prefect, "work-pool", "create", "image-diffusion", "--type", "process", "--overwrite"],
        "prefect deploy": [prefect, "--no-prompt", "deploy", "--all", "--prefect-file", file],
        "infra/automations.py": [str(BIN / "python"), "infra/automations.py", *webhook],
    }
    with (home / "deploy.log").open("w") as log:
        for name, step in steps.items():
            print(f"up: {name}", flush=True)
            if subprocess.run(step, env=shared, cwd=ROOT, stdout=log, stderr=log, check=False).returncode:
                raise UpError(f"{name} failed; {home / 'deploy.log'} says why")


def deployments(options: argparse.Namespace, home: Path) -> Path:
    """Write what Prefect deploys; its path. Without a source hourly ingestion has nothing to read: it rests."""
    told = yaml.safe_load((ROOT / "infra/prefect.yaml").read_text())
    for each in told["deployments"]:
        if each["name"] == "ingest":
            each["schedules"] = [{**schedule, "active": bool(options.source)} for schedule in each["schedules"]]
    path = home / "prefect.yaml"
    path.write_text(yaml.safe_dump(told, sort_keys=False))
    return path


def check_free(name: str, port: int) -> None:
    """Raise UpError where something listens on the port."""
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise UpError(f"port {port} ({name}) is taken by another program; stop that, or give --first-port")


def make_token(path: Path) -> None:
    """A token for Ray in a file that its owner alone reads; one that is there stays."""
    if not path.exists():
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))


def wait_for(name: str, url: str, home: Path, program: str, token: str | None = None) -> None:
    """Wait until an address answers. Raises UpError where it does not."""
    print(f"up: waiting for {name} at {url.split('/api')[0]}", flush=True)
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    deadline = time.monotonic() + _READY_S
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(request, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise UpError(f"{name} does not answer at {url} after {_READY_S:g} s; {home / program}.log says why")


def is_up(home: Path) -> bool:
    """Whether the supervisor of this home runs."""
    try:
        os.kill(int((home / "supervisord.pid").read_text()), 0)
    except (OSError, ValueError):
        return False
    return True


def control(home: Path, *words: str) -> None:
    """Tell the supervisor something; what it answers is printed."""
    subprocess.run([str(BIN / "supervisorctl"), "-c", str(home / "supervisord.conf"), *words], check=False)


def status(home: Path) -> None:
    """Print what runs. Raises UpError where nothing does."""
    if not is_up(home):
        raise UpError(f"{home}: nothing runs; make up starts it")
    control(home, "status")


def stop(home: Path) -> None:
    """Stop what was started, and wait until it is gone. Raises UpError where that does not happen."""
    if not is_up(home):
        print(f"{home}: nothing runs")
        return
    control(home, "shutdown")
    deadline = time.monotonic() + _STOP_S
    while is_up(home):
        if time.monotonic() > deadline:
            raise UpError(f"{home}: still runs after {_STOP_S:g} s; {home / 'supervisord.log'} says what")
        time.sleep(0.5)


def addresses(options: argparse.Namespace, home: Path, ports: dict[str, int]) -> str:
    """Where everything is, in words."""
    at = {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}
    store = store_of(options)
    lines = [
        ("the page and the API", f"{at['service']}    (once there is a model of {options.name})"),
        ("Prefect: flows, runs", at["prefect"]),
        ("Ray dashboard", f"{at['ray']}    (token in {home / 'ray-token'})"),
        ("store", store),
        *([] if "://" in store else [("its pages", at["pages"]), ("TensorBoard", at["tensorboard"])]),
        ("new pictures", options.source or "none (--source names where): the night makes its order alone"),
        ("logs", f"{home}    (Ray's: {scratch_of(home)})"),
    ]  # fmt: skip
    told = "\n".join(f"  {name:<22}{where}" for name, where in lines)
    return (
        f"everything runs; make down stops it\n{told}\n\nto drive it from a shell:\n"
        f"  export PREFECT_API_URL={at['prefect']}/api\n  prefect deployment run demo/demo --watch"
    )


def main(arguments: list[str]) -> int:
    """Do what the first argument says; returns the exit status."""
    options = flags().parse_args(arguments)
    home = Path(options.home).resolve()
    try:
        if options.do == "start":
            start(options, home)
        elif options.do == "status":
            status(home)
        else:
            stop(home)
    except UpError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
