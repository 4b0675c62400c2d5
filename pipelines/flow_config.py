"""Every flow's settings: those of its stages, and where the stages run."""

import datetime
from typing import Annotated, Literal, Self

from pydantic import ByteSize, Field, SecretStr, field_validator, model_validator

from diffusion_core.config import Task
from pipelines.config import (
    CleanupConfig,
    DrawOptions,
    EvaluateConfig,
    EvaluateOptions,
    GateOptions,
    GenerateConfig,
    GenerateOptions,
    How,
    IngestConfig,
    IngestOptions,
    Place,
    PromoteConfig,
    ServeOptions,
    Settings,
    Store,
    TrainConfig,
    TrainOptions,
    Uri,
    check_origin,
    narrow,
)

BLOCK = "block/"


class JobOptions(Settings):
    """How stages run as jobs of a Ray cluster."""

    code: Literal["working_dir", "image"] = Field(
        "working_dir", description="how the project's code gets there: sent along, or in the cluster's image already"
    )
    cpus: float = Field(0.0, ge=0, description="CPUs that a job's own process holds of the cluster's, beside its tasks")
    gpus: float = Field(0.0, ge=0, description="GPUs that it holds, likewise")
    memory: ByteSize = Field(ByteSize(0), ge=0, description="memory that it holds, as 4GB")
    resources: dict[str, float] = Field(
        {}, description='custom resources that it holds, as {"driver": 1}: on nodes with them alone'
    )
    wait: float = Field(900.0, ge=0, description="seconds to wait for a cluster that does not answer")
    resubmits: int = Field(
        3, ge=0, description="times to submit a job again that a lost node took away, and not an error of its own"
    )
    grace: float = Field(120.0, ge=0, description="seconds that a cancelled job has to save what it has done")


class FlowOptions(Store):
    """Where the stages of a flow run, and what its artifacts link to."""

    cluster: Annotated[str | None, How()] = Field(
        None,
        pattern=r"^(https?://\S+|block/[a-z0-9-]+)?$",
        description="job server of a Ray cluster, http://HOST:8265, or block/NAME for a Prefect block of type "
        "ray-cluster; default: a Ray of the flow's own",
    )
    job: Annotated[JobOptions, How()] = Field(JobOptions(), description="jobs on the cluster")
    tensorboard: Annotated[str | None, How()] = Field(
        None, pattern=r"^(https?://\S+)?$", description="address of a TensorBoard over the store, for links"
    )
    pages: Annotated[str | None, How()] = Field(
        None, pattern=r"^(https?://\S+)?$", description="address of a web server over the store, for links to its pages"
    )


class Cluster(Settings):
    """A Ray cluster: its job server, the token that opens it, and how jobs run there."""

    address: str
    token: SecretStr | None = None
    job: JobOptions = JobOptions()

    @property
    def headers(self) -> dict[str, str]:
        """What every request carries; without a token of its own, Ray adds the environment's."""
        return {} if self.token is None else {"Authorization": f"Bearer {self.token.get_secret_value()}"}


class IngestFlow(FlowOptions, IngestConfig):
    """Turn pictures into a verified, immutable dataset; what is known already is not read again."""


class TrainFlow(FlowOptions, TrainConfig):
    """Train a diffusion U-Net on a dataset; resumes where an earlier run stopped."""


class EvaluateFlow(FlowOptions, EvaluateConfig):
    """Measure a model: its samples against the dataset, its edits of held-out pictures."""


class PromoteFlow(PromoteConfig):
    """Make a model the live one of its name, where its evaluation passes the rules."""


class DeployFlow(FlowOptions, ServeOptions, Place):
    """Put the service onto a cluster, or bring it up to date there; it follows what is live by itself."""

    model: Annotated[Uri | None, How()] = Field(
        None, description="URI of a published model to keep to; default: what is live of --name, else the newest"
    )
    ready_within: Annotated[float, How()] = Field(600.0, gt=0, description="seconds to wait until it answers")

    @model_validator(mode="after")
    def _needs_cluster(self) -> Self:
        if not self.cluster:
            raise ValueError("--cluster says where to; without a cluster, python -m pipelines serve serves here")
        return self


