"""A real S3 endpoint: OpenStack Swift on one node with its S3 API.

usage: PYTHON_WITH_SWIFT swift_s3.py ROOT PORT [ADDRESS]

Takes the ports PORT to PORT+3: the first, which speaks S3, on ADDRESS (127.0.0.1), the others on loopback. SIGTERM
stops all; ROOT keeps the data.

Key test:tester, secret testing, region us-east-1, path-style addressing.
"""

import getpass
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

ACCOUNT, USER, SECRET = "test", "tester", "testing"
SERVERS = ("proxy", "account", "container", "object")
FILTERS = (
    "catch_errors gatekeeper healthcheck localcache listing_formats bulk condlock s3api tempauth copy slo dlo "
    "versioned_writes symlink"
)
SETTINGS = {
    "s3api": {"location": "us-east-1", "max_upload_part_num": 10000, "max_multi_delete_objects": 1000},
    "tempauth": {f"user_{ACCOUNT}_{USER}": f"{SECRET} .admin"},
    "slo": {"rate_limit_after_segment": 100000},
    "versioned_writes": {"allow_object_versioning": "true"},
}
LOCAL = {"condlock": "condlock:filter_factory", "localcache": "condlock:cache_factory"}
START_S = 30.0


def section(name: str, values: dict[str, object]) -> str:
    return f"[{name}]\n" + "".join(f"{key} = {value}\n" for key, value in values.items())


def common(root: Path, server: str, port: int, address: str = "127.0.0.1") -> str:
    values = {
        "bind_ip": address,
        "bind_port": port,
        "swift_dir": root / "etc",
        "user": getpass.getuser(),
        "log_level": "WARNING",
        "log_name": server,
        "backlog": 4096,
        "workers": 1 if server in ("proxy", "object") else 0,
    }
    if server == "proxy":
        values |= {"client_timeout": 120}
    else:
        values |= {
            "devices": root / "srv",
            "mount_check": "false",
            "disable_fallocate": "true",
            "fallocate_reserve": 0,
        }
    return section("DEFAULT", values)


def storage_server(root: Path, server: str, port: int) -> str:
    app: dict[str, object] = {"use": f"egg:swift#{server}", "recon_cache_path": root / "cache"}
    return (
        common(root, server, port)
        + section("pipeline:main", {"pipeline": f"{server}-server"})
        + section(f"app:{server}-server", app)
    )


def proxy_server(root: Path, port: int, address: str) -> str:
    app = {
        "use": "egg:swift#proxy",
        "account_autocreate": "true",
        "allow_account_management": "true",
        "node_timeout": 60,
    }
    parts = [
        common(root, "proxy", port, address),
        section("pipeline:main", {"pipeline": f"{FILTERS} proxy-server"}),
        section("app:proxy-server", app),
    ]
    for name in FILTERS.split():
        use = {"paste.filter_factory": LOCAL[name]} if name in LOCAL else {"use": f"egg:swift#{name}"}
        parts.append(section(f"filter:{name}", {**use, **SETTINGS.get(name, {})}))
    return "".join(parts)


def write_files(root: Path, ports: dict[str, int], address: str) -> None:
    for folder in ("etc", "srv/d1", "run", "log", "cache"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    hashing = {"swift_hash_path_suffix": "local", "swift_hash_path_prefix": "local"}
    policy = {"name": "Policy-0", "default": "yes"}
    (root / "etc/swift.conf").write_text(section("swift-hash", hashing) + section("storage-policy:0", policy))
    for server, port in ports.items():
        text = proxy_server(root, port, address) if server == "proxy" else storage_server(root, server, port)
        (root / f"etc/{server}-server.conf").write_text(text)


def build_rings(root: Path, ports: dict[str, int]) -> None:
    from swift.common.ring import RingBuilder

    for server in SERVERS[1:]:
        if (root / f"etc/{server}.ring.gz").exists():
            continue
        builder = RingBuilder(4, 1, 1)
        at = {"ip": "127.0.0.1", "port": ports[server]}
        device = {"region": 1, "zone": 1, "device": "d1", "weight": 1, "meta": "", **at}
        builder.add_dev({**device, "replication_ip": at["ip"], "replication_port": at["port"]})
        builder.rebalance()
        builder.get_ring().save(str(root / f"etc/{server}.ring.gz"))


def start(root: Path, server: str) -> subprocess.Popen[bytes]:
    binary = Path(sys.executable).parent / f"swift-{server}-server"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent)}
    with (root / f"log/{server}.log").open("ab") as log:
        return subprocess.Popen(
            [binary, root / f"etc/{server}-server.conf", "--verbose"],
            stdout=log,
            stderr=log,
            cwd=root,
            env=environment,
            start_new_session=True,
        )


def is_ready(ports: dict[str, int], address: str) -> bool:
    try:
        for server, port in ports.items():
            socket.create_connection((address if server == "proxy" else "127.0.0.1", port), 1).close()
        with urllib.request.urlopen(f"http://{address}:{ports['proxy']}/healthcheck", timeout=1) as answer:
            return answer.status == 200
    except OSError:
        return False


def stop(processes: list[subprocess.Popen[bytes]]) -> None:
    """Each server leads a process group of its own, with its workers in it."""
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
    for process in processes:
        process.wait()


def main(root: Path, port: int, address: str = "127.0.0.1") -> int:
    ports = {server: port + number for number, server in enumerate(SERVERS)}
    write_files(root, ports, address)
    build_rings(root, ports)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    processes = [start(root, server) for server in SERVERS]
    try:
        deadline = time.monotonic() + START_S
        while not is_ready(ports, address):
            if time.monotonic() > deadline or any(process.poll() is not None for process in processes):
                print(f"error: a server did not start; see {root}/log", file=sys.stderr)
                return 1
            time.sleep(0.05)
        print(f"ready http://{address}:{port}", flush=True)
        signal.pause()
    finally:
        stop(processes)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve(), int(sys.argv[2]), *sys.argv[3:]))
