"""Every stage's settings: one strict model is the flow's parameters, the command line and the JSON beside a result.

A field marked `How()` says how work is done (workers, addresses) and never takes part in a result's identity.
"""

import getpass
import hashlib
import json
import os
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, CliApp, SettingsConfigDict, SettingsError

from diffusion_core.config import (
    PRESETS,
    BetaName,
    Decay,
    GridName,
    InpaintingName,
    Precision,
    Prediction,
    SamplerConfig,
    SamplerName,
    ScheduleName,
    Strategy,
    Task,
    Weighting,
)

# Environment variable of a job: the object whose appearance asks it to save and stop
STOP_MARKER = "IMAGE_DIFFUSION_STOP"
# Exit status of a command that something out of reach made fail: EX_TEMPFAIL of sysexits.h
AWAY_STATUS = 75


class PipelineError(Exception):
    """Something a user can mend; its text is one clear line that names the thing, what was found and what to do."""


class AwayError(PipelineError):
    """Something out of reach that may be back later, such as a store or a cluster; the same command goes on then."""


class InterruptedRunError(PipelineError):
    """Work that was stopped from outside after saving what was done; the same command goes on."""


def status_of(error: Exception) -> int:
    """The exit status of a command that ends with this error."""
    return AWAY_STATUS if isinstance(error, AwayError) else 1


def failure(message: str, status: int) -> PipelineError:
    """The error of another process, by what it said and the status that `status_of` gave it."""
    return (AwayError if status == AWAY_STATUS else PipelineError)(message)


class How:
    """Marks a field that has no part in a result's identity: how work is done, and addresses.

    Of inputs, their content takes part (by digest) and not their address.
    """


class First:
    """Marks the field that a command line may give as its first word, without the flag."""


def absolute(uri: str) -> str:
    """The URI that names the same thing from any folder: s3://bucket/key, or an absolute path. No slash at the end.

    Raises ValueError on another kind of address, and on none.
    """
    if not uri:
        raise ValueError("an empty address; give a path or s3://bucket/key")
    if "://" in uri and not uri.startswith(("s3://", "file://")):
        raise ValueError(f"{uri}: unknown kind of address; give a path or s3://bucket/key")
    if uri.startswith("s3://"):
        return uri.rstrip("/")
    return os.path.abspath(os.path.expanduser(uri.removeprefix("file://")))


# Workers run in folders of their own, so a relative path must be resolved where the user typed it.
Uri = Annotated[str, AfterValidator(absolute)]


