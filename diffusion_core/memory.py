"""What a training step will need of memory, without running it.

One step of the real code runs on tensors without storage, on a single rank, and PyTorch's memory tracker says what
lives after each operation. What sharding and replicas change is worked out from that: shares of the weights, blocks
gathered for a while, gradients in buckets.
"""

import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker, _MemRefType, _ModState
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion_core.config import ModelConfig, Strategy
from diffusion_core.denoiser import Denoiser
from diffusion_core.strategies import Ranks
from diffusion_core.training import Batch, Optimisation, TrainState, new_state, train_step
from diffusion_core.unet import Block, UNet

# Every byte count is a whole multiple of the batch plus what does not grow with it. In a batch of so many pictures,
# which costs nothing without storage, the one is the quotient and the other the remainder.
_MANY = 2**32
# The part of a device's memory that a prediction may fill: the rest is for what it does not know of, the device's own
# needs and the gaps between tensors.
USABLE = 0.85
# What a process on a CPU has beside its tensors once it trains: modules, the graph, kernels made at run time. Measured.
_PROCESS = 6 * 2**20


@dataclass(frozen=True)
class Memory:
    """Bytes that a rank holds at the peak of a step, by what they are.

    `gathered` are blocks brought together from their shards, and their gradients before these are shared out;
    `copies` the bfloat16 copies that autocast makes of weights; `workspace` what kernels take inside an operation, and
    on a CPU the process itself.
    """

    parameters: int
    gradients: int
    optimizer: int
    ema: int
    activations: int
    gathered: int
    copies: int
    workspace: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(getattr(self, each.name) for each in fields(self))


