"""The Prefect flows: pictures in, URIs out. `python flows.py NAME --flags` runs one here and now."""

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from prefect import flow, task
from prefect.client.schemas.objects import State
from prefect.exceptions import FailedRun
from prefect.states import Failed

from pipelines.config import (
    DemoConfig,
    DrawConfig,
    EvaluateConfig,
    GenerateConfig,
    IngestConfig,
    Outcome,
    PipelineConfig,
    PipelineError,
    PromoteConfig,
    ServeConfig,
    Settings,
    TrainConfig,
    narrow,
    parse,
)

Result = str | State[Any]
Made = TypeVar("Made")


@flow(flow_run_name="{config.name}", validate_parameters=True)
def demo(config: DemoConfig) -> Result:
    """Draw cartoons, then run the whole pipeline on them; returns the report's URI."""
    return told(lambda: draw_and_run(config))


@flow(flow_run_name="{config.name}", validate_parameters=True)
def pipeline(config: PipelineConfig) -> Result:
    """Ingest → train → serve → generate → evaluate → promote → report; returns the report's URI."""
    return told(lambda: run_pipeline(config, Clock()))


@flow(flow_run_name="{config.name}", validate_parameters=True)
def evaluate(config: EvaluateConfig) -> Result:
    """Measure a model; returns the evaluation's URI."""
    return told(lambda: Clock().time("evaluate", config))


def draw_and_run(config: DemoConfig) -> str:
    """The demo: its pictures come from the built-in cartoonist, as shards that anyone might have delivered."""
    clock = Clock()
    drawing = narrow(config.draw, DrawConfig, store=config.store, name=config.name, resolution=config.resolution)
    shards = clock.time("draw", drawing)
    return run_pipeline(narrow(config, PipelineConfig, source=[f"{shards}/*.tar"]), clock)


def run_pipeline(config: PipelineConfig, clock: "Clock") -> str:
    """Every stage in turn, each given the URI of the one before."""
    place = {"store": config.store, "name": config.name}
    dataset = clock.time("ingest", narrow(config, IngestConfig), config.cluster)
    model = clock.time("train", narrow(config.train, TrainConfig, dataset=dataset, **place), config.cluster)
    generation = narrow(config.generate, GenerateConfig, model=model, **place)
    judging = narrow(config.evaluate, EvaluateConfig, dataset=dataset, model=model, **place)
    # A cluster's service is deployed and not started by a flow, so there the stages load the model themselves.
    url = None
    if not config.cluster and not is_done(generation, judging):
        url = value_of(serve(narrow(config, ServeConfig, model=model, port=0), return_state=True))
    via: Any = {"via": "serve"} if url else {}
    images = clock.time("generate", generation.model_copy(update=via), config.cluster)
    judging = judging.model_copy(update={"images": images, "url": url})
    evaluation = clock.time("evaluate", judging, config.cluster)
    promotion = value_of(promote(promotion_of(config, model, evaluation), return_state=True))
    uris = {"ingest": dataset, "train": model, "generate": images, "evaluate": evaluation}
    return str(value_of(report(uris, clock.seconds, promotion, config, return_state=True)))


def promotion_of(config: PipelineConfig, model: str, evaluation: str) -> PromoteConfig:
    """The promotion of a model that the pipeline has just judged."""
    return narrow(config.promote, PromoteConfig, model=model, evaluation=evaluation, store=config.store,
                  name=config.name)  # fmt: skip


def is_done(generation: GenerateConfig, judging: EvaluateConfig) -> bool:
    """Whether the store has the images and their evaluation, so that no service is needed."""
    from pipelines.jobs import find_result

    images = find_result("generate", generation)
    return images is not None and bool(find_result("evaluate", judging.model_copy(update={"images": images.uri})))


@task(task_run_name="{name}")
def stage(name: str, config: Settings, cluster: str | None) -> Outcome | State[Any]:
    """One stage, here or as a job on the cluster; its result is found again by its settings."""
    from pipelines.jobs import run_stage

    return told(lambda: run_stage(name, config, cluster))


@task(task_run_name="serve")
def serve(config: ServeConfig) -> Result:
    """The model behind HTTP on the embedded Ray; returns the service's URL."""
    from pipelines.jobs import connect

    connect()
    from pipelines.serve import start

    return told(lambda: start(config))


@task(task_run_name="promote")
def promote(config: PromoteConfig) -> dict[str, Any] | State[Any]:
    """Make the model live where its evaluation passes the gate; what became of it, in words."""
    from pipelines.registry import promote_or_tell

    return told(lambda: promote_or_tell(config))


@task(task_run_name="report")
def report(
    uris: dict[str, str], seconds: dict[str, float], promotion: dict[str, Any], config: PipelineConfig
) -> Result:
    """The page that shows what came out."""
    from pipelines.report import collect, write_report
    from pipelines.storage import normalise

    settings = config.model_dump(mode="json")
    return told(lambda: write_report(normalise(config.store), collect(uris, seconds, promotion, settings)))


class Clock:
    """Runs stages and remembers how long each took, in seconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def time(self, name: str, config: Settings, cluster: str | None = None) -> str:
        """The URI of the stage's result. Raises PipelineError with the stage's own words."""
        began = time.monotonic()
        outcome: Outcome = value_of(stage(name, config, cluster, return_state=True))
        self.seconds[name] = time.monotonic() - began
        return outcome.uri


def run_here(run: Any, config: Settings) -> str:
    """The URI that a flow returns, told once Ray is gone, so that nothing of Ray's is printed after it."""
    from pipelines.jobs import visit

    with visit():
        return str(value_of(run(config, return_state=True)))


def told(run: Callable[[], Made]) -> Made | State[Any]:
    """What `run` returns; an error that a user can mend becomes a failed state with its one line, without a trace."""
    try:
        return run()
    except PipelineError as error:
        return Failed(message=str(error))


def value_of(state: State[Any]) -> Any:
    """The result of a finished run. Raises PipelineError with its message where `told` made it a failed state."""
    try:
        return state.result()
    except FailedRun as error:
        raise PipelineError(str(error)) from error


FLOWS: dict[str, tuple[Any, type[Settings]]] = {
    "demo": (demo, DemoConfig), "pipeline": (pipeline, PipelineConfig), "evaluate": (evaluate, EvaluateConfig),
}  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    """Run the flow that the first argument names; returns the exit status."""
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = [f"  {name:<10}{kind.__doc__}" for name, (_, kind) in FLOWS.items()]
        print("\n".join(["usage: python flows.py FLOW [--help] [--flags]", "", "flows:", *lines]))
        return 0 if arguments else 2
    name, *flags = arguments
    try:
        if name not in FLOWS:
            raise PipelineError(f"no flow {name!r}; there are {', '.join(FLOWS)}")
        run, kind = FLOWS[name]
        print(run_here(run, parse(kind, f"python flows.py {name}", flags)))
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
