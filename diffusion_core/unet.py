"""The U-Net: residual blocks with scale-shift conditioning, attention at chosen levels, a class embedding.

Shapes: B batch, C channels, H x W picture, E embedding width, T = H·W positions.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_core.config import UNetConfig


class UNet(nn.Module):
    """Ho et al. 2020 with the adaptive group norm of Dhariwal & Nichol 2021; the last label is the null class."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        width, embed = config.widths[0], 4 * config.widths[0]
        self.config = config
        self.embed = NoiseEmbedding(width, embed)
        self.classes = nn.Embedding(config.classes + 1, embed) if config.classes else None
        self.enter = nn.Conv2d(config.channels, width, 3, padding=1)
        self.down, skips = _down_path(config, embed)
        deepest = config.widths[-1]
        self.middle = nn.ModuleList(
            [
                Block(deepest, deepest, embed, config, attends=True),
                Block(deepest, deepest, embed, config, attends=False),
            ]
        )
        self.up = _up_path(config, embed, skips)
        self.leave_norm = nn.GroupNorm(config.groups, width)
        self.leave = _zero(nn.Conv2d(width, config.channels, 3, padding=1))

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None) -> Tensor:
        """x [B, C, H, W], c_noise [B], label [B] or None for the null class -> [B, C, H, W]."""
        embedding = self._embedding(c_noise, label)
        h = self.enter(x)
        skips = [h]
        for module in self.down:
            h = module(h, embedding)
            skips.append(h)
        for module in self.middle:
            h = module(h, embedding)
        for module in self.up:
            h = (
                module(h, embedding)
                if isinstance(module, Upsample)
                else module(torch.cat((h, skips.pop()), 1), embedding)
            )
        out: Tensor = self.leave(F.silu(self.leave_norm(h)))
        return out

    def _embedding(self, c_noise: Tensor, label: Tensor | None) -> Tensor:
        """Conditioning [B, E]."""
        embedding: Tensor = self.embed(c_noise)
        if self.classes is not None:
            index = torch.full_like(c_noise, self.config.classes, dtype=torch.int64) if label is None else label
            embedding = embedding + self.classes(index)
        return F.silu(embedding)


class NoiseEmbedding(nn.Module):
    """c_noise [B] -> [B, E]: sines and cosines of octave-spaced frequencies, then two linear layers."""

    def __init__(self, width: int, embed: int) -> None:
        super().__init__()
        self.frequencies = width // 2
        self.inner = nn.Linear(width, embed)
        self.outer = nn.Linear(embed, embed)

    def forward(self, c_noise: Tensor) -> Tensor:
        """c_noise [B] -> [B, E]."""
        octaves = torch.linspace(0.0, math.log(64.0), self.frequencies, device=c_noise.device, dtype=c_noise.dtype)
        angle = c_noise[:, None] * torch.exp(octaves)
        out: Tensor = self.outer(F.silu(self.inner(torch.cat((torch.cos(angle), torch.sin(angle)), dim=1))))
        return out


class Block(nn.Module):
    """A residual block, scaled and shifted by the embedding, and self-attention behind it where asked."""

    def __init__(self, inner: int, outer: int, embed: int, config: UNetConfig, attends: bool) -> None:
        super().__init__()
        self.norm_in = nn.GroupNorm(math.gcd(config.groups, inner), inner)
        self.conv_in = nn.Conv2d(inner, outer, 3, padding=1)
        self.condition = nn.Linear(embed, 2 * outer)
        self.norm_out = nn.GroupNorm(config.groups, outer)
        self.dropout = nn.Dropout(config.dropout)
        self.conv_out = _zero(nn.Conv2d(outer, outer, 3, padding=1))
        self.shortcut = nn.Conv2d(inner, outer, 1) if inner != outer else nn.Identity()
        self.attention = Attention(outer, config) if attends else None

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x [B, inner, H, W], embedding [B, E] -> [B, outer, H, W]."""
        h = self.conv_in(F.silu(self.norm_in(x)))
        scale, shift = self.condition(embedding)[:, :, None, None].chunk(2, dim=1)
        h = F.silu(torch.addcmul(shift, self.norm_out(h), scale + 1))
        h = self.shortcut(x) + self.conv_out(self.dropout(h))
        out: Tensor = h if self.attention is None else self.attention(h)
        return out


class Attention(nn.Module):
    """Self-attention over the positions of a picture, with a residual connection."""

    def __init__(self, width: int, config: UNetConfig) -> None:
        super().__init__()
        self.heads = width // config.head_channels
        self.norm = nn.GroupNorm(config.groups, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = _zero(nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> the same shape."""
        batch, width, high, wide = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).view(batch, high * wide, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, high * wide, width)
        out: Tensor = x + self.out(mixed).transpose(1, 2).reshape(batch, width, high, wide)
        return out


class Downsample(nn.Module):
    """Halves the picture by a strided convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x: Tensor, _: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, C, H/2, W/2]."""
        out: Tensor = self.conv(x)
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
            path.append(Downsample(width))
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
