"""Run a stage: here on a Ray of our own, or as a job on a named Ray cluster, and find what is done already."""

import contextlib
import importlib
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from diffusion_core.config import PRESETS, ModelConfig
from pipelines import cluster
from pipelines import config as settings
from pipelines.config import AwayError, Outcome, PipelineError, Settings
from pipelines.flow_config import Cluster
from pipelines.report import Showing
from pipelines.storage import list_objects

_OBJECT_STORE_BYTES = 400_000_000
_IDLE_WORKER_MS = 5_000


class Stage(NamedTuple):
    """A stage: its settings, the module that has its `find` and `run`, whether it needs Ray, and makes a result.

    One that makes none has no `find`, and its `run` prints: `call` is that function where a module has several.
    `command` is what its command line takes, where that is more than its settings. One that `paints` makes pictures in
    this process, where one worker is all that there would be.
    """

    config: type[Settings]
    module: str
    needs_ray: bool = True
    makes_result: bool = True
    command: type[Settings] | None = None
    call: str = "run"
    paints: bool = False

    @property
    def flags(self) -> type[Settings]:
        """What its command line takes."""
        return self.command or self.config


def _printing(config: type[Settings], module: str, call: str = "run") -> Stage:
    """A stage that makes no result and needs no Ray."""
    return Stage(config, module, needs_ray=False, makes_result=False, call=call)


STAGES: dict[str, Stage] = {
    "draw": Stage(settings.DrawConfig, "pipelines.cartoons", needs_ray=False),
    "ingest": Stage(settings.IngestConfig, "pipelines.ingest"),
    "plan": _printing(settings.PlanConfig, "pipelines.plan"),
    "train": Stage(settings.TrainConfig, "pipelines.train", command=settings.TrainCommand),
    "import": Stage(settings.ImportConfig, "pipelines.exchange", needs_ray=False),
    "export": Stage(settings.ExportConfig, "pipelines.exchange", needs_ray=False),
    "generate": Stage(settings.GenerateConfig, "pipelines.bulk", command=settings.GenerateCommand, paints=True),
    "evaluate": Stage(settings.EvaluateConfig, "pipelines.evaluate", paints=True),
    "serve": Stage(settings.ServeConfig, "pipelines.serve"),
    "key": _printing(settings.KeyConfig, "pipelines.serve.keys", "make_key"),
    "models": _printing(settings.ModelsConfig, "pipelines.registry", "show"),
    "promote": _printing(settings.PromoteConfig, "pipelines.registry", "promote"),
    "rollback": _printing(settings.RollbackConfig, "pipelines.registry", "roll_back"),
    "retire": _printing(settings.RetireConfig, "pipelines.registry", "retire"),
    "trace": _printing(settings.TraceConfig, "pipelines.lineage.trace"),
    "verify": _printing(settings.VerifyConfig, "pipelines.lineage.verify"),
    "forget": _printing(settings.ForgetConfig, "pipelines.lineage.forget"),
    "cleanup": _printing(settings.CleanupConfig, "pipelines.lineage.cleanup"),
}


def _nobody(_: cluster.Job) -> None:
    """Nobody wants to know which job it is."""


def run_stage(
    name: str, config: Settings, place: Cluster | None = None, told: Callable[[cluster.Job], None] = _nobody
) -> Outcome:
    """The result of a stage: found in the store, made here, or made by a job on the cluster `place`.

    `told` is called with each job that is followed. Raises PipelineError where the stage fails.
    """
    settings.choose_ray_authentication()
    module = importlib.import_module(STAGES[name].module)
    found = find_result(name, config)
    if found is not None:
        print(f"{name}: found {found.uri}", flush=True)
        return found
    if place is not None:
        cluster.run_job(name, config, place, told)
        return _made(name, find_result(name, config), place)
    if STAGES[name].paints:
        _keep_memory()
    if STAGES[name].needs_ray:
        connect()
    try:
        made: Outcome = module.run(config)
    except Exception as error:
        mendable = _mendable(error)
        if mendable is None or mendable is error:
            raise
        raise mendable from error
    return made


def _keep_memory() -> None:
    """As a process that makes pictures does; torch is not loaded before."""
    importlib.import_module("pipelines.worker.memory").keep()


