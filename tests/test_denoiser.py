import pytest
import torch
from torch import nn

from diffusion_core.config import ModelConfig, Timesteps, UNetConfig
from diffusion_core.denoiser import Denoiser, Guidance, guidance, guided
from diffusion_core.losses import per_sample_loss
from diffusion_core.schedules import timestep_sigmas
from diffusion_core.unet import UNet

UNET = UNetConfig(resolution=8, widths=(16, 32), attention=(1,), head_channels=32, groups=8, classes=3)
SIGMA = torch.tensor([0.01, 0.3, 2.0, 50.0], dtype=torch.float64)
X0 = torch.randn(4, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
EPS = torch.randn(4, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
S = SIGMA[:, None, None, None]
X = X0 + S * EPS
ALPHA = 1 / (1 + S**2).sqrt()
# What each kind of network is taught in its own paper.
CLASSIC = {
    "eps": EPS,
    "x0": X0,
    "v": ALPHA * EPS - (S * ALPHA) * X0,
    "flow": EPS - X0,
    "edm": (X0 - 0.25 / (S**2 + 0.25) * X) * (S**2 + 0.25).sqrt() / (0.5 * S),
}


class Says(nn.Module):
    """A network that always gives the same answer and remembers what it was asked."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.asked = answer, []

    def forward(self, x, c_noise, label):
        self.asked.append((x, c_noise, label))
        return self.answer if self.answer is not None else label.to(x.dtype)[:, None, None, None].expand_as(x)


def denoiser(prediction, answer):
    return Denoiser(Says(answer), ModelConfig(UNET, prediction, 0.5, class_names=("a", "b", "c")))


@pytest.mark.parametrize("prediction", CLASSIC)
def test_a_network_that_learnt_its_classic_target_gives_the_picture(prediction):
    exact = denoiser(prediction, CLASSIC[prediction])
    assert torch.allclose(exact(X, SIGMA, None), X0, rtol=0, atol=1e-12)


@pytest.mark.parametrize("prediction", CLASSIC)
def test_the_loss_is_the_distance_to_the_classic_target(prediction):
    answer = torch.full_like(X0, 0.3)
    loss = per_sample_loss(denoiser(prediction, answer), X0, SIGMA, EPS, None)
    expected = (answer - CLASSIC[prediction]).square().mean(dim=(1, 2, 3))
    assert torch.allclose(loss, expected, rtol=1e-9, atol=0)


def test_what_the_network_sees_has_unit_scale():
    network = denoiser("edm", X0)
    network(X, SIGMA, None)
    seen, c_noise, _ = network.network.asked[0]
    assert torch.allclose(seen, X / (S**2 + 0.25).sqrt())
    assert torch.allclose(c_noise, SIGMA.log() / 4)


def test_guidance_is_linear_between_and_beyond_the_two_passes():
    labels = torch.tensor([0, 1, 2, 0])
    network = denoiser("x0", None)  # answers with the label; the null label is 3
    for scale in (0.0, 1.5, 4.0):
        told = guided(network, X, SIGMA, labels, guidance(torch.full((4,), scale)))
        expected = 3 + scale * (labels - 3)
        assert torch.allclose(told, expected.to(X.dtype)[:, None, None, None].expand_as(X))


def test_the_second_pass_is_made_for_those_alone_whom_it_changes():
    network = denoiser("x0", None)
    labels = torch.tensor([0, 1, 2, 0])
    guided(network, X, SIGMA, labels, guidance(torch.ones(4)))
    guided(network, X, SIGMA, labels, guidance(torch.tensor([1.0, 1.0, 1.0, 2.0])))
    guided(network, X, SIGMA, labels, guidance(torch.full((4,), 2.0), low=0.3, high=2.0))
    assert [len(asked[0]) for asked in network.network.asked] == [4, 5, 5]
    assert network.network.asked[2][2].tolist() == [0, 1, 2, 0, 3], "sigma 2.0 alone is in (0.3, 2.0]"


def test_guidance_works_within_its_interval_sample_by_sample():
    network, labels = denoiser("x0", None), torch.tensor([0, 1, 2, 0])
    low, high = torch.tensor([0.0, 0.5, 0.0, 1.0]), torch.tensor([0.005, 1.0, 3.0, 100.0])
    how = Guidance(torch.full((4,), 2.0), low, high, torch.zeros(4))
    told = guided(network, X, SIGMA, labels, how)[:, 0, 0, 0]
    assert told.tolist() == [0.0, 1.0, 2 * 2 - 3, 2 * 0 - 3]


def test_rescaled_guidance_has_the_contrast_of_the_conditional_picture():
    torch.manual_seed(0)
    network = UNet(UNET).double()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.05)
    model = Denoiser(network, ModelConfig(UNET, "x0", class_names=("a", "b", "c")))
    x, labels = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    scale = torch.full((4,), 5.0, dtype=torch.float64)
    plain, half, full = (guided(model, x, SIGMA, labels, guidance(scale, rescale=r)) for r in (0.0, 0.5, 1.0))
    aim = model(x, SIGMA, labels).flatten(1).std(dim=1)
    assert torch.allclose(full.flatten(1).std(dim=1), aim, rtol=1e-9)
    assert torch.allclose(full, plain * (aim / plain.flatten(1).std(dim=1))[:, None, None, None], rtol=1e-9)
    assert torch.allclose(half, (plain + full) / 2, rtol=1e-9)


@pytest.mark.parametrize(
    "values", [{"scale": -1.0}, {"scale": float("nan")}, {"low": 2.0, "high": 1.0}, {"rescale": 1.5}]
)
def test_guidance_out_of_range_is_refused_by_its_name(values):
    with pytest.raises(ValueError, match=f"guidance: {next(iter(values))}"):
        guidance(torch.full((2,), values.pop("scale", 1.0)), **values)


def test_a_discrete_model_is_told_its_own_timestep():
    network = Denoiser(Says(X0), ModelConfig(UNET, "eps", 0.5, class_names=("a", "b", "c"), timesteps=Timesteps()))
    levels = timestep_sigmas(Timesteps())
    network(X, levels[[0, 10, 500, 999]], None)
    assert network.network.asked[0][1].tolist() == pytest.approx([0, 10, 500, 999], abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"class_names": ("a",)}, "class_names: 1 names for 3 classes"),
        ({"class_names": ("a", "b", "c"), "sigma_min": 3.0, "sigma_max": 2.0}, "sigma_min, sigma_max: 3.0, 2.0"),
    ],
)
def test_a_model_that_contradicts_itself_is_refused(settings, told):
    with pytest.raises(ValueError, match=told):
        ModelConfig(UNET, **settings)


def test_a_configuration_survives_json():
    import json

    model = ModelConfig(UNET, "v", 0.4, class_names=("a", "b", "c"), schedule="cosine", timesteps=Timesteps("cosine"))
    assert ModelConfig.from_dict(json.loads(json.dumps(model.to_dict()))) == model
    with pytest.raises(TypeError, match="colour"):
        ModelConfig.from_dict({**model.to_dict(), "colour": 1})


def test_guidance_one_is_no_guidance_and_zero_is_no_label():
    torch.manual_seed(0)
    network = UNet(UNET).double()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.05)
    model = Denoiser(network, ModelConfig(UNET, class_names=("a", "b", "c")))
    x, labels = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    told, untold = model(x, SIGMA, labels), model(x, SIGMA, None)
    assert not torch.allclose(told, untold)
    strengths = torch.tensor([1.0, 0.0, 2.0, 1.0], dtype=torch.float64)
    expected = torch.stack((told[0], untold[1], 2 * told[2] - untold[2], told[3]))
    assert torch.allclose(guided(model, x, SIGMA, labels, guidance(strengths)), expected, rtol=0, atol=1e-12)
    assert torch.equal(guided(model, x, SIGMA, labels, guidance(torch.ones(4))), told)
    assert torch.equal(guided(model, x, SIGMA, None, guidance(strengths)), untold)
