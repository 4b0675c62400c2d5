"""Figures of a run on an MLflow server, sent beside the training: a server out of reach holds up no step."""

import os
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from pipelines.config import PipelineError

_EXPERIMENT = "image-diffusion"
# A server that is away is asked again with the next figures, so that one call may give up early.
_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
_AT_ONCE = 1000  # figures that MLflow takes in a call
_KEPT = 100_000


class Tracking:
    """The MLflow run of a training run, found again by its address; figures wait while the server is away."""

    def __init__(self, address: str, run: str, settings: dict[str, Any]) -> None:
        """Find or begin the run. Raises PipelineError where the server does not answer or MLflow is not installed."""
        for name, value in _PATIENCE.items():
            os.environ.setdefault(name, value)
        try:
            from mlflow import MlflowClient
            from mlflow.exceptions import MlflowException
        except ImportError as error:
            raise PipelineError(f"--mlflow {address}: pip install mlflow-skinny first") from error
        self.address, self.trouble = address, MlflowException
        self.waiting: deque[Any] = deque(maxlen=_KEPT)
        try:
            self.client = MlflowClient(tracking_uri=address)
            self.run_id = self._found("/".join(run.split("/")[-2:]), settings)
        except MlflowException as error:
            raise PipelineError(f"--mlflow {address}: {str(error).splitlines()[0]}") from error
        self.pool = ThreadPoolExecutor(1, "mlflow")
        self.sending: Future[str] | None = None

    def log(self, values: dict[str, float], step: int) -> str:
        """Take figures at a step, to be sent beside the training; what went wrong with earlier ones, or nothing."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self.waiting.extend(Metric(name, value, now, step) for name, value in values.items())
        if self.sending is not None and not self.sending.done():
            return ""
        trouble = self.sending.result() if self.sending else ""
        self.sending = self.pool.submit(self._send)
        return self._told(trouble)

    def close(self) -> str:
        """Send what still waits; what went wrong, or nothing."""
        trouble = self.pool.submit(self._send).result()
        self.pool.shutdown()
        return self._told(trouble)

    def _told(self, trouble: str) -> str:
        return f"--mlflow {self.address}: {len(self.waiting)} figures wait: {trouble}" if trouble else ""

    def _send(self) -> str:
        """Send what waits, the oldest first; what went wrong, for which no training should stop."""
        while some := list(self.waiting)[:_AT_ONCE]:
            try:
                self.client.log_batch(self.run_id, some)
            except self.trouble as error:
                return str(error).splitlines()[0]
            for sent in some:
                if self.waiting and self.waiting[0] is sent:  # else it made room for newer ones meanwhile
                    self.waiting.popleft()
        return ""

    def _found(self, name: str, settings: dict[str, Any]) -> str:
        """The id of the run of this name, begun with its settings where there is none."""
        experiment = self.client.get_experiment_by_name(_EXPERIMENT)
        number = experiment.experiment_id if experiment else self.client.create_experiment(_EXPERIMENT)
        known = self.client.search_runs([number], f"attributes.run_name = '{name}'")
        if known:
            return str(known[0].info.run_id)
        begun = str(self.client.create_run(number, run_name=name).info.run_id)
        for key, value in settings.items():
            self.client.log_param(begun, key, value)
        return begun
