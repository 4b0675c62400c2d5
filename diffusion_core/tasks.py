"""What may be asked of a model, and the job that answers it: a table of coefficients, a start and a constraint."""

import functools
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from diffusion_core import checks
from diffusion_core.config import Inpainting, ModelConfig, SamplerConfig, Task
from diffusion_core.denoiser import guidance
from diffusion_core.inpainting import denoise_plan, repaint_plan
from diffusion_core.noise_level import estimate_sigma
from diffusion_core.samplers import Plan, make_plan, model_grid, start_level
from diffusion_core.schedules import grid_from, level_at

# Requests of one key may share a batch: their size, and the products of posterior guidance that they need
Key = tuple[tuple[int, ...], int]
# What each task must be given, and what it may be given besides
_NEEDS: dict[Task, tuple[frozenset[str], frozenset[str]]] = {
    "generate": (frozenset(), frozenset({"size"})),
    "inpaint": (frozenset({"picture", "mask"}), frozenset()),
    "denoise": (frozenset({"picture"}), frozenset({"noise_level"})),
    "image_to_image": (frozenset({"picture", "strength"}), frozenset()),
    "vary": (frozenset({"parent", "strength"}), frozenset({"size"})),
}
_FIELDS = ("picture", "mask", "noise_level", "strength", "parent", "size")
# Noise of a known level leaves [-1, 1] by so many standard deviations less than once in 10^15 values
_FARTHEST = 8.0


@dataclass(frozen=True, eq=False)
class Request:
    """One picture to make. What a task has no use for must be left None.

    `picture` [C, H, W] in [-1, 1] is what to inpaint, denoise (there it may leave the range by its noise) or start
    from; `mask` [1, H, W] is 0 where it is kept, 1 where it is repainted, and may lie between. `noise_level` is the
    sigma of the noise to remove, estimated where it is None. `strength` in [0, 1] says how far to go from the picture
    (image_to_image) or from the picture of the seed `parent` (vary); at 0 they come back. `size` (H, W) is the model's
    resolution where it is None. `label` None is the null class; the four guidance fields are those of Guidance, which
    leads away from the class `negative`, or from the null class where that is None.
    """

    seed: int
    task: Task = "generate"
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    label: int | None = None
    negative: int | None = None
    guidance_scale: float = 1.0
    guidance_low: float = 0.0
    guidance_high: float = float("inf")
    guidance_rescale: float = 0.0
    picture: Tensor | None = None
    mask: Tensor | None = None
    inpainting: Inpainting = field(default_factory=Inpainting)
    noise_level: float | None = None
    strength: float | None = None
    parent: int | None = None
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        """Raise ValueError on an unknown task, and on fields that it lacks or has no use for."""
        if self.task not in _NEEDS:
            raise ValueError(f"task: {self.task!r}; there are {', '.join(_NEEDS)}")
        must, may = _NEEDS[self.task]
        for name in _FIELDS:
            given = getattr(self, name) is not None
            if name in must and not given:
                raise ValueError(f"{name}: missing; the task {self.task} needs it")
            if given and name not in must | may:
                raise ValueError(f"{name}: given, but the task {self.task} has no use for it; leave it out")

    @property
    def solves(self) -> int:
        """Iterations of posterior guidance a row; 0 without."""
        return self.inpainting.solves if self.task == "inpaint" and self.inpainting.method == "posterior" else 0

    @property
    def is_guided(self) -> bool:
        """Whether rows within the guidance interval need two passes."""
        return self.label != self.negative and self.guidance_scale != 1

    @property
    def width(self) -> int:
        """Network inputs of a row, at most."""
        return 2 if self.is_guided else 1


@dataclass(frozen=True, eq=False)
class Job:
    """A request made ready: `plan` (None: `origin` is the answer) from origin [C, H, W] + `noise`·start noise."""

    request: Request
    plan: Plan | None
    origin: Tensor
    noise: float


def key_of(request: Request, model: ModelConfig) -> Key:
    """What requests must have in common to share a batch."""
    if request.picture is not None:
        return tuple(request.picture.shape), request.solves
    return (model.unet.channels, *_size(request, model)), request.solves


