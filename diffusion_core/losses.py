"""The one training loss: w(sigma)·||F − (x0 − c_skip·x)/c_out||² (Karras et al. 2022, eq. 8)."""

from torch import Tensor

from diffusion_core.denoiser import Denoiser


def per_sample_loss(denoiser: Denoiser, x0: Tensor, sigma: Tensor, noise: Tensor, label: Tensor | None) -> Tensor:
    """Loss [B] with w = 1, for x0 and noise [B, C, H, W], sigma [B]: each prediction's own classic target."""
    x = x0 + sigma.to(x0.dtype)[:, None, None, None] * noise
    c_skip, c_out, _ = denoiser.coefficients(sigma, x)
    target = (x0 - c_skip * x) / c_out
    return (denoiser.raw(x, sigma, label) - target).square().flatten(1).mean(dim=1)
