"""The Prefect flows: pictures in, URIs out. `python flows.py NAME --flags` runs one here and now.

A flow is a few stages, each given the URI of the one before. What a stage has made is found again by the store's own
names, so a flow that is run again goes on where it stopped.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import httpx
from prefect import flow, get_client, runtime, task
from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.blocks.core import Block
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.client.schemas.objects import FlowRun, State
from prefect.concurrency.sync import concurrency
from prefect.exceptions import FailedRun, ObjectAlreadyExists
from prefect.flows import Flow
from prefect.states import Failed
from pydantic import Field, SecretStr

from pipelines.config import (
    AwayError,
    CleanupConfig,
    DrawConfig,
    EvaluateConfig,
    GenerateConfig,
    IngestConfig,
    Outcome,
    PipelineError,
    PromoteConfig,
    ServeConfig,
    Settings,
    TrainConfig,
    narrow,
    parse,
    status_of,
)
from pipelines.flow_config import (
    BLOCK,
    CleanupFlow,
    Cluster,
    DemoConfig,
    DeployFlow,
    EvaluateFlow,
    FlowOptions,
    GenerateFlow,
    IngestFlow,
    InpaintFlow,
    JobOptions,
    NightlyConfig,
    PipelineConfig,
    PromoteFlow,
    TrainFlow,
)

Result = str | State[Any]
Made = TypeVar("Made")
# Name of the state of a run that something out of reach made fail, which may be back later
AWAY = "Away"
# Labels of a flow's run: the job that works for it, by which a cancelled run's job is found
_CLUSTER, _JOB, _MARKER = "ray.cluster", "ray.job", "ray.stop"
_LEASE_S = 60.0
_PICTURES_BYTES = 2_000_000
_WIDTH = 900  # of pictures in an artifact, pixels


class RayCluster(Block):
    """A Ray cluster: where its job server listens, and the token that opens it."""

    _block_type_name = "Ray cluster"
    _block_type_slug = "ray-cluster"

    address: str = Field(pattern=r"^https?://\S+$", description="job server, http://HOST:8265")
    token: SecretStr | None = Field(None, description="Ray's token; default: the environment's RAY_AUTH_TOKEN")


def stop_job(flow: Flow[Any, Any], flow_run: FlowRun, state: State[Any]) -> None:
    """When a run is cancelled: have the job that works for it save what it has done, and stop."""
    from pipelines.cluster import Job
    from pipelines.cluster import stop_job as stop

    labels: dict[str, Any] = flow_run.labels
    if _JOB in labels:
        options = JobOptions.model_validate((flow_run.parameters.get("config") or {}).get("job") or {})
        stop(cluster_at(labels[_CLUSTER], options), Job(labels[_JOB], labels[_MARKER]))


_FLOW: dict[str, Any] = {
    "flow_run_name": "{config.name}", "validate_parameters": True, "on_cancellation": [stop_job],
}  # fmt: skip


@flow(**_FLOW)
def demo(config: DemoConfig) -> Result:
    """Draw cartoons, then run the whole pipeline on them; returns the report's URI."""
    return told(lambda: draw_and_run(config))


@flow(**_FLOW)
def pipeline(config: PipelineConfig) -> Result:
    """Ingest → train → serve → generate → evaluate → promote → report; returns the report's URI."""
    return told(lambda: run_pipeline(config, Steps(config)))


@flow(**_FLOW)
def nightly(config: NightlyConfig) -> Result:
    """New pictures → dataset → fine-tune → evaluate → promote behind the gate → the night's order; its images' URI."""
    return told(lambda: run_night(config, Steps(config)))


@flow(**_FLOW)
def ingest(config: IngestFlow) -> Result:
    """Turn pictures into a dataset; returns its URI."""
    return told(lambda: Steps(config).make("ingest", narrow(config, IngestConfig)))


@flow(**_FLOW)
def train(config: TrainFlow) -> Result:
    """Train a model; returns its URI."""
    return told(lambda: Steps(config).make("train", narrow(config, TrainConfig)))


@flow(**_FLOW)
def evaluate(config: EvaluateFlow) -> Result:
    """Measure a model; returns the evaluation's URI."""
    return told(lambda: Steps(config).make("evaluate", narrow(config, EvaluateConfig)))


@flow(**_FLOW)
def generate(config: GenerateFlow) -> Result:
    """Make pictures in bulk; returns the URI of the images."""
    return told(lambda: Steps(config).make("generate", order_of(config)))


@flow(**_FLOW)
def inpaint(config: InpaintFlow) -> Result:
    """Inpaint the pictures of a table; returns the URI of the images."""
    return told(lambda: Steps(config).make("generate", order_of(config)))