class Settings(BaseModel):
    """Base of all settings: unknown keys are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


SettingsT = TypeVar("SettingsT", bound=Settings)


_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class Store(Settings):
    """What holds all results."""

    store: Annotated[Uri, How()] = Field("runs/demo", description="folder or s3://bucket/prefix that holds all results")


class Place(Store):
    """Where results go."""

    name: str = Field("cartoons", pattern=_NAME, description="name of dataset, model and job")


class DrawOptions(Settings):
    """What cartoons to draw."""

    count: int = Field(4000, ge=1, description="number of pictures")
    resolution: int = Field(32, ge=8, le=1024, description="height and width in pixels")
    seed: int = Field(0, ge=0, description="every picture is a function of this seed and its number")
    shard_size: int = Field(500, ge=1, description="pictures in a tar shard")


class DrawConfig(DrawOptions, Place):
    """Draw cartoon heads and write them as WebDataset tar shards."""


Fit = Literal["crop", "pad", "stretch"]
Encoding = Literal["raw", "png", "webp", "jpeg"]
_RAW_UP_TO = 64


class IngestOptions(Settings):
    """What pictures to take in."""

    source: Annotated[list[Uri], How()] = Field(
        min_length=1,
        description="folder, picture, .tar (.gz, .zst), .parquet, .jsonl or .csv, or a glob of them, on disk or s3://; "
        "give the flag again for more",
    )
    resolution: int = Field(32, ge=8, le=1024, description="height and width of the dataset in pixels")
    fit: Fit = Field("crop", description="how a picture becomes a square: crop the middle, pad, or stretch")
    background: str = Field("white", description="colour behind transparent and padded pictures")
    heldout: float = Field(0.1, ge=0.0, lt=1.0, description="share of the pictures kept out of training")
    labels: Literal["optional", "required", "ignored"] = Field(
        "optional", description="whether a picture without a class is kept, or rejected; or classes are left out"
    )
    min_per_class: int = Field(1, ge=1, description="pictures of classes with fewer are rejected")
    class_field: str = Field("class", description="field of the class name in a tar member's JSON, Parquet or a table")
    caption_field: str = Field("caption", description="field of the caption, likewise")
    image_field: str = Field("image", description="column of the picture in Parquet")
    uri_field: str = Field("uri", description="column of the picture's address in a .jsonl or .csv table")
    min_side: int = Field(8, ge=1, description="pictures with a shorter side are rejected")
    max_pixels: int = Field(64_000_000, ge=1, description="pictures with more pixels are rejected")
    near_duplicates: int = Field(
        0, ge=0, le=7, description="drop pictures whose perceptual hashes differ in fewer bits of 64; 0 keeps them all"
    )
    encoding: Literal["auto", "raw", "png", "webp", "jpeg"] = Field(
        "auto", description=f"how pixels are stored; auto is raw up to {_RAW_UP_TO} pixels a side and png above"
    )
    shard_size: int = Field(1024, ge=1, description="rows in a Parquet shard")
    max_rejected: Annotated[str | None, How()] = Field(
        None, pattern=r"^\d+(\.\d+)?%?$", description="publish nothing where more are rejected: a count, or 1%"
    )
    extend: Annotated[bool, How()] = Field(
        True, description="build on an earlier dataset whose sources are all still there, and read only the new ones"
    )
    readers: Annotated[int, How()] = Field(0, ge=0, description="shards read at a time; 0 is three for two cores")

    @field_validator("background")
    @classmethod
    def _known_colour(cls, value: str) -> str:
        from PIL import ImageColor

        ImageColor.getrgb(value)
        return value

    @property
    def stored_as(self) -> Encoding:
        """The encoding that `auto` stands for."""
        if self.encoding != "auto":
            return self.encoding
        return "raw" if self.resolution <= _RAW_UP_TO else "png"


class IngestConfig(IngestOptions, Place):
    """Turn pictures into a verified, immutable dataset."""


def _known_preset(value: str) -> str:
    if value not in PRESETS:
        raise ValueError(f"no preset {value!r}; there are {', '.join(PRESETS)}")
    return value


Preset = Annotated[str, AfterValidator(_known_preset)]


class TrainOptions(Settings):
    """What model to train."""

    preset: Preset = Field("cpu-small", description="network: " + ", ".join(PRESETS))
    prediction: Prediction = Field("edm", description="what the network predicts")
    weighting: Weighting = Field("unit", description="weight of the loss by noise level")
    sigma: Literal["log_normal", "uniform_t"] = Field("log_normal", description="noise levels drawn in training")
    schedule: ScheduleName = Field("edm", description="what uniform in t means, in training and in sampling grids")
    timesteps: BetaName | None = Field(
        None, description="betas of 1000 timesteps that the network is told in place of ln(sigma)/4, as diffusers does"
    )
    stratified: bool = Field(True, description="spread the noise levels evenly over a batch")
    precision: Precision = Field("float32", description="arithmetic inside the network; weights stay float32")
    steps: int = Field(900, ge=1, description="optimisation steps")
    global_batch_size: int = Field(32, ge=1, description="pictures in a step, over all workers")
    streams: int = Field(4, ge=1, description="parallel reading positions; divides the batch, at least one a worker")
    learning_rate: float = Field(2e-3, gt=0, description="peak of the learning rate, after warm-up")
    warmup: int = Field(50, ge=0, description="steps of linear warm-up")
    decay: Decay = Field("cosine", description="learning rate after warm-up: half a cosine down to 0, or constant")
    clip: float = Field(1.0, gt=0, description="largest norm of a gradient")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay")
    label_dropout: float = Field(0.1, ge=0, le=1, description="share of labels hidden, for guidance")
    ema: list[Annotated[float, Field(gt=0, le=0.28)]] = Field(
        [0.1],
        min_length=1,
        description="widths of the weights' moving averages, relative to the run; the first samples",
    )
    flip: bool = Field(False, description="mirror half of the pictures")
    seed: int = Field(0, ge=0, description="keys weights, order, noise and sigma")
    validate_every: int = Field(300, ge=0, description="steps between looks at the held-out pictures; 0 for none")
    patience: int = Field(0, ge=0, description="validations without a better loss before training ends; 0 goes on")
    nonfinite: Literal["stop", "skip"] = Field(
        "stop", description="after --nonfinite-limit: stop, or go back to the last checkpoint and skip those batches"
    )
    nonfinite_limit: int = Field(3, ge=1, description="losses or gradients in a row that may not be finite")
    workers: Annotated[int, How()] = Field(
        0, ge=0, description="training processes; 0 takes one per GPU, else per core, up to 2"
    )
    min_workers: Annotated[int, How()] = Field(
        0, ge=0, description="go on with so few where nodes are lost, and grow back to --workers; 0 needs them all"
    )
    resize_every: Annotated[float, How()] = Field(
        30.0, gt=0, description="seconds between looks for nodes to grow back onto, with --min-workers"
    )
    strategy: Annotated[Strategy, How()] = Field(
        "ddp", description="every worker holds all (ddp), or a share (fsdp), or a share within its node (hsdp)"
    )
    micro_batch: Annotated[str, How()] = Field(
        "all", pattern=r"^(all|auto|[1-9]\d*)$",
        description="pictures a worker computes at a time: all of its share, a number, or auto for what fits",
    )  # fmt: skip
    activation_checkpointing: Annotated[bool, How()] = Field(
        False, description="compute activations again in the backward pass, to need less memory"
    )
    compiled: Annotated[bool, How()] = Field(False, description="compile the network's blocks; needs a C++ compiler")
    checkpoint_every: Annotated[int, How()] = Field(200, ge=1, description="steps between checkpoints")
    keep_last: Annotated[int, How()] = Field(2, ge=1, description="newest checkpoints that stay")
    keep_every: Annotated[int, How()] = Field(0, ge=0, description="checkpoints at multiples of this stay; 0 for none")
    publish_every: Annotated[int, How()] = Field(
        0, ge=0, description="steps between published models; 0 publishes the end alone"
    )
    threads: Annotated[int, How()] = Field(0, ge=0, description="CPU threads of a worker; 0 shares all cores out")
    restarts: Annotated[int, How()] = Field(
        5, ge=0, description="deaths of workers in a row, without a new checkpoint between, after which to give up"
    )
    mlflow: Annotated[str | None, How()] = Field(None, description="MLflow's tracking address, to log there as well")
    expect_resolution: Annotated[int | None, How()] = Field(None, description="refuse a dataset of another resolution")
    expect_classes: Annotated[int | None, How()] = Field(None, description="refuse a dataset with other than so many")


class TrainPlace(TrainOptions, Place):
    """What every way to train has."""

    parent: Annotated[Uri | None, How()] = Field(
        None,
        validation_alias=AliasChoices("parent", "from"),
        description="URI of a published model whose weights to begin with; its network, prediction, schedule and "
        "timesteps are taken as well, and a flag that contradicts them is an error",
    )


class TrainConfig(TrainPlace):
    """Train a diffusion U-Net on a dataset; resumes where an earlier run stopped."""

    dataset: Annotated[Uri, How()] = Field(description="URI of the dataset (its folder)")


_BUDGET = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")


class TrainCommand(TrainPlace):
    """Train a diffusion U-Net on a dataset or on pictures, in a given time if you like; resumes where it stopped."""

    dataset: Annotated[Uri | None, How()] = Field(None, description="URI of the dataset (its folder)")
    source: list[Uri] = Field([], description="pictures to ingest first, in place of --dataset; as for ingest")
    resolution: int | None = Field(
        None, ge=8, le=1024, description="height and width to ingest --source at; default: the preset's"
    )
    budget: str | None = Field(
        None, description="time to train in, as 45m or 1h30m: measures what fits, and chooses what no flag says"
    )

    @field_validator("budget")
    @classmethod
    def _is_time(cls, value: str | None) -> str | None:
        if value is not None and not (value and _BUDGET.fullmatch(value)):
            raise ValueError("need a time such as 90s, 45m, 2h or 1h30m")
        return value

    @model_validator(mode="after")
    def _one_input(self) -> Self:
        if bool(self.source) == bool(self.dataset):
            raise ValueError("need --dataset or --source, and not both")
        if self.dataset and self.resolution:
            raise ValueError("--resolution is for --source; a dataset has its own")
        if self.budget and self.parent:
            raise ValueError("--budget chooses a network, but with --parent it is the parent's; give --steps instead")
        return self

    @property
    def budget_seconds(self) -> int:
        """The budget in seconds."""
        match = _BUDGET.fullmatch(self.budget or "")
        parts = [int(part or 0) for part in match.groups()] if match else [0]
        return sum(part * unit for part, unit in zip(parts, (86_400, 3600, 60, 1), strict=False))


class PlanConfig(Settings):
    """Print what training would need of memory, by strategy and settings, without running it."""

    preset: Preset = Field("cpu-small", description="network: " + ", ".join(PRESETS))
    resolution: int | None = Field(None, ge=8, le=1024, description="height and width; default: the preset's")
    classes: int = Field(0, ge=0, description="number of classes")
    global_batch_size: int = Field(32, ge=1, description="pictures in a step, over all workers")
    precision: Precision | None = Field(None, description="arithmetic inside the network; default: both are shown")
    ema: list[Annotated[float, Field(gt=0, le=0.28)]] = Field(
        [0.1], min_length=1, description="widths of the weights' moving averages; each is a copy of the weights"
    )
    workers: int = Field(1, ge=1, description="training processes")
    workers_per_node: int = Field(0, ge=0, description="those on one node, for hsdp; 0 is all of them")
    gpu_memory: ByteSize | None = Field(
        None,
        gt=0,
        description="memory of a worker, as 24GB or 16GiB; default: this GPU's, or its part of the machine's",
    )

    @model_validator(mode="after")
    def _whole_nodes(self) -> Self:
        if self.workers_per_node and self.workers % self.workers_per_node:
            raise ValueError(f"workers_per_node: {self.workers} workers do not fill nodes of {self.workers_per_node}")
        return self


class SampleOptions(Settings):
    """How pictures are sampled; the same names as in an HTTP request."""

    sampler: SamplerName = Field("angular_3", description="sampler")
    steps: int = Field(18, ge=1, le=1000, description="denoiser calls for a picture")
    grid: GridName = Field("arctan", description="spacing of the noise levels")
    eta: float = Field(0.0, ge=0.0, le=1.0, description="fresh noise of ddim and dpmpp_2m_sde; others fix their own")
    guidance_scale: float = Field(2.0, ge=0.0, le=20.0, description="classifier-free guidance; 1 is off")
    guidance_low: float = Field(0.0, ge=0.0, description="no guidance at noise levels up to this")
    guidance_high: float = Field(1000.0, gt=0.0, description="no guidance at noise levels above this")
    guidance_rescale: float = Field(0.0, ge=0.0, le=1.0, description="how far to undo the contrast that guidance adds")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.guidance_low > self.guidance_high:
            raise ValueError(f"guidance_low: {self.guidance_low} is above guidance_high={self.guidance_high}")
        return self

    def sampler_config(self) -> SamplerConfig:
        """The core's own settings."""
        return SamplerConfig(sampler=self.sampler, steps=self.steps, grid=self.grid, eta=self.eta)


