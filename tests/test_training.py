import dataclasses
import math

import pytest
import torch

from diffusion_core.config import PRESETS, ModelConfig
from diffusion_core.denoiser import Denoiser
from diffusion_core.ema import Profile
from diffusion_core.noise import derive_seeds, uniform
from diffusion_core.schedules import SigmaDistribution
from diffusion_core.strategies import shard
from diffusion_core.training import Batch, Optimisation, learning_rate, losses_of, new_state, train_step
from diffusion_core.unet import UNet

SETTINGS = Optimisation(
    steps=100,
    learning_rate=2e-3,
    warmup=10,
    clip=1.0,
    weight_decay=0.0,
    label_dropout=0.1,
    ema=(Profile("power", 0.1),),
    seed=5,
    global_batch_size=8,
)
IDS = torch.arange(8)
UNET = dataclasses.replace(PRESETS["tiny"], classes=2)


def denoiser(dtype=torch.float64):
    torch.manual_seed(0)
    network = UNet(UNET).to(dtype)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return Denoiser(network, ModelConfig(UNET, class_names=("a", "b")))


def batch(dtype=torch.float64):
    x0 = torch.rand(8, 3, 8, 8, dtype=dtype, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return Batch(x0, IDS % 2, IDS, torch.arange(8))


def part_of(whole, index):
    return Batch(*(each[index] for each in whole))


def loss_of(model, given, step, settings):
    return losses_of(model, given, step, settings).mean()


def begin(learner, settings=SETTINGS):
    return new_state(learner, learner.network, settings)


def test_the_rate_warms_up_and_falls_to_zero_along_a_half_cosine():
    rates = [learning_rate(step, SETTINGS) for step in (0, 4, 9, 10, 55, 100)]
    assert rates == pytest.approx([2e-4, 1e-3, 2e-3, 2e-3, 1e-3, 0.0], abs=1e-12)


def test_the_loss_of_a_sample_is_its_own_in_any_batch():
    exact, whole = denoiser(), batch()
    losses = losses_of(exact, whole, 7, SETTINGS)
    order = torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    parts = [losses_of(exact, part_of(whole, part), 7, SETTINGS) for part in order.split(3)]
    assert torch.allclose(torch.cat(parts), losses[order], rtol=1e-12, atol=0)
    assert not torch.allclose(losses_of(exact, whole, 8, SETTINGS), losses)
    assert not torch.allclose(losses_of(exact, whole, 7, dataclasses.replace(SETTINGS, seed=6)), losses)


def test_all_labels_dropped_is_training_without_labels():
    exact, whole = denoiser(), batch()
    dropped = dataclasses.replace(SETTINGS, label_dropout=1.0)
    without = whole._replace(label=None)
    assert torch.equal(losses_of(exact, whole, 0, dropped), losses_of(exact, without, 0, dropped))


class Hears(torch.nn.Module):
    """A network that remembers the noise levels that it is told."""

    def __init__(self):
        super().__init__()
        self.told = []

    def forward(self, x, c_noise, label):
        self.told.append(c_noise)
        return x


def levels_heard(parts, settings, step=3):
    ear = Hears()
    for part in parts:
        losses_of(Denoiser(ear, ModelConfig(UNET, class_names=("a", "b"))), part, step, settings)
    return torch.exp(4 * torch.cat(ear.told))


def test_a_global_batch_covers_the_noise_levels_evenly_however_it_is_cut():
    whole = batch()
    sigmas = levels_heard([whole], SETTINGS)
    # the place of ln(sigma) among eight equal parts of N(-1.2, 1.2²)
    quantiles = 0.5 * (1 + torch.erf((sigmas.log() + 1.2) / (1.2 * math.sqrt(2))))
    assert sorted((8 * quantiles).floor().long().tolist()) == list(range(8))
    parts = [part_of(whole, slice(0, 3)), part_of(whole, slice(3, 8))]
    assert torch.allclose(levels_heard(parts, SETTINGS), sigmas, rtol=1e-12)
    assert not torch.allclose(levels_heard([whole], SETTINGS, step=4), sigmas)


def test_noise_levels_that_are_not_stratified_belong_to_the_sample_alone():
    free = dataclasses.replace(
        SETTINGS, stratified=False, sigma=SigmaDistribution("uniform_t", schedule="flow", high=9.0)
    )
    whole = batch()
    moved = whole._replace(place=whole.place.flip(0))
    assert torch.equal(levels_heard([whole], free), levels_heard([moved], free))
    low, high = 0.002 / 1.002, 0.9
    places = uniform(derive_seeds(5, IDS), "train_sigma", 3)
    t = low + places * (high - low)
    assert torch.allclose(levels_heard([whole], free), t / (1 - t), rtol=1e-9)


def test_steps_lower_the_loss_of_the_pictures_that_are_trained_on():
    for precision in ("float32", "bfloat16"):
        torch.manual_seed(0)
        learner = Denoiser(UNet(UNET), ModelConfig(UNET, class_names=("a", "b")))
        label = IDS % 2
        x0 = (label * 2.0 - 1)[:, None, None, None].expand(8, 3, 8, 8) * 0.5
        whole = Batch(x0, label, IDS, torch.arange(8))
        fast = dataclasses.replace(SETTINGS, learning_rate=3e-3, precision=precision)
        before = sum(loss_of(learner, whole, step, SETTINGS).item() for step in range(5))
        state = begin(learner, fast)
        for _ in range(40):
            state, _ = train_step(state, whole, fast)
        assert state.step == 40
        assert sum(loss_of(learner, whole, step, SETTINGS).item() for step in range(5)) < 0.8 * before
        kept = [*learner.network.state_dict().values(), *state.ema[0].values()]
        assert {value.dtype for value in kept} == {torch.float32}


@pytest.mark.parametrize("weight", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_the_weights_change(weight):
    learner, whole = denoiser(), batch()
    learner.network.leave.bias.data[0] = weight
    state = begin(learner)
    before = {name: value.clone() for name, value in learner.network.state_dict().items()}
    with pytest.raises(FloatingPointError, match=r"loss: (nan|inf).* at step 0; lower the learning rate"):
        train_step(state, whole, SETTINGS)
    after = learner.network.state_dict()
    assert all(torch.equal(value.nan_to_num(7.0), before[name].nan_to_num(7.0)) for name, value in after.items())
    assert state.step == 0


def test_the_first_step_is_adamw_by_hand():
    settings = dataclasses.replace(SETTINGS, warmup=4, weight_decay=0.1, clip=1e9)
    learner, whole = denoiser(), batch()
    before = [parameter.detach().clone() for parameter in learner.network.parameters()]
    loss = loss_of(learner, whole, 0, settings)
    slopes = torch.autograd.grad(loss, list(learner.network.parameters()))
    state, told = train_step(begin(learner, settings), whole, settings)
    assert told.loss == pytest.approx(loss.item(), rel=1e-12)
    rate = 2e-3 / 4
    for parameter, old, slope in zip(learner.network.parameters(), before, slopes, strict=True):
        expected = old * (1 - rate * 0.1) - rate * slope / (slope.abs() + 1e-8)
        assert torch.allclose(parameter, expected, rtol=0, atol=1e-10)
    for name, value in learner.network.state_dict().items():
        assert torch.equal(state.ema[0][name], value), "the first average is the first weights"


@pytest.mark.parametrize("micro_batches", [2, 3, 4, 8, 20])
def test_a_batch_in_parts_gives_the_gradients_of_the_whole(micro_batches):
    wholes = []
    for count in (1, micro_batches):
        learner, settings = denoiser(), dataclasses.replace(SETTINGS, micro_batches=count, clip=1e9)
        _, told = train_step(begin(learner, settings), batch(), settings)
        wholes.append((told.loss, [parameter.grad for parameter in learner.network.parameters()]))
    assert wholes[1][0] == pytest.approx(wholes[0][0], rel=1e-12)
    for one, other in zip(wholes[0][1], wholes[1][1], strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-14)


def test_averages_of_several_widths_are_kept_at_once():
    profiles = (Profile("power", 0.05), Profile("power", 0.2), Profile("exponential", 0.5))
    settings, learner = dataclasses.replace(SETTINGS, ema=profiles), denoiser()
    state, seen = begin(learner, settings), [learner.network.leave.bias.detach().clone()]
    for _ in range(4):
        state, _ = train_step(state, batch(), settings)
        seen.append(learner.network.leave.bias.detach().clone())
    for profile, average in zip(profiles, state.ema, strict=True):
        expected = seen[0]
        for step, value in enumerate(seen[1:], start=1):
            expected = profile.keep(step) * expected + (1 - profile.keep(step)) * value
        assert torch.allclose(average["leave.bias"], expected, rtol=1e-12, atol=0)


def test_a_steep_slope_is_clipped_to_the_length_of_the_settings():
    learner, settings = denoiser(), dataclasses.replace(SETTINGS, clip=1e-3)
    train_step(begin(learner, settings), batch(), settings)
    length = sum(float(parameter.grad.square().sum()) for parameter in learner.network.parameters()) ** 0.5
    assert length == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"x0": batch().x0 * 2}, "x0: values from -1.9.* to 1.9.*; need -1 to 1"),
        ({"x0": batch().x0 * math.nan}, "x0: 1536 of 1536 values are NaN"),
        ({"x0": torch.zeros(8, 3, 8, 8, dtype=torch.uint8)}, "x0: torch.uint8"),
        ({"x0": torch.zeros(8, 1, 8, 8)}, "x0: .*need .B, 3, H, W."),
        ({"label": torch.full((8,), 3)}, "label: 3; need 0 to 1, or 2 for the null class"),
        ({"label": torch.zeros(7, dtype=torch.int64)}, "label: torch.int64 .7."),
        ({"ids": torch.zeros(8)}, "ids: torch.float32"),
        ({"place": torch.arange(7)}, "place: 7 for 8 pictures"),
    ],
)
def test_a_batch_that_is_none_is_refused_by_its_name(change, told):
    with pytest.raises(ValueError, match=told):
        train_step(begin(denoiser()), batch()._replace(**change), SETTINGS)


