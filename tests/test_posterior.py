"""Posterior guidance against closed forms: two pixels, random fields of a known spectrum, mixtures of two modes."""

import dataclasses

import pytest
import torch

from diffusion_core.config import PRESETS, Inpainting, ModelConfig, SamplerConfig
from diffusion_core.engine import Engine
from diffusion_core.inpainting import KnownRegion, steered
from diffusion_core.noise import normal
from diffusion_core.samplers import make_plan, new_state, sample, start_noise, step
from diffusion_core.schedules import sigma_grid
from diffusion_core.tasks import Request

pytestmark = pytest.mark.usefixtures("one_thread")

SIDE = 16


def walk(denoiser, config, known, solves=2):
    """Posterior guidance written out: `denoiser(x, sigma)` by its own Jacobian, the known region written in last."""
    plan = make_plan(config, sigma_grid(config.grid, config.steps, 0.002, 80.0))
    shape = known.picture.shape[1:]
    state = new_state(start_noise(plan, known.seeds, shape, torch.float64), plan.memory)
    pull = torch.zeros_like(state.x)
    for row in range(len(plan)):
        sigma = plan.sigma[row].expand(len(state.x))
        at = state.x.detach().requires_grad_()
        denoised = denoiser(at, sigma)

        def product(vector, at=at, denoised=denoised):
            return torch.autograd.grad(denoised, at, vector, retain_graph=True)[0]

        steered_to, pull = steered(denoised.detach(), product, sigma, known, pull, solves)
        z = normal(known.seeds, "sampler", row, shape, torch.float64) if plan.s[row] != 0 else None
        state = step(state, plan.row(row), steered_to, z)
    return known(state.x, torch.zeros(len(state.x), dtype=torch.float64), 0)


def known_region(picture, mask, count):
    return KnownRegion(picture.expand(count, *picture.shape), mask.expand(count, *mask.shape), torch.arange(count))


RHO, SEEN = 0.8, 1.5
COVARIANCE = torch.tensor([[1.0, RHO], [RHO, 1.0]], dtype=torch.float64)


def two_pixels(x, sigma):
    gain = COVARIANCE @ torch.linalg.inv(COVARIANCE + sigma[0] ** 2 * torch.eye(2, dtype=torch.float64))
    return x @ gain.T


def squared_w2(values, mean, deviation):
    return float((values.mean() - mean) ** 2 + (values.std() - deviation) ** 2)


@pytest.mark.parametrize(
    ("config", "solves"),
    [(SamplerConfig("dpmpp_2m", 50, "karras"), 1), (SamplerConfig(steps=50), 2), (SamplerConfig(), 1)],
    ids=str,
)
def test_two_correlated_pixels_are_inpainted_with_the_exact_distribution(config, solves):
    count = 20000
    picture = torch.tensor([SEEN, 0.0], dtype=torch.float64).view(1, 1, 2)
    mask = torch.tensor([0.0, 1.0], dtype=torch.float64).view(1, 1, 2)
    x = walk(two_pixels, config, known_region(picture, mask, count), solves)
    assert (x[..., 0] == SEEN).all()
    # the truth is N(1.2, 0.36); exact samples would have 2.7e-5 by sampling alone
    assert squared_w2(x[..., 1], RHO * SEEN, (1 - RHO**2) ** 0.5) < 5e-4


def test_replacement_inpaints_them_with_another_one():
    count = 20000
    picture = torch.tensor([SEEN, 0.0], dtype=torch.float64).view(1, 1, 2)
    mask = torch.tensor([0.0, 1.0], dtype=torch.float64).view(1, 1, 2)
    known = known_region(picture, mask, count)
    plan = make_plan(SamplerConfig("ddpm"), sigma_grid("karras", 50, 0.002, 80.0))
    x = sample(two_pixels, plan, start_noise(plan, known.seeds, (1, 1, 2), torch.float64), known.seeds, known)
    assert squared_w2(x[..., 1], RHO * SEEN, (1 - RHO**2) ** 0.5) > 0.15


