"""The application put onto a cluster by Ray Serve's own API, beside those that run there already."""

import time
from typing import Any

from pipelines.cluster import asked, connect
from pipelines.config import PipelineError, ServeConfig
from pipelines.flow_config import Cluster
from pipelines.progress import print_line
from pipelines.serve.stage import deployed

_POLL_S = 1.0


def roll_out(config: ServeConfig, cluster: Cluster, within: float) -> str:
    """Have a cluster run the application of these settings; its URL, once it answers.

    Other applications there go on as they are. A version that does not come up leaves the last one answering. Raises
    PipelineError where it fails, or is not ready `within` so many seconds; AwayError where the cluster is away.
    """
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

    connect(cluster)  # which waits for it, and tells what is wrong
    client = asked(cluster.address, lambda: ServeSubmissionClient(cluster.address, headers=cluster.headers))
    wanted = deployed(config)
    details = asked(cluster.address, client.get_serve_details)
    running = details.get("applications", {})
    others = [each["deployed_app_config"] for name, each in running.items() if name != config.app]
    _check_routes(config, running)
    wanted["applications"] += [each for each in others if each]
    asked(cluster.address, lambda: client.deploy_applications(wanted))
    _wait(client, cluster, config.app, within)
    http = asked(cluster.address, client.get_serve_details)["http_options"]
    return f"http://{http['host']}:{http['port']}"


def _check_routes(config: ServeConfig, running: dict[str, Any]) -> None:
    """Refuse to push another application off the route that this one takes."""
    for name, each in running.items():
        if name != config.app and each.get("route_prefix") == "/":
            raise PipelineError(f"app: {name} answers at / there already; give --app {name}, or delete it first")


def _wait(client: Any, cluster: Cluster, app: str, within: float) -> None:
    deadline, told = time.monotonic() + within, ""
    while True:
        state = asked(cluster.address, client.get_serve_details)["applications"].get(app, {})
        status, message = state.get("status", "NOT_STARTED"), (state.get("message") or "").strip()
        if status == "RUNNING":
            return
        if status != told:
            print_line(f"deploy: {app} is {status.lower().replace('_', ' ')}")
            told = status
        last = message.splitlines()[-1] if message else "no reason given"
        if status in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise PipelineError(f"{app} on {cluster.address}: {status}: {last}")
        if time.monotonic() > deadline:
            raise PipelineError(f"{app} on {cluster.address}: not ready after {within:g} s ({status}: {last})")
        time.sleep(_POLL_S)