def find_result(name: str, config: Settings) -> Outcome | None:
    """The result of a stage with these settings, if it is there. Raises PipelineError where an input is missing."""
    found: Outcome | None = importlib.import_module(STAGES[name].module).find(config)
    return found


def show(name: str, uri: str) -> Showing:
    """What of a stage's result is worth a look; nothing where the stage has no pictures."""
    module = importlib.import_module(STAGES[name].module)
    return module.show(uri) if hasattr(module, "show") else Showing({}, {})


def print_stage(name: str, config: Settings) -> None:
    """Run a stage that makes no result. Raises PipelineError where it fails."""
    getattr(importlib.import_module(STAGES[name].module), STAGES[name].call)(config)


def rehearse(command: settings.GenerateCommand) -> None:
    """Tell what bulk work would be and cost, making nothing. Raises PipelineError where it cannot be done."""
    _keep_memory()
    importlib.import_module("pipelines.bulk").rehearse(command)


def settle(command: settings.TrainCommand) -> settings.TrainConfig:
    """The settings of a training run that were asked for by pictures or by a time: ingests, measures, chooses.

    Raises PipelineError where nothing fits.
    """
    chosen: dict[str, Any] = {}
    for source in command.source:
        list_objects(source)  # what is not there is told before anything is measured
    if command.budget:
        connect()
        budget = importlib.import_module("pipelines.train.budget")
        chosen = budget.choose(command)
    resolution = chosen.pop("resolution", None) or command.resolution or _own_resolution(command)
    dataset = command.dataset
    if dataset is None:
        place = {"store": command.store, "name": command.name, "source": command.source, "resolution": resolution}
        dataset = run_stage("ingest", settings.IngestConfig(**place)).uri
    return settings.narrow(command, settings.TrainConfig, **chosen, dataset=dataset)


def _own_resolution(command: settings.TrainCommand) -> int:
    """The resolution that the network was sized for: the parent's, or the preset's."""
    if command.parent is None:
        return PRESETS[command.preset].resolution
    parent: ModelConfig = importlib.import_module("pipelines.model").load_config(command.parent)
    return parent.unet.resolution


def _mendable(error: BaseException | None) -> PipelineError | None:
    """The error of a worker's own that Ray wrapped, if there is one inside; Ray's wrapping holds the whole trace."""
    if error is None:
        return None
    inner = [getattr(error, "cause", None), *getattr(error, "worker_failures", {}).values(), error.__cause__]
    found = next((own for own in map(_mendable, inner) if own is not None), None)
    return found or (error if isinstance(error, PipelineError) else None)


def connect() -> None:
    """Connect to the Ray cluster this process belongs to, or start a small one of our own; once per process."""
    settings.choose_ray_authentication()
    import ray
    import ray.data
    import ray.serve

    if ray.is_initialized():
        return
    for name in ("ray.data", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Ray ends a worker that was idle for a second; each new one then costs two: stages have many short steps.
    keep = {"idle_worker_killing_time_threshold_ms": _IDLE_WORKER_MS}
    own = {
        "address": "local", "include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES,
        "_system_config": keep,
    }  # fmt: skip
    # Workers' lines are for Ray's log files: what people should see comes through progress.Board and as errors.
    _start({} if settings.ray_address() else own)


def _start(options: dict[str, Any]) -> None:
    """Start Ray, or go to the one that runs. Raises AwayError where that takes longer than Ray waits."""
    import ray

    try:
        ray.init(**options, logging_level=logging.WARNING, log_to_driver=False)
    except Exception as error:
        if type(error) is not Exception:  # which is what Ray raises where its processes do not answer in half a minute
            raise
        raise AwayError(f"ray: not started ({error}); let the machine do less at once, and try again") from error


@contextlib.contextmanager
def visit() -> Iterator[None]:
    """Leave Ray at the end, unless this process was connected before."""
    before = "ray" in sys.modules and sys.modules["ray"].is_initialized()
    try:
        yield
    finally:
        if not before:
            disconnect()


def disconnect() -> None:
    """Leave Ray; stops it where `connect` started it."""
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()


def _made(name: str, found: Outcome | None, place: Cluster) -> Outcome:
    """What a finished job left in the store."""
    if found is None:
        raise PipelineError(
            f"{name}: the job on {place.address} ended well, but its result is not in the store seen from here"
        )
    return Outcome(uri=found.uri, found=False)
