"""A stage as a job of a Ray cluster: submitted, or found again by its settings; followed to its end; stopped.

A job's id is made from the stage's settings and a number of attempt, so that whoever asks for the same work finds the
job that does it. What a job has done lies in the store, so a job that is lost is submitted again and goes on there.
"""

import asyncio
import contextlib
import json
import logging
import os
import queue
import re
import shlex
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pipelines import stops, storage
from pipelines.config import (
    STOP_MARKER,
    AwayError,
    InterruptedRunError,
    PipelineError,
    Place,
    Settings,
    Store,
    failure,
    to_flags,
)
from pipelines.flow_config import Cluster
from pipelines.progress import print_line

_LOUD = (
    "ray._private.runtime_env.packaging", "ray._private.runtime_env.working_dir", "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
)  # fmt: skip
# Lines in a job's log that Ray wrote about itself
_RAYS_OWN = re.compile(r"(core_worker\.cc|job_manager\.py):\d+|PYTHON worker processes have been started")
_LOOK_S = 1.0
_LAST_LINES_S = 5.0
_FIRST_WAIT_S, _LONGEST_WAIT_S = 1.0, 15.0
_EXCLUDED = (
    ".venv", ".venv-s3", ".git", "runs", "tests", "docs", "benchmarks", "build", ".mypy_cache", ".ruff_cache",
    ".pytest_cache", ".hypothesis", ".import_linter_cache", ".env",
)  # fmt: skip
# Stages of which one job at a time works for a name: trainings of a model beside each other would share its machines
_ALONE = ("train",)
_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class Job:
    """A job of a cluster: its id, and the stop marker that it heeds."""

    id: str
    marker: str


@dataclass
class Log:
    """A job's log as it comes, read once: `shown` characters of it are printed."""

    client: Any
    job: str
    shown: int = 0
    skip: int = 0
    part: str = ""
    whole: bool = False
    came: queue.SimpleQueue[str] = field(default_factory=queue.SimpleQueue)
    thread: threading.Thread | None = None

    def reopen(self, client: Any) -> None:
        """Go on by another client; a reader that still listens on a way that is dead is heard no more."""
        self._take_all()
        self.client, self.thread, self.whole = client, None, False
        self.came = queue.SimpleQueue()

    def print_new(self, wait: float) -> None:
        """Print the lines that have come, after waiting for some for up to `wait` seconds; opens the log if needed."""
        self._open_if_broken()
        deadline = time.monotonic() + wait
        while (left := deadline - time.monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                self._take(self.came.get(timeout=left))

    def print_rest(self) -> None:
        """Print what is left of the log of a job that has ended."""
        deadline = time.monotonic() + _LAST_LINES_S
        while not self.whole and time.monotonic() < deadline:
            self.print_new(_LOOK_S / 4)
        self._take_all()
        if self.part:
            print_line(self.part)

    def _open_if_broken(self) -> None:
        """Read in a thread; what was printed before the way broke is skipped, for the log begins at its beginning."""
        if self.whole or (self.thread is not None and self.thread.is_alive()):
            return
        self._take_all()
        self.skip = self.shown
        self.thread = threading.Thread(target=self._read, name="job-log", daemon=True)
        self.thread.start()

    def _read(self) -> None:
        import aiohttp

        came = self.came

        async def read() -> None:
            async for some in self.client.tail_job_logs(self.job):
                came.put(some)
            self.whole = self.whole or came is self.came

        # What is wrong is told by the job's status, which is asked for beside.
        with contextlib.suppress(RuntimeError, OSError, aiohttp.ClientError):
            asyncio.run(read())

    def _take_all(self) -> None:
        while not self.came.empty():
            self._take(self.came.get())

    def _take(self, some: str) -> None:
        new = some[self.skip :]
        self.skip -= len(some) - len(new)
        self.shown += len(new)
        *lines, self.part = (self.part + new).split("\n")
        for line in lines:
            if not _RAYS_OWN.search(line):
                print_line(line)


@dataclass
class _Pursuit:
    """What stays while a job is followed, whatever befalls the cluster: its log, and when it was last told of."""

    answered: float = field(default_factory=time.monotonic)
    log: Log | None = None
    submitted: int | None = None
    waits_for: str | None = None

    def hear(self) -> None:
        """The cluster has told of a job."""
        self.answered = time.monotonic()

    def silence(self) -> float:
        """Seconds since the cluster told of a job."""
        return time.monotonic() - self.answered

    def wait_for(self, client: Any, name: str, rival: str) -> None:
        """Wait until another job has ended, telling so once."""
        if rival != self.waits_for:
            print_line(f"{name}: job {rival} trains a model of the same name; waiting for its end")
        self.waits_for = rival
        while (info := _info(client, rival)) is not None and not info.status.is_terminal():
            self.hear()
            time.sleep(_LOOK_S)

    def log_of(self, client: Any, job: str, submitted: int | None) -> Log:
        """The log of a job, read on where it is known; a cluster that was made anew gives the same id once more."""
        if self.log is None or (self.log.job, self.submitted) != (job, submitted):
            self.log, self.submitted = Log(client, job), submitted
        elif self.log.client is not client:
            self.log.reopen(client)
        return self.log


def run_job(name: str, config: Settings, cluster: Cluster, told: Callable[[Job], None]) -> None:
    """Have a stage run as a job, and follow its log to its end; a job of the same settings that runs is taken over.

    A training waits for the end of another one of the same name. `told` is called with every job that is followed. A
    cluster that does not answer is waited for, and a job that was lost with its node is submitted again. Raises
    PipelineError with the job's own last line where the stage fails, InterruptedRunError where somebody stopped it, and
    AwayError where the cluster stays away, or what the stage needs.
    """
    losses, pursuit = 0, _Pursuit()
    while True:
        try:
            client = connect(cluster)
            job = _present_or_new(client, name, config, cluster, pursuit)
            told(job)
            end = _follow(client, job, pursuit)
        except AwayError as error:
            if pursuit.silence() > cluster.job.wait:
                raise
            print_line(f"{name}: waiting for the cluster: {error}")
            time.sleep(_FIRST_WAIT_S)
            continue
        pursuit.hear()
        if end is not None and end.status == "SUCCEEDED":
            return
        losses += 1
        if losses > cluster.job.resubmits or not _is_lost(end):
            raise _failure(name, job, end, cluster)
        print_line(f"{name}: job {job.id} was lost ({_last_line(end)}); submitting it again")


def stop_job(cluster: Cluster, job: Job) -> None:
    """Ask a job to save and end, for as long as its grace says, and stop it then. Raises PipelineError without cluster.

    A job that has ended already is left as it is.
    """
    client = connect(cluster)
    stops.ask(job.marker)
    deadline = time.monotonic() + cluster.job.grace
    while (info := _info(client, job.id)) is not None and not info.status.is_terminal():
        if time.monotonic() > deadline:
            asked(cluster.address, lambda: client.stop_job(job.id))
            break
        time.sleep(_LOOK_S)
    stops.forget(job.marker)


def connect(cluster: Cluster) -> Any:
    """The client of a cluster's job server. Raises AwayError where it does not answer for as long as its `wait`."""
    from ray.job_submission import JobSubmissionClient

    for loud in _LOUD:
        logging.getLogger(loud).setLevel(logging.ERROR)
    deadline, pause = time.monotonic() + cluster.job.wait, _FIRST_WAIT_S
    while True:
        try:
            return asked(cluster.address, lambda: JobSubmissionClient(cluster.address, headers=cluster.headers))
        except AwayError:
            if time.monotonic() + pause > deadline:
                raise
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_WAIT_S)


