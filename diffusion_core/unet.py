"""The U-Net: residual blocks conditioned on noise level and class, attention at chosen levels.

Shapes: B batch, C channels, H x W picture, E embedding width, T = H·W positions.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffusion_core.checks import labels, picture_batch
from diffusion_core.config import UNetConfig


class UNet(nn.Module):
    """Ho et al. 2020 with the adaptive group norm of Dhariwal & Nichol 2021; the last label is the null class.

    With `checkpointing`, blocks keep their inputs alone for the backward pass and compute the rest again.
    """

    def __init__(self, config: UNetConfig, checkpointing: bool = False) -> None:
        super().__init__()
        width, embed = config.widths[0], 4 * config.widths[0]
        self.config, self.checkpointing = config, checkpointing
        self.embed = NoiseEmbedding(config, embed)
        self.classes = nn.Embedding(config.classes + 1, embed) if config.classes else None
        self.enter = nn.Conv2d(config.channels, width, 3, padding=1)
        self.down, skips = _down_path(config, embed)
        deepest = config.widths[-1]
        self.middle = nn.ModuleList(
            Block(deepest, deepest, embed, config, attends, config.middle_norm)
            for attends in (config.middle_attention, False)
        )
        self.up = _up_path(config, embed, skips)
        self.leave_norm = nn.GroupNorm(config.groups, width, config.norm_eps)
        self.leave = _zero(nn.Conv2d(width, config.channels, 3, padding=1))

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None) -> Tensor:
        """x [B, C, H, W], c_noise [B], label [B] (int64) or None for the null class -> [B, C, H, W].

        Raises ValueError on other shapes or types; H and W may be any multiple of 2^(levels - 1).
        """
        picture_batch("x", x, self.config.channels, 2 ** (len(self.config.widths) - 1))
        labels("label", label, len(x))
        embedding = self._embedding(c_noise, label)
        h = self.enter(x)
        skips = [h]
        for module in self.down:
            h = self._run(module, h, embedding)
            skips.append(h)
        for module in self.middle:
            h = self._run(module, h, embedding)
        for module in self.up:
            if not isinstance(module, Upsample):
                h = torch.cat((h, skips.pop()), 1)
            h = self._run(module, h, embedding)
        out: Tensor = self.leave(F.silu(self.leave_norm(h)))
        return out

    def _run(self, module: nn.Module, h: Tensor, embedding: Tensor) -> Tensor:
        """The module's answer, with or without its insides kept for the backward pass."""
        if self.checkpointing and torch.is_grad_enabled():
            kept: Tensor = checkpoint(module, h, embedding, use_reentrant=False)
            return kept
        out: Tensor = module(h, embedding)
        return out

    def _embedding(self, c_noise: Tensor, label: Tensor | None) -> Tensor:
        """Conditioning [B, E]."""
        embedding: Tensor = self.embed(c_noise)
        if self.classes is not None:
            index = torch.full_like(c_noise, self.config.classes, dtype=torch.int64) if label is None else label
            embedding = embedding + self.classes(index)
        return F.silu(embedding)


class NoiseEmbedding(nn.Module):
    """c_noise [B] -> [B, E]: sines and cosines of geometrically spaced frequencies, then two linear layers."""

    def __init__(self, config: UNetConfig, embed: int) -> None:
        super().__init__()
        self.config = config
        self.inner = nn.Linear(config.widths[0], embed)
        self.outer = nn.Linear(embed, embed)

    def forward(self, c_noise: Tensor) -> Tensor:
        """c_noise [B] -> [B, E]."""
        angle = c_noise[:, None] * self._frequencies(c_noise)
        waves = (torch.sin(angle), torch.cos(angle)) if self.config.sine_first else (torch.cos(angle), torch.sin(angle))
        out: Tensor = self.outer(F.silu(self.inner(torch.cat(waves, dim=1))))
        return out

    def _frequencies(self, like: Tensor) -> Tensor:
        """1 to 64 for logarithms of sigma; 1 down to about 1e-4 for timesteps (Ho et al. 2020)."""
        half = self.config.widths[0] // 2
        place = torch.arange(half, device=like.device, dtype=like.dtype)
        if self.config.embedding == "timestep":
            return torch.exp(place * (-math.log(10_000.0) / (half - self.config.frequency_shift)))
        return torch.exp(place * (math.log(64.0) / max(1, half - 1)))


