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
