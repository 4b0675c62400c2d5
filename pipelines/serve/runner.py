"""Makes batches: the bulk stage as a command beside the service, whose rows come back to it at bulk priority."""

import asyncio
import contextlib
import logging
import re
import signal
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from pipelines import storage
from pipelines.config import AWAY_STATUS, AwayError, GenerateConfig, PipelineError, to_flags
from pipelines.progress import counts_of
from pipelines.serve.batches import ENDED, Batches, Ordered, State, Status, now
from pipelines.serve.callbacks import call_back

_log = logging.getLogger("ray.serve")
_STAGE = "generate"
# Tries of a batch whose command was killed, or failed after it had come further
_TRIES = 5
# Bytes of a command's output that are read at once, and those of a line that are heard
_CHUNK, _LONGEST = 2**16, 2**14
# Has a command end when the service's process is killed, as another one goes on with it (PR_SET_PDEATHSIG of prctl(2)).
# It becomes the command: a function between fork and exec is unsafe beside the threads of Ray.
_WITH_PARENT = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execv(sys.argv[1], sys.argv[1:])"


def bulk_command(config: GenerateConfig) -> list[str]:
    """The bulk stage on a command line: stages never import one another."""
    return [sys.executable, "-m", "pipelines", _STAGE, *to_flags(config)]


@dataclass(eq=False)
class Runner:
    """Makes the open batches of a store, `at_once` of them, the owners' in turns; looks for more every `every` seconds.

    `leads` says whether this process is the one to do it. Two that do it at once do no harm: bulk work is done once.
    """

    batches: Batches
    at_once: int
    every: float
    environment: Mapping[str, str]
    leads: Callable[[], bool] = lambda: True
    command: Callable[[GenerateConfig], Sequence[str]] = bulk_command
    _running: dict[str, "asyncio.Task[None]"] = field(default_factory=dict)
    _owners: dict[str, str] = field(default_factory=dict)
    _told: str = ""

    async def watch(self) -> None:
        """Make what is open, for ever."""
        while True:
            try:
                await self._begin()
            except PipelineError as error:
                self._tell(f"batches wait: {error}")
            await asyncio.sleep(self.every)

    async def _begin(self) -> None:
        """Begin with batches while there is room."""
        for name in [name for name, task in self._running.items() if task.done()]:
            failure = self._running.pop(name).exception()
            if failure is not None:
                self._tell(f"{name} waits: {failure!r}")
        if not self.leads() or len(self._running) >= self.at_once:
            return
        unfinished = await asyncio.to_thread(self.batches.unfinished, self._tell)
        waiting = [each for each in unfinished if each.id not in self._running]
        while waiting and len(self._running) < self.at_once:
            busy = [self._owners[name] for name in self._running]
            ordered = min(waiting, key=lambda each: busy.count(each.owner))  # of those the oldest
            waiting.remove(ordered)
            self._owners[ordered.id] = ordered.owner
            self._running[ordered.id] = asyncio.create_task(self._make(ordered))

    def _tell(self, problem: str) -> None:
        """Log a problem once."""
        if problem != self._told:
            _log.warning("serve: %s", problem)
        self._told = problem

    async def _make(self, ordered: Ordered) -> None:
        """Make a batch to its end, which is written down, and call whoever wants to be."""
        try:
            state = await self._end_of(ordered)
            if ordered.callback and not await asyncio.to_thread(call_back, ordered.callback, ordered.id, state.status):
                _log.warning("serve: %s: nobody answers at its callback", ordered.id)
            await asyncio.to_thread(self.batches.close, ordered)
        except PipelineError as error:
            self._tell(f"{ordered.id} waits: {error}")

    async def _end_of(self, ordered: Ordered) -> State:
        """The end of a batch, written down; `failed` where something befalls it that will not pass by itself."""
        state = State()
        try:
            state = await asyncio.to_thread(self.batches.state, ordered)
            if state.status in ENDED:
                return state
            end = await self._run(ordered, _reached("in_progress", state))
        except AwayError:
            raise
        except Exception as error:  # noqa: BLE001  # tried again as it is, it would fail for ever
            _log.error("serve: %s fails", ordered.id, exc_info=error)
            end = _reached("failed", replace(state, error=_worded(error)))
        await asyncio.to_thread(self.batches.note, ordered, end)
        return end

    async def _run(self, ordered: Ordered, state: State) -> State:
        """The end of a batch, which may take more runs than one."""
        for _ in range(_TRIES):
            run = _Run(self, ordered, state)
            state, before = await run.follow(), state
            if state.status in ENDED:
                return state
            if run.failed and state.completed == before.completed:
                break
        return _reached("failed", state)