class Block(nn.Module):
    """A residual block, scaled and shifted by the embedding, and self-attention behind it where asked."""

    def __init__(
        self, inner: int, outer: int, embed: int, config: UNetConfig, attends: bool, attention_norm: bool = True
    ) -> None:
        super().__init__()
        self.scales = config.scale_shift
        self.norm_in = nn.GroupNorm(config.groups, inner, config.norm_eps)
        self.conv_in = nn.Conv2d(inner, outer, 3, padding=1)
        self.condition = nn.Linear(embed, 2 * outer if self.scales else outer)
        self.norm_out = nn.GroupNorm(config.groups, outer, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.conv_out = _zero(nn.Conv2d(outer, outer, 3, padding=1))
        self.shortcut = nn.Conv2d(inner, outer, 1) if inner != outer else nn.Identity()
        self.attention = Attention(outer, config, attention_norm) if attends else None

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x [B, inner, H, W], embedding [B, E] -> [B, outer, H, W]."""
        h = self.conv_in(F.silu(self.norm_in(x)))
        condition = self.condition(embedding)[:, :, None, None]
        if self.scales:
            scale, shift = condition.chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm_out(h), scale + 1)
        else:
            h = self.norm_out(h + condition)
        h = self.shortcut(x) + self.conv_out(self.dropout(F.silu(h)))
        out: Tensor = h if self.attention is None else self.attention(h)
        return out


class Attention(nn.Module):
    """Self-attention over the positions of a picture, with a residual connection."""

    def __init__(self, width: int, config: UNetConfig, norm: bool) -> None:
        super().__init__()
        self.heads = width // (config.head_channels or width)
        self.norm = nn.GroupNorm(config.groups, width, config.norm_eps) if norm else nn.Identity()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = _zero(nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> the same shape."""
        batch, width, high, wide = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = (
            part(tokens).view(batch, high * wide, self.heads, -1).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, high * wide, width)
        out: Tensor = x + self.out(mixed).transpose(1, 2).reshape(batch, width, high, wide)
        return out


class Downsample(nn.Module):
    """Halves the picture by a strided convolution."""

    def __init__(self, width: int, config: UNetConfig) -> None:
        super().__init__()
        self.pads_end = config.downsample_padding == "end"
        self.conv = nn.Conv2d(width, width, 3, stride=2, padding=0 if self.pads_end else 1)

    def forward(self, x: Tensor, _: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, C, H/2, W/2]."""
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)) if self.pads_end else x)
        return out


class Upsample(nn.Module):
    """Doubles the picture by nearest neighbours and a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, _: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, C, 2H, 2W]."""
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


def _down_path(config: UNetConfig, embed: int) -> tuple[nn.ModuleList, list[int]]:
    """The contracting half, and the widths of all that it hands across."""
    path, skips, width = nn.ModuleList(), [config.widths[0]], config.widths[0]
    for level, wider in enumerate(config.widths):
        for _ in range(config.blocks):
            path.append(Block(width, wider, embed, config, level in config.attention))
            skips.append(width := wider)
        if level < len(config.widths) - 1:
            path.append(Downsample(width, config))
            skips.append(width)
    return path, skips


def _up_path(config: UNetConfig, embed: int, skips: list[int]) -> nn.ModuleList:
    """The expanding half; every block takes one of `skips` from the other half."""
    path, width, left = nn.ModuleList(), config.widths[-1], list(skips)
    for level, wider in reversed(list(enumerate(config.widths))):
        for _ in range(config.blocks + 1):
            path.append(Block(width + left.pop(), wider, embed, config, level in config.attention))
            width = wider
        if level > 0:
            path.append(Upsample(width))
    return path


def _zero(module: nn.Module) -> nn.Module:
    """The module with all parameters zero, so that a residual branch begins as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
