"""From a wish to settings: the network, size, batch and steps that fit a time and the memory, found by measurement."""

import dataclasses
import math
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from diffusion_core.config import PRESETS, ModelConfig, UNetConfig
from diffusion_core.denoiser import Denoiser
from diffusion_core.flops import training_flops
from diffusion_core.memory import USABLE, largest_micro_batch, memory_of
from diffusion_core.strategies import Ranks, distribute
from diffusion_core.training import Batch, new_state, train_step
from diffusion_core.unet import UNet
from pipelines import storage
from pipelines.config import PipelineError, TrainCommand, identity
from pipelines.dataset import open_dataset
from pipelines.progress import duration, print_line
from pipelines.train.devices import processes, threads_of
from pipelines.train.plan import optimisation

# Start-up, validation, checkpoints and the model's publication take the rest.
_SHARE_OF_STEPS = 0.85
_STEPS_MEASURED, _LONGEST_S = 3, 20.0
_FEWEST_STEPS = 100
# The demo's network, a million parameters at 32 pixels, draws recognisable faces after 900 steps of 32 pictures. That
# larger networks and pictures want more, by the root of the parameters and the side, is a rule of thumb.
_WANTED, _PARAMETERS, _SIDE = 28_800, 1.0e6, 32
# More steps than this are better spent on larger batches, up to this size.
_MANY_STEPS, _LARGEST_BATCH = 20_000, 256


@dataclass(frozen=True)
class Candidate:
    """A network for pictures of one size."""

    preset: str
    unet: UNetConfig
    parameters: int = field(init=False)

    def __post_init__(self) -> None:
        """Count the parameters, without making them."""
        with torch.device("meta"):
            count = sum(value.numel() for value in UNet(self.unet).parameters())
        object.__setattr__(self, "parameters", count)

    @property
    def wanted(self) -> int:
        """Pictures that it should see before it can be expected to draw well."""
        return round(_WANTED * math.sqrt(self.parameters / _PARAMETERS) * self.unet.resolution / _SIDE)

    @property
    def learning_rate(self) -> float:
        """The demo's rate, smaller by the root of the parameters: 3e-4 for 38 M, 1e-4 for 280 M."""
        return float(f"{min(2e-3, 2e-3 * math.sqrt(_PARAMETERS / self.parameters)):.1g}")


@dataclass(frozen=True)
class Finding:
    """A candidate with the seconds that a step takes; why not, where it is out."""

    candidate: Candidate
    seconds: float = math.nan
    out: str = ""

    def seen(self, usable: float, batch: int) -> float:
        """Pictures that it sees in `usable` seconds."""
        return usable / self.seconds * batch

    def sees_enough(self, usable: float, batch: int) -> bool:
        """Whether these are as many as it wants."""
        return self.seen(usable, batch) >= self.candidate.wanted


def choose(command: TrainCommand) -> dict[str, Any]:
    """The settings that fit `command.budget`; what the command names itself stays. The same command finds them again.

    Needs a connection to Ray, whose devices are measured. Raises PipelineError where nothing fits.
    """
    dataset = open_dataset(command.dataset) if command.dataset else None
    resolution, classes = (dataset.resolution, len(dataset.class_names)) if dataset else (command.resolution, 0)
    digest = identity("choice", 1, command.model_dump(mode="json", exclude={"store"}, exclude_unset=True), resolution)
    place = storage.join(storage.normalise(command.store), "choices", command.name, f"{digest}.json")
    try:
        known: dict[str, Any] = storage.read_json(place)
        print_line(f"train: as chosen before for this command: {_told(known)} ({place})")
        return known
    except storage.NotFoundError:
        chosen = _choose(command, resolution, classes)
    storage.create_bytes(place, storage.to_json(chosen))
    # Another of the same command may have chosen meanwhile: the first one's word counts.
    agreed: dict[str, Any] = storage.read_json(place)
    return agreed


def _choose(command: TrainCommand, resolution: int | None, classes: int) -> dict[str, Any]:
    """Measure, print, choose, print."""
    workers, use_gpu = processes(command)
    usable = command.budget_seconds * _SHARE_OF_STEPS
    kind = "GPU" if use_gpu else "no GPU"
    print_line(f"train: measuring what fits {duration(command.budget_seconds)} on {workers} workers ({kind})")
    batch = command.global_batch_size
    findings: list[Finding] = []
    for candidate in candidates(command, resolution, classes):
        finding = _find(command, candidate, findings, workers, use_gpu, usable)
        findings.append(finding)
        print_line(_row(finding, usable, batch))
    able = [finding for finding in findings if not finding.out]
    if not able:
        raise PipelineError(f"--budget {command.budget}: nothing fits: {findings[0].out}; give more time")
    enough = [each for each in able if each.sees_enough(usable, batch)]
    chosen = enough[-1] if enough else able[0]
    settings = _settings(command, chosen, usable, use_gpu)
    _explain(chosen, settings, bool(enough), command)
    return settings


def candidates(command: TrainCommand, resolution: int | None, classes: int) -> list[Candidate]:
    """What may be trained, the least work first: presets at the resolution asked for, or each at its own."""
    named = [command.preset] if "preset" in command.model_fields_set else [name for name in PRESETS if name != "tiny"]
    found = []
    for name in named:
        size = resolution or PRESETS[name].resolution
        try:
            found.append(Candidate(name, dataclasses.replace(PRESETS[name], resolution=size, classes=classes)))
        except ValueError as error:
            if len(named) == 1:
                raise PipelineError(f"preset {name} at {size} pixels: {error}") from error
    return sorted(found, key=lambda each: training_flops(each.unet))