class GenerateOptions(SampleOptions):
    """What pictures to make in bulk: `count` of the classes in turn, or the rows of a table."""

    count: int = Field(256, ge=1, description="number of pictures without --table, spread evenly over the classes")
    classes: str = Field("all", description="comma-separated class names without --table, or all")
    seed: int = Field(1, ge=0, lt=2**62, description="a row without a seed has one derived from this and its number")
    task: Task = Field("generate", description="what is done for rows that name no task")
    prompt: str = Field("", description="class of a table's rows that name none; empty for any")
    negative_prompt: str = Field("", description="class to lead away from, for rows that name none; needs guidance")
    inpainting: InpaintingName = Field("posterior", description="how to inpaint: posterior, or the faster replacement")
    solves: int = Field(2, ge=1, le=50, description="iterations of posterior guidance a step")
    resample: int = Field(1, ge=1, le=100, description="how often inpainting walks every five rows (RePaint)")
    noise_level: float | None = Field(
        None, gt=0, description="sigma of the noise to take away with task denoise; default: estimated"
    )
    strength: float | None = Field(None, ge=0, le=1, description="how far image_to_image and vary go, 0 to 1")
    carry: list[str] = Field([], description="column of the table that goes along to the output; give the flag again")
    format: Literal["parquet", "webdataset", "png"] = Field(
        "parquet", description="Parquet shards, WebDataset tars, or for small sets a folder of PNGs"
    )
    shard_size: int = Field(64, ge=1, description="rows in a shard")
    skip_bad: Annotated[bool, How()] = Field(
        False, description="leave out rows of the table that are wrong, and record why, in place of refusing the table"
    )
    max_rejected: Annotated[str, How()] = Field(
        "10%", pattern=r"^\d+(\.\d+)?%?$",
        description="stop where more rows turn out to be impossible (a missing picture): a count, or a share as 1%",
    )  # fmt: skip
    via: Annotated[Literal["serve", "actors"], How()] = Field(
        "actors", description="send rows to the running service, or to workers of the stage's own"
    )
    workers: Annotated[int, How()] = Field(0, ge=0, description="actors; 0 takes one per GPU, else one per two cores")
    price: Annotated[float | None, How()] = Field(None, ge=0, description="price of a device's hour, to tell the cost")


