"""What a model and a sampler are, as plain frozen data. Imports no torch, so that command lines start at once."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

Prediction = Literal["eps", "x0", "v", "edm", "flow"]
Weighting = Literal["unit", "min_snr", "soft_min_snr", "edm"]
ScheduleName = Literal["linear", "cosine", "edm", "flow"]
BetaName = Literal["linear", "scaled_linear", "cosine"]
GridName = Literal["arctan", "karras", "log_snr", "uniform_t", "timesteps", "leading", "trailing"]
SamplerName = Literal[
    "ddim", "ddpm", "euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_2m_sde", "ipndm_4",
    "exponential_3", "exponential_4", "angular_3",
]  # fmt: skip
Task = Literal["generate", "inpaint", "denoise", "image_to_image", "vary"]
InpaintingName = Literal["posterior", "replacement"]
Strategy = Literal["ddp", "fsdp", "hsdp"]
Precision = Literal["float32", "bfloat16"]
Decay = Literal["cosine", "constant"]


@dataclass(frozen=True)
class UNetConfig:
    """Shape of a U-Net: `widths` channels and `blocks` residual blocks at each level, halving the picture between.

    `attention` lists the levels (0 is full resolution) with self-attention of heads `head_channels` wide (0: one
    head); the bottleneck has it too unless `middle_attention` is off. `classes` is 0 for an unconditional network;
    the network adds a null class. The fields below `classes` are there for networks trained elsewhere: embedding of
    timesteps instead of ln(sigma), shift without scale, no norm before the bottleneck's attention, padding of strided
    convolutions at one end.
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
    scale_shift: bool = True
    middle_attention: bool = True
    middle_norm: bool = True
    embedding: Literal["log_sigma", "timestep"] = "log_sigma"
    sine_first: bool = False
    frequency_shift: float = 0.0
    downsample_padding: Literal["both", "end"] = "both"
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        """Raise ValueError where no network of this shape exists."""
        for name in ("resolution", "channels", "blocks", "groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}; need at least 1")
        if self.classes < 0 or self.head_channels < 0:
            raise ValueError(f"classes, head_channels: {self.classes}, {self.head_channels}; need at least 0")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout: {self.dropout}; need at least 0 and less than 1")
        halvings = len(self.widths) - 1
        if not self.widths or self.resolution % 2**halvings:
            raise ValueError(
                f"resolution: {self.resolution} cannot be halved {halvings} times for widths {self.widths}; "
                f"give a multiple of {2**halvings}, or fewer widths"
            )
        for width in self.widths:
            if width < 2 or width % 2 or width % self.groups:
                raise ValueError(f"widths: {width}; need even multiples of groups={self.groups}")
        self._check_attention(halvings)

    def _check_attention(self, halvings: int) -> None:
        """Raise ValueError where a level does not exist or does not divide into heads."""
        for level in {*self.attention, *([halvings] if self.middle_attention else [])}:
            if not 0 <= level <= halvings:
                raise ValueError(f"attention: level {level} does not exist; widths has levels 0 to {halvings}")
            if self.head_channels and self.widths[level] % self.head_channels:
                raise ValueError(f"head_channels: {self.head_channels} does not divide width {self.widths[level]}")


# Parameters: 0.2 M, 1.0 M, 5.9 M, 38 M (the shape of Ho et al. 2020), 45 M, 276 M (the shape of Dhariwal & Nichol
# 2021 for 64x64), 283 M. `resolution` is what each was sized for; any multiple of 2^(levels - 1) will do.
PRESETS: dict[str, UNetConfig] = {
    "tiny": UNetConfig(resolution=8, widths=(16, 32), attention=(1,), head_channels=32, groups=8),
    "cpu-small": UNetConfig(),
    "small": UNetConfig(widths=(64, 96, 128), blocks=2, attention=(2,), head_channels=64, groups=32),
    "ddpm-32": UNetConfig(widths=(128, 256, 256, 256), blocks=2, attention=(1,), head_channels=64, groups=32),
    "medium-64": UNetConfig(resolution=64, widths=(128, 256, 384), blocks=2, attention=(1, 2), groups=32),
    "adm-64": UNetConfig(resolution=64, widths=(192, 384, 576, 768), blocks=3, attention=(1, 2, 3), groups=32),
    "adm-256": UNetConfig(
        resolution=256, widths=(128, 256, 256, 512, 768, 768), blocks=2, attention=(3, 4, 5), groups=32
    ),
}


@dataclass(frozen=True)
class Timesteps:
    """A discrete model's own noise levels: `count` betas from `first` to `last` (Ho et al. 2020), t = 0 … count - 1.

    "scaled_linear" is linear in the root of beta; "cosine" (Nichol & Dhariwal 2021) has no first and last.
    """

    betas: BetaName = "linear"
    count: int = 1000
    first: float = 1e-4
    last: float = 0.02

    def __post_init__(self) -> None:
        """Raise ValueError where the betas are no probabilities."""
        if self.count < 2 or not 0 < self.first <= self.last < 1:
            raise ValueError(
                f"timesteps: count {self.count}, first {self.first}, last {self.last}; "
                "need a count of at least 2 and 0 < first <= last < 1"
            )


