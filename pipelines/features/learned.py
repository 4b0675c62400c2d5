"""Feature extractors learned on the dataset itself: by its classes, or without labels by telling views of it apart."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from pipelines.dataset import Rows
from pipelines.images import Pixels, to_floats

WIDTHS = (24, 48, 96)
_BATCH = 64
_PEAK = 4e-3
# Of the contrastive loss: what Chen et al. found best for short runs on small pictures.
_TEMPERATURE, _PROJECTED = 0.5, 64


class Trunk(nn.Module):
    """A small convolutional network whose pooled output describes a picture."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inner, outer in zip((3, *WIDTHS), WIDTHS, strict=False):
            layers += [nn.Conv2d(inner, outer, 3, padding=1), nn.BatchNorm2d(outer), nn.ReLU(), nn.MaxPool2d(2)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, 3, H, W] in [-1, 1], at least 8x8 -> features [B, 96]."""
        out: Tensor = self.layers(x).mean(dim=(2, 3))
        return out


class Classifier(nn.Module):
    """A trunk with a head that tells the classes of a dataset apart."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.trunk, self.head = Trunk(), nn.Linear(WIDTHS[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, 3, H, W] in [-1, 1], at least 8x8 -> logits [B, classes]."""
        out: Tensor = self.head(self.trunk(x))
        return out


def train_classifier(rows: Rows, classes: int, steps: int, seed: int) -> Classifier:
    """A classifier of labelled pictures after `steps` steps of AdamW, lightly jittered so that it looks at shapes."""
    torch.manual_seed(seed)
    network = Classifier(classes)
    labelled = rows.labels >= 0
    pixels, labels = rows.pixels[labelled], torch.from_numpy(rows.labels[labelled])

    def loss(picked: NDArray[np.int64], order: np.random.Generator) -> Tensor:
        x = _jittered(torch.from_numpy(to_floats(pixels[picked])), order)
        return F.cross_entropy(network(x), labels[picked])

    _fit(network, loss, len(labels), steps, seed)
    return network.eval()


def train_contrastive(pixels: Pixels, steps: int, seed: int) -> Trunk:
    """A trunk that knows two views of a picture among those of others, after `steps` steps (SimCLR, Chen et al. 2020).

    Views are crops, mirrored and in other colours. `pixels` [N, H, W, 3].
    """
    torch.manual_seed(seed)
    size, trunk = WIDTHS[-1], Trunk()
    head = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, _PROJECTED))

    def loss(picked: NDArray[np.int64], order: np.random.Generator) -> Tensor:
        x = torch.from_numpy(to_floats(pixels[picked]))
        return contrastive_loss(head(trunk(torch.cat((_view(x, order), _view(x, order))))), _TEMPERATURE)

    _fit(nn.Sequential(trunk, head), loss, len(pixels), steps, seed)
    return trunk.eval()


def contrastive_loss(z: Tensor, temperature: float) -> Tensor:
    """NT-Xent (Chen et al. 2020, eq. 1) of z [2 N, d], in which i and i + N are views of the same picture."""
    z = F.normalize(z)
    likeness = (z @ z.T / temperature).masked_fill(torch.eye(len(z), dtype=torch.bool), -torch.inf)
    return F.cross_entropy(likeness, torch.arange(len(z)).roll(len(z) // 2))


@torch.inference_mode()
def predict(classifier: Classifier, pixels: Pixels) -> NDArray[np.int64]:
    """The most likely label of each picture, [N]."""
    x = torch.from_numpy(to_floats(pixels))
    return np.concatenate([classifier(part).argmax(dim=1).numpy() for part in torch.split(x, 256)])


def _fit(
    network: nn.Module,
    loss_of: Callable[[NDArray[np.int64], np.random.Generator], Tensor],
    count: int,
    steps: int,
    seed: int,
) -> None:
    """`steps` steps of AdamW by batches picked out of `count` pictures."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=_PEAK / 2, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _PEAK, total_steps=steps)
    order = np.random.default_rng(seed)
    for _ in range(steps):
        loss = loss_of(order.integers(count, size=_BATCH), order)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()


def _jittered(x: Tensor, order: np.random.Generator) -> Tensor:
    """Pictures with a little noise, moved by up to a pixel."""
    noise = torch.from_numpy(order.standard_normal(x.shape, dtype=np.float32)) * 0.05
    moves = tuple(int(move) for move in order.integers(-1, 2, size=2))
    return torch.roll(x + noise, moves, dims=(2, 3))


def _view(x: Tensor, order: np.random.Generator) -> Tensor:
    """Pictures [B, 3, H, W] cropped, mirrored and coloured by chance, each in its own way."""
    count = len(x)
    scale = np.sqrt(order.uniform(0.4, 1.0, count))
    mirror = np.where(order.random(count) < 0.5, -1.0, 1.0)
    moves = order.uniform(-1, 1, (2, count)) * (1 - scale)
    zeros = np.zeros(count)
    turn = np.stack((np.stack((scale * mirror, zeros, moves[0])), np.stack((zeros, scale, moves[1]))))
    grid = F.affine_grid(torch.from_numpy(turn.transpose(2, 0, 1)).float(), list(x.shape), align_corners=False)
    cropped = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    gain, shift = (
        torch.from_numpy(order.uniform(low, high, (count, 3, 1, 1))).float() for low, high in ((0.6, 1.4), (-0.3, 0.3))
    )
    return cropped * gain + shift