@flow(validate_parameters=True)
def promote(config: PromoteFlow) -> Result:
    """Make a model live where its evaluation passes the gate; returns what became of it. Fails where it does not."""
    return told(lambda: promoted_or_refused(narrow(config, PromoteConfig)))


@flow(**_FLOW)
def deploy(config: DeployFlow) -> Result:
    """Put the service onto a cluster; returns its URL."""
    return told(lambda: str(value_of(rollout(config, return_state=True))))


@flow(validate_parameters=True)
def cleanup(config: CleanupFlow) -> Result:
    """Say what may be deleted, and delete it on demand; returns the store's URI."""
    return told(lambda: str(value_of(clean(narrow(config, CleanupConfig), return_state=True))))


def draw_and_run(config: DemoConfig) -> str:
    """The demo: its pictures come from the built-in cartoonist, as shards that anyone might have delivered."""
    steps = Steps(config)
    drawing = narrow(config.draw, DrawConfig, store=config.store, name=config.name, resolution=config.resolution)
    shards = steps.make("draw", drawing, here=True)
    return run_pipeline(narrow(config, PipelineConfig, source=[f"{shards}/*.tar"]), steps)


def run_pipeline(config: PipelineConfig, steps: "Steps") -> str:
    """Every stage in turn, each given the URI of the one before."""
    place = {"store": config.store, "name": config.name}
    dataset = steps.make("ingest", narrow(config, IngestConfig))
    model = steps.make("train", narrow(config.train, TrainConfig, dataset=dataset, **place))
    generation = config.generation(model)
    judging = narrow(config.evaluate, EvaluateConfig, dataset=dataset, model=model, **place)
    # A cluster's service is deployed and not started by a flow, so there the stages load the model themselves.
    url = None
    if not config.cluster and not is_done(generation, judging):
        url = value_of(serve(narrow(config, ServeConfig, model=model, port=0), return_state=True))
    via: Any = {"via": "serve"} if url else {}
    images = steps.make("generate", generation.model_copy(update=via))
    judging = judging.model_copy(update={"images": images, "url": url})
    evaluation = steps.make("evaluate", judging)
    promotion = value_of(gate(promotion_of(config, model, evaluation), return_state=True))
    uris = {"ingest": dataset, "train": model, "generate": images, "evaluate": evaluation}
    return str(value_of(report(uris, steps.seconds, promotion, config, return_state=True)))


def run_night(config: NightlyConfig, steps: "Steps") -> str:
    """A night: a model that is live is tuned on what is new, and what is live afterwards makes the night's order."""
    from pipelines.registry import default_model

    if config.source:
        tune(config, steps)
    return steps.make("generate", config.order(default_model(config.store, config.name), night_of(config)))


def tune(config: NightlyConfig, steps: "Steps") -> None:
    """Tune the live model on the pictures of the sources, where some are new, and promote what comes out."""
    from pipelines.registry import live_model

    place = {"store": config.store, "name": config.name}
    dataset = steps.make("ingest", narrow(config, IngestConfig))
    live = live_model(config.store, config.name)
    if live is None or is_news(dataset, live.uri):
        parent = {} if live is None else {"parent": live.uri}
        if live is not None:  # measured on the same held-out pictures, so that the gate can compare
            steps.make("evaluate", narrow(config.evaluate, EvaluateConfig, dataset=dataset, model=live.uri, **place))
        model = steps.make("train", narrow(config.train, TrainConfig, dataset=dataset, **parent, **place))
        evaluation = steps.make(
            "evaluate", narrow(config.evaluate, EvaluateConfig, dataset=dataset, model=model, **place)
        )
        value_of(gate(promotion_of(config, model, evaluation), return_state=True))


def is_news(dataset: str, model: str) -> bool:
    """Whether a dataset is another than the one that a model was trained on."""
    from pipelines.storage import read_manifest

    return bool(read_manifest(model, "model")["lineage"].get("dataset") != dataset)


def night_of(config: NightlyConfig) -> str:
    """The date of a night's order: as asked for, else the day for which the run was scheduled, in UTC."""
    scheduled = runtime.flow_run.scheduled_start_time
    return config.date or f"{scheduled:%Y-%m-%d}"


def order_of(config: GenerateFlow) -> GenerateConfig:
    """The bulk job of a flow, by what is live where no model was named."""
    from pipelines.registry import default_model

    return narrow(config, GenerateConfig, model=config.model or default_model(config.store, config.name))


def promotion_of(config: PipelineConfig | NightlyConfig, model: str, evaluation: str) -> PromoteConfig:
    """The promotion of a model that a flow has just judged."""
    return narrow(config.promote, PromoteConfig, model=model, evaluation=evaluation, store=config.store,
                  name=config.name)  # fmt: skip