def prepare(
    request: Request, model: ModelConfig, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Job:
    """The job of a request, its pictures in `dtype` on `device`.

    Raises ValueError, by the field's name, on what this model cannot do.
    """
    _check_settings(request, model)
    _check_pictures(request, model)
    level = request.strength if request.task == "image_to_image" else None
    if request.task == "denoise":
        level = _noise_level(request, model)
    picture, mask = (each if each is None else each.to(device, dtype) for each in (request.picture, request.mask))
    request = replace(request, picture=picture, mask=mask)
    origin = _origin(request, model).to(device, dtype)
    if request.task == "image_to_image" and level == 0:
        return Job(request, None, origin, 0.0)
    plan = _plan(request.sampler, model, request.task, request.inpainting, level)
    if request.task in ("denoise", "image_to_image"):
        return Job(request, plan, origin, 0.0 if request.task == "denoise" else float(plan.sigma[0]))
    return Job(request, plan, origin, start_level(plan, model))


@functools.lru_cache(maxsize=256)
def _plan(sampler: SamplerConfig, model: ModelConfig, task: Task, inpainting: Inpainting, level: float | None) -> Plan:
    """The table; `level` is the noise level to denoise from, or the strength of image_to_image."""
    sigmas = model_grid(sampler, model)
    if task == "inpaint":
        return repaint_plan(sampler, sigmas, inpainting)
    if level is None:
        return make_plan(sampler, sigmas)
    if task == "denoise":
        return denoise_plan(sampler, sigmas, level)
    steps = len(sigmas) - 1
    start = float(level_at(sigmas, torch.tensor([(1 - level) * steps], dtype=torch.float64)))
    return make_plan(sampler, grid_from(sigmas, start, max(1, round(level * steps))))


def _noise_level(request: Request, model: ModelConfig) -> float:
    """The noise level given or, within what the model knows, estimated. Raises ValueError on values far beyond it."""
    assert request.picture is not None
    level = request.noise_level
    if level is None:
        estimated = float(estimate_sigma(request.picture[None])[0])
        level = min(max(estimated, 1.001 * model.sigma_min), model.sigma_max)
    checks.within("picture", request.picture, -1 - _FARTHEST * level, 1 + _FARTHEST * level)
    return level


def _origin(request: Request, model: ModelConfig) -> Tensor:
    """The picture that the start noise is added to; zeros where there is none."""
    if request.picture is None:
        return torch.zeros(model.unet.channels, *_size(request, model))
    return torch.zeros_like(request.picture) if request.task == "inpaint" else request.picture


def _size(request: Request, model: ModelConfig) -> tuple[int, int]:
    """Height and width of a picture that starts from noise alone."""
    return request.size or (model.unet.resolution, model.unet.resolution)


def _check_pictures(request: Request, model: ModelConfig) -> None:
    """Refuse sizes, pictures and masks of a wrong shape or range."""
    multiple = 2 ** (len(model.unet.widths) - 1)
    if request.picture is None:
        height, width = _size(request, model)
        if min(height, width) < 1 or height % multiple or width % multiple:
            raise ValueError(f"size: {height}x{width}; need multiples of {multiple}")
        return
    checks.picture_batch("picture", request.picture[None], model.unet.channels, multiple)
    checks.finite("picture", request.picture)
    if request.task != "denoise":
        checks.within("picture", request.picture, -1.0, 1.0)
    if request.mask is not None:
        _check_mask(request.mask, (1, *request.picture.shape[1:]))


def _check_mask(mask: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse a mask of another shape, outside [0, 1], or with nothing to repaint."""
    if mask.shape != shape or not mask.is_floating_point():
        raise ValueError(
            f"mask: {mask.dtype} {list(mask.shape)}; need a floating type, {list(shape)} as the picture has"
        )
    checks.within("mask", mask, 0.0, 1.0)
    if not mask.any():
        raise ValueError("mask: all of it is 0, so there is nothing to repaint; 1 marks what to repaint")


def _check_settings(request: Request, model: ModelConfig) -> None:
    """Refuse seeds, labels and numbers out of range."""
    for name, seed in (("seed", request.seed), ("parent", request.parent)):
        if seed is not None and not 0 <= seed < 2**62:
            raise ValueError(f"{name}: {seed}; need 0 to 2^62 - 1")
    if request.strength is not None and not 0.0 <= request.strength <= 1.0:
        raise ValueError(f"strength: {request.strength}; need 0 to 1")
    level = request.noise_level
    if level is not None and not model.sigma_min < level <= model.sigma_max:
        raise ValueError(f"noise_level: {level}; need more than {model.sigma_min} and at most {model.sigma_max}")
    for name, label in (("label", request.label), ("negative", request.negative)):
        checks.classes(name, None if label is None else torch.tensor([label]), model.unet.classes)
    scale = torch.tensor([request.guidance_scale], dtype=torch.float64)
    guidance(scale, request.guidance_low, request.guidance_high, request.guidance_rescale)
