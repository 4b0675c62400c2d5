"""Runs a Dockerfile's steps in bare roots made by debootstrap: what `docker build` would do, without Docker.

The FROM of another stage is a copy of its root; of an image, a bare Debian. The package registries of this machine are
used, by its own settings of pip, and its certificates.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from support.manifests import ROOT, instructions

SHARED = ("/etc/resolv.conf", "/etc/hosts", "/etc/pip.conf", "/etc/ssl/certs/ca-certificates.crt")
MIRROR = "http://deb.debian.org/debian"


def folders_of_pip():
    """Folders of this machine that pip takes packages from, by its own settings."""
    told = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    found = re.findall(r"(?:file://|(?<=[' ]))(/[^' ]+)", told.stdout)
    # An index named "simple" links to files beside it.
    folders = dict.fromkeys(path.parent if path.name == "simple" else path for path in map(Path, found))
    return [str(folder) for folder in folders if folder.is_dir()]


class Stage:
    """A root with what FROM, ENV, ARG, WORKDIR and USER have said of it."""

    def __init__(self, root, before=None):
        self.root = root
        self.environment = dict(before.environment) if before else {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
        self.folder, self.user = (before.folder, before.user) if before else ("/", "0:0")

    def inside(self, path):
        """Where a path of the root lies on this machine."""
        return self.root / os.path.join(self.folder, path).lstrip("/")

    def run(self, words, more=None):
        """The output of a command in the root, as its user. Raises CalledProcessError."""
        settings = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
        user, group = self.user.split(":")
        home = self.root.joinpath("etc/passwd").read_text().split(f":{user}:", 1)[1].split("\n")[0].split(":")[-2]
        environment = {"HOME": home, "LANG": "C.UTF-8", **settings, **self.environment, **(more or {})}
        there = f"cd {shlex.quote(self.folder)} && exec {shlex.join(words)}"
        chroot = ["chroot", f"--userspec={user}:{group}", str(self.root), "/bin/sh", "-c", there]
        mounts = f"mount -t proc proc {self.root}/proc && mount --rbind /dev {self.root}/dev"
        # The mounts are of a namespace of its own, and gone with the command.
        command = ["unshare", "--mount", "/bin/sh", "-c", f"{mounts} && exec {shlex.join(chroot)}"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        return done.stdout


def build(dockerfile, work, arguments):
    """The last stage of a Dockerfile, made below the folder `work` with these build arguments."""
    stages, stage = {}, None
    for name, rest in instructions(dockerfile):
        if name == "FROM":
            base, _, alias = rest.partition(" AS ")
            stage = stages[alias] = _from(stages.get(base), work / alias)
        elif name == "COPY":
            _copy(stage, stages, rest)
        else:
            _step(stage, name, rest, arguments)
    return stage


def _from(before, root):
    if before is None:
        told = subprocess.run(
            ["debootstrap", "--variant=minbase", "--include=ca-certificates", "bookworm", root, MIRROR],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert told.returncode == 0, told.stdout[-2000:]
    else:
        subprocess.run(["cp", "--archive", before.root, root], check=True)
    for path in map(Path, (*SHARED, *folders_of_pip())):
        there = root / str(path)[1:]
        if path.is_dir() and not there.exists():
            shutil.copytree(path, there)
        elif path.is_file():
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, there)
    return Stage(root, before)


def _copy(stage, stages, rest):
    words = shlex.split(rest)
    origin = stages[words.pop(0).removeprefix("--from=")].root if words[0].startswith("--from=") else None
    *sources, target = words
    for source in sources:
        path = origin / source.lstrip("/") if origin else ROOT / source
        there = stage.inside(target)
        if target.endswith("/"):
            there = there / path.name
        there.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "--archive", "--no-target-directory", path, there], check=True)


def _step(stage, name, rest, arguments):
    if name == "RUN":
        stage.run(["/bin/sh", "-c", rest], arguments)
    elif name == "ENV":
        for pair in shlex.split(rest):
            key, _, value = pair.partition("=")
            stage.environment[key] = value.replace("$PATH", stage.environment["PATH"])
    elif name == "ARG":
        key, _, value = rest.partition("=")
        arguments.setdefault(key, value)
    elif name == "WORKDIR":
        stage.folder = rest
        stage.inside("").mkdir(parents=True, exist_ok=True)
    elif name == "USER":
        stage.user = rest
    else:
        assert name in ("CMD", "HEALTHCHECK"), name
