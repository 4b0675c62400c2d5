import math

import pytest
import torch
from torch import nn

from diffusion_core.ema import (
    Profile,
    Snapshot,
    _products,
    gamma_of_width,
    new_ema,
    posthoc_weights,
    reconstruct,
    update_ema,
)


def averaged(trajectory, profile, start=0.0):
    """The average after the weight has taken every value of the trajectory."""
    network = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(network.weight, start)
    ema = new_ema(network)
    for step, value in enumerate(trajectory, start=1):
        nn.init.constant_(network.weight, value)
        update_ema(ema, network, step, profile)
    return float(ema["weight"])


@pytest.mark.parametrize("width", [0.28, 0.1, 0.05])
def test_the_average_weighs_the_trajectory_by_a_power_of_its_step(width):
    # The profile (gamma + 1)·t^gamma on [0, 1], integrated over the place of step i: from (i - 1)/50 to i/50.
    gamma = gamma_of_width(width)
    trajectory = [math.sin(3 * i) for i in range(1, 51)]
    weights = [(i / 50) ** (gamma + 1) - ((i - 1) / 50) ** (gamma + 1) for i in range(1, 51)]
    expected = sum(weight * value for weight, value in zip(weights, trajectory, strict=True))
    assert averaged(trajectory, Profile("power", width)) == pytest.approx(expected, rel=1e-10)


def test_what_the_weights_were_before_the_first_step_is_forgotten():
    assert averaged([2.0, 3.0], Profile("power", 0.1), 1e6) == averaged([2.0, 3.0], Profile("power", 0.1))


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


def test_the_exponential_average_is_the_plain_recursion():
    trajectory = [math.sin(3 * i) for i in range(1, 51)]
    expected = 1.5
    for value in trajectory:
        expected = 0.9 * expected + 0.1 * value
    assert averaged(trajectory, Profile("exponential", 0.9), 1.5) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("value", [-0.1, 1.0, math.nan])
def test_an_exponential_average_that_never_moves_is_refused(value):
    with pytest.raises(ValueError, match=f"ema: keeps {value}"):
        Profile("exponential", value)


def test_an_average_is_moved_in_place():
    network = nn.Linear(2, 2)
    ema = new_ema(network)
    before = {name: value.data_ptr() for name, value in ema.items()}
    nn.init.constant_(network.weight, 9.0)
    update_ema(ema, network, 1, Profile("power", 0.1))
    assert (ema["weight"] == 9.0).all()
    assert {name: value.data_ptr() for name, value in ema.items()} == before


@pytest.mark.parametrize("ends", [(30.0, 6.94, 80.0, 16.97), (80.0, 6.94, 30.0, 16.97), (50.0, 6.94, 50.0, 3.0)])
def test_the_product_of_two_profiles_is_its_integral(ends):
    t_a, gamma_a, t_b, gamma_b = ends
    t = (torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 10_000
    first = torch.where(t <= t_a, (gamma_a + 1) / t_a * (t / t_a) ** gamma_a, 0.0)
    second = torch.where(t <= t_b, (gamma_b + 1) / t_b * (t / t_b) ** gamma_b, 0.0)
    found = _products(*(torch.tensor(value, dtype=torch.float64) for value in ends))
    assert float(found) == pytest.approx(float((first * second).sum() / 10_000), rel=1e-6)


def descent(steps, every, widths, targets):
    """A noisy descent as training is: snapshots of `widths`, and averages of `targets` tracked all along."""
    generator = torch.Generator().manual_seed(0)
    network = nn.Linear(16, 16).double()
    averages = {width: new_ema(network) for width in (*widths, *targets)}
    snapshots, halfway = [], {}
    for step in range(1, steps + 1):
        for value in network.parameters():
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            value.data += 0.01 * (1 - value.data) + 0.02 * noise
        for width, average in averages.items():
            update_ema(average, network, step, Profile("power", width))
        if step % every == 0:
            snapshots += [
                Snapshot(step, width, {name: value.clone() for name, value in averages[width].items()})
                for width in widths
            ]
        if step == steps // 2:
            halfway = {width: averages[width]["weight"].clone() for width in targets}
    return snapshots, averages, halfway


def test_any_width_is_rebuilt_from_snapshots_of_two():
    targets = (0.04, 0.075, 0.15, 0.2)
    snapshots, tracked, halfway = descent(3000, 3000 // 40, (0.05, 0.1), targets)
    for width in targets:
        rebuilt = reconstruct(snapshots, 3000, width)
        for name, value in tracked[width].items():
            assert float((rebuilt[name] - value).norm() / value.norm()) < 1e-3, (width, name)
        early = reconstruct([each for each in snapshots if each.step <= 1500], 1500, width)["weight"]
        assert float((early - halfway[width]).norm() / halfway[width].norm()) < 2e-3, width


def test_a_width_that_was_stored_is_found_again():
    steps, widths = [100, 100, 200, 200], [0.05, 0.1, 0.05, 0.1]
    assert posthoc_weights(steps, widths, 200, 0.1).tolist() == pytest.approx([0, 0, 0, 1], abs=1e-6)


@pytest.mark.parametrize(("steps", "widths"), [([], []), ([100], [0.1, 0.05]), ([300], [0.1]), ([0], [0.1])])
def test_snapshots_that_do_not_fit_are_refused(steps, widths):
    with pytest.raises(ValueError, match="snapshots: "):
        posthoc_weights(steps, widths, 200, 0.1)
