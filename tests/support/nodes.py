"""A Ray cluster of nodes on this machine, each with an address, processes, a /tmp/ray and a /dev/shm of its own.

A node is a process in a network namespace on a bridge, and the first of its PID namespace: when it is killed, the
kernel kills all that it has started. Whatever is to be reached from all nodes listens on the bridge's own address.
Needs root, iproute2 and util-linux; Ray's tokens are asked for everywhere.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

PORT, DASHBOARD = 6379, 8265
START_S, PAUSE_S = 90.0, 0.1
_TOOLS = ("ip", "ss", "unshare", "nsenter", "setpriv", "hostname")
# Nodes share the machine's files but for what Ray keeps and what tells names: those would be another's.
_BOOT = """
set -e
mount --bind "$NODE_FOLDER/ray" /tmp/ray
mount -t tmpfs -o size=600m tmpfs /dev/shm
mount --bind "$NODE_FOLDER/hosts" /etc/hosts
hostname "$NODE_NAME"
"$@"
exit $?
"""


def missing():
    """Why there can be no such cluster here; None where there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    lacking = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if lacking:
        return f"no {lacking[0]}: install iproute2 and util-linux"
    probe = f"rp{os.getpid()}"
    try:
        for words in (("netns", "add", probe), ("link", "add", probe, "type", "bridge")):
            done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
            if done.returncode:
                return f"ip {' '.join(words)}: {done.stderr.strip()}"
    finally:
        for words in (("netns", "del", probe), ("link", "del", probe)):
            subprocess.run(["ip", *words], capture_output=True, check=False)
    return None


class Network:
    """A bridge with an address of this machine's on it: HOST.254, the nodes' way to whatever listens there."""

    def __init__(self):
        _sweep()
        self.tag = f"r{os.getpid()}"
        self.prefix = _free_prefix()
        self.address = f"{self.prefix}.254"
        _ip("link", "add", f"{self.tag}b", "type", "bridge")
        _ip("addr", "add", f"{self.address}/24", "dev", f"{self.tag}b")
        _ip("link", "set", f"{self.tag}b", "up")

    def plug(self, number):
        """A namespace of a number's address on the bridge; its name, and its cable's."""
        name, cable, inner = (f"{self.tag}{kind}{number}" for kind in "nve")
        _ip("netns", "add", name)
        _ip("link", "add", cable, "type", "veth", "peer", "name", inner)
        _ip("link", "set", inner, "netns", name, "name", "eth0")
        _ip("link", "set", cable, "master", f"{self.tag}b", "up")
        for words in (
            ("addr", "add", f"{self.prefix}.{number}/24", "dev", "eth0"), ("link", "set", "eth0", "up"),
            ("link", "set", "lo", "up"), ("route", "add", "default", "via", self.address),
        ):  # fmt: skip
            _ip("-n", name, *words)
        return name, cable

    def close(self):
        """Take the bridge and every namespace away."""
        _remove(self.tag)


class Node:
    """A node: its address, and the process with which all of it ends."""

    def __init__(self, cluster, number, words):
        self.number = number
        self.address = f"{cluster.network.prefix}.{number}"
        self.folder = cluster.folder / f"node-{number}"
        (self.folder / "ray").mkdir(parents=True)
        Path("/tmp/ray").mkdir(exist_ok=True)
        names = "".join(f"{cluster.network.prefix}.{each} node-{each}\n" for each in range(1, 33))
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        self.namespace, self.cable = cluster.network.plug(number)
        environment = {**cluster.environment, "NODE_FOLDER": str(self.folder), "NODE_NAME": f"node-{number}"}
        alone = ["unshare", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc"]
        ray = [str(Path(sys.executable).parent / "ray"), "start", "--block", "--node-ip-address", self.address, *words]
        with (self.folder / "log").open("w") as log:
            self.process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "ip", "netns", "exec", self.namespace, *alone,
                 "sh", "-c", _BOOT, "boot", *ray],
                env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, cwd=self.folder,
            )  # fmt: skip

    @property
    def log(self):
        """What `ray start` has said."""
        return (self.folder / "log").read_text()

    def kill(self, silently=False):
        """SIGKILL all of it at once; silently, its cable is cut first, so that nobody hears connections close."""
        if silently:
            _ip("link", "set", self.cable, "down")
        self.process.kill()
        self.process.wait()
        while subprocess.run(["ip", "netns", "pids", self.namespace], capture_output=True, check=True).stdout.strip():
            time.sleep(PAUSE_S)

    def command(self, *words):
        """The words of a command that runs as if given on the node itself."""
        first = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()[0]
        there = ["nsenter", "--target", first, "--mount", "--pid", "--net", "--uts", "--ipc", "--"]
        # What is entered is a child of this command's, and dies with it.
        return [*there, "setpriv", "--pdeathsig", "KILL", *map(str, words)]

    def listening(self):
        """Every TCP address and port that listens here, with the process's name."""
        told = subprocess.run(
            ["ip", "netns", "exec", self.namespace, "ss", "-tlnpH"], capture_output=True, text=True, check=True
        ).stdout
        found = []
        for line in told.splitlines():
            _, _, _, local, _, *users = line.split()
            address, port = local.rsplit(":", 1)
            name = users[0].split('"')[1] if users else "?"
            found.append((address, int(port), name))
        return found


