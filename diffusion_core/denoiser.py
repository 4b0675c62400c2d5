"""D(x, sigma, label): every kind of network behind one contract, by one table (Karras et al. 2022, eq. 7)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffusion_core.config import ModelConfig, Prediction
from diffusion_core.schedules import timestep_of, timestep_sigmas

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
        return c_skip * x + c_out * self.raw(x, sigma, label).to(x.dtype)

    def raw(self, x: Tensor, sigma: Tensor, label: Tensor | None) -> Tensor:
        """The network's own output F [B, C, H, W]."""
        _, _, c_in = self.coefficients(sigma, x)
        out: Tensor = self.network(c_in * x, self.c_noise(sigma).to(x.dtype), label)
        return out

    def c_noise(self, sigma: Tensor) -> Tensor:
        """What the network is told of sigma [B]: ln(sigma)/4, or a discrete model's own timestep."""
        if self.config.timesteps is None:
            return 0.25 * torch.log(sigma)
        return timestep_of(sigma, timestep_sigmas(self.config.timesteps).to(sigma.device))

    def coefficients(self, sigma: Tensor, like: Tensor) -> Coefficients:
        """c_skip, c_out, c_in [B, 1, 1, 1] in the dtype of `like`."""
        rows = PRECONDITIONING[self.config.prediction](sigma, self.config.sigma_data)
        skip, out, inner = (row.to(like.dtype)[:, None, None, None] for row in rows)
        return skip, out, inner


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance, each field [B]: `scale` (1 is off), where low < sigma <= high, and `rescale` (0 to 1).

    The interval is that of Kynkäänniemi et al. 2024; outside it scale is 1. `rescale` moves the standard deviation of
    each guided picture back to that of the conditional one (Lin et al. 2024, eq. 14 to 16).
    """

    scale: Tensor
    low: Tensor
    high: Tensor
    rescale: Tensor

    def __post_init__(self) -> None:
        """Raise ValueError on values outside their range. Reads the values."""
        for name, value, fits in (
            ("scale", self.scale, torch.isfinite(self.scale) & (self.scale >= 0)),
            ("low", self.low, (self.low >= 0) & (self.low <= self.high)),
            ("rescale", self.rescale, (self.rescale >= 0) & (self.rescale <= 1)),
        ):
            if not bool(fits.all()):
                raise ValueError(
                    f"guidance: {name} {value.tolist()}; need finite scale >= 0, 0 <= low <= high, rescale 0 to 1"
                )

    def needs(self, sigma: Tensor) -> Tensor:
        """Which samples need the unconditional pass at sigma [B]: bool [B]."""
        return (self.scale != 1) & (sigma > self.low) & (sigma <= self.high)

    def mix(self, conditional: Tensor, unconditional: Tensor, needs: Tensor) -> Tensor:
        """`conditional` [B, C, H, W] with the samples that `needs` [B] names guided by `unconditional` (theirs)."""
        scale, rescale = (
            value.to(conditional.dtype)[needs][:, None, None, None] for value in (self.scale, self.rescale)
        )
        mixed = torch.lerp(unconditional, conditional[needs], scale)
        out = conditional.clone()
        out[needs] = torch.where(rescale > 0, _rescaled(mixed, conditional[needs], rescale), mixed)
        return out


def guidance(
    scale: Tensor, low: Tensor | float = 0.0, high: Tensor | float = float("inf"), rescale: Tensor | float = 0.0
) -> Guidance:
    """Guidance for `scale` [B], with one interval and one rescaling for all, or [B] of them."""
    return Guidance(scale, *(torch.as_tensor(value).to(scale).expand(scale.shape) for value in (low, high, rescale)))


def guided(
    denoiser: Denoiser,
    x: Tensor,
    sigma: Tensor,
    label: Tensor | None,
    how: Guidance,
    negative: Tensor | None = None,
) -> Tensor:
    """D_null + g·(D_label − D_null) (Ho & Salimans 2022, eq. 6) for x [B, C, H, W], sigma [B], label [B].

    With `negative` [B] its labels take the place of the null class, to lead away from them. The second pass is made for
    those samples alone that need it, in one batch with the conditional one.
    """
    needs = how.needs(sigma)
    if label is None or not bool(needs.any()):
        return denoiser(x, sigma, label)
    null = torch.full_like(label[needs], denoiser.config.unet.classes) if negative is None else negative[needs]
    both = denoiser(torch.cat((x, x[needs])), torch.cat((sigma, sigma[needs])), torch.cat((label, null)))
    return how.mix(both[: len(x)], both[len(x) :], needs)


def _rescaled(mixed: Tensor, conditional: Tensor, rescale: Tensor) -> Tensor:
    """`mixed` [B, C, H, W] with its standard deviation moved by `rescale` to that of `conditional`."""
    spread, aim = (each.flatten(1).std(dim=1)[:, None, None, None] for each in (mixed, conditional))
    return mixed * torch.lerp(torch.ones_like(spread), aim / spread.clamp(min=1e-8), rescale)