class GenerateFlow(FlowOptions, GenerateConfig):
    """Generate, inpaint, denoise or vary pictures in bulk into image shards with a manifest."""

    model: Annotated[Uri | None, How()] = Field(  # type: ignore[assignment]
        None, description="URI of the published model; default: what is live of --name, else the newest"
    )


class InpaintFlow(GenerateFlow):
    """Inpaint the pictures that a table names, or its other tasks, with what is live."""

    task: Task = Field("inpaint", description="what is done for rows that name no task")

    @model_validator(mode="after")
    def _needs_table(self) -> Self:
        if self.table is None:
            raise ValueError("--table names the pictures and masks, a row each")
        return self


class CleanupFlow(CleanupConfig):
    """Find what may be deleted: old models that nothing refers to, checkpoints of finished runs. Deletes on demand."""


class PipelineOptions(FlowOptions):
    """What every flow of the whole pipeline has."""

    train: TrainOptions = Field(TrainOptions(), description="training")
    evaluate: EvaluateOptions = Field(EvaluateOptions(), description="evaluation")
    promote: GateOptions = Field(GateOptions(), description="the gate before promotion")
    generate: GenerateOptions = Field(GenerateOptions(), description="bulk generation")

    @model_validator(mode="after")
    def _one_origin_of_rows(self) -> Self:
        check_origin(self.generate, getattr(self, "table", None))  # now, and not once all else is made
        return self


class PipelineConfig(PipelineOptions, IngestOptions, Place):
    """Ingest pictures, train a model on them, evaluate it and generate with it; what is done already is found."""


class NightlyConfig(PipelineOptions, IngestOptions, Place):
    """Take in new pictures, fine-tune the live model, evaluate, promote behind the gate, and make the night's order."""

    table: Annotated[Uri | None, How()] = Field(
        None,
        description="the night's requests, a row each; {date} in it stands for --date; default: --generate's count",
    )
    date: str | None = Field(
        None, description="date of the order, as 2026-11-25; default: when the run was scheduled, in UTC"
    )

    @field_validator("date")
    @classmethod
    def _is_date(cls, value: str | None) -> str | None:
        if value is not None:
            datetime.date.fromisoformat(value)
        return value

    def order(self, model: str, date: str) -> GenerateConfig:
        """The night's bulk job: the table of that date, or pictures whose seed is the date's digits unless one is set.

        `date` is as 2026-11-25.
        """
        options = self.generate
        if self.table is None and "seed" not in options.model_fields_set:
            options = options.model_copy(update={"seed": int(date.replace("-", ""))})
            options.model_fields_set.add("seed")
        table = {} if self.table is None else {"table": self.table.replace("{date}", date)}
        return narrow(options, GenerateConfig, model=model, store=self.store, name=self.name, **table)


class DemoEvaluateOptions(EvaluateOptions):
    """What the demo measures: less, so that it ends soon."""

    samples: int = Field(128, ge=2, description="pictures generated over all classes")
    curve_samples: int = Field(16, ge=0, description="pictures by every sampler and number of steps; 0 for none")
    curve_steps: list[Annotated[int, Field(ge=1, le=1000)]] = Field(
        [5, 8, 18], min_length=1, description="denoiser calls a picture"
    )
    likelihood: int = Field(8, ge=0, description="held-out pictures whose bits per dimension are taken; 0 for none")
    likelihood_steps: int = Field(8, ge=2, description="steps of the solver for it, four denoiser calls each")


class DemoConfig(PipelineOptions, Place):
    """Draw cartoons, then run the whole pipeline on them."""

    evaluate: DemoEvaluateOptions = Field(DemoEvaluateOptions(), description="evaluation")
    resolution: int = Field(32, ge=8, le=1024, description="height and width in pixels")
    draw: DrawOptions = Field(DrawOptions(), description="cartoons")