class Field:
    """Random fields on a torus whose power falls with frequency as that of photographs does; variance .25 a pixel."""

    config = ModelConfig(dataclasses.replace(PRESETS["tiny"], channels=1))

    def __init__(self, fall):
        frequency = torch.fft.fftfreq(SIDE, dtype=torch.float64) * SIDE
        power = (frequency[:, None] ** 2 + frequency**2 + 1) ** (-fall / 2)
        self.power = power / power.mean() * 0.25

    def __call__(self, x, sigma, label=None):
        gain = self.power / (self.power + (sigma**2)[:, None, None, None])
        return torch.fft.ifft2(torch.fft.fft2(x) * gain).real

    def picture(self, seed):
        noise = normal(torch.tensor([seed]), "start", 0, (1, SIDE, SIDE), torch.float64)[0]
        return torch.fft.ifft2(torch.fft.fft2(noise) * self.power.sqrt()).real

    def posterior(self, picture, mask):
        """Mean and variance of the unknown pixels, by the covariance matrix of all pixels."""
        row = torch.fft.ifft2(self.power).real
        place = torch.arange(SIDE * SIDE)
        y, x = place // SIDE, place % SIDE
        covariance = row[(y[:, None] - y) % SIDE, (x[:, None] - x) % SIDE]
        unknown = mask.flatten() == 1
        across, known = covariance[unknown][:, ~unknown], covariance[~unknown][:, ~unknown]
        gain = torch.linalg.solve(known, across.T).T
        return gain @ picture.flatten()[~unknown], (covariance[unknown][:, unknown] - gain @ across.T).diagonal()


def masks():
    box, half, strokes, lines = (torch.zeros(1, SIDE, SIDE, dtype=torch.float64) for _ in range(4))
    box[:, 4:12, 4:12] = 1
    half[:, :, 8:] = 1
    strokes[:, 3:5] = 1
    for row in range(SIDE):
        strokes[:, row, [(2 * row) % SIDE, (SIDE - row) % SIDE]] = 1
    lines[:, 1::2] = 1
    return {"box": box, "half": half, "strokes": strokes, "lines": lines}


@pytest.mark.parametrize("fall", [2.0, 3.0])
@pytest.mark.parametrize("mask", masks().values(), ids=masks().keys())
def test_a_random_field_is_inpainted_with_the_exact_mean_and_variance(fall, mask):
    count, field = 400, Field(fall)
    picture = field.picture(3)
    x = walk(field, SamplerConfig(), known_region(picture, mask, count))
    kept = (mask == 0).expand(count, 1, SIDE, SIDE)
    assert torch.equal(x[kept], picture.expand_as(x)[kept])
    mean, variance = field.posterior(picture, mask)
    found = x.flatten(1)[:, mask.flatten() == 1]
    error = float((found.mean(dim=0) - mean).norm() / mean.norm())
    sampling = float(variance.sum() / count) ** 0.5 / float(mean.norm())
    assert error < (0.1**2 + (1.3 * sampling) ** 2) ** 0.5
    assert float(found.var(dim=0).mean() / variance.mean()) == pytest.approx(1.0, abs=0.1)
    by_pixel = found.var(dim=0) / variance - 1
    assert float(by_pixel.square().mean()) ** 0.5 < (0.1**2 + 1.3 * 2 / count) ** 0.5


class Mixture:
    """Two modes of equal spread in two dimensions."""

    def __init__(self, means, shares, spread):
        self.means, self.shares = (torch.tensor(each, dtype=torch.float64) for each in (means, shares))
        self.spread = spread

    def __call__(self, x, sigma):
        variance = self.spread**2 + sigma[0] ** 2
        at = x.flatten(1)[:, None]
        weight = torch.softmax(self.shares.log() - ((at - self.means) ** 2).sum(-1) / (2 * variance), dim=1)
        means = (self.spread**2 * at + sigma[0] ** 2 * self.means) / variance
        return (weight[..., None] * means).sum(1).reshape(x.shape)

    def share_of_second(self, seen):
        likelihood = self.shares * torch.exp(-((seen - self.means[:, 0]) ** 2) / (2 * self.spread**2))
        return float(likelihood[1] / likelihood.sum())


@pytest.mark.parametrize(
    ("mixture", "seen", "tolerance"),
    [
        # what is seen tells nothing: three sampling errors
        (Mixture([[0.0, -1.0], [0.0, 1.0]], [0.3, 0.7], 0.2), 0.1, 3 * 0.21**0.5 / 8000**0.5),
        # what is seen decides
        (Mixture([[-1.0, -1.0], [1.0, 1.0]], [0.4, 0.6], 0.4), 1.0, 0.03),
        # what is seen fits both: guidance takes what is unknown for normal, which is not exact here
        (Mixture([[-0.5, -1.0], [0.5, 1.0]], [0.4, 0.6], 0.5), 0.1, 0.08),
    ],
)
def test_both_modes_of_a_mixture_come_in_the_right_proportion(mixture, seen, tolerance):
    count = 8000
    picture = torch.tensor([seen, 0.0], dtype=torch.float64).view(1, 1, 2)
    mask = torch.tensor([0.0, 1.0], dtype=torch.float64).view(1, 1, 2)
    x = walk(mixture, SamplerConfig(), known_region(picture, mask, count), solves=1)[..., 1].flatten()
    second = (x - 1).abs() < (x + 1).abs()
    assert float(second.double().mean()) == pytest.approx(mixture.share_of_second(seen), abs=tolerance)
    assert float((x[second] - 1).std()) == pytest.approx(mixture.spread, rel=0.15), "as wide as the mode"


