"""What can be watched while a run trains: a progress line, TensorBoard's events, MLflow's metrics, curve.png."""

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion_core.config import UNetConfig
from diffusion_core.flops import peak_flops, training_flops
from diffusion_core.losses import LEVELS
from diffusion_core.strategies import Ranks
from pipelines import storage
from pipelines.images import Pixels
from pipelines.report import loss_curve
from pipelines.train.plan import Record
from pipelines.train.tracking import Tracking

# Edges of the noise levels by which the training loss is told.
EDGES = (0.1, 0.3, 1.0)
_ROTATE_BYTES = 4 * 2**20


@dataclass
class Watch:
    """Steps since the last line: since when, seconds of waiting for data, and sums of losses by noise level."""

    began: float = field(default_factory=time.perf_counter)
    waited: float = 0.0
    steps: int = 0
    levels: Tensor | None = None

    def count(self, levels: Tensor) -> None:
        """One step more, with what `level_sums` found in it."""
        self.steps += 1
        self.levels = levels if self.levels is None else self.levels + levels

    @property
    def sums(self) -> list[float]:
        """What `level_sums` found in all of the steps."""
        return [0.0] * (2 * len(EDGES) + 2) if self.levels is None else [float(value) for value in self.levels.cpu()]


class Events:
    """TensorBoard's event files and MLflow's metrics of one run, on rank 0; TensorBoard's are kept in the store."""

    def __init__(
        self, run: str, step: int, mlflow: str | None, settings: dict[str, Any], tell: Callable[[str], None]
    ) -> None:
        self.run, self.folder, self.tell = run, tempfile.TemporaryDirectory(prefix="tensorboard-"), tell
        self.mlflow = Tracking(mlflow, run, settings) if mlflow else None
        self.writer = self._open(step)

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Numbers by name at a step."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        trouble = self.mlflow.log(values, step) if self.mlflow else ""
        if trouble:
            self.tell(f"train: {trouble}")

    def picture(self, name: str, pixels: Pixels, step: int) -> None:
        """A picture, uint8 [H, W, 3]."""
        self.writer.add_image(name, pixels, step, dataformats="HWC")

    def keep(self, step: int, record: Record) -> None:
        """Bring what there is into the store, and draw the curve anew."""
        self.writer.flush()
        for name in sorted(os.listdir(self.folder.name)):
            path = os.path.join(self.folder.name, name)
            with open(path, "rb") as file:
                data = file.read()
            storage.write_bytes(storage.join(self.run, "tensorboard", name), data)
            if len(data) > _ROTATE_BYTES:
                self.writer.close()
                os.unlink(path)
                self.writer = self._open(step)
        png = loss_curve(record.curve, record.validation, "png")
        storage.write_bytes(storage.join(self.run, "curve.png"), png)

    def close(self) -> None:
        """Send what waits for MLflow, and let go of the files."""
        trouble = self.mlflow.close() if self.mlflow else ""
        if trouble:
            self.tell(f"train: {trouble}; they are not sent again")
        self.writer.close()
        self.folder.cleanup()

    def _open(self, step: int) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        # Steps that a stopped run had told before, and that are told again, are dropped by purge_step.
        return SummaryWriter(self.folder.name, purge_step=step + 1)


def level_sums(losses: Tensor, sigma: Tensor) -> Tensor:
    """Sums of losses [B] between EDGES of the noise level [B], then their counts: float64 [2 L], on their device.

    They stay there, since reading them in every step would make a GPU wait.
    """
    level = torch.stack([sigma >= edge for edge in EDGES]).sum(dim=0)
    within = (level == torch.arange(len(EDGES) + 1, device=sigma.device)[:, None]).double()
    return torch.cat((within @ losses.double(), within.sum(dim=1)))


def level_scalars(sums: list[float]) -> dict[str, float]:
    """Mean losses by noise level, by the names that TensorBoard shows, from sums over ranks."""
    names = [f"loss at sigma/{low:g} to {high:g}" for low, high in zip((0, *EDGES), (*EDGES, 80), strict=True)]
    losses, counts = np.array(sums).reshape(2, -1)
    return {name: float(loss / count) for name, loss, count in zip(names, losses, counts, strict=True) if count}


def validation_scalars(row: list[float]) -> dict[str, float]:
    """A row of the validation by the names that TensorBoard shows."""
    levels = {f"held-out loss at sigma/{level:g}": loss for level, loss in zip(LEVELS, row[2:], strict=True)}
    return {"held-out loss": row[1]} | {name: loss for name, loss in levels.items() if np.isfinite(loss)}


def utilisation(unet: UNetConfig, ranks: Ranks, rate: float) -> dict[str, float]:
    """Model FLOPs utilisation at `rate` pictures a second: the share of what all devices could do in 16-bit floats."""
    peak = peak_flops(ranks.device)
    return {"MFU": rate * training_flops(unet) / (peak * ranks.world)} if peak else {}


def memory_bytes(ranks: Ranks) -> int:
    """Peak of what this rank has held: on its GPU, or of resident memory."""
    if ranks.device.type == "cuda":
        return torch.cuda.max_memory_allocated(ranks.device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