@pytest.mark.parametrize("settings", [{"micro_batches": 0}, {"global_batch_size": 0}, {"label_dropout": 1.5}])
def test_settings_that_no_run_can_have_are_refused_by_their_name(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        dataclasses.replace(SETTINGS, **settings)


@pytest.mark.parametrize(("steps", "warmup"), [(10, 0), (10, 10), (10, 20)])
def test_the_rate_is_positive_and_bounded_for_any_warm_up(steps, warmup):
    settings = dataclasses.replace(SETTINGS, steps=steps, warmup=warmup)
    rates = [learning_rate(step, settings) for step in range(steps)]
    assert 0 < min(rates) <= max(rates) <= settings.learning_rate


SHARDED = dataclasses.replace(SETTINGS, ema=(Profile("power", 0.1), Profile("exponential", 0.9)), clip=0.5)


def sharded_rank(rank, folder):
    """One of two processes: three steps on its half of the batch; rank 0 writes what came out."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    learner = denoiser()
    shard(learner.network, init_device_mesh("cpu", (2,)))
    settings = dataclasses.replace(SHARDED, world=2)
    state, whole, losses = begin(learner, settings), batch(), []
    places = [value.to_local().data_ptr() for value in state.ema[0].values()]
    for _ in range(3):
        state, told = train_step(state, part_of(whole, slice(4 * rank, 4 * rank + 4)), settings)
        losses.append(told.loss)
    assert all(isinstance(value, DTensor) for average in state.ema for value in average.values())
    assert places == [value.to_local().data_ptr() for value in state.ema[0].values()], "moved in place"
    tensors = [{name: value.full_tensor() for name, value in average.items()} for average in state.ema]
    weights = {name: value.full_tensor().detach() for name, value in learner.network.state_dict().items()}
    torch.save((losses, weights, tensors), f"{folder}/rank-{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_with_sharded_weights_learn_what_one_learns(tmp_path):
    torch.multiprocessing.spawn(sharded_rank, (str(tmp_path),), nprocs=2)
    learner = denoiser()
    state, losses = begin(learner, SHARDED), []
    for _ in range(3):
        state, told = train_step(state, batch(), SHARDED)
        losses.append(told.loss)
    found = [torch.load(tmp_path / f"rank-{rank}.pt") for rank in range(2)]
    sums = [a + b for a, b in zip(found[0][0], found[1][0], strict=True)]
    assert sums == pytest.approx(losses, rel=1e-9)
    for name, value in learner.network.state_dict().items():
        assert torch.allclose(found[0][1][name], value, rtol=0, atol=1e-9), name
        for number, average in enumerate(state.ema):
            assert torch.allclose(found[0][2][number][name], average[name], rtol=0, atol=1e-9), name
