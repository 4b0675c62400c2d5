"""What the core's public functions demand of tensors; every error names the argument, what was found and what to give.

Shapes and types cost nothing to check; checks that read values are for boundaries, not for inner loops.
"""

import torch
from torch import Tensor


def picture_batch(name: str, x: Tensor, channels: int, multiple: int = 1) -> None:
    """Raise ValueError unless `x` is floating [B, channels, H, W] with B > 0, and H and W multiples of `multiple`."""
    found = f"{name}: {x.dtype} {list(x.shape)}"
    if not x.is_floating_point():
        raise ValueError(f"{found}; need a floating type, uint8 pictures become x / 127.5 - 1")
    if x.ndim != 4 or len(x) < 1 or x.shape[1] != channels:
        raise ValueError(f"{found}; need [B, {channels}, H, W] with B of at least 1")
    if x.shape[2] % multiple or x.shape[3] % multiple or x.shape[2] < 1 or x.shape[3] < 1:
        raise ValueError(f"{found}; need H and W that are multiples of {multiple}")


def labels(name: str, label: Tensor | None, batch: int) -> None:
    """Raise ValueError unless `label` is None or int64 [batch]."""
    if label is not None and (label.dtype != torch.int64 or label.shape != (batch,)):
        raise ValueError(f"{name}: {label.dtype} {list(label.shape)}; need torch.int64 [{batch}], or None")


def classes(name: str, label: Tensor | None, count: int) -> None:
    """Raise ValueError unless every label is one of `count` classes or the null class `count`. Reads the values."""
    if label is None:
        return
    if not count:
        raise ValueError(f"{name}: {label.tolist()}, but the model has no classes; give None")
    wrong = label[(label < 0) | (label > count)]
    if len(wrong):
        raise ValueError(f"{name}: {int(wrong[0])}; need 0 to {count - 1}, or {count} for the null class")


def seeds(name: str, values: Tensor) -> None:
    """Raise ValueError unless `values` is int64 [B] with B > 0."""
    if values.dtype != torch.int64 or values.ndim != 1 or not len(values):
        raise ValueError(f"{name}: {values.dtype} {list(values.shape)}; need torch.int64 [B] with B of at least 1")


def finite(name: str, x: Tensor) -> None:
    """Raise ValueError where a value is NaN or infinite. Reads the values."""
    bad = int((~torch.isfinite(x)).sum())
    if bad:
        raise ValueError(f"{name}: {bad} of {x.numel()} values are NaN or infinite; need finite values")


def within(name: str, x: Tensor, low: float, high: float) -> None:
    """Raise ValueError where a value is not in [low, high]. Reads the values."""
    least, most = (float(value) for value in x.aminmax())
    if not (low <= least and most <= high):
        finite(name, x)
        raise ValueError(f"{name}: values from {least:g} to {most:g}; need {low:g} to {high:g}")
