"""Stop markers: an object in the store whose appearance asks a stage to save what it has done and end.

It reaches a job wherever it runs, and means what Ctrl-C means on a terminal. A marker belongs to one attempt of one
job, so that it never stops the next one.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

from pipelines import storage
from pipelines.config import AwayError

# What a shell says of a command that SIGINT ended: the exit status of a stage that was stopped
INTERRUPTED = 130
_POLL_S = 2.0


def marker_of(store: str, job: str) -> str:
    """URI of the marker of a job, whether it is there or not."""
    return storage.join(storage.normalise(store), "stops", job)


def ask(marker: str) -> None:
    """Ask the job of this marker to stop."""
    storage.write_bytes(marker, b"stop\n")


def forget(marker: str) -> None:
    """Take the marker away, once its job has ended."""
    storage.remove_object(marker)


@contextlib.contextmanager
def heeded(marker: str | None) -> Iterator[None]:
    """Interrupt this process (SIGINT), once, when the marker appears; without a marker nothing is watched.

    To be entered in the main thread.
    """
    if marker is None:
        yield
        return
    # Whatever a shell started in the background, and all below it, ignores SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    ended = threading.Event()
    thread = threading.Thread(target=_watch, args=(marker, ended), name="stop-marker", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        signal.signal(signal.SIGINT, before)


def _watch(marker: str, ended: threading.Event) -> None:
    while not ended.wait(_POLL_S):
        with contextlib.suppress(AwayError):  # asked again at the next look
            if storage.exists(marker):
                os.kill(os.getpid(), signal.SIGINT)
                return
