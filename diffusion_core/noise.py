"""Gaussian noise as a function of (seed, purpose, step, shape): the same integers on every device, in any batch.

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") keyed by the seed; the counter
holds the element's block, the step and the purpose, so that no two draws share a random number.
"""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

Purpose = Literal[
    "start", "sampler", "known", "degrade", "seed", "train_noise", "train_sigma", "train_label", "train_flip",
    "dequantise", "probe",
]  # fmt: skip
PURPOSES: dict[Purpose, int] = {purpose: number for number, purpose in enumerate(get_args(Purpose), start=1)}

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def normal(
    seeds: Tensor, purpose: Purpose, step: int | Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Standard normal noise [B, *shape] for `seeds` [B] (int64); `step` is one number or [B].

    Box-Muller (1958) in float64, then rounded to `dtype`, so that devices agree to the last bits of float32.
    """
    count = math.prod(shape)
    words = _random_words(seeds, purpose, step, count).to(torch.float64)
    uniform = (words + 0.5) / 2.0**32
    radius = torch.sqrt(-2.0 * torch.log(uniform[:, 0::2]))
    angle = 2.0 * math.pi * uniform[:, 1::2]
    pairs = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return pairs.flatten(1)[:, :count].reshape(-1, *shape).to(dtype)


def nearby(
    seeds: Tensor, others: Tensor, share: Tensor, purpose: Purpose, step: int | Tensor, shape: Sequence[int]
) -> Tensor:
    """Noise [B, *shape] (float64) near that of `seeds` [B]: their own where `share` [B] is 0, that of `others` where 1.

    The mixture cos·n + sin·n' on the arc between two draws is standard normal at every share.
    """
    angle = (share.to(torch.float64) * (math.pi / 2)).reshape(-1, *[1] * len(shape))
    own, other = (normal(each, purpose, step, shape, torch.float64) for each in (seeds, others))
    return torch.cos(angle) * own + torch.sin(angle) * other


def uniform(seeds: Tensor, purpose: Purpose, step: int | Tensor) -> Tensor:
    """One float64 number in (0, 1) for each of `seeds` [B]."""
    return (_random_words(seeds, purpose, step, 1)[:, 0].to(torch.float64) + 0.5) / 2.0**32


def uniform_field(seeds: Tensor, purpose: Purpose, step: int | Tensor, shape: Sequence[int]) -> Tensor:
    """Uniform float64 numbers in (0, 1), [B, *shape], for `seeds` [B] (int64)."""
    count = math.prod(shape)
    words = _random_words(seeds, purpose, step, count)[:, :count]
    return ((words.to(torch.float64) + 0.5) / 2.0**32).reshape(-1, *shape)


def derive_seeds(seed: int, index: Tensor) -> Tensor:
    """Seeds (int64, 0 to 2^62) of the parts `index` [B] (int64) of whatever has the seed `seed`."""
    words = _random_words(torch.full_like(index, seed), "seed", index, 2)
    return ((words[:, 0] << 30) ^ words[:, 1]) & ((1 << 62) - 1)


def _random_words(seeds: Tensor, purpose: Purpose, step: int | Tensor, count: int) -> Tensor:
    """Random 32-bit words [B, n] as int64, n the multiple of 4 at or above count."""
    blocks = torch.arange((count + 3) // 4, device=seeds.device)
    steps = torch.as_tensor(step, device=seeds.device, dtype=torch.int64).expand(seeds.shape)
    counter = (
        blocks.expand(len(seeds), -1),
        steps[:, None] & _MASK,
        (steps[:, None] >> 32) & _MASK,
        torch.full_like(steps[:, None], PURPOSES[purpose]),
    )
    key = (seeds[:, None] & _MASK, (seeds[:, None] >> 32) & _MASK)
    shape = (len(seeds), len(blocks))
    return torch.stack([word.expand(shape) for word in _philox(counter, key)], dim=-1).flatten(1)


def _philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox4x32 on int64 tensors; what lies above 32 bits is cut off where it would count."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        low = c0 * _MULTIPLIERS[0]  # a 64-bit product that wraps as unsigned would: only its bits are used
        high = c2 * _MULTIPLIERS[1]
        c0, c2 = ((high >> 32) ^ c1 ^ k0) & _MASK, ((low >> 32) ^ c3 ^ k1) & _MASK
        c1, c3 = high, low
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1 & _MASK, c2, c3 & _MASK
