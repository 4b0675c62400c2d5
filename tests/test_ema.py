import math

import pytest
import torch
from torch import nn

from diffusion_core.ema import gamma_of_width, new_ema, update_ema


def averaged(trajectory, gamma, start=0.0):
    """The average after the weight has taken every value of the trajectory."""
    network = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(network.weight, start)
    ema = new_ema(network)
    for step, value in enumerate(trajectory, start=1):
        nn.init.constant_(network.weight, value)
        update_ema(ema, network, step, gamma)
    return float(ema["weight"])


@pytest.mark.parametrize("gamma", [0.0, 6.94, 16.97])
def test_the_average_weighs_the_trajectory_by_a_power_of_its_step(gamma):
    # The profile (gamma + 1)·t^gamma on [0, 1], integrated over the place of step i: from (i - 1)/50 to i/50.
    trajectory = [math.sin(3 * i) for i in range(1, 51)]
    weights = [(i / 50) ** (gamma + 1) - ((i - 1) / 50) ** (gamma + 1) for i in range(1, 51)]
    expected = sum(weight * value for weight, value in zip(weights, trajectory, strict=True))
    assert averaged(trajectory, gamma) == pytest.approx(expected, rel=1e-10)


def test_what_the_weights_were_before_the_first_step_is_forgotten():
    assert averaged([2.0, 3.0], 5.0, start=1e6) == averaged([2.0, 3.0], 5.0, start=0.0)


def test_the_average_is_a_copy_that_training_does_not_move():
    network = nn.Linear(2, 2)
    ema = new_ema(network)
    before = ema["weight"].clone()
    nn.init.constant_(network.weight, 9.0)
    assert torch.equal(ema["weight"], before)
    assert not ema["weight"].requires_grad


@pytest.mark.parametrize(("width", "gamma"), [(0.10, 6.94), (0.05, 16.97)])
def test_published_widths_have_their_published_exponents(width, gamma):
    assert gamma_of_width(width) == pytest.approx(gamma, abs=0.005)


@pytest.mark.parametrize("width", [0.01, 0.075, 0.2, 0.28])
def test_the_profile_of_an_exponent_is_as_wide_as_was_asked(width):
    gamma = gamma_of_width(width)
    times = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    profile = times**gamma / (times**gamma).sum()
    mean = (profile * times).sum()
    assert float((profile * (times - mean) ** 2).sum().sqrt()) == pytest.approx(width, rel=1e-4)


@pytest.mark.parametrize("width", [-0.1, 0.0, 0.2801, 1.0, math.nan])
def test_a_width_without_an_exponent_is_refused(width):
    with pytest.raises(ValueError, match=f"ema: width {width}; need more than 0 and at most 0.28"):
        gamma_of_width(width)
