"""Progress of long work: a bar, a rate, the time left, the figures of the moment; and tables of what came out."""

import contextlib
import contextvars
import re
import sys
import threading
import time
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field
from typing import Any

_WIDTH = 24
_POLL_S = 0.5
_listener: contextvars.ContextVar[Callable[[str], None] | None] = contextvars.ContextVar("listener", default=None)


def print_line(line: str) -> None:
    """Print a line at once, and tell whoever listens."""
    print(line, file=sys.stdout, flush=True)
    listener = _listener.get()
    if listener is not None:
        listener(line)


@contextlib.contextmanager
def heard(listener: Callable[[str], None]) -> Iterator[None]:
    """Have `listener` called with every line that is printed meanwhile, here or from a board's thread."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


@dataclass
class Progress:
    """Prints `what  [####----]  n/total unit  rate  figures  ETA`, at most every `every` seconds.

    It prints whole lines, so that it reads the same on a terminal, in a Ray job's log and in a flow's.
    """

    what: str
    total: int
    unit: str
    done: int = 0
    every: float = 5.0
    emit: Callable[[str], None] = print_line
    started: float = field(default_factory=time.monotonic)
    first: int = field(default=0)
    printed: float = field(default=0.0)

    def __post_init__(self) -> None:
        """Remember where this run began, so that the rate counts its own work alone."""
        self.first = self.done

    def update(self, done: int, figures: str = "", scale: int = 1, unit: str = "") -> None:
        """Say that `done` of the total are done; `scale` and `unit` turn the rate into another unit."""
        self.done = done
        now = time.monotonic()
        if now - self.printed >= self.every or done >= self.total:
            self.printed = now
            self.emit(self.line(now, figures, scale, unit or self.unit))

    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def line(self, now: float, figures: str, scale: int, unit: str) -> str:
        """The line to print at the time `now` (seconds, monotonic)."""
        rate = (self.done - self.first) / max(now - self.started, 1e-9)
        filled = round(_WIDTH * self.done / max(self.total, 1))
        bar = "#" * filled + "-" * (_WIDTH - filled)
        left = (self.total - self.done) / rate if rate > 0 else 0.0
        parts = [f"{self.what} [{bar}] {self.done}/{self.total} {self.unit}", f"{rate * scale:.1f} {unit}/s"]
        return "  ".join([*parts, *([figures] if figures else []), f"ETA {duration(left)}"])


def counts_of(line: str) -> tuple[int, int] | None:
    """What is done and the total, of a line that `Progress` printed; None of any other."""
    found = re.match(r"\w+ \[[#-]+\] (\d+)/(\d+) ", line)
    return (int(found[1]), int(found[2])) if found else None


def aligned(rows: list[list[str]], left: Container[int] = (0,)) -> list[str]:
    """Rows of a table as lines with columns under one another, those of the numbers `left` to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if number in left else cell.rjust(width) for number, (cell, width) in enumerate(cells)
        ).rstrip()
        for cells in (zip(row, widths, strict=True) for row in rows)
    ]


def duration(seconds: float) -> str:
    """Seconds as m:ss, or h:mm:ss from an hour on."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


class Board:
    """A Ray actor that carries lines from workers to the driver, so that only what is meant for people is shown."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def post(self, line: str) -> None:
        """Leave a line."""
        self.lines.append(line)

    def take(self) -> list[str]:
        """The lines since the last call."""
        lines, self.lines = self.lines, []
        return lines


@contextlib.contextmanager
def printed_board(kind: type[Board] = Board, *arguments: Any) -> Iterator[Any]:
    """Handle of a board on the connected Ray, whose lines this process prints as they come."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # Beside this process: another node may go, and the run is to outlive it.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board = ray.remote(num_cpus=0, scheduling_strategy=here)(kind).remote(*arguments)
    stopped = threading.Event()

    def show() -> None:
        while True:
            last = stopped.wait(_POLL_S)
            for line in ray.get(board.take.remote()):
                print_line(line)
            if last:
                return

    thread = threading.Thread(target=contextvars.copy_context().run, args=(show,), name="board", daemon=True)
    thread.start()
    try:
        yield board
    finally:
        stopped.set()
        thread.join()
        ray.kill(board)
