"""A stage as a command in a session of its own: started, waited for, killed in part or as a whole."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from conftest import ROOT


def start(stage, *flags, **environment):
    """The command of a stage, its output kept, in a session that can be killed as one."""
    return subprocess.Popen(
        [sys.executable, "-m", "pipelines", stage, *map(str, flags)],
        cwd=ROOT, env={**os.environ, "RAY_AUTH_MODE": "disabled", **environment}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def finish(process, timeout):
    """Output and exit status."""
    output, _ = process.communicate(timeout=timeout)
    return output, process.returncode


def uri_of(stage, output):
    """The last line but for what Ray tells of killed workers."""
    return re.findall(rf"^{stage}: (\S+)$", output, flags=re.M)[-1]


def kill_all(process):
    """SIGKILL the whole session, also what is in a process group of its own there, as Ray's workers are."""
    while kill_one(process.pid, "."):
        process.poll()
    process.wait()


def kill_one(session, title):
    """SIGKILL one of the session's processes whose command line has the pattern `title`; how many were killed."""
    for folder in Path("/proc").iterdir():
        try:
            told = (folder / "cmdline").read_bytes().decode()
            if folder.name.isdigit() and os.getsid(int(folder.name)) == session and re.search(title, told):
                os.kill(int(folder.name), signal.SIGKILL)
                return 1
        except (OSError, ValueError):
            continue
    return 0


def family(pid):
    """A process and all that it started, and those started, as far as they are still its own."""
    parents = {}
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError, IndexError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
    found = [pid]
    for each in found:
        found += [child for child, parent in parents.items() if parent == each]
    return found


def kill_marked(mark, title):
    """SIGKILL all processes whose environment has the text `mark` and whose command line the pattern `title`."""
    killed = 0
    for folder in Path("/proc").iterdir():
        try:
            told = (folder / "cmdline").read_bytes().decode()
            if folder.name.isdigit() and re.search(title, told) and mark.encode() in (folder / "environ").read_bytes():
                os.kill(int(folder.name), signal.SIGKILL)
                killed += 1
        except (OSError, ValueError):
            continue
    return killed


def until_at_work(process, found, what, seconds, every):
    """As `until`, of a run that has not ended when it has come so far."""

    def at_work():
        value = found()
        assert process.poll() is None, process.communicate()[0]
        return value

    return until(at_work, what, seconds, every)


def until(found, what, seconds, every):
    """What `found` returns once that is something; an error after so many seconds, looked at `every` so many."""
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(every)
    return value
