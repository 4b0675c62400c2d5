"""Feature extractors and what is measured with them: a small classifier that names the class of a picture."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from pipelines.dataset import Rows
from pipelines.images import Pixels, to_floats

_BATCH = 64
_WIDTHS = (24, 48, 96)


class Classifier(nn.Module):
    """A small convolutional network that tells the classes of a dataset apart."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inner, outer in zip((3, *_WIDTHS), _WIDTHS, strict=False):
            layers += [nn.Conv2d(inner, outer, 3, padding=1), nn.BatchNorm2d(outer), nn.ReLU(), nn.MaxPool2d(2)]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(_WIDTHS[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, 3, H, W] in [-1, 1], at least 8x8 -> logits [B, classes]."""
        out: Tensor = self.head(self.layers(x).mean(dim=(2, 3)))
        return out


def train_classifier(rows: Rows, classes: int, steps: int, seed: int) -> Classifier:
    """A classifier of labelled pictures after `steps` steps of AdamW, lightly jittered so that it looks at shapes."""
    torch.manual_seed(seed)
    network = Classifier(classes)
    labelled = rows.labels >= 0
    pixels, labels = rows.pixels[labelled], torch.from_numpy(rows.labels[labelled])
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    order = np.random.default_rng(seed)
    for _ in range(steps):
        picked = order.integers(len(labels), size=_BATCH)
        x = _jittered(torch.from_numpy(to_floats(pixels[picked])), order)
        loss = F.cross_entropy(network(x), labels[picked])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return network.eval()


@torch.inference_mode()
def predict(classifier: Classifier, pixels: Pixels) -> NDArray[np.int64]:
    """The most likely label of each picture, [N]."""
    x = torch.from_numpy(to_floats(pixels))
    return np.concatenate([classifier(part).argmax(dim=1).numpy() for part in torch.split(x, 256)])


def share_with_interval(right: int, count: int) -> dict[str, float]:
    """A share with its 95 % interval (Wilson 1927)."""
    if count == 0:
        return {"count": 0.0}
    z, p = 1.96, right / count
    middle = (p + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(p * (1 - p) / count + z**2 / (4 * count**2))
    return {"count": float(count), "share": p, "low": middle - half, "high": min(1.0, middle + half)}


def psnr(a: Pixels, b: Pixels) -> float:
    """Mean over pictures [N, H, W, 3] of the peak signal-to-noise ratio in dB."""
    error = np.square(a.astype(np.float64) - b.astype(np.float64)).mean(axis=(1, 2, 3))
    return float(np.mean(10 * np.log10(255.0**2 / np.maximum(error, 1e-9))))


def _jittered(x: Tensor, order: np.random.Generator) -> Tensor:
    """Pictures with a little noise, moved by up to a pixel."""
    noise = torch.from_numpy(order.standard_normal(x.shape, dtype=np.float32)) * 0.05
    moves = tuple(int(move) for move in order.integers(-1, 2, size=2))
    return torch.roll(x + noise, moves, dims=(2, 3))
