"""The noise level of a picture, from the picture alone."""

from torch import Tensor


def estimate_sigma(pictures: Tensor) -> Tensor:
    """sigma [B] (float64) of the noise in `pictures` [B, C, H, W]: median of Haar's diagonal detail (Donoho 1994)."""
    x = pictures.double()
    detail = (x[..., ::2, ::2] - x[..., 1::2, ::2] - x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 2
    return detail.abs().flatten(1).median(dim=1).values / 0.6745
