"""What driver and workers of a training run tell one another, beside the lines for people."""

import contextlib
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from pipelines.config import PipelineError, status_of
from pipelines.progress import Board

_POLL_S = 0.5


class TrainBoard(Board):
    """A board on which driver and workers also leave word for one another: to stop, what failed, how far they are."""

    def __init__(self, patience: int) -> None:
        super().__init__()
        self.patience, self.deaths = patience, 0
        self.asked, self.failure, self.status, self.trace = False, "", 0, ""
        self.step: int | None = None

    def ask(self) -> None:
        """The driver wants the workers to save and stop."""
        self.asked = True

    def is_asked(self) -> bool:
        """Whether the workers are to save and stop."""
        return self.asked

    def fail(self, message: str, status: int = 1) -> None:
        """A worker met what a restart does not mend; the first one's words count."""
        if not self.failure:
            self.failure, self.status = message, status

    def crash(self, trace: str) -> None:
        """A worker died of this."""
        self.trace = trace

    def failed(self) -> tuple[str, int]:
        """What a restart does not mend, and its status; empty where all is well."""
        return self.failure, self.status

    def begin(self, step: int | None) -> None:
        """A group of workers begins at the checkpoint of `step`: deaths before a new one are forgotten."""
        self.deaths = self.deaths if step == self.step else 0
        self.step = step

    def died(self) -> str:
        """Workers of a group died; the reason why no other group is to be started, or nothing."""
        self.deaths += 1
        if self.deaths > self.patience:
            last = (
                self.trace.strip().splitlines()[-1] if self.trace else "killed from outside, often for want of memory"
            )
            self.fail(
                f"train: workers died {self.deaths} times without a new checkpoint after step {self.step or 0}; the "
                f"last: {last}; lower --checkpoint-every, or see --micro-batch and python -m pipelines plan"
            )
        return self.failure


def deaths_counted(board: Any) -> Any:
    """What Ray Train's controller calls when workers have died: it has them counted, and ends the run at the limit.

    Ray Train's public callback is not told of workers that die before they have begun, so this is an internal one.
    """
    import ray
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
    from ray.train.v2._internal.execution.callback import ControllerCallback
    from ray.train.v2._internal.execution.failure_handling.default import _is_preemption_failure

    class Deaths(ControllerCallback):  # type: ignore[misc]
        def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
            error = getattr(current_state, "training_failed_error", None)
            waits = isinstance(getattr(error, "controller_failure", None), WorkerGroupStartupTimeoutError)
            # Nodes that are missing are waited for, and one that is taken away is nobody's fault.
            if error is None or waits or _is_preemption_failure(error):
                return
            failure = ray.get(board.died.remote())
            if failure:
                raise RuntimeError(failure)

    return Deaths()


@contextlib.contextmanager
def errors_left(board: Any) -> Iterator[None]:
    """Errors left on the board: what no restart mends, and what a worker dies of."""
    import ray

    try:
        yield
    except PipelineError as error:
        ray.get(board.fail.remote(str(error), status_of(error)))
        raise
    except Exception:
        ray.get(board.crash.remote(traceback.format_exc()))
        raise


@contextlib.contextmanager
def wishes_heard(board: Any) -> Iterator[Callable[[], bool]]:
    """Whether the driver wants the workers to stop, asked for beside the training so that no step waits for it."""
    import ray

    asked, done = threading.Event(), threading.Event()

    def listen() -> None:
        while not done.wait(_POLL_S):
            if ray.get(board.is_asked.remote()):
                asked.set()
                return

    threading.Thread(target=listen, name="board", daemon=True).start()
    try:
        yield asked.is_set
    finally:
        done.set()