@dataclass(frozen=True)
class Weights:
    """Sizes in bytes (float32) of a network's parameters: shapes, and those of them that belong to no block."""

    shapes: tuple[torch.Size, ...]
    outside: int

    def share(self, shards: int) -> int:
        """What one of `shards` ranks holds: each tensor is cut along its first dimension, in equal parts, padded."""
        return sum(4 * -(-shape[0] // shards) * shape[1:].numel() for shape in self.shapes)


@dataclass(frozen=True)
class Trace:
    """What a step held after each of its operations, bytes [N] (int64), but for weights, optimiser and averages.

    `activations` grow by `per_picture`; `block` is the size (float32) of the block at work, and `backward` says
    whether that was in the backward pass.
    """

    gradients: Tensor
    copies: Tensor
    activations: Tensor
    per_picture: Tensor
    block: Tensor
    backward: Tensor


def predict(
    model: ModelConfig, settings: Optimisation, strategy: Strategy, ranks: Ranks, share: int, micro_batch: int,
    checkpointing: bool = False,
) -> Memory:  # fmt: skip
    """The peak of a training step of a rank that computes its `share` of the pictures `micro_batch` at a time.

    Takes precision and the number of averages from `settings`; `ranks` need not exist. Raises ValueError where there
    is no such step.
    """
    shards = _shards(strategy, ranks)
    parts = _parts(share, micro_batch)
    weights, trace = _weights(model), _trace(model, _essence(settings), checkpointing)
    own = weights.share(shards)
    gradients, gathered = _spread(weights, trace, shards, parts, settings)
    gradients = torch.full_like(gradients, own) if ranks.world > 1 and shards == 1 else gradients
    # Weights that are gathered in bfloat16 need no copies.
    copies = torch.zeros_like(trace.copies) if shards > 1 else trace.copies
    activations = trace.activations + -(-share // parts) * trace.per_picture
    peak = int((gradients + gathered + copies + activations).argmax())
    pictures = 4 * share * model.unet.channels * model.unet.resolution**2
    return Memory(
        parameters=own, gradients=int(gradients[peak]), optimizer=2 * own, ema=len(settings.ema) * own,
        activations=int(activations[peak]) + pictures, gathered=int(gathered[peak]), copies=int(copies[peak]),
        workspace=_workspace(weights, ranks),
    )  # fmt: skip


def largest_micro_batch(
    model: ModelConfig, settings: Optimisation, strategy: Strategy, ranks: Ranks, share: int, budget: int,
    checkpointing: bool = False,
) -> int:  # fmt: skip
    """The most pictures at a time, up to a rank's `share`, with which a step fits into `budget` bytes.

    Raises ValueError where one does not; its text names the settings to change, by effect.
    """
    for micro_batch in range(share, 0, -1):
        if predict(model, settings, strategy, ranks, share, micro_batch, checkpointing).total <= budget:
            return micro_batch
    raise ValueError(too_large(model, settings, strategy, ranks, share, budget, checkpointing))


def too_large(
    model: ModelConfig, settings: Optimisation, strategy: Strategy, ranks: Ranks, share: int, budget: int,
    checkpointing: bool = False,
) -> str:  # fmt: skip
    """One line that says what a step with one picture at a time needs, and what each setting would change."""
    needs = predict(model, settings, strategy, ranks, share, 1, checkpointing).total
    effects = levers(model, settings, strategy, ranks, share, checkpointing)
    told = [f"{name} (to {gigabytes(total)})" for name, total in sorted(effects.items(), key=lambda item: item[1])]
    return (
        f"micro_batch 1 needs {gigabytes(needs)}, and {gigabytes(budget)} may be used; to need less, by effect: "
        f"{', '.join([*told, 'a smaller preset or resolution'])}"
    )


def levers(
    model: ModelConfig, settings: Optimisation, strategy: Strategy, ranks: Ranks, share: int, checkpointing: bool
) -> dict[str, int]:
    """The settings that are left to change and what a step would then need, bytes, one picture at a time."""
    needs = functools.partial(predict, model, share=share, micro_batch=1)
    fewer = replace(settings, ema=settings.ema[:1])
    effects: dict[str, int] = {}
    if not checkpointing:
        effects["activation_checkpointing"] = needs(settings, strategy, ranks, checkpointing=True).total
    if settings.precision == "float32":
        lower = replace(settings, precision="bfloat16")
        effects["precision bfloat16"] = needs(lower, strategy, ranks, checkpointing=checkpointing).total
    if strategy != "fsdp" and ranks.world > 1:
        effects["strategy fsdp"] = needs(settings, "fsdp", ranks, checkpointing=checkpointing).total
    if len(settings.ema) > 1:
        effects["fewer ema widths"] = needs(fewer, strategy, ranks, checkpointing=checkpointing).total
    return effects


def memory_of(device: torch.device, local_world: int = 1) -> int:
    """Bytes that one of `local_world` ranks on a node can have.

    Those of its GPU; else its part of the machine's memory, or of what the container may take.
    """
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *_container_limits()]) // local_world


def gigabytes(count: int) -> str:
    """Bytes as people read them."""
    return f"{count / 1e9:.2f} GB"


def _container_limits() -> Iterator[int]:
    """What control groups, version 2 or 1, allow this process."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        path = Path("/sys/fs/cgroup", name)
        if path.exists() and (text := path.read_text().strip()).isdigit():
            yield int(text)


def _shards(strategy: Strategy, ranks: Ranks) -> int:
    """Into how many parts the weights are cut."""
    if strategy == "hsdp" and ranks.world % ranks.local_world:
        raise ValueError(f"hsdp: {ranks.world} workers do not fill nodes of {ranks.local_world}; use fsdp")
    return {"ddp": 1, "fsdp": ranks.world, "hsdp": ranks.local_world}[strategy]


def _parts(share: int, micro_batch: int) -> int:
    """Turns in which a share is computed."""
    if share < 1 or micro_batch < 1:
        raise ValueError(f"share, micro_batch: {share}, {micro_batch}; need at least 1")
    return -(-share // micro_batch)


def _spread(weights: Weights, trace: Trace, shards: int, parts: int, settings: Optimisation) -> tuple[Tensor, Tensor]:
    """Gradients that stay, and what is gathered for a while, bytes [N]."""
    whole = weights.share(1)
    if shards == 1:
        held = torch.full_like(trace.gradients, whole) if parts > 1 else trace.gradients
        return held, torch.zeros_like(held)
    kept = trace.gradients // shards
    # Ranks exchange after the last part alone: until then whole gradients are summed.
    kept = kept + (whole - trace.gradients) if parts > 1 else kept
    travels = 2 if settings.precision == "bfloat16" else 1
    # Forward, a block beside the buffer it came in. Backward, the block, the next one's buffer, and gradients in
    # float32; those of what lies in no block stay to the end.
    block = torch.where(trace.backward, 2 * trace.block // travels + trace.block, 2 * trace.block // travels)
    outside = torch.where(trace.backward, weights.outside // travels + weights.outside, weights.outside // travels)
    return kept, block + outside


def _workspace(weights: Weights, ranks: Ranks) -> int:
    """What kernels take inside an operation: the largest weight in another layout; and the process on a CPU."""
    largest = max(4 * shape.numel() for shape in weights.shapes)
    return largest + (_PROCESS if ranks.device.type == "cpu" else 0)


def _essence(settings: Optimisation) -> Optimisation:
    """The settings with everything that changes no tensor of a step set alike, so that traces are found again."""
    return replace(
        settings, steps=1, learning_rate=1.0, warmup=0, clip=1.0, ema=(), seed=0, global_batch_size=_MANY,
        micro_batches=1, world=1,
    )  # fmt: skip


@functools.lru_cache(maxsize=64)
def _weights(model: ModelConfig) -> Weights:
    with torch.device("meta"):
        network = UNet(model.unet)
    inside = sum(_size(module) for module in network.modules() if isinstance(module, Block))
    return Weights(tuple(parameter.shape for parameter in network.parameters()), _size(network) - inside)


def _size(module: nn.Module) -> int:
    return sum(4 * parameter.numel() for parameter in module.parameters())


@functools.lru_cache(maxsize=64)
def _trace(model: ModelConfig, settings: Optimisation, checkpointing: bool) -> Trace:
    """A step of the real code on tensors without storage."""
    tracker = _Recorder()
    with FakeTensorMode():
        state = _state(model, settings, checkpointing)
        _mark_blocks(state.network, tracker)
        tracker.track_external(state.network, state.optimizer)
        with tracker, _Answers(tracker):
            train_step(state, _batch(model), settings)
    activations = [divmod(row.others, _MANY) for row in tracker.rows]
    return Trace(
        gradients=torch.tensor([row.gradients for row in tracker.rows]),
        copies=torch.tensor([row.copies for row in tracker.rows]),
        activations=torch.tensor([fixed for _, fixed in activations]),
        per_picture=torch.tensor([each for each, _ in activations]),
        block=torch.tensor([row.block for row in tracker.rows]),
        backward=torch.tensor([row.backward for row in tracker.rows]),
    )


class _Row(NamedTuple):
    """What there is after an operation, bytes; the size of the block at work; whether this is the backward pass."""

    gradients: int
    copies: int
    others: int
    block: int
    backward: bool


class _Recorder(MemTracker):  # type: ignore[no-untyped-call]
    """PyTorch's tracker, of which every moment is kept: its own peak would be that of a rank alone."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[_Row] = []
        self.block = 0

    def _update_peak_stats(self, peak_state: Any) -> None:
        """Called by the tracker after each operation."""
        backward = peak_state is _ModState.PEAK_BW
        if self.rows and self.rows[-1].backward and not backward:
            self.block = 0
        for held in self._curr_mem_snap.values():
            gradients, copies = held[_MemRefType.GRAD], held[_MemRefType.OTH]
            others = held[_MemRefType.ACT] + held[_MemRefType.TEMP]
            self.rows.append(_Row(gradients, copies, others, self.block, backward))


class _Answers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tensors without storage have no values to look at: whoever asks is told 0, and that no value was wrong."""

    def __init__(self, tracker: MemTracker) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tracker = tracker

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0
        if func is torch.ops.aten.index.Tensor and any(
            mask is not None and mask.dtype == torch.bool for mask in args[1]
        ):
            return args[0].new_empty(0)
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and isinstance(args[0], nn.Parameter):
            self.tracker.track_external(out)  # as "other"
        return out


def _mark_blocks(network: nn.Module, tracker: _Recorder) -> None:
    """Have the tracker told which block is at work, forward and backward."""
    for block in network.modules():
        if isinstance(block, Block):
            enters = functools.partial(_enter, tracker, _size(block))
            block.register_forward_pre_hook(lambda *_, enters=enters: enters())
            block.register_forward_hook(functools.partial(_leave, tracker, enters))


def _enter(tracker: _Recorder, size: int) -> None:
    tracker.block = size


def _leave(tracker: _Recorder, enters: Callable[[], None], _: nn.Module, __: Any, out: Tensor) -> None:
    """The backward pass enters where the forward pass leaves."""
    tracker.block = 0
    out.register_hook(lambda _: enters())  # type: ignore[no-untyped-call]


def _state(model: ModelConfig, settings: Optimisation, checkpointing: bool) -> TrainState:
    """A state before the first step, in the layout that training has."""
    network = UNet(model.unet, checkpointing)
    for module in network.modules():
        for name, value in list(module.named_parameters(recurse=False)):
            if value.ndim == 4:
                setattr(module, name, nn.Parameter(value.detach().contiguous(memory_format=torch.channels_last)))
    return new_state(Denoiser(network, model), network, settings)


def _batch(model: ModelConfig) -> Batch:
    """Many pictures."""
    unet = model.unet
    x0 = torch.empty(_MANY, unet.channels, unet.resolution, unet.resolution, memory_format=torch.channels_last)
    ids = torch.empty(_MANY, dtype=torch.int64)
    return Batch(x0, torch.empty_like(ids) if unet.classes else None, ids, ids)