def _find(
    command: TrainCommand, candidate: Candidate, before: list[Finding], workers: int, use_gpu: bool, usable: float
) -> Finding:
    """Measure a candidate, unless it cannot fit."""
    timed = [each for each in before if not math.isnan(each.seconds)]
    if timed:
        ratio = training_flops(candidate.unet) / training_flops(timed[-1].candidate.unet)
        # Larger networks run at a better rate: a third of the time that their arithmetic alone would let expect.
        if timed[-1].seconds * ratio / 3 * _FEWEST_STEPS > usable:
            return Finding(candidate, out=f"by its arithmetic, not even {_FEWEST_STEPS} steps would fit the time")
    import ray

    device = ray.remote(num_cpus=1, num_gpus=1 if use_gpu else 0)(_seconds)
    arguments = (
        command.model_copy(update={"precision": _precision(command, use_gpu)}),
        candidate.unet,
        workers,
        use_gpu,
    )
    told = ray.get([device.remote(*arguments) for _ in range(workers)])
    trouble = next((each for each in told if isinstance(each, str)), "")
    if trouble:
        return Finding(candidate, out=trouble)
    seconds = max(told)
    fits = usable / seconds >= _FEWEST_STEPS
    return Finding(candidate, seconds, "" if fits else f"not even {_FEWEST_STEPS} steps would fit the time")


def _seconds(command: TrainCommand, unet: UNetConfig, workers: int, use_gpu: bool) -> float | str:
    """Seconds of a worker's part of a step, the median of a few; or why it cannot run here."""
    ranks = Ranks(0, 1, 1, torch.device("cuda" if use_gpu else "cpu"))
    torch.set_num_threads(threads_of(command.threads, 1 if use_gpu else workers))
    model = ModelConfig(unet, command.prediction, class_names=tuple(map(str, range(unet.classes))))
    share = -(-command.global_batch_size // workers)
    settings = dataclasses.replace(optimisation(command), global_batch_size=share)
    budget = int(memory_of(ranks.device, workers) * USABLE)
    try:
        most = largest_micro_batch(model, settings, "ddp", ranks, share, budget, command.activation_checkpointing)
    except ValueError as error:
        return str(error)
    settings = dataclasses.replace(settings, micro_batches=-(-share // most))
    network = UNet(unet, command.activation_checkpointing)
    state = new_state(Denoiser(distribute(network, "ddp", ranks), model), network, settings)
    batch = _random_batch(unet, share, ranks.device)
    times: list[float] = []
    while len(times) <= _STEPS_MEASURED and sum(times) < _LONGEST_S:
        began = time.perf_counter()
        state, _ = train_step(state, batch, settings)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:] or times)


def _random_batch(unet: UNetConfig, count: int, device: torch.device) -> Batch:
    """Pictures of noise: a step takes as long with them as with others."""
    x0 = torch.rand(count, unet.channels, unet.resolution, unet.resolution, device=device) * 2 - 1
    ids = torch.arange(count, device=device)
    label = ids % unet.classes if unet.classes else None
    return Batch(x0.to(memory_format=torch.channels_last), label, ids, ids)


def _precision(command: TrainCommand, use_gpu: bool) -> str:
    return "bfloat16" if use_gpu and "precision" not in command.model_fields_set else command.precision


def _settings(command: TrainCommand, chosen: Finding, usable: float, use_gpu: bool) -> dict[str, Any]:
    """The choice as settings of `train`, with what the command names itself."""
    batch, named = command.global_batch_size, command.model_fields_set
    steps = usable / chosen.seconds
    while "global_batch_size" not in named and steps > _MANY_STEPS and 2 * batch <= _LARGEST_BATCH:
        batch, steps = 2 * batch, steps / 2
    steps = max(1, int(steps) // 10 * 10)
    free = {
        "preset": chosen.candidate.preset, "steps": steps, "global_batch_size": batch,
        "learning_rate": chosen.candidate.learning_rate, "warmup": min(command.warmup, max(1, steps // 10)),
        "precision": _precision(command, use_gpu), "micro_batch": "auto",
    }  # fmt: skip
    given = {name: getattr(command, name) for name in free if name in named}
    return {**free, **given, "resolution": chosen.candidate.unet.resolution}


def _row(finding: Finding, usable: float, batch: int) -> str:
    """A candidate in a line."""
    candidate = finding.candidate
    size = f"{candidate.unet.resolution:>4} pixels  {candidate.parameters / 1e6:>6.1f} M parameters"
    name = f"  {candidate.preset:<10} {size}"
    if finding.out:
        return f"{name}  {finding.out}"
    verdict = "enough" if finding.sees_enough(usable, batch) else "too few"
    sees = f"sees {finding.seen(usable, batch):,.0f} of {candidate.wanted:,} pictures"
    return f"{name}  {finding.seconds:>7.3f} s a step  {sees}: {verdict}"


def _explain(chosen: Finding, settings: dict[str, Any], enough: bool, command: TrainCommand) -> None:
    """What was chosen and why."""
    candidate = chosen.candidate
    why = (
        "the largest network that sees as many pictures as it wants in the time" if enough else
        "the smallest, although it sees fewer pictures than it wants: expect rough pictures, or give more time"
    )  # fmt: skip
    print_line(f"train: {candidate.preset} at {candidate.unet.resolution} pixels: {why}")
    print_line(f"train: chosen: {_told(settings)}; the flag of that name overrides each")
    needed = settings["steps"] * chosen.seconds * settings["global_batch_size"] / command.global_batch_size
    if needed > command.budget_seconds:
        print_line(f"train: warning: {settings['steps']} steps need about {duration(needed)}, more than the budget")


def _told(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())
