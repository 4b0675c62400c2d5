import dataclasses

import pytest
import torch

from diffusion_core.config import PRESETS, Inpainting, ModelConfig, SamplerConfig
from diffusion_core.inpainting import denoise_plan
from diffusion_core.noise import nearby, normal
from diffusion_core.samplers import model_grid
from diffusion_core.tasks import Request, prepare

pytestmark = pytest.mark.usefixtures("one_thread")

MODEL = ModelConfig(dataclasses.replace(PRESETS["tiny"], classes=2), class_names=("a", "b"))
PICTURE = torch.linspace(-1, 1, 3 * 8 * 8).view(3, 8, 8)
MASK = torch.zeros(1, 8, 8)
MASK[:, 2:5] = 1.0


def changed(base, **fields):
    return lambda: prepare(Request(**{**base, **fields}), MODEL)


GENERATE = {"seed": 1}
INPAINT = {"seed": 1, "task": "inpaint", "picture": PICTURE, "mask": MASK}
DENOISE = {"seed": 1, "task": "denoise", "picture": PICTURE, "noise_level": 0.3}
EDIT = {"seed": 1, "task": "image_to_image", "picture": PICTURE, "strength": 0.5}
VARY = {"seed": 1, "task": "vary", "parent": 2, "strength": 0.5}


@pytest.mark.parametrize(
    "base", [GENERATE, INPAINT, DENOISE, EDIT, VARY], ids=lambda base: base.get("task", "generate")
)
def test_every_task_has_a_job(base):
    job = prepare(Request(**base), MODEL)
    assert job.plan is not None
    assert job.origin.shape == (3, 8, 8)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (changed(GENERATE, task="paint"), "task: 'paint'; there are generate, inpaint, denoise, image_to_image, vary"),
        (changed(GENERATE, seed=-1), "seed: -1; need 0 to"),
        (changed(GENERATE, label=5), "label: 5"),
        (changed(GENERATE, guidance_scale=-2.0), "guidance: scale"),
        (changed(GENERATE, guidance_low=3.0, guidance_high=2.0), "guidance: low"),
        (changed(GENERATE, size=(8, 9)), "size: 8x9; need multiples of 2"),
        (changed(GENERATE, size=(0, 8)), "size: 0x8"),
        (changed(GENERATE, picture=PICTURE), "picture: given, but the task generate has no use for it"),
        (changed(GENERATE, strength=0.5), "strength: given, but the task generate"),
        (changed(GENERATE, mask=MASK), "mask: given"),
        (changed(GENERATE, noise_level=0.1), "noise_level: given"),
        (changed(GENERATE, parent=3), "parent: given"),
        (changed(INPAINT, picture=None), "picture: missing; the task inpaint needs it"),
        (changed(INPAINT, mask=None), "mask: missing"),
        (changed(INPAINT, size=(8, 8)), "size: given"),
        (
            changed(INPAINT, mask=torch.ones(1, 4, 8)),
            r"mask: torch.float32 \[1, 4, 8\]; need a floating type, \[1, 8, 8\]",
        ),
        (changed(INPAINT, mask=torch.ones(8, 8)), r"mask: torch.float32 \[8, 8\]"),
        (changed(INPAINT, mask=torch.ones(1, 8, 8, dtype=torch.bool)), "mask: torch.bool"),
        (changed(INPAINT, mask=torch.zeros(1, 8, 8)), "mask: all of it is 0, so there is nothing to repaint"),
        (changed(INPAINT, mask=2 * MASK), "mask: values from 0 to 2; need 0 to 1"),
        (changed(INPAINT, mask=MASK * torch.nan), "mask: .* NaN"),
        (changed(INPAINT, picture=PICTURE * 2), "picture: values from -2 to 2; need -1 to 1"),
        (changed(INPAINT, picture=PICTURE * torch.inf), "picture: .* NaN or infinite"),
        (changed(INPAINT, picture=PICTURE[:1]), r"picture: .*\[1, 1, 8, 8\]; need \[B, 3"),
        (changed(INPAINT, picture=PICTURE[:, :7]), "picture: .*multiples of 2"),
        (changed(INPAINT, picture=(PICTURE * 127).to(torch.uint8)), "picture: torch.uint8"),
        (changed(DENOISE, picture=None), "picture: missing"),
        (changed(DENOISE, noise_level=0.0), "noise_level: 0.0; need more than 0.002 and at most 80.0"),
        (changed(DENOISE, noise_level=81.0), "noise_level: 81.0"),
        (changed(DENOISE, noise_level=float("nan")), "noise_level: nan"),
        (changed(DENOISE, picture=PICTURE * 4), "picture: values from -4 to 4; need -3.4 to 3.4"),
        (changed(DENOISE, picture=(PICTURE + 1) * 127.5, noise_level=None), "picture: values from 0 to 255"),
        (changed(EDIT, strength=None), "strength: missing; the task image_to_image needs it"),
        (changed(EDIT, strength=1.5), "strength: 1.5; need 0 to 1"),
        (changed(EDIT, strength=-0.1), "strength: -0.1; need 0 to 1"),
        (changed(EDIT, strength=float("nan")), "strength: nan"),
        (changed(VARY, strength=2.0), "strength: 2.0"),
        (changed(VARY, parent=None), "parent: missing; the task vary needs it"),
        (changed(VARY, parent=-3), "parent: -3; need 0 to"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(make, told):
    with pytest.raises(ValueError, match=told):
        make()


def test_the_null_class_may_be_named_by_its_number():
    assert prepare(Request(1, label=2), MODEL).plan is not None


@pytest.mark.parametrize("fields", [{"method": "magic"}, {"solves": 0}, {"jump": 0}, {"times": 0}], ids=str)
def test_inpainting_that_does_not_exist_is_refused(fields):
    with pytest.raises(ValueError, match="inpainting: "):
        Inpainting(**fields)


def test_denoising_walks_from_the_level_given_or_estimated():
    config = SamplerConfig(steps=6)
    given = prepare(Request(**DENOISE, sampler=config), MODEL)
    assert torch.equal(given.plan.sigma, denoise_plan(config, model_grid(config, MODEL), 0.3).sigma)
    assert given.noise == 0.0, "the picture has its noise already"
    noise = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(0))
    smooth = torch.linspace(-0.7, 0.7, 32).expand(3, 32, 32)
    estimated = prepare(Request(1, "denoise", config, picture=smooth + 0.3 * noise), MODEL)
    assert float(estimated.plan.sigma[0]) == pytest.approx(0.3, rel=0.1)