def promoted_or_refused(config: PromoteConfig) -> str:
    """What a promotion came to. Raises PipelineError where the gate refuses."""
    promotion = value_of(gate(config, return_state=True))
    if not promotion["live"]:
        raise PipelineError(promotion["told"])
    return str(promotion["told"])


def is_done(generation: GenerateConfig, judging: EvaluateConfig) -> bool:
    """Whether the store has the images and their evaluation, so that no service is needed."""
    from pipelines.jobs import find_result

    images = find_result("generate", generation)
    return images is not None and bool(find_result("evaluate", judging.model_copy(update={"images": images.uri})))


def may_help(_task: Any, _run: Any, state: State[Any]) -> bool:
    """Whether trying again later may help: where something was away, and nobody sits in front of the run."""
    return state.name == AWAY and runtime.deployment.id is not None


@task(task_run_name="{name}", retries=2, retry_delay_seconds=[60, 300], retry_condition_fn=may_help)
def stage(name: str, config: Settings, where: FlowOptions, here: bool) -> Outcome | State[Any]:
    """One stage, `here` or where the flow's stages run; its result is found again by its settings."""
    from pipelines.jobs import run_stage
    from pipelines.progress import heard

    cluster = cluster_at(where.cluster, where.job) if where.cluster and not here else None

    def run() -> Outcome:
        with heard(Watch(name)), alone(config):
            return run_stage(name, config, cluster, lambda job: label(where, job))

    outcome = told(run)
    if isinstance(outcome, Outcome):
        leave_artifacts(name, outcome.uri, where)
    return outcome


@task(task_run_name="serve", retries=2, retry_delay_seconds=[60, 300], retry_condition_fn=may_help)
def serve(config: ServeConfig) -> Result:
    """The model behind HTTP on the embedded Ray; returns the service's URL."""

    def run() -> str:
        from pipelines.jobs import connect

        connect()
        from pipelines.serve import start

        return start(config)

    return told(run)


@task(task_run_name="deploy", retries=2, retry_delay_seconds=[60, 300], retry_condition_fn=may_help)
def rollout(config: DeployFlow) -> Result:
    """The service on the cluster; returns its URL."""
    from pipelines.serve.rollout import roll_out

    def run() -> str:
        cluster = cluster_at(str(config.cluster), config.job)
        url = roll_out(narrow(config, ServeConfig), cluster, config.ready_within)
        create_link_artifact(url, link_text="the service and its page", key="service")
        return url

    return told(run)


@task(task_run_name="promote")
def gate(config: PromoteConfig) -> dict[str, Any] | State[Any]:
    """Make the model live where its evaluation passes the gate; what became of it, in words."""
    from pipelines.registry import promote_or_tell

    def run() -> dict[str, Any]:
        promotion = promote_or_tell(config)
        rules = "\n".join(f"- {rule}" for rule in promotion["rules"])
        create_markdown_artifact(f"{promotion['told']}\n\n{rules}", key="promotion", description=config.model)
        return promotion

    return told(run)


@task(task_run_name="report")
def report(
    uris: dict[str, str], seconds: dict[str, float], promotion: dict[str, Any], config: PipelineConfig
) -> Result:
    """The page that shows what came out."""
    from pipelines.report import collect, write_report
    from pipelines.storage import normalise

    settings = config.model_dump(mode="json")

    def run() -> str:
        page = write_report(normalise(config.store), collect(uris, seconds, promotion, settings))
        create_markdown_artifact(f"The report: {address(page, config)}", key="report")
        return page

    return told(run)


@task(task_run_name="cleanup")
def clean(config: CleanupConfig) -> Result:
    """What may go, and went; the store's URI."""
    from pipelines.jobs import print_stage
    from pipelines.progress import heard

    def run() -> str:
        lines: list[str] = []
        with heard(lines.append):
            print_stage("cleanup", config)
        create_markdown_artifact("```\n" + "\n".join(lines) + "\n```", key="cleanup", description=config.store)
        return config.store

    return told(run)


class Steps:
    """Runs the stages of a flow where it says, and remembers how long each took, in seconds."""

    def __init__(self, where: FlowOptions) -> None:
        self.where = where
        self.seconds: dict[str, float] = {}

    def make(self, name: str, config: Settings, here: bool = False) -> str:
        """The URI of the stage's result. Raises PipelineError with the stage's own words."""
        began = time.monotonic()
        outcome: Outcome = value_of(stage(name, config, self.where, here, return_state=True))
        self.seconds[name] = time.monotonic() - began
        return outcome.uri


