"""How much arithmetic a network asks for, and how much a device can do: what model FLOPs utilisation is made of."""

import functools
from collections.abc import Sequence

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from diffusion_core.config import UNetConfig
from diffusion_core.unet import UNet

# Dense arithmetic of 16-bit floats, in operations a second, from the makers' data sheets.
_PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10G": 70e12, "T4": 65e12,
          "V100": 125e12, "4090": 165e12, "3090": 71e12}  # fmt: skip


@functools.lru_cache(maxsize=8)
def training_flops(unet: UNetConfig) -> float:
    """Floating-point operations of training on one picture: a forward pass, and twice as many for the backward one.

    Counted on tensors without storage. What is computed again to save memory does not count.
    """
    # PyTorch's counter knows attention on GPUs alone.
    attention = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
    counter = FlopCounterMode(display=False, custom_mapping=attention)
    with FakeTensorMode(), counter, torch.no_grad():
        picture = torch.empty(1, unet.channels, unet.resolution, unet.resolution)
        UNet(unet)(picture, torch.empty(1), None)
    return 3.0 * float(counter.get_total_flops())


def peak_flops(device: torch.device) -> float | None:
    """Operations a second that a device could do in 16-bit floats; None for one that is not listed."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in _PEAKS.items() if key in name), None)


def _attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: object, **__: object) -> int:
    """Operations of attention, from the shapes."""
    count: int = sdpa_flop_count(query, key, value)  # type: ignore[no-untyped-call]
    return count
