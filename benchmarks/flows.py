"""What a stage costs as a Ray job, and as a run of a Prefect deployment, beside the stage as a command.

usage: python benchmarks/flows.py [--home runs/up] [--rounds 3]

Needs `make up`. The same small ingestion (96 drawn pictures, each time with another --shard-size, so that it is new
work) runs in turns as a command with a Ray of its own, as a job of the cluster that is up, and as a run of the
deployment `ingest`, from the trigger to its Completed state. Prints medians in seconds, and their ratios.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pipelines.cartoons import tar_shard
from pipelines.config import IngestConfig, to_flags
from pipelines.flow_config import Cluster
from pipelines.jobs import run_stage


def main() -> int:
    """Measure in turns, and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--home", default="runs/up")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(Path(options.home).resolve() / "ray-token")}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "in"
        source.mkdir()
        (source / "some.tar").write_bytes(tar_shard(0, 0, 96, 8))
        ways: dict[str, Callable[[IngestConfig], object]] = {"command": by_command, "job": by_job, "flow": by_flow}
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(options.rounds * len(ways)):
            way = list(ways)[number % len(ways)]
            config = IngestConfig(
                store=f"{folder}/store", name="bench", source=[str(source)], resolution=8, shard_size=16 + number
            )
            began = time.perf_counter()
            ways[way](config)
            seconds[way].append(time.perf_counter() - began)
    medians = {way: statistics.median(times) for way, times in seconds.items()}
    for way, median in medians.items():
        print(f"{way}: {median:.1f} s (over the command: {median / medians['command']:.2f}); {seconds[way]}")
    return 0


def by_command(config: IngestConfig) -> None:
    """A process with a Ray of its own."""
    command = [sys.executable, "-m", "pipelines", "ingest", *to_flags(config)]
    subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)


def by_job(config: IngestConfig) -> None:
    """A job of the cluster that is up."""
    run_stage("ingest", config, Cluster(address=deployment()["parameters"]["config"]["cluster"]))


def by_flow(config: IngestConfig) -> None:
    """A run of the deployment, from its trigger to its end."""
    known = deployment()
    settings = {**known["parameters"]["config"], **config.model_dump(mode="json", exclude_unset=True)}
    run = ask(f"deployments/{known['id']}/create_flow_run", {"parameters": {"config": settings}})
    while (state := ask(f"flow_runs/{run['id']}")["state"])["type"] not in ("COMPLETED", "FAILED", "CRASHED"):
        time.sleep(0.2)
    if state["type"] != "COMPLETED":
        raise SystemExit(f"error: run {run['id']}: {state['name']}: {state['message']}")


def deployment() -> dict[str, Any]:
    """The deployment of the ingest flow."""
    return ask("deployments/name/ingest/ingest")


def ask(path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """What the Prefect server answers."""
    data = None if body is None else json.dumps(body).encode()
    address = os.environ.get("PREFECT_API_URL", "http://127.0.0.1:4200/api")
    request = urllib.request.Request(f"{address}/{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


if __name__ == "__main__":
    sys.exit(main())