class Watch:
    """Shows a stage's progress as an artifact that moves while its lines come by."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.artifact: Any = None

    def __call__(self, line: str) -> None:
        """Look at a line."""
        from pipelines.progress import counts_of

        counts = counts_of(line)
        if counts is not None:
            with contextlib.suppress(httpx.HTTPError):  # a server that is away for a moment must not end the work
                self._show(round(100 * counts[0] / max(counts[1], 1), 1), line)

    def _show(self, percent: float, line: str) -> None:
        if self.artifact is None:
            self.artifact = create_progress_artifact(percent, key=f"{self.name}-progress", description=line)
        else:
            update_progress_artifact(self.artifact, percent, description=line)


@contextlib.contextmanager
def alone(config: Settings) -> Iterator[None]:
    """One training of a model's name at a time, over all runs of deployments; another one waits here."""
    if not isinstance(config, TrainConfig) or runtime.deployment.id is None:
        yield
        return
    limit = f"train-{config.name}"
    with get_client(sync_client=True) as client, contextlib.suppress(ObjectAlreadyExists):
        client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=limit, limit=1))
    # A lease that lapses frees the place of a run that was killed; one that cannot be renewed ends no training.
    with concurrency(limit, strict=True, lease_duration=_LEASE_S, raise_on_lease_renewal_failure=False):
        yield


def cluster_at(place: str, options: JobOptions) -> Cluster:
    """The cluster at an address, or of a block. Raises PipelineError where there is no such block."""
    if not place.startswith(BLOCK):
        return Cluster(address=place, job=options)
    name = place.removeprefix(BLOCK)
    try:
        block: Any = RayCluster.load(name)
    except ValueError as error:
        raise PipelineError(
            f"--cluster {place}: no block of type ray-cluster has this name; make it in the UI under Blocks, after "
            "prefect block register --file flows.py"
        ) from error
    return Cluster(address=block.address, token=block.token, job=options)


def label(where: FlowOptions, job: Any) -> None:
    """Note in the flow's run which job works for it, and leave a link to it."""
    labels = {_CLUSTER: where.cluster, _JOB: job.id, _MARKER: job.marker}
    with get_client(sync_client=True) as client:
        client.update_flow_run_labels(runtime.flow_run.id, labels)
    if where.cluster and not where.cluster.startswith(BLOCK):
        create_link_artifact(f"{where.cluster}/#/jobs/{job.id}", link_text=f"Ray job {job.id}", key="ray-job")


def leave_artifacts(name: str, uri: str, where: FlowOptions) -> None:
    """What of a stage's result is worth a look: a table of figures, the pictures, links."""
    from pipelines.jobs import show
    from pipelines.report import data_uri, enlarged

    shown = show(name, uri)
    if shown.figures:
        rows = [{"figure": title, "value": text} for title, text in shown.figures.items()]
        create_table_artifact(rows, key=f"{name}-figures", description=uri)
    lines, spent = [f"`{uri}`", *([f"Page: {address(shown.page, where)}"] if shown.page else [])], 0
    for title, png in shown.pictures.items():
        shown_as = data_uri(enlarged(png, _WIDTH))
        spent += len(shown_as)
        if spent < _PICTURES_BYTES:
            lines.append(f"### {title}\n\n![{title}]({shown_as})")
    create_markdown_artifact("\n\n".join(lines), key=f"{name}-pictures", description=uri)
    if name == "train" and where.tensorboard:
        create_link_artifact(where.tensorboard, link_text="TensorBoard", key="tensorboard", description=uri)


def address(page: str, where: FlowOptions) -> str:
    """Where a page of the store opens, in Markdown: a link where a web server has the store, else its URI."""
    if not where.pages or not page.startswith(where.store):
        return f"`{page}`"
    return f"[{page.rsplit('/', 1)[1]}]({where.pages.rstrip('/')}{page.removeprefix(where.store)})"


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
        return Failed(name=AWAY if isinstance(error, AwayError) else "Failed", message=str(error))


def value_of(state: State[Any]) -> Any:
    """The result of a finished run. Raises PipelineError with its message where `told` made it a failed state."""
    try:
        return state.result()
    except FailedRun as error:
        raise (AwayError if state.name == AWAY else PipelineError)(str(error)) from error


FLOWS: dict[str, tuple[Any, type[Settings]]] = {
    "demo": (demo, DemoConfig), "pipeline": (pipeline, PipelineConfig), "nightly": (nightly, NightlyConfig),
    "ingest": (ingest, IngestFlow), "train": (train, TrainFlow), "evaluate": (evaluate, EvaluateFlow),
    "promote": (promote, PromoteFlow), "deploy": (deploy, DeployFlow), "generate": (generate, GenerateFlow),
    "inpaint": (inpaint, InpaintFlow), "cleanup": (cleanup, CleanupFlow),
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
        return status_of(error)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