def _present_or_new(client: Any, name: str, config: Settings, cluster: Cluster, pursuit: _Pursuit) -> Job:
    """The job of these settings that runs, or a new one once it may begin."""
    while True:
        job, runs = _newest(client, name, config)
        if runs:
            print_line(f"{name}: job {job.id} runs on {cluster.address}; following it")
            return job
        # A flow has a limit for this, which ends with the flow's process, while the job lives on.
        rival = _rival(client, name, config, job)
        if rival is None:
            _submit(client, name, config, cluster, job)
            print_line(f"{name}: job {job.id} on {cluster.address}")
            return job
        pursuit.wait_for(client, name, rival)


def _newest(client: Any, name: str, config: Settings) -> tuple[Job, bool]:
    """The newest job of these settings that has not ended, and whether it runs or is to be submitted."""
    text = json.dumps([name, config.model_dump(mode="json")], sort_keys=True)
    base = f"{name}-{storage.digest(text.encode())[:12]}"
    attempt = 1
    while (info := _info(client, f"{base}-{attempt}")) is not None and info.status.is_terminal():
        attempt += 1
    return Job(f"{base}-{attempt}", stops.marker_of(_store(config), f"{base}-{attempt}")), info is not None


def _rival(client: Any, name: str, config: Settings, job: Job) -> str | None:
    """Id of a job at work that this one may not run beside."""
    if name not in _ALONE:
        return None
    same = _metadata(name, config).items()
    for other in asked(client.get_address(), client.list_jobs):
        if not other.status.is_terminal() and other.submission_id != job.id and same <= (other.metadata or {}).items():
            return str(other.submission_id)
    return None


def _metadata(name: str, config: Settings) -> dict[str, str]:
    """What a job's metadata say of it: its stage, and the name for which it works."""
    return {"stage": name} | ({"name": config.name} if isinstance(config, Place) else {})


