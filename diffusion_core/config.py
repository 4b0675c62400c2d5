"""What a model and a sampler are, as plain frozen data. Imports no torch, so that command lines start at once."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

Prediction = Literal["eps", "x0", "v", "edm", "flow"]
SamplerName = Literal["ddim", "ddpm", "euler", "euler_ancestral", "dpmpp_2m"]
GridName = Literal["karras", "log_snr"]


@dataclass(frozen=True)
class UNetConfig:
    """Shape of a U-Net: `widths` channels and `blocks` residual blocks at each level, halving the picture between.

    `attention` lists the levels (0 is full resolution) with self-attention of heads `head_channels` wide;
    the bottleneck always has it. `classes` is 0 for an unconditional network; a null class is added by the network.
    """

    resolution: int = 32
    channels: int = 3
    widths: tuple[int, ...] = (32, 48, 64)
    blocks: int = 1
    attention: tuple[int, ...] = (2,)
    head_channels: int = 64
    groups: int = 16
    dropout: float = 0.0
    classes: int = 0

    def __post_init__(self) -> None:
        """Raise ValueError where no network of this shape exists."""
        halvings = len(self.widths) - 1
        if not self.widths or self.resolution % 2**halvings:
            raise ValueError(
                f"resolution: {self.resolution} cannot be halved {halvings} times for widths {self.widths}; "
                f"give a multiple of {2**halvings}, or fewer widths"
            )
        for width in self.widths:
            if width % self.groups:
                raise ValueError(f"widths: {width} is not a multiple of groups={self.groups}")
        for level in {*self.attention, halvings}:
            if not 0 <= level <= halvings:
                raise ValueError(f"attention: level {level} does not exist; widths has levels 0 to {halvings}")
            if self.widths[level] % self.head_channels:
                raise ValueError(f"head_channels: {self.head_channels} does not divide width {self.widths[level]}")


PRESETS: dict[str, UNetConfig] = {
    "tiny": UNetConfig(resolution=8, widths=(16, 32), attention=(1,), head_channels=32, groups=8),
    "cpu-small": UNetConfig(),
    "small": UNetConfig(widths=(64, 128, 192), blocks=2, attention=(1, 2), head_channels=64, groups=32),
}


@dataclass(frozen=True)
class ModelConfig:
    """A published model: its network, what the network predicts, and the data it was trained on.

    `sigma_data` is the standard deviation of the training pictures in [-1, 1]; `class_names[i]` names label i.
    """

    unet: UNetConfig
    prediction: Prediction = "edm"
    sigma_data: float = 0.5
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raise ValueError where classes and names disagree or the noise range is empty."""
        if len(self.class_names) != self.unet.classes:
            raise ValueError(f"class_names: {len(self.class_names)} names for {self.unet.classes} classes")
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(f"sigma_min, sigma_max: {self.sigma_min}, {self.sigma_max}; need 0 < min < max")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` is the inverse."""
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "ModelConfig":
        """Inverse of `to_dict`. Raises TypeError on an unknown or missing key, ValueError on a bad value."""
        unet: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values["unet"].items()}
        rest: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k != "unet"}
        return ModelConfig(unet=UNetConfig(**unet), **rest)


@dataclass(frozen=True)
class SamplerConfig:
    """How to walk from noise to a picture: the sampler, its number of `steps` and the sigma grid.

    `eta` scales the fresh noise of the ancestral family (0 is DDIM, 1 is DDPM) and is ignored by names that fix it.
    """

    sampler: SamplerName = "dpmpp_2m"
    steps: int = 20
    grid: GridName = "karras"
    eta: float = 0.0

    def __post_init__(self) -> None:
        """Raise ValueError where no table of coefficients exists."""
        if self.steps < 1:
            raise ValueError(f"steps: {self.steps}; need at least 1")
        if not 0.0 <= self.eta <= 1.0:
            raise ValueError(f"eta: {self.eta}; need 0 to 1")
