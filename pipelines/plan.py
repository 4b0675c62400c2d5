"""The plan stage: what a training step would need of memory, setting by setting, and which of them to take."""

import dataclasses
import itertools
from dataclasses import dataclass
from functools import cached_property

import torch

from diffusion_core import memory
from diffusion_core.config import PRESETS, ModelConfig, Precision, Strategy
from diffusion_core.ema import Profile
from diffusion_core.strategies import Ranks
from diffusion_core.training import Optimisation
from pipelines.config import PipelineError, PlanConfig
from pipelines.progress import aligned

_CATEGORIES = tuple(field.name for field in dataclasses.fields(memory.Memory))


@dataclass(frozen=True)
class Choice:
    """A way to spread the work; how many pictures at a time is left open."""

    config: PlanConfig
    strategy: Strategy
    precision: Precision
    checkpointing: bool

    def needs(self, micro_batch: int) -> memory.Memory:
        """What a worker's step needs with so many pictures at a time."""
        return memory.predict(
            _model(self.config), _settings(self.config, self.precision), self.strategy, _ranks(self.config),
            _share(self.config), micro_batch, self.checkpointing,
        )  # fmt: skip

    @cached_property
    def largest(self) -> int:
        """The most pictures at a time that fit; 0 where not even one does."""
        sizes = range(_share(self.config), 0, -1)
        return next((size for size in sizes if self.needs(size).total <= _budget(self.config)), 0)

    @property
    def name(self) -> str:
        """The settings in words."""
        return f"{self.strategy}, {self.precision}{', checkpointing' if self.checkpointing else ''}"

    @property
    def flags(self) -> str:
        """What to add to `python -m pipelines train`."""
        config = self.config
        words = [f"--preset {config.preset} --workers {config.workers} --global-batch-size {config.global_batch_size}"]
        words += [f"--ema {width:g}" for width in config.ema]
        words += [f"--strategy {self.strategy} --precision {self.precision} --micro-batch {self.largest}"]
        words += ["--activation-checkpointing"] if self.checkpointing else []
        return " ".join(words)


def run(config: PlanConfig) -> None:
    """Print the tables and a recommendation. Raises PipelineError where no such network or share exists."""
    try:
        model = _model(config)
    except ValueError as error:
        raise PipelineError(f"plan: preset {config.preset}: {error}") from error
    if config.workers > config.global_batch_size:
        raise PipelineError(
            f"plan: {config.workers} workers for a global batch of {config.global_batch_size} pictures; "
            "raise --global-batch-size or lower --workers"
        )
    size, capacity, budget = model.unet.resolution, *map(memory.gigabytes, (_capacity(config), _budget(config)))
    print(
        f"{config.preset} at {size}x{size}, {config.workers} workers, {_share(config)} of {config.global_batch_size} "
        f"pictures each; {capacity} a worker, of which {budget} may be used"
    )
    choices = list(_choices(config))
    print("\n".join(["", *_by_micro_batch(choices), "", *_by_category(choices), "", recommendation(choices)]))


def recommendation(choices: list[Choice]) -> str:
    """The first that fits, or what would have to change. `choices` are in order of preference."""
    best = next((choice for choice in choices if choice.largest), None)
    if best is not None:
        return f"recommended: {best.name}, {best.largest} at a time\n  python -m pipelines train {best.flags}"
    least = min(choices, key=lambda choice: choice.needs(1).total)
    told = memory.too_large(
        _model(least.config), _settings(least.config, least.precision), least.strategy, _ranks(least.config),
        _share(least.config), _budget(least.config), least.checkpointing,
    )  # fmt: skip
    return f"nothing fits; with {least.name}: {told}"


def _choices(config: PlanConfig) -> list[Choice]:
    """All ways, the ones to be preferred first: what costs no time before what does."""
    strategies: list[Strategy] = ["ddp"]
    if config.workers > 1:
        by_node = config.workers_per_node and 1 < config.workers_per_node < config.workers
        strategies += ["hsdp", "fsdp"] if by_node else ["fsdp"]
    # Processors gain no time by bfloat16.
    both: list[Precision] = ["float32", "bfloat16"] if _device(config).type == "cpu" else ["bfloat16", "float32"]
    precisions = [config.precision] if config.precision else both
    order = itertools.product(precisions, (False, True), strategies)
    return [Choice(config, strategy, precision, checkpointing) for precision, checkpointing, strategy in order]


def _by_micro_batch(choices: list[Choice]) -> list[str]:
    """The peak in GB of every choice by pictures at a time; what does not fit is in brackets."""
    share, budget = _share(choices[0].config), _budget(choices[0].config)
    sizes = sorted({share, *(2**power for power in range(share.bit_length()) if 2**power <= share)})
    rows = [["peak, GB (too much); pictures at a time", *map(str, sizes)]]
    for choice in choices:
        totals = [choice.needs(size).total for size in sizes]
        cells = [f"{total / 1e9:.2f}" if total <= budget else f"({total / 1e9:.2f})" for total in totals]
        rows.append([choice.name, *cells])
    return aligned(rows)


def _by_category(choices: list[Choice]) -> list[str]:
    """What the peak is made of, with the most pictures at a time that fit, or one."""
    rows = [["peak, GB, with as many as fit", "at a time", *_CATEGORIES, "total", "fits"]]
    for choice in choices:
        needs = choice.needs(max(1, choice.largest))
        parts = [f"{getattr(needs, name) / 1e9:.2f}" for name in _CATEGORIES]
        fits = "yes" if choice.largest else "no"
        rows.append([choice.name, str(max(1, choice.largest)), *parts, f"{needs.total / 1e9:.2f}", fits])
    return aligned(rows)


def _model(config: PlanConfig) -> ModelConfig:
    """The network; names of classes take no memory."""
    preset = PRESETS[config.preset]
    unet = dataclasses.replace(preset, resolution=config.resolution or preset.resolution, classes=config.classes)
    return ModelConfig(unet, class_names=tuple(str(number) for number in range(config.classes)))


def _settings(config: PlanConfig, precision: Precision) -> Optimisation:
    """The optimisation, as far as memory depends on it."""
    return Optimisation(
        steps=1, learning_rate=1e-3, warmup=0, clip=1.0, weight_decay=0.0, label_dropout=0.1,
        ema=tuple(Profile("power", width) for width in config.ema), seed=0,
        global_batch_size=config.global_batch_size, precision=precision, world=config.workers,
    )  # fmt: skip


def _ranks(config: PlanConfig) -> Ranks:
    return Ranks(0, config.workers, config.workers_per_node or config.workers, _device(config))


def _device(config: PlanConfig) -> torch.device:
    """A GPU where there is one, or its size is given."""
    return torch.device("cuda" if config.gpu_memory is not None or torch.cuda.is_available() else "cpu")


def _share(config: PlanConfig) -> int:
    """Pictures of a step that fall to a worker."""
    return -(-config.global_batch_size // config.workers)


def _capacity(config: PlanConfig) -> int:
    """Bytes that a worker has."""
    if config.gpu_memory is not None:
        return int(config.gpu_memory)
    return memory.memory_of(_device(config), _ranks(config).local_world)


def _budget(config: PlanConfig) -> int:
    return int(memory.USABLE * _capacity(config))
