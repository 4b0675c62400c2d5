"""Inception-v3 (Szegedy et al. 2016) as it is used for FID: the layers by the names of the usual weights file.

Those weights come from TensorFlow's 2015 network: 1008 classes, average pools that leave out the padding, and a maximum
pool in the last block. They are the user's to supply.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZE = 2048
_INPUT = 299
Layer = tuple[str, int, tuple[int, int], int]
Branches = dict[str, Sequence[Layer]]
_POOL = {
    "average": lambda x: F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False),
    "maximum": lambda x: F.max_pool2d(x, 3, stride=1, padding=1),
    "smaller": lambda x: F.max_pool2d(x, 3, stride=2),
}


def _layer(name: str, width: int, kernel: tuple[int, int] = (1, 1), stride: int = 1) -> Layer:
    return name, width, kernel, stride


def _block_a(pool: int) -> Branches:
    """35x35: figure 5 of the paper."""
    return {
        "one": [_layer("branch1x1", 64)],
        "five": [_layer("branch5x5_1", 48), _layer("branch5x5_2", 64, (5, 5))],
        "three": [_layer("branch3x3dbl_1", 64), _layer("branch3x3dbl_2", 96, (3, 3)),
                  _layer("branch3x3dbl_3", 96, (3, 3))],
        "average": [_layer("branch_pool", pool)],
    }  # fmt: skip


def _block_c(width: int) -> Branches:
    """17x17: figure 6."""
    return {
        "one": [_layer("branch1x1", 192)],
        "seven": [_layer("branch7x7_1", width), _layer("branch7x7_2", width, (1, 7)),
                  _layer("branch7x7_3", 192, (7, 1))],
        "double": [_layer("branch7x7dbl_1", width), _layer("branch7x7dbl_2", width, (7, 1)),
                   _layer("branch7x7dbl_3", width, (1, 7)), _layer("branch7x7dbl_4", width, (7, 1)),
                   _layer("branch7x7dbl_5", 192, (1, 7))],
        "average": [_layer("branch_pool", 192)],
    }  # fmt: skip


def _block_e(pool: str) -> Branches:
    """8x8: figure 7; layers a and b both take what the layer before them gives."""
    return {
        "one": [_layer("branch1x1", 320)],
        "three": [_layer("branch3x3_1", 384), _layer("branch3x3_2a", 384, (1, 3)), _layer("branch3x3_2b", 384, (3, 1))],
        "double": [_layer("branch3x3dbl_1", 448), _layer("branch3x3dbl_2", 384, (3, 3)),
                   _layer("branch3x3dbl_3a", 384, (1, 3)), _layer("branch3x3dbl_3b", 384, (3, 1))],
        pool: [_layer("branch_pool", 192)],
    }  # fmt: skip


_BLOCKS: dict[str, Branches] = {
    "Mixed_5b": _block_a(32), "Mixed_5c": _block_a(64), "Mixed_5d": _block_a(64),
    "Mixed_6a": {
        "three": [_layer("branch3x3", 384, (3, 3), 2)],
        "double": [_layer("branch3x3dbl_1", 64), _layer("branch3x3dbl_2", 96, (3, 3)),
                   _layer("branch3x3dbl_3", 96, (3, 3), 2)],
        "smaller": [],
    },
    "Mixed_6b": _block_c(128), "Mixed_6c": _block_c(160), "Mixed_6d": _block_c(160), "Mixed_6e": _block_c(192),
    "Mixed_7a": {
        "three": [_layer("branch3x3_1", 192), _layer("branch3x3_2", 320, (3, 3), 2)],
        "seven": [_layer("branch7x7x3_1", 192), _layer("branch7x7x3_2", 192, (1, 7)),
                  _layer("branch7x7x3_3", 192, (7, 1)), _layer("branch7x7x3_4", 192, (3, 3), 2)],
        "smaller": [],
    },
    "Mixed_7b": _block_e("average"), "Mixed_7c": _block_e("maximum"),
}  # fmt: skip
# Name, input and output channels, kernel, stride, padding; a maximum pool follows the third and the fifth.
_STEM = (
    ("Conv2d_1a_3x3", 3, 32, 3, 2, 0), ("Conv2d_2a_3x3", 32, 32, 3, 1, 0), ("Conv2d_2b_3x3", 32, 64, 3, 1, 1),
    ("Conv2d_3b_1x1", 64, 80, 1, 1, 0), ("Conv2d_4a_3x3", 80, 192, 3, 1, 0),
)  # fmt: skip
_POOLED = ("Conv2d_2b_3x3", "Conv2d_4a_3x3")


class Inception(nn.Module):
    """Inception-v3 without its head: pictures to 2048 pooled features."""

    def __init__(self) -> None:
        super().__init__()
        for name, inner, outer, kernel, stride, padding in _STEM:
            self.add_module(name, _convolution(inner, outer, (kernel, kernel), stride, (padding, padding)))
        width = _STEM[-1][2]
        for name, branches in _BLOCKS.items():
            block = _Block(branches, width)
            self.add_module(name, block)
            width = block.width

    def forward(self, x: Tensor) -> Tensor:
        """x [B, 3, H, W] in [-1, 1] -> [B, 2048]. Pictures are resized to 299x299, bilinearly."""
        x = F.interpolate(x, (_INPUT, _INPUT), mode="bilinear", align_corners=False)
        for name, layer in self.named_children():
            x = layer(x)
            if name in _POOLED:
                x = F.max_pool2d(x, 3, stride=2)
        return x.mean(dim=(2, 3))


class _Block(nn.Module):
    """Branches side by side, their outputs joined."""

    def __init__(self, branches: Branches, inner: int) -> None:
        super().__init__()
        self.branches, self.width = branches, 0
        for kind, layers in branches.items():
            width = inner
            for name, outer, kernel, stride in layers:
                padding = (0, 0) if stride == 2 else (kernel[0] // 2, kernel[1] // 2)
                self.add_module(name, _convolution(width, outer, kernel, stride, padding))
                width = width if name.endswith("a") else outer
                self.width += outer if name.endswith("a") else 0
            self.width += width if layers or kind in _POOL else 0

    def forward(self, x: Tensor) -> Tensor:
        outs = [self._branch(kind, layers, x) for kind, layers in self.branches.items()]
        return torch.cat([out for each in outs for out in each], dim=1)

    def _branch(self, kind: str, layers: Sequence[Layer], x: Tensor) -> list[Tensor]:
        """One branch's output, or two where it forks."""
        x = _POOL[kind](x) if kind in _POOL else x
        forked = []
        for name, *_ in layers:
            out = getattr(self, name)(x)
            if name.endswith("a"):
                forked.append(out)
            else:
                x = out
        return [*forked, x]


def _convolution(inner: int, outer: int, kernel: tuple[int, int], stride: int, padding: tuple[int, int]) -> nn.Module:
    """Convolution, normalisation, rectifier."""
    convolution = nn.Conv2d(inner, outer, kernel, stride, padding, bias=False)
    parts = [("conv", convolution), ("bn", nn.BatchNorm2d(outer, eps=1e-3)), ("relu", nn.ReLU())]
    return nn.Sequential(OrderedDict(parts))
