"""D(x, sigma, label): every kind of network behind one contract, by one table (Karras et al. 2022, eq. 7)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffusion_core.config import ModelConfig, Prediction

Coefficients = tuple[Tensor, Tensor, Tensor]

# sigma [B], sigma_data -> c_skip, c_out, c_in
PRECONDITIONING: dict[Prediction, Callable[[Tensor, float], Coefficients]] = {
    "eps": lambda s, _: (torch.ones_like(s), -s, (1 + s**2) ** -0.5),
    "x0": lambda s, _: (torch.zeros_like(s), torch.ones_like(s), (1 + s**2) ** -0.5),
    "v": lambda s, _: (1 / (1 + s**2), -s * (1 + s**2) ** -0.5, (1 + s**2) ** -0.5),
    "edm": lambda s, d: (d**2 / (s**2 + d**2), s * d * (s**2 + d**2) ** -0.5, (s**2 + d**2) ** -0.5),
    "flow": lambda s, _: (1 / (1 + s), -s / (1 + s), 1 / (1 + s)),
}


@dataclass(frozen=True)
class Denoiser:
    """The best guess of x0 given x = x0 + sigma·eps: `network(c_in·x, c_noise, label)` with its preconditioning."""

    network: nn.Module
    config: ModelConfig

    def __call__(self, x: Tensor, sigma: Tensor, label: Tensor | None) -> Tensor:
        """x [B, C, H, W], sigma [B] > 0, label [B] (int64) or None for the null class -> x0 [B, C, H, W]."""
        c_skip, c_out, _ = self.coefficients(sigma, x)
        return c_skip * x + c_out * self.raw(x, sigma, label)

    def raw(self, x: Tensor, sigma: Tensor, label: Tensor | None) -> Tensor:
        """The network's own output F [B, C, H, W]."""
        _, _, c_in = self.coefficients(sigma, x)
        out: Tensor = self.network(c_in * x, 0.25 * torch.log(sigma).to(x.dtype), label)
        return out

    def coefficients(self, sigma: Tensor, like: Tensor) -> Coefficients:
        """c_skip, c_out, c_in [B, 1, 1, 1] in the dtype of `like`."""
        rows = PRECONDITIONING[self.config.prediction](sigma, self.config.sigma_data)
        skip, out, inner = (row.to(like.dtype)[:, None, None, None] for row in rows)
        return skip, out, inner


def guided(denoiser: Denoiser, x: Tensor, sigma: Tensor, label: Tensor | None, guidance: Tensor) -> Tensor:
    """Classifier-free guidance D_null + g·(D_label − D_null), g = `guidance` [B] (Ho & Salimans 2022, eq. 6).

    The unconditional pass is left out where there is no label or every g is 1. Both passes share one batch.
    """
    if label is None or bool((guidance == 1.0).all()):
        return denoiser(x, sigma, label)
    null = torch.full_like(label, denoiser.config.unet.classes)
    both = denoiser(torch.cat((x, x)), torch.cat((sigma, sigma)), torch.cat((label, null)))
    conditional, unconditional = both.chunk(2)
    return torch.lerp(unconditional, conditional, guidance.to(x.dtype)[:, None, None, None])
