"""The noise level of a picture, from the picture alone."""

import torch
from torch import Tensor

from diffusion_core import checks

_SMALLEST = 8
# Median of |N(0, 1)|
_MEDIAN = 0.6744897501960817


def estimate_sigma(pictures: Tensor) -> Tensor:
    """Standard deviation sigma [B] (float64) of white noise in `pictures` [B, C, H, W], the same in all channels.

    What is left of a picture by the Laplacian mask of Immerkaer 1996 in the differences between its channels is
    almost noise alone, since edges and texture are alike in all channels; its scale is the median of absolute values
    over that of a normal variable (Donoho & Johnstone 1994), which ignores the edges that remain. Pictures of one
    channel have no differences: there texture counts as noise. Raises ValueError on another shape or type, on sides
    below 8 pixels, and on values that are not finite.
    """
    found = f"pictures: {pictures.dtype} {list(pictures.shape)}"
    if pictures.ndim != 4 or not pictures.is_floating_point() or min(pictures.shape[:2]) < 1:
        raise ValueError(f"{found}; need a floating type, [B, C, H, W]")
    if min(pictures.shape[2:]) < _SMALLEST:
        raise ValueError(f"{found}; need H and W of at least {_SMALLEST}")
    checks.finite("pictures", pictures)
    x = _channel_differences(pictures.to(torch.float64))
    rows = x[..., 2:, :] - 2 * x[..., 1:-1, :] + x[..., :-2, :]
    laplacian = (rows[..., 2:] - 2 * rows[..., 1:-1] + rows[..., :-2]) / 6
    return laplacian.abs().flatten(1).median(dim=1).values / _MEDIAN


def _channel_differences(x: Tensor) -> Tensor:
    """C - 1 orthonormal differences of C channels (Helmert's), which leave the noise white; a single channel itself."""
    if x.shape[1] == 1:
        return x
    differences = [
        (k * x[:, k] - x[:, :k].sum(dim=1)) / (k * (k + 1)) ** 0.5  # channel k against the mean of those before
        for k in range(1, x.shape[1])
    ]
    return torch.stack(differences, dim=1)
