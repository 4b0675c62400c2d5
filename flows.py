"""The Prefect flows: pictures in, URIs out. `python flows.py NAME --flags` runs one here and now."""

import sys
import time
from collections.abc import Sequence
from typing import Any

from prefect import flow, task

from pipelines.config import (
    DemoConfig,
    DrawConfig,
    EvaluateConfig,
    GenerateConfig,
    IngestConfig,
    Outcome,
    PipelineConfig,
    PipelineError,
    ServeConfig,
    Settings,
    TrainConfig,
    narrow,
    parse,
)


@task(task_run_name="{name}")
def stage(name: str, config: Settings, cluster: str | None) -> Outcome:
    """One stage, here or as a job on the cluster; its result is found again by its settings."""
    from pipelines.jobs import run_stage

    return run_stage(name, config, cluster)


@task
def report(uris: dict[str, str], seconds: dict[str, float], config: PipelineConfig) -> str:
    """The page that shows what came out."""
    from pipelines.report import collect, write_report
    from pipelines.storage import normalise

    return write_report(normalise(config.store), collect(uris, seconds, config.model_dump(mode="json")))


@flow(flow_run_name="{config.name}")
def pipeline(config: PipelineConfig, seconds: dict[str, float] | None = None) -> str:
    """Ingest → train → serve → generate → evaluate → report; returns the report's URI."""
    clock = Clock(seconds or {})
    dataset = clock.time("ingest", stage, narrow(config, IngestConfig), config.cluster)
    training = narrow(config.train, TrainConfig, store=config.store, name=config.name, dataset=dataset)
    model = clock.time("train", stage, training, config.cluster)
    url = None if config.cluster else serve(config, model)
    images = clock.time("generate", stage, bulk_config(config, model, url), config.cluster)
    judging = narrow(
        config.evaluate, EvaluateConfig, store=config.store, name=config.name,
        dataset=dataset, model=model, images=images, url=url,
    )  # fmt: skip
    evaluation = clock.time("evaluate", stage, judging, config.cluster)
    uris = {"ingest": dataset, "train": model, "generate": images, "evaluate": evaluation}
    return report(uris, clock.seconds, config)


@flow(flow_run_name="{config.name}")
def demo(config: DemoConfig) -> str:
    """Draw cartoons, then run the pipeline on them."""
    clock = Clock({})
    drawing = narrow(config.draw, DrawConfig, store=config.store, name=config.name, resolution=config.resolution)
    shards = clock.time("draw", stage, drawing, None)
    return pipeline(narrow(config, PipelineConfig, source=[f"{shards}/*.tar"]), clock.seconds)


class Clock:
    """Runs stages and remembers how long each took."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds = dict(seconds)

    def time(self, name: str, run: Any, config: Settings, cluster: str | None) -> str:
        """The URI of the stage's result."""
        began = time.monotonic()
        outcome: Outcome = run(name, config, cluster)
        self.seconds[name] = time.monotonic() - began
        return outcome.uri


def bulk_config(config: PipelineConfig, model: str, url: str | None) -> GenerateConfig:
    """Bulk generation through the service where one runs."""
    via = "serve" if url else "actors"
    more: dict[str, Any] = {"store": config.store, "name": config.name, "model": model, "via": via}
    return GenerateConfig.model_validate({**config.generate.model_dump(), **more})


@task
def serve(config: PipelineConfig, model: str) -> str:
    """The model behind HTTP on the embedded Ray; returns the service's URL."""
    from pipelines.jobs import connect
    from pipelines.serve import start

    connect()
    return start(narrow(config, ServeConfig, model=model, port=0))


FLOWS: dict[str, tuple[Any, type[Settings]]] = {"demo": (demo, DemoConfig), "pipeline": (pipeline, PipelineConfig)}


def main(arguments: Sequence[str]) -> int:
    """Run the flow that the first argument names; returns the exit status."""
    if not arguments or arguments[0] not in FLOWS:
        lines = [f"  {name:<10}{kind.__doc__}" for name, (_, kind) in FLOWS.items()]
        print("\n".join(["usage: python flows.py FLOW [--help] [--flags]", "", "flows:", *lines]))
        return 0 if arguments and arguments[0] in ("-h", "--help") else 2
    name, *flags = arguments
    run, kind = FLOWS[name]
    try:
        print(run(parse(kind, f"python flows.py {name}", flags)))
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