_WITHOUT_TABLE = ("count", "classes")
_OF_TABLES = ("task", "prompt", "inpainting", "solves", "resample", "noise_level", "strength")


class EngineOptions(Settings):
    """How the engine of a model on a device batches."""

    lanes: Annotated[int, How()] = Field(
        32, ge=0, le=1024, description="network inputs a tick, 2 or more; 0 chooses by a short measurement"
    )
    threads: Annotated[int, How()] = Field(0, ge=0, description="CPU threads of an engine; 0 is one per core")

    @field_validator("lanes")
    @classmethod
    def _room_for_guidance(cls, lanes: int) -> int:
        if lanes == 1:
            raise ValueError("1 lane has no room for a guided request; need 2 or more, or 0 to measure")
        return lanes


class GenerateConfig(GenerateOptions, EngineOptions, Place):
    """Generate, inpaint, denoise or vary pictures in bulk into image shards with a manifest."""

    model: Annotated[Uri, How()] = Field(description="URI of the published model (its folder)")
    table: Annotated[Uri | None, How()] = Field(
        None, description="a request a row: .parquet, .csv, .tsv or .jsonl, on disk or s3://"
    )
    app: Annotated[str, How()] = Field("images", description="Ray Serve application to send rows to, with --via serve")
    addresses: Annotated[bool, How()] = Field(
        True, description="a table may name pictures by address; else they stand in it as bytes"
    )

    @model_validator(mode="after")
    def _one_origin_of_rows(self) -> Self:
        """A setting that the rows of a table, or those of the flags, have no use for is refused."""
        fields = type(self).model_fields
        for name in [name for name in fields if getattr(self, name) != fields[name].default]:
            flag = name.replace("_", "-")
            if self.table and name in _WITHOUT_TABLE:
                raise ValueError(f"--{flag} is for rows without a table; --table has its own")
            if not self.table and name in _OF_TABLES:
                raise ValueError(
                    f"--{flag} is for rows of a --table, and there is none; without one, give --classes alone"
                )
        if self.carry and not self.table:
            raise ValueError("--carry names columns of a --table, and there is none")
        return self