def test_the_engine_steers_as_the_walk_written_out_does():
    field, mask = Field(2.0), masks()["strokes"]
    picture = field.picture(5).clamp(-1, 1)
    expected = walk(field, SamplerConfig(), known_region(picture, mask, 3))
    requests = [Request(seed, "inpaint", picture=picture, mask=mask) for seed in range(3)]
    made = Engine(field, (4,), dtype=torch.float64).run(requests)
    assert torch.allclose(torch.stack(made), expected, rtol=0, atol=1e-11)


def random_system(seed, symmetric):
    """A Jacobian [12, 12] of four places and three channels, that of a denoiser only where symmetric."""
    matrix = torch.randn(12, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return matrix @ matrix.T / 12 + 0.05 * torch.eye(12, dtype=torch.float64) if symmetric else matrix


def solved(matrix, solves, mask, pull=None):
    generator = torch.Generator().manual_seed(9)
    denoised, picture = (torch.randn(2, 3, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    known = KnownRegion(picture, mask.expand(2, 1, 2, 2), torch.arange(2))
    calls = []

    def product(vector):
        calls.append(vector)
        return (vector.flatten(1) @ matrix).view_as(vector)

    pull = torch.zeros_like(denoised) if pull is None else pull
    out, pull = steered(denoised, product, torch.tensor([2.0, 0.5], dtype=torch.float64), known, pull, solves)
    variance = torch.tensor([4.0, 0.25], dtype=torch.float64).view(2, 1, 1, 1)
    share = (known.mask < 1).double()
    reached = denoised + ((share * variance * pull).flatten(1) @ matrix).view_as(denoised)
    residual = (share * (picture - reached)).flatten(1).norm(dim=1)
    assert len(calls) == solves + 1
    return out, pull, residual, denoised, known


HALF = torch.tensor([[0.0, 1.0], [0.0, 1.0]], dtype=torch.float64).view(1, 1, 2, 2)
SOFT = torch.tensor([[0.0, 0.5], [0.25, 1.0]], dtype=torch.float64).view(1, 1, 2, 2)


@pytest.mark.parametrize("mask", [HALF, SOFT], ids=["hard", "soft"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_solving_on_never_moves_away_from_the_known_region(symmetric, mask):
    for seed in range(10):
        residuals = [solved(random_system(seed, symmetric), solves, mask)[2] for solves in range(1, 8)]
        start = solved(torch.zeros(12, 12, dtype=torch.float64), 1, mask)[2]
        for before, after in zip([start, *residuals], residuals, strict=False):
            assert (after <= before + 1e-9).all()
        if symmetric:
            unknowns = int((mask < 1).sum()) * 3
            assert (solved(random_system(seed, symmetric), unknowns, mask)[2] < 1e-6).all(), "solved"


def test_the_pull_of_the_row_before_is_a_start_that_needs_no_more():
    system = random_system(1, symmetric=True)
    _, pull, residual, _, _ = solved(system, 7, HALF)
    assert (residual < 1e-6).all()
    assert (solved(system, 1, HALF, pull)[2] < 1e-6).all()
    assert (solved(system, 1, HALF)[2] > 1e-2).all()


def test_with_nothing_known_the_picture_is_only_denoised():
    out, _, _, denoised, _ = solved(random_system(2, symmetric=True), 2, torch.ones(1, 1, 2, 2, dtype=torch.float64))
    assert torch.equal(out, denoised)


def test_a_pixel_that_is_partly_known_steers_as_a_known_one_and_is_mixed_at_the_end():
    picture = torch.tensor([SEEN, 0.0], dtype=torch.float64).view(1, 1, 2)
    hard, soft = (torch.tensor([share, 1.0], dtype=torch.float64).view(1, 1, 2) for share in (0.0, 0.5))
    known = walk(two_pixels, SamplerConfig(), known_region(picture, hard, 200))
    mixed = walk(two_pixels, SamplerConfig(), known_region(picture, soft, 200))
    assert torch.allclose(mixed[..., 1], known[..., 1], rtol=0, atol=1e-3)
    assert torch.allclose(mixed[..., 0], known[..., 0], rtol=0, atol=1e-3)


def test_default_inpainting_is_posterior_guidance():
    assert Inpainting().method == "posterior"