@dataclass(frozen=True)
class ModelConfig:
    """A published model: its network, what the network predicts, and the data it was trained on.

    `sigma_data` is the standard deviation of the training pictures in [-1, 1]; `class_names[i]` names label i.
    `schedule` says what "uniform in t" means for it. With `timesteps`, the network is told its own timestep t(sigma)
    instead of ln(sigma)/4.
    """

    unet: UNetConfig
    prediction: Prediction = "edm"
    sigma_data: float = 0.5
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    class_names: tuple[str, ...] = ()
    schedule: ScheduleName = "edm"
    timesteps: Timesteps | None = None

    def __post_init__(self) -> None:
        """Raise ValueError where classes and names disagree or the noise range is empty."""
        if len(self.class_names) != self.unet.classes:
            raise ValueError(f"class_names: {len(self.class_names)} names for {self.unet.classes} classes")
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(f"sigma_min, sigma_max: {self.sigma_min}, {self.sigma_max}; need 0 < min < max")
        if not 0 < self.sigma_data < math.inf:
            raise ValueError(f"sigma_data: {self.sigma_data}; need more than 0")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` is the inverse."""
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "ModelConfig":
        """Inverse of `to_dict`. Raises TypeError on an unknown or missing key, ValueError on a bad value."""
        flat = {key: _tupled(value) for key, value in values.items() if key not in ("unet", "timesteps")}
        unet = UNetConfig(**{key: _tupled(value) for key, value in values["unet"].items()})
        timesteps = values.get("timesteps")
        return ModelConfig(unet=unet, timesteps=Timesteps(**timesteps) if timesteps else None, **flat)


@dataclass(frozen=True)
class SamplerConfig:
    """How to walk from noise to a picture: the sampler, its number of `steps` and the sigma grid.

    A step is one denoiser call, with heun two. `eta` scales the fresh noise of "ddim" (0 to 1) and "dpmpp_2m_sde",
    and is ignored by names that fix it. `churn` (S_churn of Karras et al. 2022) lets heun raise the noise between
    `churn_low` and `churn_high`, by noise of standard deviation `churn_noise`. `lower_final` takes the last row
    of dpmpp_2m and dpmpp_2m_sde at first order where the grid does not end at 0.
    """

    sampler: SamplerName = "angular_3"
    steps: int = 18
    grid: GridName = "arctan"
    eta: float = 0.0
    churn: float = 0.0
    churn_low: float = 0.0
    churn_high: float = math.inf
    churn_noise: float = 1.0
    lower_final: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError where no table of coefficients exists."""
        for name, value, known in (("sampler", self.sampler, SamplerName), ("grid", self.grid, GridName)):
            if value not in get_args(known):
                raise ValueError(f"{name}: {value!r}; there are {', '.join(get_args(known))}")
        if self.steps < 1:
            raise ValueError(f"steps: {self.steps}; need at least 1")
        if not 0.0 <= self.eta <= 1.0:
            raise ValueError(f"eta: {self.eta}; need 0 to 1")
        if not (0.0 <= self.churn < math.inf and 0.0 <= self.churn_noise < math.inf):
            raise ValueError(f"churn, churn_noise: {self.churn}, {self.churn_noise}; need at least 0")
        if not 0.0 <= self.churn_low <= self.churn_high:
            raise ValueError(
                f"churn_low, churn_high: {self.churn_low}, {self.churn_high}; need 0 <= churn_low <= churn_high"
            )


@dataclass(frozen=True)
class Inpainting:
    """How the unknown part of a picture is made to fit the known one.

    "posterior" steers every denoised picture towards the known region by the denoiser's own Jacobian, in `solves`
    iterations a row; "replacement" only writes the known region, noised, into the state after each row. With `times`
    above 1 every `jump` rows are walked so often (RePaint, Lugmayr et al. 2022), which helps both.
    """

    method: InpaintingName = "posterior"
    solves: int = 2
    jump: int = 5
    times: int = 1

    def __post_init__(self) -> None:
        """Raise ValueError where there is no such method or nothing to walk."""
        if self.method not in get_args(InpaintingName):
            raise ValueError(f"inpainting: {self.method!r}; there are {', '.join(get_args(InpaintingName))}")
        if self.solves < 1 or self.jump < 1 or self.times < 1:
            raise ValueError(
                f"inpainting: solves {self.solves}, jump {self.jump}, times {self.times}; need at least 1 each"
            )


def _tupled(value: Any) -> Any:
    """JSON knows lists alone."""
    return tuple(value) if isinstance(value, list) else value