class GenerateCommand(GenerateConfig):
    """Generate, inpaint, denoise or vary pictures in bulk into image shards with a manifest."""

    dry_run: Annotated[bool, How()] = Field(
        False, description="check all rows, measure, and tell rows, shards, time and cost; makes nothing"
    )


class EvaluateOptions(SampleOptions):
    """What to measure and show."""

    samples: int = Field(
        512, ge=2, description="pictures generated over all classes, to be compared with the dataset's"
    )
    features: str = Field(
        "own",
        description="what compares pictures: own (learned on the dataset), inception:WEIGHTS (then it is FID), or a "
        "file: .safetensors of an own one, .pt2 of torch.export, .pt of TorchScript",
    )
    trust: Annotated[bool, How()] = Field(False, description="open a TorchScript file, which may run any code")
    feature_steps: int = Field(500, ge=1, description="training steps of the dataset's own extractor and classifier")
    edits: int = Field(16, ge=1, description="held-out pictures inpainted by every mask and denoised at every level")
    noise_levels: list[Annotated[float, Field(gt=0)]] = Field(
        [0.1, 0.2, 0.4, 0.8], min_length=1, description="sigma of the noise to remove, for pictures in [-1, 1]"
    )
    curve_samples: int = Field(
        128, ge=0, description="pictures by every sampler and number of steps, to show what steps buy; 0 leaves it out"
    )
    curve_samplers: list[SamplerName] = Field(["angular_3", "dpmpp_2m", "ddim"], min_length=1, description="samplers")
    curve_steps: list[Annotated[int, Field(ge=1, le=1000)]] = Field(
        [5, 8, 12, 18, 30], min_length=1, description="denoiser calls a picture"
    )
    likelihood: int = Field(32, ge=0, description="held-out pictures whose bits per dimension are taken; 0 for none")
    likelihood_steps: int = Field(16, ge=2, description="steps of the solver for it, four denoiser calls each")
    bootstrap: int = Field(200, ge=10, description="resampled sets that intervals are taken from")
    seed: int = Field(2, ge=0, description="keys the samples")

    @field_validator("features")
    @classmethod
    def _reachable_from_anywhere(cls, value: str) -> str:
        if value == "own":
            return value
        kind = "inception:" if value.startswith("inception:") else ""
        return kind + absolute(value.removeprefix("inception:"))


class EvaluateConfig(EvaluateOptions, EngineOptions, Place):
    """Measure a model: its samples against the dataset, its edits of held-out pictures, what it makes of those."""

    dataset: Annotated[Uri, How()] = Field(description="URI of the dataset (its folder)")
    model: Annotated[Uri, How()] = Field(description="URI of the published model (its folder)")
    against: Annotated[Uri | None, How()] = Field(None, description="URI of another model to show side by side with it")
    url: Annotated[str | None, How()] = Field(
        None, description="make the pictures by this service, over HTTP; else by workers on the whole cluster"
    )
    workers: Annotated[int, How()] = Field(0, ge=0, description="workers; 0 takes one per GPU, else one per two cores")
    images: Annotated[Uri | None, How()] = Field(None, description="URI of bulk-generated images to judge as well")


