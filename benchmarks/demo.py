"""Does the demo keep its budget? Runs it once and prints time and peak memory, each as a share of its budget.

usage: python benchmarks/demo.py NEW_FOLDER [flags of `flows.py demo`]

The folder becomes the demo's store. Budget: 8 minutes and 6 GB on 2 cores without a GPU.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

BUDGET_S, BUDGET_BYTES = 480.0, 6e9
POLL_S = 1.0
ROOT = Path(__file__).resolve().parent.parent


def main(store: str, flags: list[str]) -> int:
    """Run, watch, print."""
    if Path(store).exists():
        sys.exit(f"error: {store} exists; what is found there would not be measured, so give a new folder")
    began, peak = time.monotonic(), 0
    with subprocess.Popen([sys.executable, "flows.py", "demo", "--store", store, *flags], cwd=ROOT) as demo:
        while demo.poll() is None:
            peak = max(peak, sum(own_bytes(pid) for pid in tree(demo.pid)))
            time.sleep(POLL_S)
    seconds = time.monotonic() - began
    print(f"time   {seconds:7.1f} s   {seconds / BUDGET_S:.2f} of the budget of {BUDGET_S:.0f} s")
    print(f"memory {peak / 1e9:7.2f} GB  {peak / BUDGET_BYTES:.2f} of the budget of {BUDGET_BYTES / 1e9:.0f} GB")
    return demo.returncode


def tree(root: int) -> set[int]:
    """The process and all its descendants."""
    parents = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = Path(f"/proc/{entry}/stat").read_text()
            except OSError:
                continue  # it ended meanwhile
            parents[int(entry)] = int(stat.rsplit(")", 1)[1].split()[1])
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def own_bytes(pid: int) -> int:
    """Proportional memory of a process in bytes: shared pages are counted once over all that share them."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Pss:")), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
