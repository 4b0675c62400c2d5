"""The one training loss: w(sigma)·||F − (x0 − c_skip·x)/c_out||² (Karras et al. 2022, eq. 8)."""

from collections.abc import Callable

import torch
from torch import Tensor

from diffusion_core.config import Weighting
from diffusion_core.denoiser import Denoiser
from diffusion_core.noise import derive_seeds, normal
from diffusion_core.schedules import add_noise

# Noise levels at which held-out pictures are looked at: from faint noise to nothing but noise.
LEVELS = (0.05, 0.15, 0.4, 1.0, 3.0, 10.0)
# Not a run's seed: the same noise for every run.
_HELDOUT_SEED = 20_061

# sigma [B], c_out [B], sigma_data, gamma -> w [B]. The signal-to-noise ratio is 1/sigma², and an error of the
# picture D is c_out times one of F; so a weight of w on F is w/c_out² on D.
WEIGHTINGS: dict[Weighting, Callable[[Tensor, Tensor, float, float], Tensor]] = {
    "unit": lambda s, c, _, __: torch.ones_like(s),
    # Hang et al. 2023: min(SNR, gamma) on D
    "min_snr": lambda s, c, _, gamma: c**2 * (s**-2).clamp(max=gamma),
    # Crowson et al. 2024: SNR·gamma/(SNR + gamma) on D
    "soft_min_snr": lambda s, c, _, gamma: c**2 * gamma / (1 + gamma * s**2),
    # Karras et al. 2022, table 1: (sigma² + sigma_data²)/(sigma·sigma_data)² on D
    "edm": lambda s, c, d, _: c**2 * (s**2 + d**2) / (s * d) ** 2,
}


def per_sample_loss(
    denoiser: Denoiser,
    x0: Tensor,
    sigma: Tensor,
    noise: Tensor,
    label: Tensor | None,
    weighting: Weighting = "unit",
    gamma: float = 5.0,
) -> Tensor:
    """Loss [B] for x0 and noise [B, C, H, W], sigma [B]; "unit" gives each prediction its own classic target.

    `gamma` is the signal-to-noise ratio that "min_snr" and "soft_min_snr" level off at.
    """
    x = add_noise(x0, sigma, noise)
    c_skip, c_out, _ = denoiser.coefficients(sigma, x)
    target = (x0 - c_skip * x) / c_out
    error = (denoiser.raw(x, sigma, label).to(x.dtype) - target).square().flatten(1).mean(dim=1)
    return WEIGHTINGS[weighting](sigma.to(x.dtype), c_out.flatten(), denoiser.config.sigma_data, gamma) * error


def heldout_loss(denoiser: Denoiser, x0: Tensor, ids: Tensor, sigma: Tensor, label: Tensor | None) -> Tensor:
    """Error on D by EDM's weight, [B], of x0 [B, C, H, W] at sigma [B], with noise that `ids` [B] fix for all models.

    That weight makes networks of different predictions comparable (Karras et al. 2022, table 1).
    """
    noise = normal(derive_seeds(_HELDOUT_SEED, ids), "train_noise", 0, x0.shape[1:], x0.dtype)
    return per_sample_loss(denoiser, x0, sigma, noise, label, "edm")