class ServeOptions(EngineOptions):
    """What every service has: where it listens, how many engines work, and what it takes in."""

    also: Annotated[list[str], How()] = Field(
        [], description="a further model: a name in --store, or NAME=URI; give the flag again for more"
    )
    host: Annotated[str, How()] = Field("127.0.0.1", description="address to listen on; 0.0.0.0 is every one")
    port: Annotated[int, How()] = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    app: Annotated[str, How()] = Field("images", description="name of the Ray Serve application")
    share: Annotated[bool, How()] = Field(True, description="engines have all the models; else each model its own")
    replicas: Annotated[int, How()] = Field(1, ge=0, description="engines at least; 0 lets them rest when unused")
    max_replicas: Annotated[int, How()] = Field(
        0, ge=0, description="engines at most, by their load; 0 is as many as --replicas"
    )
    calls_per_replica: Annotated[int, How()] = Field(
        600, ge=1, description="denoiser calls that may wait for an engine before one more is started"
    )
    surge: Annotated[int, How()] = Field(
        0, ge=0, le=100, description="percent of new engines beside the old ones while a running service is brought up "
        "to date, for which the cluster needs room; 0 stops old ones first, and requests wait for the new"
    )  # fmt: skip
    rest_after: Annotated[float, How()] = Field(60.0, ge=0, description="seconds of less load before engines stop")
    ingress_replicas: Annotated[int, How()] = Field(1, ge=1, description="processes that take HTTP requests")
    gpus: Annotated[float | None, How()] = Field(
        None, ge=0, description="GPUs of an engine; default: one where the cluster has any"
    )
    cpus: Annotated[float, How()] = Field(1.0, ge=0, description="CPUs that an engine holds of the cluster's")
    queue: Annotated[int, How()] = Field(256, ge=1, description="pictures that may wait for an engine")
    timeout: Annotated[float, How()] = Field(300.0, gt=0, description="seconds that a request may take at most")
    retries: Annotated[int, How()] = Field(3, ge=0, description="tries more, where an engine dies at a request")
    watch: Annotated[float, How()] = Field(2.0, gt=0, description="seconds between looks at what is live")
    versions: Annotated[int, How()] = Field(2, ge=2, description="versions of a model in an engine's memory at once")
    drain: Annotated[float, How()] = Field(60.0, ge=0, description="seconds that running requests have at shutdown")
    key_file: Annotated[Uri | None, How()] = Field(
        None, description="JSON file of API keys, by their hashes (see the key stage); default: none is asked for"
    )
    max_body: Annotated[ByteSize, How()] = Field(
        ByteSize(32 * 2**20), gt=0, description="bytes of a request at most, as 32MiB"
    )
    batches: Annotated[int, How()] = Field(
        2, ge=0, description="batches (POST /v1/batches) that are made at once; 0 takes none"
    )
    max_file: Annotated[ByteSize, How()] = Field(
        ByteSize(64 * 2**20), gt=0, description="bytes of a table that is uploaded for a batch at most"
    )
    callback: Annotated[list[str], How()] = Field(
        [], description="beginning of addresses that a batch may have called at its end, as https://example.org/"
    )
    max_rows: Annotated[int, How()] = Field(1_000_000, ge=1, description="rows of such a table at most")
    max_pixels: Annotated[int, How()] = Field(16_000_000, ge=1, description="pixels of a picture to edit at most")
    max_pictures: Annotated[int, How()] = Field(64, ge=1, description="pictures of a request at most")
    origin: Annotated[list[str], How()] = Field(
        [], description="web origin whose pages may call the service (CORS), as https://example.org; again for more"
    )

    @field_validator("callback")
    @classmethod
    def _whole_hosts(cls, value: list[str]) -> list[str]:
        for entry in value:
            if not re.match(r"https?://[^/@?#\\s]+/", entry):
                raise ValueError(f"{entry!r}: need a whole host and a slash, as https://example.org/")
        return value

    @field_validator("also")
    @classmethod
    def _names_or_addresses(cls, value: list[str]) -> list[str]:
        for entry in value:
            name, _, uri = entry.partition("=")
            if not re.match(_NAME, name) or ("=" in entry and not uri):
                raise ValueError(f"{entry!r}: need a name, or NAME=URI")
        return [f"{name}={absolute(uri)}" if uri else name for name, _, uri in (each.partition("=") for each in value)]

    @model_validator(mode="after")
    def _enough(self) -> Self:
        if self.max_replicas and self.max_replicas < self.replicas:
            raise ValueError(f"--max-replicas {self.max_replicas} is below --replicas {self.replicas}")
        if self.max_pictures > self.queue:
            raise ValueError(f"--max-pictures {self.max_pictures} would never fit into --queue {self.queue}")
        return self

    @property
    def most_replicas(self) -> int:
        """Engines at most."""
        return max(self.max_replicas, self.replicas, 1)


class ServeConfig(ServeOptions, Place):
    """Serve models over HTTP until stopped."""

    model: Annotated[Uri | None, How()] = Field(
        None,
        description="URI of a published model to keep to; default: what is live of --name in --store, also when that "
        "changes, else the newest",
    )
    wait: Annotated[bool, How()] = Field(False, description="wait for a first model, where there is none yet")
    to: Annotated[str | None, How()] = Field(
        None, description="write the configuration for `serve deploy` or KubeRay to this file, and end"
    )


class KeyConfig(Settings):
    """Make an API key: prints it once, and writes its hash into a file of keys."""

    key_file: Uri = Field(description="JSON file of keys to write to; made where there is none")
    name: str = Field(pattern=_NAME, description="whose key it is; stands in metrics")
    pictures_per_minute: float | None = Field(None, gt=0, description="pictures that it may ask for in a minute")
    requests_at_once: int | None = Field(None, ge=1, description="requests that it may have under way")
    revoke: bool = Field(False, description="take the keys of this name out again")


class ExportConfig(Settings):
    """Write a published model as a folder that diffusers loads."""

    model: Annotated[Uri, How()] = Field(description="URI of the published model (its folder)")
    to: Annotated[Uri, How()] = Field(description="folder or s3://bucket/prefix to write, new or empty")