def _store(config: Settings) -> str:
    if not isinstance(config, Store):
        raise PipelineError(f"{type(config).__name__}: its stage has no store, so it cannot run as a job")
    return config.store


def _submit(client: Any, name: str, config: Settings, cluster: Cluster, job: Job) -> None:
    """Submit a job; one that another flow submits at the same time is the same job."""
    entrypoint = shlex.join(["python", "-m", "pipelines", name, *to_flags(config)])
    environment: dict[str, Any] = {"env_vars": {STOP_MARKER: job.marker}}
    if cluster.job.code == "working_dir":
        root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        environment |= {"working_dir": root, "excludes": list(_EXCLUDED)}
    holds = {
        "entrypoint_num_cpus": cluster.job.cpus, "entrypoint_num_gpus": cluster.job.gpus,
        "entrypoint_memory": int(cluster.job.memory), "entrypoint_resources": cluster.job.resources,
    }  # fmt: skip
    stops.forget(job.marker)  # what a cluster that was made anew had left of one with the same id
    with contextlib.suppress(_TakenError):
        asked(
            cluster.address,
            lambda: client.submit_job(
                entrypoint=entrypoint, submission_id=job.id, runtime_env=environment, metadata=_metadata(name, config),
                **{key: value for key, value in holds.items() if value},
            ),
        )  # fmt: skip


def _follow(client: Any, job: Job, pursuit: _Pursuit) -> Any | None:
    """Print a job's log as it comes, until it ends: what is known of it then; None where the cluster lost it."""
    while (info := _info(client, job.id)) is not None:
        pursuit.hear()
        log = pursuit.log_of(client, job.id, info.start_time)
        if info.status.is_terminal():
            log.print_rest()
            break
        log.print_new(_LOOK_S)
    return info


def _info(client: Any, job: str) -> Any | None:
    """What the cluster knows of a job; None where it knows none of this id."""
    try:
        return asked(client.get_address(), lambda: client.get_job_info(job))
    except _UnknownError:
        return None


def _is_lost(end: Any | None) -> bool:
    """Whether a job failed by what befell its node or process, and not by an error of its own."""
    if end is None:
        return True
    if end.status != "FAILED":
        return False
    if end.error_type == "JOB_ENTRYPOINT_COMMAND_ERROR":
        code = end.driver_exit_code
        # Above are those of commands that another signal ended.
        return code is not None and bool(code < 0 or code > stops.INTERRUPTED)
    return bool(end.error_type != "RUNTIME_ENV_SETUP_FAILURE")


def _failure(name: str, job: Job, end: Any | None, cluster: Cluster) -> PipelineError:
    """The error of a job that did not succeed, in words."""
    place = f"{name}: job {job.id} on {cluster.address}"
    if end is not None and (end.status == "STOPPED" or end.driver_exit_code == stops.INTERRUPTED):
        return InterruptedRunError(f"{place} was stopped; what it had done is kept, run the same again to go on")
    return failure(f"{place} failed: {_last_line(end)}", 1 if end is None else end.driver_exit_code)


def _last_line(end: Any | None) -> str:
    """The line that tells most: the last of the job's log, which its message ends with."""
    if end is None:
        return "the cluster knows it no more"
    lines = [line for line in (end.message or "").strip().splitlines() if line.strip()]
    return lines[-1].removeprefix("error: ") if lines else "no reason given"


class _TakenError(PipelineError):
    """A job of this id was submitted before."""


class _UnknownError(PipelineError):
    """No job of this id."""


def asked(address: str, call: Callable[[], _Answer]) -> _Answer:
    """What a call of the cluster's API returns. Raises AwayError where nobody answers, PipelineError on a refusal."""
    import requests
    from ray.exceptions import AuthenticationError

    try:
        return call()
    except AuthenticationError as error:
        raise PipelineError(
            f"{address}: the token is refused or missing; set RAY_AUTH_TOKEN, or put it into the Prefect block"
        ) from error
    except (ConnectionError, requests.exceptions.RequestException) as error:
        raise AwayError(
            f"{address}: no answer ({type(error).__name__}); check the address, and that it runs"
        ) from error
    except RuntimeError as error:
        raise _refusal(address, str(error)) from error


def _refusal(address: str, text: str) -> PipelineError:
    """What an answer other than success means."""
    first = text.strip().splitlines()[0]
    if "status code 404" in first:
        return _UnknownError(f"{address}: {first}")
    if "already exists" in text:
        return _TakenError(f"{address}: {first}")
    if "status code 5" in first:
        return AwayError(f"{address}: {first}")
    return PipelineError(f"{address}: {first}; check that it runs the Ray of this project")
