import pytest
import torch
from torch import nn

from diffusion_core.config import ModelConfig, UNetConfig
from diffusion_core.denoiser import Denoiser
from diffusion_core.losses import per_sample_loss

SIGMA = torch.tensor([0.02, 0.5, 3.0, 40.0], dtype=torch.float64)
S = SIGMA[:, None, None, None]
X0 = torch.randn(4, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
EPS = torch.randn(4, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
SIGMA_DATA = 0.6

# In variance-preserving coordinates alpha·x0 + s·eps with alpha² + s² = 1, what each paper teaches its network.
ALPHA = torch.cos(torch.atan(S))
TARGETS = {"eps": EPS, "x0": X0, "v": ALPHA * EPS - torch.sin(torch.atan(S)) * X0, "flow": EPS - X0}

# What the same losses weigh ||D - x0||² with (Kingma & Gao 2023, table 1; Karras et al. 2022, section 5).
WEIGHTS = {
    "eps": SIGMA**-2,
    "x0": torch.ones_like(SIGMA),
    "v": 1 + SIGMA**-2,
    "flow": (1 + 1 / SIGMA) ** 2,
    "edm": (SIGMA**2 + SIGMA_DATA**2) / (SIGMA * SIGMA_DATA) ** 2,
}


class Bends(nn.Module):
    """A network that answers with a bent copy of its input."""

    def forward(self, x, c_noise, label):
        return torch.tanh(x) + c_noise[:, None, None, None]


def denoiser(prediction):
    return Denoiser(Bends(), ModelConfig(UNetConfig(), prediction, SIGMA_DATA))


@pytest.mark.parametrize("prediction", TARGETS)
def test_the_loss_is_the_mean_square_distance_to_the_classic_target(prediction):
    model = denoiser(prediction)
    loss = per_sample_loss(model, X0, SIGMA, EPS, None)
    scale = 1 / (1 + S) if prediction == "flow" else ALPHA
    answer = torch.tanh(scale * (X0 + S * EPS)) + S.log() / 4
    expected = ((answer - TARGETS[prediction]) ** 2).mean(dim=(1, 2, 3))
    assert torch.allclose(loss, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("prediction", WEIGHTS)
def test_the_loss_weighs_the_error_of_the_picture_as_published(prediction):
    model = denoiser(prediction)
    error = (model(X0 + S * EPS, SIGMA, None) - X0).square().mean(dim=(1, 2, 3))
    loss = per_sample_loss(model, X0, SIGMA, EPS, None)
    assert torch.allclose(loss, WEIGHTS[prediction] * error, rtol=1e-9, atol=0)


def test_a_picture_changes_its_own_loss_alone():
    model, other = denoiser("edm"), X0.clone()
    other[2] += 1.0
    before, after = (per_sample_loss(model, x0, SIGMA, EPS, None) for x0 in (X0, other))
    assert (before != after).tolist() == [False, False, True, False]


GAMMA, SNR = 5.0, SIGMA**-2
# Hang et al. 2023, eq. 8 to 10: what the loss of each prediction is weighed with
MIN_SNR = {
    "eps": SNR.clamp(max=GAMMA) / SNR,
    "x0": SNR.clamp(max=GAMMA),
    "v": SNR.clamp(max=GAMMA) / (SNR + 1),
}


@pytest.mark.parametrize("prediction", MIN_SNR)
def test_min_snr_weighs_every_prediction_as_published(prediction):
    model = denoiser(prediction)
    plain, weighed = (per_sample_loss(model, X0, SIGMA, EPS, None, w, GAMMA) for w in ("unit", "min_snr"))
    assert torch.allclose(weighed / plain, MIN_SNR[prediction], rtol=1e-9, atol=0)


@pytest.mark.parametrize("prediction", WEIGHTS)
def test_soft_min_snr_and_edm_weigh_the_error_of_the_picture_alike_for_every_prediction(prediction):
    model = denoiser(prediction)
    error = (model(X0 + S * EPS, SIGMA, None) - X0).square().mean(dim=(1, 2, 3))
    soft = per_sample_loss(model, X0, SIGMA, EPS, None, "soft_min_snr", 4.0)
    assert torch.allclose(soft, 4 * SNR / (SNR + 4) * error, rtol=1e-9, atol=0)
    edm = per_sample_loss(model, X0, SIGMA, EPS, None, "edm")
    assert torch.allclose(edm, WEIGHTS["edm"] * error, rtol=1e-9, atol=0)


class Line(nn.Module):
    """The best linear answer: slope·x, with a slope for every noise level."""

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.zeros(4, dtype=torch.float64))

    def forward(self, x, c_noise, label):
        return self.slope[:, None, None, None] * x


@pytest.mark.parametrize("prediction", TARGETS | {"edm": None})
def test_the_minimiser_for_gaussian_pictures_is_the_exact_denoiser(prediction):
    generator = torch.Generator().manual_seed(4)
    count = 200_000
    x0 = SIGMA_DATA * torch.randn(4, 1, 1, count, dtype=torch.float64, generator=generator)
    eps = torch.randn(4, 1, 1, count, dtype=torch.float64, generator=generator)
    sigma = torch.tensor([0.1, 0.5, 2.0, 5.0], dtype=torch.float64)
    line = Line()
    model = Denoiser(line, ModelConfig(UNetConfig(channels=1), prediction, SIGMA_DATA))

    def slope_of_loss(at):
        line.slope.data.fill_(at)
        return torch.autograd.grad(per_sample_loss(model, x0, sigma, eps, None).sum(), line.slope)[0]

    # The loss is a parabola of the slope, so two of its derivatives tell where it is least.
    at_zero, at_one = slope_of_loss(0.0), slope_of_loss(1.0)
    line.slope.data = at_zero / (at_zero - at_one)
    x = torch.ones(4, 1, 1, 1, dtype=torch.float64)
    exact = SIGMA_DATA**2 / (SIGMA_DATA**2 + sigma**2)
    # standard error of a slope on x from 200,000 draws of the posterior
    error = (exact * sigma**2).sqrt() / ((SIGMA_DATA**2 + sigma**2).sqrt() * count**0.5)
    assert ((model(x, sigma, None).flatten() - exact).abs() < 4 * error).all()
