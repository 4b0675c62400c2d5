"""Memory of a process that makes pictures: kept from tick to tick, not given back to the system and asked for again.

glibc gives each thread a heap of its own that it cuts down whenever its end is free; a tick frees all that it took, so
that the next one pays for the same pages again, thousands a picture. Other C libraries are left as they are.
"""

import ctypes

# mallopt(3), by number and by environment variable: one heap, from which nothing below these bytes is given back.
_SETTINGS = {
    "ARENA_MAX": (-8, 1), "TRIM_THRESHOLD_": (-1, 2**31 - 1), "TOP_PAD_": (-2, 2**26), "MMAP_THRESHOLD_": (-3, 2**25),
}  # fmt: skip


def keep() -> None:
    """Have this process keep its memory; best before it has threads, as each gets its heap when it begins."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for number, value in _SETTINGS.values():
            mallopt(number, value)


def keeping() -> dict[str, dict[str, str]]:
    """Ray's runtime environment of a process that keeps its memory from its start."""
    return {"env_vars": {f"MALLOC_{name}": str(value) for name, (_, value) in _SETTINGS.items()}}