class ImportConfig(Place):
    """Publish the UNet2DModel of a diffusers folder as a model of the store."""

    source: Annotated[Uri, How()] = Field(
        validation_alias=AliasChoices("from", "source"),
        description="folder or s3://bucket/prefix of a UNet2DModel, alone or in a pipeline with its scheduler",
    )
    class_names: list[str] = Field(
        [], description="a name for each row of its class embedding; one fewer where the last row means no class"
    )
    resolution: int | None = Field(None, ge=8, le=1024, description="height and width, where its config has none")
    prediction: Literal["eps", "x0", "v"] | None = Field(None, description="what it predicts, without a scheduler")
    betas: BetaName | None = Field(None, description="its noise schedule, without a scheduler")
    timesteps: int | None = Field(None, ge=2, description="number of its timesteps, without a scheduler (1000)")
    beta_first: float | None = Field(None, gt=0, lt=1, description="first beta, without a scheduler (0.0001)")
    beta_last: float | None = Field(None, gt=0, lt=1, description="last beta, without a scheduler (0.02)")


# FIGURE OP VALUE: a dotted path into an evaluation's figures, and a number, live, or live + interval.
RULE = re.compile(
    r"(?P<optional>\?)?(?P<figure>[A-Za-z_]\w*(?:\.\w+)*)\s*(?P<operator><=|<|>=|>)\s*"
    r"(?:(?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)|live(?:\s*(?P<sign>[-+])\s*interval)?)"
)


def _known_rule(value: str) -> str:
    if not RULE.fullmatch(value.strip()):
        raise ValueError(
            "need FIGURE OP VALUE, as 'frechet <= live + interval' or '?class_accuracy >= 0.5'; OP is <=, <, >= or >, "
            "VALUE a number, live, live + interval or live - interval"
        )
    return value.strip()


Rule = Annotated[str, AfterValidator(_known_rule)]


class Who(Settings):
    """Who changes what is live, and why: kept beside the change."""

    by: str | None = Field(None, min_length=1, description="who does it; default: the name you are logged in with")
    reason: str = Field("", description="why; kept with the entry")

    @property
    def author(self) -> str:
        """Who does it. Raises PipelineError where that is not known."""
        try:
            return self.by or getpass.getuser()
        except (KeyError, ImportError, OSError) as error:
            raise PipelineError(f"by: the system knows no name of this user ({error}); give --by NAME") from error


class ModelPlace(Who):
    """A model, and the store and name under which its promotions are kept."""

    model: Uri = Field(description="URI of the published model (its folder)")
    store: Uri | None = Field(None, description="store that keeps the promotions; default: the one the model lies in")
    name: str | None = Field(None, pattern=_NAME, description="name of the model; default: the one in its URI")


class ModelsConfig(Place):
    """List the models of a name: steps, loss, promotions, which one is live; or show one whole."""

    model: Uri | None = Field(None, description="URI of a published model to show whole")


class GateOptions(Settings):
    """What an evaluation must meet before its model goes live."""

    rule: list[Rule] = Field(
        ["frechet <= live + interval", "memorisation <= 0.1", "?class_accuracy >= 0.5"],
        min_length=1,
        description="what the figures must meet, as 'frechet <= live + interval'; give the flag again for more; a ? in "
        "front: only where there is such a figure",
    )


class PromoteConfig(GateOptions, ModelPlace):
    """Make a model the live one of its name, where its evaluation passes the rules."""

    evaluation: Uri | None = Field(
        None, description="URI of the evaluation to judge by; default: the newest of this model"
    )
    force: bool = Field(False, description="promote whatever the rules say; needs --reason")

    @model_validator(mode="after")
    def _reasoned(self) -> Self:
        if self.force and not self.reason:
            raise ValueError("--force needs --reason, which is kept with the promotion")
        return self


class RollbackConfig(Who, Place):
    """Make live again what was live before."""

    to: int | None = Field(None, ge=1, description="number of the promotion to go back to; default: the one before")


class RetireConfig(ModelPlace):
    """Mark a model as one that must not be promoted."""

    undo: bool = Field(False, description="take the mark away again")


class TraceConfig(Settings):
    """Say where a picture, a set of them, a model or a dataset came from, or what a source went into."""

    uri: Annotated[Uri, First()] = Field(
        description="what to trace: an image set, a PNG of ours, a model, a dataset, an evaluation, or an object that "
        "was ingested; may be given without the flag"
    )
    store: Uri | None = Field(None, description="store to look in; default: the one that the URI lies in")
    row: int | None = Field(None, ge=0, description="number of one picture of an image set")
    remake: bool = Field(False, description="make the picture again on this machine, and compare the bytes")
    image: Uri | None = Field(None, description="with --remake: the picture file that was edited")
    mask: Uri | None = Field(None, description="with --remake: the mask file of that edit")
    sources: int = Field(20, ge=0, description="source objects to list; 0 lists all")


class VerifyConfig(Settings):
    """Read a set of generated pictures whole again, and count: every row once, every byte as promised."""

    uri: Annotated[Uri, First()] = Field(
        description="URI of the image set that generate printed; may be given without the flag"
    )


class ForgetConfig(Store):
    """Plan what to make anew so that a source has no part in anything; prints the commands and runs none."""

    uri: Annotated[Uri, First()] = Field(
        description="URI of the source: an object that was ingested; may be given without the flag"
    )