def _reached(status: Status, state: State) -> State:
    """A state from now on."""
    return replace(state, status=status, at={**state.at, status: state.at.get(status, now())})


def _worded(error: Exception) -> str:
    """An error as one line of bounded length."""
    kind = "" if isinstance(error, PipelineError) else f"{type(error).__name__}: "
    return " ".join(f"{kind}{error}".split())[:_LONGEST]


async def _lines(output: asyncio.StreamReader) -> AsyncIterator[str]:
    """The lines of a command's output, each cut to so much as is heard: one may be of any length."""
    rest = b""
    while chunk := await output.read(_CHUNK):
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield line[:_LONGEST].decode(errors="replace").strip()
        rest = rest[:_LONGEST]
    yield rest.decode(errors="replace").strip()


@dataclass(eq=False)
class _Run:
    """One run of the command of a batch."""

    runner: Runner
    ordered: Ordered
    state: State
    failed: bool = False
    last: str = ""

    async def follow(self) -> State:
        """What a run has brought the batch to. Raises StorageError, and AwayError where it may go on later."""
        batches = self.runner.batches
        if await asyncio.to_thread(batches.is_cancelled, self.ordered):
            return _reached("cancelled", self.state)
        await asyncio.to_thread(batches.note, self.ordered, self.state)
        before = [sys.executable, "-ISc", _WITH_PARENT] if sys.platform == "linux" else []
        command = self.runner.command(GenerateConfig.model_validate(self.ordered.job))
        process = await asyncio.create_subprocess_exec(
            *before, *command, env=dict(self.runner.environment),
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        stopping = asyncio.create_task(self._stop_if_cancelled(process))
        try:
            assert process.stdout is not None
            async for line in _lines(process.stdout):
                await self._hear(line)
            return self._ended(await process.wait())
        finally:
            stopping.cancel()
            with contextlib.suppress(ProcessLookupError):
                process.kill()

    async def _hear(self, line: str) -> None:
        """Take a line of the command: how far it is, its images, or the last it says."""
        counts, found = counts_of(line), re.fullmatch(rf"{_STAGE}: (\S+)", line)
        if counts is not None:
            self.state = replace(self.state, completed=counts[0])
            await asyncio.to_thread(self.runner.batches.note, self.ordered, self.state)
        elif found:
            self.state = replace(self.state, images=found[1])
        elif line:
            self.last = line

    async def _stop_if_cancelled(self, process: asyncio.subprocess.Process) -> None:
        """Interrupt the command once somebody wants that: it keeps what it has."""
        while True:
            await asyncio.sleep(self.runner.every)
            with contextlib.suppress(PipelineError):
                if await asyncio.to_thread(self.runner.batches.is_cancelled, self.ordered):
                    self.state = replace(self.state, at={**self.state.at, "cancelling": now()})
                    process.send_signal(signal.SIGINT)
                    return

    def _ended(self, code: int) -> State:
        """The state that an exit status of the command brings."""
        if code == 0 and self.state.images is not None:
            return _reached("completed", self._counted(self.state.images))
        if "cancelling" in self.state.at:
            return _reached("cancelled", self.state)
        if code == AWAY_STATUS:  # the batch stays open, and waits
            raise AwayError(self.last.removeprefix("error: "))
        self.failed = code > 0
        return replace(self.state, error=self.last.removeprefix("error: ") or f"the command ended with {code}")

    def _counted(self, images: str) -> State:
        """The state with what was made and rejected in all."""
        counts = storage.read_manifest(images, "images")["counts"]
        return replace(self.state, completed=counts["made"], failed=counts["rejected"], error=None)
