"""Training state in the store: tensors as safetensors, the rest as JSON, made whole by a manifest written last."""

from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from diffusion_core.training import TrainState
from pipelines import storage
from pipelines.config import PipelineError

_KEPT = 2


def save(run: str, state: TrainState, curve: list[list[float]]) -> str:
    """Write the state after `state.step` steps below the run's URI; keeps the last two. Returns its URI."""
    folder = _folder(run, state.step)
    part = storage.put_part(folder, "state", ".safetensors", safetensors.torch.save(_tensors(state)))
    storage.publish(folder, {"kind": "checkpoint", "schema": 1, "step": state.step, "parts": [part], "curve": curve})
    for step in steps(run)[:-_KEPT]:
        storage.remove_folder(_folder(run, step))
    return folder


def steps(run: str) -> list[int]:
    """Steps that have a whole checkpoint, ascending."""
    base = storage.join(run, "checkpoints")
    names = [name for name in storage.list_folders(base) if storage.is_published(storage.join(base, name))]
    return sorted(int(name.removeprefix("step-")) for name in names)


def restore(run: str, state: TrainState) -> tuple[TrainState, list[list[float]]]:
    """The newest whole checkpoint put into `state`, with its loss curve; unchanged where there is none.

    Raises StorageError where its bytes are not those that its manifest promised.
    """
    known = steps(run)
    if not known:
        return state, []
    folder = _folder(run, known[-1])
    manifest: dict[str, Any] = storage.read_manifest(folder, "checkpoint")
    try:
        tensors = safetensors.torch.load(storage.read_part(folder, manifest["parts"][0]))
    except safetensors.SafetensorError as error:
        raise PipelineError(
            f"{folder}: not a checkpoint of this version ({error}); delete it to start again"
        ) from error
    state.network.load_state_dict(_under(tensors, "weights."))
    for number, average in enumerate(state.ema):
        for name, value in _under(tensors, f"ema.{number}.").items():
            average[name].copy_(value)
    _load_optimizer(state.optimizer, _under(tensors, "optimizer."))
    state.step = int(manifest["step"])
    return state, [list(row) for row in manifest["curve"]]


def _folder(run: str, step: int) -> str:
    return storage.join(run, "checkpoints", f"step-{step:07}")


def _tensors(state: TrainState) -> dict[str, Tensor]:
    """All tensors of the state under flat names."""
    tensors = {f"weights.{name}": value for name, value in state.network.state_dict().items()}
    for number, average in enumerate(state.ema):
        tensors |= {f"ema.{number}.{name}": value for name, value in average.items()}
    for index, slots in state.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{slot}": torch.as_tensor(value) for slot, value in slots.items()}
    return {name: value.contiguous() for name, value in tensors.items()}


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Give the optimiser back its moments."""
    slots: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, _, slot = name.partition(".")
        slots.setdefault(int(index), {})[slot] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": slots})