class CleanupConfig(Store):
    """Find what may be deleted: old models that nothing refers to, checkpoints of finished runs. Deletes on demand."""

    name: str | None = Field(None, pattern=_NAME, description="models of this name alone; default: of every name")
    keep: int = Field(3, ge=0, description="newest models of a name that stay in any case")
    dry_run: bool = Field(False, description="only print what would go, which is the default")
    delete: bool = Field(False, description="delete it")

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if self.dry_run and self.delete:
            raise ValueError("--dry-run or --delete, not both")
        return self


class Outcome(Settings):
    """What a stage hands on: the URI of its result, and whether it was there already."""

    uri: str
    found: bool


def what(settings: Settings) -> dict[str, Any]:
    """The settings that say what is made: all but those marked `How()`, as JSON values."""
    fields = type(settings).model_fields
    hidden = {name for name, field in fields.items() if any(isinstance(mark, How) for mark in field.metadata)}
    return settings.model_dump(mode="json", exclude=hidden)


def identity(stage: str, version: int, made: dict[str, Any], inputs: Any) -> str:
    """Digest (16 hex digits) that names a result: the stage, its algorithm's version, its settings and its inputs."""
    text = json.dumps([stage, version, made, inputs], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def narrow(settings: Settings, kind: type[SettingsT], **more: Any) -> SettingsT:
    """The settings of `kind` taken from those of the same names in a wider model; defaults stay unset."""
    told = _said(settings, kind)
    return kind.model_validate({**{name: getattr(settings, name) for name in told}, **more})


def _said(settings: Settings, kind: type[Settings]) -> list[str]:
    """Fields of `kind` that `settings` has by somebody's word, or by a default other than that of `kind`."""
    shared = [name for name in kind.model_fields if name in type(settings).model_fields]
    return [
        name
        for name in shared
        if name in settings.model_fields_set or getattr(settings, name) != kind.model_fields[name].default
    ]


def ray_address() -> str | None:
    """Address of the Ray cluster that this process was started in (a Ray job's), or None."""
    return os.environ.get("RAY_ADDRESS")


def stop_marker() -> str | None:
    """URI of the object that asks this process to stop, where it is a job that somebody may cancel; else None."""
    return os.environ.get(STOP_MARKER)


def choose_ray_authentication() -> None:
    """Say that Ray's token is asked for unless the environment says otherwise. Ray reads this once, when imported."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")


def parse(kind: type[SettingsT], program: str, arguments: Sequence[str]) -> SettingsT:
    """Settings from command-line flags; `--help` prints them all and exits. No environment variable takes part.

    Raises PipelineError, in one line, on an unknown flag or a bad value.
    """

    class Flags(BaseSettings, kind):  # type: ignore[valid-type, misc]
        model_config = SettingsConfigDict(
            cli_prog_name=program, cli_kebab_case=True, cli_implicit_flags=True, cli_exit_on_error=False,
            cli_hide_none_type=True, cli_avoid_json=True, extra="forbid",
        )  # fmt: skip

        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: Any,
            init_settings: Any,
            env_settings: Any,
            dotenv_settings: Any,
            file_secret_settings: Any,
        ) -> tuple[Any, ...]:
            return (init_settings,)

    Flags.__doc__ = kind.__doc__
    try:
        flags = CliApp.run(Flags, cli_args=_flagged(kind, arguments))
        return kind.model_validate(flags.model_dump(exclude_unset=True))
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:
            raise PipelineError(f"{program}: {first['msg'].removeprefix('Value error, ')}") from error
        flag = "--" + ".".join(str(part) for part in first["loc"]).replace("_", "-")
        raise PipelineError(f"{program}: {flag} {first.get('input')!r}: {first['msg']}") from error
    except SettingsError as error:
        told = str(error).removeprefix("error parsing CLI: ")
        raise PipelineError(f"{program}: {told}; --help lists the settings") from error


def _flagged(kind: type[Settings], arguments: Sequence[str]) -> list[str]:
    """The arguments with the flag of the field that may stand first without it."""
    first = next((name for name, field in kind.model_fields.items() if any(map(_is_first, field.metadata))), None)
    bare = first is not None and bool(arguments) and not arguments[0].startswith("-")
    return [f"--{first}", *arguments] if bare else list(arguments)


def _is_first(mark: object) -> bool:
    return isinstance(mark, First)


def to_values(config: Settings) -> dict[str, Any]:
    """The settings that somebody chose, as JSON values: what a strict file of settings says."""
    return config.model_dump(mode="json", exclude_none=True, include=set(_said(config, type(config))))


def to_flags(config: Settings, changed: bool = False) -> list[str]:
    """The command-line flags that `parse` turns back into `config`, with nothing set that was not.

    With `changed` those of default values are left out, too.
    """
    flags: list[str] = []
    told = set(_said(config, type(config)))
    for name, value in config.model_dump(
        mode="json", exclude_none=True, exclude_defaults=changed, include=told
    ).items():
        for item in value if isinstance(value, list) else [value]:
            switch = f"--{name.replace('_', '-')}"
            flags += [switch if item else f"--no-{switch[2:]}"] if isinstance(item, bool) else [switch, str(item)]
    return flags