def test_a_clean_picture_is_denoised_from_the_least_level_that_the_model_knows():
    job = prepare(Request(1, "denoise", picture=torch.zeros(3, 8, 8)), MODEL)
    assert MODEL.sigma_min < float(job.plan.sigma[0]) < 1.1 * MODEL.sigma_min


def test_strength_is_the_share_of_the_grid_that_is_walked():
    config = SamplerConfig("heun", steps=8, grid="karras")
    grid = model_grid(config, MODEL)
    for strength, rows in ((0.125, 1), (0.25, 2), (0.5, 4), (1.0, 8)):
        job = prepare(Request(1, "image_to_image", config, picture=PICTURE, strength=strength), MODEL)
        assert float(job.plan.sigma[0]) == pytest.approx(float(grid[8 - rows]), rel=1e-12)
        assert job.noise == float(job.plan.sigma[0])
        assert len(job.plan) == 2 * rows - 1, "heun makes two calls a step, one for the last"
    assert prepare(Request(1, "image_to_image", config, picture=PICTURE, strength=0.0), MODEL).plan is None


def test_a_mixture_of_two_draws_of_noise_is_normal_and_ends_at_both():
    seeds, others, shape = torch.tensor([1, 1, 1]), torch.tensor([2, 2, 2]), (3, 64, 64)
    mixed = nearby(seeds, others, torch.tensor([0.0, 0.5, 1.0]), "start", 0, shape)
    own, other = (normal(each[:1], "start", 0, shape, torch.float64)[0] for each in (seeds, others))
    assert torch.equal(mixed[0], own)
    assert torch.allclose(mixed[2], other, rtol=0, atol=1e-12)
    assert torch.allclose(mixed[1], (own + other) / 2**0.5, rtol=0, atol=1e-12)
    assert float(mixed[1].std()) == pytest.approx(1.0, abs=5 / (2 * mixed[1].numel()) ** 0.5)
