"""The train stage: Ray Train runs one process per device; the store holds the truth that it resumes from."""

import contextlib
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from diffusion_core.strategies import Ranks
from pipelines import storage
from pipelines.checkpoint import latest_step
from pipelines.config import InterruptedRunError, Outcome, TrainConfig, failure
from pipelines.dataset import open_dataset
from pipelines.progress import printed_board
from pipelines.train.board import TrainBoard, deaths_counted, errors_left, wishes_heard
from pipelines.train.devices import processes, tell_of_growth
from pipelines.train.loop import train_on_rank
from pipelines.train.metrics import TrainMetrics
from pipelines.train.parent import check_parent
from pipelines.train.plan import check, result, run_uri
from pipelines.train.session import Host

_POLL_S = 0.5


def find(config: TrainConfig) -> Outcome | None:
    """The model of these settings and this dataset, if it is published. Raises PipelineError as `check_parent` does."""
    check_parent(config)
    uri = result(run_uri(config, open_dataset(config.dataset)))
    return Outcome(uri=uri, found=True) if uri and storage.is_published(uri) else None


def run(config: TrainConfig) -> Outcome:
    """Train to the last step and publish the model; goes on at the newest checkpoint of an earlier run.

    Raises PipelineError where dataset and settings do not fit, before any worker starts, and InterruptedRunError where
    it was stopped from outside and has saved what was done.
    """
    dataset = open_dataset(config.dataset)
    check(config, dataset)
    workers, use_gpu = processes(config)
    tell_of_growth(config.min_workers or workers, use_gpu)
    _fit(config, workers, use_gpu)
    uri = run_uri(config, dataset)
    made = result(uri)
    if made is None:
        raise InterruptedRunError(
            f"train: stopped and saved at step {_saved(config) or 0} of {config.steps}; run the same command to go on"
        )
    return Outcome(uri=made, found=False)


def _fit(config: TrainConfig, workers: int, use_gpu: bool) -> None:
    """Run `_loop` on all workers under Ray Train, which starts them again when one dies."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")
    elastic = config.min_workers and config.min_workers < workers
    # Ray Train's own folder holds nothing that is read again: checkpoints go to the store.
    with (
        tempfile.TemporaryDirectory(prefix="ray-train-") as scratch,
        printed_board(TrainBoard, config.restarts) as board,
    ):
        trainer = TorchTrainer(
            _loop,
            train_loop_config={"config": config.model_dump(mode="json"), "use_gpu": use_gpu, "board": board},
            scaling_config=ScalingConfig(
                num_workers=(config.min_workers, workers) if elastic else workers, use_gpu=use_gpu,
                elastic_resize_monitor_interval_s=config.resize_every,
            ),
            torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
            # The board counts deaths, and forgets those that were followed by a new checkpoint.
            run_config=RunConfig(
                name=config.name, storage_path=scratch, callbacks=[deaths_counted(board)],
                failure_config=FailureConfig(max_failures=-1),
            ),
        )  # fmt: skip
        _wait_for(trainer.fit, board)


def _wait_for(fit: Callable[[], Any], board: Any) -> None:
    """Run `fit` in a thread, so that Ctrl-C and SIGTERM ask the workers to save and stop; a second one goes at once.

    Raises PipelineError with what a worker said that no restart mends.
    """
    import ray

    errors: list[BaseException] = []

    def runs() -> None:
        try:
            fit()
        except Exception as error:  # noqa: BLE001 - raised again below, in the thread that is waited in
            errors.append(error)

    thread = threading.Thread(target=runs, name="ray-train", daemon=True)
    thread.start()
    with _asking(lambda: board.ask.remote()):
        while thread.is_alive():
            thread.join(_POLL_S)
    said, status = ray.get(board.failed.remote())
    if said:
        raise failure(said, status)
    if errors:
        raise errors[0]


def _saved(config: TrainConfig) -> int | None:
    """The step of the newest checkpoint."""
    return latest_step(run_uri(config, open_dataset(config.dataset)))


@contextlib.contextmanager
def _asking(ask: Callable[[], object]) -> Iterator[None]:
    """The first SIGINT or SIGTERM calls `ask`, the next interrupts; in a thread that hears no signals, nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def heard(number: int, _: object) -> None:
        print(f"train: {signal.Signals(number).name}: saving; once more stops at once", flush=True)
        for each, former in handlers.items():
            signal.signal(each, former)
        ask()

    handlers = {each: signal.signal(each, heard) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for each, former in handlers.items():
            signal.signal(each, former)


def _loop(arguments: dict[str, Any]) -> None:
    """What every worker does: train from where the store is, to the end or until it is asked to stop."""
    import ray
    from ray import train

    config, board = TrainConfig.model_validate(arguments["config"]), arguments["board"]
    context = train.get_context()
    device = train.torch.get_device() if arguments["use_gpu"] else torch.device("cpu")
    ranks = Ranks(context.get_world_rank(), context.get_world_size(), context.get_local_world_size(), device)
    with errors_left(board), wishes_heard(board) as asked:
        if ranks.rank == 0:
            ray.get(board.begin.remote(_saved(config)))
        host = Host(
            lambda line: board.post.remote(line), asked, _Notices(), lambda told: train.report(told),
            TrainMetrics(config.name).tell, read_ahead=True,
        )  # fmt: skip
        train_on_rank(config, ranks, host)


class _Notices:
    """Whether Ray has newly heard that a node of the group will be taken away; all ranks call it together."""

    def __init__(self) -> None:
        self.known: set[str] = set()

    def __call__(self) -> bool:
        from ray import train

        info = train.get_preemption_info()
        fresh = set(info.preempted_node_ids if info else ()) - self.known
        self.known |= fresh
        return bool(fresh)
