"""How much arithmetic a network asks for, and how much a device can do: what model FLOPs utilisation is made of."""

import functools

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

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
    with FakeTensorMode(), FlopCounterMode(display=False) as counter, torch.no_grad():
        picture = torch.empty(1, unet.channels, unet.resolution, unet.resolution)
        UNet(unet)(picture, torch.empty(1), None)
    return 3.0 * float(counter.get_total_flops())


def peak_flops(device: torch.device) -> float | None:
    """Operations a second that a device could do in 16-bit floats; None for one that is not listed."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in _PEAKS.items() if key in name), None)