class Cluster:
    """A head and its nodes, one CPU each but for the head, which has none; `close` leaves nothing behind.

    `environment` is what the nodes have beside Ray's token and the way to this project's python.
    """

    def __init__(self, network, folder, environment):
        self.network, self.folder = network, folder
        folder.mkdir(parents=True)
        self.token = secrets.token_hex(32)
        token = folder / "token"
        token.touch(mode=0o600)
        token.write_text(self.token)
        (folder / "home").mkdir()
        self.opened = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        self.environment = {
            "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "LANG": "C.UTF-8",
            "HOME": str(folder / "home"), "RAY_USAGE_STATS_ENABLED": "0", **self.opened, **environment,
        }  # fmt: skip
        self.nodes = []
        small = ["--object-store-memory", "150000000", "--disable-usage-stats"]
        self._size = ["--num-cpus", "1", "--resources", '{"worker": 1}', *small]
        head = ["--head", "--port", str(PORT), "--num-cpus", "0", *small]
        self.head = self._start([*head, "--dashboard-host", f"{network.prefix}.1", "--include-dashboard", "true"])
        self._wait_for(self.head)

    @property
    def job_server(self):
        """URL of the job server."""
        return f"http://{self.head.address}:{DASHBOARD}"

    @property
    def gcs(self):
        """Address of the cluster's control service."""
        return f"{self.head.address}:{PORT}"

    def add(self, count=1):
        """Nodes that join; returned once the head knows of them."""
        fresh = [self._start(["--address", self.gcs, *self._size]) for _ in range(count)]
        for node in fresh:
            self._wait_for(node)
        return fresh

    def kill(self, node, silently=False):
        """SIGKILL a node whole."""
        self.nodes.remove(node)
        node.kill(silently)

    def ask(self, path, token=None):
        """The JSON that the dashboard's API answers."""
        request = urllib.request.Request(f"{self.job_server}{path}")
        request.add_header("Authorization", f"Bearer {token or self.token}")
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)

    def alive(self):
        """Ids of the nodes that the head holds for alive, by address."""
        nodes = self.ask("/api/v0/nodes?limit=100")["data"]["result"]["result"]
        return {each["node_ip"]: each["node_id"] for each in nodes if each["state"] == "ALIVE"}

    def node_of(self, job):
        """The node on which a job's own process runs; None while it has not begun."""
        told = self.ask(f"/api/jobs/{job}")["driver_agent_http_address"] or ""
        return next((node for node in self.nodes if f"//{node.address}:" in told), None)

    def close(self):
        """Kill what is left."""
        for node in list(self.nodes):
            self.kill(node)

    def _start(self, words):
        node = Node(self, len(list(self.folder.glob("node-*"))) + 1, words)
        self.nodes.append(node)
        return node

    def _wait_for(self, node):
        deadline = time.monotonic() + START_S
        while True:
            with contextlib.suppress(OSError, urllib.error.URLError):
                if node.address in self.alive():
                    return
            assert node.process.poll() is None, f"node {node.number} ended:\n{node.log}"
            assert time.monotonic() < deadline, f"node {node.number} did not join in {START_S:g} s:\n{node.log}"
            time.sleep(PAUSE_S)


def _ip(*words):
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr.strip()}"
    return done.stdout


def _free_prefix():
    taken = _ip("-o", "-4", "addr") + _ip("-4", "route")
    start = os.getpid() % 250
    return next(each for at in range(250) if (each := f"10.77.{(start + at) % 250 + 1}") + "." not in taken)


def _remove(tag):
    """The namespaces, with all that still runs in them, and the bridge of a tag."""
    for name in [line.split()[0] for line in _ip("netns", "list").splitlines()]:
        if name.startswith(f"{tag}n"):
            for pid in _ip("netns", "pids", name).split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), 9)
            _ip("netns", "del", name)
    # A namespace goes when the last of its processes is gone for good; the cables need not wait for that.
    for name in re.findall(rf"\b{tag}[vb]\d*", _ip("-o", "link")):
        subprocess.run(["ip", "link", "del", name], capture_output=True, check=False)


def _sweep():
    """Take away what test runs that were killed have left: tags of processes that are no more."""
    names = [line.split()[0] for line in _ip("netns", "list").splitlines()]
    names += [line.split()[1].rstrip(":") for line in _ip("-o", "link", "show", "type", "bridge").splitlines()]
    for name in names:
        pid = name[1:].rstrip("b").partition("n")[0]
        if name.startswith("r") and pid.isdigit() and not Path(f"/proc/{pid}").exists():
            _remove(f"r{pid}")
