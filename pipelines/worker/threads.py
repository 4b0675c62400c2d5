"""OpenMP's threads, of which a process should have one team: the one of the thread that makes pictures."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_Made = TypeVar("_Made")


def apart(make: Callable[[], _Made]) -> _Made:
    """What `make` returns in a thread of its own, whose team of OpenMP threads ends with it. Raises what `make` raises.

    Each thread that computes gets a team, and libgomp counts the members of all: once they are more than the cores,
    they sleep at every barrier instead of waiting awake (throttled spinning), and a tick has thousands of barriers.
    Waiting awake is for a process that has the machine to itself: where others compute as well, it takes their time.
    """
    with ThreadPoolExecutor(1, "apart") as pool:
        return pool.submit(make).result()
