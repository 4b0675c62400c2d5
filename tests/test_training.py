import dataclasses
import math

import pytest
import torch

from diffusion_core.config import PRESETS, ModelConfig
from diffusion_core.denoiser import Denoiser
from diffusion_core.ema import gamma_of_width, new_ema, update_ema
from diffusion_core.training import Optimisation, learning_rate, loss_of, new_state, train_step
from diffusion_core.unet import UNet

SETTINGS = Optimisation(
    steps=100, learning_rate=2e-3, warmup=10, clip=1.0, weight_decay=0.0, label_dropout=0.1, ema=0.1, seed=5
)
IDS = torch.arange(8)
UNET = dataclasses.replace(PRESETS["tiny"], classes=2)


def denoiser(dtype=torch.float64):
    torch.manual_seed(0)
    network = UNet(UNET).to(dtype)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return Denoiser(network, ModelConfig(UNET, class_names=("a", "b")))


def pictures(dtype=torch.float64):
    return torch.rand(8, 3, 8, 8, dtype=dtype, generator=torch.Generator().manual_seed(1)) * 2 - 1, IDS % 2


def test_the_rate_warms_up_and_falls_to_zero_along_a_half_cosine():
    rates = [learning_rate(step, SETTINGS) for step in (0, 4, 9, 10, 55, 100)]
    assert rates == pytest.approx([2e-4, 1e-3, 2e-3, 2e-3, 1e-3, 0.0], abs=1e-12)


def test_the_loss_of_a_batch_is_the_mean_of_its_parts_in_any_order():
    exact, (x0, label) = denoiser(), pictures()
    whole = loss_of(exact, x0, label, IDS, 7, SETTINGS)
    order = torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    parts = [loss_of(exact, x0[part], label[part], IDS[part], 7, SETTINGS) for part in order.split(2)]
    assert whole.item() == pytest.approx(torch.stack(parts).mean().item(), rel=1e-12)
    assert loss_of(exact, x0, label, IDS, 8, SETTINGS) != whole
    other_seed = dataclasses.replace(SETTINGS, seed=6)
    assert loss_of(exact, x0, label, IDS, 7, other_seed) != whole


def test_all_labels_dropped_is_training_without_labels():
    exact, (x0, label) = denoiser(), pictures()
    dropped = dataclasses.replace(SETTINGS, label_dropout=1.0)
    assert torch.equal(loss_of(exact, x0, label, IDS, 0, dropped), loss_of(exact, x0, None, IDS, 0, dropped))


def test_steps_lower_the_loss_of_the_pictures_that_are_trained_on():
    torch.manual_seed(0)
    learner = Denoiser(UNet(UNET), ModelConfig(UNET, class_names=("a", "b")))
    label = IDS % 2
    x0 = (label * 2.0 - 1)[:, None, None, None].expand(8, 3, 8, 8) * 0.5
    fast = dataclasses.replace(SETTINGS, learning_rate=1e-2)

    def loss():
        return sum(loss_of(learner, x0, label, IDS, step, SETTINGS).item() for step in range(5)) / 5

    before, state = loss(), new_state(learner, learner.network, fast)
    for _ in range(25):
        state, _ = train_step(state, learner.network, x0, label, IDS, fast)
    assert state.step == 25
    assert loss() < 0.8 * before


def test_a_loss_that_is_not_finite_stops_before_the_weights_change():
    learner, (x0, label) = denoiser(), pictures()
    state = new_state(learner, learner.network, SETTINGS)
    before = {name: value.clone() for name, value in learner.network.state_dict().items()}
    with pytest.raises(FloatingPointError, match="loss: nan at step 0"):
        train_step(state, learner.network, x0 * math.nan, label, IDS, SETTINGS)
    assert all(torch.equal(value, before[name]) for name, value in learner.network.state_dict().items())


def test_the_average_is_the_weighted_mean_of_the_whole_trajectory():
    network = torch.nn.Linear(1, 1, bias=False).double()
    gamma, ema, values = 6.0, new_ema(network), []
    for step in range(1, 41):
        torch.nn.init.constant_(network.weight, math.sin(step))
        values.append(math.sin(step))
        update_ema(ema, network, step, gamma)
    keeps = [(1 - 1 / step) ** (gamma + 1) for step in range(1, 41)]
    weights = [(1 - keeps[at]) * math.prod(keeps[at + 1 :]) for at in range(40)]
    assert sum(weights) == pytest.approx(1.0)
    assert float(ema["weight"]) == pytest.approx(sum(w * v for w, v in zip(weights, values, strict=True)), rel=1e-12)


def test_the_width_of_the_average_gives_the_published_exponents():
    assert gamma_of_width(0.10) == pytest.approx(6.94, abs=0.005)
    assert gamma_of_width(0.05) == pytest.approx(16.97, abs=0.005)
    for width in (0.0, 0.3):
        with pytest.raises(ValueError, match="ema: width"):
            gamma_of_width(width)


def test_the_first_step_is_adamw_by_hand():
    settings = dataclasses.replace(SETTINGS, warmup=4, weight_decay=0.1, clip=1e9)
    learner, (x0, label) = denoiser(), pictures()
    before = [parameter.detach().clone() for parameter in learner.network.parameters()]
    loss = loss_of(learner, x0, label, IDS, 0, settings)
    slopes = torch.autograd.grad(loss, list(learner.network.parameters()))
    state, told = train_step(new_state(learner, learner.network, settings), learner.network, x0, label, IDS, settings)
    assert told == pytest.approx(loss.item(), rel=1e-12)
    rate = 2e-3 / 4
    for parameter, old, slope in zip(learner.network.parameters(), before, slopes, strict=True):
        expected = old * (1 - rate * 0.1) - rate * slope / (slope.abs() + 1e-8)
        assert torch.allclose(parameter, expected, rtol=0, atol=1e-10)
    for name, value in learner.network.state_dict().items():
        assert torch.equal(state.ema[name], value), "the first average is the first weights"


def test_a_steep_slope_is_clipped_to_the_length_of_the_settings():
    learner, (x0, label) = denoiser(), pictures()
    settings = dataclasses.replace(SETTINGS, clip=1e-3)
    train_step(new_state(learner, learner.network, settings), learner.network, x0, label, IDS, settings)
    length = sum(float(parameter.grad.square().sum()) for parameter in learner.network.parameters()) ** 0.5
    assert length == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize(("steps", "warmup"), [(10, 0), (10, 10), (10, 20)])
def test_the_rate_is_positive_and_bounded_for_any_warm_up(steps, warmup):
    settings = dataclasses.replace(SETTINGS, steps=steps, warmup=warmup)
    rates = [learning_rate(step, settings) for step in range(steps)]
    assert 0 < min(rates) <= max(rates) <= settings.learning_rate
