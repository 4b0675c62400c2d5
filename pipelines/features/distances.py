"""Distances between two sets of pictures by their features, each with its 95 % interval."""

import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import mannwhitneyu
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

Features = NDArray[np.float64]
Figure = dict[str, float]
# Neighbours: precision and recall as Kynkäänniemi et al. 2019, density and coverage as Naeem et al. 2020.
_NEAREST, _NEAREST_DENSITY = 3, 5
_SUBSETS, _SUBSET = 20, 1000
_AT_ONCE = 10**7  # distances held in memory


class _Given(nn.Module):
    """torchmetrics' seam for a feature extractor, where the features are there already."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.num_features = size

    def forward(self, features: Tensor) -> Tensor:
        return features


def figure(value: float, replicas: NDArray[np.float64], count: int) -> Figure:
    """A value with the interval of its bootstrap replicas.

    The percentiles are moved by the replicas' bias: a resampled set repeats pictures, so its distances are too large.
    """
    low, high = np.quantile(replicas, (0.025, 0.975)) - replicas.mean() + value
    return {"value": float(value), "low": float(low), "high": float(high), "count": float(count)}


def share(hits: NDArray[np.bool_]) -> Figure:
    """A share with its interval (Wilson 1927)."""
    count = len(hits)
    if count == 0:
        return {"value": math.nan, "low": 0.0, "high": 1.0, "count": 0.0}
    z, p = 1.96, float(hits.mean())
    middle = (p + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(p * (1 - p) / count + z**2 / (4 * count**2))
    return {
        "value": p,
        "low": min(p, max(0.0, middle - half)),
        "high": max(p, min(1.0, middle + half)),
        "count": float(count),
    }


def mean(values: NDArray[np.float64], rounds: int, rng: np.random.Generator) -> Figure:
    """A mean with its bootstrap interval."""
    picked = rng.integers(len(values), size=(rounds, len(values)))
    return figure(float(values.mean()), values[picked].mean(axis=1), len(values))


def frechet(real: Features, made: Features) -> float:
    """Fréchet distance of two Gaussians with the moments of [N, d] and [M, d] (Heusel et al. 2017); by torchmetrics."""
    metric = FrechetInceptionDistance(feature=_Given(real.shape[1])).set_dtype(torch.float64)
    metric.update(torch.from_numpy(real), real=True)
    metric.update(torch.from_numpy(made), real=False)
    return max(0.0, float(metric.compute()))


def frechet_figure(real: Features, made: Features, rounds: int, rng: np.random.Generator) -> Figure:
    """Fréchet distance with the interval of resampled `made`."""
    distance = _to(real)
    return figure(frechet(real, made), _resampled(distance, made, rounds, rng), len(made))


def kernel_figure(real: Features, made: Features, rounds: int, rng: np.random.Generator) -> Figure:
    """Squared kernel distance, cubic kernel (Bińkowski et al. 2018, KID), by torchmetrics; the interval as above."""
    size = min(_SUBSET, len(real), len(made))
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Metric `Kernel Inception Distance` will save all")
        torch.manual_seed(int(rng.integers(2**31)))
        metric = KernelInceptionDistance(feature=_Given(real.shape[1]), subsets=_SUBSETS, subset_size=size)
        metric.update(torch.from_numpy(real), real=True)
        metric.update(torch.from_numpy(made), real=False)
        value = float(metric.compute()[0])
    picked = rng.choice(len(real), min(len(real), _SUBSET), replace=False)
    return figure(value, _kernel_replicas(real[picked], made, rounds, rng), len(made))


class Manifolds(NamedTuple):
    """Where pictures lie, one by one.

    Of made ones: whether among the real ones (precision), and how densely (density). Of real ones: whether among the
    made ones (recall), or with one of them in their own neighbourhood (coverage).
    """

    precision: NDArray[np.bool_]
    density: NDArray[np.float64]
    recall: NDArray[np.bool_]
    coverage: NDArray[np.bool_]


def manifolds(real: Features, made: Features) -> Manifolds:
    """By balls around pictures up to their k-th neighbour in the same set (Kynkäänniemi eq. 1; Naeem eq. 5 and 8)."""
    apart = _apart(real, made)
    own, theirs = _apart(real, real), _apart(made, made)
    near_real, near_made = _radius(own, _NEAREST), _radius(theirs, _NEAREST)
    dense = _radius(own, _NEAREST_DENSITY)
    return Manifolds(
        np.asarray((apart <= near_real[:, None]).any(axis=0)),
        (apart <= dense[:, None]).sum(axis=0) / _NEAREST_DENSITY,
        np.asarray((apart <= near_made[None, :]).any(axis=1)),
        apart.min(axis=1) <= dense,
    )


def nearest(queries: Features, among: Features, count: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Distances [N, count] and numbers [N, count] of the nearest of `among`, the nearest first."""
    parts = [
        torch.cdist(torch.from_numpy(part), torch.from_numpy(among)).topk(count, largest=False)
        for part in np.array_split(queries, max(1, len(queries) * len(among) // _AT_ONCE))
    ]
    return torch.cat([each.values for each in parts]).numpy(), torch.cat([each.indices for each in parts]).numpy()


def data_copying(made: NDArray[np.float64], heldout: NDArray[np.float64]) -> float:
    """Whether made pictures lie nearer to training pictures than held-out ones do, in standard deviations.

    From distances to the nearest training picture, by Mann-Whitney's U (Meehan et al. 2020, eq. 2); far below 0 is
    copying.
    """
    m, n = len(made), len(heldout)
    return (float(mannwhitneyu(made, heldout).statistic) - m * n / 2) / math.sqrt(m * n * (m + n + 1) / 12)


def _to(real: Features) -> Callable[[Features], float]:
    """The Fréchet distance to `real` as a function, quick for few pictures of many features.

    With covariances A·Aᵀ and B·Bᵀ, the trace of the root of their product is the sum of the singular values of Aᵀ·B.
    """
    centre = real.mean(axis=0)
    covariance = np.cov(real, rowvar=False)
    values, vectors = np.linalg.eigh(np.atleast_2d(covariance))
    root = vectors * np.sqrt(np.maximum(values, 0))
    spread = float(np.maximum(values, 0).sum())

    def distance(made: Features) -> float:
        off = made - made.mean(axis=0)
        off /= math.sqrt(max(len(made) - 1, 1))
        shared = float(np.linalg.svd(off @ root, compute_uv=False).sum())
        return float(np.square(made.mean(axis=0) - centre).sum()) + spread + float(np.square(off).sum()) - 2 * shared

    return distance


def _resampled(
    statistic: Callable[[Features], float], made: Features, rounds: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """The statistic of `rounds` sets drawn from `made` with replacement."""
    return np.array([statistic(made[rng.integers(len(made), size=len(made))]) for _ in range(rounds)])


def _kernel_replicas(real: Features, made: Features, rounds: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Unbiased squared MMD (Gretton et al. 2012, eq. 3) of resampled `made`, by how often each picture is drawn."""
    n, m = len(real), len(made)
    own, cross, theirs = (_cubic(a, b) for a, b in ((real, real), (real, made), (made, made)))
    fixed = (own.sum() - np.trace(own)) / (n * (n - 1))
    drawn = rng.multinomial(m, np.full(m, 1 / m), size=rounds).astype(np.float64)
    pairs = np.einsum("ri,ij,rj->r", drawn, theirs, drawn, optimize=True) - drawn @ np.diag(theirs)
    return np.asarray(fixed + pairs / (m * (m - 1)) - 2 * (drawn @ cross.sum(axis=0)) / (n * m))


def _cubic(a: Features, b: Features) -> NDArray[np.float64]:
    """The kernel (x·y/d + 1)³."""
    return np.asarray((a @ b.T / a.shape[1] + 1) ** 3)


def _apart(a: Features, b: Features) -> NDArray[np.float64]:
    return torch.cdist(torch.from_numpy(a), torch.from_numpy(b)).numpy()


def _radius(apart: NDArray[np.float64], k: int) -> NDArray[np.float64]:
    """Distance [N] to the k-th neighbour, not counting itself."""
    k = min(k, len(apart) - 1)
    return np.asarray(np.partition(apart, k, axis=1)[:, k])
